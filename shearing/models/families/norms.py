"""Norms by kind: what a norm computes, over which axis, and under which names its module keeps what it needs."""

from __future__ import annotations

from dataclasses import dataclass

from shearing.models.families.axes import HEAD, HIDDEN, Axis, Parameter, When, always


@dataclass(frozen=True)
class NormKind:
    """gain * x / sqrt(mean(x²) + epsilon) + bias, with gain = `offset` + weight, in fp32.

    Attributes:
        epsilon: the module's attribute that holds epsilon.
        offset: what is added to the weight.
        centred: the mean of x is taken from it first.
        gain_in_fp32: the gain is applied before the result gets the dtype of x again, not after.
    """

    epsilon: str
    offset: float = 0.0
    centred: bool = False
    gain_in_fp32: bool = False


RMS = NormKind(epsilon="variance_epsilon")
RMS_WHOLE_FP32 = NormKind(epsilon="variance_epsilon", gain_in_fp32=True)
RMS_ONE_PLUS = NormKind(epsilon="eps", offset=1.0, gain_in_fp32=True)
LAYER = NormKind(epsilon="eps", centred=True, gain_in_fp32=True)


@dataclass(frozen=True)
class Norm:
    """A norm of a family.

    Attributes:
        name: of its module in the layer, or in the model for the last norm.
        kind: what it computes.
        over: the axis it runs along.
        by_head: every head of `over` is normalised for itself, with one weight for all of them.
        bias: whether it has one.
        when: which configs have the norm.
    """

    name: str
    kind: NormKind = RMS
    over: Axis = HIDDEN
    by_head: bool = False
    bias: bool = False
    when: When = always

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its weight, and its bias if it has one."""
        axes = (HEAD if self.by_head else self.over,)
        weight, bias = (Parameter(f"{self.name}.{part}", axes) for part in ("weight", "bias"))
        return (weight, bias) if self.bias else (weight,)
