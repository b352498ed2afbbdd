"""The comparison table and the sentence that sums it up."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
from rich.console import Console

from shearing.evaluation.table import comparison_table
from shearing.evaluation.verdict import verdict
from shearing.settings.quantities import format_parameters, format_tokens

LOSSES = {
    "source": ("source", "source", {"books": 3.0, "code": 2.0}),
    "random": ("chance", "cut", {"books": 15.0, "code": 14.0}),
    "activations": ("activations", "cut", {"books": 8.0, "code": 5.5}),
    "compact": ("learned masks", "cut", {"books": 5.0, "code": 6.0}),
    "final": ("learned masks, pretrained", "pretrained", {"books": 4.0, "code": 3.0}),
}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    models = {}
    for name, (label, group, losses) in LOSSES.items():
        mean = sum(losses.values()) / len(losses)
        size = 134_515_008 if name == "source" else 64_200_000
        models[name] = {
            "label": label,
            "group": group,
            "parameters": size,
            "parameters_without_embeddings": size - 20_000_000,
            "units": None if name == "source" else f"{len(models):08x}",
            "training_tokens": 409_600,
            "flops": 0.0 if name == "source" else 1.25e15,
            "domains": {domain: {"loss": loss} for domain, loss in losses.items()},
            "mean": {"loss": mean, "perplexity": math.exp(mean), "bits_per_byte": mean / 3},
            "speed": None,
        }
    settings = {"tokens_per_domain": 65_536, "sequence_length": 512, "precision": "float32"}
    return {"settings": settings, "models": models}


def speed(tokens_per_second: float, milliseconds: float) -> dict[str, Any]:
    return {
        "prefill_tokens_per_second": tokens_per_second,
        "decode_milliseconds": milliseconds,
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
    }


def row(evaluation: dict[str, Any], label: str) -> dict[str, Any]:
    table = comparison_table(evaluation)
    cells = next(cells for section in table.sections for name, cells in section.rows if name == label)
    return dict(zip(table.models, cells, strict=True))


def printed(evaluation: dict[str, Any], *, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(evaluation).rich())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_only_models_of_the_same_group_compete(evaluation: dict[str, Any]) -> None:
    assert [name for name, cell in row(evaluation, "books").items() if cell.best] == ["learned masks"]
    assert [name for name, cell in row(evaluation, "code").items() if cell.best] == ["activations"]
    assert [name for name, cell in row(evaluation, "parameters").items() if cell.best] == []


def test_equal_figures_are_both_best(evaluation: dict[str, Any]) -> None:
    evaluation["models"]["random"]["domains"]["books"]["loss"] = 5.0

    assert [name for name, cell in row(evaluation, "books").items() if cell.best] == ["chance", "learned masks"]


def test_the_printed_table_fits_100_columns_and_cuts_no_word(evaluation: dict[str, Any]) -> None:
    magnitude = copy.deepcopy(evaluation["models"]["random"])
    models = evaluation["models"]
    evaluation["models"] = {"source": models.pop("source"), "magnitude": {**magnitude, "label": "magnitude"}, **models}
    evaluation["models"]["source"]["speed"] = speed(512.3, 58.2)
    evaluation["models"]["final"]["speed"] = speed(1080.0, 29.9)
    lines = printed(evaluation)

    assert max(len(line.rstrip()) for line in lines) <= 100
    assert not any("…" in line for line in lines)
    assert any("★ 5.000" in line for line in lines)
    assert any("1,080" in line for line in lines)


def test_markdown_has_a_column_for_each_model_in_every_line(evaluation: dict[str, Any]) -> None:
    evaluation["models"]["random"]["label"] = "a|b"
    markdown = comparison_table(evaluation).markdown()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]

    assert {line.replace(r"\|", "").count("|") for line in lines} == {7}
    assert "**5.000**" in markdown
    assert markdown.rstrip().endswith("65,536 held-out tokens per domain, 512 tokens of context, float32.")


def test_square_brackets_in_names_are_printed(evaluation: dict[str, Any]) -> None:
    for model in evaluation["models"].values():
        model["domains"]["[red]x"] = {"loss": 1.0}

    assert any("[red]x" in line for line in printed(evaluation))


def test_figures_that_are_not_finite_are_left_out(evaluation: dict[str, Any]) -> None:
    diverged = evaluation["models"]["compact"]
    diverged["domains"]["books"]["loss"] = None
    diverged["mean"] = {"loss": None, "perplexity": None, "bits_per_byte": None}

    assert row(evaluation, "books")["learned masks"].text == "–"
    assert "lowest" not in verdict(evaluation)


def test_bits_per_byte_are_left_out_where_no_tokenizer_tells(evaluation: dict[str, Any]) -> None:
    assert any("bits per byte" in line for line in printed(evaluation))
    for model in evaluation["models"].values():
        model["mean"]["bits_per_byte"] = None
    assert not any("bits per byte" in line for line in printed(evaluation))


def test_only_models_of_equal_training_compete(evaluation: dict[str, Any]) -> None:
    for name in ("source", "random", "activations"):
        evaluation["models"][name]["training_tokens"] = 0
    marked = [name for name, cell in row(evaluation, "books").items() if cell.best]

    assert marked == ["activations"]
    assert comparison_table(evaluation).contest == "lowest of one shape and equal training tokens"
    evaluation["models"]["random"]["training_tokens"] = 1
    assert not [name for name, cell in row(evaluation, "books").items() if cell.best]
    assert comparison_table(evaluation).contest is None
    assert "lowest" not in verdict(evaluation)


def test_what_each_model_kept_and_took_stands_above_its_losses(evaluation: dict[str, Any]) -> None:
    rows = comparison_table(evaluation).sections[0].rows
    assert [label for label, _ in rows[:3]] == ["units kept", "training tokens", "FLOPs"]
    assert [cell.text for cell in rows[0][1]] == ["–", "00000001", "00000002", "00000003", "00000004"]
    assert [cell.text for cell in rows[2][1]] == ["0", *["1.2e15"] * 4]


def test_seven_models_fit_eighty_columns_with_every_figure(evaluation: dict[str, Any]) -> None:
    models = evaluation["models"]
    for name in ("magnitude", "reconstruction"):
        models[name] = {**copy.deepcopy(models["random"]), "label": f"units chosen by {name}, refitted"}
    table = comparison_table(evaluation)
    assert len(table.models) == 7
    output = io.StringIO()
    Console(file=output, width=80).print(table.rich())
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for section in table.sections:
        for label, cells in section.rows:
            figures = " ".join(f"★ {cell.text}" if cell.best else cell.text for cell in cells)
            assert any(" ".join(line.split()).endswith(figures) for line in lines), label


def judged(evaluation: dict[str, Any]) -> None:
    """Gives every model tasks, those of the paper among them, and what it writes."""
    for name, model in evaluation["models"].items():
        shares = {"piqa": (0.642, 0.0341), "lambada_openai": (0.0, 0.0), "arc_challenge": (1.0, 0.0)}
        model["tasks"] = {
            task: {"metric": "acc", "value": value, "stderr": error} for task, (value, error) in shares.items()
        }
        distinct = {str(n): 0.25 * n for n in range(1, 5)}
        ways = {way: {"repeated": 0.125, "distinct": distinct} for way in ("greedy", "sampled")}
        near = (
            {"agreement": None, "kl_from_source": None}
            if name == "source"
            else {"agreement": 0.4, "kl_from_source": 1.5}
        )
        model["generation"] = {**near, **ways}


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("width", [80, 100])
def test_any_number_of_models_with_tasks_fits_a_terminal_with_every_figure(
    evaluation: dict[str, Any], count: int, width: int
) -> None:
    models = evaluation["models"]
    for name in ("magnitude", "reconstruction", "third"):
        models[name] = {**copy.deepcopy(models["random"]), "label": f"units chosen by {name}, refitted"}
    judged(evaluation)
    for model in models.values():
        model["speed"] = speed(1080.0, 29.9)
        model["domains"]["a domain of a long name"] = {"loss": 3.25}
    evaluation["models"] = dict(list(models.items())[:count])
    table = comparison_table(evaluation)
    lines = printed(evaluation, width=width)
    assert max(len(line.rstrip()) for line in lines) <= width
    assert not any("…" in line for line in lines)
    for section in table.sections:
        for label, cells in section.rows:
            for part in (cells[:7], cells[7:]):  # the eighth has a table of its own
                figures = " ".join(cell.marked for cell in part)
                assert any(" ".join(line.split()).endswith(figures) for line in lines), label


def test_tasks_have_errors_and_a_mean_and_no_star(evaluation: dict[str, Any]) -> None:
    judged(evaluation)
    assert row(evaluation, "piqa")["chance"].text == "64.2±3.4"
    assert row(evaluation, "arc_challenge")["chance"].text == "100±0.0"
    table = comparison_table(evaluation)
    (section,) = (section for section in table.sections if section.heading.startswith("tasks,"))
    assert [label for label, _ in section.rows] == ["piqa", "lambada_openai", "arc_challenge", "mean"]
    assert {cell.text for cell in section.rows[-1][1]} == {"54.7"}
    assert not any(cell.best for _, cells in section.rows for cell in cells)
    del evaluation["models"]["random"]["tasks"]
    assert row(evaluation, "piqa")["chance"].text == "–"


def test_verdict_has_tasks_and_writing_of_source_and_result(evaluation: dict[str, Any]) -> None:
    judged(evaluation)
    evaluation["models"]["final"]["tasks"]["piqa"]["value"] = 0.5
    assert verdict(evaluation).endswith(
        "Over 3 tasks it reaches 50.0 %, against 54.7 % for the source. Its likeliest next token is the source's in "
        "40 % of places (KL 1.50 nats). Writing greedily, it repeats 12 % of its 4-grams, the source 12 %."
    )
    del evaluation["models"]["final"]["tasks"]
    assert "tasks" not in verdict(evaluation)


def test_names_too_long_for_headings_stand_below_letters(evaluation: dict[str, Any]) -> None:
    models = evaluation["models"]
    for name in ("reconstruction", "reconstruction, refitted", "chosen by reconstruction, refitted, trained"):
        models[name] = {**copy.deepcopy(models["compact"]), "label": name}
    lines = printed(evaluation)

    assert max(len(line.rstrip()) for line in lines) <= 80
    assert any(line.split() == list("abcdefg") for line in lines)
    assert any(line.split() == ["h"] for line in lines)
    assert any(line.strip() == "h  chosen by reconstruction, refitted, trained" for line in lines)


def test_units_that_learning_changed_are_counted_or_said_to_be_none(evaluation: dict[str, Any]) -> None:
    cut = evaluation["models"]["compact"]
    cut |= {"started_by": "reconstruction", "changed_from_start": {"layers": 0, "intermediate": 0, "hidden": 0}}
    assert "Mask learning changed none of the units chosen by reconstruction." in verdict(evaluation)
    assert row(evaluation, "MLP units")["learned masks"].text == "0"
    assert row(evaluation, "MLP units")["chance"].text == "–"
    cut["changed_from_start"] = {"layers": 0, "intermediate": 1518, "hidden": 27}
    said = "Mask learning changed, of what reconstruction chose: 1,518 MLP units, 27 hidden dimensions."
    assert said in verdict(evaluation)
    cut |= {"started_by": "open", "changed_from_start": {"layers": "open"}}
    assert "Mask learning changed" not in verdict(evaluation)
    assert row(evaluation, "layers")["learned masks"].text == "open"


def test_verdict_names_the_lowest_of_equal_training(evaluation: dict[str, Any]) -> None:
    assert verdict(evaluation) == (
        "Of 3 ways to choose the same shape, after 409.6K training tokens, the lowest loss is that of: learned masks "
        "(mean 5.50, lowest on 1 of 2 domains; next, activations: 6.75). At 64.2M of 134.5M parameters "
        "(2.1× smaller) the mean held-out loss is 3.50 after continued pretraining, against 2.50 for the source."
    )
    for name in ("source", "random", "activations"):
        evaluation["models"][name]["training_tokens"] = 0
    assert verdict(evaluation).startswith(
        "Of 2 ways to choose the same shape, untrained, the lowest loss is that of: activations (mean 6.75, lowest on "
        "2 of 2 domains; next, chance: 14.50). At"
    )


def test_verdict_says_how_much_faster(evaluation: dict[str, Any]) -> None:
    evaluation["models"]["source"]["speed"] = speed(500, 60.0)
    evaluation["models"]["final"]["speed"] = speed(900, 30.0)

    assert verdict(evaluation).endswith("and it writes a token 2.0× as fast.")


def test_verdict_without_a_result_says_so(evaluation: dict[str, Any]) -> None:
    evaluation["models"] = {"source": evaluation["models"]["source"]}

    assert verdict(evaluation) == "Nothing has been compared yet."
    assert comparison_table(evaluation).contest is None


@pytest.mark.parametrize(
    ("count", "text"), [(134_515_008, "134.5M"), (1_300_000_000, "1.30B"), (12_345, "12.3K"), (7, "7")]
)
def test_parameter_counts(count: int, text: str) -> None:
    assert format_parameters(count) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (409_600, "409.6K"), (1_500_000, "1.5M"), (4e8, "400M")])
def test_token_counts(count: float, text: str) -> None:
    assert format_tokens(count) == text
