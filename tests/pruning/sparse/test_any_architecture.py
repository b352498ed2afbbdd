"""One-shot sparsity of models that no family declares: by magnitude any, by text the decoders that can be walked."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.models.stored.stored_model import open_any
from shearing.pruning.calibration.places import matrices_of
from shearing.pruning.calibration.statistics import InputStatistics
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.prune_layers import prune_layers, units_of_work
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.pruning.sparse.reconstruction.reconstruction import Choice
from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers
from tests.models.tiny import tiny_ids
from tests.pruning.sparse.test_prune_layers import PATTERN, compute_of, method_of

QUIET = Console(quiet=True)
TOKENS = tiny_ids(sequences=5)
COMMON = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**COMMON, "intermediate_size": 24, "max_position_embeddings": 32}
DECODERS: dict[str, Callable[[], Any]] = {
    # Positions are added outside of the layers, and the widths of words and layers differ.
    "opt": lambda: transformers.OPTConfig(
        **COMMON, ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=32, pad_token_id=1
    ),
    # Positions are in the attention; a norm follows the embedding.
    "bloom": lambda: transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2),
    "stablelm": lambda: transformers.StableLmConfig(**TEXT, num_key_value_heads=2),
    # Experts are stored one by one and run as one tensor, and a buffer has a say in which of them are chosen.
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **TEXT,
        num_key_value_heads=2,
        moe_intermediate_size=8,
        n_routed_experts=12,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    # Layers are handed something of the tokens, and something to write in; a buffer scales what they put out.
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **TEXT,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**TEXT, num_key_value_heads=1),
}


def built(architecture: type[Any], config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    model = architecture(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.ndim == 1) + 0.2 * torch.randn_like(parameter))
        stored = model.state_dict().keys()
        for buffer in [buffer for name, buffer in model.named_buffers() if name in stored]:
            buffer.copy_(0.7 + 0.2 * torch.randn(buffer.shape))
    model.save_pretrained(folder)
    return model


def decoder(name: str, folder: Path) -> Any:
    config = DECODERS[name]()
    return built(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, folder)


@torch.no_grad()
def pruned_whole(model: Any, *, method: Any) -> dict[str, Tensor]:
    """The oracle: the whole model in memory, layer by layer, every pass from the tokens on."""
    lists = [(name, found) for name, found in model.named_modules() if isinstance(found, nn.ModuleList)]
    (name, layers), *_ = lists
    found = {}
    for index, layer in enumerate(layers):
        linears = {member: module for member, module in layer.named_modules() if isinstance(module, nn.Linear)}
        needs = method.criterion.needs | method.reconstruction.needs
        statistics = {
            member: InputStatistics(module.in_features, needs=needs, device=torch.device("cpu"))
            for member, module in linears.items()
        }
        handles = [
            # Some hand tokens of all sequences over as one list.
            module.register_forward_pre_hook(
                lambda _, args, add=statistics[member].add: add(args[0], sequences=len(TOKENS))
            )
            for member, module in linears.items()
        ]
        model(TOKENS, use_cache=False)
        for handle in handles:
            handle.remove()
        for member, module in linears.items():
            choice = Choice(method.criterion, PATTERN, statistics[member])
            new, _ = method.reconstruction.prune(module.weight, choice=choice)
            module.weight.copy_(new)
            found[f"{name}.{index}.{member}.weight"] = new
    return found


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_that_can_be_walked_equal_the_whole_model_in_memory(name: str, criterion: str, tmp_path: Path) -> None:
    model = decoder(name, tmp_path / "model")
    source = open_any(str(tmp_path / "model"), revision=None, converted=tmp_path / "converted", towers=False)
    assert source.structure is not None
    method = method_of(criterion, matrices=[matrix.name for matrix in matrices_of(source)])
    calibration, compute = Calibration(TOKENS, "random"), compute_of(tmp_path)
    layers, calls = PrunedLayers(tmp_path / "blocks"), []
    prune_layers(
        source,
        method=method,
        calibration=calibration,
        compute=compute,
        pruned_layers=layers,
        advance=calls.append,
    )
    assert sum(calls) == units_of_work(source, method=method, calibration=calibration, compute=compute)
    found = {name: weight for layer in range(2) for name, weight in layers.weights(layer).items()}
    stored = source.structure.stored_names
    expected = {stored[own]: weight for own, weight in pruned_whole(model, method=method).items()}
    assert found.keys() == expected.keys()
    for matrix, weight in expected.items():
        assert torch.equal(found[matrix], weight), matrix


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = transformers.LlamaConfig(**TEXT)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=96)


ANY = {
    "bert": ("BertForMaskedLM", lambda: transformers.BertConfig(**TEXT), ("cls.",)),
    "vit": (
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
        ),
        ("classifier",),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
        ("lm_head",),
    ),
    "llava": ("LlavaForConditionalGeneration", llava, ("vision_tower", "multi_modal_projector", "lm_head")),
}


def run(folder: Path, output: Path, *, console: Console = QUIET, **keys: Any) -> Path:
    recipe = {"criterion": "magnitude", "sparsity": 0.5, **keys}
    return sparsify(SparsifyRecipe.model_validate({"model": str(folder), "output": output, **recipe}), console=console)


@pytest.mark.parametrize("name", ANY)
def test_magnitude_prunes_the_layers_of_any_architecture(name: str, tmp_path: Path) -> None:
    architecture, config, outside = ANY[name]
    model = built(getattr(transformers, architecture), config(), tmp_path / "model")
    output = run(tmp_path / "model", tmp_path / "out")
    assert not list(differences(output))
    sparse = getattr(transformers, architecture).from_pretrained(output)
    pruned = dict(sparse.named_parameters())
    linears = {f"{name}.weight" for name, found in model.named_modules() if isinstance(found, nn.Linear)}
    for parameter, dense in model.named_parameters():
        weight = pruned[parameter]
        if parameter in linears and not any(part in parameter for part in outside):
            cut = dense.abs() <= dense.abs().flatten().kthvalue(dense.numel() // 2).values
            assert torch.equal(weight, dense.masked_fill(cut, 0.0)), parameter
        else:
            assert torch.equal(weight, dense), parameter


def test_towers_are_pruned_where_they_are_asked_for(tmp_path: Path) -> None:
    built(transformers.LlavaForConditionalGeneration, llava(), tmp_path / "model")
    said = Console(file=StringIO(), width=300)
    run(tmp_path / "model", tmp_path / "without", console=said)
    assert "left dense: model.vision_tower; include_towers=true" in said.file.getvalue()  # type: ignore[attr-defined]
    run(tmp_path / "model", tmp_path / "out", include_towers=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    of_tower = [weight for name, weight in stored.items() if "vision" in name and name.endswith("fc1.weight")]
    assert len(of_tower) == 2
    assert all(float((weight == 0).float().mean()) == 0.5 for weight in of_tower)


@pytest.mark.parametrize(
    ("architecture", "config", "keys", "said"),
    [
        (
            "GPT2LMHeadModel",
            lambda: transformers.GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2),
            {},
            "Linear",
        ),
        ("T5ForConditionalGeneration", ANY["t5"][1], {"criterion": "wanda", "calibration": ["x"]}, "magnitude"),
        ("T5ForConditionalGeneration", ANY["t5"][1], {"evaluate": "corpus"}, "evaluate"),
    ],
    ids=["no linear layers", "no decoder", "no loss of text"],
)
def test_what_cannot_be_is_said_before_any_work(
    architecture: str, config: Callable[[], Any], keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    built(getattr(transformers, architecture), config(), tmp_path / "model")
    with pytest.raises(ShearingError, match=said):
        run(tmp_path / "model", tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()
