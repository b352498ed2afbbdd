"""Our sequence of samples as the training data of Composer's trainer, with its place in the trainer's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from shearing import ShearingError
from shearing.data import Mixture, Prefetcher


class MixtureBatches(IterableDataset[dict[str, Tensor]]):
    """The rows of this process, of one step after the other, without end; `loader` is what the trainer is given.

    A thread deals them ahead, so the loader has no workers. A checkpoint of the trainer holds the mixture after the
    steps that were trained, whatever was dealt ahead, and any number of processes goes on from there.

    Args:
        mixture: not to be used directly any more.
        sequences_per_step: global batch, over all processes.

    Raises:
        ShearingError: a mixture in which the ends of documents mean something, or some tokens do not count.
        ValueError: the processes cannot share a step equally.
    """

    def __init__(self, mixture: Mixture, *, sequences_per_step: int) -> None:
        if mixture.corpus.bos.mode == "document":
            raise ShearingError(
                "mixture",
                value=f"{mixture.corpus.path}, with {mixture.corpus.bos}, which no loss counts",
                allowed="text of which all tokens count: Composer weighs the loss of a micro-batch by its rows",
                mend="prepare it with bos: row or none, or train with `shear run` or Hugging Face's Trainer",
            )
        if mixture.documents.needs_positions:
            raise ShearingError(
                "documents",
                value=mixture.documents,
                allowed="DocumentRules(): under Composer, attention and loss go across the ends of documents",
                mend="make the mixture without document rules",
            )
        if not mixture.corpus.all_count:
            raise ShearingError(
                "mixture",
                value=f"{mixture.corpus.path}, of which some tokens do not count in a loss",
                allowed="text of which all tokens count: Composer weighs the loss of a micro-batch by its rows",
                mend="prepare it with loss: all, or train on answers with `shear run` or Hugging Face's Trainer",
            )
        self.mixture, self.sequences_per_step = mixture, sequences_per_step
        self._prefetcher = self._deal()

    def loader(self) -> DataLoader[dict[str, Tensor]]:
        """The `train_dataloader`; one batch is all that this process has of a step."""
        return DataLoader(self, batch_size=None)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            tokens_BT = self._prefetcher.next().tokens
            yield {"input_ids": tokens_BT, "labels": tokens_BT}

    @property
    def weights(self) -> dict[str, float]:
        """The domain weights announced last."""
        return self._prefetcher.weights

    def update_weights(self, weights: Mapping[str, float]) -> int:
        """Announce domain weights for the first step that is not dealt yet; returns its first sample."""
        return self._prefetcher.update_weights(weights)

    def close(self) -> None:
        """Stop the thread."""
        self._prefetcher.close()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What the trainer's checkpoint keeps; it counts samples itself, and so do we."""
        del num_samples, from_beginning
        return self._prefetcher.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._prefetcher.close()
        self.mixture.load_state_dict(state)
        self._prefetcher = self._deal()

    def _deal(self) -> Prefetcher:
        return Prefetcher(
            self.mixture,
            sequences_per_step=self.sequences_per_step,
            rank=dist.get_global_rank(),
            world_size=dist.get_world_size(),
        )
