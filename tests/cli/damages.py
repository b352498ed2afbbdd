"""What may be wrong with a model, a corpus, a run or a machine, for messages about it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import GPTNeoXForCausalLM
from typer.testing import CliRunner

from shearing.cli.frame import app
from shearing.files import tensors as tensor_files
from shearing.files.durable import read_json, write_json
from shearing.models.stored import saving
from shearing.processes import processes
from shearing.training import trackers
from shearing.training.engines.deepspeed_config import OWNED
from tests.models import tiny


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
    manifest["parts"]["test"]["tokens"] = 0
    write_json(path, manifest)


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
    """Leave one test document of 40 tokens."""
    folder = place.corpus / "digits"
    manifest = read_json(folder / "manifest.json")
    ids = np.fromfile(folder / "test.bin", dtype=manifest["dtype"])[:40]
    ids[-1] = manifest["separator_id"]
    ids.tofile(folder / "test.bin")
    counts = manifest["parts"]["test"]
    counts |= {"tokens": 40, "documents": 1}
    for name, values in (("ends", np.array([40])), ("hashes", np.array([1], dtype=np.uint64))):
        path = folder / f"test_{name}.npy"
        np.save(path, values)
        counts[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(folder / "manifest.json", manifest)


def _run(place: Place, *typed: str) -> None:
    result = CliRunner().invoke(app, [*typed, str(place.recipe)])
    assert result.exit_code == 0, result.output


def _change(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(path).items()}, path)


def _pruned(place: Place) -> Path:
    """Learn the masks, and forget that this is complete: the last checkpoint would be continued from."""
    _run(place, "prune")
    (place.here / "run" / "prune" / "complete.json").unlink()
    [newest] = (place.here / "run" / "prune" / "checkpoints").glob("step-00000006")
    return newest


def _corpus_of_another_text(place: Place) -> None:
    _run(place, "prune")
    path = place.corpus / "digits" / "manifest.json"
    manifest = read_json(path)
    manifest["parts"]["train"]["sha256"] = "0" * 64
    write_json(path, manifest)
    _run(place, "compact")


def _another_model(place: Place) -> None:
    _pruned(place)
    tensors = load_file(place.model / "model.safetensors")
    for name, tensor in tensors.items():
        if "mlp" in name:
            tensors[name] = (tensor[:, :40] if "down_proj" in name else tensor[:40]).contiguous()
    save_file(tensors, place.model / "model.safetensors", metadata={"format": "pt"})
    _config(place, intermediate_size=40)


def _pythia(place: Place) -> None:
    words = read_json(place.model / "config.json")["vocab_size"]
    config = tiny.CONFIGS["gpt_neox"](
        vocab_size=words, hidden_size=32, num_attention_heads=4, intermediate_size=48, eos_token_id=1
    )
    GPTNeoXForCausalLM(config).save_pretrained(place.model)


def _other_fingerprints(place: Place) -> None:
    newest = _pruned(place)
    fingerprints, manifest = newest / "fingerprints.json", newest / "manifest.json"
    content = read_json(fingerprints)
    fingerprints.write_text(json.dumps({**content, min(content): 1}))
    entry = {"bytes": fingerprints.stat().st_size, "crc32": zlib.crc32(fingerprints.read_bytes())}
    write_json(manifest, {**read_json(manifest), fingerprints.name: entry})


def _moments_of_another_model(place: Place) -> None:
    _run(place, "prune")
    _run(place, "compact")
    _change(
        place.here / "run" / "prune" / "moments.safetensors",
        lambda moment: moment[..., :1] if moment.ndim else moment,
    )


def _pickled(place: Place) -> None:
    torch.save(load_file(place.model / "model.safetensors"), place.model / "pytorch_model.bin")
    (place.model / "model.safetensors").unlink()


def _other_names(place: Place) -> None:
    """As a model that was saved without its head."""
    path = place.model / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path)


def _own_head(place: Place) -> None:
    path = place.model / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)


def _biases(place: Place) -> None:
    path = place.model / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, path)


def _sentence_piece(place: Place) -> None:
    (place.model / "tokenizer.json").unlink()
    (place.model / "tokenizer.model").write_bytes(b"pieces")


def _bos(place: Place) -> None:
    """The tokenizer puts a token in front of a text."""
    path = place.model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    tokenizer.save(str(path))


def _masks_of_another_shape(place: Place) -> None:
    _run(place, "prune")
    _change(place.here / "run" / "prune" / "masks.safetensors", torch.ones_like)


def _deepspeed_settings(place: Place) -> None:
    settings: dict[str, Any] = {"train_batchsize": 4}
    for name in OWNED:
        *sections, last = name.split(".")
        inner = settings
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = 4
    (place.here / "deepspeed.json").write_text(json.dumps(settings))


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
    "no folder": lambda place: shutil.rmtree(place.model),
    "refused config": lambda place: _config(place, num_attention_heads="four"),
    "quantised": lambda place: _config(place, quantization_config={"quant_method": "gptq", "bits": 4}),
    "pickled weights": _pickled,
    "own head": _own_head,
    "unknown biases": _biases,
    "SentencePiece alone": _sentence_piece,
    "texts that begin with a token": _bos,
    "another family": lambda place: _config(place, model_type="gpt2"),
    "a Pythia": _pythia,
    "no tokenizer": lambda place: [path.unlink() for path in place.model.glob("tokenizer*")],
    "a weight missing": lambda place: _weights(place, without="model.layers.1.mlp.up_proj.weight"),
    "a weight not finite": lambda place: _weights(place, nan="model.layers.1.mlp.up_proj.weight"),
    "masks without manifest": lambda place: save_file({"x": torch.zeros(1)}, place.model / "masks.safetensors"),
    "list": lambda place: (place.here / "list.json").write_text("[]"),
    "losses at another length": lambda place: write_json(
        place.here / "losses.json", {"losses": {}, "conditions": {"sequence_length": 8}}
    ),
    "losses below 0": lambda place: write_json(place.here / "losses.json", {"letters": -1, "digits": 1}),
    "settings of DeepSpeed": _deepspeed_settings,
    "corpus of another text": _corpus_of_another_text,
    "another model": _another_model,
    "other fingerprints": _other_fingerprints,
    "moments of another model": _moments_of_another_model,
    "masks of another shape": _masks_of_another_shape,
    "full disk while converting": _other_names,
}


def _on_full_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor_files, "save_file", _full)
    for module in (tensor_files, saving):
        patch.setattr(module, "opened_in_turn", _full)


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _without_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)


def _as_second_on_one_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "1")):
        patch.setenv(name, value)


def _as_one_of_two(patch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        patch.setenv(name, value)
    patch.setattr(processes, "_meet", lambda *_, **__: vars(torch.distributed)["HashStore"]())


def _without_trackers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trackers, "_is_installed", lambda _: False)


def _with_failing_trackers(patch: pytest.MonkeyPatch) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no account")

    patch.setattr(trackers, "_is_installed", lambda _: True)
    patch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", fail)


SURROUNDINGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "full disk": _on_full_disk,
    "full disk while converting": _on_full_disk,
    "no GPU": _without_gpu,
    "second of one GPU": _as_second_on_one_gpu,
    "one of two": _as_one_of_two,
    "no trackers": _without_trackers,
    "failing trackers": _with_failing_trackers,
}
