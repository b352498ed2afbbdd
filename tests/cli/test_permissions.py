"""Files that may not be read are not called damaged, missing or out of reach: the mend of those would lose them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_recipe_data

CHECK, VERIFY = "config check HERE/recipe.yaml", "data verify HERE/corpus"
SPARSIFY = "sparsify HERE/model --criterion magnitude --sparsity 0.5 -o HERE/out"
PREPARE = "data prepare --domain a=HERE/text --tokenizer HERE/model --workers 1 -o HERE/made"
SITUATIONS = [
    ("corpus/letters/train.bin", CHECK),
    ("corpus/letters/train.bin", VERIFY),
    ("corpus/letters/validation_ends.npy", CHECK),
    ("corpus/letters/test_hashes.npy", VERIFY),
    ("corpus/letters/manifest.json", VERIFY),
    ("corpus/letters", VERIFY),
    ("corpus/corpus.json", VERIFY),
    ("corpus/tokenizer.json", VERIFY),
    ("model/config.json", SPARSIFY),
    ("model/model.safetensors", SPARSIFY),
    ("model/tokenizer.json", CHECK),
    ("model", SPARSIFY),
    ("text/more/b.jsonl", PREPARE),
    ("text/more", PREPARE),
    ("text", PREPARE),
    # Behind a link into a folder that may not be entered.
    ("closed", "sparsify HERE/linked --criterion magnitude --sparsity 0.5 -o HERE/out"),
    ("closed", "data verify HERE/linked-corpus"),
]
CHILD = """
import json, os, sys
from pathlib import Path
from typer.testing import CliRunner
from shearing.cli import app
here = Path(sys.argv[1])
said = []
for name, typed in json.loads(sys.argv[2]):
    mode = (here / name).stat().st_mode
    (here / name).chmod(0)
    result = CliRunner().invoke(app, typed.replace("HERE", str(here)).split(), env={"COLUMNS": "1000"})
    (here / name).chmod(mode)
    said.append([result.exit_code, result.output, repr(result.exception)])
print(json.dumps(said))
"""
CAPABILITIES = "-dac_override,-dac_read_search"


def test_what_may_not_be_read_is_said(tiny_inputs: Path, tmp_path: Path) -> None:
    for name in ("model", "corpus"):
        shutil.copytree(tiny_inputs / name, tmp_path / name)
    if not (tmp_path / "corpus" / "tokenizer.json").exists():
        shutil.copy(tmp_path / "model" / "tokenizer.json", tmp_path / "corpus")
    (tmp_path / "text" / "more").mkdir(parents=True)
    for file in ("a.jsonl", "more/b.jsonl"):
        (tmp_path / "text" / file).write_text("".join(json.dumps({"text": letter}) + "\n" for letter in "abcd"))
    for name, link in (("model", "linked"), ("corpus", "linked-corpus")):
        shutil.copytree(tmp_path / name, tmp_path / "closed" / name)
        (tmp_path / link).symlink_to(tmp_path / "closed" / name)
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run")
    data["model"]["source"] = str(tmp_path / "model")
    data["data"]["corpus"] = str(tmp_path / "corpus")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    without = []
    if os.geteuid() == 0:  # for whom permissions count only without these capabilities
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything")
        without = ["setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}"]
    command = [*without, sys.executable, "-c", CHILD, str(tmp_path), json.dumps(SITUATIONS)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(child.stdout.splitlines()[-1])
    for (name, typed), (code, output, exception) in zip(SITUATIONS, results, strict=True):
        said = f"there is no read permission for {tmp_path / name}: mend the permission"
        assert code in (1, 2), (name, typed, output, exception)
        assert said in output, (name, typed, output)
