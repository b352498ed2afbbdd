"""The hard concrete distribution (Louizos et al. 2018; Sheared LLaMA, appendix A), one function an equation.

Legend: `log_alpha` may have any shape; everything here is elementwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA, ZETA = -0.1, 1.1
"""The interval that the concrete variable is stretched to before it is clamped to [0, 1]."""

TEMPERATURE = 2 / 3
"""Beta: 2/3 in the released code, 0.83 in the paper's appendix."""

LOG_ALPHA_LIMIT = math.log(100.0)
"""The released code keeps log_alpha within ± this bound, so that a unit given up can still come back.

There a draw is below 1 with probability 4.7 % for a unit as open as it can get, and above 0 as often for a closed one.
"""

NOISE_EPSILON = 1e-6


def sample(log_alpha: Tensor, *, noise: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """A draw z in [0, 1]: s = sigmoid((log u - log(1 - u) + log_alpha) / beta), z = clamp(s (zeta - gamma) + gamma).

    Args:
        log_alpha: location of the distribution.
        noise: u in (0, 1), same shape.
        temperature: beta.

    Returns:
        z, differentiable in `log_alpha` where it is not clamped.
    """
    noise = noise.clamp(NOISE_EPSILON, 1 - NOISE_EPSILON)
    s = torch.sigmoid((torch.logit(noise) + log_alpha) / temperature)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def probability_alive(log_alpha: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """P(z != 0) = sigmoid(log_alpha - beta log(-gamma / zeta))."""
    return torch.sigmoid(log_alpha - temperature * math.log(-GAMMA / ZETA))


def expected_alive(log_alpha: Tensor, *, limit: float = LOG_ALPHA_LIMIT, temperature: float = TEMPERATURE) -> Tensor:
    """P(z != 0) stretched so that it is exactly 0 and 1 at the two ends of log_alpha's range, -limit and limit.

    Without the stretch a unit that is as closed as it can get still counts as partly alive (4.7 % at ln 100), and a
    constraint on the sum is met at the wrong size. With it, a saturated mask at the target shape has violation
    exactly 0.
    """
    end = log_alpha.new_tensor(limit)
    lowest = probability_alive(-end, temperature=temperature)
    highest = probability_alive(end, temperature=temperature)
    return ((probability_alive(log_alpha, temperature=temperature) - lowest) / (highest - lowest)).clamp(0.0, 1.0)


def is_open(log_alpha: Tensor) -> Tensor:
    """Whether the mask itself, without noise and without a target, keeps a unit: its median draw is above one half."""
    return log_alpha > 0
