"""What a run writes is foreseen: the checks before it and the plan count the same checkpoints."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from shearing.models.loading import load_config
from shearing.models.shape import Shape, resolve_target
from shearing.runs.planning.disk import bytes_free, bytes_in, checkpoint_bytes, refitted_bytes, rotated_bytes, run_bytes
from shearing.runs.planning.hardware import Hardware
from shearing.runs.planning.plan import plan
from shearing.runs.planning.plan_tables import render
from shearing.runs.recipe import Recipe, load_recipe


def _shapes(recipe: Recipe) -> tuple[Shape, Shape]:
    assert recipe.target is not None
    config = load_config(recipe.model.source)
    return Shape.of(config), resolve_target(recipe.target, source=config)


@pytest.mark.parametrize(
    ("overrides", "checkpoints"),
    [
        ([], 2 + 1),
        (["pretrain.keep_last=5"], 5 + 1),
        # Four steps: those of 2 and 4 stay for good.
        (["pretrain.keep_every=2 steps"], 2 + 1 + 2),
        (["pretrain.keep_every=50%", "pretrain.keep_last=1"], 1 + 1 + 2),
    ],
)
def test_checkpoints_that_can_be_there_at_once(tiny_recipe: Path, overrides: list[str], checkpoints: int) -> None:
    recipe = load_recipe(tiny_recipe, overrides=overrides)
    source, target = _shapes(recipe)
    sizes = source.num_parameters(), target.num_parameters()
    length = recipe.data.sequence_length
    found = checkpoint_bytes(recipe.pretrain, sequence_length=length, parameters=sizes[1])
    assert found == 12 * sizes[1] * checkpoints
    # Of mask learning three checkpoints and its weights; of the target the kept moments, compact/ and model/.
    expected = (12 * 3 + 4) * sizes[0] + (12 * checkpoints + 4 * 4) * sizes[1]
    assert run_bytes(recipe, source=source, target=target) == expected
    of_two = run_bytes(recipe, source=source, target=target, processes=2)
    assert of_two - expected == 4 * target.num_parameters(), "the baseline that is measured is in files"


@pytest.mark.parametrize("override", ["pretrain.optimizer=fresh", "pretrain.lora={}"])
def test_moments_that_nobody_reads_are_not_written(tiny_recipe: Path, override: str) -> None:
    carried, fresh = load_recipe(tiny_recipe), load_recipe(tiny_recipe, overrides=[override])
    source, target = _shapes(carried)
    less = run_bytes(carried, source=source, target=target) - run_bytes(fresh, source=source, target=target)
    assert less == 2 * 4 * target.num_parameters()


def test_a_budget_and_one_shot_sparsity_are_counted(tiny_recipe: Path) -> None:
    sparse = ["sparsify={criterion: magnitude, pattern: '2:4'}"]
    plain, recipe = load_recipe(tiny_recipe), load_recipe(tiny_recipe, overrides=sparse)
    source, target = _shapes(recipe)
    more = run_bytes(recipe, source=source, target=target) - run_bytes(plain, source=source, target=target)
    assert more == 2 * 4 * target.num_parameters()
    spools = load_recipe(tiny_recipe, overrides=["sparsify={criterion: gblm, pattern: '2:4', samples: 3, seqlen: 8}"])
    spooled = run_bytes(spools, source=source, target=target) - run_bytes(recipe, source=source, target=target)
    layers = target.num_hidden_layers
    # Gradients of the layers, and of 3 x 8 tokens what every layer reads and the last one writes, and gradients of one.
    assert spooled == 4 * (layers * sum(target.layer_parameters()) + 3 * 8 * target.hidden_size * (layers + 2))
    # A search: every matrix at every level, 31 of them unless told otherwise; a bit of each weight where none changes.
    searched = [
        load_recipe(
            tiny_recipe,
            overrides=[
                f"sparsify={{criterion: {criterion}, sparsity: 0.5, allocation: {rule}, samples: 3, seqlen: 8}}"
            ],
        )
        for criterion in ("sparsegpt", "wanda")
        for rule in ("msp", "uniform")
    ]
    obs, obs_alone, kept, kept_alone = (run_bytes(each, source=source, target=target) for each in searched)
    matrices = layers * sum(target.layer_parameters())
    assert (obs - obs_alone, kept - kept_alone) == (31 * 4 * matrices, 4 * matrices)
    made = plan(searched[0], hardware=Hardware.of(processes=1, gpu=None, gigabytes=80, mfu=0.4))
    assert made.spooled == {"31 levels to choose from": 31 * 4 * matrices}
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(render(made))
    assert re.search("writes two models, and spools .* of 31 levels to choose from", console.export_text())
    offloaded = [
        f"sparsify={{criterion: wanda, pattern: '2:4', samples: 3, seqlen: 8, offload: {each}}}"
        for each in ("disk", "cpu")
    ]
    on_disk, in_memory = (
        run_bytes(load_recipe(tiny_recipe, overrides=[each]), source=source, target=target) for each in offloaded
    )
    assert on_disk - in_memory == 4 * 3 * 8 * target.hidden_size
    budget = load_recipe(tiny_recipe, overrides=["target={parameters: 10000}", "prune.estimator=hard_concrete"])
    expected = (12 * 3 + 4) * source.num_parameters() + (12 * 3 + 4 * 4) * 10_000
    assert run_bytes(budget, source=source, target=None) == expected


def test_what_is_there_for_a_while_is_counted_where_it_is_the_most(tiny_recipe: Path) -> None:
    plain, rotated = (load_recipe(tiny_recipe, overrides=each) for each in ([], ["prune.rotate=pca"]))
    source, target = _shapes(plain)
    assert rotated_bytes(plain, source=source) == 0
    assert rotated_bytes(rotated, source=source) == 4 * source.num_parameters()
    # Behind mask learning, what comes takes more than the source in another basis, which is gone by then.
    assert run_bytes(plain, source=source, target=target) == run_bytes(rotated, source=source, target=target)
    # Before it: three checkpoints and its weights, and what a cut to next to nothing adds.
    small = dataclasses.replace(target, num_hidden_layers=1, intermediate_size=1, hidden_size=2)
    learning = (12 * 3 + 4 + 4) * source.num_parameters()
    assert run_bytes(rotated, source=source, target=small) == learning > run_bytes(plain, source=source, target=small)
    layers = source.num_hidden_layers * sum(source.layer_parameters())
    assert refitted_bytes(plain, source=source) == 4 * layers
    assert refitted_bytes(load_recipe(tiny_recipe, overrides=["prune.compensate=false"]), source=source) == 0


def test_what_a_folder_holds_and_what_its_disk_has_left(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"1234")
    (tmp_path / "a" / "b" / "two").write_bytes(b"12345")
    assert bytes_in(tmp_path / "a") == 9
    assert bytes_in(tmp_path / "nowhere") == 0
    assert bytes_free(tmp_path / "not" / "yet") > 0
