"""Units that go while weights are trained: what is summed, in what order they go, and at which sizes.

The oracles work on the plain model: a unit's p is the sum of w g over the weights with which it writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from shearing.models.anatomy import decoder_layers
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.pruning.structured.masking.gradual import GradualRemoval
from shearing.pruning.structured.masking.removal import Removal
from shearing.pruning.structured.masking.staged import StagedRemoval, stage_shapes
from shearing.pruning.structured.recipe import PruneRecipe, removal_steps, stage_ends
from tests.models.tiny import tiny_ids, tiny_model

NAMES = ["layers", "kv_groups", "query_heads", "intermediate", "hidden"]
RUNNING = torch.tensor(False)
WAYS: dict[str, Callable[..., Removal]] = {"staged": StagedRemoval, "gradual": GradualRemoval}


def section(**keys: Any) -> PruneRecipe:
    return PruneRecipe.model_validate({"duration": 12, "batch_size": 4, "freeze": 2, "saliency_window": 2, **keys})


def target_of(source: Shape) -> Shape:
    return dataclasses.replace(
        source,
        num_hidden_layers=3,
        hidden_size=24,
        intermediate_size=17,
        num_attention_heads=2,
        num_key_value_heads=2,
    )


def removal(way: str, *, target: Callable[[Shape], Shape] = target_of, **keys: Any) -> Removal:
    model = tiny_model()
    return WAYS[way](
        MaskedModel(model), NAMES, target=target(Shape.of(model.config)), settings=section(**keys), tokens_per_step=1
    )


def loss_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(ids, labels=ids).loss


def do_step(subject: Removal, step: int, *, parts: int = 2) -> None:
    """A step of masks alone: the weights stay as they are."""
    ids = tiny_ids(sequences=4, seed=step)
    for index, part in enumerate(ids.chunk(parts)):
        subject.draw(step=step, sequence=index * len(part), of=4)
        (loss_of(subject.model.model, part) / parts).backward()
    subject.after_backward(step=step, scale=1.0)
    subject.update(step=step, skip=RUNNING)


def sizes(subject: Removal) -> dict[str, int]:
    """Units of a row; the same in all rows."""
    found = {}
    for name, mask in subject._alive.items():
        rows = mask.sum(-1).flatten().unique()
        assert len(rows) == 1, name
        found[name] = int(rows)
    return found


def planned(shape: Shape) -> dict[str, int]:
    return {
        "layers": shape.num_hidden_layers,
        "kv_groups": shape.num_key_value_heads,
        "query_heads": shape.query_heads_per_group,
        "intermediate": shape.intermediate_size,
        "hidden": shape.hidden_size,
    }


def products_of_the_plain_model(*, seed: int) -> dict[str, Tensor]:
    """p of MLP units by the weights that write, and again by those of `up_proj`; of KV groups by `o_proj`, `v_proj`."""
    model = tiny_model()
    loss_of(model, tiny_ids(sequences=4, seed=seed)).backward()
    found: dict[str, list[Tensor]] = {"intermediate": [], "up": [], "kv_groups": [], "v": [], "hidden": []}
    hidden = (model.model.embed_tokens.weight * 0.0).sum(0)
    for layer in decoder_layers(model):
        o, down, up, v = layer.self_attn.o_proj, layer.mlp.down_proj, layer.mlp.up_proj, layer.self_attn.v_proj
        found["intermediate"].append((down.weight * down.weight.grad).sum(0))
        found["up"].append((up.weight * up.weight.grad).sum(1))
        found["kv_groups"].append((o.weight * o.weight.grad).sum(0).view(3, 16).sum(1))
        found["v"].append((v.weight * v.weight.grad).sum(1).view(3, 8).sum(1))
        hidden = hidden + (o.weight * o.weight.grad).sum(1) + (down.weight * down.weight.grad).sum(1)
    return {name: torch.stack(values) for name, values in found.items() if values}


def test_what_is_summed_is_w_g_over_what_a_unit_writes() -> None:
    subject = removal("staged")
    do_step(subject, 0)
    plain = products_of_the_plain_model(seed=0)
    for name, weights in (("intermediate", "up"), ("kv_groups", "v")):
        torch.testing.assert_close(subject._saliency[name], plain[name].abs(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(plain[name], plain[weights], rtol=1e-3, atol=1e-6)


def test_second_order_is_the_loss_that_a_quadratic_would_lose() -> None:
    subject = removal("gradual")
    do_step(subject, 0)
    product = products_of_the_plain_model(seed=0)["intermediate"]
    torch.testing.assert_close(
        subject._saliency["intermediate"], (product - 0.5 * product**2).abs(), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_do_not_matter(way: str) -> None:
    """The sum over a batch comes before anything is made of it."""
    saliencies = []
    for parts in (1, 2, 4):
        subject = removal(way)
        do_step(subject, 0, parts=parts)
        saliencies.append(subject._saliency)
    for name, value in saliencies[0].items():
        for other in saliencies[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_have_the_sizes_of_their_plan_and_end_at_the_target(stages: int) -> None:
    subject = removal("staged", removal_stages=stages)
    assert isinstance(subject, StagedRemoval)
    ends, window = stage_ends(section(removal_stages=stages), tokens_per_step=1)
    assert window == 2
    expected = {1: [2], 2: [2, 2 + 10 * 2 // 6], 3: [2, 2 + 10 * 2 // 12, 2 + 10 * 6 // 12]}
    assert ends == expected[stages]
    left = planned(subject.source)
    for step in range(12):
        do_step(subject, step)
        if step + 1 in ends:
            left = planned(subject.shapes[ends.index(step + 1)])
        assert sizes(subject) == left
    assert left == planned(subject.target)
    assert subject.selection().hidden.numel() == 24
    assert subject.expected_parameters() == subject.target.num_parameters() == subject.settled_parameters(step=12)


@given(stages=st.integers(1, 20), layers=st.integers(1, 4), hidden=st.integers(1, 36), units=st.integers(1, 39))
def test_each_stage_is_the_first_point_of_the_way_within_its_budget(
    stages: int, layers: int, hidden: int, units: int
) -> None:
    source = Shape.of(tiny_model().config) if not SOURCE else SOURCE[0]
    SOURCE[:] = [source]
    target = dataclasses.replace(source, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=units)
    shapes = stage_shapes(source, target, stages=stages)
    assert shapes[-1] == target
    full, final = source.num_parameters(), target.num_parameters()
    for stage, shape in enumerate(shapes, 1):
        assert shape.num_parameters() <= full - (full - final) * stage / stages + 1e-6
    parameters = [shape.num_parameters() for shape in shapes]
    assert parameters == sorted(parameters, reverse=True)


SOURCE: list[Shape] = []


def test_one_unit_goes_after_the_other_of_whichever_kind_is_least() -> None:
    """Against a loop that takes one at a time, out of all rows at once."""
    subject = removal("gradual", saliency_window=1, freeze=2)
    source, target = planned(subject.source), planned(subject.target)
    total = sum(source.values()) - sum(target.values())
    for step in range(12):
        before = {name: value.clone() for name, value in subject._alive.items()}
        after_step: dict[str, Tensor] = {}
        original = subject._remove

        def keep(step: int, original: Any = original, after_step: dict[str, Tensor] = after_step) -> None:
            after_step.update({name: value.clone() for name, value in subject._saliency.items()})
            original(step)

        subject._remove = keep  # type: ignore[method-assign]
        do_step(subject, step)
        subject._remove = original  # type: ignore[method-assign]
        if not after_step:
            assert step >= 10
            continue
        left = {name: int(mask.sum(-1).flatten()[0]) for name, mask in before.items()}
        for _ in range(total * (step + 1) // 10 - total * step // 10):
            worst = {name: after_step[name].masked_fill(before[name] == 0, torch.inf).min(-1) for name in before}
            costs = {name: float(found.values.sum()) for name, found in worst.items() if left[name] > target[name]}
            least = min(costs, key=costs.__getitem__)
            before[least].scatter_(-1, worst[least].indices.unsqueeze(-1), 0.0)
            left[least] -= 1
        for name, mask in before.items():
            assert torch.equal(subject._alive[name], mask), (step, name)
    assert sizes(subject) == target


def useless(model: torch.nn.Module) -> None:
    """MLP units 0 to 22 write nothing, nor do hidden dimensions 0 to 11 say anything."""
    with torch.no_grad():
        for layer in decoder_layers(model):  # type: ignore[arg-type]
            layer.mlp.down_proj.weight[:, :23] = 0.0
            layer.mlp.down_proj.weight[:12] = 0.0
            layer.self_attn.o_proj.weight[:12] = 0.0
        model.model.embed_tokens.weight[:, :12] = 0.0  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("way", WAYS)
def test_planted_useless_units_go_first(way: str) -> None:
    model = tiny_model()
    useless(model)
    target = target_of(Shape.of(model.config))
    subject = WAYS[way](MaskedModel(model), NAMES, target=target, settings=section(), tokens_per_step=1)
    for step in range(12):
        do_step(subject, step)
    selection = subject.selection()
    assert selection.hidden.tolist() == list(range(12, 36))
    assert selection.intermediate.tolist() == [list(range(23, 40))] * 3


def test_one_stage_is_choosing_at_once() -> None:
    """By the first-order saliency of its two steps on the source, all rows to the target."""
    subject = removal("staged", removal_stages=1)
    for step in range(2):
        do_step(subject, step)
    products = [products_of_the_plain_model(seed=step)["intermediate"].abs() for step in range(2)]
    expected = torch.stack(products).sum(0).topk(17).indices.sort().values
    assert torch.equal(subject._alive["intermediate"].nonzero()[:, 1].view(4, 17), expected)
    before = {name: value.clone() for name, value in subject._alive.items()}
    for step in range(2, 12):
        do_step(subject, step)
    assert all(torch.equal(subject._alive[name], value) for name, value in before.items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [1, 4])
def test_continued_is_uninterrupted(way: str, at: int) -> None:
    whole, first, second = removal(way), removal(way), removal(way)
    for step in range(12):
        do_step(whole, step)
    for step in range(at):
        do_step(first, step)
    second.load_state_dict(first.state_dict())
    for step in range(at, 12):
        do_step(second, step)
    for name, value in whole._alive.items():
        assert torch.equal(second._alive[name], value)
        assert torch.equal(second._saliency[name], whole._saliency[name])


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_skipped_says_nothing(way: str) -> None:
    subject = removal(way)
    do_step(subject, 0)
    before = {name: value.clone() for name, value in subject._saliency.items()}
    subject.draw(step=1, sequence=0, of=4)
    (loss_of(subject.model.model, tiny_ids()) * torch.nan).backward()
    subject.after_backward(step=1, scale=1.0)
    # Step 1 removes: by what step 0 said.
    kept = {name: value.clone() for name, value in subject._alive.items()}
    subject._remove = lambda step: None  # type: ignore[method-assign]
    assert subject.update(step=1, skip=RUNNING)
    for name, value in before.items():
        assert torch.equal(subject._saliency[name], value)
        assert torch.equal(subject._alive[name], kept[name])


def test_when_units_go() -> None:
    assert removal_steps(section(saliency_window=3), tokens_per_step=1) == [3, 6, 9]
    assert removal_steps(section(freeze="100%"), tokens_per_step=1) == []
    assert stage_ends(section(removal_stages=4, duration=22), tokens_per_step=1) == ([2, 4, 8, 14], 2)
