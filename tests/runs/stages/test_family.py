"""A family of sizes out of one run: trained in turns, cut out as ordinary models, judged, resumed, gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from shearing.errors import ShearingError
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.runs.continuation.extension import extend
from shearing.runs.continuation.family import family_shapes
from shearing.runs.planning.phases import phases
from shearing.runs.planning.plan import Hardware, plan
from shearing.runs.planning.plan_tables import render
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.pretraining.family import masks_in
from shearing.runs.stages.run import run
from shearing.settings.quantities import format_parameters
from shearing.training.metrics import TIMING_FIELDS
from shearing.training.stage import Interrupted
from tests.conftest import tiny_recipe_data
from tests.training.tasks import stop_at

FAMILY = {
    "sizes": {
        "medium": {"weight": 0.6, "num_hidden_layers": 2, "intermediate_size": 24},
        "small": {"weight": 0.4, "hidden_size": 16, "num_attention_heads": 2},
    },
    "weight": 1.0,
    "draws": 2,
    "calibration_tokens": 64,
}


def data_of(inputs: Path, folder: Path, *, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> dict[str, Any]:
    """Cut at once to 3 layers of the 4, then a family of that, distilled."""
    data = tiny_recipe_data(inputs, run_dir=folder)
    data["target"] = {"num_hidden_layers": 3}
    data["prune"] |= {"duration": "0 steps"}
    data["pretrain"] |= {"duration": "8 steps", "checkpoint_interval": "2 steps", "optimizer": "fresh"}
    data["pretrain"]["batch_size"] = "4 sequences"
    data["distill"] = {"weight": 0.5, "domains": "all"}
    data["mixture"] = {"update": "constant"}
    data["family"] = json.loads(json.dumps(FAMILY))
    data["model"]["save_dtype"] = "fp32"
    change(data)
    return data


@pytest.fixture(scope="module")
def done(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A whole run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("family") / "run"
    return run(Recipe.model_validate(data_of(tiny_inputs, folder)), console=Console(quiet=True))


def logits_of(folder: Path, *, masks: Masks | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if masks is not None:
        MaskedModel(model).set_masks(masks)
    ids = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits.double()
    return found


def lines_of(directory: RunDirectory) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in directory.metrics("pretrain").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def test_every_size_is_an_ordinary_model_that_computes_what_was_trained(done: RunDirectory) -> None:
    assert sorted(path.name for path in done.family.iterdir()) == ["medium", "small"]
    kept = masks_in(done.family_masks)
    assert list(kept) == ["medium", "small"]
    sizes = {name: Shape.of(AutoConfig.from_pretrained(done.family / name)).sizes() for name in kept}
    medium = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4}
    assert sizes["medium"] == {**medium, "num_key_value_heads": 2}
    assert sizes["small"] == {**medium, "num_key_value_heads": 2, "hidden_size": 16, "num_attention_heads": 2}
    for name, masks in kept.items():
        expected, found = logits_of(done.model, masks=Masks(**masks)), logits_of(done.family / name)
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        assert json.loads((done.family / name / "shape.json").read_text())["relative_logit_difference"] < 1e-5
        assert (done.family / name / "tokenizer.json").is_file()
    # All of them were trained: none is what the source, cut to it, computes.
    assert float((logits_of(done.model) - logits_of(done.compact)).norm()) > 0


def test_sizes_take_turns_and_every_one_is_judged(done: RunDirectory) -> None:
    shares = [line["size"] for line in lines_of(done) if "event" not in line]
    assert all(sum(share.values()) == pytest.approx(1.0) for share in shares)
    assert {name for share in shares for name, part in share.items() if part} == {"whole", "medium", "small"}
    models = json.loads(done.evaluation.read_text())["models"]
    assert list(models)[-3:] == ["final", "family-medium", "family-small"]
    assert {models[name]["training_tokens"] for name in list(models)[-3:]} == {8 * 4 * 16}
    parameters = [models[name]["parameters"] for name in list(models)[-3:]]
    assert parameters == sorted(parameters, reverse=True)
    assert all(models[name]["mean"]["loss"] > 0 and models[name]["generation"] for name in list(models)[-3:])
    page = done.report.read_text()
    assert "medium, of the same training" in page
    small = models["family-small"]
    assert f"{small['mean']['loss']:.2f} at {format_parameters(small['parameters'])}." in page


def test_stopped_and_continued_is_the_same_run(
    done: RunDirectory, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run"))
    with monkeypatch.context() as patch:
        stop_at(3, patch=patch)
        with pytest.raises(Interrupted):
            run(recipe, console=Console(quiet=True))
    found = RunDirectory(recipe.run_dir)
    assert not found.family.exists()
    run(recipe, stages=["pretrain"], console=Console(quiet=True))
    assert lines_of(found) == lines_of(done)
    for file in ("model", "family/medium", "family/small"):
        weights = [each.path / file / "model.safetensors" for each in (found, done)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), file


def test_a_size_goes_on_as_any_model_does(done: RunDirectory, tiny_inputs: Path, tmp_path: Path) -> None:
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run")
    del data["target"], data["prune"]
    data["model"] = {"source": str(done.family / "small")}
    data["pretrain"]["duration"] = "2 steps"
    further = run(Recipe.model_validate(data), stages=["pretrain"], console=Console(quiet=True))
    assert AutoConfig.from_pretrained(further.model).hidden_size == 16


def test_an_extended_run_goes_on_with_the_same_sizes(done: RunDirectory, tmp_path: Path) -> None:
    longer = extend(done, to=tmp_path / "longer", onward=True, overrides=["pretrain.duration=10 steps"]).directory
    assert longer.family_masks.read_bytes() == done.family_masks.read_bytes()
    assert not longer.family.exists()
    run(load_recipe(longer.recipe), stages=["pretrain"], console=Console(quiet=True))
    # The rate falls later, so from the ninth step on it is another run; turns go on as in any other.
    turns = [[line["size"] for line in lines_of(each) if "size" in line] for each in (done, longer)]
    assert turns[1][:8] == turns[0]
    assert len(turns[1]) == 10
    assert sorted(path.name for path in longer.family.iterdir()) == ["medium", "small"]


def test_a_source_is_the_largest_of_its_own_family(tiny_inputs: Path, tmp_path: Path) -> None:
    def uncut(data: dict[str, Any]) -> None:
        del data["target"], data["prune"]
        data["pretrain"]["duration"] = "1 steps"

    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", change=uncut))
    directory = run(recipe, stages=["pretrain"], console=Console(quiet=True))
    assert AutoConfig.from_pretrained(directory.model).num_hidden_layers == 4
    assert AutoConfig.from_pretrained(directory.family / "small").hidden_size == 16


def test_sizes_of_a_head_that_is_untied_count_it(tiny_inputs: Path, tmp_path: Path) -> None:
    def untie(data: dict[str, Any]) -> None:
        data["prune"] |= {"rotate": "pca", "rotate_tied": "untie"}
        data["pretrain"]["duration"] = "1 steps"

    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", change=untie))
    directory = run(recipe, stages=["prune", "compact", "pretrain"], console=Console(quiet=True))
    for name in ("medium", "small"):
        folder = directory.family / name
        shape = Shape.of(AutoConfig.from_pretrained(folder))
        assert not shape.tied
        target = json.loads((folder / "shape.json").read_text())["target"]
        assert target["parameters"] == shape.num_parameters()


def test_a_plan_prices_a_family(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run"))
    made = plan(recipe, hardware=Hardware.of(processes=1, gpu="H100", gigabytes=None, mfu=0.4))
    assert list(made.family) == ["medium", "small"]
    assert made.stages[-1].workload.masked
    console = Console(width=200, record=True, quiet=False, file=None)
    with console.capture() as shown:
        console.print(render(made))
    assert "whatever size a step trains; medium, small add" in shown.get()
    found = {phase.what: phase for phase in phases(recipe, made=made)}
    assert (found["pretrain: importance (reconstruction)"].flops or 0) > 0
    written = found["pretrain: cut 2 sizes"].disk
    assert written == 4 * sum(made.target.num_parameters() + each.num_parameters() for each in made.family.values())  # type: ignore[union-attr]


def sizes(**others: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["family"]["sizes"] = others

    return change


def section(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *above, last = path.split(".")

    def change(data: dict[str, Any]) -> None:
        for name in above:
            data = data[name]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (sizes(), "family.sizes"),
        (sizes(whole={"hidden_size": 16}), "which is the model that the others are parts of"),
        (sizes(**{"a/b": {"hidden_size": 16}}), "the name of a folder"),
        (sizes(small={"weight": 2.0}), "at least one of hidden_size"),
        (section("family.draws", 4), "set family.draws="),
        (section("target", {"parameters": 9000, "uniform": True}), "the largest size by name"),
        (section("target.vocab_size", 16), "target.vocab_size"),
        (section("distill.hidden", {}), "residual streams of different widths do not compare"),
        (section("pretrain.lora", {"rank": 2}), "which trains all weights of all its sizes"),
        (section("target", [{"num_hidden_layers": 3}, {"num_hidden_layers": 2}]), "one after the other"),
    ],
)
def test_what_a_recipe_cannot_want(
    change: Callable[[dict[str, Any]], None], says: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data_of(tiny_inputs, tmp_path / "run", change=change)))
    with pytest.raises(ShearingError) as caught:
        load_recipe(file)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"a": {"hidden_size": 16}, "b": {"hidden_size": 24}}, "family.sizes.b (hidden_size) = 24"),
        ({"a": {"hidden_size": 32}}, "something smaller than in the model that is trained"),
        ({"a": {"num_hidden_layers": 4}}, "family.sizes.a (num_hidden_layers) = 4"),
        ({"a": {"num_experts": 4}}, "are not made of experts"),
        ({"a": {"num_key_value_heads": 1}, "b": {"num_attention_heads": 4}}, "its source is a: "),
    ],
)
def test_sizes_that_are_not_inside_each_other(
    others: dict[str, Any], says: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", change=sizes(**others)))
    with pytest.raises(ShearingError) as caught:
        family_shapes(recipe, source=AutoConfig.from_pretrained(tiny_inputs / "model"))
    assert says in str(caught.value)
    # And so says a run, before it does anything.
    with pytest.raises(ShearingError) as caught:
        run(recipe, console=Console(quiet=True))
    assert says in str(caught.value)
    assert not (tmp_path / "run" / "compact").exists()
