"""GGUF files read by llama.cpp itself, where it is: `make test-llama-cpp`. Its tokens and its logits are ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from shearing.models.stored.saving import write_model
from shearing.runs.export.export import export
from shearing.runs.export.gguf_file import round_as
from tests.models.tiny import tiny_model
from tests.repository import ROOT
from tests.runs.export.tokenizers import TEXTS, write_tokenizer

LLAMA_CPP = os.environ.get("SHEARING_LLAMA_CPP")
pytestmark = pytest.mark.skipif(LLAMA_CPP is None, reason="make test-llama-cpp")

ROWS = 416
DEMO = ROOT / "runs" / "demo-data" / "model"
SCRIPT = """
import json, sys, urllib.request
import xllamacpp as llama

path, texts = json.loads(sys.stdin.read())
settings = llama.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = path, 256, 1, False
settings.cpuparams.n_threads = 1
settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
server = llama.Server(settings)

def ask(route, **body):
    sent = urllib.request.Request(server.listening_address + route, json.dumps(body).encode())
    return json.load(urllib.request.urlopen(sent))

found = []
for text in texts:
    tokens = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
    # The first tokens of the alphabet would be bytes that are no text yet, of which it tells no probabilities.
    said = ask("/completion", prompt=tokens, n_predict=1, n_probs=20, temperature=0.0, cache_prompt=False)
    top = said.get("completion_probabilities") or [{"top_logprobs": []}]
    found.append([tokens, [[each["id"], each["logprob"]] for each in top[0]["top_logprobs"]]])
print("found", json.dumps(found))
"""


def read_by_llama_cpp(path: Path, *, texts: list[str]) -> list[Any]:
    """Tokens of each text, and the largest log-probabilities after it with their tokens."""
    assert LLAMA_CPP is not None
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([str(path), texts]),
        env={**os.environ, "PYTHONPATH": str(Path(LLAMA_CPP).resolve())},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    assert said, done.stderr[-3000:]
    found: list[Any] = json.loads(said[0].removeprefix("found "))
    return found


def compare(folder: Path, *, kind: str, within: float, marks_differ: bool = False) -> int:
    """Compare a folder's model and tokenizer with its GGUF file in llama.cpp; log-probabilities compared."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    round_as(model, kind=kind)
    texts = [*TEXTS, "<|im_start|>user\nHow much is 12 + 345?"]
    if marks_differ:
        texts = [text.replace("\u0301", "") for text in texts]
    apart = []
    found = read_by_llama_cpp(folder / f"model-{kind}.gguf", texts=texts)
    for text, (tokens, top) in zip(texts, found, strict=True):
        assert tokens == tokenizer.encode(text).ids, text
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        apart += [abs(said - float(expected[token])) for token, said in top]
    mean = sum(apart) / max(len(apart), 1)
    print(f"{kind}: {len(apart)} log-probabilities, {max(apart, default=0):.1e} apart at most, {mean:.1e} on average")
    assert max(apart, default=0) <= within
    return len(apart)


@pytest.mark.parametrize(
    ("family", "tokens", "bos"),
    [
        ("llama", "smollm", False),
        ("llama-mha", "gpt-2", False),
        ("llama-biases", "llama", True),
        ("llama-rope-scaling", "llama-bpe", True),
        ("mistral", "tekken", True),
        ("mistral", "llama", False),
        ("qwen2", "qwen2", False),
        ("qwen3", "qwen2", False),
    ],
)
def test_every_family_and_tokenizer(family: str, tokens: str, bos: bool, tmp_path: Path) -> None:
    sizes = {"mistral": {"sliding_window": None}, "qwen2": {"head_dim": 6}}.get(family, {})
    model = tiny_model(family, vocab_size=ROWS, max_position_embeddings=256, tied=family != "qwen2", **sizes)
    write_model(model, tmp_path / "source")
    write_tokenizer(tmp_path / "source", name=tokens, bos=bos)
    export(str(tmp_path / "source"), output=tmp_path / "out", gguf="f32", console=Console(quiet=True))
    compare(tmp_path / "out", kind="f32", within=2e-2, marks_differ=tokens == "tekken")


@pytest.mark.skipif(not DEMO.is_dir(), reason="make demo")
@pytest.mark.parametrize(("kind", "within"), [("f32", 1e-2), ("f16", 5e-2), ("q8_0", 0.6)])
def test_a_real_model(kind: str, within: float, tmp_path: Path) -> None:
    # llama.cpp rounds what it multiplies q8_0 and f16 with to the same kinds.
    export(str(DEMO), output=tmp_path / "out", gguf=kind, console=Console(quiet=True))
    assert compare(tmp_path / "out", kind=kind, within=within) >= 100
