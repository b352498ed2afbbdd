"""The masks' side of a pruning step: draw, penalty, ascent and descent, freeze at exactly the target shape.

Everything here is fp32, equal on all processes, and outside the training engine: its own AdamW, one flat
all-reduce a step, noise that depends on (seed, step, micro-batch) alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shearing.models.cutting import Selection
from shearing.models.masked import Masks
from shearing.models.shape import Shape
from shearing.pruning.structured import hard_concrete
from shearing.pruning.structured.granularities import as_masks, granularities_of
from shearing.pruning.structured.importance.scores import Scores
from shearing.pruning.structured.lagrangian import Lagrangian, target_at
from shearing.pruning.structured.parameter_budget import (
    CONSTRAINT,
    ParameterBudget,
    count_parameters,
    round_to_budget,
    uniform_shape,
)
from shearing.pruning.structured.rounding import alternating, round_to_target

# Below any difference of log_alpha that learning makes.
_TIE = 1e-4


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How masks are learned; durations in steps.

    Attributes:
        total_steps: length of the stage.
        sparsity_warmup_steps: linear ramp of the target from nothing pruned to the target.
        freeze_step: first step with fixed binary masks at the target shape; the learning rates' cosine ends here.
        warmup_steps: linear warm-up of the learning rates.
        mask_learning_rate, multiplier_learning_rate: peak rates of log_alpha (descent) and multipliers (ascent).
        final_learning_rate: both rates at the freeze, share of the peak.
        quadratic_penalty: constant part of every lambda_2.
        temperature: beta of the hard concrete distribution.
        log_alpha_limit: log_alpha is kept within plus and minus this.
        warm_start_scale, warm_start_step: steepness of the importance warm start, see `grade`.
        seed: of the noise.
    """

    total_steps: int
    sparsity_warmup_steps: int
    freeze_step: int
    warmup_steps: int = 0
    mask_learning_rate: float = 1.0
    multiplier_learning_rate: float = 1.0
    final_learning_rate: float = 0.1
    quadratic_penalty: float = 0.0
    temperature: float = hard_concrete.TEMPERATURE
    log_alpha_limit: float = hard_concrete.LOG_ALPHA_LIMIT
    warm_start_scale: float = 3.0
    warm_start_step: float = 0.0
    seed: int = 0


class MaskLearner:
    """log_alpha of every granularity, their multipliers, and the optimiser of both.

    Args:
        granularities: names as in a recipe.
        source: sizes of the source model.
        target: shape to reach, or a parameter budget.
        settings: rates and durations.
        importance: scores that grade the initial log_alpha around the target; None: every unit open (the paper).
        device: where masks live.

    Raises:
        ShearingError: the target cannot be reached with these granularities.
    """

    def __init__(
        self,
        granularities: Sequence[str],
        *,
        source: Shape,
        target: Shape | ParameterBudget,
        settings: MaskSettings,
        importance: Scores | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.target, self.settings = source, target, settings
        shape = target if isinstance(target, Shape) else None
        self.granularities = granularities_of(granularities, source=source, target=shape)
        self.device = torch.device(device)
        self.frozen: dict[str, Tensor] | None = None
        self._order: dict[str, Tensor] = {}
        initial = self._open() if importance is None else self._graded(importance)
        self.log_alpha = nn.ParameterDict({name: nn.Parameter(value.float()) for name, value in initial.items()})
        rows: dict[str, tuple[int, ...]]
        if shape is None:
            rows = {CONSTRAINT: ()}
        else:
            rows = {granularity.name: granularity.size[:-1] for granularity in self.granularities}
        self.lagrangian = Lagrangian(rows, quadratic_penalty=settings.quadratic_penalty)
        self._modules = nn.ModuleList([self.log_alpha, self.lagrangian]).to(device)
        masks, multipliers = list(self.log_alpha.parameters()), list(self.lagrangian.parameters())
        groups = [
            {"params": masks, "lr": settings.mask_learning_rate},
            {"params": multipliers, "lr": settings.multiplier_learning_rate, "maximize": True},
        ]
        # Fused: the only AdamW that skips a step on the device, without asking the host.
        self.optimizer = (
            torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True) if masks else None
        )

    # -- initial masks ---------------------------------------------------------------------------------------------

    def _open(self) -> dict[str, Tensor]:
        return {g.name: torch.full(g.size, self.settings.log_alpha_limit) for g in self.granularities}

    def _graded(self, importance: Scores) -> dict[str, Tensor]:
        if isinstance(self.target, Shape):
            shares = {g.name: (g.target or 0) / g.units for g in self.granularities}
        else:
            shares = self._even_shares(self.target)
        first = {
            name: target_at(0, final=share, warmup_steps=self.settings.sparsity_warmup_steps)
            for name, share in shares.items()
        }
        scores = self._reachable(importance)
        self._order = {g.name: _ranks(scores[g.name]).float().to(self.device) / g.units for g in self.granularities}
        return {
            g.name: grade(
                scores[g.name],
                share=first[g.name],
                scale=self.settings.warm_start_scale,
                step=self.settings.warm_start_step,
                limit=self.settings.log_alpha_limit,
                temperature=self.settings.temperature,
            )
            for g in self.granularities
        }

    def _reachable(self, importance: Scores) -> Scores:
        """Scores whose best units can be kept together: sub-layers that rounding would drop come last.

        Attention and MLP sub-layers are compared by their share of their kind's total: what one of them does to
        the residual stream says little about what the other kind does.
        """
        keep = {g.name: g.target for g in self.granularities}
        attention, mlp = keep.get("attention"), keep.get("mlp")
        if attention is None or mlp is None:
            return importance
        shares = {name: importance[name] / importance[name].sum() for name in ("attention", "mlp")}
        kept_attention, kept_mlp = alternating(shares["attention"], shares["mlp"], keep=attention)
        return {**importance, "attention": shares["attention"] + kept_attention, "mlp": shares["mlp"] + kept_mlp}

    def _even_shares(self, budget: ParameterBudget) -> dict[str, float]:
        """One share for all granularities that meets the budget in expectation."""
        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            alive = {g.name: torch.full(g.size, share, dtype=torch.float64) for g in self.granularities}
            low, high = (
                (share, high) if count_parameters(alive, source=self.source) < budget.parameters else (low, share)
            )
        return {g.name: low for g in self.granularities}

    # -- masks -----------------------------------------------------------------------------------------------------

    def sample(self, *, step: int, draw: int) -> Masks:
        """Masks of one share of a step's batch: hard-concrete draws, or the fixed binary masks from `freeze_step` on.

        The draw depends on (seed, step, draw) and is the same on every process and device.
        """
        if step >= self.settings.freeze_step:
            return as_masks(self.freeze())
        generator = torch.Generator().manual_seed(_noise_seed(self.settings.seed, step, draw))
        z = {}
        for granularity in self.granularities:
            log_alpha = self.log_alpha[granularity.name]
            noise = torch.rand(granularity.size, generator=generator)
            if log_alpha.is_cuda:
                noise = noise.pin_memory()
            noise = noise.to(log_alpha.device, non_blocking=True)
            z[granularity.name] = hard_concrete.sample(log_alpha, noise=noise, temperature=self.settings.temperature)
        return as_masks(z)

    def deterministic(self) -> Masks:
        """Binary masks without noise at exactly the target shape (for a budget alone: within the budget)."""
        return as_masks(self.frozen if self.frozen is not None else self._rounded())

    def freeze(self) -> dict[str, Tensor]:
        """Fixes the masks at the target shape, once; later calls return the same masks."""
        if self.frozen is None:
            self.frozen = self._rounded()
        return self.frozen

    @torch.no_grad()
    def _rounded(self) -> dict[str, Tensor]:
        # Among units at the limit of log_alpha the order they started in decides.
        scores = {name: value - _TIE * self._order.get(name, 0.0) for name, value in self.log_alpha.items()}
        if isinstance(self.target, Shape):
            return round_to_target(scores, granularities=self.granularities)
        masks = round_to_budget(
            scores, granularities=self.granularities, source=self.source, parameters=self.target.parameters
        )
        if self.target.uniform:
            shape = uniform_shape(masks, source=self.source, budget=self.target)
            names = [g.name for g in self.granularities]
            rounded = round_to_target(scores, granularities=granularities_of(names, source=self.source, target=shape))
            # A size that came out as the source's has nothing to round: all of its units stay.
            masks = {name: rounded.get(name, torch.ones_like(value)) for name, value in scores.items()}
        return {name: mask.to(scores[name].device) for name, mask in masks.items()}

    def selection(self) -> Selection:
        """The units that the deterministic masks keep.

        Raises:
            ShearingError: the target is a budget whose result was not made uniform.
        """
        masks = self.deterministic()
        return Selection.of(masks, source=self.source, target=shape_of(masks, source=self.source))

    # -- the constraint --------------------------------------------------------------------------------------------

    def expected(self) -> dict[str, Tensor]:
        """Expected share alive of every unit, debiased; granularity -> the shape of its log_alpha."""
        return {
            name: hard_concrete.expected_alive(
                value, limit=self.settings.log_alpha_limit, temperature=self.settings.temperature
            )
            for name, value in self.log_alpha.items()
        }

    @torch.no_grad()
    def expected_parameters(self) -> float:
        """Parameters of the model that the masks leave, in expectation, embeddings included; exact once frozen."""
        alive = self.expected() if self.frozen is None else self.frozen
        if not alive:
            return float(self.source.num_parameters())
        return float(count_parameters({name: value.double() for name, value in alive.items()}, source=self.source))

    def violations(self, *, step: int) -> dict[str, Tensor]:
        """Expected share alive minus the target's share at `step`: one value a row, or one for a budget."""
        alive, warmup = self.expected(), self.settings.sparsity_warmup_steps
        if not isinstance(self.target, Shape):
            full = self.source.num_parameters()
            final = target_at(step, final=self.target.parameters / full, warmup_steps=warmup)
            return {CONSTRAINT: count_parameters(alive, source=self.source) / full - final} if alive else {}
        return {
            g.name: alive[g.name].mean(-1) - target_at(step, final=(g.target or 0) / g.units, warmup_steps=warmup)
            for g in self.granularities
        }

    def penalty(self, *, step: int) -> Tensor:
        """The Lagrangian term of a step, to be added once to the step's loss; zero once the masks are frozen."""
        if step >= self.settings.freeze_step or not self.granularities:
            return torch.zeros((), device=self.device)
        return self.lagrangian.penalty(self.violations(step=step))

    def sum_gradients(self, *, scale: float = 1.0) -> None:
        """Add up over processes what the step's micro-batches left, in one exchange; before the penalty's gradient.

        The penalty is the same on every process and counts once.

        Args:
            scale: factor that the engine put on losses, and so on these gradients.
        """
        parameters = [p for p in self.parameters() if p.grad is not None]
        if not parameters or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        torch.distributed.all_reduce(flat)
        flat /= scale
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def optimizer_step(self, *, step: int, skip: Tensor | None = None) -> None:
        """One AdamW step of masks (descent) and multipliers (ascent).

        Args:
            step: number of the step, from 0.
            skip: scalar tensor, nonzero where the step must change nothing (a non-finite loss); read on the device.
        """
        if self.optimizer is None or step >= self.settings.freeze_step:
            return
        for group, rate in zip(self.optimizer.param_groups, self._rates(step), strict=True):
            group["lr"] = rate
        optimizer: Any = self.optimizer
        optimizer.grad_scale = None
        optimizer.found_inf = None if skip is None else skip.to(torch.float32).reshape(())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            limit = self.settings.log_alpha_limit
            for value in self.log_alpha.values():
                value.clamp_(-limit, limit)

    def _rates(self, step: int) -> tuple[float, float]:
        """Learning rates of masks and multipliers."""
        s = self.settings
        warmup = min(1.0, (step + 1) / max(1, s.warmup_steps))
        progress = min(1.0, max(0, step - s.warmup_steps) / max(1, s.freeze_step - s.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        factor = warmup * (s.final_learning_rate + (1 - s.final_learning_rate) * cosine)
        return s.mask_learning_rate * factor, s.multiplier_learning_rate * factor

    # -- reporting and state ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self, *, step: int) -> dict[str, Tensor]:
        """Scalars on the device: expected and target units a row, largest violation, mean multipliers."""
        alive = self.expected()
        scalars = {f"expected/{name}": value.sum(-1).mean() for name, value in alive.items()}
        for name, violation in self.violations(step=step).items():
            value = violation.abs().max()
            scalars[f"violation/{name}"] = value
            scalars[f"lambda_1/{name}"] = self.lagrangian.lambda_1[name].mean()
            scalars[f"lambda_2/{name}"] = self.lagrangian.lambda_2[name].mean()
        for name, units in self.targets(step=step).items():
            scalars[f"target/{name}"] = torch.tensor(units)
        if not isinstance(self.target, Shape) and alive:
            scalars[f"expected/{CONSTRAINT}"] = count_parameters(alive, source=self.source)
        return {name: value.detach() for name, value in scalars.items()}

    def targets(self, *, step: int) -> dict[str, float]:
        """Units a row that the constraint asks for at `step`; parameters for a budget."""
        warmup = self.settings.sparsity_warmup_steps
        if not isinstance(self.target, Shape):
            full = self.source.num_parameters()
            return {CONSTRAINT: full * target_at(step, final=self.target.parameters / full, warmup_steps=warmup)}
        return {
            g.name: g.units * target_at(step, final=(g.target or 0) / g.units, warmup_steps=warmup)
            for g in self.granularities
        }

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """What was learned, on the host: expected against target sizes, and the rounding gap.

        The rounding gap of a granularity is the number of units that rounding to the target flips against the
        mask's own decision (its median draw above one half).
        """
        rounded = self.frozen if self.frozen is not None else self._rounded()
        alive = self.expected()
        targets = self.targets(step=self.settings.total_steps)
        result: dict[str, Any] = {}
        for g in self.granularities:
            own = hard_concrete.is_open(self.log_alpha[g.name])
            flipped = int((own != (rounded[g.name] > 0)).sum())
            result[g.name] = {
                "units": g.units,
                "expected": float(alive[g.name].sum(-1).mean()),
                "target": targets.get(g.name, float(rounded[g.name].sum(-1).mean())),
                "kept": float(rounded[g.name].sum(-1).mean()),
                "largest_violation": float((alive[g.name].mean(-1) - rounded[g.name].mean(-1)).abs().max()),
                "rounding_gap": flipped,
                "total_units": own.numel(),
            }
        return result

    def parameters(self) -> list[nn.Parameter]:
        """log_alpha of every granularity, then the multipliers."""
        return list(self._modules.parameters())

    def state_dict(self) -> dict[str, Any]:
        """log_alpha, multipliers, the optimiser's moments and the frozen masks."""
        return {
            "log_alpha": {name: value.detach() for name, value in self.log_alpha.items()},
            "lagrangian": self.lagrangian.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "frozen": self.frozen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, bit for bit."""
        with torch.no_grad():
            for name, value in self.log_alpha.items():
                value.copy_(state["log_alpha"][name])
        self.lagrangian.load_state_dict(state["lagrangian"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        frozen = state["frozen"]
        self.frozen = frozen and {name: mask.to(self.log_alpha[name].device) for name, mask in frozen.items()}


def grade(
    scores: Tensor,
    *,
    share: float,
    scale: float,
    step: float = 0.0,
    limit: float = hard_concrete.LOG_ALPHA_LIMIT,
    temperature: float = hard_concrete.TEMPERATURE,
) -> Tensor:
    """log_alpha graded by rank, rows shifted so that the expected share alive is `share`.

    From one unit of a row to the next best it falls by `2 * scale / n`, and by no less than `step`, all within the
    limit. So `scale` says what share of a row starts in doubt, and `step` how many units at most.

    Args:
        scores: [..., n], higher is more important.
        share: expected share alive in each row.
        scale: half of the spread of a row.
        step: least distance of neighbours in rank.
        limit: log_alpha is kept within plus and minus this.
        temperature: beta.

    Returns:
        [..., n] log_alpha.
    """
    units = scores.shape[-1]
    scale = max(scale, step * units / 2)
    spread = scale * (1 - 2 * (_ranks(scores) + 0.5) / units)
    low = torch.full(scores.shape[:-1], -limit - scale, dtype=torch.float64)
    high = -low
    # All saturated would lose the order; 3 % is what the ramp takes back in its first steps.
    share = min(share, 0.97)
    for _ in range(60):
        shift = (low + high) / 2
        log_alpha = (spread + shift[..., None]).clamp(-limit, limit)
        alive = hard_concrete.expected_alive(log_alpha, limit=limit, temperature=temperature)
        too_low = alive.mean(-1) < share
        low, high = torch.where(too_low, shift, low), torch.where(too_low, high, shift)
    return (spread + ((low + high) / 2)[..., None]).clamp(-limit, limit).float()


def _ranks(scores: Tensor) -> Tensor:
    """Rank of each unit in its row from 0, the best, in double precision; ties to the lower index."""
    order = torch.argsort(scores.float(), dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1).double()


def shape_of(masks: Masks, *, source: Shape) -> Shape:
    """Shape that binary masks leave of `source`, read from the first layer that is kept.

    Whether all layers have that shape is for `Selection.of` to check.
    """

    def kept(mask: Tensor | None, full: int) -> int:
        return full if mask is None else int((mask != 0).sum())

    def first(mask: Tensor | None) -> int:
        return 0 if mask is None else int((mask != 0).nonzero()[0])

    attention, mlp = first(masks.attention), first(masks.mlp)
    alive_groups = None if masks.kv_groups is None else masks.kv_groups[attention] != 0
    groups = kept(alive_groups, source.num_key_value_heads)
    first_group = first(alive_groups)
    heads = None if masks.query_heads is None else masks.query_heads[attention][first_group]
    return dataclasses.replace(
        source,
        num_hidden_layers=kept(masks.attention, source.num_hidden_layers),
        hidden_size=kept(masks.hidden, source.hidden_size),
        intermediate_size=kept(
            None if masks.intermediate is None else masks.intermediate[mlp], source.intermediate_size
        ),
        num_attention_heads=groups * kept(heads, source.query_heads_per_group),
        num_key_value_heads=groups,
    )


def _noise_seed(seed: int, step: int, draw: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
