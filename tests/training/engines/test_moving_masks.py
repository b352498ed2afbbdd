"""Masks that move (AST) against a loop written out: W dense, forward with W ⊙ M, AdamW on all of W, decay, choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.files.tensors import read_header, write_tensors
from shearing.models.stored.paging.places import Place
from shearing.processes.processes import Processes
from shearing.training.checkpoints.fingerprints import Fingerprints
from shearing.training.checkpoints.pieces import SET_ASIDE, WEIGHT, ShardedState
from shearing.training.engines.moving_masks import MovingMasks, MovingMatrix, MovingSchedule, keep_highest
from shearing.training.engines.torch_engine import TorchEngine
from tests.training.engines.test_kept_zeros import OPTIMIZATION

CPU = torch.device("cpu")
STEPS, ACCUMULATION = 7, 2
SCHEDULE = MovingSchedule(interval=2, decay=0.3, ramp_steps=3, freeze_step=6)


def small_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))


def half_of_four(weight: Tensor) -> Tensor:
    """Some mask of 2:4."""
    return keep_highest(torch.rand(weight.numel() // 4, 4, generator=torch.Generator().manual_seed(2)), kept=2).view(
        weight.shape
    )


def micro_batches(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(3, 8, generator=generator) for _ in range(ACCUMULATION)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    target = x[:, :2] * 2 - x[:, 2:4]
    return (model(x) - target).square().sum()


def moving(
    mask: Tensor,
    *,
    schedule: MovingSchedule = SCHEDULE,
    scale: Tensor | None = None,
    dropped: Place | None = None,
) -> MovingMasks:
    matrix = MovingMatrix(name="0.weight", mask=mask, kept=2, of=4, scale=scale, dropped=dropped)
    return MovingMasks(lambda: [matrix], schedule=schedule, processes=Processes())


def trained(
    make: Callable[[], MovingMasks], *, folder: Path | None = None, resume_after: int | None = None
) -> nn.Module:
    first = 0
    saved: Fingerprints = {}
    for last in [STEPS] if resume_after is None else [resume_after, STEPS]:
        model = small_model()
        engine = TorchEngine(OPTIMIZATION, device=CPU, precision=torch.float32)
        engine.prepare(model)
        masks = make()
        engine.move_masks(masks)
        if first:
            assert folder is not None
            engine.load(folder / str(first), saved=saved)
        masks.begin(step=first)
        for step in range(first, last):
            batches = micro_batches(step)
            for index, x in enumerate(batches):
                engine.backward(loss_of(model, x), last=index + 1 == len(batches))
            skipped = engine.step(step=step)
            masks.after_step(step=step + 1, skipped=skipped)
        if folder is not None:
            (folder / str(last)).mkdir(parents=True)
            saved = engine.stage().write_into(folder / str(last))
        first = last
    return model


def oracle(mask: Tensor, *, scale: Tensor | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, dense first matrix and its mask after all steps, from the paper's description and ours of the end."""
    model = small_model()
    first: nn.Linear = model[0]  # type: ignore[assignment]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    settings = {"betas": OPTIMIZATION.betas, "eps": OPTIMIZATION.epsilon}
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZATION.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        **settings,  # type: ignore[arg-type]
    )
    settled = False
    for step in range(STEPS):
        optimizer.zero_grad()
        dense = first.weight.detach().clone()
        with torch.no_grad():
            first.weight.mul_(mask)
        for x in micro_batches(step):
            loss_of(model, x).backward()
        with torch.no_grad():
            first.weight.copy_(dense)
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZATION.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZATION.rates.at(step)
        optimizer.step()
        with torch.no_grad():
            done = step + 1
            if settled:
                first.weight.mul_(mask)
                continue
            decay = SCHEDULE.decay * min(1.0, done / SCHEDULE.ramp_steps)
            first.weight.sub_(decay * first.weight * ~mask)
            if done % SCHEDULE.interval == 0 or done == SCHEDULE.freeze_step:
                score = first.weight.abs() * (1.0 if scale is None else scale)
                kept = torch.zeros_like(mask).view(-1, 4)
                for row, group_scores in zip(kept, score.view(-1, 4).tolist(), strict=True):
                    for index in sorted(range(4), key=lambda i: -group_scores[i])[:2]:
                        row[index] = True
                mask = kept.view(mask.shape)
            if done == SCHEDULE.freeze_step:
                first.weight.mul_(mask)
                settled = True
    dense = first.weight.detach().clone()
    with torch.no_grad():
        first.weight.mul_(mask)
    return model, dense, mask


@pytest.mark.parametrize("scaled", [False, True])
def test_training_is_that_of_the_description(scaled: bool) -> None:
    mask = half_of_four(small_model()[0].weight)  # type: ignore[arg-type]
    scale = torch.rand(8) + 0.1 if scaled else None
    expected, _, last = oracle(mask, scale=scale)
    found = trained(lambda: moving(mask, scale=scale))
    for mine, reference in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)
    weight: Tensor = found[0].weight  # type: ignore[index, assignment]
    assert torch.equal(weight != 0, last)
    assert not torch.equal(last, mask), "no mask has moved"


@pytest.mark.parametrize("resume_after", [1, 2, 3, 6])
def test_a_continued_run_is_the_uninterrupted_one_to_the_bit(resume_after: int, tmp_path: Path) -> None:
    mask = half_of_four(small_model()[0].weight)  # type: ignore[arg-type]
    whole = trained(lambda: moving(mask), folder=tmp_path / "whole")
    found = trained(lambda: moving(mask), folder=tmp_path / "parts", resume_after=resume_after)
    for mine, reference in zip(found.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, reference)
    states = [ShardedState(tmp_path / part / str(STEPS)) for part in ("whole", "parts")]
    asides = [dict(state.whole(SET_ASIDE))["0.weight"] for state in states]
    assert torch.equal(asides[0].isnan(), asides[1].isnan())
    assert torch.equal(asides[0].nan_to_num(), asides[1].nan_to_num())
    assert not asides[0].nan_to_num().any(), "what is dropped in the end is 0"
    between = ShardedState(tmp_path / "parts" / str(resume_after))
    weight, aside = (dict(between.whole(kind))["0.weight"] for kind in (WEIGHT, SET_ASIDE))
    assert torch.equal(weight == 0, ~aside.isnan())
    assert bool(aside.nan_to_num().any()) == (resume_after < SCHEDULE.freeze_step)


@torch.no_grad()
def test_what_is_dropped_comes_back_from_files(tmp_path: Path) -> None:
    """Of the sparse model alone in memory the same is made as of the dense one."""
    dense: Tensor = small_model()[0].weight  # type: ignore[assignment]
    mask = half_of_four(dense)
    write_tensors(tmp_path / "dense.safetensors", {"it": dense.detach()})
    stored = Place("it", ((tmp_path / "dense.safetensors", read_header(tmp_path / "dense.safetensors")[0]["it"]),), "")
    begun = []
    for source, dropped in ((dense, None), (dense * mask, stored)):
        model = small_model()
        model[0].weight.copy_(source)  # type: ignore[operator]
        engine = TorchEngine(OPTIMIZATION, device=CPU, precision=torch.float32)
        engine.prepare(model)
        masks = moving(mask, dropped=dropped)
        engine.move_masks(masks)
        (piece,) = masks.joined(piece for piece in engine._wholes() if piece.name == "0.weight")
        begun.append(piece.values)
    of_dense, of_sparse = begun
    assert torch.equal(of_sparse[WEIGHT], of_dense[WEIGHT])
    assert torch.equal(of_sparse[SET_ASIDE].isnan(), mask.flatten())
    assert torch.equal(of_sparse[SET_ASIDE].nan_to_num(), (dense * ~mask).flatten())
    assert torch.equal(of_sparse[SET_ASIDE].nan_to_num(), of_dense[SET_ASIDE].nan_to_num())


def test_masks_that_never_move_are_kept_zeros(tmp_path: Path) -> None:
    mask = half_of_four(small_model()[0].weight)  # type: ignore[arg-type]
    still = MovingSchedule(interval=2, decay=0.0, ramp_steps=0, freeze_step=0)
    found = trained(lambda: moving(mask, schedule=still), folder=tmp_path)
    model = small_model()
    engine = TorchEngine(OPTIMIZATION, device=CPU, precision=torch.float32)
    engine.prepare(model)
    engine.keep_zeros([("0.weight", mask)])
    for step in range(STEPS):
        batches = micro_batches(step)
        for index, x in enumerate(batches):
            engine.backward(loss_of(model, x), last=index + 1 == len(batches))
        engine.step(step=step)
    for mine, reference in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, reference)


def test_a_skipped_step_changes_nothing() -> None:
    model = small_model()
    mask = half_of_four(model[0].weight)  # type: ignore[arg-type]
    masks = moving(mask, schedule=MovingSchedule(interval=9, decay=0.5, ramp_steps=0, freeze_step=99))
    engine = TorchEngine(OPTIMIZATION, device=CPU, precision=torch.float32)
    engine.prepare(model)
    engine.move_masks(masks)
    piece = next(iter(masks.joined(piece for piece in engine._wholes() if piece.name == "0.weight")))
    before = {kind: value.clone() for kind, value in piece.values.items()}
    engine.backward(loss_of(model, micro_batches(0)[0]) * float("inf"), last=True)
    skipped = engine.step(step=0)
    masks.after_step(step=1, skipped=skipped)
    assert skipped
    for kind, value in before.items():
        assert torch.equal(piece.values[kind].nan_to_num(7.0), value.nan_to_num(7.0)), kind


def test_the_first_of_equals_is_kept() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 2.0]])
    assert keep_highest(scores, kept=2).tolist() == [[True, True, False, False], [False, True, True, False]]


def test_a_weight_that_came_back_is_never_saved(tmp_path: Path) -> None:
    model = small_model()
    masks = moving(half_of_four(model[0].weight))  # type: ignore[arg-type]
    engine = TorchEngine(OPTIMIZATION, device=CPU, precision=torch.float32)
    engine.prepare(model)
    engine.move_masks(masks)
    with torch.no_grad():
        model[0].weight.fill_(1e-30)  # type: ignore[operator]
    with pytest.raises(ShearingError, match="dropped weights are not 0"):
        engine.stage().write_into(tmp_path)
    other = MovingMasks(
        lambda: [MovingMatrix(name="absent", mask=torch.ones(2, 4, dtype=torch.bool), kept=2, of=4)],
        schedule=SCHEDULE,
        processes=Processes(),
    )
    with pytest.raises(ShearingError, match="own parameters"):
        engine.move_masks(other)
