"""A `tokenizer.json` in the words of a GGUF file; what llama.cpp would split otherwise than it is meant is refused.

llama.cpp has the rules by which text is split before merging in its own code, under names. A file says a name, so a
tokenizer whose rules have none is one that llama.cpp cannot have: a name that is nearly right would give other tokens
and say nothing. Byte-level BPE is its tokenizer `gpt2`, BPE over whole characters with bytes to fall back on (what
SentencePiece makes) its tokenizer `llama`, which goes by scores of tokens where Hugging Face's goes by merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearing.errors import ShearingError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Splitting:
    """What llama.cpp has a name for.

    Attributes:
        steps: of `pre_tokenizer`, as `_steps` says them.
        ignore_merges: whether a piece that is a token is taken whole.
        normaliser: that the source may have although llama.cpp has none.
        limit: where llama.cpp's rule is another than the source's, in words.
    """

    steps: Sequence[str]
    ignore_merges: bool = False
    normaliser: str | None = None
    limit: str | None = None


_NAMES: Mapping[str, _Splitting] = {
    "gpt-2": _Splitting(["bytes, split"]),
    "smollm": _Splitting(["digits", "bytes, split"]),
    "llama-bpe": _Splitting([rf"split {_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", "bytes"], ignore_merges=True),
    "qwen2": _Splitting([rf"split {_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}", "bytes"], normaliser="NFC"),
    "tekken": _Splitting(
        [f"split {_TEKKEN}", "bytes"], ignore_merges=True, limit="letters with combining marks may be other tokens"
    ),
}
"""`tokenizer.ggml.pre`, from `llm_tokenizer_bpe` and `llama_vocab` of llama.cpp."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: `gpt2` or `llama`.
        pre: name of its splitting; None for `llama`, which has none.
        tokens, types: by id, as many as the model has rows.
        scores: of `llama`; the higher, the sooner a token is put together.
        adds: whether `bos` and `eos` are put around a text.
        space_prefix: whether `llama` puts a space in front of a text.
        limits: where llama.cpp's tokens are others, a sentence each.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    adds: Mapping[str, bool] = field(default_factory=dict)
    space_prefix: bool = True
    limits: Sequence[str] = ()


def vocabulary_of(folder: Path, *, rows: int) -> Vocabulary:
    """Read the tokenizer beside a model.

    Args:
        folder: with tokenizer.json and tokenizer_config.json.
        rows: of the model's embedding.

    Raises:
        ShearingError: no tokenizer.json, one that llama.cpp cannot have, or more tokens than rows.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _refused(f"{path}: not there", allowed="a model with tokenizer.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model.get("type") != "BPE" or odd:
        said = ", ".join([str(model.get("type")), *odd])
        raise _refused(f"{path}: {said}", allowed="BPE without affixes and dropout, byte-level or SentencePiece's")
    named = {**model["vocab"], **{each["content"]: each["id"] for each in content["added_tokens"]}}
    if len(named) > rows or max(named.values()) >= rows:
        raise _refused(f"{path}: {len(named)} tokens", allowed=f"at most {rows}, the rows of the model's embedding")
    adds = _adds(path, special=_special_ids(folder, named=named))
    of_bytes = not model.get("byte_fallback")
    tokens, types = _tokens(content, named=named, rows=rows, of_bytes=of_bytes)
    if of_bytes:
        name, limits = _name_of(content, path=path)
        return Vocabulary("gpt2", name, tokens, types, adds=adds, limits=limits)
    prefix = _space_prefix(content, path=path)
    scores = _scores(model, tokens=tokens, special={each["content"] for each in content["added_tokens"]}, path=path)
    return Vocabulary("llama", None, tokens, types, scores=scores, adds=adds, space_prefix=prefix)


def write_vocabulary(vocabulary: Vocabulary, *, folder: Path, writer: GGUFWriter) -> None:
    """Say it in a file's header, with merges, ids of special tokens and chat templates from a folder's files."""
    from gguf import SpecialVocab

    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    special = SpecialVocab(folder, load_merges=vocabulary.model == "gpt2", n_vocab=len(vocabulary.tokens))
    special.add_special_token = dict(vocabulary.adds)
    special.add_to_gguf(writer, quiet=True)


def _refused(value: str, *, allowed: str) -> ShearingError:
    return ShearingError(
        "--gguf",
        value=value,
        allowed=allowed,
        mend="leave --gguf out and convert the folder with llama.cpp's own convert_hf_to_gguf.py, if it knows this one",
    )


def _special_ids(folder: Path, *, named: Mapping[str, int]) -> dict[str, int]:
    """Ids of `bos` and `eos`, where the tokenizer has them."""
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = {}
    for kind in ("bos", "eos"):
        token = said.get(f"{kind}_token")
        content = token["content"] if isinstance(token, dict) else token
        if content is not None and content in named:
            ids[kind] = named[content]
    return ids


def _adds(path: Path, *, special: Mapping[str, int]) -> dict[str, bool]:
    """Whether bos and eos are put around a text, as the tokenizer itself does."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    bare, whole = (tokenizer.encode("a", add_special_tokens=with_them).ids for with_them in (False, True))
    for bos in (False, True):
        for eos in (False, True):
            before = [special["bos"]] if bos and "bos" in special else []
            after = [special["eos"]] if eos and "eos" in special else []
            if whole == [*before, *bare, *after]:
                return {"bos": bos, "eos": eos}
    raise _refused(f"{path}: {whole} for 'a'", allowed="nothing but bos before and eos after a text")


def _tokens(
    content: Mapping[str, Any], *, named: Mapping[str, int], rows: int, of_bytes: bool
) -> tuple[list[str], list[int]]:
    """Tokens and their types, by id; rows without a token are unused."""
    from gguf import TokenType

    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, index in named.items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
        if not of_bytes and _BYTE.fullmatch(token):
            types[index] = int(TokenType.BYTE)
    for added in content["added_tokens"]:
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = content["model"].get("unk_token")
    if unknown in named:
        types[named[unknown]] = int(TokenType.UNKNOWN)
    return tokens, types


def _name_of(content: Mapping[str, Any], *, path: Path) -> tuple[str, list[str]]:
    """llama.cpp's name for how a byte-level tokenizer splits, and where it splits otherwise after all."""
    steps, normaliser = _steps(content.get("pre_tokenizer")), content.get("normalizer")
    ignore_merges = bool(content["model"].get("ignore_merges"))
    for name, known in _NAMES.items():
        normal = normaliser is None or normaliser == {"type": known.normaliser}
        if steps == known.steps and ignore_merges == known.ignore_merges and normal:
            limits = [] if known.limit is None else [f"in llama.cpp, {known.limit}"]
            if normaliser is not None:
                limits.append(f"llama.cpp takes text as it is, where the tokenizer brings it to {known.normaliser}")
            return name, limits
    raise _refused(
        f"{path}: pre-tokenizer {steps}, ignore_merges {ignore_merges}, normaliser {normaliser}",
        allowed="how a tokenizer splits that llama.cpp is known to have: " + ", ".join(_NAMES),
    )


def _steps(said: Mapping[str, Any] | None) -> list[str]:
    """The steps of a pre-tokenizer, one text for each that has one meaning here."""
    if said is None:
        return []
    kind = said["type"]
    if kind == "Sequence":
        return [step for each in said["pretokenizers"] for step in _steps(each)]
    if kind == "Digits" and said["individual_digits"]:
        return ["digits"]
    if kind == "ByteLevel" and not said["add_prefix_space"]:
        return ["bytes, split" if said.get("use_regex", True) else "bytes"]
    if kind == "Split" and said["behavior"] == "Isolated" and not said["invert"] and "Regex" in said["pattern"]:
        return [f"split {said['pattern']['Regex']}"]
    return [json.dumps(said, sort_keys=True)]


def _space_prefix(content: Mapping[str, Any], *, path: Path) -> bool:
    """Whether a text begins with a space that is put there; spaces are tokens' own otherwise."""
    normaliser, pre = content.get("normalizer"), content.get("pre_tokenizer")
    steps = [] if normaliser is None else normaliser.get("normalizers", [normaliser])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if pre is None and steps and steps[-1] == replace and steps[:-1] in ([], [{"type": "Prepend", "prepend": _SPACE}]):
        return len(steps) == 2
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "split": False}
    if normaliser is None and pre is not None and metaspace.items() <= pre.items():
        return bool(pre["prepend_scheme"] != "never")
    raise _refused(
        f"{path}: normaliser {normaliser}, pre-tokenizer {pre}", allowed="spaces written as ▁ and nothing else changed"
    )


def _scores(model: Mapping[str, Any], *, tokens: Sequence[str], special: set[str], path: Path) -> list[float]:
    """Scores that put tokens together in the order of the merges.

    Raises:
        ShearingError: scores cannot say what the merges say: some token is put together at two times, or not out of
            every pair of tokens that it consists of.
    """
    merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in model["merges"]]
    ranks: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        merged = left + right
        if merged != last and merged in ranks:
            raise _refused(f"{path}: {merged!r} is merged at two times", allowed="merges as SentencePiece has them")
        ranks.setdefault(merged, rank)
        last = merged
    known, pairs = set(tokens) - special, set(merges)
    for token in known:
        if _BYTE.fullmatch(token):
            continue
        for at in range(1, len(token)):
            pair = (token[:at], token[at:])
            if pair[0] in known and pair[1] in known and pair not in pairs:
                raise _refused(f"{path}: no merge of {pair}", allowed="a merge for every two tokens that make a third")
    return [-float(ranks.get(token, len(merges))) for token in tokens]
