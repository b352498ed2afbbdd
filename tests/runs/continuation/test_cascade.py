"""Cascades: sizes one after the other, each an ordinary run whose optimiser goes on and whose teacher is the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from shearing.cli import app
from shearing.errors import ShearingError
from shearing.models.shape import Shape, config_for, resolve_target
from shearing.objectives.objective import PARAMETER_PREFIX
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import as_one, cascade_of, require_shrinking
from shearing.runs.continuation.extension import change
from shearing.runs.continuation.same_run import as_made
from shearing.runs.export.export import export
from shearing.runs.planning import preflight
from shearing.runs.planning.disk import cascade_bytes, run_bytes
from shearing.runs.planning.hardware import forward_flops_per_token, training_flops_per_token
from shearing.runs.planning.preflight import survey
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.run import run
from shearing.training.checkpoints.checkpoints import checkpoints_in
from shearing.training.checkpoints.pieces import SavedMoments, ShardedState
from tests.conftest import tiny_recipe_data

FIRST = {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 32}


def data_of(inputs: Path, folder: Path, *before: dict[str, Any], **sections: Any) -> dict[str, Any]:
    data = tiny_recipe_data(inputs, run_dir=folder)
    data["target"] = [*before, data["target"]]
    data["prune"] |= {"duration": "0 steps"}
    data["distill"] = {"weight": 0.5, "domains": "all"}
    data["cascade"] = {"duration": "75%"}
    for name, values in sections.items():
        data[name] = values if name == "target" else data[name] | values
    return data


def test_a_list_of_targets_is_a_cascade(tiny_inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data_of(tiny_inputs, tmp_path / "run", FIRST)))
    recipe = load_recipe(file)
    assert recipe.cascade is not None
    assert recipe.cascade.targets["step-1"].hidden_size == 24
    assert recipe.target is not None
    assert recipe.target.hidden_size == 16
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    before, last = cascade_of(recipe)
    assert before.pretrain.duration.steps == 3
    assert before.run_dir == tmp_path / "run" / "cascade" / "step-1"
    assert (before.distill, before.model.source) == (recipe.distill, recipe.model.source)
    assert last.distill is not None
    assert (last.distill.teacher, last.distill.revision) == (recipe.model.source, None)
    assert last.model.source == str(before.run_dir / "model")
    assert last.prune is not None
    assert last.prune.moments_of == before.run_dir
    assert (last.pretrain.duration, last.run_dir, last.seed) == (recipe.pretrain.duration, recipe.run_dir, recipe.seed)
    # A list of one is that one, and without a list there is one run.
    alone = Recipe.model_validate(data_of(tiny_inputs, tmp_path, cascade={}) | {"cascade": None})
    assert alone.cascade is None
    assert cascade_of(alone) == [alone]


def test_runs_of_a_cascade_are_one_recipe_again(tiny_inputs: Path, tmp_path: Path) -> None:
    data = data_of(tiny_inputs, tmp_path / "run", {"num_hidden_layers": 3}, FIRST, cascade={"duration": "3 steps"})
    recipe = Recipe.model_validate(data)
    *before, last = cascade_of(recipe)
    assert as_one([*before, last]) == recipe
    # What goes on from a model on the way, but is no run of that cascade, stays what it is.
    other = last.model_copy(update={"run_dir": tmp_path / "other"})
    assert as_one([*before, other]) == other


def test_disk_is_wanted_for_all_runs_before_the_first(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", FIRST))
    before, last = cascade_of(recipe)
    config = AutoConfig.from_pretrained(recipe.model.source)
    assert before.target is not None
    assert last.target is not None
    between = config_for(config, shape=resolve_target(before.target, source=config), attention_layers=range(3))
    alone = [
        run_bytes(each, source=Shape.of(source), target=resolve_target(target, source=source))
        for each, target, source in ((before, before.target, config), (last, last.target, between))
    ]
    assert cascade_bytes(recipe, source=config) == sum(alone)
    monkeypatch.setattr(preflight, "bytes_free", lambda _: max(alone) + 1)
    with pytest.raises(ShearingError, match=r"choose a folder on another disk \(run_dir\)"):
        run(recipe)
    assert not before.run_dir.exists()
    found, errors = survey(RunContext(recipe), starts=False)
    assert found is not None
    assert found.disk == sum(alone)
    assert [error.field for error in errors] == ["run_dir"]
    # What is there already is not wanted again, and a run that is complete wants nothing.
    before.run_dir.mkdir(parents=True)
    (before.run_dir / "file").write_bytes(bytes(1000))
    assert cascade_bytes(recipe, source=config) == sum(alone) - 1000
    RunDirectory(before.run_dir).mark_complete("pretrain", {})
    assert cascade_bytes(recipe, source=config) == alone[1]


def test_moments_are_of_a_run_that_has_ended(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", FIRST))
    before, last = cascade_of(recipe)
    first = run(before, stages=("prune", "compact", "pretrain"))
    mark = first.complete("pretrain").read_bytes()
    first.complete("pretrain").unlink()
    with pytest.raises(ShearingError, match="whose pretrain is complete"):
        run(last, stages=("prune",))
    first.complete("pretrain").write_bytes(mark)
    [newest] = list(checkpoints_in(first.checkpoints("pretrain")).values())[-1:]
    [shard] = newest.glob("shard-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShearingError, match="which is damaged: shard"):
        run(last, stages=("prune",))


def test_moments_go_on_with_the_weights_that_stay(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", FIRST))
    done = run(recipe)
    first = RunDirectory(tmp_path / "run" / "cascade" / "step-1")
    [newest] = list(checkpoints_in(first.checkpoints("pretrain")).values())[-1:]
    before, after = ShardedState(newest), SavedMoments(done.moments, prefix=PARAMETER_PREFIX)
    assert (before.step, after.step) == (3.0, 3.0)
    kept = load_file(done.prune / "masks.safetensors")["hidden"].nonzero().flatten()
    assert len(kept) == 16
    name = f"{PARAMETER_PREFIX}model.embed_tokens.weight"
    for kind in ("exp_avg", "exp_avg_sq"):
        whole = dict(before.whole(kind))[name]
        cut = after.read(kind, name, start=0, numel=len(whole) * 16).view(-1, 16)
        assert whole.abs().sum() > 0
        assert cut.equal(whole[:, kept])
    assert AutoConfig.from_pretrained(done.model).hidden_size == 16
    assert (done.path / "evaluation.json").is_file()
    assert not first.evaluation.is_file()
    # Interrupted between its runs, it is the same.
    other = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "other", FIRST))
    run(cascade_of(other)[0], stages=["prune", "compact", "pretrain"])
    run(other, stages=None)
    models = [load_file(RunDirectory(folder).model / "model.safetensors") for folder in (done.path, tmp_path / "other")]
    assert all(models[0][name].equal(models[1][name]) for name in models[0])
    assert run(other, stages=["evaluate"]).is_complete("evaluate")


def test_a_cascade_is_judged_against_its_first_source(tiny_inputs: Path, tmp_path: Path) -> None:
    metrics = {"evaluation": {"baselines": ["random", "reconstruction"], "generation": {"prompts": 0}}}
    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", FIRST, **metrics))
    done = run(recipe)
    models = json.loads(done.evaluation.read_text())["models"]
    assert list(models) == ["source", "cascade-step-1", "random", "reconstruction", "compact", "final"]
    first = RunDirectory(done.path / "cascade" / "step-1")
    folders: dict[str, str | Path] = {"source": recipe.model.source, "cascade-step-1": first.model, "final": done.model}
    shapes = {name: Shape.of(AutoConfig.from_pretrained(folder)) for name, folder in folders.items()}
    assert {name: models[name]["parameters"] for name in shapes} == {
        name: shape.num_parameters() for name, shape in shapes.items()
    }
    assert models["final"]["label"].startswith("from step-1, ")
    # What the first run has cost counts for what came of it: 3 steps, then 4, of 32 tokens.
    tokens = {name: models[name]["training_tokens"] for name in models}
    assert tokens == {"source": 0, "cascade-step-1": 96, "random": 0, "reconstruction": 0, "compact": 96, "final": 224}
    taught = forward_flops_per_token(shapes["source"], sequence_length=16)
    step, cut, final = (models[name]["flops"] for name in ("cascade-step-1", "compact", "final"))
    of_step, of_final = (
        training_flops_per_token(shapes[name], sequence_length=16) + taught for name in ("cascade-step-1", "final")
    )
    assert step > 96 * of_step
    assert cut > step
    assert final == cut + 128 * of_final
    # Baselines are those of a run that was cut to the same shape at once, whatever scores this one has kept.
    (before, last), alone = cascade_of(recipe), RunDirectory(tmp_path / "alone")
    shutil.copytree(done.compact, alone.compact)
    at_once = last.model_copy(update={"run_dir": alone.path, "model": before.model})
    evaluated = run(at_once, stages=["evaluate"])
    expected = json.loads(evaluated.evaluation.read_text())["models"]
    for name in ("source", "random", "reconstruction"):
        assert all(models[name][key] == expected[name][key] for key in ("mean", "units", "flops", "fingerprint")), name
    # Without the first source there is nothing to compare with, which is said first.
    first.recipe.write_text(first.recipe.read_text().replace(recipe.model.source, str(tmp_path / "none")))
    with pytest.raises(ShearingError, match=r"step-1/recipe\.yaml \(model\.source\) = '.*none'"):
        run(recipe, stages=["evaluate"])


def test_a_cascade_may_be_moved(tiny_inputs: Path, tmp_path: Path) -> None:
    data = data_of(tiny_inputs, tmp_path / "run", {"num_hidden_layers": 3, "hidden_size": 28}, FIRST)
    done = run(Recipe.model_validate(data))
    losses = json.loads(done.evaluation.read_text())["models"]
    here = RunDirectory(tmp_path / "moved")

    def models() -> dict[Path, int]:
        return {path.relative_to(here.path): path.stat().st_mtime_ns for path in here.path.rglob("model.safetensors")}

    for way in ("evaluated", "continued"):
        done.path.rename(here.path)
        trained = models()
        there = [str(here.recipe), f"run_dir={here.path}"]
        for command in (["plan"], ["config", "check"]):
            said = CliRunner().invoke(app, [*command, *there], env={"COLUMNS": "120"})
            assert said.exit_code == 0, said.output
        if way == "evaluated":
            here.evaluation.unlink()
            run(load_recipe(here.recipe, overrides=[f"run_dir={here.path}"]), stages=["evaluate"])
        else:
            run(Recipe.model_validate(data | {"run_dir": str(here.path)}))
        assert models() == trained
        found = json.loads(here.evaluation.read_text())["models"]
        assert {name: row["mean"] for name, row in found.items()} == {n: row["mean"] for n, row in losses.items()}
        assert not done.path.exists()
        done, here = here, RunDirectory(tmp_path / f"after-{way}")
    # Its last run is one that can be exported and go on.
    done.path.rename(here.path)
    made = export(str(here.path), output=tmp_path / "exported", console=Console(quiet=True))
    assert made.shape.hidden_size == 16
    longer = change(here, overrides=["pretrain.duration=5"])
    run(load_recipe(longer.directory.recipe), stages=["pretrain"])
    assert here.read_complete("pretrain")["steps"] == 5


def test_what_comes_of_a_cascade_is_of_its_first_source(tiny_inputs: Path, tmp_path: Path) -> None:
    source = tmp_path / "first"
    shutil.copytree(tiny_inputs / "model", source)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", FIRST, model={"source": str(source)}))
    for each in (runs := cascade_of(recipe)):
        run(each, stages=("prune", "compact", "pretrain"))
    before, last = (RunDirectory(each.run_dir) for each in runs)
    for folder, dtype in ((before.model, torch.float32), (last.model, torch.bfloat16)):
        assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {dtype}
    # The losses that all runs aim at are those of one model, on one text.
    aims = [json.loads((each.prune / "reference.json").read_text()) for each in (before, last)]
    assert aims[0] == pytest.approx(aims[1], rel=1e-5)
    made = export(str(last.path), output=tmp_path / "exported", console=Console(quiet=True))
    assert made.dtype == "bf16"
    card = (made.folder / "README.md").read_text()
    shapes = {
        name: Shape.of(AutoConfig.from_pretrained(of)) for name, of in (("source", source), ("step-1", before.model))
    }
    for part in (
        "in bf16, made of `first` with shearing.",
        *(f"| {name} | {shape.num_parameters():,} |" for name, shape in shapes.items()),
        "A cascade: by way of step-1",
        "Of step-1:\n\n- Units: ",
        "- Continued pretraining: 96 tokens in 3 steps",
        "- Continued pretraining: 128 tokens in 4 steps",
        "- Continued pretraining of all together: 224 tokens.",
    ):
        assert part in card, part
    tokens = card.partition("| domain |")[2].partition("##")[0]
    assert (
        sum(int(row.split("|")[2]) for row in tokens.splitlines() if row.startswith("| ") and "tokens" not in row)
        == 224
    )
    again = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert again["model"]["source"] == "first"
    assert again["cascade"] == {"targets": {"step-1": FIRST}, "duration": "3 steps"}
    assert again["target"]["hidden_size"] == 16
    assert "moments_of" not in again["prune"]
    # A result that was written otherwise is told how to have the dtype of the first.
    last.recipe.write_text(last.recipe.read_text().replace("save_dtype: source", "save_dtype: fp32"))
    _, said = as_made(runs[1], directory=last)
    assert [line.rsplit(" ", 2)[1:] for line in said] == [["--dtype", "bf16"]]
    # Which is said before the run begins where the first is gone.
    shutil.rmtree(source)
    with pytest.raises(ShearingError, match=r"step-1/recipe\.yaml \(model\.source\) = '.*first'"):
        run(runs[1].model_copy(update={"distill": None}), stages=("pretrain",))


@pytest.mark.parametrize(
    ("first", "last", "prune", "says"),
    [
        ({"num_hidden_layers": 3}, {"hidden_size": 16, "vocab_size": 8}, {}, "target.vocab_size = 'the tokenizer"),
        (
            {"num_hidden_layers": 3},
            {"hidden_size": 16},
            {"granularities": ["layers"]},
            "prune.granularities = ['layers']",
        ),
        (
            {"hidden_size": 16},
            {"num_hidden_layers": 2},
            {"granularities": ["layers"]},
            "step-1 (prune.granularities) = ",
        ),
        ({"num_hidden_layers": 3}, {"parameters": 10, "uniform": True}, {}, "target.parameters = 10"),
        ({"num_hidden_layers": 3}, {"parameters": "10K"}, {}, "target.uniform = False"),
        # What a size leaves out is as in the model before: a group is left, of which a head is one.
        ({"num_key_value_heads": 1}, {"num_attention_heads": 1}, {}, None),
    ],
)
def test_what_a_later_run_cannot_is_said_before_the_first(
    tiny_inputs: Path,
    tmp_path: Path,
    first: dict[str, Any],
    last: dict[str, Any],
    prune: dict[str, Any],
    says: str | None,
) -> None:
    data = data_of(
        tiny_inputs,
        tmp_path / "run",
        target=[first, last],
        prune={"duration": "6 steps", "estimator": "hard_concrete", **prune},
    )
    recipe = Recipe.model_validate(data)
    found, errors = survey(RunContext(recipe), starts=False)
    if says is None:
        assert errors == []
        assert found is not None
        assert found.target is not None
        assert found.target.num_key_value_heads == 1
        return
    assert any(says in str(error) for error in errors)
    with pytest.raises(ShearingError) as caught:
        run(recipe)
    assert says in str(caught.value)
    assert not (tmp_path / "run" / "cascade").exists()


def test_what_the_last_run_cannot_is_said_before_the_first(tiny_inputs: Path, tmp_path: Path) -> None:
    data = data_of(tiny_inputs, tmp_path / "run", FIRST)
    unknown = data | {"evaluation": data["evaluation"] | {"tasks": ["no_such_task"]}}
    with pytest.raises(ShearingError, match=r"evaluation\.tasks|lm-eval"):
        run(Recipe.model_validate(unknown))
    # In a folder that holds an ordinary run.
    alone = Recipe.model_validate({**data, "target": data["target"][-1], "cascade": None})
    run(alone, stages=["prune"])
    with pytest.raises(ShearingError, match=r"what differs from its recipe\.yaml: .*model\.source was"):
        run(Recipe.model_validate(data))
    assert not (tmp_path / "run" / "cascade" / "step-1").exists()


@pytest.mark.parametrize(
    ("before", "sections", "says"),
    [
        ([{"hidden_size": 16}], {}, None),
        ([{"hidden_size": 12, "num_hidden_layers": 3}], {}, "hidden_size 12 then 16"),
        (
            [FIRST, FIRST],
            {},
            "targets that shrink from each to the next: step-2 does not from step-1",
        ),
        ([{"parameters": "5K", "uniform": True}, {"parameters": "6K", "uniform": True}], {}, "parameters 5000 then"),
        ([{"hidden_size": 24, "parameters": 3}], {}, "either a budget or sizes by name"),
        ([FIRST], {"pretrain": {"lora": {"rank": 2}}}, "none in a cascade"),
        ([FIRST], {"cascade": {"duration": 0}}, "at least a step"),
        ([], {"target": [{"num_experts": 48}, {"num_experts": 32}]}, None),
        ([], {"target": [{"num_experts": 32}, {"num_experts": 48}]}, "num_experts 32 then 48"),
        ([FIRST], {"pretrain": {"warmup": "3 steps"}}, None),
        # Of the four steps of the last run three are left to those before it.
        ([FIRST], {"pretrain": {"warmup": "4 steps"}}, "cascade.duration = '75%, 3 steps of pretrain'"),
        ([FIRST], {"pretrain": {"warmup": "4 steps"}}, "pretrain.warmup = '4 steps' is right: at most the stage's 3"),
        ([{"parameters": "20K"}], {"prune": {"duration": "6 steps"}}, "cascade.targets.step-1.uniform = False"),
        ([{"parameters": "20K", "uniform": True}], {}, "cascade.targets.step-1 (prune.duration) = '0 steps'"),
    ],
)
def test_lists_that_make_no_cascade_are_refused(
    tiny_inputs: Path, tmp_path: Path, before: list[dict[str, Any]], sections: dict[str, Any], says: str | None
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data_of(tiny_inputs, tmp_path, *before, **sections)))
    if says is None:
        assert len(cascade_of(load_recipe(file))) == 2
        return
    with pytest.raises(ShearingError) as caught:
        load_recipe(file)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ({"hidden_size": 32}, "cascade.targets.step-1 = '"),
        ({"hidden_size": 24, "num_attention_heads": 3}, "cascade.targets.step-1 (num_attention_heads) = 3"),
        ({"hidden_size": 24, "num_key_value_heads": 1}, "target (num_attention_heads) = 3"),
    ],
)
def test_targets_are_compared_with_what_they_are_cut_from(
    tiny_inputs: Path, tmp_path: Path, before: dict[str, Any], says: str
) -> None:
    data = data_of(tiny_inputs, tmp_path, before)
    # What a target leaves out is as in the model that it is cut from: two groups, or the one that is left.
    data["target"][1] = {"num_attention_heads": 3, "hidden_size": 16, "num_hidden_layers": 2}
    recipe = Recipe.model_validate(data)
    with pytest.raises(ShearingError) as caught:
        require_shrinking(recipe, source=AutoConfig.from_pretrained(tiny_inputs / "model"))
    assert says in str(caught.value)
