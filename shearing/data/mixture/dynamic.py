"""One update of the domain weights, whole: the reference first, then the rule. A pure function, state in, state out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shearing.data.mixture.online import MAXIMUM_OBSERVATIONS, Observation, predict_end
from shearing.data.mixture.rules.rule import Rule
from shearing.data.mixture.rules.update import update_weights

State = dict[str, Any]
"""What a checkpoint keeps. JSON-able.

`memory`: what the rule remembers of losses; or `excess`: of losses above a reference of the same text.
`observations`: for an online reference.
"""


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """What an update gives.

    Attributes:
        weights: new domain weights.
        reference: losses that they were compared with, in nats.
        state: for the next update.
    """

    weights: dict[str, float]
    reference: dict[str, float]
    state: State


@dataclass(frozen=True, kw_only=True)
class DynamicMixture:
    """How domain weights follow losses in one stage.

    Attributes:
        rule: turns losses into weights.
        reference: loss of each domain that is aimed at, in nats; with `online`, until there is a prediction. Empty
            where every update brings its own.
        parameters: size of the model at the end of the stage, embeddings included.
        tokens: of the whole stage.
        online: whether the reference is predicted from the losses of the stage itself.
        state: that the stage begins with.
    """

    rule: Rule
    reference: Mapping[str, float]
    parameters: int
    tokens: int
    online: bool
    state: State

    def update(
        self,
        weights: Mapping[str, float],
        *,
        losses: Mapping[str, float],
        reference: Mapping[str, float] | None = None,
        parameters: float,
        tokens: int,
        state: State,
    ) -> WeightUpdate:
        """New weights from losses.

        Args:
            weights: current weights.
            losses: loss of each domain now, in nats.
            reference: of the same text; None: that of all updates. What the rule remembers then is not of the losses
                but of what they are above it, in which what is hard in the text of an update cancels.
            parameters: size of the model that the losses are of, embeddings included.
            tokens: trained on in this stage.
            state: that the update before left.
        """
        observations = [Observation.from_json(values) for values in state.get("observations", ())]
        aimed_at = dict(self.reference if reference is None else reference)
        if self.online:
            finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
            observations.append(Observation(parameters=parameters, tokens=tokens, losses=finite))
            observations = observations[-MAXIMUM_OBSERVATIONS:]
            aimed_at |= predict_end(observations, domains=weights, parameters=self.parameters, tokens=self.tokens)
        remembered = "memory"
        above, of = losses, aimed_at
        if reference is not None:
            remembered = "excess"
            above = {name: losses[name] - reference[name] for name in losses if name in reference}
            of = dict.fromkeys(weights, 0.0)
        new, memory = update_weights(
            self.rule, weights=weights, losses=above, reference=of, memory=state.get(remembered, {})
        )
        kept = {"memory": {}, remembered: memory, "observations": [each.to_json() for each in observations]}
        return WeightUpdate(weights=new, reference=aimed_at, state=kept)
