from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.processes.processes import Processes
from shearing.training.checkpoints.fingerprints import add_fingerprints
from shearing.training.checkpoints.pieces import ShardedState
from shearing.training.device import resolve_device, resolve_precision
from shearing.training.engines.deepspeed_engine import _join, _told_of_gpu, import_deepspeed
from shearing.training.engines.engine import Engine
from shearing.training.engines.fsdp2_engine import Fsdp2Engine, require_fsdp2
from shearing.training.engines.held_state import fill
from shearing.training.engines.optimizer import Optimization
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import Fsdp2Recipe, TrainingRecipe

CPU = torch.device("cpu")


def _optimization() -> Optimization:
    return Optimization(
        rates=LearningRates(
            schedule="cosine",
            peak=0.01,
            total_steps=10,
            warmup_steps=2,
            decay_steps=0,
            final=0.1,
            first_step=0,
        ),
        betas=(0.9, 0.95),
        epsilon=1e-8,
        weight_decay=0.1,
        gradient_clipping=1.0,
    )


def _engine(model: nn.Module, optimization: Optimization | None = None) -> TorchEngine:
    engine = TorchEngine(optimization or _optimization(), device=CPU, precision=torch.float32)
    engine.prepare(model)
    return engine


@pytest.fixture(params=["torch", "fsdp2"])
def one_of_two(request: pytest.FixtureRequest) -> Iterator[str]:
    """The engines that need no other package; FSDP2 wants a group of processes, also of this one alone."""
    yield request.param
    if dist.is_initialized():
        dist.destroy_process_group()


def _prepared(name: str, model: nn.Module, optimization: Optimization | None = None) -> Engine:
    if name == "torch":
        return _engine(model, optimization)
    optimization = optimization or _optimization()
    engine = Fsdp2Engine(optimization, settings=Fsdp2Recipe(), device=CPU, precision=torch.float32)
    engine.prepare(model)
    return engine


def _whole(parameter: Any) -> Tensor:
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole


def engine_loss(engine: TorchEngine) -> Tensor:
    return sum(parameter.square().sum() for parameter in engine._parameters.values())  # type: ignore[return-value]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def test_steps_equal_plain_adamw_with_clipping(one_of_two: str) -> None:
    model = _model()
    reference = copy.deepcopy(model)
    optimization = _optimization()
    engine = _prepared(one_of_two, model, optimization)
    matrices = [p for p in reference.parameters() if p.ndim == 2]
    biases = [p for p in reference.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(6):
        inputs = torch.randn(5, 4)
        for half, last in zip(inputs.split([3, 2]), (False, True), strict=True):
            engine.backward(model(half).square().sum(), last=last)
        skipped = engine.step(step=step)
        reference(inputs).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = optimization.rates.at(step)
        optimizer.step()
        optimizer.zero_grad()
        assert not skipped
        torch.testing.assert_close(engine.grad_norm(), norm)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(_whole(ours), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_step_changes_nothing_and_is_reported(bad: float, one_of_two: str, tmp_path: Path) -> None:
    model = _model()
    engine = _prepared(one_of_two, model)
    inputs = torch.randn(5, 4)
    engine.backward(model(inputs).square().sum(), last=True)
    assert not engine.step(step=0)
    engine.stage().write_into(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    engine.backward(model(inputs).square().sum() * bad, last=True)
    assert engine.step(step=1)
    engine.stage().write_into(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    engine.backward(model(inputs).square().sum(), last=True)
    assert not engine.step(step=2)


def test_loaded_engine_continues_bit_for_bit(one_of_two: str, tmp_path: Path) -> None:
    batches = [torch.randn(5, 4) for _ in range(6)]

    def train(model: nn.Module, engine: Engine, steps: range) -> None:
        for step in steps:
            engine.backward(model(batches[step]).square().sum(), last=True)
            engine.step(step=step)

    model = _model()
    engine = _prepared(one_of_two, model)
    train(model, engine, range(3))
    in_place = tmp_path / "in place"
    in_place.mkdir()
    of_itself, copy = engine.stage(copied=False).write_into(in_place), engine.stage()
    train(model, engine, range(3, 6))
    # What was copied may be written while training goes on, to the same bytes.
    saved = copy.write_into(tmp_path)
    assert of_itself == saved
    assert all(path.read_bytes() == (tmp_path / path.name).read_bytes() for path in in_place.iterdir())

    resumed = _model()
    resumed_engine = _prepared(one_of_two, resumed)
    resumed_engine.load(tmp_path, saved=saved)
    train(resumed, resumed_engine, range(3, 6))
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(_whole(ours), _whole(theirs))


def test_a_torch_that_cannot_share_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shearing.training.engines.fsdp2_engine.FSDPModule", object)
    with pytest.raises(ShearingError, match="install a newer torch"):
        require_fsdp2()


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    saved = _engine(_model()).stage().write_into(tmp_path)
    other = _engine(nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)))
    with pytest.raises(ShearingError, match=r"0\.bias"):
        other.load(tmp_path, saved=saved)


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_state_that_came_back_different_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(_model())
    engine.backward(engine_loss(engine), last=True)
    engine.step(step=0)
    saved = engine.stage().write_into(tmp_path)

    def wrong_place(pieces: Any, state: Any, *, kinds: Any) -> None:
        held = list(pieces)
        fill(held, state, kinds=kinds)
        held[0].values[kind].copy_(held[0].values[kind].roll(1))

    monkeypatch.setattr("shearing.training.engines.held_state.fill", wrong_place)
    with pytest.raises(ShearingError, match=rf"1 of \d+ tensors came back different, the first {kind}/0"):
        _engine(_model()).load(tmp_path, saved=saved)


def test_shards_of_any_cut_hold_the_same_tensors(tmp_path: Path) -> None:
    engine = _engine(_model())
    engine.backward(engine_loss(engine), last=True)
    engine.step(step=0)
    whole = engine.stage().write_into(tmp_path)
    for size in (2, 3, 5):
        folder = tmp_path / str(size)
        folder.mkdir()
        marks = []
        for rank in range(size):
            part = TorchEngine(_optimization(), device=CPU, precision=torch.float32)
            part.prepare(_model())
            part.load(tmp_path, saved=whole)
            part._processes = Processes(rank=rank, size=size)
            marks.append(part.stage().write_into(folder))
        assert add_fingerprints(marks) == whole
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            for (name, ours), (_, theirs) in zip(
                ShardedState(tmp_path).whole(kind), ShardedState(folder).whole(kind), strict=True
            ):
                assert torch.equal(ours, theirs), name
        (folder / f"shard-00001-of-{size:05d}.safetensors").unlink()
        with pytest.raises(ShearingError, match="are in no shard"):
            list(ShardedState(folder).whole("weight"))


def test_bf16_autocast_leaves_weights_in_fp32() -> None:
    model = _model()
    engine = TorchEngine(_optimization(), device=CPU, precision=torch.bfloat16)
    engine.prepare(model)
    with engine.autocast():
        output = model(torch.randn(2, 4))
    assert output.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert resolve_precision(TrainingRecipe(), device=CPU) == torch.float32
    assert resolve_precision(TrainingRecipe(precision="bf16"), device=CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_precision(TrainingRecipe(), device=CPU) == torch.bfloat16
    assert resolve_precision(TrainingRecipe(precision="fp32"), device=CPU) == torch.float32


def test_absent_gpu_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ShearingError, match="device"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU


def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are loaded in threads, in which torch's current GPU is always the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 3)
    assert resolve_device("cpu") == CPU


def test_deepspeed_is_told_of_the_device_that_the_engine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("deepspeed.comm.is_initialized", lambda: True)
    for device, accelerator, local_rank in ((CPU, "cpu", "5"), (torch.device("cuda", 0), "cuda", "0")):
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setenv("LOCAL_RANK", "5")  # of six tasks of a host, each of which sees one GPU
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.setenv(name, "6")
        import_deepspeed(device)
        _join(MagicMock(), device=device)
        with _told_of_gpu(device):
            assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"]) == (accelerator, local_rank)
        assert os.environ["LOCAL_RANK"] == "5"
