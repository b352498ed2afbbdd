"""Documents inside rows: which tokens may attend to which, at which positions, and which labels count.

A row is a piece of a stream of documents. A *stretch* is what a row has of one document: it begins where the document
does or where the row does. What is read about documents is computed on the host, from the rows' positions, before
anything is on the device: nothing waits for the device, and nothing of size S x S exists.

Legend: B rows, S positions, T = S + 1 tokens (S inputs and the last label), N stretches of B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shearing.data.corpus.bos import Bos

IGNORED_LABEL = -100
"""The label of positions whose loss does not count."""


@dataclass(frozen=True, kw_only=True)
class DocumentRules:
    """What the end of a document means; the same for training, calibration and held-out losses of a run.

    Attributes:
        attention_within: tokens attend to tokens of their own stretch alone, in which positions count from 0.
        loss_across: the last token of a document predicts the first one of the next.
    """

    attention_within: bool = False
    loss_across: bool = True

    def heeding(self, bos: Bos) -> DocumentRules:
        """These rules for texts that begin so: a token in front of each document is certain, and counts in no loss."""
        return replace(self, loss_across=False) if bos.mode == "document" else self

    @property
    def needs_positions(self) -> bool:
        """Whether it matters where documents begin."""
        return self.attention_within or not self.loss_across

    def documents(
        self, positions_BT: Tensor | None, *, device: torch.device, counted_BT: Tensor | None = None
    ) -> Documents | None:
        """What the model and the loss have to know about the documents of some rows.

        Args:
            positions_BT: int64 on the host, tokens since the stretch began; 0 where a document begins. None where
                these rules do not need it.
            device: of the model.
            counted_BT: bool on the host, tokens that count as labels; None: all.

        Returns:
            None where documents mean nothing, and all labels count.
        """
        if not self.needs_positions and counted_BT is None:
            return None
        position_ids_BS = boundaries = left_out_BS = None
        assert positions_BT is not None or not self.needs_positions, "rows without the positions that these rules need"
        if self.attention_within:
            assert positions_BT is not None
            position_ids_BS = positions_BT[:, :-1].contiguous()
            boundaries = _boundaries(position_ids_BS)
        if not self.loss_across:
            assert positions_BT is not None
            left_out_BS = positions_BT[:, 1:] == 0
        if counted_BT is not None:
            uncounted_BS = ~counted_BT[:, 1:]
            left_out_BS = uncounted_BS if left_out_BS is None else left_out_BS | uncounted_BS
        return Documents(
            position_ids=None if position_ids_BS is None else sent(position_ids_BS, device=device),
            boundaries=boundaries,
            boundaries_on_device=None if boundaries is None else sent(boundaries, device=device),
            left_out=None if left_out_BS is None else sent(left_out_BS, device=device),
        )


class OnHost:
    """Holds a tensor that stays on the host.

    FSDP2 moves every tensor among a call's arguments to the device, from where it would have to be read back. It looks
    into lists, tuples and dicts, but not in here.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of B rows; from `DocumentRules.documents`.

    Attributes:
        position_ids: int64 [B, S], tokens since the stretch began; None where attention does not heed documents, like
            the next two.
        boundaries: int32 on the host, where stretches begin among all B * S inputs, and the end. The end is repeated up
            to a power of two, so that few different shapes occur.
        boundaries_on_device: the same.
        left_out: bool [B, S], labels that do not count: the first token of a document where rules say so, and what the
            corpus itself does not count; None: all count.
    """

    position_ids: Tensor | None
    boundaries: Tensor | None
    boundaries_on_device: Tensor | None
    left_out: Tensor | None

    def keywords(self) -> dict[str, Any]:
        """Arguments of the backbone beside `input_ids`; transformers hands them on to the attention function."""
        if self.position_ids is None:
            return {}
        # The bound on a stretch's length is the same for all batches: a number that changes would be compiled anew.
        length = self.position_ids.shape[1]
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.boundaries_on_device,
            "cu_seq_lens_k": self.boundaries_on_device,
            "max_length_q": length,
            "max_length_k": length,
            "document_boundaries": None if self.boundaries is None else OnHost(self.boundaries),
        }

    def labels(self, tokens_BT: Tensor) -> Tensor:
        """The token that each position has to predict, [B, S]; `IGNORED_LABEL` where it does not count."""
        labels_BS = tokens_BT[:, 1:]
        return labels_BS if self.left_out is None else labels_BS.masked_fill(self.left_out, IGNORED_LABEL)

    def part(self, first: int, end: int) -> Documents:
        """The documents of some of the rows."""

        def own(of_rows: Tensor | None) -> Tensor | None:
            return None if of_rows is None else of_rows[first:end]

        boundaries = on_device = None
        if self.boundaries is not None:
            assert self.position_ids is not None
            length = self.position_ids.shape[1]
            shifted, tokens = self.boundaries - first * length, (end - first) * length
            boundaries = _padded(shifted[(shifted >= 0) & (shifted < tokens)], end=tokens)
            on_device = sent(boundaries, device=self.position_ids.device)
        return Documents(
            position_ids=own(self.position_ids),
            boundaries=boundaries,
            boundaries_on_device=on_device,
            left_out=own(self.left_out),
        )


@dataclass(frozen=True)
class Inputs:
    """What a backbone reads: tokens [B, S] and their documents."""

    tokens: Tensor
    documents: Documents | None = None

    def keywords(self) -> dict[str, Any]:
        """All arguments of the backbone's call."""
        return {
            "input_ids": self.tokens,
            "use_cache": False,
            **({} if self.documents is None else self.documents.keywords()),
        }

    def part(self, first: int, end: int) -> Inputs:
        """Some of the rows; itself where they are all."""
        if (first, end) == (0, self.tokens.shape[0]):
            return self
        return Inputs(self.tokens[first:end], None if self.documents is None else self.documents.part(first, end))

    def rows(self) -> list[Inputs]:
        """Each row by itself."""
        return [self.part(row, row + 1) for row in range(self.tokens.shape[0])]


def sent(tensor: Tensor, *, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without the host waiting for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _boundaries(position_ids_BS: Tensor) -> Tensor:
    begins_N = (position_ids_BS.reshape(-1) == 0).nonzero()[:, 0]
    return _padded(begins_N, end=position_ids_BS.numel())


def _padded(begins_N: Tensor, *, end: int) -> Tensor:
    """Where stretches begin, and the end, repeated up to a power of two."""
    room = 1 << len(begins_N).bit_length()
    boundaries = torch.full((room,), end, dtype=torch.int32)
    boundaries[: len(begins_N)] = begins_N
    return boundaries
