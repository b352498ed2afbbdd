"""Our sequence of samples as a data set of Hugging Face's `Trainer`.

Shapes: T = S + 1 tokens of a row (S inputs and the last label).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import IterableDataset, get_worker_info

from shearing import ShearingError
from shearing.data import IGNORED_LABEL, Mixture


class MixtureRows(IterableDataset[dict[str, Tensor]]):
    """Rows of a mixture from its first sample on, without end: of `max_steps` the trainer takes what it needs.

    Domain weights stay as they are: the trainer reads ahead without saying how far, and finds its place after an
    interruption by reading all that came before once more, so no update in between would come back.

    Labels are the tokens that count, without the token that begins each document where a corpus has one; the trainer's
    mean is over these. A row without any is left out, which takes nothing from that mean: a step of such rows alone has
    none, and would turn all weights into NaN.

    Args:
        mixture: not to be used directly any more.

    Raises:
        ShearingError: a mixture in which attention stays within documents; and, where rows are read, several workers,
            each of which would deal every sample.
    """

    def __init__(self, mixture: Mixture) -> None:
        if mixture.documents.attention_within:
            raise ShearingError(
                "documents",
                value=mixture.documents,
                allowed="attention_within=False: under the Trainer, attention goes across the ends of documents",
                mend="make the mixture without that rule",
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
            documents = self.mixture.documents.documents(
                batch.positions, device=tokens_T.device, counted_BT=batch.counted
            )
            if documents is not None:
                assert documents.left_out is not None
                if documents.left_out.all():
                    continue
                # It is the model that shifts labels by one: the first token is none.
                labels_T = pad(documents.labels(batch.tokens)[0], (1, 0), value=IGNORED_LABEL)
            yield {"input_ids": tokens_T, "labels": labels_T}
