"""The dense walk sees what hooks on the whole model see, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shearing.models.stored.stored_model import Source, open_source
from shearing.pruning.calibration.dense_layers import dense_layers, dense_units
from shearing.pruning.calibration.places import matrices_of
from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

TOKENS = tiny_ids(sequences=5, length=24)
BOTH: frozenset[Need] = frozenset({"squares", "moment"})


def source_of(family: str, folder: Path) -> Source:
    tiny_model(family).save_pretrained(folder / "model")
    return open_source(str(folder / "model"), revision=None, converted=folder / "converted")


def compute_of(folder: Path, *, micro_batch_size: int = 2) -> Compute:
    return Compute(torch.device("cpu"), torch.float32, micro_batch_size, "cpu", folder)


@pytest.mark.parametrize("family", CONFIGS)
def test_equals_the_whole_model_in_memory(family: str, tmp_path: Path) -> None:
    source = source_of(family, tmp_path)
    matrices, compute = matrices_of(source), compute_of(tmp_path)
    model = tiny_model(family)
    expected: dict[str, InputStatistics] = {}

    def listen(name: str) -> None:
        module = model.get_submodule(name.removesuffix(".weight"))
        expected[name] = InputStatistics(module.in_features, needs=BOTH, device=torch.device("cpu"))

        def record(_: object, arguments: tuple[Tensor, ...]) -> None:
            expected[name].add(arguments[0])

        module.register_forward_pre_hook(record)

    for matrix in matrices:
        listen(matrix.name)
    with torch.no_grad():
        for start in range(0, 5, 2):
            model(TOKENS[start : start + 2], use_cache=False)

    calls: list[int] = []
    found = list(
        dense_layers(
            source,
            matrices=matrices,
            needs=BOTH,
            damping=0.01,
            calibration=Calibration(TOKENS, "random"),
            compute=compute,
            advance=calls.append,
        )
    )
    assert sum(calls) == dense_units(matrices, needs=BOTH, calibration=Calibration(TOKENS, "random"), compute=compute)
    assert [of.layer for of in found] == list(range(4))
    parameters = dict(model.named_parameters())
    for of in found:
        assert len({id(statistics) for statistics in of.statistics.values()}) == 4
        for name, statistics in of.statistics.items():
            assert statistics is not None
            assert torch.equal(of.weights[name], parameters[name])
            assert torch.equal(statistics.squares, expected[name].squares), name
            assert torch.equal(statistics.moment, expected[name].moment), name
    assert {name for of in found for name in of.weights} == {matrix.name for matrix in matrices}


def test_only_what_is_chosen(tmp_path: Path) -> None:
    source, compute = source_of("llama", tmp_path), compute_of(tmp_path)
    every = {matrix.name: matrix for matrix in matrices_of(source)}
    chosen = [every[f"model.layers.{name}.weight"] for name in ("0.mlp.down_proj", "2.self_attn.k_proj")]
    needs: frozenset[Need] = frozenset({"squares"})
    calibration = Calibration(TOKENS, "random")
    calls: list[int] = []
    whole = {
        name: statistics
        for of in dense_layers(
            source, matrices=list(every.values()), needs=needs, damping=0.01, calibration=calibration, compute=compute
        )
        for name, statistics in of.statistics.items()
    }
    found = list(
        dense_layers(
            source,
            matrices=chosen,
            needs=needs,
            damping=0.01,
            calibration=calibration,
            compute=compute,
            advance=calls.append,
        )
    )
    assert [of.layer for of in found] == [0, 2]
    assert sum(calls) == dense_units(chosen, needs=needs, calibration=calibration, compute=compute) == 3 * 3
    for of in found:
        for name, statistics in of.statistics.items():
            expected = whole[name]
            assert statistics is not None
            assert expected is not None
            assert torch.equal(statistics.squares, expected.squares)


def test_without_text(tmp_path: Path) -> None:
    source, compute = source_of("llama", tmp_path), compute_of(tmp_path)
    matrices = [matrix for matrix in matrices_of(source) if matrix.layer in {1, 3}]
    none: frozenset[Need] = frozenset()
    calls: list[int] = []
    found = list(
        dense_layers(
            source,
            matrices=matrices,
            needs=none,
            damping=0.01,
            calibration=None,
            compute=compute,
            advance=calls.append,
        )
    )
    assert sum(calls) == dense_units(matrices, needs=none, calibration=None, compute=compute) == 2
    assert {name for of in found for name in of.weights} == {matrix.name for matrix in matrices}
    assert all(statistics is None for of in found for statistics in of.statistics.values())
