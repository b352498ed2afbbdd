"""Attention within documents against documents alone, and against Hugging Face's own with an explicit S x S mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor
from torch.distributed.utils import _to_kwargs
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from shearing.data.documents import IGNORED_LABEL, DocumentRules, Documents
from shearing.models import attention
from shearing.models.anatomy import backbone
from shearing.models.attention import attention_within_documents, drop_attention_mask, keep_attention_within_documents
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.objectives.language_model import LanguageModelLoss
from shearing.training.device import checkpoint_activations
from tests.models.test_exactness import GRANULARITIES, masks_and_target
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

WITHIN = DocumentRules(attention_within=True)
LENGTHS = ((5, 9, 3), (17,))
"""Tokens of the documents of two rows, S = 16 inputs and the last label; the sliding windows are of 4."""


def positions(*rows: tuple[int, ...]) -> Tensor:
    """int64 [B, T] of rows made of documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])


def documents(*rows: tuple[int, ...], rules: DocumentRules = WITHIN) -> Documents:
    made = rules.documents(positions(*rows), device=torch.device("cpu"))
    assert made is not None
    return made


def block_mask(position_ids: Tensor, *, window: int | None) -> Tensor:
    """Additive mask [B, 1, S, S] of causal attention inside documents."""
    document = (position_ids == 0).cumsum(1)
    distance = torch.arange(position_ids.shape[1])[:, None] - torch.arange(position_ids.shape[1])
    seen = (document[:, :, None] == document[:, None, :]) & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def reference_logits(model: PreTrainedModel, ids: Tensor, position_ids: Tensor) -> Tensor:
    """Eager attention with an explicit mask, of each kind of layer its own."""
    model.set_attn_implementation("eager")
    window = getattr(model.config, "sliding_window", None)
    full, slides = block_mask(position_ids, window=None), block_mask(position_ids, window=window)
    kinds = getattr(model.config, "layer_types", None)
    if model.config.model_type == "mistral":
        mask: Any = slides
    elif kinds is not None and model.config.model_type != "llama":
        mask = {"full_attention": full, "sliding_attention": slides}
    else:
        mask = full
    return model(input_ids=ids, position_ids=position_ids, attention_mask=mask, use_cache=False).logits


def losses_and_gradients(logits: Tensor, labels: Tensor, model: PreTrainedModel) -> tuple[Tensor, list[Tensor]]:
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_document_computes_what_it_computes_alone(family: str, masked: bool) -> None:
    model = tiny_model(family)
    alone = tiny_ids(sequences=1, length=10, seed=1)
    row = torch.cat([tiny_ids(sequences=1, length=7), alone], 1)
    if masked:
        masks, _ = masks_and_target(Shape.of(model.config), GRANULARITIES, fractional=True, seed=0)
        MaskedModel(model).set_masks(masks)
    with torch.no_grad():
        expected = backbone(model)(alone[:, :-1]).last_hidden_state
        with attention_within_documents(model, on=True):
            inputs = documents((7, 10)).keywords()
            found = backbone(model)(row[:, :-1], use_cache=False, **inputs).last_hidden_state[:, 7:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_are_those_of_an_explicit_mask(family: str, across: bool) -> None:
    model, tokens = tiny_model(family, tied=False), tiny_ids(length=17)
    given = documents(*LENGTHS, rules=DocumentRules(attention_within=True, loss_across=across))
    keep_attention_within_documents(model)
    losses = LanguageModelLoss(model, chunk_tokens=5)(tokens, given)
    found = torch.autograd.grad(losses.total, list(model.parameters()))
    labels = tokens[:, 1:].clone()
    if not across:
        labels[0, [4, 13]] = IGNORED_LABEL
    logits = reference_logits(model, tokens[:, :-1], positions(*LENGTHS)[:, :-1])
    expected, gradients = losses_and_gradients(logits, labels, model)
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert losses.labels.tolist() == [16 if across else 14, 16]
    torch.testing.assert_close(losses.rows.sum(), losses.total)


def test_boundaries_stay_on_the_host_where_fsdp2_moves_what_a_call_is_given() -> None:
    keywords = documents(*LENGTHS).keywords()
    _, (moved,) = _to_kwargs((), keywords, torch.device("meta"), False)
    assert moved["position_ids"].device.type == "meta"
    assert moved["document_boundaries"].values is keywords["document_boundaries"].values


def test_labels_may_be_left_out_with_attention_over_whole_rows() -> None:
    model, tokens = tiny_model(), tiny_ids(length=17)
    given = documents(*LENGTHS, rules=DocumentRules(loss_across=False))
    assert given.keywords() == {}
    losses = LanguageModelLoss(model, chunk_tokens=5)(tokens, given)
    labels = tokens[:, 1:].clone()
    labels[0, [4, 13]] = IGNORED_LABEL
    expected = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(kind: str) -> None:
    tokens, given = tiny_ids(length=17), documents(*LENGTHS)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        model.train()
        keep_attention_within_documents(model)
        if checkpointing:
            checkpoint_activations(model, selective=kind == "selective")
        LanguageModelLoss(model, chunk_tokens=5)(tokens, given).total.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_the_slow_way_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(attention, "_VARLEN", None)
    monkeypatch.setattr(attention, "_is_on_gpu", lambda _: True)
    attention._say_slow.cache_clear()
    model = tiny_model()
    keep_attention_within_documents(model)
    for _ in range(2):
        LanguageModelLoss(model, chunk_tokens=5)(tiny_ids(length=17), documents(*LENGTHS))
    [said] = [record.getMessage() for record in caplog.records]
    assert f"torch {torch.__version__} has no kernel" in said


@pytest.mark.slow
def test_compiled_layers_take_other_documents_without_recompiling() -> None:
    model = tiny_model()
    keep_attention_within_documents(model)
    objective = LanguageModelLoss(model, chunk_tokens=5)
    batches = [((5, 9, 3), (17,)), ((17,), (17,)), ((2,) * 8 + (1,), (1,) * 17), ((8, 9), (3, 14)), ((1, 16), (16, 1))]
    tokens = tiny_ids(length=17)
    eager = [objective(tokens, documents(*rows)).rows for rows in batches]
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for number, (rows, expected) in enumerate(zip(batches, eager, strict=True)):
        with torch._dynamo.config.patch(error_on_recompile=number > 2):
            torch.testing.assert_close(objective(tokens, documents(*rows)).rows, expected, rtol=1e-5, atol=1e-5)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("window", [None, 300])
def test_nothing_of_size_s_by_s_is_made(window: int | None) -> None:
    length = 2048
    config = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=length,
        sliding_window=window,
    )
    model = MistralForCausalLM(config)
    keep_attention_within_documents(model)
    given = documents((1200, 400, length + 1 - 1600))
    ids = torch.randint(64, (1, length + 1), generator=torch.Generator().manual_seed(0))
    with _Largest() as largest:
        LanguageModelLoss(model, chunk_tokens=256)(ids, given).total.backward()
    # With a window, a few hundred queries at a time have a mask over what they can see.
    assert largest.numel <= (2 * 512 * (512 + 299) if window else 64 * length)


def test_a_long_document_in_a_sliding_window_is_cut_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shearing.models.attention._QUERIES_AT_ONCE", 5)
    model, ids = tiny_model("mistral"), tiny_ids(length=16)
    keep_attention_within_documents(model)
    rows = ((13, 4), (2, 15))
    with torch.no_grad():
        found = model(ids, use_cache=False, **documents(*rows).keywords()).logits
        expected = reference_logits(model, ids, positions(*rows)[:, :-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_calls_without_documents_are_refused_and_the_kernel_comes_back() -> None:
    model, ids = tiny_model(), tiny_ids()
    with attention_within_documents(model, on=True), pytest.raises(RuntimeError, match="without documents"):
        model(ids)
    assert model.config._attn_implementation == "sdpa"
    drop_attention_mask(model, sequence_length=16)
    with attention_within_documents(model, on=True):
        assert model.config._attn_implementation == "documents_sdpa"
    assert model.config._attn_implementation == "causal_sdpa"
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="eager"):
        keep_attention_within_documents(model)


def test_boundaries_have_few_shapes() -> None:
    boundaries = [documents((1,) * count + (65 - count,)).boundaries for count in range(64)]
    assert {len(found) for found in boundaries if found is not None} == {2, 4, 8, 16, 32, 64, 128}
    found = documents((5, 9, 3), (17,)).boundaries
    assert found is not None
    assert found.tolist() == [0, 5, 14, 16, 32, 32, 32, 32]


def _varlen_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What flash attention's function for stretches computes, with a mask over everything."""
    assert causal
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    total = len(q)
    document = torch.bucketize(torch.arange(total), cu_seqlens_q, right=True)
    distance = torch.arange(total)[:, None] - torch.arange(total)
    seen = (document[:, None] == document) & (distance >= 0)
    if window_size[0] >= 0:
        seen = seen & (distance <= window_size[0])
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    attended = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
    return attended[0].transpose(0, 1)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-sliding", "qwen3"])
def test_flash_attention_is_told_of_documents(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(implementation: str) -> Any:
        assert implementation == "flash_attention_2"
        kwargs_of = flash_utils._lazy_define_process_function(_varlen_by_definition)
        return (None, _varlen_by_definition, None, None, None), (kwargs_of, None)

    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", imported)
    model, ids = tiny_model(family), tiny_ids(length=16)
    model.config._attn_implementation = "flash_attention_2"
    keep_attention_within_documents(model)
    with torch.no_grad():
        found = model(ids, use_cache=False, **documents(*LENGTHS).keywords()).logits
        expected = reference_logits(model, ids, positions(*LENGTHS)[:, :-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-sliding", "qwen3"])
def test_the_gpu_path_hands_stretches_windows_and_groups_to_torch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **settings: Any
    ) -> Tensor:
        assert settings["enable_gqa"] == (q.shape[1] != k.shape[1])
        assert settings["window_size"][1] == 0
        return _varlen_by_definition(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=settings["scale"],
            causal=True,
            window_size=settings["window_size"],
        )

    monkeypatch.setattr("shearing.models.attention._VARLEN", varlen)
    monkeypatch.setattr("shearing.models.attention._has_varlen_kernel", lambda query: True)
    model, ids = tiny_model(family), tiny_ids(length=16)
    keep_attention_within_documents(model)
    with torch.no_grad():
        found = model(ids, use_cache=False, **documents(*LENGTHS).keywords()).logits
        expected = reference_logits(model, ids, positions(*LENGTHS)[:, :-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


HAS_KERNEL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_KERNEL, reason="needs a GPU from Ampere on"))],
)
@pytest.mark.parametrize("family", ["llama", "llama-mha", "mistral", "qwen2", "qwen2-sliding", "qwen3"])
def test_bf16_stays_close_to_an_explicit_mask_in_fp32(family: str, device: str) -> None:
    model, tokens = tiny_model(family, tied=False).to(device), tiny_ids(length=17).to(device)
    given = WITHIN.documents(positions(*LENGTHS), device=torch.device(device))
    keep_attention_within_documents(model)
    with torch.autocast(device, torch.bfloat16):
        losses = LanguageModelLoss(model, chunk_tokens=5)(tokens, given)
    found = torch.autograd.grad(losses.total, list(model.parameters()))
    model, tokens = model.cpu(), tokens.cpu()
    logits = reference_logits(model, tokens[:, :-1], positions(*LENGTHS)[:, :-1])
    expected, gradients = losses_and_gradients(logits, tokens[:, 1:], model)
    torch.testing.assert_close(losses.total.cpu(), expected, rtol=2e-2, atol=0)
    ours, theirs = (torch.cat([gradient.cpu().flatten() for gradient in of]) for of in (found, gradients))
    assert (ours - theirs).norm() <= 0.1 * theirs.norm()


def test_masked_models_keep_their_gradients() -> None:
    model, tokens = tiny_model(), tiny_ids(length=17)
    drawn, _ = masks_and_target(Shape.of(model.config), GRANULARITIES, fractional=True, seed=0)
    leaves = {name: mask.clone().requires_grad_() for name, mask in drawn.tensors().items()}
    masked = MaskedModel(model)
    masked.set_masks(Masks(**leaves))
    keep_attention_within_documents(model)
    LanguageModelLoss(model, chunk_tokens=5)(tokens, documents(*LENGTHS)).total.backward()
    found = {name: leaf.grad for name, leaf in leaves.items()}
    masked.set_masks(Masks(**leaves))
    logits = reference_logits(model, tokens[:, :-1], positions(*LENGTHS)[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
