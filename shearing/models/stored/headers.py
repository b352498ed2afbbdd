"""Which weights a model's files hold, and whether they are those of its config: from headers alone.

transformers leaves out what a config does not know, and ties a head that differs from the embedding or does not, by its
version; it says so in a line of a log at the most. What is not exactly the config's is refused here before any work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from shearing.errors import ShearingError, key
from shearing.files.permissions import forbidden
from shearing.files.tensors import WRITE_AGAIN
from shearing.models.anatomy import anatomy_of
from shearing.models.stored.expert_files import parts_of
from shearing.models.stored.saving import INDEX, WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DENSE = ("F64", "F32", "F16", "BF16")
_COMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Earlier versions stored these beside weights; they follow from the config."""
_ROWS_AT_ONCE = 4096
_SHOWN = 5
_ALL = "a checkpoint with every parameter of its config, and no other"


def weight_files(folder: Path, *, source: str) -> list[str]:
    """Names of the files that transformers reads a model's weights from; all are there.

    Args:
        folder: of the model.
        source: what the model is called.

    Raises:
        ShearingError: they are pickled, in another format, or some are missing.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise _without_weights(folder, source=source)
    try:
        places: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise forbidden(folder / INDEX, error=error) or ShearingError(
            str(folder / INDEX), value=str(error), allowed="the index of a model's weights", mend="fetch it again"
        ) from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ShearingError(
            "source (weights)",
            value=f"{source} without {_listed(missing)}",
            allowed=f"all files that {INDEX} names",
            mend="the checkpoint is incomplete: fetch or convert it again",
        )
    return names


def is_whole(folder: Path) -> bool:
    """Whether all files are there that a folder's weights should be in."""
    try:
        return bool(weight_files(folder, source=str(folder)))
    except ShearingError:
        return False


def require_weights(folder: Path, *, model: PreTrainedModel, source: str) -> None:
    """Check that a model's files hold the parameters of its config, each in its shape, dense, and no others.

    Of the values only a head is read, and only where the config says that it is tied to the embedding.

    Args:
        folder: of the model.
        model: of its config, with or without weights.
        source: what the model is called.

    Raises:
        ShearingError: see `weight_files`; a parameter is missing, unknown, of another shape or quantised; a tied
            head is not the embedding.
    """
    places, shapes, dtypes = _read_headers(folder, weight_files(folder, source=source))
    prefix, family = f"{model.base_model_prefix}.", anatomy_of(model)
    own = {name: family.own_name(name) for name in places}
    expected = shapes_in_files(model, whole={*own.values(), *(prefix + name for name in own.values())})
    names = {name if name in expected else prefix + name: stored for stored, name in own.items()}
    _refuse_unknown(names, expected=expected, ignored=_ignored(model), source=source)
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    optional = {head} if tied and embedding in names else {embedding} if tied and head in names else set()
    if missing := sorted(expected.keys() - names.keys() - optional):
        raise ShearingError(
            "source (weights)",
            value=missing[:_SHOWN],
            allowed="a checkpoint with every parameter of its config",
            mend="the checkpoint is incomplete: fetch or convert it again",
        )
    for name, shape in expected.items():
        stored = names.get(name)
        if stored is None:
            continue
        if dtypes[stored] not in _DENSE:
            raise ShearingError(
                f"source (parameter {stored})",
                value=dtypes[stored],
                allowed=f"dense weights: {', '.join(_DENSE)}",
                mend="take the model that it was quantised from",
            )
        if shapes[stored] != shape:
            raise ShearingError(
                f"source (parameter {stored})",
                value=f"{list(shapes[stored])} in the files",
                allowed=f"{list(shape)}, as config.json says",
                mend="config.json or the weights are another model's: fetch or convert them again",
            )
    if tied and {head, embedding} <= names.keys():
        _require_equal(folder, places, names[head], names[embedding], source=source)


def shapes_in_files(model: PreTrainedModel, *, whole: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that files of a model have.

    Args:
        model: with or without weights.
        whole: names of parameters that these files have in one piece, where others have parts of them.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name in whole:
            found[name] = tuple(tensor.shape)
            continue
        for part in parts_of(model.config, name, shape=tuple(tensor.shape)):
            found[part.name] = tuple(part.of(tensor).shape)
    return found


def _without_weights(folder: Path, *, source: str) -> ShearingError:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf", ".pth", ".pt"))
    mend = "fetch the weights, or convert them with transformers"
    if pickled:
        # A pickle can run code when it is opened, and cannot be read a few tensors at a time.
        mend = (
            'convert it with transformers: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{source}', dtype='auto').save_pretrained('NEW')\", copy the tokenizer's files to NEW, "
            f"and set {key('source')} to it"
        )
    return ShearingError(
        "source (weights)",
        value=f"{source} with {_listed(pickled or others) or 'no weights'}",
        allowed=f"weights in safetensors files: {WEIGHTS}, or those that {INDEX} names",
        mend=mend,
    )


def _read_headers(
    folder: Path, files: Iterable[str]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, str]]:
    """File, shape and dtype of each tensor."""
    places, shapes, dtypes = {}, {}, {}
    file = ""
    try:
        for file in files:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    described = opened.get_slice(name)
                    places[name] = file
                    shapes[name] = tuple(described.get_shape())
                    dtypes[name] = str(described.get_dtype())
    except (OSError, SafetensorError) as error:
        raise forbidden(folder / file, error=error) or ShearingError(
            str(folder / file), value=str(error), allowed="a whole safetensors file", mend=WRITE_AGAIN
        ) from error
    return places, shapes, dtypes


def _ignored(model: PreTrainedModel) -> list[re.Pattern[str]]:
    said: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [_COMPUTED, *(re.compile(pattern) for pattern in said)]


def _refuse_unknown(
    names: Mapping[str, str], *, expected: Mapping[str, object], ignored: Iterable[re.Pattern[str]], source: str
) -> None:
    unknown = sorted(
        stored
        for name, stored in names.items()
        if name not in expected and not any(pattern.search(stored) for pattern in ignored)
    )
    if not unknown:
        return
    mend = "set what config.json lacks, or take the config that belongs to these weights"
    if all(name.endswith(".bias") for name in unknown):
        mend = "set attention_bias or mlp_bias in config.json to true, if the family has them; else these are another's"
    elif any(re.search(r"scale|zero|quant|absmax|packed|qweight|g_idx", name) for name in unknown):
        mend = "the weights look quantised: take the model that they were quantised from"
    raise ShearingError(
        "source (weights)",
        value=f"{source} with {_listed(unknown)}, which its config does not know",
        allowed=_ALL,
        mend=mend,
    )


def _require_equal(folder: Path, places: Mapping[str, str], head: str, embedding: str, *, source: str) -> None:
    with (
        safe_open(folder / places[head], framework="pt") as of_head,
        safe_open(folder / places[embedding], framework="pt") as of_embedding,
    ):
        first, second = of_head.get_slice(head), of_embedding.get_slice(embedding)
        rows = first.get_shape()[0]
        if all(
            torch.equal(first[start : start + _ROWS_AT_ONCE], second[start : start + _ROWS_AT_ONCE])
            for start in range(0, rows, _ROWS_AT_ONCE)
        ):
            return
    raise ShearingError(
        "source (weights)",
        value=f"{source}: tie_word_embeddings is true, and {head} is not {embedding}",
        allowed="a head that is the embedding, or a config that says that it has its own; as it is, readers disagree",
        mend=f"set tie_word_embeddings to false in config.json to keep {head}, or remove it from the files",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
