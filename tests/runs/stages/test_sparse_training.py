"""Runs that train sparse models: from the source to a manifest that is true of what was trained."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner, Result

from shearing.cli.frame import app
from shearing.data.documents import DocumentRules
from shearing.errors import ShearingError
from shearing.files.durable import read_json
from shearing.models.loading import load_config
from shearing.models.shape import Shape
from shearing.pruning.calibration.text import load_calibration
from shearing.pruning.sparse.levels import allocate
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.manifest import MANIFEST, read_manifest
from shearing.pruning.sparse.stored.masks import FILE_NAME, read_masks
from shearing.runs.context import RunContext
from shearing.runs.continuation.extension import extend
from shearing.runs.planning.disk import moving_weights
from shearing.runs.planning.memory import CHECKPOINT_BYTES_PER_PARAMETER
from shearing.runs.planning.preflight import preflight, survey
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages import source_model
from shearing.runs.stages.pretraining.start import Start
from shearing.runs.stages.run import run
from shearing.training.adapters.speft import read_chosen
from shearing.training.checkpoints.pieces import ShardedState
from tests.conftest import tiny_recipe_data

ONE_SHOT = {"criterion": "wanda", "pattern": "2:4", "samples": 12, "seqlen": 16}
SHARED_OUT: dict[str, Any] = {"criterion": "magnitude", "sparsity": 0.5, "allocation": "depth"}
CUT: dict[str, Any] = {
    "target": {"hidden_size": 16, "intermediate_size": 24},
    "prune": {"duration": "0 steps", "batch_size": "2 sequences", "calibration_tokens": 64},
}
STEPS, SEQUENCES, LENGTH = 5, 4, 16


def data_of(inputs: Path, run_dir: Path, *, source: Path | None = None, **sections: Any) -> dict[str, Any]:
    """A run that prunes no units: decay, clipping and accumulation all at work."""
    data = tiny_recipe_data(inputs, run_dir=run_dir)
    del data["target"], data["prune"]
    data["model"] = {"source": str(source or inputs / "model")}
    data["pretrain"] |= {
        "duration": f"{STEPS} steps",
        "batch_size": f"{SEQUENCES} sequences",
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "gradient_clipping": 0.1,
    }
    for name, section in sections.items():
        data[name] = {**data[name], **section} if name in data and section else section
    return data


def ran(inputs: Path, run_dir: Path, **sections: Any) -> RunDirectory:
    """A run that is trained and not evaluated."""
    recipe = Recipe.model_validate(data_of(inputs, run_dir, **sections))
    return run(recipe, stages=[stage for stage in recipe.stages if stage != "evaluate"])


def shear(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def errors_of(data: dict[str, Any]) -> str:
    """What `shear run` says to a recipe that it refuses."""
    path = Path(data["run_dir"]).with_name("refused.yaml")
    path.write_text(yaml.safe_dump(data))
    result = shear("run", path)
    assert result.exit_code == 2, result.output
    return result.stderr


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def masks_of(folder: Path) -> dict[str, Tensor]:
    return dict(read_masks(folder / FILE_NAME))


def assert_merged_as_a_whole(found: RunDirectory) -> None:
    """What was merged a weight at a time is, to the bit, what peft makes of the whole model, and computes the same."""
    recipe, ids = load_recipe(found.recipe), torch.arange(2, 2 + LENGTH)[None]
    begin = Start.of(RunContext(recipe))
    state = ShardedState(max(found.checkpoints("pretrain").glob("step-*")))
    adapted = begin.restored(state, adapters=recipe.pretrain.adapters).eval()
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(found.model)(input_ids=ids).logits
    torch.testing.assert_close(merged, logits, rtol=1e-5, atol=1e-5)
    whole = dict(begin.merged(adapted).named_parameters())
    written = weights(found.model)
    assert written.keys() == whole.keys()
    for name, weight in written.items():
        assert torch.equal(weight, whole[name]), name


def assert_trained_under_masks(folder: Path, *, before: Path, adapted: tuple[str, ...] | None = None) -> None:
    """The same masks, zeros exactly where they drop, other values elsewhere, and a manifest that says so."""
    assert (folder / FILE_NAME).read_bytes() == (before / FILE_NAME).read_bytes()
    found, earlier = weights(folder), weights(before)
    for name, mask in masks_of(folder).items():
        assert torch.equal(found[name] != 0, mask), name
        changed = adapted is None or name.split(".")[-2] in adapted
        assert torch.equal(found[name], earlier[name].float()) != changed, name
    assert differences(folder) == []
    assert AutoTokenizer.from_pretrained(folder).encode("ab01") == AutoTokenizer.from_pretrained(before).encode("ab01")
    record = read_manifest(folder)["trained"][-1]
    assert (record["steps"], record["tokens"]) == (STEPS, STEPS * SEQUENCES * LENGTH)


@pytest.fixture(scope="module")
def trained(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that sparsifies, trains and evaluates; must not be changed."""
    return run(Recipe.model_validate(data_of(tiny_inputs, tmp_path_factory.mktemp("run") / "run", sparsify=ONE_SHOT)))


def test_a_run_sparsifies_the_source_and_trains_it_under_its_masks(trained: RunDirectory, tiny_inputs: Path) -> None:
    assert differences(trained.sparse) == []
    assert_trained_under_masks(trained.model, before=trained.sparse)
    dense = weights(tiny_inputs / "model")
    for name, weight in weights(trained.sparse).items():
        expected = dense[name] * masks_of(trained.sparse)[name] if name in masks_of(trained.sparse) else dense[name]
        assert torch.equal(weight, expected), name
    assert not torch.equal(weights(trained.model)["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert read_manifest(trained.model)["trained"][0]["adapters"] is None
    assert read_manifest(trained.model)["calibration"]["source"] == str(tiny_inputs / "corpus")


@pytest.mark.parametrize(("criterion", "files"), [("gblm", False), ("gblm", True), ("wanda", False)])
def test_calibration_heeds_documents_as_training_does(
    criterion: str, files: bool, tiny_inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "abcd" * 3}) for _ in range(99)))
    own = {"calibration": [str(tmp_path / "a.jsonl")]} if files else {}
    rules = {"attention": "documents", "loss_across_documents": False}
    data = data_of(tiny_inputs, tmp_path / "run", sparsify={**ONE_SHOT, "criterion": criterion, **own}, data=rules)
    recipe = Recipe.model_validate(data)
    found = run(recipe, stages=["sparsify"])
    chosen: dict[str, Any] = {"vocab_size": 20, "samples": 12, "seqlen": 16, "seed": recipe.seed}
    expected = load_calibration(
        [tmp_path / "a.jsonl" if files else tiny_inputs / "corpus"],
        tokenizer=AutoTokenizer.from_pretrained(tiny_inputs / "model"),
        documents=DocumentRules(attention_within=True, loss_across=False),
        **chosen,
    )
    assert expected.positions is not None
    assert int((expected.positions == 0).sum()) > 12
    if criterion == "wanda":  # reads no loss: which labels count is nothing that its output depends on
        expected = replace(expected, counted=None)
    assert read_manifest(found.sparse)["calibration"]["fingerprint"] == expected.fingerprint
    assert differences(found.sparse) == []


def test_every_model_of_the_run_is_evaluated(trained: RunDirectory) -> None:
    models = read_json(trained.evaluation)["models"]
    assert [model["label"] for model in models.values()] == ["source", "wanda 2:4", "wanda 2:4, pretrained"]
    assert [model["training_tokens"] for model in models.values()] == [0, 0, STEPS * SEQUENCES * LENGTH]
    assert models["source"]["nonzero"] == models["source"]["parameters"]
    assert models["sparse"]["nonzero"] == models["final"]["nonzero"] < models["source"]["nonzero"]
    page = trained.report.read_text()
    assert "parameters not zero the mean held-out loss is" in page
    assert "trained under the masks" in page
    assert "No mask has been learned yet" not in page


def test_a_sparse_source_is_trained_on_under_its_stored_masks(
    trained: RunDirectory, tiny_inputs: Path, tmp_path: Path
) -> None:
    found = ran(tiny_inputs, tmp_path / "run", source=trained.model)
    assert not found.sparsify.exists()
    assert_trained_under_masks(found.model, before=trained.model)
    assert [each["steps"] for each in read_manifest(found.model)["trained"]] == [STEPS, STEPS]


def test_a_dense_source_is_trained_on_and_sets_its_own_losses_as_reference(
    trained: RunDirectory, tiny_inputs: Path, tmp_path: Path
) -> None:
    found = ran(tiny_inputs, tmp_path / "run")
    assert not (found.model / MANIFEST).exists()
    assert not (found.model / FILE_NAME).exists()
    assert all((weight != 0).all() for name, weight in weights(found.model).items() if "proj" in name)
    # The sparse run aims at what the dense model could do.
    assert read_json(found.pretrain / "reference.json") == read_json(trained.pretrain / "reference.json")


def test_units_are_cut_weights_zeroed_and_the_rest_is_trained(tiny_inputs: Path, tmp_path: Path) -> None:
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run") | {"sparsify": ONE_SHOT}
    data["pretrain"] = data_of(tiny_inputs, tmp_path)["pretrain"]
    found = run(Recipe.model_validate(data))
    assert_trained_under_masks(found.model, before=found.sparse)
    cut = weights(found.compact)
    for name, mask in masks_of(found.sparse).items():
        assert torch.equal(weights(found.sparse)[name], cut[name] * mask)
    labels = [model["label"] for model in read_json(found.evaluation)["models"].values()]
    assert labels[-2:] == [f"learned masks, started by reconstruction, wanda 2:4{end}" for end in ("", ", pretrained")]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("dropout", "checkpointing"), [(0.0, "none"), (0.1, "full")])
def test_adapters_are_merged_without_losing_a_zero(
    dense: bool,
    dropout: float,
    checkpointing: str,
    tiny_inputs: Path,
    trained: RunDirectory,
    tmp_path: Path,
) -> None:
    pytest.importorskip("peft")
    source = tiny_inputs / "model" if dense else trained.sparse
    lora = {"rank": 4, "dropout": dropout, "targets": ["q_proj", "down_proj"]}
    found = ran(
        tiny_inputs,
        tmp_path / "run",
        source=source,
        pretrain={"lora": lora},
        training={"activation_checkpointing": checkpointing},
    )
    assert_merged_as_a_whole(found)
    before, after = weights(source), weights(found.model)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == (name.split(".")[-2] not in lora["targets"]), name
    if not dense:
        assert_trained_under_masks(found.model, before=source, adapted=("q_proj", "down_proj"))
        assert read_manifest(found.model)["trained"][-1]["adapters"] == {"alpha": 16.0, **lora}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("spp", {"rank": 4, "scale": 2.0, "dropout": 0.1, "targets": ["q_proj", "down_proj"]}),
        ("speft", {"share": 0.05, "samples": 4, "targets": ["q_proj", "down_proj"]}),
        ("speft", {"share": 0.2, "samples": 2, "salience": "fisher", "unit": "column", "targets": ["q_proj"]}),
    ],
)
def test_other_adapters_are_merged_without_losing_a_zero(
    kind: str,
    settings: dict[str, Any],
    tiny_inputs: Path,
    trained: RunDirectory,
    tmp_path: Path,
) -> None:
    found = ran(
        tiny_inputs,
        tmp_path / "run",
        source=trained.sparse,
        pretrain={kind: settings, "learning_rate": 0.05},
        training={"activation_checkpointing": "full"},
    )
    assert_merged_as_a_whole(found)
    assert_trained_under_masks(found.model, before=trained.sparse, adapted=tuple(settings["targets"]))
    record = read_manifest(found.model)["trained"][-1]
    assert record["method"] == kind
    assert record["adapters"].items() >= settings.items()
    if kind == "speft":
        before, after, masks = weights(trained.sparse), weights(found.model), masks_of(trained.sparse)
        for name, mask in masks.items():
            if name.split(".")[-2] in settings["targets"]:
                changed = before[name].float() != after[name]
                assert 0 < int(changed.sum()) <= settings["share"] * int(mask.sum())
                if settings.get("unit") == "column":
                    assert torch.equal(changed, mask & changed.any(0))


SPEFT = {"share": 0.05, "samples": 4, "targets": ["q_proj", "down_proj"]}


def _salient(inputs: Path, run_dir: Path, **data: Any) -> dict[str, Tensor]:
    speft = {"speft": {**SPEFT, "share": 0.3}, "duration": 1, "warmup": 0}
    sections: dict[str, Any] = {"pretrain": speft, **({"data": data} if data else {})}
    return read_chosen(ran(inputs, run_dir, source=inputs / "model", **sections).salient)


def test_weights_are_chosen_by_the_loss_that_is_trained(tiny_inputs: Path, tmp_path: Path) -> None:
    whole = _salient(tiny_inputs, tmp_path / "rows")
    within = _salient(tiny_inputs, tmp_path / "documents", attention="documents", loss_across_documents=False)
    assert whole.keys() == within.keys()
    assert any(not torch.equal(whole[name], within[name]) for name in whole)


def test_an_extension_goes_on_with_the_weights_that_were_chosen(tiny_inputs: Path, tmp_path: Path) -> None:
    first = ran(
        tiny_inputs,
        tmp_path / "run",
        source=tiny_inputs / "model",
        pretrain={"speft": SPEFT, "schedule": "constant", "learning_rate": 0.05},
    )
    overrides = ["pretrain.duration=9", "training.precision=bf16"]
    extended = extend(first, to=tmp_path / "longer", onward=True, overrides=overrides).directory
    assert extended.salient.read_bytes() == first.salient.read_bytes()
    longer = run(load_recipe(extended.recipe), stages=["pretrain"])
    before, shorter, after = weights(tiny_inputs / "model"), weights(first.model), weights(longer.model)
    changed = {name: shorter[name] != value for name, value in before.items() if name in shorter}
    assert any(bool(mask.any()) for mask in changed.values())
    for name, mask in changed.items():
        assert not bool(((after[name] != before[name]) & ~mask).any()), name

    extended.salient.unlink()
    shutil.rmtree(extended.model)
    extended.complete("pretrain").unlink()
    with pytest.raises(ShearingError, match=r"salient\.safetensors, which is not there"):
        run(load_recipe(extended.recipe), stages=["pretrain"])


MOVING = {"interval": "1 steps", "decay": 0.3, "ramp": "2 steps", "freeze": "1 steps"}


@pytest.mark.parametrize("scores", ["magnitude", "wanda"])
def test_masks_that_move_end_as_n_of_m(scores: str, trained: RunDirectory, tiny_inputs: Path, tmp_path: Path) -> None:
    moving = {**MOVING, "scores": scores}
    found = ran(
        tiny_inputs,
        tmp_path / "run",
        sparsify=ONE_SHOT,
        pretrain={"ast": moving},
        distill={"weight": 0.67, "temperature": 2.0, "domains": "all"},
    )
    before, after = masks_of(found.sparse), masks_of(found.model)
    assert torch.equal(*(torch.stack([mask.sum() for mask in masks.values()]) for masks in (before, after)))
    assert differences(found.model) == []
    model = weights(found.model)
    for name, mask in after.items():
        assert torch.equal(model[name] != 0, mask), name
    assert any(not torch.equal(before[name], mask) for name, mask in after.items())
    lines = [json.loads(line) for line in found.metrics("pretrain").read_text().splitlines()]
    events = [line for line in lines if line.get("event") == "masks"]
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert 0 < max(event["changed"] for event in events) < 1
    # The plan knows what a checkpoint takes, with what is set aside.
    recipe, sizes = load_recipe(found.recipe), Shape.of(load_config(str(found.sparse)))
    aside = moving_weights(recipe, shape=sizes)
    [shard] = max(found.checkpoints("pretrain").glob("step-*")).glob("shard-*.safetensors")
    held = sum(tensor.numel() * tensor.element_size() for tensor in load_file(shard).values())
    assert held == CHECKPOINT_BYTES_PER_PARAMETER * sizes.num_parameters() + 4 * aside
    assert aside == sum(mask.numel() for mask in after.values())
    record = read_manifest(found.model)["trained"][-1]
    assert record["method"] == "ast"
    assert record["masks"]["scores"] == scores
    # The first forward pass is that of the sparse model, whatever was brought back beside it.
    reference = [json.loads(line) for line in trained.metrics("pretrain").read_text().splitlines()]
    assert lines[0]["domain_losses"] == pytest.approx(reference[0]["domain_losses"], rel=1e-5)
    # Trained on, and exported from a checkpoint, under the masks that moved.
    exported = shear("export", found.path, "-o", tmp_path / "exported")
    assert exported.exit_code == 0, exported.output
    assert differences(tmp_path / "exported") == []
    if scores == "magnitude":
        on = ran(tiny_inputs, tmp_path / "on", source=found.model, pretrain={"ast": MOVING})
        assert differences(on.model) == []
        assert [each["method"] for each in read_manifest(on.model)["trained"]] == ["ast", "ast"]


def test_masks_that_stay_from_the_start_are_those_of_plain_training(
    trained: RunDirectory, tiny_inputs: Path, tmp_path: Path
) -> None:
    still = {**MOVING, "freeze": "100%"}
    found = ran(tiny_inputs, tmp_path / "run", sparsify=ONE_SHOT, pretrain={"ast": still})
    for name in ("model.safetensors", FILE_NAME):
        assert (found.model / name).read_bytes() == (trained.model / name).read_bytes()


@pytest.mark.parametrize(
    ("way", "times"), [({"ast": {**MOVING, "scores": "wanda"}}, 0), ({"speft": SPEFT}, 1)], ids=["ast", "speft"]
)
def test_weights_that_are_shared_out_stay_in_their_files(
    way: dict[str, Any], times: int, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole is the model that salient weights are chosen in, once; what is trained is what it was if it were whole."""
    whole = ran(tiny_inputs, tmp_path / "whole", sparsify=ONE_SHOT, pretrain=way)
    load, loaded = source_model.load_source, []

    def noted(*arguments: Any, **keys: Any) -> PreTrainedModel:
        loaded.append(arguments)
        return load(*arguments, **keys)

    monkeypatch.setattr(source_model, "load_source", noted)
    found = ran(tiny_inputs, tmp_path / "run", sparsify=ONE_SHOT, pretrain=way, training={"engine": "fsdp2"})
    assert len(loaded) == times
    if times:
        assert found.salient.read_bytes() == whole.salient.read_bytes()
    else:
        assert found.input_norms.read_bytes() == whole.input_norms.read_bytes()
    expected = weights(whole.model)
    for name, weight in weights(found.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


def test_masks_of_another_model_are_refused_before_training(
    trained: RunDirectory, tiny_inputs: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(trained.sparse, tmp_path / "sparse"))
    data = data_of(tiny_inputs, tmp_path / "run", source=source)
    shutil.copyfile(tiny_inputs / "model" / "model.safetensors", source / "model.safetensors")
    said = errors_of(data)
    assert "that the mask drops are not 0" in said
    assert "the masks that were stored with this very model" in said
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    said = errors_of(data)
    assert "a mask of [48, 32] for model.layers.0.mlp.gate_proj.weight" in said
    assert "shape [40, 32]" in said
    (source / MANIFEST).unlink()
    assert f"without {MANIFEST}" in errors_of(data)
    assert not (tmp_path / "run" / "pretrain" / "checkpoints").exists()


def test_what_becomes_of_zeros_is_said_before_training(
    trained: RunDirectory, tiny_inputs: Path, tmp_path: Path
) -> None:
    """Where units go, masks do not stay, which is said; a family would leave its sizes without any."""
    sections: dict[str, Any] = {"source": trained.sparse, "evaluation": {"baselines": []}, **CUT}
    family = {"family": {"sizes": {"small": {"num_hidden_layers": 1}}}}
    said = (
        f"zeros: {trained.sparse / FILE_NAME} is left behind by prune, and what is 0 in the source is trained like all "
    )
    for more, advice in (({}, "else; the section sparsify zeroes"), (family, "else"), ({"sparsify": ONE_SHOT}, "else")):
        plan = preflight(RunContext(Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", **sections, **more))))
        assert [each for each in plan.notes if each.startswith(said + advice)]
    found = errors_of(data_of(tiny_inputs, tmp_path / "run", source=trained.sparse, **family))
    assert f"model.source = '{trained.sparse} with {FILE_NAME}'" in found
    assert "set family=null" in found


def test_adapters_without_peft_are_refused(tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    said = errors_of(data_of(tiny_inputs, tmp_path / "run", pretrain={"lora": {}}))
    assert "pretrain.lora" in said
    assert "pip install 'shearing[lora]'" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"target": {"hidden_size": 16}}, ("prune = None", "add prune, or remove target")),
        ({"prune": {"duration": "4 steps", "batch_size": "2 sequences"}}, ("target = None", "remove prune")),
        ({"sparsify": {**ONE_SHOT, "pattern": "2:5"}}, ("sparsify.pattern = '2:5 (2 kept of 5)'",)),
        ({"sparsify": {**ONE_SHOT, "seqlen": 4096}}, ("sparsify.seqlen = 4096", "at most 64")),
        ({"sparsify": {**ONE_SHOT, "samples": 10**6}}, ("sparsify.samples = 1000000",)),
        (
            {"sparsify": {"criterion": "magnitude", "allocation": "/nope.json"}},
            ('sparsify.allocation = "/nope.json (', "check the path"),
        ),
        (
            {"pretrain": {"lora": {}}, "training": {"engine": "deepspeed"}},
            ("pretrain.lora", "set training.engine=torch"),
        ),
        ({"pretrain": {"lora": {"targets": ["query"]}}}, ("pretrain.lora.targets = ['query']", "q_proj")),
        ({"pretrain": {"spp": {"targets": ["query"]}}}, ("pretrain.spp.targets = ['query']", "q_proj")),
        ({"pretrain": {"spp": {"rank": 5}}}, ("pretrain.spp.rank = 5", "1, 2, 4, 8, 16", "pretrain.spp.rank=4")),
        # Of the source every matrix has a multiple of 16 outputs, of the target of 8.
        ({**CUT, "pretrain": {"spp": {}}}, ("pretrain.spp.rank = 16", "1, 2, 4, 8", "pretrain.spp.rank=8")),
        ({"pretrain": {"spp": {}, "lora": {}}}, ("pretrain.spp = 'a section'", "pretrain.lora is there too")),
        ({"pretrain": {"spp": {}}, "training": {"engine": "deepspeed"}}, ("pretrain.spp", "torch or fsdp2")),
        ({"pretrain": {"ist": {}}}, ("pretrain.ist", "with one of pretrain.lora, pretrain.spp, pretrain.speft")),
        ({"pretrain": {"ast": {}}}, ("pretrain.ast", "is a dense one", "make it sparse first")),
        (
            {"sparsify": {"criterion": "magnitude", "sparsity": 0.5}, "pretrain": {"ast": {}}},
            ("pretrain.ast", "masks of N:M", "sparsify.pattern=2:4"),
        ),
        (
            {"sparsify": {**SHARED_OUT, "levels": ["row 0.25", "row 0.75"]}, "pretrain": {"ast": {}}},
            ("pretrain.ast", "masks of N:M, and sparsify.levels has row 0.25, row 0.75"),
        ),
    ],
)
def test_what_cannot_be_is_said_by_its_key(
    sections: dict[str, Any], said: tuple[str, ...], tiny_inputs: Path, tmp_path: Path
) -> None:
    found = errors_of(data_of(tiny_inputs, tmp_path / "run", **sections))
    for part in said:
        assert part in found


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({**ONE_SHOT, "pattern": "16:32"}, "sparsify.pattern = '16:32 (16 kept of 32)'"),
        ({**SHARED_OUT, "levels": ["1:7", "6:7"]}, "sparsify.levels = '1:7 (1 kept of 7)'"),
        ({**SHARED_OUT, "levels": ["1:4", "row 0.75"]}, "sparsify.levels = '1:4 and row 0.75'"),
        ({"criterion": "magnitude", "allocation": "/nope.json"}, "what is cut is yet to be"),
        ({"criterion": "magnitude", "pattern": "4:8", "hardware": "2:4"}, "sparsify.hardware = '2:4'"),
        ({**ONE_SHOT, "include": ["*.nope"]}, "sparsify.include = '*.nope'"),
        ({**ONE_SHOT, "calibration": ["/nope.txt"]}, "sparsify.calibration = '/nope.txt'"),
        ({**ONE_SHOT, "samples": 10**6}, "sparsify.samples = 1000000"),
        ({**SHARED_OUT, "criterion": "sparsegpt", "group": "cumulative", "samples": 12}, "sparsify.group = 'cumul"),
    ],
)
def test_what_will_not_go_with_what_is_cut_is_said_before_anything_is_cut(
    section: dict[str, Any], said: str, sized: bool, tiny_inputs: Path, tmp_path: Path
) -> None:
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run") | {"sparsify": section}
    if not sized:
        data["target"] = {"parameters": 20_000, "uniform": True}
        data["prune"]["estimator"] = "hard_concrete"
    _, errors = survey(RunContext(Recipe.model_validate(data)))
    of_sizes = "kept of" in said  # which a budget leaves open
    assert any(said in str(error) for error in errors) == (sized or not of_sizes), errors
    assert len(errors) == (1 if sized or not of_sizes else 0)


def test_what_a_stage_has_read_may_be_gone_when_it_is_complete(tiny_inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd" * 200)
    own = {**ONE_SHOT, "calibration": [str(tmp_path / "a.txt")]}
    recipe = Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run", sparsify=own))
    run(recipe, stages=["sparsify"])
    (tmp_path / "a.txt").unlink()
    assert survey(RunContext(recipe), stages=["pretrain"])[1] == []


def test_masks_of_an_allocation_file_have_to_be_of_groups_to_move(tiny_inputs: Path, tmp_path: Path) -> None:
    own = {"model": str(tiny_inputs / "model"), "output": tmp_path / "allocation.json", "device": "cpu"}
    file = allocate(SparsifyRecipe.model_validate({**SHARED_OUT, **own}))
    section = {"criterion": "magnitude", "allocation": str(file)}
    data = data_of(tiny_inputs, tmp_path / "run", sparsify=section, pretrain={"ast": {}})
    [error] = survey(RunContext(Recipe.model_validate(data)))[1]
    assert error.field == "pretrain.ast"
    assert "allocation.json has" in error.allowed


def test_a_sparse_source_of_the_hub_is_one(
    trained: RunDirectory, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commit = tmp_path / "hub" / "models--owner--name", "0" * 40
    shutil.copytree(trained.sparse, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    data = data_of(tiny_inputs, tmp_path / "run", model={"source": "owner/name"}, evaluation={"speed": False})
    recipe = Recipe.model_validate(data)
    plan, errors = survey(RunContext(recipe))
    assert not errors
    assert plan is not None
    assert plan.zeros is not None
    assert FILE_NAME in plan.zeros
    run(recipe, stages=["evaluate"])
    [source] = read_json(RunDirectory(recipe.run_dir).evaluation)["models"].values()
    assert source["nonzero"] < source["parameters"]


@pytest.mark.parametrize("sections", [{"sparsify": ONE_SHOT}, {}, {"pretrain": {"lora": {"rank": 2}}}])
def test_commands_about_a_recipe_without_pruned_units(
    sections: dict[str, Any], tiny_inputs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data_of(tiny_inputs, tmp_path / "run", **sections)))
    checked = shear("config", "check", path)
    assert checked.exit_code == 0, checked.output
    assert ("50 % of the weights of matrices, by wanda, 2:4" in checked.output) == ("sparsify" in sections)
    assert "target" not in checked.output
    shown = shear("config", "show", path)
    assert yaml.safe_load(shown.stdout)["prune"] is None
    planned = shear("plan", path, "--gpus", "2", "--memory", "8")
    assert planned.exit_code == 0, planned.output
    assert ("sparsify: not in these figures" in planned.output) == ("sparsify" in sections)
    assert ("adapters take less memory" in planned.output) == ("pretrain" in sections)
    assert shear("launch", path, "--gpus-per-node", "2").exit_code == 0
    for stage in ("prune", "compact"):
        refused = shear(stage, path)
        assert refused.exit_code == 2
        assert f"{stage} = None" in refused.stderr
        assert "pretrain, evaluate" in refused.stderr
    early = shear("pretrain", path, "pretrain.duration=1 steps")
    assert early.exit_code == (2 if "sparsify" in sections else 0), early.output
    assert ("run `shear run` with this recipe first" in early.stderr) == ("sparsify" in sections)


def test_sections_that_are_absent_can_be_set_from_the_command_line(tiny_inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.model_validate(data_of(tiny_inputs, tmp_path / "run")).to_yaml())
    shown = shear(
        "config", "show", path, "sparsify.criterion=magnitude", "sparsify.sparsity=0.5", "pretrain.lora.rank=2"
    )
    assert shown.exit_code == 0, shown.output
    assert yaml.safe_load(shown.stdout)["sparsify"]["sparsity"] == 0.5
    assert yaml.safe_load(shown.stdout)["pretrain"]["lora"]["rank"] == 2
    wrong = shear("config", "show", path, "sparsify.criterion=wanda", "sparsify.pattern=4:2")
    assert "sparsify.pattern=4:2: sparsify.pattern = '4:2'" in wrong.stderr
