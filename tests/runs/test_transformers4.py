"""Results opened by transformers 4.57 itself, where it is: `make test-transformers4`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shearing.models.stored.saving import write_model
from shearing.runs.recipe import load_recipe
from shearing.runs.stages.run import run
from tests.models.stored.test_spellings import CASES, config
from tests.models.tiny import CONFIGS, tiny_model

VERSION_4 = os.environ.get("SHEARING_TRANSFORMERS4")
pytestmark = pytest.mark.skipif(VERSION_4 is None, reason="make test-transformers4")

TOKENS, TEXT = torch.arange(40).view(2, 20) % 11, "abc 019"
SCRIPT = """
import json, os, sys
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4.57"), transformers.__version__
tokens, text, *folders = json.loads(sys.stdin.read())
logits = {}
for folder in folders:
    model, report = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits[folder] = model.eval()(torch.tensor(tokens)).logits.contiguous()
    if not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        continue
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(json.dumps([folder, type(tokenizer).__name__, tokenizer(text)["input_ids"]]))
save_file(logits, sys.argv[1])
"""


def read_by_version_4(folders: list[Path], *, scratch: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[Any]]]:
    """Logits by folder, and of those with a tokenizer its class and tokens."""
    assert VERSION_4 is not None
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(scratch / "logits.safetensors")],
        input=json.dumps([TOKENS.tolist(), TEXT, *map(str, folders)]),
        env={**os.environ, "PYTHONPATH": str(Path(VERSION_4).resolve())},
        cwd=scratch,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Unrecognized keys" not in done.stderr
    assert "must be a float" not in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return load_file(scratch / "logits.safetensors"), {folder: of for folder, *of in lines}


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def test_models_of_every_family_and_kind_of_rope(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {family: tiny_model(family, tied=bool(index % 2)) for index, family in enumerate(CONFIGS)}
    models |= {
        name: AutoModelForCausalLM.from_config(config(**json.loads(json.dumps(CASES[name][0])))) for name in CASES
    }
    for name, model in models.items():
        write_model(model, tmp_path / name)
    found, _ = read_by_version_4([tmp_path / name for name in models], scratch=tmp_path)
    for name, model in models.items():
        torch.testing.assert_close(found[str(tmp_path / name)], logits_of(model), rtol=1e-4, atol=1e-5, msg=name)


def test_results_of_a_run(tiny_recipe: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_inputs / "model", tmp_path / "source")
    said = json.loads((source / "config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    said["rope_parameters"] = {**rope, "rope_theta": 500_000.0, "original_max_position_embeddings": 32}
    (source / "config.json").write_text(json.dumps(said))
    # As sources of today have it; version 5 saves another class, which 4 does not know.
    of_tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps({**of_tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    overrides = [f"model.source={source}", "sparsify={criterion: magnitude, pattern: '2:4'}"]
    recipe = load_recipe(tiny_recipe, overrides=overrides)
    directory = run(recipe, stages=("prune", "compact", "sparsify", "pretrain"))
    folders = [directory.compact, directory.sparse, directory.model]
    logits, tokenizers = read_by_version_4(folders, scratch=tmp_path)
    for folder in folders:
        expected = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        torch.testing.assert_close(logits[str(folder)], expected, rtol=1e-4, atol=1e-5)
        name, tokens = tokenizers[str(folder)]
        assert name == "PreTrainedTokenizerFast"
        assert tokens == AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"]
