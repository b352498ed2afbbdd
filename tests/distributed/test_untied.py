"""Models whose embedding and head are two: one trajectory everywhere, and FSDP2 has neither whole between its uses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shearing.objectives.language_model import LanguageModelLoss
from shearing.processes.processes import Processes
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import Stage
from tests.distributed import runs
from tests.distributed.conftest import Once
from tests.distributed.harness import spawn
from tests.models.tiny import tiny_ids, tiny_model
from tests.training.engines.test_kept_zeros import make_engine

STAGES: tuple[Stage, ...] = ("prune", "compact", "pretrain")


@pytest.fixture(scope="module")
def untied_inputs(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_inputs`, its model with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    shutil.copytree(tiny_inputs, folder, dirs_exist_ok=True)
    config = AutoModelForCausalLM.from_pretrained(folder / "model").config
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    return folder


def _recipe(inputs: Path, run_dir: Path, **training: Any) -> Recipe:
    return runs.recipe(inputs, run_dir=run_dir, steps=8, checkpoint_interval=8, listening=True, **training)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "training"),
    [
        (1, {"engine": "fsdp2"}),
        (2, {"engine": "fsdp2", "activation_checkpointing": "full"}),
        (2, {"engine": "fsdp2", "sum_gradients": "micro_batch", "reshard_after_forward": False}),
        (4, {"engine": "fsdp2", "sum_gradients": "micro_batch"}),
        (2, {"engine": "deepspeed", "zero_stage": 3}),
    ],
)
def test_several_processes_learn_what_one_does(
    size: int, training: dict[str, Any], untied_inputs: Path, tmp_path: Path, once: Once
) -> None:
    if training["engine"] == "deepspeed":
        pytest.importorskip("deepspeed")
    alone = once(lambda run_dir: _recipe(untied_inputs, run_dir), STAGES)
    recipe = _recipe(untied_inputs, tmp_path / "run", **training)
    spawn(runs.train, recipe, STAGES, size=size, folder=tmp_path / "out")
    for stage in ("prune", "pretrain"):
        found, expected = (runs.trajectory(each, stage, listening=True) for each in (tmp_path / "run", alone))
        assert len(found) == len(expected) > 8
        assert runs.difference(found, expected) < 1e-3


def come_and_go(folder: Path, kind: str) -> None:
    """What every process runs: a step, with a look at both ends on the way."""
    with Processes.start(device="cpu") as processes:
        engine = make_engine(kind, processes=processes, precision=torch.float32)
        objective = engine.prepare(LanguageModelLoss(tiny_model(tied=False), chunk_tokens=8)).train()
        ends: list[Any] = [objective.model.get_submodule(name) for name in ("model.embed_tokens", "lm_head")]
        whole: list[bool] = []

        def look(*_: Any) -> None:
            whole.extend(not hasattr(end.weight, "to_local") for end in ends)

        layer = objective.model.model.layers[1]
        layer.register_forward_pre_hook(look)
        layer.register_full_backward_pre_hook(look)
        objective.head_pass.register_forward_pre_hook(look)
        loss = objective(tiny_ids()).total
        look()
        engine.backward(loss, last=True)
        look()
        before, in_head, after, in_backward, in_the_end = zip(whole[::2], whole[1::2], strict=True)
        assert in_head == (False, True)
        assert {before, after, in_backward, in_the_end} == {(False, False)}
        assert not engine.step(step=0)
        engine.close()


def test_neither_end_is_whole_but_where_it_is_read(tmp_path: Path) -> None:
    spawn(come_and_go, tmp_path, "fsdp2", size=2, folder=tmp_path / "out")
