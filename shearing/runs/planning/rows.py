"""Which training rows a run reads, as far as that is known before it starts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shearing.runs.context import RunContext

Rows = npt.NDArray[np.int64]


def rows_read(context: RunContext) -> dict[str, Rows] | None:
    """The training rows of each domain that a run reads, ascending; None where that depends on its losses."""
    recipe = context.recipe
    if recipe.mixture.update != "constant":
        return None
    mixture, length = context.initial_mixture(), recipe.data.sequence_length
    samples = sum(
        stage.total_steps(sequence_length=length) * stage.tokens_per_step(sequence_length=length) // length
        for stage in recipe.training_stages.values()
    )
    domain_ids, rows = mixture.dealt(first_sample=0, num_sequences=samples)
    return {domain: np.unique(rows[domain_ids == index]) for index, domain in enumerate(mixture.domains)}
