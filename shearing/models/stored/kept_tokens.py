"""Which tokens of a BPE tokenizer stay when its vocabulary is cut, so that text of kept tokens has the same tokens.

BPE puts a token together by merges, the first in the list of merges first. A text's merges never cross the border
between two of its tokens, so each token is put together as it is alone: out of the same pieces, in the same order. What
has to stay with a token are those pieces. The merges that are left are then the first ones at every step again, and
none is left that was not there: where all tokens of a text stay, its tokens stay the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shearing.errors import ShearingError

ROUNDED_TO = 64
"""Rows that a vocabulary of all tokens in use is filled up to a multiple of: matrix kernels like it."""

_SPACE = "\u2581"  # SentencePiece's; out of its bytes it would not become a space again
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class BpeTokenizer:
    """What a `tokenizer.json` says of BPE.

    Attributes:
        content: of the file.
        ids: of the tokens that text is put together of; added tokens may be among them.
        added: content -> id of what is looked for in a text before anything else.
        ranks: of each merge, the first is 0.
    """

    content: Mapping[str, Any]
    ids: Mapping[str, int]
    added: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]

    @classmethod
    def read(cls, folder: Path) -> BpeTokenizer:
        """Of the tokenizer in a model's folder.

        Raises:
            ShearingError: there is none, or one whose vocabulary cannot be cut like this.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise _refused(f"no {path}")
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
        if model.get("type") != "BPE" or odd:
            raise _refused(f"the tokenizer of {folder}: {', '.join([str(model.get('type')), *odd])}")
        if not model.get("byte_fallback") and '"ByteLevel"' not in json.dumps(content.get("pre_tokenizer")):
            raise _refused(f"the tokenizer of {folder}: BPE without bytes, which cannot spell what is cut")
        merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in model["merges"]]
        ranks: dict[tuple[str, str], int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault((left, right), rank)
        added = {each["content"]: each["id"] for each in content["added_tokens"]}
        return cls(content, model["vocab"], added, ranks)

    def pieces(self, token: str) -> set[str]:
        """The tokens that a token is put together of, itself among them; of one that merges never make, itself."""
        parts, found = list(token), {token, *token}
        while len(parts) > 1:
            rank, at = min((self.ranks.get(pair, len(self.ranks)), at) for at, pair in enumerate(pairwise(parts)))
            if rank == len(self.ranks):
                return {token}  # taken whole (ignore_merges), or never there
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            found.add(parts[at])
        return found & self.ids.keys()

    @property
    def size(self) -> int:
        """Tokens, added ones too."""
        return len({*self.ids.values(), *self.added.values()})

    def always(self) -> set[int]:
        """Ids of what any text may need: added tokens, single bytes, and what stands for the unknown."""
        model = self.content["model"]
        bytes_ = set(_alphabet()) if not model.get("byte_fallback") else {_SPACE, *filter(_BYTE.fullmatch, self.ids)}
        unknown = {model["unk_token"]} if model.get("unk_token") else set()
        return {self.ids[token] for token in (bytes_ | unknown) & self.ids.keys()} | set(self.added.values())


def require_cuttable(folder: Path, *, size: int | str) -> None:
    """Check that a tokenizer's vocabulary can be cut, to that many rows.

    Args:
        folder: of the model.
        size: rows, or `auto`.

    Raises:
        ShearingError: another kind of tokenizer, or a size that no vocabulary of it can have.
    """
    tokenizer = BpeTokenizer.read(folder)
    if isinstance(size, int):
        _require_size(
            size, least=len(tokenizer.always()), most=len({*tokenizer.ids.values(), *tokenizer.added.values()})
        )


def choose_tokens(
    tokenizer: BpeTokenizer, counts: npt.NDArray[np.int64], *, size: int | str, also: Iterable[int] = ()
) -> list[int]:
    """The tokens that stay: what any text needs, then the most frequent with their pieces.

    Args:
        tokenizer: whose vocabulary is cut.
        counts: of each token in the text that the model is for, int64 [V].
        size: rows, exactly; or `auto`: all tokens that are in the text, and a few more up to a multiple of
            `ROUNDED_TO`.
        also: ids that have to stay, as those that a config names.

    Returns:
        Their ids, ascending.

    Raises:
        ShearingError: a size that no vocabulary of this tokenizer can have.
    """
    names = {index: token for token, index in tokenizer.ids.items()}
    kept = tokenizer.always() | {index for index in also if index in names}
    every = tokenizer.size
    if isinstance(size, int):
        _require_size(size, least=len(kept), most=every)
    frequent = np.argsort(-counts, kind="stable")  # of equal ones the earlier, which merges make sooner
    limit = size if isinstance(size, int) else every
    for index in map(int, frequent):
        if index not in names or index in kept:
            continue
        if size == "auto" and not counts[index]:
            if len(kept) % ROUNDED_TO == 0:
                break
            limit = min(every, -(-len(kept) // ROUNDED_TO) * ROUNDED_TO)
        needed = {tokenizer.ids[piece] for piece in tokenizer.pieces(names[index])}
        if len(kept | needed) <= limit:
            kept |= needed
        if len(kept) == limit:
            break
    return sorted(kept)


def cut_tokenizer(tokenizer: BpeTokenizer, kept: Sequence[int]) -> dict[str, Any]:
    """The content of `tokenizer.json` with the kept tokens alone, numbered in their order.

    Args:
        tokenizer: as it was.
        kept: ids, ascending; see `choose_tokens`.
    """
    new = {old: index for index, old in enumerate(kept)}
    content: dict[str, Any] = json.loads(json.dumps(tokenizer.content))
    vocab = {token: new[old] for token, old in tokenizer.ids.items() if old in new}
    content["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    content["model"]["merges"] = [
        [left, right] for left, right in tokenizer.ranks if left in vocab and right in vocab and left + right in vocab
    ]
    for added in content["added_tokens"]:
        added["id"] = new[added["id"]]
    if content.get("padding"):
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
    _renumber_processor(content.get("post_processor"), new=new)
    return content


def _renumber_processor(said: dict[str, Any] | None, *, new: Mapping[int, int]) -> None:
    """Ids of the tokens that are put around a text."""
    if said is None:
        return
    for each in said.get("processors", ()):
        _renumber_processor(each, new=new)
    for special in said["special_tokens"].values() if said["type"] == "TemplateProcessing" else ():
        special["ids"] = [new[old] for old in special["ids"]]
    for name in ("cls", "sep"):
        if isinstance(said.get(name), list):  # of BERT's and RoBERTa's
            said[name][1] = new[said[name][1]]


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def _require_size(size: int, *, least: int, most: int) -> None:
    if not least <= size <= most:
        raise ShearingError(
            "vocab_size",
            value=size,
            allowed=f"{least} to {most}: bytes, special and added tokens always stay, and the tokenizer has no more",
            mend="choose another size, or auto for the tokens that the corpus uses",
        )


def _refused(value: str) -> ShearingError:
    return ShearingError(
        "vocab_size",
        value=value,
        allowed="a tokenizer.json of BPE, byte-level or with bytes to fall back on: of WordPiece and Unigram no token "
        "can go without changing what others are used for",
        mend="leave it out: the model keeps its vocabulary",
    )
