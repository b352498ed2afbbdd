"""Hard-concrete masks in a min-max game with the constraint's multipliers (Sheared LLaMA, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from shearing.pruning.structured import hard_concrete
from shearing.pruning.structured.constraint import Constraint, Lagrangian
from shearing.pruning.structured.estimators.counter_noise import noise_key, uniform
from shearing.pruning.structured.estimators.estimator import Estimator
from shearing.pruning.structured.mask_settings import MaskSettings


class MinMax(Estimator):
    """Draws of the hard concrete distribution; AdamW lets masks descend and multipliers ascend."""

    @override
    def __init__(
        self,
        log_alpha: Mapping[str, nn.Parameter],
        *,
        constraint: Constraint,
        settings: MaskSettings,
        places: Callable[[int], dict[str, Tensor]],
    ) -> None:
        super().__init__(log_alpha, constraint=constraint, settings=settings, places=places)
        self.lagrangian = Lagrangian(constraint.rows, quadratic_penalty=settings.quadratic_penalty)
        self.multipliers = self.lagrangian
        masks, multipliers = list(log_alpha.values()), list(self.lagrangian.parameters())
        groups = [
            {"params": masks, "lr": settings.mask_rate},
            {"params": multipliers, "lr": settings.multiplier_learning_rate, "maximize": True},
        ]
        # Fused: the only AdamW that skips a step on the device, without asking the host.
        self.optimizer = (
            torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True) if masks else None
        )

    @override
    def masks(self, *, step: int, draw: int) -> dict[str, Tensor]:
        """Draws whose noise depends on (seed, step, draw) alone and is the same on every process and device."""
        if not self._log_alpha:
            return {}
        sizes = [log_alpha.numel() for log_alpha in self._log_alpha.values()]
        device = next(iter(self._log_alpha.values())).device
        noise = uniform(sum(sizes), key=noise_key(self._settings.seed, step, draw), device=device).split(sizes)
        temperature = self._settings.temperature
        return {
            name: hard_concrete.sample(log_alpha, noise=own.view_as(log_alpha), temperature=temperature)
            for (name, log_alpha), own in zip(self._log_alpha.items(), noise, strict=True)
        }

    @override
    def alive(self, *, step: int) -> dict[str, Tensor]:
        """Debiased, see `hard_concrete.expected_alive`; the same at every step."""
        limit, temperature = self._settings.log_alpha_limit, self._settings.temperature
        return {
            name: hard_concrete.expected_alive(value, limit=limit, temperature=temperature)
            for name, value in self._log_alpha.items()
        }

    @override
    def is_open(self, *, step: int) -> dict[str, Tensor]:
        """Those whose median draw is above one half."""
        return {name: hard_concrete.is_open(value) for name, value in self._log_alpha.items()}

    @override
    def penalty(self, *, step: int) -> Tensor:
        """The Lagrangian term."""
        return self.lagrangian.penalty(self._constraint.violations(self.alive(step=step), step=step))

    @override
    def update(self, *, step: int, skip: Tensor | None) -> None:
        """See `Estimator.update`."""
        if self.optimizer is None:
            return
        factor, settings = self._settings.rate_factor(step), self._settings
        for group, rate in zip(
            self.optimizer.param_groups, (settings.mask_rate, settings.multiplier_learning_rate), strict=True
        ):
            group["lr"] = rate * factor
        optimizer: Any = self.optimizer
        optimizer.grad_scale = None
        optimizer.found_inf = None if skip is None else skip.to(torch.float32).reshape(())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for value in self._log_alpha.values():
                value.clamp_(-settings.log_alpha_limit, settings.log_alpha_limit)

    @override
    def metrics(self) -> dict[str, Tensor]:
        """Mean multipliers."""
        return {
            f"{kind}/{name}": value.mean()
            for kind, values in (("lambda_1", self.lagrangian.lambda_1), ("lambda_2", self.lagrangian.lambda_2))
            for name, value in values.items()
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """Multipliers and the optimiser's moments."""
        return {
            "lagrangian": self.lagrangian.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Estimator.load_state_dict`."""
        self.lagrangian.load_state_dict(state["lagrangian"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
