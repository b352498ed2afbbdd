"""The report of synthetic runs: complete, under way, empty; self-contained, small, escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shearing.errors import ShearingError
from shearing.runs.report.page import write_report

DOMAINS = ["books", "code", "law & order"]
SIZES = {"layers": 30, "kv_groups": 3, "query_heads": 3, "intermediate": 1536, "hidden": 576}


class Page(HTMLParser):
    """Every tag with its attributes; complains about tags that are not closed."""

    VOID = frozenset({"meta", "br", "use", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag


def write_metrics(path: Path, *, steps: int, masks: bool, domains: list[str] = DOMAINS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {domain: 1 / len(domains) for domain in domains}
    with path.open("w") as file:
        for step in range(1, steps + 1):
            line: dict[str, Any] = {
                "step": step,
                "tokens": step * 4096,
                "loss": 5 - step / steps,
                "grad_norm": 2.0,
                "tokens_per_second": 480.0 + step % 7,
                "data_wait": 0.001,
                "seconds": 8.5,
                "skipped": step // 50,
                "weights": weights,
                **{name: {} for name in ("expected", "target", "violation", "lambda_1", "lambda_2")},
            }
            if masks:
                for name, size in SIZES.items():
                    line["expected"][name] = size * (1 - 0.3 * step / steps)
                    line["target"][name] = size * 0.7
                    line["violation"][name] = 0.3 * (1 - step / steps)
                    line["lambda_1"][name] = line["lambda_2"][name] = step / 10
            file.write(json.dumps(line) + "\n")
            if step % 10 == 0:
                losses = dict.fromkeys(domains, 5 - step / steps)
                update = {"step": step, "event": "mixture", "losses": losses, "reference": dict.fromkeys(domains, 3.0)}
                file.write(json.dumps({**update, "weights": weights}) + "\n")


def write_masks(path: Path) -> None:
    query_heads = torch.ones(30, 3, 3)
    query_heads[..., 0] = 0
    masks = {
        "hidden": (torch.arange(576) < 480).float(),
        "attention": (torch.arange(30) < 20).float(),
        "mlp": (torch.arange(30) < 20).float(),
        "query_heads": query_heads,
        "intermediate": (torch.rand(30, 1536, generator=torch.Generator().manual_seed(0)) < 0.67).float(),
        "log_alpha/hidden": torch.zeros(576),
    }
    save_file(masks, path)


def write_evaluation(path: Path, *, names: tuple[str, ...] = ("source", "random", "compact", "final")) -> None:
    groups = {"source": "source", "random": "cut", "compact": "cut", "final": "pretrained"}
    shape = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "intermediate_size": 1536}
    models = {
        name: {
            "label": f"{name} <i>",
            "group": groups[name],
            "shape": shape,
            "parameters": 134_515_008 // (1 if name == "source" else 2),
            "parameters_without_embeddings": 106_000_000,
            "training_tokens": 0,
            "domains": {domain: {"loss": 4.0 + index} for domain in DOMAINS},
            "mean": {"loss": 4.0 + index, "perplexity": 60.0, "bits_per_byte": 1.2},
            "speed": None,
            "tasks": tasks(0.3 + 0.2 * index),
            "generation": writing(name),
        }
        for index, name in enumerate(names)
    }
    settings = {"tokens_per_domain": 65_536, "sequence_length": 512, "precision": "float32"}
    environment = {"torch": "2.13", "commit": None}
    prompts = [{"domain": "books", "text": "Once <script>upon"}, {"domain": "law & order", "text": "Whereas"}]
    content = {"settings": settings, "environment": environment, "models": models, "prompts": prompts}
    path.write_text(json.dumps(content))


def tasks(value: float) -> dict[str, Any]:
    asked = {"items": 1200, "fewshot": 5, "version": 1.0, "metrics": {}}
    return {
        "riddles": {**asked, "metric": "acc_norm", "value": value, "stderr": 0.021},
        "surprise": {**asked, "metric": "word_perplexity", "value": 31.25, "stderr": None},
    }


def writing(name: str) -> dict[str, Any]:
    ways = {
        way: {
            "repeated": 0.25,
            "distinct": {"1": 0.5, "2": 0.75, "3": 0.875, "4": None},
            "tokens": 96,
            "shown": [f"{name} <{way}> tale", f"{name} {way} clause"],
        }
        for way in ("greedy", "sampled")
    }
    near = (None, None) if name == "source" else (0.435, 1.234)
    return {"agreement": near[0], "kl_from_source": near[1], **ways}


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """A run with everything a run writes."""
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a complete run."""
    return text_of(write_run(tmp_path_factory.mktemp("complete")))


def write_run(folder: Path) -> Path:
    run = folder / "my <run>"
    write_metrics(run / "prune" / "metrics.jsonl", steps=100, masks=True)
    write_metrics(run / "pretrain" / "metrics.jsonl", steps=90, masks=False)
    write_masks(run / "prune" / "masks.safetensors")
    write_evaluation(run / "evaluation.json")
    kept = {name: round(0.7 * size) for name, size in SIZES.items()}
    summary = {
        "units": SIZES,
        "target": kept,
        "expected": {name: size * 0.71 for name, size in SIZES.items()},
        "kept": kept,
        "changed_from_start": {name: 123 if name == "hidden" else "open" for name in SIZES},
        "ever_in_doubt": dict.fromkeys(SIZES, 6_789),
        "rounding_gap": dict.fromkeys(SIZES, 12_345),
        "total_units": dict.fromkeys(SIZES, 46_080),
        "heldout": {"before_cutting": dict.fromkeys(DOMAINS, 4.321)},
        "samples": dict.fromkeys(DOMAINS, 100),
    }
    (run / "prune" / "summary.json").write_text(json.dumps(summary))
    (run / "compact").mkdir()
    (run / "compact" / "shape.json").write_text(json.dumps({"relative_logit_difference": 2.5e-7}))
    (run / "recipe.yaml").write_text("name: the <script>alert(1)</script> run\n")
    return run


def text_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_a_complete_run_fills_every_section(page: str) -> None:
    assert 'class="absent"' not in page
    for words in (
        "12,345 of 46,080",
        "123 of 46,080",
        "<td>open</td>",
        "6,789 of 46,080",
        "4.321",
        "2.5e-07",
        "20 of 30 layers, 480 of 576 hidden",
        "2 steps skipped",
    ):
        assert words in page
    assert page.count("<svg") == 1 + 1 + len(DOMAINS) + 1 + 3 * len(SIZES) + 1 + 2


def test_tasks_are_dots_with_their_figures_and_samples_stand_side_by_side(page: str) -> None:
    assert 'aria-label="Tasks, % right with 95 % intervals"' in page
    assert "<th>riddles</th><td>acc_norm</td><td>1,200</td><td>5</td><td>30.0±2.1</td>" in page
    assert "<td>31.2</td>" in page  # no share: in the table, not among the dots
    assert page.count(">riddles<") == 2 + 1
    assert page.count(">surprise<") == 2
    assert "<td>43.5 %</td>" in page
    assert "<th>KL to the source, nats per token</th><td>–</td><td>1.234</td>" in page
    assert "Once &lt;script&gt;upon …" in page
    source, cut = (
        f"<td>{name} &lt;greedy&gt; tale</td><td>{name} &lt;sampled&gt; tale</td>" for name in ("source", "compact")
    )
    assert 0 < page.index(source) < page.index(cut)


def test_a_run_without_tasks_or_writing_says_nothing_of_them(complete: Path) -> None:
    evaluation = json.loads((complete / "evaluation.json").read_text())
    for model in evaluation["models"].values():
        del model["tasks"], model["generation"]
    (complete / "evaluation.json").write_text(json.dumps(evaluation))
    page = text_of(complete)
    assert "<h2>Tasks</h2>" not in page
    assert "<h2>Writing</h2>" not in page


def test_the_page_needs_nothing_from_elsewhere_and_is_small(page: str) -> None:
    parsed = Page(page)
    assert len(page.encode()) < 400_000
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "embed"}
    for _, attributes in parsed.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


def test_references_inside_the_drawings_point_at_what_is_there(page: str) -> None:
    identifiers = re.findall(r' id="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r"url\(#([^)]*)\)", page) + re.findall(r'href="#([^"]*)"', page)) <= set(identifiers)


def test_text_of_the_run_is_escaped(page: str) -> None:
    assert "<script>" not in page
    assert "my &lt;run&gt;" in page
    assert "<h1>the &lt;script&gt;alert(1)&lt;/script&gt; run</h1>" in page
    assert "source &lt;i&gt;" in page
    assert "law &amp; order" in page


def test_long_runs_are_downsampled(complete: Path) -> None:
    write_metrics(complete / "pretrain" / "metrics.jsonl", steps=20_000, masks=False)

    assert len(text_of(complete).encode()) < 400_000


def test_before_pretraining(complete: Path) -> None:
    (complete / "pretrain" / "metrics.jsonl").unlink()
    write_evaluation(complete / "evaluation.json", names=("source", "compact"))
    text = text_of(complete)

    assert "no steps yet" in text
    assert "right after cutting, against" in text


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "tok'])
def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "prune").mkdir()
        (tmp_path / "prune" / "metrics.jsonl").write_text(content)
    text = text_of(tmp_path)

    Page(text)
    assert text.count('class="absent"') == 11
    assert "<svg" not in text


def test_constant_weights_without_updates_draw_no_heldout_losses(tmp_path: Path) -> None:
    write_metrics(tmp_path / "prune" / "metrics.jsonl", steps=5, masks=True)
    text = text_of(tmp_path)

    assert "Nothing has been measured yet." in text
    assert "Domain weights over tokens" in text


def test_more_domains_than_colours(tmp_path: Path) -> None:
    domains = [f"domain {index}" for index in range(20)]
    write_metrics(tmp_path / "prune" / "metrics.jsonl", steps=20, masks=False, domains=domains)

    assert text_of(tmp_path).count("Held-out loss, domain") == 20


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "prune" / "metrics.jsonl"
    write_metrics(path, steps=5, masks=True)
    path.write_text(path.read_text().replace('"loss": 4.6', '"loss": null'))

    assert "Training loss over tokens" in text_of(tmp_path)


def test_damaged_files_are_named(complete: Path) -> None:
    (complete / "prune" / "masks.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ShearingError, match=r"masks\.safetensors"):
        write_report(complete)


def test_without_a_readable_recipe_the_folder_names_the_run(complete: Path) -> None:
    (complete / "recipe.yaml").write_text("name: [\n")

    assert f"<h1>{complete.name.replace('<', '&lt;').replace('>', '&gt;')}</h1>" in text_of(complete)
