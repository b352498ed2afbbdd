"""What an importance metric is: it scores every unit of a model before anything is learned.

Metrics grade the start of mask learning and serve as baselines of the same shape.

Legend: L layers, d hidden, m intermediate, K KV groups, G query heads per group, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from shearing.data.documents import Inputs
from shearing.errors import ShearingError, key
from shearing.models.shape import Shape
from shearing.processes.processes import Processes
from shearing.pruning.calibration.shares import Share, shares_of, steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = dict[str, Tensor]
"""Granularity -> scores: layers, attention, mlp [L]; kv_groups [L, K]; query_heads [L, K, G]; intermediate [L, m]
or [L, E, m]; experts [L, E]; hidden [d]; of the units of a row the higher are kept."""

STEP_SEQUENCES = 4
"""What a step of a metric that goes in steps takes of the text, however many sequences are in a batch."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a metric may go by, beside the model.

    Attributes:
        text: all of it, tokens [B, S], on the model's device; empty for metrics that read none. The documents are those
            of rows of S + 1 tokens: whether a label of these S - 1 counts is in `documents.left_out[:, :-1]`. B
            decides what is in memory; scores do not depend on it, but for rounding.
        target: shape to reach; None where there is only a number of parameters.
        seed: of whatever is drawn.
        processes: those that score together, each on its share of the text; all have the same evidence.
    """

    text: Sequence[Inputs] = ()
    target: Shape | None = None
    seed: int = 0
    processes: Processes = field(default_factory=Processes)

    @cached_property
    def own(self) -> list[Share]:
        """What this process reads."""
        return shares_of(self.text, processes=self.processes)

    @cached_property
    def steps(self) -> list[list[Inputs]]:
        """All of the text by steps of `STEP_SEQUENCES`, each in pieces of at most B."""
        return steps_of(self.text, rows=STEP_SEQUENCES)

    @property
    def text_tokens(self) -> int:
        """Tokens of the text."""
        return sum(batch.tokens.numel() for batch in self.text)

    def require_text(self) -> None:
        """Check that there is text, on this process or another.

        Raises:
            ShearingError: there is none.
        """
        if not self.text_tokens:
            raise ShearingError(
                "calibration_tokens",
                value="no text",
                allowed="calibration text for a metric that reads some (`MetricFacts.reads_text`)",
                mend=f"give it some, as `Evidence(text=…)` or by {key('calibration_tokens')}; or choose magnitude",
            )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What choosing units takes, beside what training takes.

    Attributes:
        forward_tokens: tokens that pass forward through the whole model; of one layer of L, a 1 / L of it.
        backward_tokens: tokens whose loss is differentiated; each passes forward too, and counts there.
        other_flops: of decompositions and solves.
        kept_bytes: in host memory, of all processes together, beside the model.
    """

    forward_tokens: float = 0.0
    backward_tokens: float = 0.0
    other_flops: float = 0.0
    kept_bytes: float = 0.0


class Metric(Protocol):
    """Scores units; see `registry` for those that have a name."""

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """How often `scores` calls `advance` with 1 on this process, for a model of these sizes.

        Raises:
            ShearingError: the metric is not for models of their family; `scores` would say the same.
        """
        ...

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """What `scores` takes for a model of these sizes, for tables at equal FLOPs."""
        ...

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """Scores of all units of the granularities that its `MetricFacts` say it gives, fp32 on the CPU.

        All processes of the evidence call it, and have the same scores.

        Args:
            model: plain model, on any device, whole or with weights that come on demand; left as it is.
            evidence: what else there is to go by.
            advance: for progress, see `units_of_work`.

        Raises:
            ShearingError: there is no text, or no label in it, for a metric that reads some.
        """
        ...
