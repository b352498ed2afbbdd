from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from shearing.data.mixture.averages import LossAverages
from shearing.errors import ShearingError
from shearing.objectives.language_model import LanguageModelLoss
from shearing.objectives.objective import Losses
from shearing.runs.context import RunContext
from shearing.runs.recipe import Recipe
from shearing.runs.stages import heldout
from shearing.runs.stages.prune import prune
from shearing.training import loop
from shearing.training.checkpoints import pieces
from shearing.training.metrics import TIMING_FIELDS
from shearing.training.stage import INTERRUPTED_EXIT_CODE, PREFETCHED_STEPS, Interrupted
from tests.conftest import tiny_recipe_data

FROZEN = {"sparsity_warmup": "0%", "freeze": "100%"}
DOCUMENTS = {
    "data": {"attention": "documents", "loss_across_documents": False},
    "mixture": {"losses": "training", "ema": 0.25},
}


def _recipe(inputs: Path, run_dir: Path, *, prune: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    data = tiny_recipe_data(inputs, run_dir=run_dir)
    data["prune"] |= {"batch_size": "4 sequences", **(prune or {})}
    for name, values in sections.items():
        data[name] = {**data[name], **values}
    return Recipe.model_validate(data)


def _prune(recipe: Recipe) -> str:
    output = io.StringIO()
    prune(RunContext(recipe, console=Console(file=output, width=200)))
    return output.getvalue()


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "prune" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def _weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "prune" / "model.safetensors")


def _assert_close(first: Path, second: Path, *, tolerance: float) -> None:
    for ours, theirs in zip(_lines(first), _lines(second), strict=True):
        if "event" not in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance)
    for name, weight in _weights(first).items():
        torch.testing.assert_close(weight, _weights(second)[name], rtol=tolerance, atol=tolerance)


def test_micro_batches_do_not_change_the_trajectory(tiny_inputs: Path, tmp_path: Path) -> None:
    for size in (1, 4):
        # Frozen masks: the noise of learned ones depends on the micro-batch. A large epsilon: with the usual one
        # AdamW turns the sign of gradients near zero, which is rounding, into whole steps.
        settings = {"micro_batch_size": size, "epsilon": 1e-3, **FROZEN}
        _prune(_recipe(tiny_inputs, tmp_path / str(size), prune=settings))
    _assert_close(tmp_path / "1", tmp_path / "4", tolerance=1e-5)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_does_not_change_the_trajectory(tiny_inputs: Path, tmp_path: Path, kind: str) -> None:
    for chosen in ("none", kind):
        _prune(_recipe(tiny_inputs, tmp_path / chosen, training={"activation_checkpointing": chosen}))
    assert _lines(tmp_path / "none") == _lines(tmp_path / kind)
    for name, weight in _weights(tmp_path / "none").items():
        assert torch.equal(weight, _weights(tmp_path / kind)[name])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_layers_stay_close(tiny_inputs: Path, tmp_path: Path) -> None:
    for on in (False, True):
        _prune(_recipe(tiny_inputs, tmp_path / str(on), prune={"epsilon": 1e-3}, training={"compile": on}))
    _assert_close(tmp_path / "False", tmp_path / "True", tolerance=1e-4)


@pytest.mark.parametrize("estimator", ["straight_through", "hard_concrete"])
def test_metrics_are_complete_and_do_not_depend_on_when_they_are_read(
    tiny_inputs: Path, tmp_path: Path, estimator: str
) -> None:
    for interval in (1, 4):
        sections = {"prune": {"estimator": estimator}, "training": {"log_interval": interval}}
        output = _prune(_recipe(tiny_inputs, tmp_path / str(interval), **sections))
        assert "prune complete" in output
    lines = _lines(tmp_path / "1")
    assert lines == _lines(tmp_path / "4")
    assert [(line["step"], line.get("event")) for line in lines] == [
        (1, None),
        (2, None),
        (3, None),
        (3, "mixture"),
        (4, None),
        (5, None),
        (6, None),
    ]
    step, update = lines[0], lines[3]
    assert step["tokens"] == 4 * 16
    assert step["loss"] == pytest.approx(math.log(18), rel=0.2)
    assert set(step["weights"]) == set(update["losses"]) == set(update["reference"]) == {"letters", "digits"}
    assert set(step["expected"]) == set(step["target"]) == set(step["violation"])
    # Masks under the hard budget are pulled by nothing.
    assert set(step.get("lambda_1", {})) == (set(step["target"]) if estimator == "hard_concrete" else set())
    # Announced after step 3, in force two steps later: what the prefetcher had not dealt yet.
    assert update["first_sample"] == (3 + PREFETCHED_STEPS) * 4


def test_validation_losses_are_looked_at_where_nothing_follows_them(tiny_inputs: Path, tmp_path: Path) -> None:
    constant = {"update": "constant", "heldout_tokens": "auto"}
    for name, interval in (("looked", "2 steps"), ("blind", None)):
        settings = {"freeze": "100%", "validation_interval": interval, "checkpoint_interval": "2 steps", "keep_last": 9}
        _prune(_recipe(tiny_inputs, tmp_path / name, prune=settings, mixture=constant))
    lines = _lines(tmp_path / "looked")
    steps = [line for line in lines if "event" not in line]
    # What is looked at changes nothing.
    assert steps == _lines(tmp_path / "blind")
    for name, weight in _weights(tmp_path / "looked").items():
        assert torch.equal(weight, _weights(tmp_path / "blind")[name])
    # The end is measured by the stage itself.
    looks = [line for line in lines if "event" in line]
    assert [(line["event"], line["step"]) for line in looks] == [("validation", 2), ("validation", 4)]
    # A twentieth of two steps' FLOPs would be less than a row of each domain, which is the least.
    assert all(set(line["losses"]) == {"letters", "digits"} for line in looks)
    assert all(line["losses"]["letters"] != other["losses"]["letters"] for line, other in [looks])


def test_losses_that_domain_weights_follow_are_not_measured_twice(tiny_inputs: Path, tmp_path: Path) -> None:
    _prune(_recipe(tiny_inputs, tmp_path / "run"))
    assert {line["event"] for line in _lines(tmp_path / "run") if "event" in line} == {"mixture"}


def test_training_losses_of_domains_are_those_of_their_rows_and_update_the_mixture(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Losses] = []
    forward = LanguageModelLoss.forward

    def recorded(self: nn.Module, *arguments: Any) -> Losses:
        losses = forward(self, *arguments)  # type: ignore[arg-type]
        seen.append(losses)
        return losses

    recipe = _recipe(tiny_inputs, tmp_path / "run", mixture=DOCUMENTS["mixture"], prune={"validation_interval": None})
    monkeypatch.setattr(LanguageModelLoss, "forward", recorded)
    _prune(recipe)
    lines = _lines(tmp_path / "run")
    steps, update = [line for line in lines if "event" not in line], next(line for line in lines if "event" in line)
    mixture = RunContext(recipe).initial_mixture()
    averages = LossAverages(weight=0.25)
    for step, line in enumerate(steps[:3]):
        ids = mixture.batch(first_sample=4 * step, num_sequences=4).domain_ids
        # No held-out pass comes between: two micro-batches a step.
        rows = torch.cat([losses.rows for losses in seen[2 * step : 2 * step + 2]])
        expected = {
            name: float(rows[ids == i].mean()) / 16 for i, name in enumerate(mixture.domains) if (ids == i).any()
        }
        assert line["domain_losses"] == pytest.approx(expected)
        averages.add(line["domain_losses"])
    assert update["losses"] == averages.losses
    assert update["losses_from"] == "training"


def test_losses_that_are_not_finite_stay_in_their_domain() -> None:
    rows = torch.tensor([[math.nan, 16.0], [2.0, 16.0], [3.0, 15.0]], dtype=torch.float64)
    sums = loop._by_domain(rows, torch.tensor([1, 0, 0]), num_domains=3)
    assert torch.equal(sums[0], torch.tensor([5.0, 31.0], dtype=torch.float64))
    assert sums[1].isnan().tolist() == [True, False]
    assert sums[2].tolist() == [0.0, 0.0]


def _poison(monkeypatch: pytest.MonkeyPatch, *, bad: Callable[[int], bool]) -> None:
    """The loss of calls for which `bad` holds becomes NaN."""
    forward = LanguageModelLoss.forward
    calls = -1

    def poisoned(self: nn.Module, *arguments: Any) -> Losses:
        nonlocal calls
        calls += 1
        losses = forward(self, *arguments)  # type: ignore[arg-type]
        return losses._replace(total=losses.total * math.nan, rows=losses.rows * math.nan) if bad(calls) else losses

    monkeypatch.setattr(LanguageModelLoss, "forward", poisoned)


def test_non_finite_steps_are_skipped_and_counted(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, bad=lambda call: call in (4, 5))  # step 3 (both micro-batches)
    _prune(_recipe(tiny_inputs, tmp_path / "run", prune={"estimator": "hard_concrete"}))
    lines = [line for line in _lines(tmp_path / "run") if "event" not in line]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["loss"] is None
    assert all(line["loss"] is not None for index, line in enumerate(lines) if index != 2)
    # Neither weights nor masks moved in the skipped step.
    assert lines[2]["expected"] == lines[1]["expected"] != lines[3]["expected"]
    assert all(bool(weight.isfinite().all()) for weight in _weights(tmp_path / "run").values())


def test_many_non_finite_steps_stop_the_run_with_a_checkpoint(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"prune": {"duration": "8 steps"}, "mixture": {"interval": "4 steps"}}
    recipe = _recipe(tiny_inputs, tmp_path / "run", training={"max_skipped_steps": 2}, **sections)
    with monkeypatch.context() as patch:
        _poison(patch, bad=lambda call: call in range(4, 8))
        with pytest.raises(ShearingError, match="max_skipped_steps"):
            _prune(recipe)
    kept = tmp_path / "run" / "prune" / "checkpoints" / "step-00000004"
    assert _lines(tmp_path / "run")[-1]["event"] == "mixture"  # the whole of the step was done
    assert all(
        bool(weight.isfinite().all()) for weight in load_file(kept / "shard-00000-of-00001.safetensors").values()
    )
    assert "continuing prune from step 4" in _prune(recipe)
    skipped = [line["skipped"] for line in _lines(tmp_path / "run") if "event" not in line]
    assert skipped == [0, 0, 1, 2, 2, 2, 2, 2]


def test_full_disk_is_a_clear_error_and_the_run_continues_later(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(tiny_inputs, tmp_path / "run", prune={"checkpoint_interval": "2 steps"})
    write, saves = pieces.write_in_turn, 0

    def full(path: Path, like: Any, *, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
        nonlocal saves
        saves += "shard-" in path.name
        write(path, like, tensors=until_full(tensors) if saves > 1 else tensors, metadata=metadata)

    def until_full(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        yield next(iter(tensors))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "write_in_turn", full)
        with pytest.raises(ShearingError, match="free space"):
            _prune(recipe)
    checkpoints = tmp_path / "run" / "prune" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000002"]
    _prune(recipe)
    _prune(_recipe(tiny_inputs, tmp_path / "whole", prune={"checkpoint_interval": "2 steps"}))
    assert _lines(tmp_path / "run") == _lines(tmp_path / "whole")


@pytest.mark.parametrize("sections", [{}, DOCUMENTS], ids=["rows", "documents"])
def test_signal_stops_after_the_step(
    sections: dict[str, Any], tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {**sections, "prune": {"validation_interval": None}}  # a pass through the objective is a micro-batch
    recipe = _recipe(tiny_inputs, tmp_path / "run", **sections)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with monkeypatch.context() as patch:
        _poison(patch, bad=lambda call: call == 3 and os.kill(os.getpid(), signal.SIGUSR1) is not None)
        with pytest.raises(Interrupted) as error:
            _prune(recipe)
    assert error.value.code == INTERRUPTED_EXIT_CODE
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    assert (tmp_path / "run" / "prune" / "checkpoints" / "step-00000002").is_dir()
    _prune(recipe)
    _prune(_recipe(tiny_inputs, tmp_path / "whole", **sections))
    assert _lines(tmp_path / "run") == _lines(tmp_path / "whole")
    for name, weight in _weights(tmp_path / "run").items():
        assert torch.equal(weight, _weights(tmp_path / "whole")[name])


@pytest.mark.parametrize(
    ("sections", "first", "last"),
    [({}, 3, 2), ({"mixture": {"update": "constant"}, "prune": {"validation_interval": "2 steps"}}, 2, 3)],
    ids=["updates", "validation"],
)
def test_signal_is_heard_while_held_out_text_is_read(
    sections: dict[str, Any], first: int, last: int, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole = (_recipe(tiny_inputs, tmp_path / name, **sections) for name in ("run", "whole"))
    _prune(whole)
    heldout_loss, begun, passed, chosen = heldout.heldout_loss, 0, 0, 0

    def signalled(*arguments: Any, progress: Callable[[int], None], **keywords: Any) -> Any:
        nonlocal begun, passed
        begun, passed = begun + 1, 0

        def counted(tokens: int) -> None:
            nonlocal passed
            passed += 1
            if begun == chosen and passed == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            progress(tokens)

        return heldout_loss(*arguments, progress=counted, **keywords)

    reference = int("mixture" not in sections)  # the source's losses, which are read before training
    with monkeypatch.context() as patch:
        patch.setattr(heldout, "heldout_loss", signalled)
        # In the first that training measures; in the same, where the run continues; in that of the end.
        for number, step in ((reference + 1, first), (1, first), (last, 6)):
            begun, chosen = 0, number
            with pytest.raises(Interrupted):
                _prune(recipe)
            assert passed == 1
            newest = max((tmp_path / "run" / "prune" / "checkpoints").glob("step-*"))
            assert newest.name == f"step-{step:08d}"
    _prune(recipe)
    assert _lines(tmp_path / "run") == _lines(tmp_path / "whole")
    for name, weight in _weights(tmp_path / "run").items():
        assert torch.equal(weight, _weights(tmp_path / "whole")[name])


def test_checkpoint_of_another_seed_is_refused(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_inputs, tmp_path / "run")
    _prune(recipe)
    with pytest.raises(ShearingError, match="seed"):
        _prune(recipe.model_copy(update={"seed": 1}))
