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
from shearing.pruning.sparse.job import Working
from shearing.runs.planning.disk import (
    bytes_free,
    bytes_in,
    checkpoint_bytes,
    refitted_bytes,
    rotated_bytes,
    run_bytes,
    working_of,
)
from shearing.runs.planning.hardware import Hardware
from shearing.runs.planning.plan import plan
from shearing.runs.planning.plan_tables import render
from shearing.runs.recipe import Recipe, load_recipe, overridden


def _shapes(recipe: Recipe) -> tuple[Shape, Shape]:
    assert recipe.target is not None
    config = load_config(recipe.model.source)
    return Shape.of(config), resolve_target(recipe.target, source=config)


@pytest.mark.parametrize(
    ("overrides", "checkpoints"),
    [
        ([], 2 + 1),
        (["pretrain.keep_last=5"], 5 + 1),
        # Eight steps: those of 4 and 8 stay for good.
        (["pretrain.keep_every=4 steps"], 2 + 1 + 2),
        (["pretrain.keep_every=50%", "pretrain.keep_last=1"], 1 + 1 + 2),
        (["pretrain.keep_last=20"], 8),
    ],
)
def test_checkpoints_that_can_be_there_at_once(tiny_recipe: Path, overrides: list[str], checkpoints: int) -> None:
    recipe = load_recipe(tiny_recipe, overrides=["pretrain.duration=8 steps", *overrides])
    source, target = _shapes(recipe)
    sizes = source.num_parameters(), target.num_parameters()
    length = recipe.data.sequence_length
    found = checkpoint_bytes(recipe.pretrain, sequence_length=length, parameters=sizes[1])
    assert found == 12 * sizes[1] * checkpoints
    # Of mask learning three checkpoints and its weights; of the target the kept moments, compact/ and model/.
    expected = (12 * 3 + 4) * sizes[0] + (12 * checkpoints + 4 * 4) * sizes[1]
    assert run_bytes(recipe, source=source, target=target) == expected
    at_once = overridden(recipe, overrides=["prune.duration=0 steps"])
    assert expected - run_bytes(at_once, source=source, target=target) == 12 * 2 * sizes[0], "one, of the start"
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
    size = target.num_parameters()
    more = run_bytes(recipe, source=source, target=target) - run_bytes(plain, source=source, target=target)
    # The sparse model; its layers are gone before checkpoints come.
    assert more == 4 * size
    layers = target.num_hidden_layers
    matrices, stream = layers * sum(target.layer_parameters()), 4 * 3 * 8 * target.hidden_size
    text = "samples: 3, seqlen: 8"
    gblm = load_recipe(tiny_recipe, overrides=[f"sparsify={{criterion: gblm, pattern: '2:4', {text}}}"])
    # Gradients of the layers, and of 3 x 8 tokens what every layer reads and the last one writes, and gradients of one.
    assert working_of(gblm, shape=target) == Working(gradients=4 * matrices, streams=stream * (layers + 2))
    # A search: every matrix at every level, 31 of them unless told otherwise; a bit of each weight where none changes.
    obs, kept = (
        load_recipe(tiny_recipe, overrides=[f"sparsify={{criterion: {each}, sparsity: 0.5, allocation: msp, {text}}}"])
        for each in ("sparsegpt", "wanda")
    )
    assert working_of(obs, shape=target) == Working(levels=31 * 4 * matrices, num_levels=31)
    assert working_of(kept, shape=target) == Working(levels=4 * matrices, num_levels=31)
    # What levels are chosen from is there beside what mask learning and the cut leave, and nothing else.
    before = (12 * 3 + 4) * source.num_parameters() + 4 * 3 * size
    after = before + 4 * size + (12 * 3 + 4) * size
    assert run_bytes(obs, source=source, target=target) == before + 31 * 4 * matrices > after
    assert run_bytes(kept, source=source, target=target) == after
    made = plan(obs, hardware=Hardware.of(processes=1, gpu=None, gigabytes=80, mfu=0.4))
    assert made.working == working_of(obs, shape=target)
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(render(made))
    said = "it holds the model on one GPU, writes two models, and keeps .* of 31 levels to choose from meanwhile"
    assert re.search(said, console.export_text())
    # Once it is complete, only what is still to come is wanted.
    assert run_bytes(obs, source=source, target=target, complete=["prune", "compact", "sparsify"]) == after
    on_disk, in_memory = (
        load_recipe(tiny_recipe, overrides=[f"sparsify={{criterion: wanda, pattern: '2:4', {text}, offload: {each}}}"])
        for each in ("disk", "cpu")
    )
    assert working_of(on_disk, shape=target) == Working(activations=stream)
    assert working_of(in_memory, shape=target) == Working()
    budget = load_recipe(tiny_recipe, overrides=["target={parameters: 10000}", "prune.estimator=hard_concrete"])
    expected = (12 * 3 + 4) * source.num_parameters() + (12 * 3 + 4 * 4) * 10_000
    assert run_bytes(budget, source=source, target=None) == expected


def test_a_run_that_cuts_nothing_is_counted_in_the_dtype_of_its_source(tiny_recipe: Path) -> None:
    """Two bytes of a weight, until it is trained in fp32; neither moments nor a cut model are there."""
    straight = ["prune=null", "target=null", "pretrain.optimizer=fresh"]
    searched = "sparsify={criterion: sparsegpt, sparsity: 0.5, allocation: msp, samples: 3, seqlen: 8}"
    few = [searched, "sparsify.levels=['1:4','3:4']"]
    source, _ = _shapes(load_recipe(tiny_recipe))
    alone, many, two = (load_recipe(tiny_recipe, overrides=[*straight, *each]) for each in ([], [searched], few))
    size, matrices = source.num_parameters(), source.num_hidden_layers * sum(source.layer_parameters())
    trained = (12 * 3 + 4) * size
    assert run_bytes(alone, source=source, target=None) == trained
    assert run_bytes(two, source=source, target=None) == 2 * size + trained
    assert run_bytes(many, source=source, target=None) == max(31 * 2 * matrices, 2 * size + trained)
    assert working_of(many, shape=source) == Working(levels=31 * 2 * matrices, num_levels=31)


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
