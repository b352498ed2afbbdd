"""The walk through a model in memory: what layers are called with, and what they read."""

from __future__ import annotations

import pytest
import torch

from shearing.data.documents import DocumentRules, Inputs
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.masked import MaskedModel, Masks
from shearing.pruning.calibration.walk import first_inputs, layer_calls, run_layer
from shearing.training.device import compile_layers
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model


def residual_streams(model: MaskedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each layer but the first and the final norm read."""
    seen: list[torch.Tensor] = []
    norm = model.model.get_submodule(anatomy_of(model.model.config).final_norm.name)
    places = [*decoder_layers(model.model)[1:], norm]
    handles = [place.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])) for place in places]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2-sliding", "qwen3", "smollm3", "granite", "olmo3", "gemma2", "gemma3"]
)
def test_layers_one_by_one_are_the_whole_model(family: str) -> None:
    model = MaskedModel(tiny_model(family))
    batch = Inputs(tiny_ids(sequences=2))
    streams, calls = first_inputs(model.model, [batch])
    assert len(streams) == len(calls) == 1
    for layer, call, expected in zip(
        model.model.model.layers, calls[0], residual_streams(model, batch.tokens), strict=True
    ):
        with torch.no_grad():
            _, streams[0] = run_layer(layer, layer, streams[0], call, places=())
        torch.testing.assert_close(streams[0], expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_and_their_embeddings_lead_to_the_same_calls(family: str) -> None:
    model, ids = tiny_model(family), tiny_ids(sequences=3)
    stream, calls = layer_calls(model, input_ids=ids, use_cache=False)
    embeddings = model.get_input_embeddings()(ids)
    same, others = layer_calls(model, inputs_embeds=embeddings, use_cache=False)
    assert torch.equal(stream, same)
    assert len(calls) == len(others) == model.config.num_hidden_layers
    for call, other in zip(calls, others, strict=True):
        assert call.keywords.keys() == other.keywords.keys()
        for mine, its in zip(call.keywords["position_embeddings"], other.keywords["position_embeddings"], strict=True):
            assert torch.equal(mine, its)


def test_masks_and_documents_are_in_the_streams_and_calls() -> None:
    model = MaskedModel(tiny_model("llama"))
    alive = torch.ones(model.model.config.hidden_size)
    alive[:5] = 0.0
    positions = torch.arange(17).repeat(2, 1) % 6
    documents = DocumentRules(attention_within=True).documents(positions, device=torch.device("cpu"))
    model.set_masks(Masks(hidden=alive))
    (stream,), (calls,) = first_inputs(model.model, [Inputs(tiny_ids(), documents)])
    assert (stream[..., :5] == 0).all()
    assert all(torch.equal(call.keywords["cu_seq_lens_q"], documents.boundaries) for call in calls)
    assert all("forward" not in vars(layer) for layer in model.model.model.layers)


def test_compiled_layers_are_left_alone() -> None:
    model = tiny_model("llama")
    batch = Inputs(tiny_ids())
    (expected,), _ = first_inputs(model, [batch])
    compile_layers(model)
    (found,), (calls,) = first_inputs(model, [batch])
    assert torch.equal(found, expected)
    assert len(calls) == model.config.num_hidden_layers
