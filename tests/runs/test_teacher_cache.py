"""Teacher caches: written once, the same however, refused where they do not fit; and runs that learn from them."""

from __future__ import annotations

import io
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from shearing.cli.frame import app
from shearing.data.corpus.corpus import Corpus
from shearing.errors import CombinedShearingError, ShearingError
from shearing.models.loading import load_source
from shearing.models.shape import Shape
from shearing.objectives.teacher_cache import writing
from shearing.objectives.teacher_cache.cache import INDEX_NAME, TeacherCache
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import cascade_of
from shearing.runs.planning.hardware import Hardware, forward_flops_per_token
from shearing.runs.planning.plan import plan
from shearing.runs.planning.preflight import preflight, survey
from shearing.runs.planning.rows import rows_read
from shearing.runs.recipe import Recipe
from shearing.runs.stages import training_task
from shearing.runs.stages.compact import compact
from shearing.runs.stages.evaluation.rows import rows_of
from shearing.runs.stages.pretrain import pretrain
from shearing.runs.stages.prune import prune
from shearing.runs.stages.run import run
from shearing.runs.stages.source_model import load_teacher
from shearing.runs.teacher_cache import Asked, verify, write
from shearing.training.metrics import TIMING_FIELDS
from shearing.training.recipe import TrainingRecipe
from tests.conftest import DOMAINS, tiny_recipe_data
from tests.distributed.harness import PROCESSES

QUIET = Console(file=io.StringIO())
LENGTH = 16
PIECE_TOKENS = 10 * LENGTH
TRAINING = TrainingRecipe.model_validate({"precision": "fp32", "device": "cpu"})
MIXTURE = {"reference": "teacher", "losses": "training", "interval": "2 steps", "pretrain_interval": "2 steps"}
STEPS = 8


def asked(inputs: Path, output: Path, **changes: Any) -> Asked:
    """A small cache of the tiny model, in several pieces."""
    values = {"model": str(inputs / "model"), "corpus": inputs / "corpus", "output": output}
    values |= {"sequence_length": LENGTH, "micro_batch_size": 4, "training": TRAINING, "piece_tokens": PIECE_TOKENS}
    return Asked(**{**values, **changes})


def content(folder: Path) -> dict[str, bytes]:
    """All files of a cache."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def cache(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draws of every row."""
    folder = tmp_path_factory.mktemp("cache") / "draws"
    write(asked(tiny_inputs, folder), console=QUIET)
    return folder


@pytest.fixture(scope="module")
def top_k_cache(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five likeliest tokens of every row."""
    folder = tmp_path_factory.mktemp("cache") / "top_k"
    write(asked(tiny_inputs, folder, top_k=5), console=QUIET)
    return folder


def _recipe(inputs: Path, run_dir: Path, *, mixture: dict[str, Any] | None = None, **distill: Any) -> Recipe:
    data = tiny_recipe_data(inputs, run_dir=run_dir)
    for stage in ("prune", "pretrain"):
        data[stage] |= {"duration": f"{STEPS} steps", "checkpoint_interval": "2 steps"}
    data["mixture"] |= mixture or {}
    data["distill"] = {
        "weight": 0.7,
        **{name: str(value) if isinstance(value, Path) else value for name, value in distill.items()},
    }
    return Recipe.model_validate(data)


def _quiet(recipe: Recipe) -> RunContext:
    return RunContext(recipe, console=QUIET)


def _lines(run_dir: Path, stage: str = "pretrain") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING_FIELDS} for line in lines]


def _no_teacher(*_: Any, **__: Any) -> Any:
    raise AssertionError("the teacher is not to be loaded")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_is_what_the_model_says_of_it(precision: str, cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    """The model's own logits in either precision, its probabilities in fp32."""
    dtype = torch.float32
    if precision == "bf16":
        cache, dtype = tmp_path / "cache", torch.bfloat16
        training = TrainingRecipe.model_validate({"precision": precision, "device": "cpu"})
        write(asked(tiny_inputs, cache, training=training, micro_batch_size=1), console=QUIET)
    opened = TeacherCache.open(cache)
    corpus = Corpus.open(tiny_inputs / "corpus")
    model = load_source(str(tiny_inputs / "model"), dtype=dtype)
    for domain in DOMAINS:
        rows = corpus.train_rows(domain, sequence_length=LENGTH)
        assert opened.rows(domain).tolist() == list(range(rows))
        assert opened.num_rows(domain) == rows
        assert opened.row(domain, rows) is None
        for row in (0, 11, rows - 1):
            tokens = torch.from_numpy(corpus.row(domain, row, sequence_length=LENGTH))[None]
            with torch.no_grad():
                log_p = model(tokens[:, :-1]).logits[0].float().log_softmax(-1)
            said = opened.row(domain, row)
            assert said is not None
            losses = -log_p.gather(1, tokens[0, 1:, None])[:, 0]
            torch.testing.assert_close(torch.from_numpy(said.label_losses.copy()), losses, rtol=1e-5, atol=1e-5)
            entropies = -(log_p.exp() * log_p).sum(-1)
            torch.testing.assert_close(torch.from_numpy(said.entropies.copy()), entropies, rtol=1e-5, atol=1e-5)
            assert said.values.sum(1) == pytest.approx(1.0)


def test_draws_over_all_rows_have_the_models_mean(cache: Path, tiny_inputs: Path) -> None:
    """What was drawn follows what the model says: the mean of -log p over draws is the mean entropy."""
    opened, corpus = TeacherCache.open(cache), Corpus.open(tiny_inputs / "corpus")
    model = load_source(str(tiny_inputs / "model"))
    drawn, entropy = [], []
    for row in range(40):
        tokens = torch.from_numpy(corpus.row("letters", row, sequence_length=LENGTH))[None]
        with torch.no_grad():
            log_p = model(tokens[:, :-1]).logits[0].log_softmax(-1)
        said = opened.row("letters", row)
        assert said is not None
        values = torch.from_numpy(said.values)
        drawn.append(-(values * log_p.gather(1, torch.from_numpy(said.ids))).sum(-1))
        entropy.append(torch.from_numpy(said.entropies.copy()))
    difference = torch.cat(drawn) - torch.cat(entropy)
    assert abs(difference.mean()) < 5 * difference.std() / len(difference) ** 0.5


def test_writing_again_writes_nothing(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, folder := tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("piece*")}
    write(asked(tiny_inputs, folder), console=QUIET)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("piece*")} == times
    assert content(folder) == content(cache)


def test_what_is_missing_or_truncated_is_written_again(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, folder := tmp_path / "cache")
    (folder / INDEX_NAME).unlink()
    pieces = sorted(folder.rglob("piece*"))
    pieces[0].unlink()
    pieces[-1].write_bytes(pieces[-1].read_bytes()[:-1])
    write(asked(tiny_inputs, folder), console=QUIET)
    assert content(folder) == content(cache)


def test_a_cache_of_some_rows_grows(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    opened = write(asked(tiny_inputs, tmp_path / "cache", rows=13), console=QUIET)
    assert opened.rows("letters").tolist() == list(range(13))
    assert opened.row("letters", 13) is None
    before = content(tmp_path / "cache")
    grown = write(asked(tiny_inputs, tmp_path / "cache"), console=QUIET)
    whole, found = TeacherCache.open(cache), content(tmp_path / "cache")
    assert found.keys() == content(cache).keys()
    changed = {name for name, of in content(cache).items() if found[name] != of}
    assert changed <= {INDEX_NAME, *(f"{domain}/piece-00000001.safetensors" for domain in DOMAINS)}
    for domain in DOMAINS:
        assert found[f"{domain}/piece-00000000.safetensors"] == before[f"{domain}/piece-00000000.safetensors"]
        assert grown.rows(domain).tolist() == whole.rows(domain).tolist()
        # Rows of the piece that grew: 10 to 12 as they were, the others in micro-batches of their own.
        for row in range(10, 20):
            one, other = grown.row(domain, row), whole.row(domain, row)
            assert one is not None
            assert other is not None
            np.testing.assert_allclose(one.label_losses, other.label_losses, rtol=1e-5, atol=1e-5)
        for row in range(10, 13):
            assert np.array_equal(grown.row(domain, row).ids, opened.row(domain, row).ids)


def test_what_was_asked_once_stays(
    cache: Path, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked for later: other seeds' rows, one domain, fewer rows."""
    folder = tmp_path / "cache"
    one, other = (
        _recipe(tiny_inputs, tmp_path / f"run-{seed}", mixture={"update": "constant"}, cache=folder).model_copy(
            update={"seed": seed}
        )
        for seed in (1, 2)
    )
    requests = [asked(tiny_inputs, folder, recipe=each) for each in (one, other)]
    write(requests[0], console=QUIET)
    shutil.copytree(folder, tmp_path / "first")
    numbers: list[int] = []
    whole = writing._asked

    def counted(plan: Any, observer: Any, domain: str, rows: list[int]) -> Any:
        numbers.extend(rows)
        return whole(plan, observer, domain, rows)

    monkeypatch.setattr(writing, "_asked", counted)
    both = write(requests[1], console=QUIET)
    wanted = [rows_read(_quiet(each)) or {} for each in (one, other)]
    for domain in DOMAINS:
        assert both.rows(domain).tolist() == np.union1d(wanted[0][domain], wanted[1][domain]).tolist()
    assert len(numbers) == sum(len(np.setdiff1d(wanted[1][domain], wanted[0][domain])) for domain in DOMAINS) > 0
    for each in (one, other):
        preflight(_quiet(each))
    found = content(folder)
    for request in (requests[0], asked(tiny_inputs, folder, recipe=one, domains=list(DOMAINS))):
        write(request, console=QUIET)
        assert content(folder) == found
    # Interrupted behind the first of its pieces, it goes on to the same bytes.
    pieces = writing.write_piece

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        pieces(*arguments, **keywords)
        raise KeyboardInterrupt

    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "first", folder)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_piece", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(requests[1], console=QUIET)
    with pytest.raises(ShearingError, match=f"without {INDEX_NAME}"):
        TeacherCache.open(folder)
    write(requests[1], console=QUIET)
    assert content(folder) == found
    shutil.rmtree(folder)
    shutil.copytree(cache, folder)
    for change in ({"domains": ["letters"]}, {"rows": 3}):
        write(asked(tiny_inputs, folder, **change), console=QUIET)
        assert content(folder) == content(cache)


def test_a_domain_that_is_added_leaves_the_others(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    """Also where it was interrupted: which others there are is written down nowhere but in the index."""
    folder = tmp_path / "cache"
    write(asked(tiny_inputs, folder, domains=["letters"]), console=QUIET)
    request = asked(tiny_inputs, folder, domains=["digits"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_piece", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(request, console=QUIET)
    assert not (folder / INDEX_NAME).exists()
    assert write(request, console=QUIET).domains.keys() == {"letters", "digits"}
    assert write(asked(tiny_inputs, folder), console=QUIET).domains.keys() == set(DOMAINS)
    assert content(folder) == content(cache)


def test_a_domain_is_written_where_another_was_interrupted(
    cache: Path, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index has the others' pieces as they are by then, not as they were before."""
    folder = tmp_path / "cache"
    write(asked(tiny_inputs, folder, rows=13), console=QUIET)
    pieces, grown = writing.write_piece, folder / "digits" / "piece-00000001.safetensors"

    def interrupted(path: Path, *arguments: Any, **keywords: Any) -> None:
        pieces(path, *arguments, **keywords)
        if path == grown:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_piece", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(asked(tiny_inputs, folder), console=QUIET)
    opened = write(asked(tiny_inputs, folder, domains=["letters"]), console=QUIET)
    assert opened.rows("digits").tolist()[:20] == list(range(20))
    assert opened.num_rows("digits") == len(opened.rows("digits"))
    assert opened.rows("letters").tolist() == TeacherCache.open(cache).rows("letters").tolist()
    assert verify(folder, console=QUIET) == []


def test_rows_of_a_lost_piece_are_asked_for_again(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    """By whatever adds to its domain: all that commands before asked for, which no single one of them would."""
    shutil.copytree(cache, folder := tmp_path / "cache")
    few = asked(tiny_inputs, folder, rows=1)
    for damage in (_truncate, lambda folder: (folder / "letters" / "piece-00000001.safetensors").unlink()):
        damage(folder)
        with pytest.raises(ShearingError, match="letters/piece-00000001") as raised:
            write(asked(tiny_inputs, folder, domains=["digits"]), console=QUIET)
        assert "--rows 1 is enough" in raised.value.mend
        write(few, console=QUIET)
        assert content(folder) == content(cache)
    # Of some rows, here and there.
    recipe = _recipe(tiny_inputs, tmp_path / "run", mixture={"update": "constant"}, cache=tmp_path / "some")
    some = write(asked(tiny_inputs, tmp_path / "some", recipe=recipe), console=QUIET)
    whole = write(asked(tiny_inputs, some.path, rows=1), console=QUIET)
    for path in some.path.rglob("piece*"):
        path.unlink()
    again = write(asked(tiny_inputs, some.path, rows=1), console=QUIET)
    assert {domain: again.rows(domain).tolist() for domain in DOMAINS} == {
        domain: whole.rows(domain).tolist() for domain in DOMAINS
    }
    # An index that does not say which they were.
    index = json.loads((folder / INDEX_NAME).read_text())
    for record in index["domains"].values():
        for piece in record["pieces"]:
            del piece["spans"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    TeacherCache.open(folder)
    (folder / "letters" / "piece-00000001.safetensors").unlink()
    with pytest.raises(ShearingError, match="without 10 rows of letters that earlier commands asked for") as raised:
        write(few, console=QUIET)
    assert raised.value.field == "--output"
    write(asked(tiny_inputs, folder, domains=["letters"]), console=QUIET)
    write(few, console=QUIET)
    write(asked(tiny_inputs, folder), console=QUIET)
    assert content(folder) == content(cache)


def _write(request: Asked) -> None:
    write(request, console=QUIET)


@pytest.mark.slow
def test_writing_that_is_killed_goes_on_to_the_same_bytes(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    request = asked(tiny_inputs, tmp_path / "cache")
    kills = 0
    for number in (1, 4):
        process = PROCESSES.Process(target=_write, args=(request,))
        process.start()
        deadline = time.monotonic() + 120
        while process.exitcode is None and time.monotonic() < deadline:
            if len(list(request.output.rglob("piece*"))) >= number:
                process.kill()
            process.join(0.001)
        process.join(120)
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills
    _write(request)
    assert content(request.output) == content(cache)


@pytest.mark.parametrize("attention", ["full", "documents"])
def test_the_teacher_attends_as_the_run_does(attention: str, tiny_inputs: Path, tmp_path: Path) -> None:
    """The cache's losses of the teacher are those of one that reads along."""
    folder = tmp_path / "cache"
    write(asked(tiny_inputs, folder, attention=attention), console=QUIET)
    found = []
    for name, settings in (("online", {}), ("cached", {"cache": folder})):
        recipe = _recipe(tiny_inputs, tmp_path / name, domains="all", **settings)
        data = {**recipe.model_dump(mode="json"), "target": None, "prune": None}
        data["data"] |= {"attention": attention, "loss_across_documents": False}
        recipe = Recipe.model_validate(data)
        pretrain(_quiet(recipe))
        found.append(_lines(tmp_path / name))
    for name in ("domain_losses", "domain_teacher_losses", "domain_teacher_weights"):
        assert found[0][0][name] == pytest.approx(found[1][0][name], rel=1e-5)


def test_top_k_from_a_cache_is_what_the_teacher_says(
    top_k_cache: Path, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages, trust by domain, the mixture's reference, tokens by entropy and by label: all the same."""
    settings = {"mixture": MIXTURE, "kind": "top_k", "top_k": 5, "margin": 2.0, "skip_low_entropy": 0.2}
    settings |= {"by_label": True}
    online = _recipe(tiny_inputs, tmp_path / "online", **settings)
    cached = _recipe(tiny_inputs, tmp_path / "cached", **settings, cache=top_k_cache)
    for stage, function in (("prune", prune), ("pretrain", pretrain)):
        function(_quiet(online))
        with monkeypatch.context() as patch:
            patch.setattr(training_task, "load_teacher", _no_teacher)
            function(_quiet(cached))
        ours, theirs = _lines(tmp_path / "cached", stage), _lines(tmp_path / "online", stage)
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            for name in (
                "loss",
                "domain_losses",
                "domain_teacher_losses",
                "domain_divergences",
                "reference",
                "weights",
            ):
                if name in their:
                    assert our[name] == pytest.approx(their[name], rel=1e-3, abs=1e-4), name
        if stage == "prune":
            for recipe in (online, cached):
                compact(_quiet(recipe))
    # What a teacher that is read about has computed is no cost of the run.
    ours, theirs = ({row.name: row.flops for row in rows_of(_quiet(recipe))} for recipe in (cached, online))
    shape = Shape.of(_quiet(online).config)
    # Its head is multiplied twice, as tokens are chosen by its entropy first.
    of_token = forward_flops_per_token(shape, sequence_length=LENGTH) + 2 * shape.vocab_size * shape.hidden_size
    for name, steps in (("source", 0), ("compact", STEPS), ("final", 2 * STEPS)):
        assert theirs[name] - ours[name] == pytest.approx(of_token * steps * 2 * LENGTH)


def test_rows_that_were_never_kept_are_asked_for(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    """To the same numbers as if they had been: the draws are those of the rows."""
    write(asked(tiny_inputs, tmp_path / "some", rows=20), console=QUIET)
    found = []
    for folder in (cache, tmp_path / "some"):
        recipe = _recipe(tiny_inputs, tmp_path / folder.name / "run", cache=folder, cache_missing="compute")
        prune(_quiet(recipe))
        found.append(_lines(recipe.run_dir, "prune"))
    for one, other in zip(*([line for line in lines if "event" not in line] for lines in found), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["domain_divergences"] == pytest.approx(other["domain_divergences"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_missing_rows_are_asked_for_in_the_precision_of_the_others(
    precision: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    of_bf16 = TrainingRecipe.model_validate({"precision": "bf16", "device": "cpu"})
    write(asked(tiny_inputs, tmp_path / "cache", rows=2, training=of_bf16), console=QUIET)
    settings = {"cache": tmp_path / "cache", "cache_missing": "compute", "precision": precision}
    context = _quiet(_recipe(tiny_inputs, tmp_path / "run", **settings))
    assert context.precision == torch.float32
    assert load_teacher(context).dtype == torch.bfloat16


def _start(recipe: Recipe) -> Any:
    process = PROCESSES.Process(target=run, args=(recipe,), kwargs={"stages": ("prune", "compact", "pretrain")})
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["refuse", "compute"])
def test_a_run_that_is_killed_goes_on_bit_for_bit(missing: str, cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    if missing == "compute":
        write(asked(tiny_inputs, tmp_path / "some", rows=20), console=QUIET)
        cache = tmp_path / "some"
    settings = {"mixture": MIXTURE, "cache": cache, "cache_missing": missing, "skip_low_entropy": 0.2, "margin": 2.0}
    whole, parts = (_recipe(tiny_inputs, tmp_path / name, **settings) for name in ("whole", "parts"))
    process = _start(whole)
    process.join(240)
    assert process.exitcode == 0
    kills = 0
    for stage, step in (("prune", 2), ("prune", 6), ("pretrain", 4)):
        process, checkpoint = _start(parts), parts.run_dir / stage / "checkpoints" / f"step-{step:08d}"
        deadline = time.monotonic() + 240
        while process.exitcode is None and time.monotonic() < deadline:
            if checkpoint.exists():
                process.kill()
            process.join(0.001)
        process.join(240)
        kills += process.exitcode == -signal.SIGKILL
    assert kills
    process = _start(parts)
    process.join(240)
    assert process.exitcode == 0
    for stage in ("prune", "pretrain"):
        assert _lines(tmp_path / "parts", stage) == _lines(tmp_path / "whole", stage)
    expected, found = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_plan_does_not_count_a_teacher_that_is_not_there(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    hardware = Hardware.of(processes=1, gpu=None, gigabytes=None, mfu=0.4)
    plain, online, cached, both = (
        plan(recipe, hardware=hardware)
        for recipe in (
            _recipe(tiny_inputs, tmp_path / "run").model_copy(update={"distill": None}),
            _recipe(tiny_inputs, tmp_path / "run"),
            _recipe(tiny_inputs, tmp_path / "run", cache=cache),
            _recipe(tiny_inputs, tmp_path / "run", cache=cache, cache_missing="compute"),
        )
    )
    assert [each.teacher is None for each in (plain, online, cached, both)] == [True, False, True, False]
    for stage, ours in enumerate(cached.stages):
        assert ours.teacher_flops == 0 < online.stages[stage].teacher_flops == both.stages[stage].teacher_flops
        assert ours.under_zero(0) == plain.stages[stage].under_zero(0)


def test_a_recipe_says_which_rows_it_will_read(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = {"update": "constant"}
    recipe = _recipe(tiny_inputs, tmp_path / "run", mixture=constant, cache=tmp_path / "cache")
    request = asked(tiny_inputs, tmp_path / "cache", recipe=recipe)
    opened = write(request, console=QUIET)
    wanted = rows_read(_quiet(recipe))
    assert wanted is not None
    assert 0 < sum(map(len, wanted.values())) <= 2 * STEPS * 2
    for domain, rows in wanted.items():
        assert np.array_equal(opened.rows(domain), rows)
    monkeypatch.setattr(training_task, "load_teacher", _no_teacher)
    for stage in (prune, compact, pretrain):
        stage(_quiet(recipe))
    # One that reads more is refused before it starts; one whose losses decide, when a row is missing.
    data = recipe.model_dump(mode="json")
    data["pretrain"]["duration"] = "40 steps"
    with pytest.raises(ShearingError, match="rows of") as raised:
        preflight(_quiet(Recipe.model_validate(data)))
    assert raised.value.field == "distill.cache"
    moving = _recipe(tiny_inputs, tmp_path / "moving", cache=tmp_path / "cache")
    few = write(asked(tiny_inputs, tmp_path / "few", rows=2), console=QUIET)
    moving = _recipe(tiny_inputs, tmp_path / "moving", cache=few.path)
    preflight(_quiet(moving))
    with pytest.raises(ShearingError, match="without row"):
        prune(_quiet(moving))
    with pytest.raises(ShearingError, match="--recipe"):
        write(asked(tiny_inputs, tmp_path / "other", recipe=moving), console=QUIET)


def test_a_cascade_reads_the_rows_of_all_its_runs(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_inputs, tmp_path / "run", mixture={"update": "constant"}, cache=tmp_path / "cache")
    data = recipe.model_dump(mode="json")
    first = {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 32}
    data |= {"target": [{**data["target"], **first}, data["target"]], "cascade": {"duration": "50%"}}
    data["pretrain"]["optimizer"] = "fresh"
    cascade = Recipe.model_validate(data)
    write(asked(tiny_inputs, tmp_path / "cache", recipe=cascade), console=QUIET)
    before, last = cascade_of(cascade)
    assert before.seed != last.seed
    preflight(_quiet(before))
    # One that lacks rows of the last is refused before the first.
    few = write(asked(tiny_inputs, tmp_path / "few", recipe=before), console=QUIET)
    lacking = Recipe.model_validate({**data, "distill": {**data["distill"], "cache": str(few.path)}})
    _, errors = survey(_quiet(lacking), starts=False)
    assert [error.field for error in errors] == ["distill.cache"]
    with pytest.raises(ShearingError, match="rows of"):
        run(lacking, console=QUIET)
    assert not before.run_dir.exists()
    shutil.copytree(tiny_inputs / "model", last.model.source)  # what it starts from is there by then
    preflight(_quiet(last))


def _other_model(inputs: Path, folder: Path) -> Path:
    shutil.copytree(inputs / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][-1] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("settings", "data", "field", "said"),
    [
        ({}, {"sequence_length": 8}, "distill.cache", "sequence length 16"),
        ({}, {"attention": "documents"}, "distill.cache", "attention full"),
        ({"kind": "reverse_kl"}, {}, "distill.kind", "forward_kl"),
        ({"kind": "top_k", "top_k": 5}, {}, "distill.kind", "forward_kl"),
        ({"temperature": 2.0}, {}, "distill.temperature", "1 with distill.cache"),
        ({"precision": "bf16"}, {}, "distill.cache", "precision fp32"),
        ({"teacher": "other"}, {}, "distill.cache", "teacher "),
        ({"cache": "nowhere"}, {}, "distill.cache", "shear data teacher"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_before_work_starts(
    settings: dict[str, Any],
    data: dict[str, Any],
    field: str,
    said: str,
    cache: Path,
    tiny_inputs: Path,
    tmp_path: Path,
) -> None:
    if "teacher" in settings:
        settings = {"teacher": _other_model(tiny_inputs, tmp_path / "other")}
    values = _recipe(tiny_inputs, tmp_path / "run", **{"cache": cache, **settings}).model_dump(mode="json")
    values["data"] |= data
    with pytest.raises(ShearingError, match=said) as raised:
        preflight(_quiet(Recipe.model_validate(values)))
    assert not isinstance(raised.value, CombinedShearingError)
    assert raised.value.field == field


def test_another_k_is_refused(top_k_cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ShearingError) as raised:
        preflight(_quiet(_recipe(tiny_inputs, tmp_path / "run", cache=top_k_cache, kind="top_k", top_k=4)))
    assert (raised.value.field, raised.value.mend.partition(",")[0]) == ("distill.top_k", "set distill.top_k=5")


def test_a_cache_of_other_text_is_refused(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, folder := tmp_path / "cache")
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["domains"]["digits"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    values = _recipe(tiny_inputs, tmp_path / "run", cache=folder).model_dump(mode="json")
    with pytest.raises(ShearingError, match="domain digits not in it"):
        preflight(_quiet(Recipe.model_validate(values)))
    values["data"]["domains"] = ["letters"]
    preflight(_quiet(Recipe.model_validate(values)))
    index["domains"]["letters"]["fingerprint"] = "0" * 32
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ShearingError, match="piece-00000000"):
        preflight(_quiet(Recipe.model_validate(values)))
    shutil.rmtree(folder)
    write(asked(_other_text(tiny_inputs, tmp_path / "other"), folder), console=QUIET)
    with pytest.raises(ShearingError, match="text of letters"):
        preflight(_quiet(Recipe.model_validate(values)))


def _other_text(inputs: Path, folder: Path) -> Path:
    """The same model; two domains' text exchanged."""
    shutil.copytree(inputs / "model", folder / "model")
    for name, source in (("letters", "digits"), ("digits", "letters")):
        shutil.copytree(inputs / "corpus" / source, folder / "corpus" / name)
        manifest = folder / "corpus" / name / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"domain": name}))
    for file in (inputs / "corpus").glob("*.json"):
        shutil.copy(file, folder / "corpus")
    return folder


def _swap(folder: Path) -> None:
    one, other = folder / "letters" / "piece-00000000.safetensors", folder / "digits" / "piece-00000000.safetensors"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _truncate(folder: Path) -> None:
    path = folder / "letters" / "piece-00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _longer(folder: Path) -> None:
    path = folder / "letters" / "piece-00000001.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_swap, "exchanged"),
        (_truncate, "1 bytes are missing"),
        (_longer, "bytes, as cache.json says"),
        (lambda folder: (folder / "digits" / "piece-00000000.safetensors").unlink(), "missing"),
        (lambda folder: (folder / INDEX_NAME).unlink(), f"without {INDEX_NAME}"),
        (lambda folder: (folder / INDEX_NAME).write_text("{}"), "index of a teacher cache"),
    ],
)
def test_damaged_caches_are_refused_before_work_starts(
    damage: Callable[[Path], object], said: str, cache: Path, tiny_inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(cache, folder := tmp_path / "cache")
    damage(folder)
    with pytest.raises(ShearingError, match=said) as raised:
        preflight(_quiet(_recipe(tiny_inputs, tmp_path / "run", cache=folder)))
    assert not isinstance(raised.value, CombinedShearingError)


def test_a_byte_that_changed_is_found_when_its_row_is_read(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, folder := tmp_path / "cache")
    path = folder / "letters" / "piece-00000000.safetensors"
    stored = bytearray(path.read_bytes())
    stored[-1] ^= 1
    path.write_bytes(stored)
    opened = TeacherCache.open(folder)
    assert opened.row("letters", 0) is not None
    with pytest.raises(ShearingError, match="row 9: other bytes"):
        opened.row("letters", 9)
    [damage] = verify(folder, console=QUIET)
    assert damage.field == str(path)
    assert verify(cache, console=QUIET) == []


def test_a_folder_with_another_cache_is_not_touched(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, folder := tmp_path / "cache")
    for change in ({"draws": 49}, {"seed": 1}, {"top_k": 5}, {"sequence_length": 8}):
        with pytest.raises(ShearingError, match="another cache") as raised:
            write(asked(tiny_inputs, folder, **change), console=QUIET)
        assert raised.value.field == "--output"
    assert content(folder) == content(cache)
    (folder / INDEX_NAME).unlink()  # an unfinished one
    with pytest.raises(ShearingError, match="another cache"):
        write(asked(tiny_inputs, folder, seed=1), console=QUIET)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"draws": 0}, "--draws"),
        ({"draws": 500}, "--draws"),
        ({"top_k": 1000}, "--top-k"),
        ({"rows": 0}, "--rows"),
        ({"sequence_length": 128}, "--sequence-length"),
        ({"domains": ["letter"]}, "--domain"),
        ({"model": "nowhere"}, "--model"),
    ],
)
def test_what_cannot_be_kept_is_said_at_once(
    change: dict[str, Any], field: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShearingError) as raised:
        write(asked(tiny_inputs, tmp_path / "cache", **change), console=QUIET)
    assert raised.value.field == field


def test_a_teacher_of_another_tokenizer_is_refused(tiny_inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_inputs / "model", folder := tmp_path / "other")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"A"'))
    with pytest.raises(ShearingError, match="tokenizer of the corpus"):
        write(asked(tiny_inputs, tmp_path / "cache", model=str(folder)), console=QUIET)


def test_the_command_writes_and_verifies(cache: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    command = ["data", "teacher", str(tiny_inputs / "corpus"), "-o", str(tmp_path / "cache")]
    told = ["--model", str(tiny_inputs / "model"), "--sequence-length", "16", "--precision", "fp32", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, *told])
    assert result.exit_code == 0, result.output
    assert "distill.cache" in result.output
    ours, theirs = TeacherCache.open(tmp_path / "cache"), TeacherCache.open(cache)
    assert ours.conditions == theirs.conditions
    for row in (0, 30):
        one, other = ours.row("letters", row), theirs.row("letters", row)
        assert one is not None
        assert other is not None
        assert np.array_equal(one.ids, other.ids)
    assert CliRunner().invoke(app, [*command, "--verify"]).exit_code == 0
    for wrong in ([], [*told, "--draws", "5", "--top-k", "5"], [*told, "--attention", "no"]):
        assert CliRunner().invoke(app, [*command, *wrong]).exit_code == 2
