"""What 2:4 gains on this GPU, losses included: each shape of linear layer, then whole prompts and decoding steps.

    python benchmarks/semi_structured.py [--quick] [--shape 4096/11008/32 | --model runs/demo-data/model]

The model is one that `shear sparsify --pattern 2:4` makes of MODEL, or a random Llama of hidden size, MLP units and
heads (and key-value heads, if they are fewer) of SHAPE; which weights are zero does not matter to speed. End to end
there are two models beside the dense one: all layers 2:4 that a backend takes, and only those that are faster at that
many tokens, which is what `shear export --semi-structured --batch TOKENS` chooses. Models take turns; medians of CUDA
events. A device that does not multiply 2:4 matrices is no error: the line of JSON says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from shearing.errors import ShearingError
from shearing.evaluation.environment import environment
from shearing.models.anatomy import decoder_layers
from shearing.models.loading import load_source
from shearing.progress import activity
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.patterns import KeptOf
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.pruning.sparse.semi_structured.export import MARGIN
from shearing.pruning.sparse.semi_structured.hardware import TOLERANCES, Hardware, find_hardware
from shearing.pruning.sparse.semi_structured.layout import misalignment
from shearing.pruning.sparse.semi_structured.loading import PRECISIONS, convert_layers
from shearing.pruning.sparse.semi_structured.timing import (
    Layer,
    best_backend,
    is_faster,
    largest_error,
    layers_to_measure,
    speedup,
)

WARM_UP = 2


@dataclass(frozen=True)
class Workload:
    """Sequences at a time, and tokens of each: a prompt that is read, or decoding steps after a prompt of 128."""

    kind: str
    batch: int
    length: int

    @property
    def at_a_time(self) -> int:
        """Tokens that go through a layer at once."""
        return self.batch * (self.length if self.kind == "prefill" else 1)

    def __str__(self) -> str:
        steps = f"{self.length} tokens" if self.kind == "prefill" else f"{self.length} steps"
        return f"{self.kind}, {self.batch} × {steps}"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    tokens: tuple[int, ...]
    workloads: tuple[Workload, ...]
    repetitions: int
    layers: int


QUICK = Sizes((1, 64, 2048), (Workload("prefill", 1, 2048), Workload("decode", 1, 8)), 5, 2)
FULL = Sizes(
    (1, 16, 64, 256, 1024, 4096, 16384),
    (
        *(Workload("prefill", batch, 2048) for batch in (1, 8)),
        *(Workload("decode", batch, 16) for batch in (1, 16, 64, 256)),
    ),
    11,
    8,
)


@dataclass
class Shape:
    """Linear layers of one shape: their names, and ratios by backend and tokens at a time."""

    rows: int
    columns: int
    bias: bool
    names: list[str] = field(default_factory=list)
    ratios: dict[str, dict[int, float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def two_of_four(arguments: argparse.Namespace, *, layers: int, hardware: Hardware) -> PreTrainedModel:
    """The model, on the device, its linear layers 2:4."""
    dtype = PRECISIONS[arguments.precision]
    if arguments.model is None:
        return random_model(arguments.shape, layers=layers, dtype=dtype, device=hardware.device)
    with tempfile.TemporaryDirectory() as folder:
        recipe = SparsifyRecipe.model_validate(
            {
                "model": str(arguments.model),
                "output": Path(folder) / "sparse",
                "criterion": "magnitude",
                "pattern": "2:4",
            }
        )
        return load_source(str(sparsify(recipe)), device=hardware.device, dtype=dtype)


def random_model(shape: str, *, layers: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Llama of random weights, half of them dropped."""
    hidden, intermediate, heads, *key_values = (int(size) for size in shape.split("/"))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_values[0] if key_values else heads,
        max_position_embeddings=4096,
    )
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for _, linear in linear_layers(model):
        with torch.no_grad():
            linear.weight.mul_(KeptOf(2, 4).keep(linear.weight.abs()))
    return model


def linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Every linear layer inside the decoder layers, by its name in the model."""
    inside = {id(module) for module in decoder_layers(model).modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]


@torch.no_grad()
def by_shape(model: PreTrainedModel, *, sizes: Sizes, hardware: Hardware, console: Console) -> list[Shape]:
    """Ratios of every shape of layer, at every number of tokens, with every backend that takes it."""
    shapes: dict[tuple[int, int, bool], Shape] = {}
    weights: dict[tuple[int, int, bool], list[Layer]] = {}
    for name, linear in linear_layers(model):
        key = (linear.out_features, linear.in_features, linear.bias is not None)
        shapes.setdefault(key, Shape(*key)).names.append(name)
        weights.setdefault(key, []).append((linear.weight.detach(), linear.bias))
    total = len(shapes) * len(hardware.converters) * len(sizes.tokens)
    with activity("timing layers", total=total, console=console) as advance:
        for key, shape in shapes.items():
            first = weights[key][0][0]
            layers = weights[key][: layers_to_measure(len(weights[key]), bytes_each=first.nbytes)]
            for backend, convert in hardware.converters.items():
                if misalignment(rows=shape.rows, columns=shape.columns, backend=backend, dtype=first.dtype):
                    advance(len(sizes.tokens))
                    continue
                shape.errors[backend] = largest_error(layers[0], convert=convert, batches=sizes.tokens)
                shape.ratios[backend] = {}
                for tokens in sizes.tokens:
                    ratio = speedup(layers, convert=convert, tokens=tokens, hardware=hardware)
                    shape.ratios[backend][tokens] = ratio
                    advance(1)
    return list(shapes.values())


@torch.no_grad()
def end_to_end(
    model: PreTrainedModel, shapes: list[Shape], *, sizes: Sizes, hardware: Hardware, console: Console
) -> list[dict[str, Any]]:
    """Seconds of the dense model over seconds of two models with 2:4 layers, for each workload."""
    tolerance = TOLERANCES[model.dtype]
    found: list[dict[str, Any]] = []
    with activity("timing models", total=len(sizes.workloads), console=console) as advance:
        for workload in sizes.workloads:
            tokens = workload.at_a_time
            every: dict[str, str] = {}
            faster: dict[str, str] = {}
            for shape in shapes:
                ratios = {
                    backend: {tokens: measured(model, shape, backend=backend, tokens=tokens, hardware=hardware)}
                    for backend in shape.ratios
                    if shape.errors[backend] <= tolerance
                }
                if not ratios:
                    continue
                backend = best_backend(ratios)
                every |= dict.fromkeys(shape.names, backend)
                if is_faster(ratios[backend], margin=MARGIN):
                    faster |= dict.fromkeys(shape.names, backend)
            row: dict[str, Any] = {"workload": str(workload), "tokens_at_a_time": tokens}
            for name, backends in (("all", every), ("faster", faster)):
                row[f"{name}_layers"] = len(backends)
                row[f"{name}_ratio"] = None
                if backends:
                    row |= compare(name, model, backends=backends, workload=workload, sizes=sizes, hardware=hardware)
            found.append(row)
            advance(1)
    return found


def measured(model: PreTrainedModel, shape: Shape, *, backend: str, tokens: int, hardware: Hardware) -> float:
    """The ratio of a shape at so many tokens, measured now if it was not."""
    ratios = shape.ratios[backend]
    if tokens not in ratios:
        modules = [model.get_submodule(name) for name in shape.names]
        layers = [(module.weight.detach(), module.bias) for module in modules]
        layers = layers[: layers_to_measure(len(layers), bytes_each=layers[0][0].nbytes)]
        ratios[tokens] = speedup(layers, convert=hardware.converters[backend], tokens=tokens, hardware=hardware)
    return ratios[tokens]


def compare(
    name: str,
    model: PreTrainedModel,
    *,
    backends: Mapping[str, str],
    workload: Workload,
    sizes: Sizes,
    hardware: Hardware,
) -> dict[str, Any]:
    """Dense and converted in turn."""
    converted = copy.deepcopy(model)
    convert_layers(converted, backends=backends, hardware=hardware)
    seconds: dict[str, list[float]] = {"dense": [], name: []}
    for repetition in range(WARM_UP + sizes.repetitions):
        for which, of in (("dense", model), (name, converted)):
            spent = hardware.stopwatch(work_of(of, workload))
            if repetition >= WARM_UP:
                seconds[which].append(spent)
    medians = {which: statistics.median(values) for which, values in seconds.items()}
    return {
        f"{name}_ratio": medians["dense"] / medians[name],
        f"{name}_seconds": medians[name],
        "dense_seconds": medians["dense"],
    }


def work_of(model: PreTrainedModel, workload: Workload) -> Callable[[], object]:
    """What is timed; the prompt before decoding is not."""
    generator = torch.Generator().manual_seed(0)
    length = workload.length if workload.kind == "prefill" else 128
    prompt_BS = torch.randint(model.config.vocab_size, (workload.batch, length), generator=generator).to(model.device)
    if workload.kind == "prefill":
        return lambda: model(input_ids=prompt_BS, use_cache=False, logits_to_keep=1)
    output = model(input_ids=prompt_BS, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        following = output
        for _ in range(workload.length):
            next_B1 = following.logits[:, -1:].argmax(dim=-1)
            following = model(
                input_ids=next_B1, past_key_values=following.past_key_values, use_cache=True, logits_to_keep=1
            )

    return decode


def print_tables(shapes: list[Shape], rows: list[dict[str, Any]], *, sizes: Sizes, console: Console) -> None:
    table = Table(title="speed of 2:4 layers over dense ones, by tokens at a time", title_justify="left")
    for name in ("outputs × inputs", "layers", "backend", *(f"{tokens:,}" for tokens in sizes.tokens), "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for shape in shapes:
        for backend, ratios in shape.ratios.items():
            cells = [f"{ratios[tokens]:.2f}" for tokens in sizes.tokens]
            size = f"{shape.rows} × {shape.columns}"
            table.add_row(size, str(len(shape.names)), backend, *cells, f"{100 * shape.errors[backend]:.2g} %")
        if not shape.ratios:
            table.add_row(f"{shape.rows} × {shape.columns}", str(len(shape.names)), "not aligned")
    console.print(table)
    table = Table(title="speed of models with 2:4 layers over the dense one", title_justify="left")
    for name in ("workload", "dense, ms", "all layers", "faster layers", "which are"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ratios = [f"{row[key]:.2f}" if row[key] else "–" for key in ("all_ratio", "faster_ratio")]
        dense = f"{1000 * row['dense_seconds']:.1f}" if "dense_seconds" in row else "–"
        table.add_row(row["workload"], dense, *ratios, f"{row['faster_layers']} of {row['all_layers']}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, fewer layers, seconds to a minute")
    parser.add_argument("--model", type=Path, help="dense model to sparsify; a random one if unset")
    parser.add_argument("--shape", default="4096/11008/32", help="hidden/intermediate/heads[/key-value heads]")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16")
    arguments = parser.parse_args()
    sizes, console = QUICK if arguments.quick else FULL, Console()
    about = {"benchmark": "semi_structured", "quick": arguments.quick}
    try:
        hardware = find_hardware()
    except ShearingError as error:
        console.print(str(error), soft_wrap=True, highlight=False)
        print(json.dumps({**about, "supported": False, "reason": error.value, **environment(torch.device("cpu"))}))
        return
    transformers.utils.logging.disable_progress_bar()
    model = two_of_four(arguments, layers=sizes.layers, hardware=hardware)
    shapes = by_shape(model, sizes=sizes, hardware=hardware, console=console)
    per_layer = [
        {
            "outputs": shape.rows,
            "inputs": shape.columns,
            "bias": shape.bias,
            "layers": len(shape.names),
            "ratios": {backend: dict(ratios) for backend, ratios in shape.ratios.items()},
            "errors": {backend: None if math.isnan(of) else of for backend, of in shape.errors.items()},
        }
        for shape in shapes
    ]
    rows = end_to_end(model, shapes, sizes=sizes, hardware=hardware, console=console)
    print_tables(shapes, rows, sizes=sizes, console=console)
    result = {
        **about,
        "supported": True,
        "model": str(arguments.model) if arguments.model else f"random {arguments.shape}, {sizes.layers} layers",
        "precision": arguments.precision,
        "backends": list(hardware.converters),
        "per_layer": per_layer,
        "end_to_end": rows,
        **environment(hardware.device),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
