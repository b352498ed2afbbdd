"""Weights that engines read from a model's files, each process its share, are those that the main process has whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.loading import load_paged, load_source, skeleton
from shearing.models.masked import MaskedModel
from shearing.models.stored.saving import write_model
from shearing.objectives.language_model import LanguageModelLoss
from shearing.processes.processes import FailedElsewhere, Processes
from shearing.training.checkpoints.pieces import WEIGHT, ShardedState
from tests.distributed.harness import spawn
from tests.models.tiny import VOCAB_SIZE, tiny_model
from tests.training.engines.test_kept_zeros import make_engine

pytestmark = pytest.mark.slow

ENGINES = [
    ("torch", torch.float32),
    ("fsdp2", torch.float32),
    ("fsdp2", torch.bfloat16),
    ("zero1", torch.bfloat16),
    ("zero2", torch.bfloat16),
    ("zero3", torch.float32),
    ("zero3", torch.bfloat16),
]
ROWS = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(5))


def _whole(folder: Path, processes: Processes) -> PreTrainedModel:
    model = load_source(str(folder))
    return model if processes.is_main else skeleton(model.config)


def _prepare(model: PreTrainedModel, kind: str, precision: torch.dtype, *, to: Path, processes: Processes) -> Tensor:
    """Write what the engine holds; the loss that it computes."""
    MaskedModel(model)  # as mask learning leaves it: modules replaced, parameters the same
    engine = make_engine(kind, processes=processes, precision=precision)
    objective = engine.prepare(LanguageModelLoss(model, chunk_tokens=64))
    processes.on_main(lambda: to.mkdir(parents=True))
    engine.stage().write_into(to)
    with engine.autocast():
        loss = objective(ROWS).total.detach()
    engine.close()
    return loss


def prepare_both(source: Path, folder: Path, damaged: Path) -> None:
    """What every process runs."""
    with Processes.start(device="cpu") as processes:
        for kind, precision in ENGINES:
            to = folder / f"{kind} {precision}"
            expected = _prepare(_whole(source, processes), kind, precision, to=to / "whole", processes=processes)
            model = load_paged(str(source))
            assert torch.equal(_prepare(model, kind, precision, to=to / "paged", processes=processes), expected)
        for kind in ("fsdp2", "zero3"):
            engine = make_engine(kind, processes=processes, precision=torch.float32)
            with pytest.raises((ShearingError, FailedElsewhere)) as caught:
                engine.prepare(LanguageModelLoss(load_paged(str(damaged)), chunk_tokens=64))
            # The weight's last row is the last process's share; DeepSpeed is given weights by the main process.
            if processes.rank == (1 if kind == "fsdp2" else 0):
                assert "layers.3.mlp.up_proj" in str(caught.value)


def test_every_engine_holds_what_is_in_the_files(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    source, damaged = tmp_path / "source", tmp_path / "damaged"
    write_model(tiny_model("qwen2", tied=True), source, dtype=torch.float16, shard_bytes=12_000)
    write_model(tiny_model("llama", tied=False), damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][-1, -1] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    spawn(prepare_both, source, tmp_path / "held", damaged, size=2, folder=tmp_path / "out")
    stored = {f"model.{name}": weight for name, weight in load_source(str(source)).named_parameters()}
    for kind, precision in ENGINES:
        for how in ("whole", "paged"):
            found = dict(ShardedState(tmp_path / "held" / f"{kind} {precision}" / how).whole(WEIGHT))
            assert found.keys() == stored.keys()
            assert all(torch.equal(weight, stored[name]) for name, weight in found.items()), (kind, precision, how)
