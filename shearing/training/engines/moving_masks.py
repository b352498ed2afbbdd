"""N:M masks that are chosen anew while weights are trained (AST, arXiv 2407.20584): what they drop lives on beside.

A forward pass sees W ⊙ M, and its gradients go straight through to all of W. So between two steps the memory that the
optimiser updates holds W ⊙ M, and what was dropped is set aside; for the length of the optimiser's step it is back in
its place, takes its step with all others, and shrinks towards 0 behind it. Every few steps each N:M group keeps those
of its weights that are largest by then. In the last stretch masks stay, and what they drop is 0.

It acts on the memory that an engine holds (fp32 master weights under ZeRO), whatever piece of a matrix that is. What is
set aside is in checkpoints, and is NaN where a weight is kept: so it is the mask, too.

Shapes: n elements of a flattened matrix that a process holds, G groups of M, C groups that processes share, W the
longest M of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shearing.models.stored.paging.places import Place
from shearing.processes.processes import Processes
from shearing.training.checkpoints.pieces import SET_ASIDE, WEIGHT, Piece
from shearing.training.engines.kept_zeros import require_shape, require_zero


@dataclass(frozen=True, kw_only=True)
class MovingSchedule:
    """When masks move, in optimiser steps.

    Attributes:
        interval: between two choices.
        decay: share by which what is dropped shrinks in a step, once it is at its height.
        ramp_steps: in which it rises there from 0.
        freeze_step: from this step on masks stay, and what they drop is 0.
    """

    interval: int
    decay: float
    ramp_steps: int
    freeze_step: int

    def decay_at(self, step: int) -> float:
        """Of a step, the `step`-th."""
        return self.decay * min(1.0, step / max(1, self.ramp_steps))


@dataclass(frozen=True, kw_only=True)
class MovingMatrix:
    """A matrix whose mask moves.

    Attributes:
        name: the engine's name of the parameter.
        mask: bool [O, I] to begin with, True where kept.
        kept, of: N and M of its groups.
        scale: factors [I] of the magnitudes that are compared, or None.
        dropped: where a matrix [O, I] is stored that has what is dropped to begin with; None: the parameter itself has.
    """

    name: str
    mask: Tensor
    kept: int
    of: int
    scale: Tensor | None = None
    dropped: Place | None = None


@dataclass(frozen=True)
class _Held:
    """What this process holds of a matrix; `aside` has what is dropped, NaN where a weight is kept.

    `shared` are the elements at either end whose group another process has a part of: their place among all such, and
    inside their group.
    """

    matrix: MovingMatrix
    start: int
    weight: Tensor
    aside: Tensor
    whole: slice
    shared: Tensor | None = None
    places: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        return self.aside.isnan()

    def scores(self) -> Tensor:
        """What is compared, [n]; of weights that are in their places."""
        magnitudes, scale = self.weight.abs(), self.matrix.scale
        if scale is None:
            return magnitudes
        positions = torch.arange(self.start, self.start + len(magnitudes), device=scale.device)
        return magnitudes * scale[positions % len(scale)]


class MovingMasks:
    """Masks of an engine's parameters that move with training.

    Args:
        matrices: gives them, one after the other; asked for once.
        schedule: when they move.
        processes: those that share the weights.
    """

    def __init__(
        self, matrices: Callable[[], Iterable[MovingMatrix]], *, schedule: MovingSchedule, processes: Processes
    ) -> None:
        self.schedule = schedule
        self._matrices, self._processes = matrices, processes
        self._held: dict[str, _Held] = {}
        self._cut: list[tuple[str, int]] = []
        self._sizes: dict[str, tuple[int, int]] = {}
        self._settled = False
        self._publish: Callable[[], object] = _nothing

    # -- for engines -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take(
        self,
        pieces: Iterable[Piece],
        *,
        shapes: Mapping[str, tuple[int, ...]],
        optimizer: torch.optim.Optimizer,
        publish: Callable[[], object] | None = None,
    ) -> None:
        """Take charge of what a process holds; all processes call it together.

        Args:
            pieces: what this process holds of the parameters; their weights are changed in place.
            shapes: of all parameters of the model.
            optimizer: its steps see whole weights.
            publish: brings weights to where forward passes read them; None: they read them here.

        Raises:
            ShearingError: a mask is of no parameter, or of another shape; what is dropped is not finite.
        """
        held = {piece.name: piece for piece in pieces}
        for matrix in self._matrices():
            require_shape(matrix.name, mask=matrix.mask, shapes=shapes)
            self._sizes[matrix.name] = (matrix.kept, matrix.of)
            if (piece := held.get(matrix.name)) is not None and piece.numel:
                self._held[matrix.name] = _taken(matrix, piece)
        self._share_out()
        self._publish = publish or _nothing
        optimizer.register_step_pre_hook(self._bring_back)
        optimizer.register_step_post_hook(self._set_aside)
        self._publish()

    def joined(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Pieces with what is set aside of them, as checkpoints have it."""
        for piece in pieces:
            if (held := self._held.get(piece.name)) is None:
                yield piece
                continue
            first = piece.start - held.start
            aside = held.aside[first : first + piece.numel]
            yield replace(piece, values={**piece.values, SET_ASIDE: aside})

    def require(self) -> None:
        """Check that all that is dropped is 0 where forward passes read it; waits for the device.

        Raises:
            ShearingError: some is not; training with it must not be saved.
        """
        require_zero({name: (held.weight, ~held.kept) for name, held in self._held.items()})

    def close(self) -> None:
        """Let go of all weights."""
        self._held, self._publish = {}, _nothing

    # -- for the loop ----------------------------------------------------------------------------------------------

    def begin(self, *, step: int) -> None:
        """Training starts or continues after so many steps."""
        if step >= self.schedule.freeze_step:
            self._settle()

    @torch.no_grad()
    def after_step(self, *, step: int, skipped: Tensor) -> Tensor | None:
        """Shrink what is dropped, and choose anew where it is time; all processes call it together.

        Args:
            step: optimiser steps done.
            skipped: boolean scalar on the device: whether this one changed nothing.

        Returns:
            Where masks were chosen, of how many weights of this process, and how many of them came or went: on the
            device, [changed, all].
        """
        if self._settled:
            return None
        factor = 1.0 - self.schedule.decay_at(step) * (~skipped).float()
        for held in self._held.values():
            held.aside.mul_(factor.to(held.aside.device))
        last = step >= self.schedule.freeze_step
        changed = self._choose(skipped.device) if last or step % self.schedule.interval == 0 else None
        if last:
            self._settle()
        return changed

    # -- inside ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _bring_back(self, *_: object) -> None:
        for held in self._held.values():
            held.weight.copy_(torch.where(held.kept, held.weight, held.aside))

    @torch.no_grad()
    def _set_aside(self, *_: object) -> None:
        for held in self._held.values():
            kept = held.kept
            if not self._settled:
                held.aside.copy_(torch.where(kept, held.aside, held.weight))
            held.weight.masked_fill_(~kept, 0.0)

    @torch.no_grad()
    def _settle(self) -> None:
        for held in self._held.values():
            held.aside.copy_(torch.where(held.kept, held.aside, torch.zeros_like(held.aside)))
        self._settled = True

    def _choose(self, device: torch.device) -> Tensor:
        self._bring_back()
        of_shared = self._choose_shared(device)
        changed = torch.zeros(2, dtype=torch.float64, device=device)
        for held in self._held.values():
            kept, matrix = torch.empty_like(held.aside, dtype=torch.bool), held.matrix
            groups = held.scores()[held.whole].view(-1, matrix.of)
            kept[held.whole] = keep_highest(groups, kept=matrix.kept).flatten()
            if held.shared is not None and held.places is not None:
                kept[held.shared] = of_shared[held.places[:, 0], held.places[:, 1]].to(kept.device)
            changed[0] += (kept != held.kept).sum().to(device)
            changed[1] += kept.numel()
            held.aside.copy_(held.weight).masked_fill_(kept, float("nan"))
            held.weight.masked_fill_(~kept, 0.0)
        self._publish()
        return changed

    def _choose_shared(self, device: torch.device) -> Tensor:
        """Bool [C, W]: what is kept of the groups that processes share; one exchange, where there are any."""
        if not self._cut:
            return torch.empty(0)
        widest = max(of for _, of in self._sizes.values())
        scores_CW = torch.zeros(len(self._cut), widest, device=device)
        for held in self._held.values():
            if held.shared is not None and held.places is not None:
                scores_CW[held.places[:, 0], held.places[:, 1]] = held.scores()[held.shared].to(device)
        self._processes.sum(scores_CW)
        kept_CW = torch.zeros_like(scores_CW, dtype=torch.bool)
        for row, (name, _) in enumerate(self._cut):
            kept, of = self._sizes[name]
            kept_CW[row, :of] = keep_highest(scores_CW[row : row + 1, :of], kept=kept)[0]
        return kept_CW

    def _share_out(self) -> None:
        """Agree on the groups that lie across processes."""
        own = [(name, group) for name, held in self._held.items() for group in _cut_groups(held)]
        self._cut = sorted({each for of_process in self._processes.gather(own) for each in of_process})
        rows = {each: row for row, each in enumerate(self._cut)}
        for name, held in self._held.items():
            size, of = held.aside.numel(), held.matrix.of
            shared = torch.cat([torch.arange(held.whole.start), torch.arange(held.whole.stop, size)])
            if len(shared):
                positions = shared + held.start
                of_rows = torch.tensor([rows[name, group] for group in (positions // of).tolist()])
                places = torch.stack([of_rows, positions % of], 1)
                self._held[name] = replace(held, shared=shared.to(held.aside.device), places=places)


def _nothing() -> None:
    pass


def _taken(matrix: MovingMatrix, piece: Piece) -> _Held:
    weight = piece.values[WEIGHT]
    kept = matrix.mask.reshape(-1)[piece.start : piece.start + piece.numel].to(weight.device)
    before, stored = weight, matrix.dropped
    if stored is not None:
        before = stored.read(device=weight.device, start=piece.start, numel=piece.numel, dtype=weight.dtype)
    aside = before.masked_fill(kept, float("nan"))
    weight.masked_fill_(~kept, 0.0)
    first = min(-piece.start % matrix.of, piece.numel)
    whole = slice(first, first + (piece.numel - first) // matrix.of * matrix.of)
    scale = None if matrix.scale is None else matrix.scale.to(weight.device, torch.float32)
    # The mask itself is in `aside` from now on.
    lean = replace(matrix, mask=torch.empty(0, dtype=torch.bool), scale=scale)
    return _Held(lean, piece.start, weight, aside, whole)


def _cut_groups(held: _Held) -> set[int]:
    of, size = held.matrix.of, held.aside.numel()
    ends = [*range(held.whole.start), *range(held.whole.stop, size)]
    return {(held.start + each) // of for each in ends}


def keep_highest(scores_GM: Tensor, *, kept: int) -> Tensor:
    """Bool [G, M]: the `kept` highest of each group, the first of equals."""
    order_GM = scores_GM.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores_GM, dtype=torch.bool).scatter_(-1, order_GM[:, :kept], value=True)
