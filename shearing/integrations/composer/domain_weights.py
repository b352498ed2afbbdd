"""Dynamic batch loading (Sheared LLaMA, section 2.2) under Composer's trainer: domain weights that follow losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from transformers import PreTrainedModel

from shearing.data import DynamicMixture
from shearing.evaluation import heldout_loss
from shearing.integrations.composer.batches import MixtureBatches
from shearing.processes import Processes
from shearing.pruning.structured import Masking


class DynamicBatchLoading(Callback):
    """Measures held-out losses every so many batches, and announces the domain weights that follow from them.

    It changes the data alone. Losses are of validation text, read by all processes together, under masks without noise
    of the size of the step; new weights hold from the first step that is not dealt yet, the third from then on.

    Args:
        batches: what the trainer trains on.
        dynamic: how weights follow losses.
        interval: batches between two updates.
        model: that is trained: the Hugging Face model, as its parameters are measured.
        tokens_per_domain: of validation text.
        micro_batch_size: rows per forward pass while measuring.
        masking: where masks are learned.
    """

    def __init__(
        self,
        batches: MixtureBatches,
        *,
        dynamic: DynamicMixture,
        interval: int,
        model: PreTrainedModel,
        tokens_per_domain: int,
        micro_batch_size: int,
        masking: Masking | None = None,
    ) -> None:
        self.batches, self.dynamic, self.interval = batches, dynamic, interval
        self.model, self.masking = model, masking
        self.tokens_per_domain, self.micro_batch_size = tokens_per_domain, micro_batch_size
        self.rule = dict(dynamic.state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Update the weights if it is due."""
        step = int(state.timestamp.batch.value)
        if step % self.interval:
            return
        losses = self.losses(state)
        parameters = self.dynamic.parameters if self.masking is None else self.masking.settled_parameters(step=step)
        # On one process: whatever its arithmetic, all of them go on with the same weights.
        agreed = [
            self.dynamic.update(
                self.batches.weights,
                losses=losses,
                parameters=parameters,
                tokens=step * self.batches.sequences_per_step * self.batches.mixture.sequence_length,
                state=self.rule,
            )
        ]
        dist.broadcast_object_list(agreed)
        [update] = agreed
        self.rule = update.state
        self.batches.update_weights(update.weights)
        logger.log_metrics({f"heldout/{domain}": loss for domain, loss in losses.items()})
        logger.log_metrics({f"domain_weight/{domain}": weight for domain, weight in update.weights.items()})

    def losses(self, state: State) -> dict[str, float]:
        """Loss of each domain now, in nats."""
        if self.masking is not None:
            self.masking.settle(step=int(state.timestamp.batch.value))
        measured = heldout_loss(
            self.model,
            self.batches.mixture.corpus,
            split="validation",
            tokens_per_domain=self.tokens_per_domain,
            sequence_length=self.batches.mixture.sequence_length,
            micro_batch_size=self.micro_batch_size,
            precision=torch.bfloat16 if state.precision == Precision.AMP_BF16 else torch.float32,
            processes=Processes(rank=dist.get_global_rank(), size=dist.get_world_size()),
        )
        return {domain: loss.loss for domain, loss in measured.items()}

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers."""
        return {"rule": self.rule}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.rule = state["rule"]
