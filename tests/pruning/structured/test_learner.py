"""The learner: exact constraints, noise without state, warm start, freezing, budgets, resuming."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shearing.errors import ShearingError
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.structured import hard_concrete
from shearing.pruning.structured.estimators.registry import ESTIMATORS
from shearing.pruning.structured.importance.chance import random_scores
from shearing.pruning.structured.learner import OPEN, MaskLearner
from shearing.pruning.structured.mask_settings import BAND, CROSSINGS, MaskSettings
from shearing.pruning.structured.parameter_budget import CONSTRAINT, ParameterBudget, count_parameters
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.pruning.structured.rounding import select, top_k
from shearing.pruning.structured.starts import grade
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

GRANULARITIES = ["layers", "kv_groups", "query_heads", "intermediate", "hidden"]
SOURCE = Shape.of(tiny_model().config)
TARGET = dataclasses.replace(
    SOURCE, num_hidden_layers=2, hidden_size=24, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2
)
MIN_MAX = {"estimator": "hard_concrete", "mask_learning_rate": 0.1}
PAPER = {
    **MIN_MAX,
    "initial_masks": "open",
    "log_alpha_limit": hard_concrete.LOG_ALPHA_LIMIT,
    "quadratic_penalty": 0.0,
}
SHALLOW = {**MIN_MAX, "log_alpha_limit": hard_concrete.LOG_ALPHA_LIMIT, "doubtful_share": 1.0}


def settings(**keys) -> MaskSettings:
    """Of a recipe's section with these keys, which says the rest; 40 steps, none of them frozen or of warm-up."""
    section = {"duration": "40 steps", "batch_size": "1 sequences", "warmup": 0, "freeze": 0, **keys}
    return MaskSettings.of(PruneRecipe.model_validate(section), tokens_per_step=1, seed=0)


def learner(*, granularities=GRANULARITIES, target=TARGET, scores=None, seed=0, **keys) -> MaskLearner:
    chosen = dataclasses.replace(settings(**keys), seed=seed)
    return MaskLearner(granularities, source=SOURCE, target=target, settings=chosen, scores=scores)


def saturate(subject: MaskLearner) -> None:
    """log_alpha at its limits, the target's number of units open in every row."""
    with torch.no_grad():
        for granularity in subject.granularities:
            value = subject.log_alpha[granularity.name]
            value.fill_(-subject.settings.log_alpha_limit)
            value[..., : granularity.target] = subject.settings.log_alpha_limit


def test_a_saturated_mask_at_the_target_has_no_violation_and_no_rounding_gap():
    subject = learner()
    saturate(subject)
    assert all(v.abs().max() < 1e-6 for v in subject.violations(step=10).values())
    assert float(subject.penalty(step=10).detach()) == pytest.approx(0.0, abs=1e-6)
    assert all(row["rounding_gap"] == 0 for row in subject.summary().values())
    assert subject.selection().shape(SOURCE) == TARGET
    assert subject.parameter_counts() == dict.fromkeys(("learned", "kept"), TARGET.num_parameters())


def test_what_rounding_took_is_counted():
    subject = learner(**PAPER)
    subject.fix_final_masks()
    counts = subject.parameter_counts()
    assert counts["kept"] == TARGET.num_parameters()
    assert 0.9 * SOURCE.num_parameters() < counts["learned"] <= SOURCE.num_parameters()
    assert learner(granularities=[], target=SOURCE).parameter_counts()["learned"] == SOURCE.num_parameters()


def test_settings_have_no_default_of_their_own_and_those_of_a_recipe_are_in_steps():
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(MaskSettings))
    section = PruneRecipe.model_validate({"duration": "4000 tokens", "batch_size": 2, "sparsity_warmup": "10%"})
    found = MaskSettings.of(section, tokens_per_step=40, seed=7)
    in_steps = {"total_steps": 100, "sparsity_warmup_steps": 10, "freeze_step": 50, "warmup_steps": 3, "seed": 7}
    same = {field.name for field in dataclasses.fields(MaskSettings)} & set(PruneRecipe.model_fields)
    assert section.mask_learning_rate == "auto"
    by_itself = {"mask_learning_rate": None}
    assert dataclasses.asdict(found) == {**{name: getattr(section, name) for name in same}, **in_steps, **by_itself}


def test_a_start_by_the_recipes_defaults_is_at_the_target_in_the_order_of_the_scores():
    scores = random_scores(SOURCE, seed=0)
    subject = learner(scores=scores)
    for granularity in subject.granularities:
        value, order = subject.log_alpha[granularity.name].detach(), scores[granularity.name].argsort(-1)
        assert (value.gather(-1, order).diff() >= 0).all(), granularity.name
        assert (subject.expected(step=0)[granularity.name].sum(-1) - granularity.target).abs().max() < 1e-4, (
            granularity.name
        )
    masks, _ = select(scores, source=SOURCE, target=TARGET)
    assert all(torch.equal(value, masks.tensors()[name]) for name, value in subject.final_masks().tensors().items())


@pytest.mark.parametrize("ramp", [0, 20])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_stage_with_the_recipes_defaults_ends_at_exactly_the_target(estimator, ramp):
    """A loss that pulls every unit open, against the default rates, penalty and freeze."""
    keys = {"duration": 60, "batch_size": 1, "estimator": estimator, "sparsity_warmup": ramp}
    section = PruneRecipe.model_validate(keys)
    chosen = MaskSettings.of(section, tokens_per_step=1, seed=0)
    scores = random_scores(SOURCE, seed=0)
    subject = MaskLearner(section.granularities, source=SOURCE, target=TARGET, settings=chosen, scores=scores)
    assert chosen.freeze_step == 30
    for step in range(chosen.total_steps):
        masks = subject.sample(step=step, draw=0)
        binary = all(set(value.unique().tolist()) <= {0.0, 1.0} for value in masks.tensors().values())
        assert binary or step < chosen.freeze_step
        loss = sum((1 - value).mean() for value in masks.tensors().values()) + subject.penalty(step=step)
        if loss.requires_grad:
            loss.backward()
        subject.optimizer_step(step=step)
        if step == chosen.freeze_step:
            fixed = {name: value.clone() for name, value in masks.tensors().items()}
    assert subject.selection().shape(SOURCE) == TARGET
    assert all(torch.equal(value, fixed[name]) for name, value in masks.tensors().items())
    for name, violation in subject.violations(step=chosen.total_steps).items():
        assert violation.abs().max() < (0.05 if ramp else 0.01), name


def test_noise_depends_on_seed_step_and_micro_batch_only():
    scores = random_scores(SOURCE, seed=0)
    first, second = learner(scores=scores, **SHALLOW), learner(scores=scores, **SHALLOW)
    second.sample(step=7, draw=3)
    a, b = first.sample(step=1, draw=2), second.sample(step=1, draw=2)
    for name, value in a.tensors().items():
        assert torch.equal(value, b.tensors()[name])
    for other in (first.sample(step=2, draw=2), first.sample(step=1, draw=1)):
        assert not torch.equal(other.intermediate, a.intermediate)
    assert not torch.equal(learner(scores=scores, seed=1, **SHALLOW).sample(step=1, draw=2).hidden, a.hidden)


@pytest.mark.parametrize("share", [0.1, 0.5, 2 / 3, 0.9])
def test_grade_meets_the_share_and_keeps_the_order(share):
    scores = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    log_alpha = grade(scores, share=share, final=share, settings=settings(**SHALLOW))
    expected = hard_concrete.expected_alive(log_alpha).mean(-1)
    torch.testing.assert_close(expected, torch.full((3,), share), rtol=0, atol=1e-5)
    order = scores.argsort(-1, descending=True)
    assert (log_alpha.gather(-1, order).diff() <= 0).all()


@pytest.mark.parametrize(("units", "doubtful"), [(3, 3), (30, 30), (32, 32), (100, 32), (576, 115), (11_008, 2202)])
def test_a_share_of_a_row_around_the_cut_starts_in_doubt_and_short_rows_as_a_whole(units, doubtful):
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(units, generator=generator) for _ in range(2)]).float()
    share = round(0.6 * units) / units
    log_alpha = grade(scores, share=share, final=share, settings=settings())
    assert settings().units_in_doubt(units) == doubtful
    assert ((log_alpha.abs() < 10.0).sum(-1) - doubtful).abs().max() <= 1
    expected = hard_concrete.expected_alive(log_alpha, limit=10.0)
    torch.testing.assert_close(expected.mean(-1), torch.full((2,), share), rtol=0, atol=1e-5)
    ordered = log_alpha.gather(-1, scores.argsort(-1, descending=True))
    falls = ordered.diff()[(ordered[:, 1:].abs() < 10.0) & (ordered[:, :-1].abs() < 10.0)]
    torch.testing.assert_close(falls, torch.full_like(falls, -BAND / doubtful), rtol=2e-2, atol=1e-5)


def test_the_doubtful_band_of_a_ramp_reaches_from_the_final_cut_to_the_first():
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    ordered = grade(scores, share=1.0, final=0.5, settings=settings(doubtful_share=0.1))[
        scores.argsort(descending=True)
    ]
    assert (ordered[:450] == 10.0).all()
    assert (ordered[450:] < 10.0).all()
    assert (ordered[450:].diff() < 0).all()


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_the_rate_auto_crosses_the_band_as_often_whatever_the_number_of_steps(steps):
    found = settings(duration=f"{steps} steps", freeze="50%", warmup="20%")
    travel = sum(found.mask_rate * found.rate_factor(step) for step in range(found.freeze_step))
    assert travel == pytest.approx(CROSSINGS * BAND)
    assert settings(duration=f"{steps} steps", mask_learning_rate=0.3).mask_rate == 0.3


def test_sub_layers_start_from_a_choice_that_alternates_and_ties_keep_the_order_of_importance():
    scores = random_scores(SOURCE, seed=1)
    names = ["sublayers", *GRANULARITIES[1:]]
    subject = learner(granularities=names, scores=scores)
    masks = subject.final_masks().tensors()
    ranked = {name: subject.log_alpha[name].detach().clone() for name in ("attention", "mlp")}
    for name, value in ranked.items():
        assert torch.equal(masks[name], top_k(value, keep=TARGET.num_hidden_layers)), name
        with torch.no_grad():  # saturated: the order is gone
            subject.log_alpha[name].copy_(torch.where(masks[name] > 0, 10.0, -10.0))
    for name in ranked:
        assert torch.equal(subject.final_masks().tensors()[name], masks[name]), name


def test_the_warm_start_begins_at_the_target_with_the_selection_of_the_importance():
    scores = random_scores(SOURCE, seed=3)
    subject = learner(scores=scores)
    assert all(v.abs().max() < 1e-5 for v in subject.violations(step=0).values())
    masks, _ = select(scores, source=SOURCE, target=TARGET)
    for name, value in masks.tensors().items():
        assert torch.equal(subject.final_masks().tensors()[name], value)


def test_the_paper_starts_open_and_its_constraint_pulls_to_the_target():
    subject = learner(**PAPER, duration=400, sparsity_warmup=80)
    assert all(v.abs().max() < 1e-6 for v in subject.violations(step=0).values())
    for step in range(400):
        subject.penalty(step=step).backward()
        subject.optimizer_step(step=step)
    for name, violation in subject.violations(step=399).items():
        assert violation.abs().max() < 0.08, name
    assert all(float(value.detach().abs().max()) > 0 for value in subject.estimator.lagrangian.lambda_1.values())


def test_multipliers_ascend_and_masks_descend():
    subject = learner(**MIN_MAX)
    before = float(subject.expected(step=0)["hidden"].detach().mean())
    subject.penalty(step=0).backward()
    subject.optimizer_step(step=0)
    assert float(subject.estimator.lagrangian.lambda_1["hidden"]) > 0
    subject.penalty(step=1).backward()
    subject.optimizer_step(step=1)
    assert float(subject.expected(step=0)["hidden"].detach().mean()) < before


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_skipped_step_changes_nothing(estimator):
    subject = learner(scores=random_scores(SOURCE, seed=0), estimator=estimator)
    twin = learner(scores=random_scores(SOURCE, seed=0), estimator=estimator)
    for parameter in subject.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    subject.optimizer_step(step=0, skip=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(subject.parameters(), twin.parameters(), strict=True))
    for step in (1, 2):  # nothing is remembered of it either
        for each in (subject, twin):
            for parameter in each.parameters():
                parameter.grad = torch.arange(parameter.numel()).view_as(parameter).sin() * step
            each.optimizer_step(step=step)
    assert all(torch.equal(a, b) for a, b in zip(subject.parameters(), twin.parameters(), strict=True))


def test_frozen_masks_are_binary_stay_and_cost_no_penalty():
    subject = learner(scores=random_scores(SOURCE, seed=0), freeze=38)
    frozen = subject.sample(step=2, draw=0)
    assert all(set(value.unique().tolist()) <= {0.0, 1.0} for value in frozen.tensors().values())
    assert float(subject.penalty(step=2)) == 0.0
    before = {name: value.clone() for name, value in subject.log_alpha.items()}
    subject.optimizer_step(step=2)
    assert all(torch.equal(value, before[name]) for name, value in subject.log_alpha.items())
    assert torch.equal(subject.sample(step=9, draw=5).hidden, frozen.hidden)


def sizes_of(masks: Masks) -> dict[str, set[int]]:
    """Units that are kept in each row, by granularity."""
    by_name = {"layers": masks.attention, **{name: getattr(masks, name) for name in GRANULARITIES[1:]}}
    return {name: set(mask.sum(-1).flatten().int().tolist()) for name, mask in by_name.items()}


@pytest.mark.parametrize("scores", [None, random_scores(SOURCE, seed=0)], ids=["open", "graded"])
def test_masks_have_the_size_of_their_step_and_in_the_end_the_targets(scores):
    start = {"initial_masks": "open"} if scores is None else {}
    subject = learner(scores=scores, **start, sparsity_warmup=20, freeze=5)
    for step in range(41):
        targets = subject.targets(step=step if step < 35 else 40)
        assert sizes_of(subject.masks_at(step=step)) == {name: {round(units)} for name, units in targets.items()}
    assert sizes_of(subject.masks_at(step=10))["hidden"] == {30}
    assert sizes_of(subject.final_masks()) == sizes_of(subject.masks_at(step=35)) == sizes_of(subject.masks_at(step=20))
    unfinished = learner(scores=scores, **start, sparsity_warmup=80, freeze=5)
    assert sizes_of(unfinished.masks_at(step=34))["hidden"] == {31}
    assert sizes_of(unfinished.masks_at(step=35))["hidden"] == {24}


@pytest.mark.parametrize("uniform", [False, True])
def test_masks_of_a_budget_have_the_parameters_of_their_step(uniform):
    accepts = lambda shape: shape.hidden_size % shape.num_attention_heads == 0  # noqa: E731
    budget = ParameterBudget(12_000, uniform=uniform, accepts=accepts)
    subject = learner(target=budget, initial_masks="open", sparsity_warmup=20, freeze=5, **MIN_MAX)
    left = [subject.parameters_at(step=step) for step in range(41)]
    assert left[0] == SOURCE.num_parameters()
    assert left == sorted(left, reverse=True)
    shallower = dataclasses.replace(SOURCE, num_hidden_layers=SOURCE.num_hidden_layers - 1)
    layer = SOURCE.num_parameters() - shallower.num_parameters()  # the largest unit
    for step, parameters in enumerate(left):
        wanted = subject.targets(step=step)[CONSTRAINT]
        assert wanted - layer < parameters <= round(wanted), step
        masks = subject.masks_at(step=step).tensors()
        binary = {**{name: masks[name] for name in GRANULARITIES[1:]}, "layers": masks["attention"]}
        assert parameters == int(count_parameters(binary, source=SOURCE))
    final = subject.final_masks().tensors()
    assert all(torch.equal(value, final[name]) for name, value in subject.masks_at(step=20).tensors().items())


def test_units_that_are_alike_go_by_chance_and_by_the_seed():
    first, again, other = (learner(**PAPER, sparsity_warmup=20, seed=seed) for seed in (0, 0, 1))
    kept = [subject.masks_at(step=10) for subject in (first, again, other)]
    assert torch.equal(kept[0].hidden, kept[1].hidden)
    assert not torch.equal(kept[0].hidden, kept[2].hidden)
    assert kept[0].hidden[:30].sum() < 30
    assert len({tuple(row.tolist()) for row in kept[0].intermediate}) == SOURCE.num_hidden_layers


def test_what_changed_from_the_start_is_counted_once_a_swap_where_it_is_kept():
    scores = random_scores(SOURCE, seed=0)
    subject = learner(scores=scores)
    assert {row["changed_from_start"] for row in subject.summary().values()} == {0}
    layers = subject.final_masks().attention
    kept, gone = int(layers.argmax()), int(layers.argmin())

    def swap(name: str, row: tuple[int, ...], count: int) -> None:
        values = subject.log_alpha[name].data[row]
        order = values.argsort(descending=True)
        target = next(g.target for g in subject.granularities if g.name == name)
        inside, outside = order[target - count : target], order[target : target + count]
        values[inside], values[outside] = values[outside].clone(), values[inside].clone()

    swap("hidden", (), 3)
    swap("intermediate", (kept,), 2)
    swap("intermediate", (gone,), 5)
    changed = {name: row["changed_from_start"] for name, row in subject.summary().items()}
    assert changed == {"layers": 0, "kv_groups": 0, "query_heads": 0, "intermediate": 2, "hidden": 3}
    subject.fix_final_masks()
    resumed = learner(scores=scores)
    resumed.load_state_dict(subject.state_dict())
    assert resumed.summary() == subject.summary()
    assert {row["changed_from_start"] for row in learner(**PAPER).summary().values()} == {OPEN}


def test_in_doubt_is_what_the_loss_had_a_gradient_for_in_steps_that_counted():
    scores = random_scores(SOURCE, seed=0)
    subject, resumed = learner(scores=scores, **MIN_MAX), learner(scores=scores, **MIN_MAX)
    doubted = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in subject.granularities}
    for step in range(12):
        draws = [subject.sample(step=step, draw=draw) for draw in range(2)]
        for masks in draws:
            sum(value.sum() for value in masks.tensors().values()).backward()
        subject.sum_gradients()
        subject.penalty(step=step).backward()
        subject.optimizer_step(step=step, skip=torch.tensor(step % 3 == 1))
        for name in doubted if step % 3 != 1 else ():
            for masks in draws:
                z = masks.attention if name == "layers" else getattr(masks, name)
                doubted[name] |= (z > 0) & (z < 1)
        if step == 5:
            resumed.load_state_dict(subject.state_dict())
            assert resumed.summary() == subject.summary()
    counted = {name: row["ever_in_doubt"] for name, row in subject.summary().items()}
    assert counted == {name: int(units.sum()) for name, units in doubted.items()}
    assert 0 < counted["intermediate"] < doubted["intermediate"].numel()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_resuming_is_exact(estimator):
    scores = random_scores(SOURCE, seed=0)

    def steps(subject: MaskLearner, first: int, last: int) -> None:
        for step in range(first, last):
            z = subject.sample(step=step, draw=0)
            loss = sum(
                (value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in z.tensors().values()
            )
            (0.01 * (1 + step % 3) * loss.square() + subject.penalty(step=step)).backward()
            subject.optimizer_step(step=step)

    whole = learner(scores=scores, estimator=estimator)
    steps(whole, 0, 12)
    half = learner(scores=scores, estimator=estimator)
    steps(half, 0, 5)
    state = half.state_dict()
    resumed = learner(estimator=estimator)
    resumed.load_state_dict(state)
    steps(resumed, 5, 12)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not torch.equal(whole.log_alpha["hidden"], learner(scores=scores, estimator=estimator).log_alpha["hidden"])


def test_scores_that_lack_what_is_masked_are_refused():
    scores = {name: random_scores(SOURCE, seed=0)[name] for name in ("query_heads", "intermediate")}
    with pytest.raises(ShearingError, match="also of layers, kv_groups, hidden"):
        learner(scores=scores)


def test_sizes_that_no_granularity_can_shrink_are_refused():
    with pytest.raises(ShearingError, match="hidden_size"):
        learner(granularities=["layers", "kv_groups", "query_heads", "intermediate"])


def test_granularities_with_nothing_to_prune_are_left_out():
    target = dataclasses.replace(SOURCE, intermediate_size=16)
    assert [g.name for g in learner(target=target).granularities] == ["intermediate"]


def test_sublayers_end_in_an_ordinary_shape():
    target = dataclasses.replace(SOURCE, num_hidden_layers=2)
    subject = learner(granularities=["sublayers"], target=target, scores=random_scores(SOURCE, seed=5))
    assert subject.selection().shape(SOURCE) == target


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_parameter_count_is_exact_for_binary_masks(family, tied):
    model = tiny_model(family, tied=tied)
    source = Shape.of(model.config)
    assert source.num_parameters() == sum(p.numel() for p in model.parameters())
    target = dataclasses.replace(source, num_hidden_layers=3, hidden_size=30, intermediate_size=11)
    masks, selection = select(random_scores(source, seed=1), source=source, target=target)
    tensors = {"layers": masks.attention, "intermediate": masks.intermediate, "hidden": masks.hidden}
    assert (
        int(count_parameters(tensors, source=source))
        == target.num_parameters()
        == selection.shape(source).num_parameters()
    )


@pytest.mark.parametrize("uniform", [False, True])
def test_a_budget_is_kept_and_only_a_uniform_result_has_a_shape(uniform):
    budget = ParameterBudget(
        12_000, uniform=uniform, accepts=lambda shape: shape.hidden_size % shape.num_attention_heads == 0
    )
    subject = learner(target=budget, scores=random_scores(SOURCE, seed=0), **SHALLOW)
    assert float(subject.metrics(step=0)[f"expected/{CONSTRAINT}"]) == pytest.approx(12_000, rel=0.02)
    with torch.no_grad():
        subject.log_alpha["intermediate"].add_(torch.linspace(-1, 1, 4)[:, None])
    kept = subject.fix_final_masks()
    left = int(count_parameters(kept, source=SOURCE))
    assert 0.9 * 12_000 < left <= 12_000
    if uniform:
        assert subject.selection().shape(SOURCE).num_parameters() == left
    else:
        with pytest.raises(ShearingError, match="uniform"):
            subject.selection()


@pytest.mark.parametrize("multiple_of", [1, 2, 4, 6, 8])
def test_widths_of_a_budget_are_multiples_and_the_largest_that_fit(multiple_of):
    budget = ParameterBudget(12_000, uniform=True, accepts=lambda shape: True, multiple_of=multiple_of)
    subject = learner(target=budget, scores=random_scores(SOURCE, seed=0), **SHALLOW)
    left = int(count_parameters(subject.fix_final_masks(), source=SOURCE))
    shape = subject.selection().shape(SOURCE)
    assert shape.hidden_size % multiple_of == shape.intermediate_size % multiple_of == 0
    assert shape.num_parameters() == left <= 12_000
    wider = dataclasses.replace(shape, intermediate_size=shape.intermediate_size + multiple_of)
    assert wider.num_parameters() > 12_000 or wider.intermediate_size > SOURCE.intermediate_size


def test_a_multiple_that_no_width_is_of_is_refused():
    budget = ParameterBudget(12_000, uniform=True, accepts=lambda shape: True, multiple_of=1000)
    with pytest.raises(ShearingError, match="or lower multiple_of"):
        learner(target=budget, scores=random_scores(SOURCE, seed=0), **SHALLOW).fix_final_masks()


def test_an_impossible_budget_is_refused():
    budget = ParameterBudget(10, uniform=False, accepts=lambda shape: True)
    with pytest.raises(ShearingError, match=r"^parameters = "):
        learner(target=budget, scores=random_scores(SOURCE, seed=0), **MIN_MAX).fix_final_masks()


def test_a_budget_without_multipliers_is_refused():
    budget = ParameterBudget(12_000, uniform=True, accepts=lambda shape: True)
    with pytest.raises(ShearingError, match=r"^estimator = 'straight_through'\n.*hard_concrete"):
        learner(target=budget)


def test_learning_opens_the_units_that_matter():
    """Planted: the loss needs two known layers of an otherwise symmetric problem."""
    target = dataclasses.replace(SOURCE, num_hidden_layers=2)
    subject = learner(**PAPER, granularities=["layers"], target=target, duration=200)
    needed = torch.tensor([0.0, 1.0, 0.0, 1.0])
    for step in range(200):
        z = subject.sample(step=step, draw=0).attention
        (((1 - z) * needed).sum() + subject.penalty(step=step)).backward()
        subject.optimizer_step(step=step)
    assert subject.final_masks().attention.tolist() == needed.tolist()


def test_masks_learn_jointly_with_a_real_model():
    model = tiny_model("llama")
    wrapped = MaskedModel(model)
    subject = learner(scores=random_scores(SOURCE, seed=0), **SHALLOW)
    wrapped.set_masks(subject.sample(step=0, draw=0))
    (wrapped(tiny_ids()).square().mean() + subject.penalty(step=0)).backward()
    for name, value in subject.log_alpha.items():
        assert value.grad is not None, name
        assert value.grad.abs().sum() > 0, name
