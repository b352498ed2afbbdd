"""The tokenizer of a model: what its own tokenizer.json does, whatever class a config names.

transformers 5 gives some classes a pre-tokeniser, a normaliser or a decoder of their own in place of the file's, which
may lose spaces. The two are compared on probes here, and where they differ the file's own is taken. This is the one
place that tokenizers of models come from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearing.errors import ShearingError, key
from shearing.files.permissions import forbidden
from shearing.models.place import require_place

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
PROBES = (
    "two words",
    " a space in front",
    "runs  of   spaces\tand tabs \t at the end  ",
    "lines\n\nand\r\nlines\n",
    "12345 + 6.78e-9 = 1,234,567; 1 22 333",
    "def f(x):\n    return {'a': x[0] ** 2}  # done\n\tpass\n",
    "naïve café e\u0301 ﬁ ½ Ａ İ",
    "東京 Москва العربية हिन्दी 🙂👩‍👩‍👧",
    "It's we'll THEY'RE <b>&amp;</b> https://a.b/c?d=e_f#g",
    "\u00a0\u200b\ufeff\u2028 ▁ Ġ � \x00 \x7f",
)
_ADDED_PROBED = 32
_ALTERNATIVES = ("tokenizer.model*", "*.spm", "tekken.json", "vocab.json", "vocab.txt", "*.tiktoken")
_REFUSALS = (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a class of transformers may say of files that it does not like."""


@dataclass(frozen=True)
class ModelTokenizer:
    """A model's tokenizer.

    Attributes:
        full: as `transformers` has it.
        backend: as `tokenizers` has it, without truncation and padding.
        notice: what is to be said of it, or None.
    """

    full: PreTrainedTokenizerBase
    backend: Tokenizer
    notice: str | None


@dataclass(frozen=True)
class BeginTokens:
    """What a tokenizer says of the beginning of a text.

    Attributes:
        front: token that it puts there where special tokens are asked for; None: none, or several.
        named: what it calls its `bos_token`, put anywhere or not; None: nothing.
    """

    front: int | None
    named: int | None


def open_tokenizer(source: str, *, revision: str | None = None) -> ModelTokenizer:
    """The tokenizer beside a model.

    Args:
        source: folder or hub name.
        revision: of a hub name.

    Raises:
        ShearingError: there is none, none with a tokenizer.json, or one that cannot be read.
    """
    own = _own(source, revision=revision)
    full, notice = _of_transformers(source, revision=revision, own=own)
    backend: Tokenizer = full.backend_tokenizer
    # A limit left by an earlier use of the tokenizer would cut documents short.
    backend.no_truncation()
    backend.no_padding()
    return ModelTokenizer(full=full, backend=backend, notice=notice)


def load_tokenizer(source: str, *, revision: str | None = None) -> Any:
    """The tokenizer beside a model, as `transformers` has it; see `open_tokenizer`."""
    return open_tokenizer(source, revision=revision).full


def begin_tokens(tokenizer: Any) -> BeginTokens:
    """The tokens with which a tokenizer of `transformers` begins a text."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    plain, whole = backend.encode(PROBES[0], add_special_tokens=False).ids, backend.encode(PROBES[0]).ids
    puts_one = whole[1 : 1 + len(plain)] == plain and whole[: len(plain)] != plain
    return BeginTokens(front=whole[0] if puts_one else None, named=tokenizer.bos_token_id)


def _own(source: str, *, revision: str | None) -> Tokenizer:
    """What tokenizer.json says."""
    from tokenizers import Tokenizer

    require_place(source, revision=revision)
    path = _file(source, FILE, revision=revision)
    if path is None:
        raise _missing(source)
    try:
        own = Tokenizer.from_file(str(path))
    except Exception as error:  # that of tokenizers is no more than an Exception
        raise forbidden(path, error=error) or ShearingError(
            "source (tokenizer.json)",
            value=source,
            allowed="a tokenizer.json that the package tokenizers can read",
            mend=f"fetch it again, or update the package ({error})",
        ) from error
    own.no_truncation()
    own.no_padding()
    return own


def _file(source: str, name: str, *, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise ShearingError(
            "source",
            value=source,
            allowed="a hub name that can be reached, or whose tokenizer is here already",
            mend=f"check the network ({str(error).splitlines()[0]})",
        ) from error
    except EntryNotFoundError:
        return None


def _missing(source: str) -> ShearingError:
    folder = Path(source)
    others = sorted({path.name for pattern in _ALTERNATIVES for path in folder.glob(pattern)})
    convert = (
        'python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{source}').save_pretrained('NEW')\", and copy NEW/{FILE} beside the model"
    )
    if folder.is_dir() and not others:
        return ShearingError(
            "source",
            value=source,
            allowed="a model with its tokenizer beside it",
            mend=f"add the tokenizer's files, {FILE} and {_CONFIG}; a corpus and bits per byte need them",
        )
    found = f" (there is {', '.join(others)})" if others else ""
    return ShearingError(
        "source",
        value=f"{source} without {FILE}{found}",
        allowed=f"a tokenizer with a {FILE}, which says exactly how text becomes tokens",
        mend=f"convert it once: pip install sentencepiece tiktoken; {convert}; or point {key('source')} at a "
        "copy of the model that has one",
    )


def _of_transformers(
    source: str, *, revision: str | None, own: Tokenizer
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer as transformers has it if it does what the file says, else one that does."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        named = AutoTokenizer.from_pretrained(source, revision=revision)
        different = _difference(named, own=own)
        reason = f", as transformers has it in {type(named).__name__}, splits {different!r} otherwise"
    except _REFUSALS as error:
        named, different = None, str(error)
        reason = f" is refused by transformers ({(str(error) or type(error).__name__).splitlines()[0]})"
    if named is not None and different is None:
        return named, None
    try:
        plain = PreTrainedTokenizerFast.from_pretrained(source, revision=revision or "main")
    except _REFUSALS:
        plain = None
    if plain is None or _difference(plain, own=own) is not None:
        said = _said_in_config(source, revision=revision)
        plain = PreTrainedTokenizerFast(tokenizer_object=own, **said)
    return plain, f"{source}: the tokenizer{reason}; its own {FILE} is used"


def _said_in_config(source: str, *, revision: str | None) -> dict[str, Any]:
    """Special tokens and chat template, as far as tokenizer_config.json can be read."""
    path = _file(source, _CONFIG, revision=revision)
    try:
        values = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
        tokens = {name: values.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    except (OSError, ValueError, AttributeError):
        return {}
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    template = values.get("chat_template")
    return {
        **{name: token for name, token in named.items() if isinstance(token, str)},
        **({"chat_template": template} if isinstance(template, str) else {}),
    }


def _difference(tokenizer: Any, *, own: Tokenizer) -> str | None:
    """The first probe that becomes other tokens, or another text again; None: there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return PROBES[0]
    added = [token.content for token in own.get_added_tokens_decoder().values()][:_ADDED_PROBED]
    spelled = "".join(f"{token} in a text{token}" for token in added)
    for probe in (*PROBES, *([spelled] if spelled else [])):
        ids = own.encode(probe, add_special_tokens=False).ids
        if tokenizer.encode(probe, add_special_tokens=False) != ids or backend.decode(ids) != own.decode(ids):
            return probe
    return None
