"""The MLP of experts as Mixtral and those after it have it, and the sizes of a config that has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shearing.models.families.axes import EXPERTS, HIDDEN, INTERMEDIATE, Axis, Parameter, When
from shearing.models.families.experts.declaration import Experts, Spelling
from shearing.models.families.family import SubLayer, standard_sizes, standard_values
from shearing.models.families.norms import Norm


def experts_mlp(
    *,
    before: Norm,
    normalises: When,
    weights_in_fp32: bool = False,
    files: str = "mlp",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> SubLayer:
    """An MLP of experts.

    Args:
        before: norm of what it reads.
        normalises, weights_in_fp32: see `Experts`.
        files: what files call the MLP.
        gate, up, down: what files call the matrices of an expert.
    """
    expert = f"{files}.experts.{{expert}}"
    return SubLayer(
        module="mlp",
        linears=(
            Parameter("mlp.gate.weight", (EXPERTS, HIDDEN)),
            Parameter("mlp.experts.gate_up_proj", (EXPERTS, Axis(("intermediate", "intermediate")), HIDDEN)),
            Parameter("mlp.experts.down_proj", (EXPERTS, HIDDEN, INTERMEDIATE)),
        ),
        write="mlp.experts",
        before=before,
        experts=Experts(
            router="mlp.gate",
            module="mlp.experts",
            read="mlp.experts.gate_up_proj",
            write="mlp.experts.down_proj",
            normalises=normalises,
            weights_in_fp32=weights_in_fp32,
            spellings=(
                Spelling("mlp.gate.weight", (f"{files}.gate.weight",)),
                Spelling("mlp.experts.gate_up_proj", (f"{expert}.{gate}.weight", f"{expert}.{up}.weight")),
                Spelling("mlp.experts.down_proj", (f"{expert}.{down}.weight",)),
            ),
        ),
    )


def sizes_with_experts(*, units: str = "intermediate_size") -> Callable[[Any], dict[str, int]]:
    """Reads the sizes of a config whose experts have as many units as its attribute `units` says."""

    def read(config: Any) -> dict[str, int]:
        return {
            **standard_sizes(config),
            "intermediate_size": getattr(config, units),
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        }

    return read


def values_with_experts(*, units: str = "intermediate_size") -> Callable[..., dict[str, Any]]:
    """Writes a config's values at other sizes; see `sizes_with_experts`."""

    def write(values: Mapping[str, Any], *, sizes: Mapping[str, int], head_dim: int) -> dict[str, Any]:
        of_experts = {
            units: sizes["intermediate_size"],
            # One and the same attribute, under the name that the config has.
            **{name: sizes["num_experts"] for name in ("num_experts", "num_local_experts") if name in values},
        }
        others = {name: size for name, size in sizes.items() if name not in ("intermediate_size", "num_experts")}
        return {**standard_values(values, sizes=others, head_dim=head_dim), **of_experts}

    return write
