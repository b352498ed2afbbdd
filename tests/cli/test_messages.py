"""What people read when a corpus, a model or a folder cannot be used: whole messages, by what was typed.

The components that find these out know nothing of recipes and options; here is that their words arrive under the names
that people know. `messages.txt` has one part for each situation; paths are INPUTS, HERE and PYTHON.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from shearing.cli.frame import app
from tests.cli.damages import DAMAGES, SURROUNDINGS, Place
from tests.conftest import tiny_recipe_data

MESSAGES = Path(__file__).with_name("messages.txt")
ONE_SHOT = "MODEL --criterion wanda --pattern 2:4 --calibration CORPUS --samples 4 --seqlen 16 -o HERE/out"
EVALUATED = f"{ONE_SHOT.replace('CORPUS', 'INPUTS/corpus')} --evaluate CORPUS"
MEASURE = "data reference-loss measure --corpus CORPUS --model MODEL -o HERE/t.json --sequence-length 16"
PREPARE = "data prepare --domain a=HERE/recipe.yaml --tokenizer MODEL -o HERE/made"
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
SOURCES = [
    "no folder",
    "refused config",
    "quantised",
    "pickled weights",
    "own head",
    "unknown biases",
    "SentencePiece alone",
    "texts that begin with a token",
]
WEIGHTS = ["a weight missing", "a weight not finite"]
FULL = ["full disk", "full disk while converting"]
LOSSES = ["losses at another length", "losses below 0"]
SITUATIONS = [
    *((damage, "run RECIPE") for damage in (*CORPORA, *MODELS, *WEIGHTS, "no tokenizer", "full disk")),
    *((damage, DENSE) for damage in (*WEIGHTS, "masks without manifest", "full disk")),
    *((damage, "config check RECIPE") for damage in ("no corpus", "another family")),
    *((damage, "plan RECIPE") for damage in ("no config", "another family")),
    *((damage, "eval RECIPE") for damage in ("no corpus", "another family", "masks without manifest", *WEIGHTS)),
    *((damage, "config check RECIPE") for damage in SOURCES),
    *((damage, f"sparsify {ONE_SHOT}") for damage in SOURCES),
    *((damage, "export MODEL -o HERE/out") for damage in SOURCES[:-2]),
    *((damage, PREPARE) for damage in ("no folder", "SentencePiece alone", "no tokenizer")),
    ("nothing", "export INPUTS/nothing -o HERE/out"),
    ("nothing", "config check RECIPE model.source=tests/nothing"),
    ("nothing", "config check RECIPE data.bos=row"),
    ("nothing", "run RECIPE data.domains=[letters,digit]"),
    ("nothing", "run RECIPE data.domains=[]"),
    ("short", "run RECIPE data.sequence_length=64 mixture.heldout_tokens=64"),
    ("nothing", "compact RECIPE"),
    ("nothing", "compare RECIPE --methods start --tokens 20"),
    ("nothing", "compare RECIPE --methods start --tokens many"),
    ("nothing", "compare RECIPE --methods start --tokens 320 --refit maybe"),
    ("no corpus", "compare RECIPE --methods start --tokens 320"),
    ("nothing", "search RECIPE search.parameters=10 -o HERE/out"),
    ("nothing", "search RECIPE search.memory=1GB -o HERE/out"),
    ("nothing", "search RECIPE -o HERE/out --join"),
    ("no corpus", "search RECIPE -o HERE/out"),
    ("nothing", 'config check RECIPE target=[{"hidden_size":16},{"hidden_size":24}]'),
    ("nothing", 'config check RECIPE target=[{"hidden_size":32},{"hidden_size":24}]'),
    ("nothing", 'config check RECIPE family={"sizes":{"a":{"hidden_size":14},"b":{"hidden_size":15}}}'),
    ("nothing", 'run RECIPE family={"sizes":{}}'),
    ("nothing", "run RECIPE prune.batch_size=8tokens"),
    *(
        ("nothing", f"config check RECIPE {keys}")
        for keys in (
            "target.hidden_size=64",
            "target.num_attention_heads=3",
            "target.parameters=4000 target.uniform=true",
            "target.uniform=true prune.granularities=[layers,sublayers] mixture.update=robust mixture.step_size=2",
            "mixture.floor=0.5 prune.granularities=[]",
            'mixture.initial_weights={"letter":1}',
            'mixture.initial_weights={"letters":1} mixture.reference={"letters":1}',
            "mixture.reference=HERE/nowhere.json",
            "training.engine=deepspeed training.deepspeed.config=HERE/nowhere.json",
        )
    ),
    ("a Pythia", "config check RECIPE target.hidden_size=24"),
    ("a Pythia", "config check RECIPE prune.granularities=[sublayers,kv_groups,intermediate,hidden]"),
    ("list", "config check RECIPE mixture.reference=HERE/list.json"),
    *((damage, "config check RECIPE mixture.reference=HERE/losses.json") for damage in LOSSES),
    ("list", "config check RECIPE training.engine=deepspeed training.deepspeed.config=HERE/list.json"),
    (
        "settings of DeepSpeed",
        "config check RECIPE training.engine=deepspeed training.deepspeed.config=HERE/deepspeed.json",
    ),
    ("no GPU", "run RECIPE training.device=cuda"),
    ("second of one GPU", "run RECIPE training.device=cuda"),
    ("one of two", "run RECIPE training.timeout=1"),
    ("no trackers", "run RECIPE training.trackers=[wandb,mlflow]"),
    ("failing trackers", "run RECIPE training.trackers=[wandb]"),
    ("nothing", "run RECIPE prune.learning_rate=1e30 training.max_skipped_steps=1"),
    ("corpus of another text", "pretrain RECIPE"),
    ("another model", "prune RECIPE"),
    ("other fingerprints", "prune RECIPE"),
    ("moments of another model", "pretrain RECIPE"),
    ("masks of another shape", "compact RECIPE"),
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
        for damage in ("a weight not finite", "full disk", "full disk while converting")
    ),
    *((damage, f"sparsify {ONE_SHOT}") for damage in (*CORPORA, *MODELS, *WEIGHTS, *FULL)),
    *((damage, f"sparsify {EVALUATED}") for damage in CORPORA if damage != "corpus of another format"),
    ("short", f"sparsify {EVALUATED} --seqlen 64"),
    ("no GPU", f"sparsify {ONE_SHOT} device=cuda"),
    *((damage, f"allocate {ONE_SHOT}.json --allocation rank") for damage in ("no corpus", "another family", *WEIGHTS)),
    ("full disk while converting", f"allocate {ONE_SHOT}.json --allocation rank"),
    *((damage, "data inspect CORPUS") for damage in ("no corpus", "unfinished corpus", "empty split")),
    ("nothing", "data inspect CORPUS --recipe HERE/other.yaml"),
    *((damage, "data verify CORPUS") for damage in ("no corpus", "unfinished corpus")),
    ("nothing", f"{MEASURE} --domain letter"),
    ("short", MEASURE.replace("16", "64")),
    ("no GPU", f"{MEASURE} --device cuda"),
    *((damage, MEASURE) for damage in ("no corpus", "empty split", "no config", "another family", *WEIGHTS)),
    *(
        (damage, "data reference-loss source RECIPE -o HERE/r.json")
        for damage in ("no corpus", "corpus of another tokenizer", "another family", *WEIGHTS)
    ),
]


def _said(place: Place, *, inputs: Path, damage: str, typed: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command prints about a damage, without what differs from run to run."""
    if damage in DAMAGES:
        DAMAGES[damage](place)
    if damage in SURROUNDINGS:
        SURROUNDINGS[damage](monkeypatch)
    words = {"RECIPE": place.recipe, "MODEL": place.model, "CORPUS": place.corpus, "HERE": place.here, "INPUTS": inputs}
    arguments = re.sub("|".join(words), lambda match: str(words[match[0]]), typed).split()
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "1000"})
    said = result.stderr if result.exit_code == 2 else result.stdout
    for name, path in (("HERE", place.here), ("INPUTS", inputs), ("PYTHON", sys.executable)):
        said = said.replace(str(path), name)
    said = re.sub(r"with [0-9.]+ GB free", "with # GB free", said)
    said = re.sub(r"(hidden_size=16) \(.*\)", r"\1 (#)", said)
    return f"exit code {result.exit_code}\n" + "".join(f"{line.rstrip()}\n" for line in said.splitlines())


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
