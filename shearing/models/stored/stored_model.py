"""The dense model on disk: its config, and its weights a few at a time, whatever its size."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shearing.errors import ShearingError, named
from shearing.files.tensors import DTYPES, Entry, read_header, read_tensors
from shearing.models.anatomy import anatomy_of
from shearing.models.families import FAMILIES
from shearing.models.loading import load_config, load_source, said_of_config, skeleton
from shearing.models.place import require_place
from shearing.models.stored import headers
from shearing.models.stored.companions import companions, copy_companions, folder_of
from shearing.models.stored.saving import INDEX, write_model
from shearing.models.stored.structure import Structure, structure_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


STORED = frozenset({".safetensors", ".bin", ".gguf"})
WEIGHT_FILES = ("*.safetensors",)

NOT_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "use_cache"})
"""Keys of a config that no fingerprint depends on."""

_BEGINNING = 4096
"""Bytes of a tensor that its model's fingerprint is made of."""


@dataclass(frozen=True)
class Source:
    """A dense model in safetensors files.

    Attributes:
        folder: where its files are.
        config: of Hugging Face.
        files: tensor name -> file in `folder`.
        entries: tensor name -> where it is in its file.
        identity: file -> size and time of change of the weights that were found, converted or not.
        stored_names: tensor name -> what its file calls it, where that is another name.
        structure: of a model that no family declares, whose tensors have the names of its files; else None.
    """

    folder: Path
    config: PretrainedConfig
    files: dict[str, str]
    entries: dict[str, Entry]
    identity: dict[str, list[int]]
    stored_names: dict[str, str] = field(default_factory=dict)
    structure: Structure | None = None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, on the CPU, as they are stored.

        Raises:
            ShearingError: a tensor holds NaN or infinity.
        """
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, of_file in wanted.items():
            stored = {self.stored_names.get(name, name): name for name in of_file}
            tensors |= {stored[name]: tensor for name, tensor in read_tensors(self.folder / file, stored).items()}
        for name, tensor in tensors.items():
            _require_finite(tensor, name=name, folder=self.folder)
        return tensors

    @property
    def fingerprint(self) -> str:
        """Hash of the config, and of every tensor's dtype, shape and beginning (hexadecimal, 32 digits).

        A copy of the model has the same one.
        """
        config = {key: value for key, value in self.config.to_dict().items() if key not in NOT_THE_MODEL}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        of_file: dict[str, list[str]] = {}
        for name in sorted(self.entries):
            of_file.setdefault(self.files[name], []).append(name)
        for file, names in of_file.items():
            with (self.folder / file).open("rb") as opened:
                for name in names:
                    entry = self.entries[name]
                    digest.update(repr((name, entry.dtype, entry.shape)).encode())
                    opened.seek(entry.begin)
                    digest.update(opened.read(min(_BEGINNING, entry.end - entry.begin)))
        return digest.hexdigest()[:32]

    def weight_files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted(set(self.files.values()))

    def weight_bytes(self) -> int:
        """Size of the files that hold tensors."""
        return sum((self.folder / name).stat().st_size for name in self.weight_files())

    def bytes_of(self, names: Iterable[str]) -> int:
        """Size of some tensors, as they are stored."""
        return sum(self.entries[name].end - self.entries[name].begin for name in names)

    def other_files(self) -> list[str]:
        """Config, index of the weights, tokenizer, chat templates and the like, as paths from the folder."""
        of_weights = [name for name in ("config.json", INDEX) if (self.folder / name).is_file()]
        return [*of_weights, *companions(self.folder)]


@named({"source": "model"})
def open_source(name: str, *, revision: str | None, converted: Path) -> Source:
    """Find a model's files; no weights are read.

    Args:
        name: folder or hub name.
        revision: of a hub name.
        converted: folder to which a model is written whose safetensors files have other names of parameters than its
            own, as those of a model that was saved without its head; it is made in memory, once.

    Raises:
        ShearingError: see `load_config`, `headers.require_weights`.
        OSError, SafetensorError: it cannot be written to `converted`; see `files.full_disk`.
    """
    config = load_config(name, revision=revision)
    folder = folder_of(name, revision=revision, also=WEIGHT_FILES)
    built = skeleton(config)
    headers.require_weights(folder, model=built, source=name)
    needed = set(headers.shapes_in_files(built))
    if getattr(config, "tie_word_embeddings", False):
        needed.discard(f"{anatomy_of(config).head}.weight")
    source = _opened(folder, config, original=folder)
    if not needed <= source.files.keys():
        if not (converted / "config.json").is_file():
            dtype = dtype_of_weights(str(folder), config=config)
            _convert(name, revision=revision, dtype=dtype, folder=folder, converted=converted)
        source = _opened(converted, config, original=folder)
    return source


@named({"source": "model"})
def open_any(name: str, *, revision: str | None, converted: Path, towers: bool) -> Source:
    """As `open_source`, and models of any other architecture of transformers, by their structure.

    Args:
        name, revision, converted: see `open_source`.
        towers: whether towers for images and sound of such a model count.

    Raises:
        ShearingError: see `open_source`; transformers does not know the architecture; `structure_of`.
    """
    from transformers import AutoConfig, PretrainedConfig as PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    require_place(name, revision=revision)
    values: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # which are said below
        values = PreTrainedConfig.get_config_dict(name, revision=revision)[0]
    known = values.get("model_type")
    if known in FAMILIES or known not in CONFIG_MAPPING or values.get("quantization_config"):
        return open_source(name, revision=revision, converted=converted)
    folder = folder_of(name, revision=revision, also=WEIGHT_FILES)
    with said_of_config(name):
        config = AutoConfig.from_pretrained(folder)
    entries, files = _entries(folder)
    with said_of_config(name):
        structure = structure_of(config, stored=entries, towers=towers)
    return Source(folder, config, files, entries, _identity(folder), structure=structure)


def stored_fingerprint(name: str, *, revision: str | None) -> str:
    """Hash of a model as it is stored: its config, and of its weights what tells two models apart at once.

    Of a folder that is every weight file's size, and of each of its tensors the beginning; a copy has the same hash. Of
    a name on the hub it is the name and the commit.

    Args:
        name: folder or hub name.
        revision: of a hub name.

    Raises:
        ShearingError: no such model.
    """
    config = load_config(name, revision=revision)
    if not Path(name).is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None) or revision or 'main'}"
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for path in sorted(path for path in Path(name).iterdir() if path.suffix in STORED):
        digest.update(repr((path.name, path.stat().st_size)).encode())
        begins = [0]
        if path.suffix == ".safetensors":
            entries, _ = read_header(path)
            begins += sorted(entry.begin for entry in entries.values())
        with path.open("rb") as file:
            for begin in begins:
                file.seek(begin)
                digest.update(file.read(_BEGINNING))
    return digest.hexdigest()[:32]


def require_finite(folder: Path) -> None:
    """Check the stored weights of a model, one tensor at a time.

    Raises:
        ShearingError: a tensor holds NaN or infinity.
    """
    for path in sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        entries, _ = read_header(path)
        for name in entries:
            _require_finite(read_tensors(path, [name])[name], name=name, folder=folder)


def _require_finite(tensor: Tensor, *, name: str, folder: Path) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ShearingError(
            f"model (parameter {name})",
            value=str(folder),
            allowed="finite weights",
            mend="the checkpoint holds NaN or infinity: fetch or convert it again",
        )


def dtype_of_weights(name: str, *, config: PretrainedConfig) -> torch.dtype:
    """Dtype that most of a model's weights are stored in; what its config says where they are not here to be seen.

    Args:
        name: folder or hub name.
        config: the model's.

    Returns:
        fp32, bf16 or fp16; fp32 for weights of more.
    """
    elements: Counter[torch.dtype | None] = Counter()
    folder = Path(name)
    for file in headers.weight_files(folder, source=name) if folder.is_dir() and headers.is_whole(folder) else ():
        for entry in read_header(folder / file)[0].values():
            elements[DTYPES.get(entry.dtype)] += math.prod(entry.shape)
    said = elements.most_common(1)[0][0] if elements else getattr(config, "dtype", None)
    return said if said in (torch.bfloat16, torch.float16) else torch.float32


def dtype_of(source: Source, name: str) -> torch.dtype:
    """Dtype in which a tensor is stored."""
    return DTYPES[source.entries[name].dtype]


def _opened(folder: Path, config: PretrainedConfig, *, original: Path) -> Source:
    entries, files = _entries(folder)
    own_name = anatomy_of(config).own_name
    own = {own_name(stored): stored for stored in entries}
    return Source(
        folder,
        config,
        {name: files[stored] for name, stored in own.items()},
        {name: entries[stored] for name, stored in own.items()},
        _identity(original),
        {name: stored for name, stored in own.items() if name != stored},
    )


def _entries(folder: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensor -> where it is in its file, and in which file."""
    files: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    for name in headers.weight_files(folder, source=str(folder)):
        of_file, _ = read_header(folder / name)
        entries |= of_file
        files |= dict.fromkeys(of_file, name)
    return entries, files


def _identity(folder: Path) -> dict[str, list[int]]:
    stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.suffix in STORED}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _convert(name: str, *, revision: str | None, dtype: torch.dtype, folder: Path, converted: Path) -> None:
    beside = converted.with_name(f".{converted.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    model = load_source(name, revision=revision, dtype=dtype)
    try:
        write_model(model, beside)
        copy_companions(folder, to=beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    beside.rename(converted)
