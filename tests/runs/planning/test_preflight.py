"""How often each domain will be walked through, and what is said of it before a run starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from shearing.data.corpus.corpus import Corpus
from shearing.errors import ShearingError, key
from shearing.models.loading import load_config
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.reconstruction import Reconstruction
from shearing.runs.context import RunContext
from shearing.runs.planning.checks.pruning import require_moments
from shearing.runs.planning.preflight import preflight, survey
from shearing.runs.planning.summary import Plan, render
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.stages.run import run
from tests.cli.test_cli import shear


def plan_of(recipe: Path, *overrides: str) -> tuple[Recipe, Plan, str]:
    resolved = load_recipe(recipe, overrides=overrides)
    plan = preflight(RunContext(resolved), stages=["prune"])
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(plan))
    return resolved, plan, " ".join(capture.get().split())


def rows_of(recipe: Recipe) -> dict[str, int]:
    corpus = Corpus.open(recipe.data.corpus)
    return {name: corpus.train_rows(name, sequence_length=16) for name in corpus.domains}


@pytest.mark.parametrize(
    ("overrides", "largest"),
    [
        (["mixture.update=constant"], {"letters": 0.25, "digits": 0.75}),
        (["mixture.update=paper", "mixture.smoothing=0.1"], {"letters": 0.95, "digits": 0.95}),
        # Two domains: the divergence is (q - p)^2 / 2 p (1 - p), so q = p + sqrt(2 rho p (1 - p)).
        (
            ["mixture.update=robust", "mixture.floor=0"],
            {"letters": 0.25 + 0.1875**0.5 / 5, "digits": 0.75 + 0.1875**0.5 / 5},
        ),
    ],
)
def test_passes_at_the_initial_and_at_the_largest_weights(
    tiny_recipe: Path, overrides: list[str], largest: dict[str, float]
) -> None:
    given = ["mixture.initial_weights={letters: 1, digits: 3}", "mixture.divergence=0.02"]
    if "mixture.update=paper" in overrides:
        given.pop()
    recipe, plan, _ = plan_of(tiny_recipe, *given, *overrides)
    rows = rows_of(recipe)
    assert plan.weights == {"letters": 0.25, "digits": 0.75}
    assert plan.largest == pytest.approx(largest)
    for stage, sequences in zip(plan.training, (6 * 2, 4 * 2), strict=True):
        for name in rows:
            assert stage.passes[name] == pytest.approx(sequences * plan.weights[name] / rows[name])
            assert stage.most_passes[name] == pytest.approx(sequences * largest[name] / rows[name])


def test_what_is_repeated_often_is_said(tiny_recipe: Path) -> None:
    assert "repeated often" not in plan_of(tiny_recipe)[2]
    recipe = load_recipe(tiny_recipe)
    rows = rows_of(recipe)
    # Both stages together: three passes at equal weights, six for a domain that gets all there is.
    steps = 3 * sum(rows.values()) // 2 - 6
    said = plan_of(tiny_recipe, f"pretrain.duration={steps} steps", "mixture.initial_weights=uniform")[2]
    assert "repeated often" not in said
    assert "more than 4 passes at the largest weight" in said
    for name in rows:
        assert f"{name} (" in said
    said = plan_of(tiny_recipe, f"pretrain.duration={steps} steps", "mixture.update=constant")[2]
    assert "passes at the largest weight" not in said
    said = plan_of(tiny_recipe, f"pretrain.duration={2 * steps} steps", "mixture.update=constant")[2]
    assert "repeated often: " in said
    assert "arXiv 2305.16264" in said


def test_what_held_out_losses_cost_is_said_with_what_makes_it_less(tiny_recipe: Path) -> None:
    # Three readings of 64 tokens in two domains, forward only, beside six steps of 32 tokens.
    _, plan, said = plan_of(tiny_recipe)
    assert plan.training[0].heldout_share == pytest.approx(3 * 2 * 64 / 3 / (6 * 32))
    assert "held-out losses add 67 % to the training FLOPs of prune; less: mixture.losses=training" in said
    assert "a longer mixture.interval (now 3 steps), or a smaller mixture.heldout_tokens (now 64)" in said
    _, plan, said = plan_of(
        tiny_recipe, "mixture.update=constant", "prune.duration=600 steps", "pretrain.validation_interval=null"
    )
    assert plan.training[1].heldout_share == 0
    assert "held-out losses add" not in said
    # What counts there is the measurement of the end, and in pretraining looks that nothing follows.
    _, plan, _ = plan_of(
        tiny_recipe,
        "mixture.update=constant",
        "mixture.heldout_tokens=64",
        "prune.validation_interval=null",
        "pretrain.validation_interval=1 step",
    )
    assert [stage.lower for stage in plan.training] == [
        "a smaller mixture.heldout_tokens (now 64)",
        "a longer pretrain.validation_interval (now 1 steps)",
    ]


def test_what_is_not_for_a_family_is_said_before_a_run_starts(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    """As a metric of one's own may say."""

    def refuse(_metric: Reconstruction, source: Shape, *, evidence: Evidence) -> int:
        raise ShearingError(
            "source (architecture)",
            value=source.family.model_type,
            allowed="another",
            mend=f"choose another {key('initial_masks')}",
        )

    monkeypatch.setattr(Reconstruction, "units_of_work", refuse)
    with pytest.raises(ShearingError) as refused:
        plan_of(tiny_recipe, "prune.initial_masks=reconstruction")
    assert "choose another prune.initial_masks" in str(refused.value)
    given = ["prune.initial_masks=activations", "evaluation.baselines=[random, reconstruction, reconstruction+refit]"]
    with pytest.raises(ShearingError) as refused:
        plan_of(tiny_recipe, *given)
    assert refused.value.field == "evaluation.baselines"
    assert refused.value.value == ["reconstruction", "reconstruction+refit"]
    assert refused.value.mend == "set evaluation.baselines=[random]"


def test_an_odd_width_by_name_is_doubtful_where_the_sources_is_not(tiny_recipe: Path) -> None:
    # Of the source 32 and 48; the latter is no multiple of 32 itself.
    _, plan, said = plan_of(tiny_recipe, "target.hidden_size=20", "target.intermediate_size=24")
    (doubt,) = [each for each in plan.doubts if "no multiple" in each]
    assert doubt.startswith("target.hidden_size = 20 is no multiple of 32")
    assert "; 32 is, and" in doubt
    assert "doubtful: target.hidden_size = 20" in said
    assert not [each for each in plan_of(tiny_recipe, "target.hidden_size=32")[1].doubts if "no multiple" in each]


def test_losses_of_other_labels_are_refused_and_of_another_attention_doubtful(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    file = tmp_path / "reference.json"
    conditions = {"attention": "full", "loss_across_documents": True}
    file.write_text(json.dumps({"losses": {"digits": 1.0, "letters": 1.0}, "conditions": conditions}))
    given = f"mixture.reference={file}"
    assert not [each for each in plan_of(tiny_recipe, given)[1].doubts if "attention" in each]
    (doubt,) = [
        each for each in plan_of(tiny_recipe, given, "data.attention=documents")[1].doubts if "attention" in each
    ]
    assert doubt == f"{file} was measured with data.attention=full, this run has documents"
    with pytest.raises(ShearingError) as refused:
        plan_of(tiny_recipe, given, "data.loss_across_documents=false")
    assert refused.value.field == "mixture.reference"
    assert refused.value.value == f"{file}, measured with loss_across_documents True"
    assert refused.value.mend.startswith("set mixture.reference to source")


def test_moments_of_another_model_are_refused_before_anything_is_measured(tiny_recipe: Path) -> None:
    straight = ["prune=null", "target=null", "pretrain.duration=1 step"]
    adapted = "pretrain.lora={rank: 2, targets: [q_proj]}"
    sources = {}
    for name, more in (("whole", []), ("adapted", [adapted])):
        made = load_recipe(tiny_recipe, overrides=[*straight, *more, f"run_dir={tiny_recipe.parent / name}"])
        before = run(made, stages=["pretrain"])
        sources[name] = [f"prune.moments_of={before.path}", f"model.source={before.model}"]
    recipe, _, _ = plan_of(tiny_recipe, *sources["whole"])
    with pytest.raises(ShearingError) as refused:
        plan_of(tiny_recipe, *sources["adapted"])
    assert refused.value.field == "prune.moments_of"
    assert "q_proj" in str(refused.value.value)
    assert "set prune.moments_of=null" in refused.value.mend
    config = load_config(recipe.model.source)
    config.intermediate_size = 40
    with pytest.raises(ShearingError, match=r"of shape \[32, 48\]'\n.*of shape \[32, 40\]"):
        require_moments(recipe, config=config)
    with pytest.raises(ShearingError, match=r"prune\.moments_of = .*absent'\n.*whose pretrain is complete"):
        plan_of(tiny_recipe, f"prune.moments_of={tiny_recipe.parent / 'absent'}")


def test_what_is_known_without_text_is_said_beside_the_one_error(tiny_recipe: Path) -> None:
    absent = f"data.corpus={tiny_recipe.parent / 'absent'}"
    whole = plan_of(tiny_recipe)[1]
    recipe = load_recipe(tiny_recipe, overrides=[absent])
    plan, errors = survey(RunContext(recipe), stages=["prune"])
    assert [error.field for error in errors] == ["data.corpus"]
    assert plan is not None
    assert (plan.source, plan.target, plan.disk) == (whole.source, whole.target, whole.disk)
    assert [stage.steps for stage in plan.training] == [stage.steps for stage in whole.training]
    result = shear("config", "check", tiny_recipe, absent)
    assert result.exit_code == 2
    assert f"{plan.target.num_parameters():,}" in result.stdout
    assert "text: not known" in result.stdout
    assert "error: data.corpus" in result.stderr
    (tiny_recipe.parent / "prose").mkdir()
    there = shear("config", "check", tiny_recipe, f"data.corpus={tiny_recipe.parent / 'prose'}")
    assert "error: data.corpus" in there.stderr
    assert "text: not known" not in there.stdout
    # What is wrong besides comes first, and nothing is planned on it.
    plan, errors = survey(RunContext(load_recipe(tiny_recipe, overrides=[absent, "target.hidden_size=4096"])))
    assert plan is None
    assert [error.field for error in errors] == ["target.hidden_size", "data.corpus"]
