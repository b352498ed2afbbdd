"""Our sequence of samples as a data set of Hugging Face's `Trainer`.

Shapes: T = S + 1 tokens of a row (S inputs and the last label).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from shearing import ShearingError
from shearing.data import IGNORED_LABEL, Mixture


class MixtureRows(IterableDataset[dict[str, Tensor]]):
    """Rows of a mixture from its first sample on, without end: of `max_steps` the trainer takes what it needs.

    Domain weights stay as they are: the trainer reads ahead without saying how far, and finds its place after an
    interruption by reading all that came before once more, so no update in between would come back.

    Labels are the tokens that count; the trainer's mean is over these. A row without any is left out, which takes
    nothing from that mean: a step of such rows alone has none, and would turn all weights into NaN.

    Args:
        mixture: not to be used directly any more.

    Raises:
        ShearingError: a mixture in which the ends of documents mean something; and, where rows are read, several
            workers, each of which would deal every sample.
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
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ShearingError(
                "dataloader_num_workers",
                value=worker.num_workers,
                allowed="0 or 1: the samples are one sequence, of which each worker would deal all",
                mend="change TrainingArguments; reading a row takes no time that a second worker would save",
            )
        for sample in count():
            batch = self.mixture.batch(first_sample=sample, num_sequences=1)
            tokens_T = labels_T = batch.tokens[0]
            if batch.counted is not None:
                counted_T = batch.counted[0]
                if not counted_T[1:].any():
                    continue
                labels_T = tokens_T.masked_fill(~counted_T, IGNORED_LABEL)
            yield {"input_ids": tokens_T, "labels": labels_T}
