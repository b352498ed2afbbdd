"""A model's folder with fewer tokens: rows of embedding and head, the tokenizer, and every id that some file names.

All that is left is exact: kept rows are the same bits, other tensors are not touched, and text whose tokens stay has
the same tokens under new numbers. Ids keep their order: id i of the cut model is id `kept[i]` of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shearing.files.durable import read_json, write_json, write_text
from shearing.files.tensors import read_header, read_tensors, write_tensors
from shearing.models.anatomy import anatomy_of
from shearing.models.loading import load_config
from shearing.models.stored.kept_tokens import BpeTokenizer, choose_tokens, cut_tokenizer
from shearing.models.stored.saving import INDEX

KEPT = "kept_tokens.json"
"""File of a cut model: `kept`, the id that each token had, and `rows`, how many there were."""

_IN = ("config.json", "generation_config.json", "tokenizer_config.json")
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
_SPELLINGS = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model", "*.tiktoken")
"""Say the vocabulary once more, for older readers; `tokenizer.json` has all of it."""


def cut_vocabulary(folder: Path, *, counts: npt.NDArray[np.int64], size: int | str) -> list[int]:
    """Cut a model's folder, in place, to the tokens that a text uses most.

    Other spellings of the vocabulary beside `tokenizer.json` are removed: no reader is to find the old one.

    Args:
        folder: of a model with safetensors files.
        counts: of each id in the text, int64, at least as many as the tokenizer has.
        size: rows, or `auto`; see `choose_tokens`.

    Returns:
        The ids that stayed, ascending.

    Raises:
        ShearingError: a tokenizer that cannot be cut, or not to that size.
    """
    config, tokenizer = load_config(str(folder)), BpeTokenizer.read(folder)
    files = {name: read_json(folder / name) for name in _IN if (folder / name).is_file()}
    named = {old for content in files.values() for key in _keys_of_ids(content) for old in _flat(content[key])}
    kept = choose_tokens(tokenizer, counts, size=size, also=named)
    new = {old: index for index, old in enumerate(kept)}
    family = anatomy_of(config)
    _cut_rows(folder, names=[family.stored_name(each.name) for each in family.embeddings], kept=kept)
    files["config.json"]["vocab_size"] = len(kept)
    for name, content in files.items():
        for key in _keys_of_ids(content):
            content[key] = _renumbered(content[key], new=new)
        if "added_tokens_decoder" in content:
            of = content["added_tokens_decoder"]
            content["added_tokens_decoder"] = {str(new[int(old)]): token for old, token in of.items()}
        write_json(folder / name, content)
    write_text(folder / "tokenizer.json", json.dumps(cut_tokenizer(tokenizer, kept), ensure_ascii=False) + "\n")
    for pattern in _SPELLINGS:
        for path in folder.glob(pattern):
            path.unlink()
    write_json(folder / KEPT, {"rows": int(config.vocab_size), "kept": kept})
    return kept


def _keys_of_ids(content: Mapping[str, Any]) -> list[str]:
    return [key for key in content if key.endswith("_token_id") or key in _LISTS]


def _flat(ids: Any) -> Iterator[int]:
    if isinstance(ids, list):
        for each in ids:
            yield from _flat(each)
    elif isinstance(ids, int):
        yield ids


def _renumbered(ids: Any, *, new: Mapping[int, int]) -> Any:
    """Ids under their new numbers; what is no token's is left out, as -1 and rows that only fill up."""
    if isinstance(ids, list):
        return [each for each in (_renumbered(each, new=new) for each in ids) if each is not None]
    return None if ids is None else new.get(ids)


def _cut_rows(folder: Path, *, names: Sequence[str], kept: Sequence[int]) -> None:
    """Leave out rows of the tensors of these names; files without them are not touched."""
    removed = 0
    for path in sorted(folder.glob("*.safetensors")):
        entries, metadata = read_header(path)
        if not entries.keys() & set(names):
            continue
        tensors = read_tensors(path, entries)
        for name in entries.keys() & set(names):
            before = tensors[name].nbytes
            tensors[name] = tensors[name][torch.tensor(kept)]
            removed += before - tensors[name].nbytes
        write_tensors(path, tensors, metadata=metadata)
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        index["metadata"]["total_size"] -= removed
        write_json(folder / INDEX, index)
