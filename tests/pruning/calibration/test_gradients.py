"""Gradients layer by layer equal plain autograd of the whole model, and are gathered once.

Legend: S tokens of a sequence.
"""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.stored.stored_model import open_source
from shearing.pruning.calibration import gradients
from shearing.pruning.calibration.gradients import gather_gradients, gradient_bytes, read_gradients
from shearing.pruning.calibration.places import Matrix, matrices_of
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

CALIBRATION = Calibration(tiny_ids(sequences=3, length=12), "random")


def gathered(
    model: PreTrainedModel, folder: Path, *, layers: tuple[int, ...] | None = None, **changes: Any
) -> dict[str, Tensor]:
    model.save_pretrained(folder / "model")
    source = open_source(str(folder / "model"), revision=None, converted=folder / "converted")
    matrices: list[Matrix] = [m for m in matrices_of(source) if layers is None or m.layer in layers]
    values: dict[str, Any] = {"dtype": torch.float32, "offload": "cpu"} | changes
    compute = Compute(device=torch.device("cpu"), micro_batch_size=2, folder=folder / "run", **values)
    console = Console(file=StringIO())
    gather_gradients(source, matrices=matrices, calibration=CALIBRATION, compute=compute, console=console)
    assert not (folder / "run" / "gradients" / "streams").exists()
    left, _ = gradient_bytes(source, matrices=matrices, calibration=CALIBRATION, compute=compute)
    assert left == sum(4 * matrix.size for matrix in matrices)
    return {m.name: read_gradients(m.name, layer=m.layer, folder=compute.folder) for m in matrices}


def expected(model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """Roots of the mean over sequences of squared gradients of each one's mean loss, in one backward pass each."""
    parameters = [model.get_parameter(name) for name in names]
    sums = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in parameters]
    for row in CALIBRATION.tokens:
        loss = cross_entropy(model(row[None, :-1], use_cache=False).logits[0], row[1:])
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient.double().square()
    return {n: (total / len(CALIBRATION.tokens)).sqrt().float() for n, total in zip(names, sums, strict=True)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_autograd_of_the_whole_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tied=tied)
    found = gathered(model, tmp_path)
    for name, gradient in expected(model, list(found)).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6 * float(gradient.max()))


def test_of_some_layers_alone(tmp_path: Path) -> None:
    model = tiny_model()
    found = gathered(model, tmp_path, layers=(1, 3))
    whole = expected(model, list(found))
    assert {name.split(".")[2] for name in found} == {"1", "3"}
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6 * float(gradient.max()))


def test_half_precision(tmp_path: Path) -> None:
    """Gradients would vanish in fp16, in whose place bf16 is taken."""
    model = tiny_model()
    found = gathered(model, tmp_path / "bf16", dtype=torch.bfloat16)
    half = gathered(model, tmp_path / "fp16", dtype=torch.float16)
    for name, gradient in expected(model, list(found)).items():
        torch.testing.assert_close(found[name], gradient, rtol=0.1, atol=0.05 * float(gradient.max()))
        assert torch.equal(found[name], half[name])


def test_are_gathered_once_and_anew_where_some_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    first = gathered(model, tmp_path)
    (tmp_path / "run" / "gradients" / "00001.safetensors").unlink()
    again = gathered(model, tmp_path)
    assert all(torch.equal(first[name], again[name]) for name in first)
    monkeypatch.setattr(gradients, "LayerWalk", lambda *_, **__: pytest.fail("gathered again"))
    assert gathered(model, tmp_path).keys() == first.keys()


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(ShearingError, match="NaN or infinity in the gradient of"):
        gathered(model, tmp_path)
    assert not (tmp_path / "run" / "gradients" / "streams").exists()
