"""`shear plan`: what it says of a recipe, and what to change where it does not fit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shearing.runs.planning.capacity import measured
from shearing.runs.planning.hardware import Hardware
from shearing.runs.planning.phases import Phase, phases
from shearing.runs.planning.plan import RunPlan, heldout_shares, plan, plans
from shearing.runs.recipe import Recipe, load_recipe, overridden
from tests.cli.test_cli import BUDGET, error_of, shear
from tests.repository import RECIPES, ROOT, script

LLAMA_2_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """Override that makes a folder with nothing but Llama 2 7B's config the source."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return f"model.source={tmp_path / 'llama'}"


def sheared_llama(llama: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / "sheared-llama-1.3b.yaml", overrides=[llama, *overrides])


def planned(recipe: Recipe, *, gpus: int = 8, gpu: str = "H100", gigabytes: float | None = None) -> RunPlan:
    return plan(recipe, hardware=Hardware.of(processes=gpus, gpu=gpu, gigabytes=gigabytes, mfu=0.4))


def test_figures_of_sheared_llama(llama: str) -> None:
    made = planned(sheared_llama(llama))
    prune, pretrain = made.stages
    assert made.precision == torch.bfloat16
    assert (made.source.num_parameters(), made.target.num_parameters()) == (6_738_415_616, 1_345_423_360)
    assert (prune.tokens, pretrain.tokens) == (3200 * 32 * 4096, 48000 * 256 * 4096)
    # 6 FLOPs for each parameter and token, and 6 L d S for attention.
    per_token = 6 * (6_738_415_616 - 32000 * 4096) + 6 * 32 * 4096 * 4096
    assert prune.flops == pytest.approx(per_token * prune.tokens)
    # 63 updates and the losses at the end, of 7 domains with as many sequences as take a tenth of the 50 steps between
    # two updates; a third of a training step's FLOPs.
    rows = 50 * 32 * 3 // (10 * 7)
    assert prune.heldout_flops == pytest.approx(per_token / 3 * 64 * 7 * rows * 4096)
    assert heldout_shares(sheared_llama(llama))["prune"] == pytest.approx(prune.heldout_flops / prune.flops)
    assert f"{prune.heldout_flops / prune.flops:.3f}" == "0.099"
    # The paper's 500 sequences.
    assert f"{heldout_shares(sheared_llama(llama, 'mixture.heldout_tokens=2048000'))['prune']:.2f}" == "0.73"
    assert prune.seconds == pytest.approx((prune.flops + prune.heldout_flops) / (8 * 0.4 * 989.4e12))
    assert prune.disk == 12 * made.source.num_parameters() * 3
    assert (prune.workload.micro_batch_size, prune.workload.micro_batches) == (4, 1)
    assert (pretrain.workload.micro_batch_size, pretrain.workload.micro_batches) == (16, 2)


def test_a_teacher_is_counted(llama: str) -> None:
    plain, listening = (planned(sheared_llama(llama, f"distill={value}")) for value in ("null", "{weight: 0.5}"))
    parameters, tokens, vocabulary = 6_738_415_616, 4096, 32000
    for before, after in zip(plain.stages, listening.stages, strict=True):
        # 2 FLOPs for each parameter and token of a forward pass, and 2 L d S for attention.
        per_token = 2 * (parameters - vocabulary * 4096) + 2 * 32 * 4096 * 4096
        assert after.teacher_flops == pytest.approx(per_token * after.tokens)
        assert after.seconds - before.seconds == pytest.approx(after.teacher_flops / (8 * 0.4 * 989.4e12))
        memory, without = after.under_zero(2), before.under_zero(2)
        chunk = 1024 * vocabulary * (2 + 4 + 4)  # logits, log-probabilities, and what KL works with
        states = 2 * after.workload.micro_batch_size * tokens * 4096
        assert memory.teacher == 2 * parameters
        # The largest moment may be another one than before, and a few figures of each token are kept.
        assert 2 * parameters <= memory.total - without.total <= 2 * parameters + 1.05 * (states + chunk)
    assert (plain.teacher, listening.teacher) == (None, listening.source)
    twice = planned(sheared_llama(llama, "distill={skip_low_entropy: 0.1, temperature: 2.0, precision: fp32}"))
    again = 2 * vocabulary * 4096
    assert twice.stages[0].teacher_flops == pytest.approx((per_token + again) * twice.stages[0].tokens)
    assert twice.stages[0].under_zero(2).teacher == 4 * parameters


def test_a_teacher_in_host_memory_is_counted_there(llama: str) -> None:
    kept, away = (planned(sheared_llama(llama, f"distill={{placement: {name}}}")) for name in ("replicate", "offload"))
    layers = 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096)
    for before, after in zip(kept.stages, away.stages, strict=True):
        there, here = after.held(away.choice), before.held(kept.choice)
        assert there.teacher == here.teacher - layers
        assert there.host == here.host + layers


def test_a_teacher_that_is_shared_out_is_counted_by_its_share(llama: str) -> None:
    kept, shared = (planned(sheared_llama(llama, f"distill={{placement: {name}}}")) for name in ("replicate", "shard"))
    layer = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096)
    for before, after in zip(kept.stages, shared.stages, strict=True):
        there, here = after.held(shared.choice), before.held(kept.choice)
        assert there.teacher == here.teacher - 32 * layer * 7 // 8
        assert there.host == here.host
        assert after.listening is not None
        # Two layers are whole while it runs, one of them on its way.
        assert after.listening.loaded == there.teacher + 2 * layer
        assert after.listening.among(16).weights == there.teacher - 32 * layer // 16


def test_matched_streams_are_counted(llama: str) -> None:
    """As many as a stage's model has layers, or as are named: each a bf16 state of the teacher and a difference."""
    found = {}
    for layers in (None, "all", [0, 9]):
        hidden = "null" if layers is None else f"{{layers: {layers}}}"
        found[str(layers)] = planned(sheared_llama(llama, f"distill={{hidden: {hidden}}}", "training.engine=torch"))
    plain = found["None"]
    for name, counts in (("all", {"prune": 32, "pretrain": 24}), ("[0, 9]", {"prune": 2, "pretrain": 2})):
        for before, after in zip(plain.stages, found[name].stages, strict=True):
            assert after.listening.matched_layers == counts[after.stage]
            stream = after.workload.tokens * after.shape.hidden_size
            if name == "all" and after.stage == "pretrain":
                more = after.under_zero(2).total - before.under_zero(2).total
                # What compares one layer's streams is gone before the next one's are compared.
                assert 0 < more <= (2 + 4) * counts[after.stage] * stream + 4 * 4 * stream


def test_the_advice_fits(llama: str) -> None:
    made = planned(sheared_llama(llama, "training.engine=torch"))
    assert made.advice is not None
    assert made.advice.startswith("prune will not fit; this would: ")
    changes = made.advice.partition("this would: ")[2].split()
    assert "training.engine=deepspeed" in changes
    again = planned(sheared_llama(llama, *changes))
    assert again.advice is None
    assert all(again.hardware.fit(stage.held(again.choice)) == "yes" for stage in again.stages)


def test_advice_under_fsdp2_keeps_the_engine(llama: str) -> None:
    """Whole sums of 6.7B gradients do not fit into 40 GB; shares of them do."""
    fsdp2 = ("training.engine=fsdp2", "prune.micro_batch_size=1")
    made = planned(sheared_llama(llama, *fsdp2), gigabytes=40)
    assert made.advice is not None
    changes = made.advice.partition("this would: ")[2].split()
    assert "training.fsdp2.sum_gradients=micro_batch" in changes
    assert not any("engine" in change or "zero_stage" in change for change in changes)
    again = planned(sheared_llama(llama, *fsdp2, *changes), gigabytes=40)
    assert all(again.hardware.fit(stage.held(again.choice)) == "yes" for stage in again.stages)


@pytest.mark.parametrize(
    ("sections", "engines"),
    [
        (["pretrain.lora={rank: 8}"], {"training.engine=fsdp2"}),
        (["pretrain.lora={rank: 8}", "pretrain.ist={}"], set()),
    ],
)
def test_advice_is_what_the_recipe_accepts(llama: str, sections: list[str], engines: set[str]) -> None:
    """Adapters are trained under torch and FSDP2 alone, and what lets some of them rest under torch."""
    torch_alone = ("training.engine=torch", *sections)
    made = planned(sheared_llama(llama, *torch_alone))
    assert made.advice is not None
    changes = made.advice.partition("this would: ")[2].split()
    assert {change for change in changes if "engine" in change} == engines
    again = planned(sheared_llama(llama, *torch_alone, *changes))
    assert (again.advice is None) == bool(engines)


def test_advice_for_one_gpu_and_for_too_few(llama: str) -> None:
    alone = planned(sheared_llama(llama), gpus=1)
    assert alone.advice is not None
    assert "training.deepspeed.offload_optimizer=cpu" in alone.advice
    small = planned(sheared_llama(llama), gpus=2, gigabytes=12)
    assert small.advice is not None
    # More than the optimiser's state has to go, before more GPUs are asked for.
    assert "training.deepspeed.offload_parameters=cpu" in small.advice
    offloaded = planned(sheared_llama(llama, *small.advice.partition("this would: ")[2].split()), gpus=2, gigabytes=12)
    assert offloaded.advice is None
    less = planned(sheared_llama(llama, "training.engine=fsdp2", "prune.micro_batch_size=1"), gpus=2, gigabytes=45)
    assert less.advice is not None
    assert less.advice.endswith(" and --gpus 4")
    hopeless = planned(sheared_llama(llama), gpu="H100", gigabytes=1)
    assert hopeless.advice is not None
    assert "GPUs with more memory" in hopeless.advice


def test_nothing_to_say_where_all_fits(llama: str) -> None:
    assert planned(sheared_llama(llama), gigabytes=400).advice is None


def test_a_gpu_without_bf16_computes_in_fp32(llama: str) -> None:
    assert planned(sheared_llama(llama, "training.precision=auto"), gpu="V100 SXM2").precision == torch.float32


def test_checkpoints_kept_for_good_take_disk(llama: str) -> None:
    usual = planned(sheared_llama(llama)).stages[0].disk
    more = planned(sheared_llama(llama, "prune.keep_every=800 steps")).stages[0].disk
    assert more == usual // 3 * (3 + 4)


def test_averaged_training_losses_cost_no_held_out_passes(llama: str) -> None:
    usual, free = (planned(sheared_llama(llama, *more)).stages for more in ((), ("mixture.losses=training",)))
    assert free[0].flops == usual[0].flops
    # Validation losses are looked at ten times; a twentieth at the most.
    looks = 10 * 7 * 65_536 / free[1].tokens / 3
    assert free[1].heldout_flops == pytest.approx(free[1].flops * looks)
    assert free[1].heldout_flops <= 0.05 * free[1].flops
    none = planned(sheared_llama(llama, "mixture.losses=training", "pretrain.validation_interval=null")).stages[1]
    assert none.heldout_flops == 0 < (usual[1].heldout_flops or 0)
    assert 0 < (free[0].heldout_flops or 0) < (usual[0].heldout_flops or 0)  # the losses at the end


def test_attention_within_documents_takes_at_most_what_is_said(tiny_recipe: Path) -> None:
    assert "attention is counted over whole rows" not in shear("plan", tiny_recipe, "--gpu", "H100").stdout
    said = shear("plan", tiny_recipe, "data.attention=documents", "--gpu", "H100").stdout
    assert "attention is counted over whole rows" in said


def test_the_command(tiny_recipe: Path) -> None:
    result = shear("plan", tiny_recipe, "--gpus", "2", "--gpu", "NVIDIA H100 80GB HBM3", "--mfu", "0.5")
    assert result.exit_code == 0, result.output
    for words in ("2 x NVIDIA H100 80GB HBM3 of 80 GB, fp32", "hours at MFU 0.5", "torch (chosen)", "ZeRO-3"):
        assert words in result.stdout
    assert result.stdout.count(" yes ") == 10
    assert "n/a" not in result.stdout
    assert not load_recipe(tiny_recipe).run_dir.exists()


def test_small_figures_are_not_rounded_to_nothing(tiny_recipe: Path) -> None:
    said = shear("plan", tiny_recipe, "--gpus", "1", "--gpu", "H100").stdout
    stages, memory = said.split("memory of one GPU in MB when it holds most")
    assert "0.00B" not in said
    assert " 192 " in next(line for line in stages.splitlines() if line.startswith("prune "))
    assert len(re.findall(r"[1-9]\d* MB|0\.[1-9]+ MB", stages)) >= 2
    assert float(re.findall(r"torch \(chosen\).*?([0-9.]+) +yes", memory)[0]) > 0


def test_neither_weights_nor_corpus_are_needed(tiny_recipe: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(load_recipe(tiny_recipe).model.source) / "config.json", bare)
    overrides = (f"model.source={bare}", "data.corpus=absent")
    result = shear("plan", tiny_recipe, *overrides, "--gpu", "H100")
    assert result.exit_code == 0, result.output
    assert "how many domains" in result.stdout
    named = shear("plan", tiny_recipe, *overrides, "data.domains=[letters, digits]", "--gpu", "H100")
    assert "how many domains" not in named.stdout


def test_an_unknown_gpu_has_no_times_but_says_how_to_get_them(tiny_recipe: Path) -> None:
    result = shear("plan", tiny_recipe, "--gpu", "Abacus")
    assert result.exit_code == 0, result.output
    assert "no peak is known of Abacus" in result.stdout
    assert "H100 SXM" in result.stdout
    assert "give --memory GB" in result.stdout
    assert "give --memory GB" not in shear("plan", tiny_recipe, "--gpu", "Abacus", "--memory", "12").stdout


def test_a_budget_is_planned_with_a_stand_in(tiny_recipe: Path) -> None:
    result = shear("plan", tiny_recipe, *BUDGET, "target.parameters=20000", "--gpu", "H100")
    assert result.exit_code == 0, result.output
    assert "20,000 at most" in result.stdout
    assert "the source with 2 layers" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "0"], "--gpus = 0"),
        (["--gpus", "3"], "the 2 sequences of prune.batch_size equally: [1, 2]"),
        (["--mfu", "0"], "--mfu = 0"),
        (["--mfu", "40"], "--mfu = 40"),
        (["--memory", "-1"], "--memory = -1"),
        (["model.source=absent"], "model.source = 'absent'"),
        (["target.hidden_size=64"], "target.hidden_size = 64"),
    ],
)
def test_bad_input_is_refused(tiny_recipe: Path, arguments: list[str], expected: str) -> None:
    assert expected in error_of("plan", tiny_recipe, *arguments)


@pytest.mark.parametrize("document", ["plan.md", "distributed.md"])
def test_what_documents_show_is_what_the_command_says(document: str) -> None:
    page = (ROOT / "docs" / document).read_text(encoding="utf-8")
    assert "$ shear plan" in page
    assert script("plans").embedded(page) == page, "make docs"


def test_phases_are_those_of_the_run(llama: str) -> None:
    recipe = sheared_llama(
        llama, "mixture.reference=source", "prune.initial_masks=activations", "prune.compensate=true"
    )
    recipe = overridden(recipe, overrides=["prune.sparsity_warmup=0 steps"])
    made = planned(recipe)
    found = {phase.what: phase for phase in phases(recipe, made=made)}
    assert list(found) == [
        "prune: load",
        "prune: reference losses",
        "prune: importance (activations)",
        "prune: refit",
        "prune: a step",
        "prune: held-out losses, all",
        "prune: a checkpoint",
        "cut",
        "pretrain: load",
        "pretrain: a step",
        "pretrain: held-out losses, all",
        "pretrain: a checkpoint",
        "evaluate: 8 models",
        "evaluate: what models write, speed",
    ]
    asked = overridden(recipe, overrides=["evaluation.tasks=[paper11]"])
    *before, tasks = phases(asked, made=planned(asked))
    assert [phase.what for phase in before] == list(found)
    assert (tasks.what, tasks.processes, tasks.seconds) == ("evaluate: tasks, paper11", 8, None)
    foreground = overridden(recipe, overrides=["training.checkpoint_writing=foreground"])
    saved = {phase.what: phase for phase in phases(foreground, made=planned(foreground))}["prune: a checkpoint"]
    staged = found["prune: a checkpoint"]
    # 12 bytes for each parameter of a share, unless a tensor is copied at a time.
    assert staged.host - saved.host == pytest.approx(12 * 6_738_415_616 / 8, rel=1e-3)
    step, reference = found["prune: a step"], found["prune: reference losses"]
    speed = 0.4 * 989.4e12
    assert {found[name].processes for name in found if not name.endswith(("load", "cut", "speed"))} == {8}
    assert step.seconds == pytest.approx(made.stages[0].flops / 3200 / (8 * speed))
    # 6.6 billion numbers that are multiplied, and attention: a forward pass over what updates read, by all GPUs.
    tokens = 7 * (50 * 32 * 3 // (10 * 7)) * 4096
    per_token = 2 * (6_738_415_616 - 32000 * 4096) + 2 * 32 * 4096 * 4096
    assert reference.seconds == pytest.approx(per_token * tokens / (8 * speed))
    # 63 updates, and the losses at the end; what the source reads is a phase of its own.
    assert found["prune: held-out losses, all"].flops == pytest.approx(64 * reference.flops)
    assert made.stages[0].heldout_flops == pytest.approx(65 * reference.flops)
    # Embedding, head, final norm and a layer: no process loads more where weights are shared out, or kept in bf16.
    assert found["prune: load"].memory == 4 * (2 * 32000 * 4096 + 4096 + 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert found["prune: a checkpoint"].disk == 12 * 6_738_415_616
    # Every tenth of the steps, or every half an hour.
    hours = {stage.stage: (stage.seconds or 0) / 3600 for stage in made.stages}
    assert found["prune: a checkpoint"].times == max(10, int(2 * hours["prune"]))
    assert found["pretrain: a checkpoint"].times == int(2 * hours["pretrain"]) > 10
    assert found["prune: refit"].disk == made.refitted == 4 * 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    rotated = overridden(recipe, overrides=["prune.rotate=pca"])
    first, *rest = phases(rotated, made=planned(rotated))
    assert [phase.what for phase in rest] == list(found)
    assert (first.what, first.processes, first.disk) == ("prune: rotate", 8, (2 + 4) * 6_738_415_616)
    # Of gradients: 32 layers, the final norm and what goes back, in fp32, of an eighth of the text.
    graded = overridden(recipe, overrides=["prune.initial_masks=taylor", "prune.calibration_tokens=32768"])
    by_gradients = {phase.what: phase.host for phase in phases(graded, made=planned(graded))}
    assert by_gradients["prune: importance (Taylor, first order)"] == 4 * 34 * 4096 * 32768 // 8
    assert found["prune: importance (activations)"].host == 0
    assert sum(found[name].seconds or 0 for name in ("prune: importance (activations)", "prune: refit")) > 0


def test_what_is_measured_by_the_main_process_before_weights_are_chosen(llama: str) -> None:
    shared = sheared_llama(llama, "training.engine=fsdp2", "sparsify={criterion: wanda, pattern: '2:4'}")
    layer, outside = 4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048, 2 * 32000 * 2048 + 2048
    weights = 24 * layer + outside
    per_token = 2 * (weights - 32000 * 2048) + 2 * 24 * 2048 * 4096

    def measured(*overrides: str) -> tuple[Phase, Phase]:
        recipe = overridden(shared, overrides=overrides)
        every = {phase.what: phase for phase in phases(recipe, made=planned(recipe))}
        return every["pretrain: load"], next(every[what] for what in every if "norms" in what or "salience" in what)

    load, norms = measured("pretrain.ast={scores: wanda}")
    assert load.memory == norms.memory == 4 * (layer + outside)
    assert (norms.processes, norms.flops) == (1, pytest.approx(32 * 4096 * per_token))
    load, salience = measured("pretrain.speft={}")
    assert load.memory == 4 * (layer + outside)
    matrices = 24 * (layer - 2 * 2048)
    assert (salience.what, salience.processes) == ("pretrain: salience (gradient)", 1)
    assert salience.memory == 4 * (weights + outside + 2 * matrices) + 2 * weights
    assert salience.flops == pytest.approx(3 * 64 * 4096 * per_token)
    _, magnitude = measured("pretrain.speft={salience: magnitude}")
    assert (magnitude.memory, magnitude.flops) == (4 * (weights + outside + matrices), 0)


def test_the_reference_is_read_before_the_first_stage_whichever_that_is(llama: str) -> None:
    without = ("target=null", "prune=null")
    given, own = (planned(sheared_llama(llama, *without, *more)) for more in ((), ("mixture.reference=source",)))
    assert [stage.stage for stage in own.stages] == ["pretrain"]
    before, after = given.stages[0], own.stages[0]
    assert (before.reference_flops, after.reference_flops) == (0, after.heldout_flops - before.heldout_flops)
    assert after.reference_flops > 0
    assert after.seconds > before.seconds
    recipe = sheared_llama(llama, *without, "mixture.reference=source")
    found = {phase.what: phase.flops for phase in phases(recipe, made=own)}
    assert found["pretrain: reference losses"] == after.reference_flops
    assert found["pretrain: held-out losses, all"] == before.heldout_flops


def test_one_shot_sparsity_is_a_phase(llama: str) -> None:
    def one_shot(*overrides: str) -> Phase:
        recipe = sheared_llama(
            llama, "sparsify={criterion: wanda, pattern: '2:4', samples: 16, seqlen: 2048}", *overrides
        )
        found = phases(recipe, made=planned(recipe))
        names = [phase.what for phase in found]
        assert names[names.index("cut") + 2] == "pretrain: load"
        return found[names.index("cut") + 1]

    wanda = one_shot()
    # What a layer of the target has, and its activations.
    layer = 4 * 2048 * 2048 + 3 * 2048 * 5504 + 2 * 2048
    tokens = 16 * 2048
    per_token = 2 * (24 * layer + 2048) + 2 * 24 * 2048 * 2048
    assert (wanda.what, wanda.processes, wanda.memory) == ("sparsify: wanda", 1, 4 * layer)
    assert (wanda.host, wanda.disk) == (4 * tokens * 2048, 3 * 4 * 1_345_423_360)
    assert wanda.flops == pytest.approx(2 * tokens * per_token)
    assert wanda.seconds == pytest.approx(wanda.flops / (0.4 * 989.4e12))
    assert one_shot("sparsify.true_sequential=true").flops == pytest.approx(2.5 * wanda.flops)
    assert one_shot("sparsify.criterion=gblm").disk > wanda.disk
    assert one_shot("sparsify.criterion=magnitude").flops == 0
    assert one_shot("sparsify.allocation=owl").flops is None


_FIRST = "{num_hidden_layers: 28, hidden_size: 3072, intermediate_size: 8192, num_attention_heads: 24}"
_LAST = "{num_hidden_layers: 24, hidden_size: 2048, intermediate_size: 5504, num_attention_heads: 16}"
CASCADE = f"target=[{_FIRST}, {_LAST}]"


def test_each_run_of_a_cascade_is_planned_from_the_one_before(llama: str) -> None:
    recipe = sheared_llama(llama, CASCADE, "distill={weight: 0.5}")
    (first, before), (last, after) = plans(
        recipe, hardware=Hardware.of(processes=8, gpu="H100", gigabytes=None, mfu=0.4)
    )
    assert (before.name, after.name) == ("sheared-llama-1.3b-step-1", "sheared-llama-1.3b")
    assert before.target == after.source
    assert (after.source.num_hidden_layers, after.source.hidden_size) == (28, 3072)
    assert after.target is not None
    assert after.target.hidden_size == 2048
    # The first source is the teacher of both.
    assert before.source == before.teacher == after.teacher
    assert [stage.steps for stage in (*before.stages, *after.stages)] == [3200, 12000, 3200, 48000]
    assert plan(recipe, hardware=before.hardware).name == before.name
    found = [phase.what for phase in phases(first, made=before, evaluates=False)]
    assert found[-1] == "pretrain: a checkpoint"
    *_, tables, written = phases(last, made=after)
    assert written.what == "evaluate: what models write, speed"
    # The first source is measured beside the second.
    assert (after.sources_before, after.first_source) == ([before.source], before.source)
    models = 4 + len(last.evaluation.baselines)
    assert tables.what == f"evaluate: {models} models"
    assert tables.memory == measured(replace(after, source=before.source, sources_before=[])) == measured(after)


def test_a_cascade_through_a_budget_is_planned_with_what_it_was_cut_from(llama: str) -> None:
    target = f"target=[{{parameters: 3_000_000_000, uniform: true}}, {_LAST}]"
    hardware = Hardware.of(processes=8, gpu="H100", gigabytes=None, mfu=0.4)
    (_, before), (_, after) = plans(sheared_llama(llama, target), hardware=hardware)
    assert (before.learned, after.learned) == (False, True)
    assert before.source == after.source


def test_the_command_plans_all_runs_of_a_cascade(llama: str) -> None:
    result = shear("plan", RECIPES / "sheared-llama-1.3b.yaml", llama, CASCADE, "--gpus", "8", "--gpu", "H100")
    assert result.exit_code == 0, result.output
    assert "cascade: sheared-llama-1.3b-step-1" in result.stdout
    assert "cascade: sheared-llama-1.3b " in result.stdout
    made = plans(sheared_llama(llama, CASCADE), hardware=Hardware.of(processes=8, gpu="H100", gigabytes=None, mfu=0.4))
    hours = sum(stage.seconds or 0 for _, each in made for stage in each.stages) / 3600
    assert "all 2 runs: " in result.stdout
    assert f" {hours:,.1f} hours at MFU 0.4" in result.stdout
