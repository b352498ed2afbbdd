"""Decoders that no family declares, and the text of models that see: gradients, allocations and criteria of theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from shearing.data.corpus.corpus import Corpus
from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.stored.stored_model import Source, open_any
from shearing.pruning.calibration.gradients import gather_gradients, gradient_bytes, read_gradients
from shearing.pruning.calibration.places import Matrix, matrices_of
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.calibration.whole import WholeModel
from shearing.pruning.sparse.allocation.allocator import Allocator, Request, mean_density
from shearing.pruning.sparse.allocation.hessian_trace import hessian_trace
from shearing.pruning.sparse.allocation.rules.alpha import Alpha
from shearing.pruning.sparse.allocation.rules.depth import Depth
from shearing.pruning.sparse.allocation.rules.hessian import HessianRank
from shearing.pruning.sparse.allocation.rules.owl import Owl
from shearing.pruning.sparse.allocation.rules.rank import Rank
from shearing.pruning.sparse.allocation.rules.redundancy import Redundancy
from shearing.pruning.sparse.allocation.sensitivity import fisher_trace
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import KeptOf
from shearing.pruning.sparse.prune_layers import prune_layers
from shearing.pruning.sparse.reconstruction import reconstructions
from shearing.pruning.sparse.search.evolution import SearchSettings
from shearing.pruning.sparse.search.fitness import Training, divergence
from shearing.pruning.sparse.search.msp import Msp
from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers
from tests.models.tiny import tiny_ids
from tests.pruning.sparse.test_any_architecture import ANY, DECODERS, TEXT, built, decoder, llava, run
from tests.pruning.sparse.test_prune_layers import compute_of, method_of

QUIET = Console(file=StringIO())
CALIBRATION = Calibration(tiny_ids(sequences=3, length=12), "random")
NAMES = [*DECODERS, "llava"]


def model_of(name: str, folder: Path) -> Any:
    if name == "llava":
        return built(transformers.LlavaForConditionalGeneration, llava(), folder / "model")
    return decoder(name, folder / "model")


def opened(folder: Path) -> tuple[Source, list[Matrix]]:
    """A model, and the matrices of its decoder layers."""
    source = open_any(str(folder / "model"), revision=None, converted=folder / "converted", towers=False)
    assert source.structure is not None
    return source, [matrix for matrix in matrices_of(source) if matrix.layer < source.structure.num_layers]


def gradients(model: Any, source: Source, matrices: list[Matrix]) -> list[dict[str, Tensor]]:
    """Of each sequence's mean loss by each matrix, of the whole model by plain autograd."""
    assert source.structure is not None
    own = {stored: name for name, stored in source.structure.stored_names.items()}
    parameters = [model.get_parameter(own[matrix.name]) for matrix in matrices]
    found = []
    for row in CALIBRATION.tokens:
        loss = cross_entropy(model(row[None, :-1], use_cache=False).logits[0], row[1:])
        found.append(dict(zip([m.name for m in matrices], torch.autograd.grad(loss, parameters), strict=True)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """What gblm scores by, gathered layer by layer, and the traces that `rank` and `msp` go by."""
    model = model_of(name, tmp_path)
    source, matrices = opened(tmp_path)
    compute = compute_of(tmp_path / "run", micro_batch_size=2)
    expected = gradients(model, source, matrices)
    gather_gradients(source, matrices=matrices, calibration=CALIBRATION, compute=compute, console=QUIET)
    assert min(gradient_bytes(source, matrices=matrices, calibration=CALIBRATION, compute=compute)) > 0
    arguments = {"matrices": matrices, "calibration": CALIBRATION, "compute": compute, "console": QUIET}
    traces = fisher_trace(source, **arguments)
    for matrix in matrices:
        squares = torch.stack([of_row[matrix.name].double().square() for of_row in expected])
        found = read_gradients(matrix.name, layer=matrix.layer, folder=compute.folder)
        root = squares.mean(0).sqrt().float()
        torch.testing.assert_close(found, root, rtol=1e-3, atol=1e-6 * float(root.max()))
        assert traces[matrix.name] == pytest.approx(float(squares.sum((1, 2)).mean()), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_model_predicts_what_the_model_itself_does(name: str, tmp_path: Path) -> None:
    """From what its last layer puts out, sequence by sequence, with nothing of the layers computed again."""
    model, (source, _) = model_of(name, tmp_path), opened(tmp_path)
    whole = WholeModel(source, device=torch.device("cpu"), dtype=torch.float32)
    ids, labels = CALIBRATION.tokens[:, :-1], CALIBRATION.tokens[:, 1:]
    logits = model(ids, use_cache=False).logits
    states = whole.states(Inputs(ids))
    torch.testing.assert_close(torch.cat(list(whole.logits(states))), logits.flatten(0, 1))
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    torch.testing.assert_close(whole.losses(states, labels), losses)
    torch.testing.assert_close(whole.loss(states, labels), losses.sum())
    other = states.roll(1, 0)
    p, q = (each.flatten(0, 1).log_softmax(-1) for each in (logits, logits.roll(1, 0)))
    torch.testing.assert_close(divergence(states, other, labels, model=whole).float(), (p.exp() * (p - q)).sum())


def request_of(folder: Path, **changes: Any) -> Request:
    source, matrices = opened(folder)
    values: dict[str, Any] = {
        "source": source,
        "matrices": matrices,
        "calibration": CALIBRATION,
        "criterion": criteria()["wanda"],
        "reconstruction": reconstructions()["none"],
        "damping": 0.01,
        "budget": Fraction(1, 2),
        "levels": [KeptOf(kept, 8) for kept in range(1, 9)],
        "unit": "matrix",
        "compute": compute_of(folder / "run", micro_batch_size=2),
        "console": QUIET,
    }
    return Request(**values | changes)


SEARCH = SearchSettings(population=4, offspring=4, generations=2)
ALLOCATORS: Mapping[str, Allocator] = {
    "depth": Depth(spread=0.3),
    "alpha": Alpha(),
    "owl": Owl(outlier_ratio=2.0, spread=0.3),
    "redundancy": Redundancy(outlier_ratio=2.0, spread=0.4),
    "rank": Rank(spread=0.3),
    "hessian": HessianRank(spread=0.3),
    "msp": Msp(CALIBRATION, settings=SEARCH),
    "msp by kl": Msp(CALIBRATION, settings=SEARCH, kind="kl"),
    "msp trained": Msp(CALIBRATION, settings=SEARCH, training=Training(steps=1, batch=2)),
}


@pytest.mark.parametrize("name", ["opt", "llava"])
def test_every_allocation_meets_the_budget(name: str, tmp_path: Path) -> None:
    model_of(name, tmp_path)
    for called, allocator in ALLOCATORS.items():
        request = request_of(tmp_path, compute=compute_of(tmp_path / called, micro_batch_size=2))
        (tmp_path / called).mkdir()
        allocation = allocator.allocate(request)
        assert mean_density(allocation.patterns, matrices=request.matrices) == Fraction(1, 2), called
        assert allocation.patterns.keys() == {matrix.name for matrix in request.matrices}
        # A search may find that nothing is better than the same level everywhere.
        assert called.startswith("msp") or len(set(allocation.patterns.values())) > 1, called


def test_the_trace_of_the_hessian_is_that_of_the_whole_model(tmp_path: Path) -> None:
    """Of one matrix, entry by entry; the mean over many probes comes near it."""
    model = model_of("opt", tmp_path)
    source, matrices = opened(tmp_path)
    (chosen,) = [matrix for matrix in matrices if matrix.layer == 1 and matrix.name.endswith("v_proj.weight")]
    weight = model.get_parameter(chosen.name)
    row = CALIBRATION.tokens[0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = cross_entropy(model(row[None, :-1], use_cache=False).logits[0], row[1:])
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        rows = [torch.autograd.grad(each, weight, retain_graph=True)[0] for each in gradient.flatten()]
    trace = float(torch.stack(rows).flatten(1).diagonal().sum())
    many = Calibration(row.repeat(200, 1), "random")
    compute = compute_of(tmp_path / "run")
    found = hessian_trace(source, matrices=[chosen], calibration=many, compute=compute, console=QUIET)
    hessian = torch.stack(rows).flatten(1)
    deviation = float((2 * (hessian.square().sum() - hessian.diagonal().square().sum())).sqrt())
    assert abs(found[chosen.name] - trace) < 4 * deviation / 200**0.5


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "gblm"])
def test_the_text_of_a_model_that_sees_is_pruned_as_the_text_model_alone_would_be(name: str, tmp_path: Path) -> None:
    model = model_of("llava", tmp_path)
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.save_pretrained(tmp_path / "text" / "model")
    found = []
    for folder in (tmp_path, tmp_path / "text"):
        source = open_any(str(folder / "model"), revision=None, converted=folder / "converted", towers=False)
        matrices = [m for m in matrices_of(source) if m.layer < 2]
        compute, layers = compute_of(folder / "run"), PrunedLayers(folder / "run" / "blocks")
        if name == "gblm":
            gather_gradients(source, matrices=matrices, calibration=CALIBRATION, compute=compute, console=QUIET)
        method = method_of(name, matrices=[matrix.name for matrix in matrices])
        prune_layers(source, method=method, calibration=CALIBRATION, compute=compute, pruned_layers=layers)
        weights = {name: weight for layer in range(2) for name, weight in layers.weights(layer).items()}
        found.append({name.rpartition("layers.")[2]: weight for name, weight in weights.items()})
    of_llava, alone = found
    assert of_llava.keys() == alone.keys()
    for matrix, weight in alone.items():
        torch.testing.assert_close(of_llava[matrix], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("criterion", "allocation"), [("gblm", "owl"), ("magnitude", "rank"), ("ria", "depth")])
def test_the_text_of_a_model_that_sees_from_beginning_to_end(
    criterion: str, allocation: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_inputs / "model", tmp_path / "model")
    config = llava()
    config.text_config.vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"] + 1
    config.image_token_index = config.text_config.vocab_size - 1
    dense = dict(built(transformers.LlavaForConditionalGeneration, config, folder).named_parameters())
    output = run(
        folder,
        tmp_path / "out",
        criterion=criterion,
        allocation=allocation,
        levels=["1:4", "2:4", "3:4"],
        unit="matrix",
        calibration=[tiny_inputs / "corpus"],
        samples=4,
        seqlen=16,
    )
    assert not list(differences(output))
    sparse = transformers.LlavaForConditionalGeneration.from_pretrained(output)
    kept = total = 0
    for name, weight in sparse.named_parameters():
        if "language_model.layers" in name and weight.ndim == 2:
            kept, total = kept + int(weight.count_nonzero()), total + weight.numel()
        else:
            assert torch.equal(weight, dense[name]), name
    assert kept == total // 2


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_dense_and_sparse_are_compared_on_text(name: str, tiny_inputs: Path, tmp_path: Path) -> None:
    """By the losses that the models themselves have of the same rows, and by what of them is zero."""
    folder = shutil.copytree(tiny_inputs / "model", tmp_path / "model")
    config = llava() if name == "llava" else DECODERS[name]()
    text = config.get_text_config()
    text.vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"] + 1
    if name == "llava":
        config.image_token_index = text.vocab_size - 1
        architecture: Any = transformers.LlavaForConditionalGeneration
    else:
        architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    dense = built(architecture, config, folder)
    corpus = tiny_inputs / "corpus"
    output = run(folder, tmp_path / "out", evaluate=corpus, evaluate_tokens=64, seqlen=16, precision="fp32")
    of_models = json.loads((output / "evaluation.json").read_text())["models"].values()
    for model, said in zip((dense, architecture.from_pretrained(output).eval()), of_models, strict=True):
        for domain, figures in said["domains"].items():
            rows = torch.cat(
                list(
                    Corpus.open(corpus).heldout_batches(
                        domain, split="test", sequence_length=16, tokens=64, micro_batch_size=2
                    )
                )
            )
            logits = model(rows[:, :-1], use_cache=False).logits
            loss = float(cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
            assert figures["loss"] == pytest.approx(loss, rel=1e-5), domain
        parameters = list(model.parameters())
        assert said["parameters"] == sum(each.numel() for each in parameters)
        assert said["nonzero"] == sum(int(each.count_nonzero()) for each in parameters)
        ends = {
            id(of.weight): of.weight.numel() for of in (model.get_input_embeddings(), model.get_output_embeddings())
        }
        assert said["parameters_without_embeddings"] == said["parameters"] - sum(ends.values())


TEXTS = {"calibration": ["x"]}


@pytest.mark.parametrize(
    ("architecture", "config", "keys", "said"),
    [
        ("T5ForConditionalGeneration", ANY["t5"][1], {"allocation": "rank", **TEXTS}, "allocation"),
        ("T5ForConditionalGeneration", ANY["t5"][1], {"allocation": "depth"}, "allocation"),
        (
            "LlavaForConditionalGeneration",
            llava,
            {"criterion": "wanda", "include_towers": True, **TEXTS},
            "vision_tower",
        ),
        (
            "DeepseekV3ForCausalLM",
            lambda: transformers.DeepseekV3Config(
                **TEXT,
                num_key_value_heads=2,
                moe_intermediate_size=8,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_rope_head_dim=4,
                qk_nope_head_dim=4,
                v_head_dim=8,
            ),
            {"criterion": "wanda", **TEXTS},
            "not alike",
        ),
    ],
    ids=["allocation", "depth", "towers", "layers that differ"],
)
def test_what_cannot_be_walked_is_said_before_any_work(
    architecture: str, config: Any, keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    built(getattr(transformers, architecture), config(), tmp_path / "model")
    with pytest.raises(ShearingError, match=said) as raised:
        run(tmp_path / "model", tmp_path / "out", **keys)
    assert "{" not in raised.value.allowed
    assert not (tmp_path / "out").exists()
