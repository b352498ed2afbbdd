"""What people read when a corpus, a model or a folder cannot be used: whole messages, by what was typed.

The components that find these out know nothing of recipes and options; here is that their words arrive under the names
that people know. `messages.txt` has one part for each situation; paths of the test are INPUTS and HERE.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from shearing.cli.frame import app
from shearing.files import tensors as tensor_files
from shearing.files.durable import read_json, write_json
from tests.conftest import tiny_recipe_data

MESSAGES = Path(__file__).with_name("messages.txt")


@dataclass(frozen=True)
class Place:
    """Folders of one situation.

    Attributes:
        here: where the command may write.
        model, corpus: copies to damage.
        recipe: over these, of all stages.
    """

    here: Path
    model: Path
    corpus: Path
    recipe: Path


def _index(place: Place, **changes: Any) -> None:
    write_json(place.corpus / "corpus.json", {**read_json(place.corpus / "corpus.json"), **changes})


def _manifests(place: Place, **changes: Any) -> None:
    for domain in ("letters", "digits"):
        path = place.corpus / domain / "manifest.json"
        write_json(path, {**read_json(path), **changes})


def _empty(place: Place) -> None:
    path = place.corpus / "digits" / "manifest.json"
    manifest = read_json(path)
    write_json(path, {**manifest, "heldout": {**manifest["heldout"], "tokens": 0}})


def _config(place: Place, **changes: Any) -> None:
    path = place.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _weights(place: Place, *, without: str | None = None, nan: str | None = None) -> None:
    tensors = load_file(place.model / "model.safetensors")
    if without:
        del tensors[without]
    if nan:
        tensors[nan][0] = torch.nan
    save_file(tensors, place.model / "model.safetensors", metadata={"format": "pt"})


def _short(place: Place) -> None:
    """Leave one held-out document of 40 tokens."""
    folder = place.corpus / "digits"
    manifest = read_json(folder / "manifest.json")
    ids = np.fromfile(folder / "heldout.bin", dtype=manifest["dtype"])[:40]
    ids[-1] = manifest["separator_id"]
    ids.tofile(folder / "heldout.bin")
    counts = manifest["heldout"]
    counts |= {"tokens": 40, "documents": 1}
    for name, values in (("ends", np.array([40])), ("hashes", np.array([1], dtype=np.uint64))):
        path = folder / f"heldout_{name}.npy"
        np.save(path, values)
        counts[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(folder / "manifest.json", manifest)


DAMAGES: dict[str, Callable[[Place], object]] = {
    "nothing": lambda _: None,
    "no corpus": lambda place: shutil.rmtree(place.corpus),
    "unfinished corpus": lambda place: (place.corpus / "corpus.json").unlink(),
    "corpus of another format": lambda place: _index(place, format=0),
    "corpus of another tokenizer": lambda place: _manifests(place, tokenizer_fingerprint="0" * 32),
    "corpus beyond the vocabulary": lambda place: _manifests(place, largest_token=1000),
    "empty split": _empty,
    "short": _short,
    "no config": lambda place: (place.model / "config.json").unlink(),
    "unreadable config": lambda place: (place.model / "config.json").write_text("{"),
    "another family": lambda place: _config(place, model_type="gpt2"),
    "no tokenizer": lambda place: [path.unlink() for path in place.model.glob("tokenizer*")],
    "a weight missing": lambda place: _weights(place, without="model.layers.1.mlp.up_proj.weight"),
    "a weight not finite": lambda place: _weights(place, nan="model.layers.1.mlp.up_proj.weight"),
    "masks without manifest": lambda place: save_file({"x": torch.zeros(1)}, place.model / "masks.safetensors"),
}
ONE_SHOT = "MODEL --criterion wanda --pattern 2:4 --calibration CORPUS --samples 4 --seqlen 16 -o HERE/out"
EVALUATED = f"{ONE_SHOT.replace('CORPUS', 'INPUTS/corpus')} --evaluate CORPUS"
MEASURE = "data reference-loss measure --corpus CORPUS --model MODEL -o HERE/t.json --sequence-length 16"
DENSE = "run RECIPE prune=null target=null"
CORPORA = [
    "no corpus",
    "unfinished corpus",
    "corpus of another format",
    "corpus of another tokenizer",
    "corpus beyond the vocabulary",
    "empty split",
]
MODELS = ["no config", "unreadable config", "another family"]
WEIGHTS = ["a weight missing", "a weight not finite"]
SITUATIONS = [
    *((damage, "run RECIPE") for damage in (*CORPORA, *MODELS, *WEIGHTS, "no tokenizer", "full disk")),
    *((damage, DENSE) for damage in (*WEIGHTS, "masks without manifest", "full disk")),
    *((damage, "config check RECIPE") for damage in ("no corpus", "another family")),
    *((damage, "plan RECIPE") for damage in ("no config", "another family")),
    *((damage, "eval RECIPE") for damage in ("no corpus", "another family", "masks without manifest", *WEIGHTS)),
    ("nothing", "run RECIPE data.domains=[letters,digit]"),
    ("nothing", "run RECIPE data.domains=[]"),
    ("short", "run RECIPE data.sequence_length=64 mixture.heldout_tokens=64"),
    ("nothing", "compact RECIPE"),
    ("nothing", "run RECIPE prune.batch_size=8tokens"),
    ("nothing", f"{DENSE} pretrain.lora={{targets:[other]}}"),
    *(
        ("nothing", f"{DENSE} sparsify.criterion=wanda sparsify.calibration=[INPUTS/corpus] {keys}")
        for keys in (
            "sparsify.pattern='3:5'",
            "sparsify.pattern='2:4' sparsify.samples=100000",
            "sparsify.pattern='2:4' sparsify.seqlen=128",
            "sparsify.pattern='2:4' sparsify.samples=4 sparsify.exclude=[other]",
        )
    ),
    *(
        (damage, f"{DENSE} sparsify.criterion=wanda sparsify.pattern='2:4' sparsify.samples=4 sparsify.seqlen=16")
        for damage in ("a weight not finite", "full disk")
    ),
    *((damage, f"sparsify {ONE_SHOT}") for damage in (*CORPORA, *MODELS, *WEIGHTS, "full disk")),
    *((damage, f"sparsify {EVALUATED}") for damage in CORPORA if damage != "corpus of another format"),
    ("short", f"sparsify {EVALUATED} --seqlen 64"),
    *((damage, f"allocate {ONE_SHOT}.json --allocation rank") for damage in ("no corpus", "another family", *WEIGHTS)),
    *((damage, "data inspect CORPUS") for damage in ("no corpus", "unfinished corpus", "empty split")),
    ("nothing", "data inspect CORPUS --recipe HERE/other.yaml"),
    *((damage, "data verify CORPUS") for damage in ("no corpus", "unfinished corpus")),
    ("nothing", f"{MEASURE} --domain letter"),
    ("short", MEASURE.replace("16", "64")),
    *((damage, MEASURE) for damage in ("no corpus", "empty split", "no config", "another family", *WEIGHTS)),
    *(
        (damage, "data reference-loss source RECIPE -o HERE/r.json")
        for damage in ("no corpus", "corpus of another tokenizer", "another family", *WEIGHTS)
    ),
]


def _said(place: Place, *, inputs: Path, damage: str, typed: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command prints about a damage, without what differs from run to run."""
    if damage == "full disk":
        monkeypatch.setattr(tensor_files, "save_file", _full)
    else:
        DAMAGES[damage](place)
    words = {"RECIPE": place.recipe, "MODEL": place.model, "CORPUS": place.corpus, "HERE": place.here, "INPUTS": inputs}
    arguments = re.sub("|".join(words), lambda match: str(words[match[0]]), typed).split()
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "1000"})
    said = result.stderr if result.exit_code == 2 else result.stdout
    for name, path in (("HERE", place.here), ("INPUTS", inputs)):
        said = said.replace(str(path), name)
    said = re.sub(r"with [0-9.]+ GB free", "with # GB free", said)
    said = re.sub(r"(the network|the tokenizer's files) \(.*\)", r"\1 (#)", said)
    return f"exit code {result.exit_code}\n" + "".join(f"{line.rstrip()}\n" for line in said.splitlines())


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _expected() -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", MESSAGES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture
def place(tiny_inputs: Path, tmp_path: Path) -> Place:
    model, corpus = tmp_path / "model", tmp_path / "corpus"
    shutil.copytree(tiny_inputs / "model", model)
    shutil.copytree(tiny_inputs / "corpus", corpus)
    for name, domains in (("recipe", None), ("other", ["letter"])):
        data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run")
        data["model"]["source"] = str(model)
        data["data"] |= {"corpus": str(corpus), "domains": domains}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return Place(here=tmp_path, model=model, corpus=corpus, recipe=tmp_path / "recipe.yaml")


@pytest.mark.parametrize(("damage", "typed"), SITUATIONS, ids=[f"{damage}: {typed}" for damage, typed in SITUATIONS])
def test_messages(place: Place, tiny_inputs: Path, monkeypatch: pytest.MonkeyPatch, damage: str, typed: str) -> None:
    said = _said(place, inputs=tiny_inputs, damage=damage, typed=typed, monkeypatch=monkeypatch)
    assert said == _expected()[f"{damage}: {typed}"]


def test_there_is_no_message_too_many() -> None:
    assert list(_expected()) == [f"{damage}: {typed}" for damage, typed in SITUATIONS]
