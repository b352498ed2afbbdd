"""Recipes: what they resolve to, and that every mistake is named with its place and its mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shearing.errors import CombinedShearingError, ShearingError
from shearing.runs.recipe import Recipe, load_recipe
from shearing.settings.document import embed_reference, keys, reference
from shearing.settings.quantities import Duration

BASE = Path(__file__).parent / "base.yaml"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def message(*overrides: str, path: Path = BASE) -> str:
    with pytest.raises(ShearingError) as raised:
        load_recipe(path, overrides=overrides)
    return str(raised.value)


def test_overrides_come_after_the_file_and_are_read_as_yaml() -> None:
    recipe = load_recipe(
        BASE,
        overrides=[
            "prune.learning_rate=1e-5",
            "prune.duration=0.1B tokens",
            "data.domains=[books, code]",
            "mixture.initial_weights.books=0.25",
            "mixture.initial_weights.code=0.75",
            "target.intermediate_size=null",
            "seed=1",
            "seed=2",
        ],
    )
    assert recipe.prune.learning_rate == 1e-5
    assert recipe.prune.duration == Duration(tokens=100_000_000)
    assert recipe.mixture.initial_weights == {"books": 0.25, "code": 0.75}
    assert recipe.target.intermediate_size is None
    assert recipe.seed == 2


def test_resolved_yaml_loads_to_the_same_recipe_and_documents_every_key(tmp_path: Path) -> None:
    recipe = load_recipe(BASE, overrides=["mixture.reference=losses.json", "prune.warmup=7 steps"])
    text = recipe.to_yaml()
    assert load_recipe(write(tmp_path, text)) == recipe
    lines = text.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        assert line.strip().startswith("#") or not line or above.strip().startswith("#"), line


def test_flat_names_every_key_once() -> None:
    flat = load_recipe(BASE).flat()
    assert flat["prune.betas"] == [0.9, 0.95]
    assert list(flat) == [name for name, _ in keys(Recipe)]


def test_every_key_is_described() -> None:
    assert [name for name, field in keys(Recipe) if not field.description] == []


def test_reference_lists_every_key_and_is_put_between_the_marks() -> None:
    text = reference(Recipe)
    assert [name for name, _ in keys(Recipe) if f"`{name.rpartition('.')[2]}`" not in text] == []
    document = "before <!-- keys: begin (make docs) --> old <!-- keys: end --> after"
    embedded = embed_reference(document, model=Recipe)
    assert embedded.startswith("before ")
    assert embedded.endswith(" after")
    assert " old " not in embedded
    with pytest.raises(ValueError, match="keys: begin"):
        embed_reference("no marks", model=Recipe)


def test_json_schema_covers_every_section() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False


def test_steps_and_tokens_of_a_stage() -> None:
    recipe = load_recipe(BASE, overrides=["prune.batch_size=2048 tokens", "prune.duration=5000 tokens"])
    assert recipe.prune.tokens_per_step(sequence_length=recipe.data.sequence_length) == 2048
    assert recipe.prune.total_steps(sequence_length=recipe.data.sequence_length) == 3


def test_unknown_key_is_named_with_its_line_and_the_nearest_valid_one(tmp_path: Path) -> None:
    text = BASE.read_text().replace("  calibration_tokens:", "  calibraton_tokens:")
    path = write(tmp_path, text)
    line = text.splitlines().index(next(line for line in text.splitlines() if "calibraton_tokens" in line)) + 1
    found = message(path=path)
    assert f"{path}:{line}: prune.calibraton_tokens" in found
    assert "did you mean prune.calibration_tokens?" in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prune.lerning_rate=1", "did you mean prune.learning_rate?"),
        ("modle.source=x", "did you mean model?"),
        ("learning_rate=1", "did you mean prune.learning_rate?"),
        ("prune.target.hidden_size=1", "prune.target = {'hidden_size': 1}"),
        ("prune.granularities=[layer]", "did you mean layers?"),
        ("mixture.update=papr", "did you mean paper?"),
        ("target={num_hidden_layers:10}", "target = 'num_hidden_layers:10'"),
        ("target=[{num_hidden_layers:10}]", "write 'num_hidden_layers: 10'"),
        ("target=[{num_hiden_layers: 10}]", "did you mean target.num_hidden_layers?"),
        ("mixture.initial_weights={books:0.5, code:0.5}", "mixture.initial_weights = 'books:0.5'"),
        ("seed=x", "seed = 'x'"),
        ("seed=1.5", "a valid integer"),
        ("target.num_hidden_layers=true", "no true or false"),
        ("training.compile=3", "a valid boolean"),
        ("prune.duration=3 epochs", "'3 epochs' is no duration"),
        ("prune=5", "Mask learning"),
        ("prune.learning_rate=.inf", "a finite number"),
        ("prune.learning_rate=0", "greater than 0"),
        ("prune.betas=[0.9, 1.0]", "prune.betas.1 = 1.0"),
        ("mixture.initial_weights={books: x}", "mixture.initial_weights"),
        ("mixture.initial_weights.books=0", "a positive number for each domain"),
        ("data.domains=[]", "at least one domain"),
        ("data.domains=[books, books]", "each once"),
        ("prune.granularities=[hidden, hidden]", "each once"),
        ("prune.granularities=[]", "at least one granularity"),
        ("prune.granularities=[layers, sublayers]", "remove one of the two"),
        ("target.parameters=64M", "either a budget or sizes by name"),
        ("target.uniform=true", "true only with target.parameters"),
        ("target.multiple_of=64", "1 without target.uniform"),
        ("prune.batch_size=1000 tokens", "'768 tokens' or '1024 tokens'"),
        ("prune.micro_batch_size=3", "a divisor of the batch of 4 sequences"),
        ("prune.duration=20%", "in steps or tokens"),
        ("pretrain.duration=0", "at least one step"),
        ("prune.warmup=33 steps", "at most the stage's 24 steps"),
        ("pretrain.schedule=wsd_sqrt", "'cosine', 'wsd', 'linear' or 'constant'"),
        ("one_schedule=true", "what prune.warmup is: 33%"),
        ("prune.sparsity_warmup=17 steps", "together with prune.freeze = 100%"),
        ("pretrain.checkpoint_interval=0", "more than 0"),
        ("pretrain.keep_every=0 steps", "more than 0"),
        ("prune.validation_interval=0%", "more than 0"),
        ("mixture.pretrain_interval=0%", "more than 0"),
        ("mixture.divergence=0", "greater than 0"),
        ("mixture.loss_ema=1.5", "less than or equal to 1"),
        ("mixture.floor=0.3", "only with mixture.update = robust; it is paper"),
        ("mixture.divergence=0.1", "set mixture.divergence=0.05, or mixture.update=robust"),
        ("evaluation.tokens_per_domain=100", "at least one sequence: 256 tokens"),
        ("prune.learning_rate", "key=value"),
        ("prune..x=1", "key=value"),
        ("data.domains=[a", "a YAML value"),
        ("pretrain.betas=[0.9]", "pretrain.betas.1 = 'missing'"),
        ("pretrain.betas=[]", "pretrain.betas.0 = 'missing'"),
        ("name=2024-02-30", "day is out of range for month"),
        ("prune.duration=0,4B tokens", "decimals after a point, as 0.4B"),
    ],
)
def test_one_mistake_in_an_override(override: str, expected: str) -> None:
    found = message(override)
    assert expected in found
    assert override.split("=")[0].rstrip(".x") in found
    assert "to mend: " in found


def test_an_override_of_a_part_of_a_list_does_not_drop_the_list(tmp_path: Path) -> None:
    data = yaml.safe_load(BASE.read_text())
    data["target"] = [{"intermediate_size": 1280}, {"intermediate_size": 1024}]
    path = write(tmp_path, yaml.safe_dump(data))
    assert load_recipe(path, overrides=["prune.betas=[0.9, 0.99]"]).cascade is not None
    found = message("target.intermediate_size=1000", path=path)
    assert "override target.intermediate_size=1000: target = [{'intermediate_size': 1280}" in found
    assert "write it as target='[{…}, {…}]'" in found
    whole = "target=[{intermediate_size: 1280}, {intermediate_size: 1000}]"
    assert load_recipe(path, overrides=[whole]).target.intermediate_size == 1000
    assert "target='[{…}, {…}]'" in message(whole, "target.intermediate_size=900")


def test_target_must_say_something() -> None:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert "parameters, or at least one of" in message(*(f"target.{name}=null" for name in names))


def test_weights_must_be_of_the_chosen_domains_and_a_reference_may_know_more() -> None:
    found = message("data.domains=[books, code]", "mixture.initial_weights={books: 1, coed: 1}")
    assert "add code; remove coed (did you mean code?)" in found
    recipe = load_recipe(BASE, overrides=["data.domains=[books]", "mixture.reference={books: 1, code: 1}"])
    assert recipe.mixture.reference == {"books": 1.0, "code": 1.0}
    assert "add code" in message("data.domains=[books, code]", "mixture.reference={books: 1}")


def test_constants_of_another_rule_are_refused_unless_nothing_is_updated() -> None:
    found = message("mixture.update=robust", "mixture.smoothing=0.1")
    assert "mixture.step_size = 0.25" in found  # of the demo
    assert "mixture.smoothing = 0.1" in found
    assert "set mixture.step_size=1.0, or mixture.update=paper" in found
    robust = load_recipe(BASE, overrides=["mixture.update=robust", "mixture.step_size=1.0", "mixture.floor=0.5"])
    assert robust.mixture.floor == 0.5
    constant = load_recipe(BASE, overrides=["mixture.update=constant", "mixture.floor=0.5", "mixture.ema=0.5"])
    assert constant.mixture.step_size == 0.25


@pytest.mark.parametrize("overrides", [[], ["distill={}", "mixture.losses=training", "mixture.reference=teacher"]])
def test_the_weight_of_an_average_is_refused_where_there_is_none(overrides: list[str]) -> None:
    assert "set mixture.ema=0.1, or those" in message(*overrides, "mixture.ema=0.5")
    load_recipe(BASE, overrides=[*overrides, "mixture.ema=0.1"])
    averaged = ["mixture.losses=training", "mixture.reference=online", "mixture.ema=0.5"]
    assert load_recipe(BASE, overrides=averaged).mixture.ema == 0.5


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, BASE.read_text().replace("seed: 0", "sede: 0"))
    with pytest.raises(CombinedShearingError) as raised:
        load_recipe(path, overrides=["prune.betas=[1, 2]", "target.hidden_size=none"])
    assert [error.field for error in raised.value.errors] == [
        "target.hidden_size",
        "prune.betas.0",
        "prune.betas.1",
        "sede",
    ]
    assert "override prune.betas=[1, 2]: prune.betas.0 = 1" in str(raised.value)
    assert f"{path}:6: sede = 0" in str(raised.value)


def test_attention_within_documents_needs_a_kernel_that_can(tmp_path: Path) -> None:
    overrides = ["data.attention=documents", "model.attn_implementation=eager"]
    with pytest.raises(ShearingError, match=r"eager would need an S x S mask"):
        load_recipe(BASE, overrides=overrides)


def test_all_contradictions_are_reported_together() -> None:
    found = message("prune.micro_batch_size=3", "target.uniform=true")
    assert "override prune.micro_batch_size=3: prune.micro_batch_size" in found
    assert "override target.uniform=true: target.uniform" in found


def test_missing_keys_are_named_with_their_section(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nrun_dir: y\nmodel: {}\n")
    found = message(path=path)
    assert f"{path}:3: model.source = 'missing'" in found
    assert "add it: Folder or hub name" in found
    for section in ("data", "pretrain"):
        assert f"{path}: {section} = 'missing'" in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a YAML mapping"),
        ("- a\n- b\n", "a YAML mapping"),
        ("name: [1\nseed: 2\n", "valid YAML"),
        ("name: x\nseed: 1\nseed: 2\n", "remove one of lines 2 and 3"),
        ("name: x\nprune:\n  freeze: 1\n  freeze: 2\n", "prune.freeze = 'written twice'"),
        ("name: \t{x\n", "valid YAML"),
        ("name: x\nseed: \x01\n", "recipe.yaml:2: "),
        ("name: x\nseed: \x01\n", "the character 0x01"),
        ("seed: 1\nname: 2024-02-30\n", "recipe.yaml:2: "),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(path=write(tmp_path, text))


def test_no_such_file(tmp_path: Path) -> None:
    assert "No such file" in message(path=tmp_path / "absent.yaml")
    assert "a readable YAML file" in message(path=tmp_path)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "no UTF-8 text" in message(path=path)


def test_yaml_anchors_work(tmp_path: Path) -> None:
    data = yaml.safe_load(BASE.read_text())
    stage = data.pop("pretrain")
    text = yaml.safe_dump(data) + "pretrain:\n  <<: &base {batch_size: 4 sequences}\n  duration: 7 steps\n"
    assert stage
    assert load_recipe(write(tmp_path, text)).pretrain.duration == Duration(steps=7)


@pytest.mark.parametrize("override", ["prune.initial_masks=importance", "evaluation.baselines=[random, importance]"])
def test_a_value_that_is_called_otherwise_now_is_refused_with_its_name(override: str) -> None:
    said = message(override)
    assert "allowed: 'activations': it was called 'importance'" in said
    assert "to mend: write activations" in said
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["pretrain.schedule=wsd", "pretrain.decay=41 steps", "pretrain.warmup=8 steps"],
            "at most the stage's 48 steps",
        ),
        (["pretrain.schedule=wsd", "pretrain.decay=0%"], "set pretrain.schedule=constant"),
        (["prune.schedule=wsd", "prune.warmup=60%", "prune.decay=50%"], "prune.decay = '50%'"),
    ],
)
def test_a_decay_that_cannot_be(overrides: list[str], expected: str) -> None:
    assert expected in message(*overrides)


ONE = ["one_schedule=true", "prune.warmup=10%", "pretrain.warmup=10%", "prune.final_learning_rate=0.1"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["pretrain.learning_rate=1e-4"], "pretrain.learning_rate"),
        (["pretrain.schedule=wsd"], "pretrain.schedule"),
        (["prune.schedule=wsd", "pretrain.schedule=wsd", "pretrain.decay=5 steps"], "pretrain.decay"),
        (["pretrain.final_learning_rate=0.2"], "pretrain.final_learning_rate"),
        (["pretrain.batch_size=8"], "pretrain.batch_size"),
        (["prune.warmup=73 steps", "pretrain.warmup=73 steps"], "the 72 steps of both stages"),
    ],
)
def test_one_schedule_is_not_two(overrides: list[str], field: str) -> None:
    assert field in message(*ONE, *overrides)


def test_one_schedule_has_the_rates_of_one_run() -> None:
    """Of a run without mask learning, as long as both stages."""
    both = load_recipe(BASE, overrides=ONE)
    straight = load_recipe(BASE, overrides=["prune=null", "target=null", "pretrain.duration=72", "pretrain.warmup=10%"])
    assert [both.learning_rates("prune").at(step) for step in range(24)] + [
        both.learning_rates("pretrain").at(step) for step in range(48)
    ] == [straight.learning_rates("pretrain").at(step) for step in range(72)]
    # What does not matter to the schedule may differ.
    load_recipe(BASE, overrides=[*ONE, "prune.decay=10%", "prune.micro_batch_size=2"])
    constant = ["prune.schedule=constant", "pretrain.schedule=constant", "pretrain.final_learning_rate=0.3"]
    load_recipe(BASE, overrides=[*ONE, *constant])
