"""Our sequence of samples as a data set of Hugging Face's `Trainer`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import IterableDataset

from shearing import ShearingError
from shearing.data import Mixture


class MixtureRows(IterableDataset[dict[str, Tensor]]):
    """Rows of a mixture from its first sample on, without end: of `max_steps` the trainer takes what it needs.

    Domain weights stay as they are: the trainer reads ahead without saying how far, and finds its place after an
    interruption by reading all that came before once more, so no update in between would come back.

    Args:
        mixture: not to be used directly any more.

    Raises:
        ShearingError: a mixture in which the ends of documents mean something.
    """

    def __init__(self, mixture: Mixture) -> None:
        if mixture.documents.needs_positions:
            raise ShearingError(
                "documents",
                value=mixture.documents,
                allowed="DocumentRules(): under the Trainer, attention and loss go across the ends of documents",
                mend="make the mixture without document rules",
            )
        self.mixture = mixture

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        sample = 0
        while True:
            batch = self.mixture.batch(first_sample=sample, num_sequences=1)
            yield {"input_ids": batch.tokens[0], "labels": batch.tokens[0]}
            sample += 1
