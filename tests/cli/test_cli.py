"""The command line and the order of a run, on a tiny random model; every error is one message and exit code 2."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from shearing.cli import frame
from shearing.cli.frame import app
from shearing.errors import ShearingError
from shearing.files.durable import read_json, write_json
from shearing.runs.recipe import load_recipe
from shearing.runs.run_directory import RunDirectory
from tests.repository import RECIPES


def shear(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def error_of(*arguments: str | Path) -> str:
    result = shear(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture(scope="session")
def finished_run(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A recipe file whose run is complete, and what `shear run` said."""
    from tests.conftest import tiny_recipe_data

    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe_data(tiny_inputs, run_dir=folder / "run")))
    return path, shear("run", path)


def test_help_and_config_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from shearing.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'slow start'\n"
    )
    recipe = RECIPES / "demo.yaml"
    for arguments in (["--help"], ["--version"], ["config", "show", str(recipe)], ["run", str(recipe), "prune.lr=1"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=tmp_path, capture_output=True)


def test_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "shearing", "run", "absent.yaml"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "RECIPE = 'absent.yaml'" in result.stderr
    assert "Traceback" not in result.stderr


def test_config_show_prints_the_resolved_recipe(tiny_recipe: Path, tmp_path: Path) -> None:
    result = shear("config", "show", tiny_recipe, "seed=5")
    assert result.exit_code == 0
    (tmp_path / "shown.yaml").write_text(result.stdout)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe(tiny_recipe, overrides=["seed=5"])


def test_config_schema_is_json() -> None:
    assert json.loads(shear("config", "schema").stdout)["title"] == "Recipe"


def test_config_check_sums_up_the_run(tiny_recipe: Path) -> None:
    result = shear("config", "check", tiny_recipe)
    assert result.exit_code == 0, result.output
    source = 20 * 32 + 4 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32
    assert f"{source:,}" in result.stdout
    for word in ("letters", "digits", "prune", "pretrain", "disk", "192", "128"):
        assert word in result.stdout
    assert not load_recipe(tiny_recipe).run_dir.exists()
    said = shear("config", "check", tiny_recipe, "name=a run", "target.hidden_size=20").stdout
    assert said.endswith(
        f"nothing wrong but what is said above: shear run {tiny_recipe} 'name=a run' target.hidden_size=20\n"
    )
    assert shear("config", "check", tiny_recipe, "target.hidden_size=32").stdout.endswith(
        f"\nnothing wrong: shear run {tiny_recipe} target.hidden_size=32\n"
    )


def test_config_check_looks_whose_run_is_in_the_folder(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe)
    run = RunDirectory(recipe.run_dir)
    run.prune.mkdir(parents=True)
    run.recipe.write_text(recipe.to_yaml())
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert shear("config", "check", tiny_recipe).exit_code == 0
    refused = shear("config", "check", tiny_recipe, "seed=7")
    assert refused.exit_code == 2
    assert "seed was 0 and is 7" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_no_heading_of_a_plan_is_cut_off(tiny_recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(tiny_recipe)], env={"COLUMNS": "80"})
    assert "…" not in result.stdout
    assert " weights gradients optimizer activations total fits when" in result.stdout


def test_config_check_looks_at_all_stages(tiny_recipe: Path) -> None:
    assert "evaluation.tasks = " in error_of("config", "check", tiny_recipe, "evaluation.tasks=[nonsense_task]")


def test_versions_are_said_without_importing_anything() -> None:
    result = shear("--version")
    assert result.exit_code == 0
    packages = ("shearing", "torch", "transformers")
    assert result.stdout.splitlines() == [f"{package} {version(package)}" for package in packages]


def test_what_the_system_says_of_a_file_is_a_message(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(error: OSError) -> None:
        def raised(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(frame, "load_recipe", raised)

    refuse(OSError(errno.EIO, "Input/output error", "run/state"))
    assert error_of("config", "show", tiny_recipe).startswith("error: run/state = 'Input/output error'")
    assert isinstance(shear("--debug", "config", "show", tiny_recipe).exception, OSError)
    refuse(OSError(errno.ENOSPC, "No space left on device"))
    assert "to mend: free space" in error_of("config", "show", tiny_recipe)
    refuse(OSError("of no file"))
    assert shear("config", "show", tiny_recipe).exit_code == 1


def test_debug_shows_the_traceback(tiny_recipe: Path) -> None:
    result = shear("--debug", "config", "show", tiny_recipe, "sed=1")
    assert isinstance(result.exception, ShearingError)


def test_a_source_is_trained_on_the_text_and_teaches_another_run(tiny_recipe: Path, tmp_path: Path) -> None:
    """Two commands; the second one listens to what the first has made, and chooses its units in the source."""
    first = yaml.safe_load(tiny_recipe.read_text())
    first |= {"run_dir": str(tmp_path / "corrected"), "target": None, "prune": None}
    first["pretrain"] |= {"duration": "30 steps", "learning_rate": 1e-2}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first))
    result = shear("run", tmp_path / "first.yaml")
    assert result.exit_code == 0, result.output
    corrected = tmp_path / "corrected" / "model"
    models = read_json(tmp_path / "corrected" / "evaluation.json")["models"]
    before, after = (models[name]["mean"]["loss"] for name in ("source", "final"))
    assert after < before - 0.5
    assert models["final"]["flops"] > 6 * models["final"]["parameters_without_embeddings"] * 30 * 2 * 16

    said = [f"distill={{teacher: {corrected}, weight: 0.5, domains: all, hidden: {{}}}}"]
    result = shear("run", tiny_recipe, *said)
    assert result.exit_code == 0, result.output
    for stage in ("prune", "pretrain"):
        line = json.loads((tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()[0])
        taught = line["domain_teacher_losses"].values()
        assert max(taught) < before - 0.2
        assert line["domain_hidden_errors"]
    again = read_json(tmp_path / "run" / "evaluation.json")["models"]
    assert again["source"]["domains"] == models["source"]["domains"]
    # It may be what is cut as well.
    whole = shear("config", "check", tiny_recipe, f"model.source={corrected}", "distill={hidden: {}}", "run_dir=other")
    assert whole.exit_code == 0, whole.output


BUDGET = [
    "prune.estimator=hard_concrete",
    "target.num_hidden_layers=null",
    "target.hidden_size=null",
    "target.intermediate_size=null",
    "target.num_attention_heads=null",
    "target.num_key_value_heads=null",
]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["target.hidden_size=64"], "target.hidden_size = 64"),
        (["target.num_attention_heads=3"], "target.num_attention_heads = 3"),
        (["prune.granularities=[layers]"], "hidden among them"),
        (["data.domains=[letters, digit]"], "digit"),
        (["data.corpus=absent"], "absent"),
        (["data.sequence_length=128", "evaluation.tokens_per_domain=128"], "128"),
        (["mixture.initial_weights={letters: 1}"], "digits"),
        (["mixture.reference={letters: 1}"], "digits"),
        (["mixture.reference=absent.json"], "absent.json"),
        (["model.source=absent"], "model.source = 'absent'"),
        (["run_dir=/proc/run"], "run_dir = '/proc/run'"),
        ([*BUDGET, "target.parameters=1B"], "fewer than the source's"),
        ([*BUDGET, "target.parameters=10"], "a budget in between"),
        ([*BUDGET, "target.parameters=20000"], "target.uniform = False"),
        (["data.sequence_length=64"], "data.sequence_length = 64"),
    ],
)
def test_bad_input_is_refused_before_any_work(tiny_recipe: Path, overrides: list[str], expected: str) -> None:
    if "data.sequence_length=64" in overrides:
        overrides = [*overrides, "mixture.heldout_tokens=64"]
        corpus = Path(load_recipe(tiny_recipe).data.corpus)
        short = tiny_recipe.parent / "short"
        shutil.copytree(corpus, short)
        overrides.append(f"data.corpus={short}")
        _shorten(short / "digits", tokens=40)
    if "data.sequence_length=128" in overrides:
        overrides = [*overrides, "mixture.heldout_tokens=128", "prune.calibration_tokens=128"]
    assert expected in error_of("run", tiny_recipe, *overrides)
    assert not load_recipe(tiny_recipe).run_dir.exists()


def _shorten(domain: Path, *, tokens: int) -> None:
    """Leave one test document of so many tokens."""
    manifest = read_json(domain / "manifest.json")
    ids = np.fromfile(domain / "test.bin", dtype=manifest["dtype"])[:tokens]
    ids[-1] = manifest["separator_id"]
    ids.tofile(domain / "test.bin")
    counts = manifest["parts"]["test"]
    counts |= {"tokens": tokens, "documents": 1}
    for name, values in (("ends", np.array([tokens])), ("hashes", np.array([1], dtype=np.uint64))):
        path = domain / f"test_{name}.npy"
        np.save(path, values)
        counts[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(domain / "manifest.json", manifest)


def test_tokens_of_another_tokenizer_are_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(load_recipe(tiny_recipe).model.source, model)
    tokenizer = read_json(model / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    write_json(model / "tokenizer.json", tokenizer)
    assert "tokenize" in error_of("run", tiny_recipe, f"model.source={model}")


def test_a_full_disk_is_foreseen(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 1000, 0))  # type: ignore[attr-defined]
    said = error_of("run", tiny_recipe)
    assert re.search(r"allowed: [1-9][.0-9]* MB of free disk; there are 0 MB", said)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))  # type: ignore[attr-defined]
    assert "allowed: a folder on a disk\n" in error_of("run", tiny_recipe)


def test_an_absent_gpu_is_refused(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "training.device = 'cuda'" in error_of("run", tiny_recipe, "training.device=cuda")


def test_a_damaged_recipe_of_the_run_is_refused(tiny_recipe: Path) -> None:
    run = RunDirectory(load_recipe(tiny_recipe).run_dir)
    run.path.mkdir()
    run.recipe.write_text("name: [")
    assert "valid YAML" in error_of("run", tiny_recipe)


def test_a_stage_without_the_one_before_is_refused(tiny_recipe: Path) -> None:
    assert "run `shear prune` or `shear run`" in error_of("compact", tiny_recipe)
    assert "run `shear prune` or `shear run`" in error_of("pretrain", tiny_recipe)
    assert not load_recipe(tiny_recipe).run_dir.exists()


def test_report_of_no_run_is_refused(tmp_path: Path) -> None:
    assert "a folder that holds a run" in error_of("report", tmp_path)


@pytest.mark.slow
def test_a_run_makes_everything_it_promises(finished_run: tuple[Path, Result]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, result = finished_run
    assert result.exit_code == 0, result.output
    recipe = load_recipe(path)
    run = RunDirectory(recipe.run_dir)
    assert load_recipe(run.recipe) == recipe
    for file in (run.evaluation, run.report, run.metrics("prune"), run.metrics("pretrain")):
        assert file.is_file()
        assert file.stat().st_size > 0
    for folder in (run.compact, run.model):
        config = AutoModelForCausalLM.from_pretrained(folder).config
        wanted = recipe.target.model_dump(exclude={"parameters", "uniform", "multiple_of", "vocab_size", "num_experts"})
        assert {name: getattr(config, name) for name in wanted} == wanted
        assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]
    for shown in (run.model, run.report, run.evaluation):
        assert str(shown) in result.stdout.replace("\n", "")


@pytest.mark.slow
def test_a_complete_run_is_not_run_again(finished_run: tuple[Path, Result]) -> None:
    path, _ = finished_run
    run = RunDirectory(load_recipe(path).run_dir)
    weights = run.model / "model.safetensors"
    before = weights.stat().st_mtime_ns
    result = shear("run", path)
    assert result.exit_code == 0, result.output
    for stage in ("prune", "compact", "pretrain"):
        assert f"{stage} is complete" in result.stdout
    assert weights.stat().st_mtime_ns == before
    assert shear("report", run.path).exit_code == 0
    assert shear("report", path).exit_code == 0


@pytest.mark.slow
def test_another_recipe_in_the_same_folder_is_refused(finished_run: tuple[Path, Result]) -> None:
    path, _ = finished_run
    found = error_of("run", path, "prune.learning_rate=0.5", "pretrain.duration=5 steps")
    assert "prune.learning_rate was 0.001 and is 0.5" in found
    assert "pretrain.duration was '4 steps' and is '5 steps'" in found
    assert "resume=never" in error_of("run", path, "resume=never")
    # Keys that change nothing that was computed may differ.
    assert shear("prune", path, "training.log_interval=2", "prune.keep_last=1", "name=other").exit_code == 0


@pytest.mark.slow
def test_settings_of_a_stage_may_change_until_it_begins(finished_run: tuple[Path, Result], tmp_path: Path) -> None:
    path, _ = finished_run
    copy = tmp_path / "run"
    shutil.copytree(load_recipe(path).run_dir, copy)
    for folder in ("pretrain", "model"):
        shutil.rmtree(copy / folder)
    result = shear("pretrain", path, f"run_dir={copy}", "pretrain.duration=2 steps")
    assert result.exit_code == 0, result.output
    assert load_recipe(RunDirectory(copy).recipe).pretrain.duration.steps == 2


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    holder = (
        "import sys, time\nfrom shearing.runs.run_directory import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).locked():\n    print('locked', flush=True)\n    time.sleep(60)\n"
    )
    run = RunDirectory(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", holder, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ShearingError, match=f"wait for process {process.pid}"), run.locked():
            pass
    finally:
        process.kill()
        process.wait()
    # A killed process leaves its file but not its lock.
    assert run.lock.exists()
    with run.locked():
        pass


def test_json_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
    path.write_text("[1]")
    with pytest.raises(ShearingError, match="a JSON object"):
        read_json(path)


def test_completion_marks(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert not run.is_complete("prune")
    with pytest.raises(ShearingError, match="run `shear prune`"):
        run.read_complete("prune")
    run.mark_complete("prune", {"weights": {"a": 1.0}})
    assert run.is_complete("prune")
    assert run.read_complete("prune") == {"weights": {"a": 1.0}}


def test_unwritable_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShearingError, match="is a file"):
        RunDirectory(tmp_path / "file" / "run").require_writable()
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(ShearingError, match="no write permission"):
            RunDirectory(tmp_path / "run").require_writable()


def test_extend_asks_for_a_checkpoint_before_the_decay(finished_run: tuple[Path, Result], tmp_path: Path) -> None:
    run_dir = load_recipe(finished_run[0]).run_dir
    found = error_of("extend", run_dir, tmp_path / "new", "--decay", "2 steps")
    assert "are of steps 3, 4\n" in found
    assert "keep checkpoints with pretrain.keep_every" in found
    assert "640 steps" in error_of("extend", run_dir, tmp_path / "new", "--decay", "soon")
    assert not (tmp_path / "new").exists()
