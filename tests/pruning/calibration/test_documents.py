"""Calibration that tells of documents: what attends inside of them is as if each were alone, and labels may not count.

Legend: S inputs of a sequence, T tokens, V vocabulary.
"""

from __future__ import annotations

from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from shearing.data.corpus.corpus import Corpus
from shearing.data.documents import DocumentRules
from shearing.models.stored.stored_model import Source, open_source
from shearing.pruning.calibration.dense_layers import dense_layers
from shearing.pruning.calibration.gradients import gather_gradients, read_gradients
from shearing.pruning.calibration.places import matrices_of
from shearing.pruning.calibration.statistics import Need
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration, load_calibration
from shearing.pruning.sparse.allocation.allocator import Request
from shearing.pruning.sparse.allocation.hessian_trace import hessian_trace
from shearing.pruning.sparse.allocation.sensitivity import fisher_trace
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import KeptOf
from shearing.pruning.sparse.reconstruction import reconstructions
from shearing.pruning.sparse.search.database import build_database
from shearing.pruning.sparse.search.fitness import Fitness
from tests.data.corpus.answers import with_answers
from tests.models.tiny import tiny_ids, tiny_model

TOKENS = tiny_ids(sequences=4, length=12)
BEGINS = [(0, 5), (0, 3, 9), (0,), (0, 7)]
CONSOLE = Console(file=StringIO())


def told(*, attention: bool) -> Calibration:
    """Labels that do not count are the first of each document, and all of the third sequence."""
    positions, counted = torch.zeros_like(TOKENS), torch.ones_like(TOKENS, dtype=torch.bool)
    for row, begins in enumerate(BEGINS):
        for begin, end in zip(begins, (*begins[1:], 12), strict=True):
            positions[row, begin:end] = torch.arange(end - begin)
            counted[row, begin] = False
    counted[2] = False
    return Calibration(TOKENS, "random", positions if attention else None, counted)


def opened(model: PreTrainedModel, folder: Path) -> tuple[Source, Compute]:
    model.save_pretrained(folder / "model")
    source = open_source(str(folder / "model"), revision=None, converted=folder / "converted")
    return source, Compute(torch.device("cpu"), torch.float32, 2, "cpu", folder / "run")


def logits_of(model: PreTrainedModel, row: int, *, attention: bool) -> Tensor:
    """Of all but the last token [S, V], each document by itself where attention stays inside."""
    begins = BEGINS[row] if attention else (0,)
    parts = [TOKENS[row, begin:end] for begin, end in zip(begins, (*begins[1:], 11), strict=True)]
    return torch.cat([model(part[None], use_cache=False).logits[0] for part in parts])


def losses_of(model: PreTrainedModel, *, attention: bool) -> list[Tensor]:
    """Mean loss of what counts in each sequence, of those in which something does."""
    counted = told(attention=attention).counted
    assert counted is not None
    labels = TOKENS[:, 1:].masked_fill(~counted[:, 1:], -100)
    return [cross_entropy(logits_of(model, row, attention=attention), labels[row]) for row in (0, 1, 3)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2-sliding"])
def test_inputs_are_those_of_documents_alone(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    source, compute = opened(model, tmp_path)
    needs: frozenset[Need] = frozenset({"moment"})
    matrices = [matrix for matrix in matrices_of(source) if matrix.name.endswith("down_proj.weight")]
    layers = dense_layers(
        source, matrices=matrices, needs=needs, damping=0.01, calibration=told(attention=True), compute=compute
    )
    found = {name: of.products for layer in layers for name, of in layer.statistics.items() if of is not None}
    sums = {name: torch.zeros_like(of) for name, of in found.items()}
    for name, total in sums.items():

        def add(_module: Any, arguments: tuple[Tensor], *, total: Tensor = total) -> None:
            total += arguments[0][0].T @ arguments[0][0]

        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(add)
    for row, begins in zip(TOKENS, BEGINS, strict=True):
        for begin, end in zip(begins, (*begins[1:], 12), strict=True):
            model(row[None, begin:end], use_cache=False)
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total, rtol=1e-4, atol=1e-5 * float(total.max()))


@pytest.mark.parametrize("attention", [False, True])
def test_gradients_are_of_labels_that_count(attention: bool, tmp_path: Path) -> None:
    model = tiny_model()
    source, compute = opened(model, tmp_path)
    matrices, calibration = matrices_of(source), told(attention=attention)
    parameters = [model.get_parameter(matrix.name) for matrix in matrices]
    each = [torch.autograd.grad(loss, parameters) for loss in losses_of(model, attention=attention)]
    squares = [torch.stack(of).double().square().sum(0) / 4 for of in zip(*each, strict=True)]
    traces = fisher_trace(source, matrices=matrices, calibration=calibration, compute=compute, console=CONSOLE)
    gather_gradients(source, matrices=matrices, calibration=calibration, compute=compute, console=CONSOLE)
    for matrix, expected in zip(matrices, squares, strict=True):
        found = read_gradients(matrix.name, layer=matrix.layer, folder=compute.folder)
        torch.testing.assert_close(found, expected.sqrt().float(), rtol=1e-3, atol=1e-6 * float(expected.max()) ** 0.5)
        assert traces[matrix.name] == pytest.approx(float(expected.sum()), rel=1e-4)


@pytest.mark.parametrize("attention", [False, True])
def test_the_hessian_is_of_labels_that_count(attention: bool, tmp_path: Path) -> None:
    model = tiny_model()
    source, compute = opened(model, tmp_path)
    matrices, calibration = matrices_of(source)[:3], told(attention=attention)
    found = hessian_trace(source, matrices=matrices, calibration=calibration, compute=compute, seed=3, console=CONSOLE)
    model.set_attn_implementation("eager")
    weights, generator = [model.get_parameter(matrix.name) for matrix in matrices], torch.Generator().manual_seed(3)
    expected = dict.fromkeys(found, 0.0)
    for loss in losses_of(model, attention=attention):
        probes = [torch.randint(0, 2, weight.shape, generator=generator).float() * 2 - 1 for weight in weights]
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        along = torch.stack([(g * z).sum() for g, z in zip(gradients, probes, strict=True)]).sum()
        for name, probe, product in zip(expected, probes, torch.autograd.grad(along, weights), strict=True):
            expected[name] += float((probe * product).sum()) / 4
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", [False, True])
def test_candidates_are_compared_on_labels_that_count(attention: bool, tmp_path: Path) -> None:
    model = tiny_model()
    source, compute = opened(model, tmp_path)
    calibration = told(attention=attention)
    request = Request(
        source=source,
        matrices=matrices_of(source),
        calibration=calibration,
        criterion=criteria()["magnitude"],
        reconstruction=reconstructions()["none"],
        damping=0.01,
        budget=Fraction(1, 2),
        levels=[KeptOf(2, 4), KeptOf(4, 4)],
        unit="block",
        compute=compute,
        console=CONSOLE,
    )
    database = build_database(request, folder=compute.folder / "levels")
    counted = calibration.counted
    assert counted is not None
    labels = TOKENS[:, 1:].masked_fill(~counted[:, 1:], -100)
    sparse, dense = (0, 0, 0, 0), (1, 1, 1, 1)
    by_loss = Fitness(request, database=database, text=calibration, stages=[2, 4], kind="loss")
    logits = torch.cat([logits_of(model, row, attention=attention) for row in range(4)])
    assert by_loss(dense, 0) == pytest.approx(float(cross_entropy(logits[:22], labels[:2].flatten())), rel=1e-5)
    assert by_loss(dense, 1) == pytest.approx(float(cross_entropy(logits, labels.flatten())), rel=1e-5)
    by_divergence = Fitness(request, database=database, text=calibration, stages=[4], kind="kl")
    for matrix in request.matrices:
        database.put(model.get_parameter(matrix.name), name=matrix.name, level=0)
    p = logits.log_softmax(-1)
    q = torch.cat([logits_of(model, row, attention=attention) for row in range(4)]).log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1)[counted[:, 1:].flatten()]
    assert by_divergence(sparse, 0) == pytest.approx(float(each.mean()), rel=1e-4)


def test_what_a_corpus_says_of_its_documents(tiny_inputs: Path, tmp_path: Path) -> None:
    corpus = with_answers(tiny_inputs / "corpus", tmp_path / "corpus", domain="letters")
    chosen: dict[str, Any] = {"tokenizer": None, "vocab_size": 20, "samples": 40, "seqlen": 16, "seed": 0}

    def read(folder: Path, **rules: bool) -> Calibration:
        return load_calibration(
            [folder], corpus=Corpus.open(folder), documents=DocumentRules(**rules) if rules else None, **chosen
        )

    plain, answers = read(tiny_inputs / "corpus"), read(corpus)
    assert (plain.positions, plain.counted, answers.positions) == (None, None, None)
    assert torch.equal(plain.tokens, answers.tokens)
    assert answers.counted is not None
    assert not answers.counted[:, 1:].all()
    within, apart = read(corpus, attention_within=True), read(corpus, loss_across=False)
    assert within.positions is not None
    assert within.counted is not None
    assert apart.counted is not None
    assert apart.positions is None
    assert torch.equal(within.counted, answers.counted)
    begins = pad(within.positions[:, 1:] == 0, (1, 0))
    assert begins.any()
    assert torch.equal(apart.counted, answers.counted & ~begins)
    assert len({each.fingerprint for each in (plain, answers, within, apart)}) == 4
    assert read(tiny_inputs / "corpus", attention_within=False).fingerprint == plain.fingerprint
