"""The Fisher trace equals plain autograd, one sequence at a time; it is computed once, and finds what does not matter.

Legend: V vocabulary.
"""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.files.result_cache import Cached, cache_folder
from shearing.models.stored.stored_model import Source, open_source
from shearing.pruning.calibration import whole
from shearing.pruning.calibration.places import matrices_of
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.allocation import sensitivity
from shearing.pruning.sparse.allocation.sensitivity import fisher_trace
from tests.models.experts import expert_configs
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

TOKENS = tiny_ids(sequences=3, length=20)


def source_of(model: PreTrainedModel, folder: Path) -> Source:
    model.save_pretrained(folder / "model")
    return open_source(str(folder / "model"), revision=None, converted=folder / "converted")


def traces_of(source: Source, *, tokens: Tensor = TOKENS, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    settings: dict[str, Any] = {"matrices": matrices_of(source), "console": Console(file=StringIO())} | changes
    compute = Compute(torch.device("cpu"), dtype, 2, "cpu", source.folder)
    return fisher_trace(source, calibration=Calibration(tokens, "random"), compute=compute, **settings)


def squares(model: PreTrainedModel, tokens: Tensor, labels: Tensor, names: list[str]) -> dict[str, float]:
    """Σ (∂l/∂w)² of the mean loss over all predictions of these rows, by plain autograd in fp64."""
    model = model.double()
    logits = model(tokens, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    return {name: float(gradient.square().sum()) for name, gradient in zip(names, gradients, strict=True)}


def expected(model: PreTrainedModel, names: list[str], *, tokens: Tensor = TOKENS) -> dict[str, float]:
    each = [squares(model, row[None, :-1], row[None, 1:], names) for row in tokens]
    return {name: sum(of_row[name] for of_row in each) / len(each) for name in names}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_plain_autograd_sequence_by_sequence(family: str, tied: bool, tmp_path: Path) -> None:
    found = traces_of(source_of(tiny_model(family, tied=tied), tmp_path))
    assert found == pytest.approx(expected(tiny_model(family, tied=tied), list(found)), rel=1e-4)


def test_half_precision(tmp_path: Path) -> None:
    """Squares of gradients are far below what fp16 can hold, and bf16 adds too coarsely."""
    source = source_of(tiny_model(), tmp_path)
    expected_traces = traces_of(source)
    found = traces_of(source, dtype=torch.bfloat16)
    assert found != expected_traces
    assert found == pytest.approx(expected_traces, rel=0.1)
    assert traces_of(source, dtype=torch.float16) == found


def test_experts_are_matrices_of_their_own(tmp_path: Path) -> None:
    """Each one's trace is that of its part of the stacks that the model has."""
    with expert_configs():
        model = tiny_model("qwen3_moe")
    found = traces_of(source_of(model, tmp_path))
    names = [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    sums = dict.fromkeys(found, 0.0)
    for row in TOKENS:
        loss = nn.functional.cross_entropy(model(row[None, :-1], use_cache=False).logits[0], row[1:])
        for name, stack in zip(
            names, torch.autograd.grad(loss, [model.get_parameter(name) for name in names]), strict=True
        ):
            parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            for expert, of_expert in enumerate(stack):
                for part, matrix in zip(parts, of_expert.chunk(len(parts)), strict=True):
                    place = f"{name.rpartition('.')[0]}.{expert}.{part}.weight"
                    sums[place] += float(matrix.double().square().sum()) / len(TOKENS)
    assert any(sums.values())
    for place, total in sums.items():
        if "experts" in place:
            assert found[place] == pytest.approx(total, rel=1e-3, abs=1e-12), place


def test_is_no_square_of_sums(tmp_path: Path) -> None:
    found = traces_of(source_of(tiny_model(), tmp_path))
    of_batch = squares(tiny_model(), TOKENS[:, :-1], TOKENS[:, 1:], list(found))
    assert all(found[name] > 1.2 * of_batch[name] for name in found)


def test_of_chosen_matrices_alone(tmp_path: Path) -> None:
    source = source_of(tiny_model(), tmp_path)
    chosen = [matrix for matrix in matrices_of(source) if matrix.name.endswith("2.self_attn.v_proj.weight")]
    whole = traces_of(source)
    assert traces_of(source, matrices=chosen) == {chosen[0].name: whole[chosen[0].name]}


def test_only_one_gradient_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is gone before the next is there, nothing else gets any, and layers are computed again instead of kept."""
    kept: list[PreTrainedModel] = []
    counts: list[int] = []
    passes: list[None] = []
    load, square = whole.load_source, sensitivity._square_and_let_go

    def loaded(*arguments: Any, **keywords: Any) -> PreTrainedModel:
        kept.append(load(*arguments, **keywords))
        kept[0].model.layers[1].mlp.register_forward_pre_hook(lambda *_: passes.append(None))
        return kept[0]

    def squared(parameter: Tensor, *, into: Tensor) -> None:
        counts.append(sum(other.grad is not None for other in kept[0].parameters()))
        square(parameter, into=into)

    monkeypatch.setattr(whole, "load_source", loaded)
    monkeypatch.setattr(sensitivity, "_square_and_let_go", squared)
    source = source_of(tiny_model(), tmp_path)
    traces_of(source)
    assert set(counts) == {1}
    assert len(counts) == len(TOKENS) * len(matrices_of(source))
    assert all(parameter.grad is None for parameter in kept[0].parameters())
    assert len(passes) == 2 * len(TOKENS)


def test_the_same_bits_again(tmp_path: Path, own_cache: Path) -> None:
    source = source_of(tiny_model(), tmp_path)
    for labels in ("true", "sampled"):
        first = traces_of(source, labels=labels)
        for file in own_cache.rglob("*.json"):
            file.unlink()
        assert traces_of(source, labels=labels) == first
    assert traces_of(source, labels="sampled", seed=1) != first


def test_sampled_labels_give_the_expectation_over_the_predictions(tmp_path: Path) -> None:
    """Sequences of two predictions, of which every pair of labels is enumerated."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(4.0)  # so that it is sure of some labels, and wrong labels show
    tokens = tiny_ids(sequences=1, length=3)
    name = "model.layers.1.mlp.down_proj.weight"
    source = source_of(model, tmp_path)
    parameter = model.get_parameter(name)
    log_probabilities = model(tokens[:, :-1], use_cache=False).logits[0].log_softmax(-1)
    probability = (log_probabilities[0].exp()[:, None] * log_probabilities[1].exp()).detach()
    first, second = (
        torch.stack([torch.autograd.grad(-value / 2, parameter, retain_graph=True)[0].flatten() for value in place])
        for place in log_probabilities
    )
    of_pair = first.square().sum(1)[:, None] + second.square().sum(1) + 2 * first @ second.T
    mean = float((probability * of_pair).sum())
    deviation = float((probability * (of_pair - mean).square()).sum().sqrt())
    rows = 300
    assert abs(float(of_pair.mean()) - mean) > 5 * deviation / rows**0.5, "labels of no distribution would be noticed"

    found = traces_of(
        source,
        tokens=tokens.repeat(rows, 1),
        labels="sampled",
        matrices=[matrix for matrix in matrices_of(source) if matrix.name == name],
    )
    assert abs(found[name] - mean) < 3 * deviation / rows**0.5


def test_what_was_computed_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tiny_model(), tmp_path)
    first = traces_of(source)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(whole, "load_source", refuse)
    said = StringIO()
    again = open_source(str(tmp_path / "model"), revision=None, converted=tmp_path / "converted")
    assert traces_of(again, console=Console(file=said)) == first
    assert "from an earlier run" in said.getvalue()
    assert traces_of(source, seed=5) == first, "true labels know no seed"
    for changes in (
        {"labels": "sampled"},
        {"matrices": matrices_of(source)[1:]},
        {"tokens": TOKENS[:, 1:]},
        {"dtype": torch.bfloat16},
    ):
        with pytest.raises(AssertionError):
            traces_of(source, **changes)


def test_models_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    first = source_of(tiny_model(seed=0), tmp_path / "a")
    second = source_of(tiny_model(seed=1), tmp_path / "b")
    assert first.fingerprint != second.fingerprint
    touched = Source(second.folder, second.config, second.files, second.entries, first.identity)
    assert touched.fingerprint == second.fingerprint


@pytest.mark.parametrize("damage", ["", "{", '{"key": {}, "result": {"a": 1.0}}'])
def test_a_damaged_result_is_computed_again(damage: str, tmp_path: Path, own_cache: Path) -> None:
    source = source_of(tiny_model(), tmp_path)
    first = traces_of(source)
    (file,) = own_cache.rglob("*.json")
    file.write_text(damage)
    assert traces_of(source) == first


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHEARING_CACHE", str(tmp_path / "file"))
    said = StringIO()
    assert traces_of(source_of(tiny_model(), tmp_path), console=Console(file=said))
    assert "not kept for later" in said.getvalue()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SHEARING_CACHE", "~/ours")
    assert cache_folder() == Path("/home/someone/ours")
    monkeypatch.setenv("SHEARING_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/shearing")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/someone/.cache/shearing")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/shearing")
    assert Cached.of("kind", key={"a": 1}).path.parent == Path("/elsewhere/shearing/kind")


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    source = source_of(model, tmp_path)
    for labels in ("true", "sampled"):
        with pytest.raises(ShearingError, match="NaN or infinity in the gradient of model"):
            traces_of(source, labels=labels)


def test_finds_what_does_not_matter(tmp_path: Path) -> None:
    """A layer behind an output projection of nearly zero: all that comes before the projection is insensitive."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e-4)
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-4)
    found = traces_of(source_of(model, tmp_path))

    def hidden_behind(name: str) -> bool:
        layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        return (layer, part) in {
            ("2", "mlp.gate_proj"),
            ("2", "mlp.up_proj"),
            ("1", "self_attn.q_proj"),
            ("1", "self_attn.k_proj"),
            ("1", "self_attn.v_proj"),
        }

    insensitive = {name: trace for name, trace in found.items() if hidden_behind(name)}
    others = {name: trace for name, trace in found.items() if not hidden_behind(name)}
    assert len(insensitive) == 5
    assert max(insensitive.values()) < 1e-3 * min(others.values())
