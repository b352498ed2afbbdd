"""What processes find out together, each from its share of the text, is what one finds out; also when one is ended."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shearing.data.documents import DocumentRules, Inputs
from shearing.evaluation import heldout
from shearing.files.durable import read_json
from shearing.models.attention import attention_within_documents
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import on_demand
from shearing.models.stored.stored_model import open_source
from shearing.processes.processes import Processes
from shearing.processes.stop import INTERRUPTED_EXIT_CODE
from shearing.pruning.structured.importance import reconstruction
from shearing.pruning.structured.importance.metric import Evidence, Scores
from shearing.pruning.structured.importance.registry import METRICS, metric_of
from shearing.pruning.structured.refitting import linear
from shearing.pruning.structured.refitting.linear import refit
from shearing.pruning.structured.refitting.recipe import BlockRefitRecipe
from shearing.pruning.structured.rounding import select
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import Stage
from tests.distributed import runs
from tests.distributed.harness import spawn, start
from tests.models.tiny import tiny_ids, tiny_model

pytestmark = pytest.mark.slow

STAGES: tuple[Stage, ...] = ("prune", "compact", "evaluate")
RULES = DocumentRules(attention_within=True, loss_across=False)


def _text(*, documents: bool) -> list[Inputs]:
    """Five rows in two batches: two processes have two and three of them, one with a part of a batch of the other."""
    ids = [tiny_ids(sequences=3, seed=0), tiny_ids(sequences=2, seed=1)]
    if not documents:
        return [Inputs(tokens) for tokens in ids]
    positions = torch.arange(17).remainder(6).repeat(3, 1)
    return [Inputs(tokens, RULES.documents(positions[: len(tokens)], device=torch.device("cpu"))) for tokens in ids]


def _close(found: Tensor, expected: Tensor, *, of: str, tolerance: float = 1e-5) -> None:
    scale = float(expected.abs().max()) or 1.0
    assert found.shape == expected.shape, of
    assert float((found - expected).abs().max()) <= tolerance * scale, of


def _score_and_refit(folder: Path, *, names: Sequence[str], documents: bool) -> None:
    with Processes.start(device="cpu") as processes:
        model = on_demand(open_source(str(folder), revision=None, converted=folder), device=torch.device("cpu"))
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        source, text = Shape.of(model.config), _text(documents=documents)
        target = dataclasses.replace(source, num_hidden_layers=3, intermediate_size=20, hidden_size=24)
        one = Evidence(text=text, target=target, seed=3)
        many = dataclasses.replace(one, processes=processes)
        rest = metric_of("activations").scores(whole, evidence=one)
        with attention_within_documents(model, on=documents), attention_within_documents(whole, on=documents):
            for name in names:
                metric, calls = metric_of(name), []
                found = metric.scores(model, evidence=many, advance=calls.append)
                assert len(calls) == metric.units_of_work(source, evidence=many), name
                if processes.is_main:
                    _require_same(found, metric.scores(whole, evidence=one), rest=rest, name=name, target=target)
            _refit_alike(model, whole, masks_of=rest, target=target, text=text, processes=processes, blocks=documents)


def _require_same(found: Scores, expected: Scores, *, rest: Scores, name: str, target: Shape) -> None:
    assert found.keys() == expected.keys(), name
    source = dataclasses.replace(target, num_hidden_layers=4, intermediate_size=40, hidden_size=36)
    # AdamW makes whole steps out of gradients that are next to nothing.
    tolerance = 1e-3 if name.startswith("hard_budget") else 1e-5
    for granularity, values in expected.items():
        _close(found[granularity], values, of=f"{name}: {granularity}", tolerance=tolerance)
    chosen, wanted = (select({**rest, **each}, source=source, target=target)[1] for each in (found, expected))
    assert chosen.digest == wanted.digest, name


def _refit_alike(
    model: Any, whole: Any, *, masks_of: Scores, target: Shape, text: list[Inputs], processes: Processes, blocks: bool
) -> None:
    masks, _ = select(masks_of, source=Shape.of(whole.config), target=target)
    refitted: dict[str, Tensor] = {}

    def keep(index: int, layer: nn.Module) -> None:
        for name, weight in layer.named_parameters():
            refitted[f"model.layers.{index}.{name}"] = weight.detach().clone()

    how = {"ridge": "auto", "blocks": BlockRefitRecipe(steps=3, learning_rate=1e-3)} if blocks else {}
    refit(MaskedModel(model), masks=masks, batches=text, processes=processes, keep=keep, **how)
    for name, weight in refitted.items():
        theirs = processes.all_gather(weight)
        assert torch.equal(theirs[0], theirs[-1]), f"{name} is not alike on all processes"
    if processes.is_main:
        before = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
        refit(MaskedModel(whole), masks=masks, batches=text, **how)
        expected = dict(whole.named_parameters())
        assert any(not torch.equal(before[name], expected[name]) for name in refitted)
        for name, weight in refitted.items():
            _close(weight, expected[name].detach(), of=f"refit: {name}", tolerance=1e-4)


@pytest.mark.parametrize(
    ("family", "tied", "names"),
    [
        ("llama-biases", True, list(METRICS)),
        ("qwen3", False, ["activations", "reconstruction", "wanda", "taylor_second", "taylor_distillation"]),
    ],
)
def test_two_processes_score_and_refit_as_one_does_with_the_whole_model(
    family: str, tied: bool, names: list[str], tmp_path: Path
) -> None:
    tiny_model(family, tied=tied).save_pretrained(tmp_path / "model")
    group = start(_score, tmp_path / "model", names, not tied, size=2, folder=tmp_path / "out")
    assert group.wait() == [0, 0], group.said()


def _score(folder: Path, names: list[str], documents: bool) -> None:
    _score_and_refit(folder, names=names, documents=documents)


def _recipe(inputs: Path, run_dir: Path) -> Recipe:
    recipe = runs.recipe(inputs, run_dir=run_dir, steps=8)
    evaluation = recipe.evaluation.model_copy(
        update={"baselines": ["magnitude", "reconstruction", "reconstruction+refit"], "tokens_per_domain": 80}
    )
    return recipe.model_copy(update={"evaluation": evaluation})


def _die_on_call(number: int, *, by: signal.Signals) -> Any:
    """A function that sends its process a signal when it is called for the n-th time."""
    calls: list[None] = []

    def counted(function: Any) -> Any:
        def called(*arguments: Any, **keywords: Any) -> Any:
            calls.append(None)
            if len(calls) == number:
                os.kill(os.getpid(), by)
            return function(*arguments, **keywords)

        return called

    return counted


def _run_and_die(recipe: Recipe, stages: tuple[Stage, ...], where: str, by: signal.Signals) -> None:
    """As `runs.train`, but the second process gets a signal in the middle of what `where` says."""
    if os.environ["RANK"] == "1":
        module, function, number = {
            "importance": (reconstruction, "elimination_order", 2),
            "refit": (linear, "_refit_write", 3),
            "evaluation": (heldout, "per_token_loss", 4),
        }[where]
        setattr(module, function, _die_on_call(number, by=by)(getattr(module, function)))
    runs.train(recipe, stages)


def _evaluated(run_dir: Path) -> dict[str, Any]:
    evaluation = read_json(run_dir / "evaluation.json")
    for model in evaluation["models"].values():
        del model["seconds"], model["fingerprint"]
    return {name: evaluation[name] for name in ("settings", "models")}


def test_one_process_is_stopped_or_dies_while_all_score_refit_or_evaluate_and_the_same_command_goes_on(
    tiny_inputs: Path, tmp_path: Path
) -> None:
    alone, together, killed = (_recipe(tiny_inputs, tmp_path / name) for name in ("alone", "together", "killed"))
    spawn(runs.train, alone, STAGES, size=1, folder=tmp_path / "out-alone")
    spawn(runs.train, together, STAGES, size=2, folder=tmp_path / "out-together")
    for where, stages in (("importance", STAGES), ("refit", STAGES), ("evaluation", ("evaluate",))):
        if where == "evaluation":
            spawn(runs.train, killed, ("prune", "compact"), size=2, folder=tmp_path / "out")
        stopped = start(_run_and_die, killed, stages, where, signal.SIGTERM, size=2, folder=tmp_path / f"stop-{where}")
        assert stopped.wait(seconds=60) == [INTERRUPTED_EXIT_CODE] * 2, stopped.said()
        assert "was asked to stop (SIGTERM)" in stopped.said()
        assert "Traceback" not in stopped.said()
        group = start(_run_and_die, killed, stages, where, signal.SIGKILL, size=2, folder=tmp_path / f"out-{where}")
        first, second = group.wait(seconds=60)
        assert second == -signal.SIGKILL, group.said()
        assert first not in (0, None), group.said()
    spawn(runs.train, killed, ("evaluate",), size=2, folder=tmp_path / "out-again")

    assert list(runs.contents(killed.run_dir, "prune")) == list(runs.contents(together.run_dir, "prune"))
    assert not list((killed.run_dir / "prune").glob("refitted*"))
    assert not list(killed.run_dir.glob(".refitted*"))
    assert _evaluated(killed.run_dir) == _evaluated(together.run_dir)
    references = [read_json(recipe.run_dir / "prune" / "reference.json") for recipe in (together, alone)]
    assert references[0] == pytest.approx(references[1], rel=1e-6)
    ours, theirs = (_evaluated(recipe.run_dir) for recipe in (together, alone))
    assert {name: model["units"] for name, model in ours["models"].items()} == {
        name: model["units"] for name, model in theirs["models"].items()
    }
    assert runs.difference(ours, theirs) < 1e-5
