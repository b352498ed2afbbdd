"""`shear export --semi-structured`: find the 2:4 layers, time them on this device, write which of them to convert.

OUTPUT/config.json, tokenizer…, *.safetensors   as in the source; negative zeros of 2:4 matrices made positive
OUTPUT/semi_structured.json                     layers to convert, and what was measured
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from shearing.errors import ShearingError, named
from shearing.evaluation.environment import environment
from shearing.files.durable import flush_folder, flush_tree, locked, require_new, require_writable, write_json
from shearing.files.full_disk import full_disk_said, no_room_for_model
from shearing.files.tensors import overwrite
from shearing.models.anatomy import anatomy_of
from shearing.models.stored.stored_model import Source, dtype_of, open_source
from shearing.progress import activity
from shearing.pruning.calibration.places import Matrix, matrices_of
from shearing.pruning.sparse.recipe import COMPONENT_NAMES
from shearing.pruning.sparse.semi_structured.hardware import TOLERANCES, Hardware, find_hardware
from shearing.pruning.sparse.semi_structured.layout import (
    BACKENDS,
    first_violation,
    has_negative_zeros,
    misalignment,
    without_negative_zeros,
)
from shearing.pruning.sparse.semi_structured.loading import FORMAT, MANIFEST, PRECISIONS
from shearing.pruning.sparse.semi_structured.summary import Verdict, print_summary
from shearing.pruning.sparse.semi_structured.timing import (
    Layer,
    best_backend,
    is_faster,
    largest_error,
    layers_to_measure,
    speedup,
)
from shearing.pruning.sparse.stored.write import copy_files

BATCHES = (1, 64, 2048)
"""Tokens at a time: one text being written, 64 at once, a prompt being read."""
MARGIN = 0.05

_Advance = Callable[[int], None]
_Kind = tuple[int, int, bool]


@dataclass(frozen=True)
class _Measurement:
    """What is measured, and with what."""

    source: Source
    hardware: Hardware
    dtype: torch.dtype
    batches: tuple[int, ...]
    margin: float

    def read(self, matrix: Matrix) -> Layer:
        """Weight and bias on the device, as they will be multiplied."""
        names = [name for name in (matrix.name, _bias(matrix)) if name in self.source.files]
        tensors = {name: of.to(self.hardware.device, self.dtype) for name, of in self.source.read(names).items()}
        return without_negative_zeros(tensors[matrix.name]).contiguous(), tensors.get(_bias(matrix))

    def kind(self, matrix: Matrix) -> _Kind:
        """What the time depends on: shape, and whether there is a bias."""
        return matrix.rows, matrix.columns, _bias(matrix) in self.source.files


@dataclass
class _Found:
    """What the weights are like."""

    two_of_four: list[Matrix] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    negative_zeros: list[str] = field(default_factory=list)


@named(COMPONENT_NAMES)
def export(
    model: str,
    *,
    output: Path,
    batches: Sequence[int] = BATCHES,
    precision: str = "auto",
    backend: str = "auto",
    margin: float = MARGIN,
    revision: str | None = None,
    hardware: Hardware | None = None,
    console: Console | None = None,
) -> Path:
    """Write a model with the list of its layers that are faster as 2:4 on this device, for `load`.

    Any model will do in some of whose matrices 2:4 holds, however it was made; the others stay dense.

    Args:
        model: folder or hub name.
        output: folder to make; it appears as a whole or not at all.
        batches: tokens that go through a layer at once; a layer is converted if it is faster at all of them.
        precision: bf16 or fp16, of weights and activations; auto: as stored, bf16 for fp32.
        backend: a key of `layout.BACKENDS`; auto: for each layer the better one.
        margin: share that a layer has to be faster by.
        revision: of a hub name.
        hardware: where; the GPU of this process if None.
        console: where progress and results go; stdout if None.

    Returns:
        The folder.

    Raises:
        ShearingError: there is no such hardware (before anything is read), an option is wrong, no matrix is 2:4, or no
            layer is faster. Nothing is written then.
    """
    console = console or Console()
    _require_options(batches=batches, precision=precision, backend=backend, margin=margin)
    hardware = hardware or find_hardware(backend=backend)
    require_new(output, field="--output")
    require_writable(output, field="--output")
    transformers.utils.logging.disable_progress_bar()
    partial = output.with_name(f"{output.name}.partial")
    with locked(partial, field="--output"), full_disk_said(lambda: no_room_for_model(output, field="--output")):
        try:
            source = open_source(model, revision=revision, converted=partial / "source")
            _require_linear(source)
            _require_room(output, source=source)
            matrices = matrices_of(source)
            dtype = PRECISIONS[_precision_of(source, matrices, asked=precision)]
            measurement = _Measurement(source, hardware, dtype, tuple(sorted(set(batches))), margin)
            found = _look(measurement, matrices, console=console)
            verdicts = found.verdicts | _measure(measurement, found.two_of_four, console=console)
            print_summary({matrix: verdicts[_module(matrix)] for matrix in matrices}, batches=batches, console=console)
            _require_gain(verdicts, batches=batches)
            manifest = _manifest(measurement, matrices, verdicts=verdicts, negative_zeros=found.negative_zeros)
            _write(output, beside=partial / "model", source=source, manifest=manifest, console=console)
        finally:
            shutil.rmtree(partial)
    console.print(f"exported model: {output}", soft_wrap=True, highlight=False)
    return output


def _require_linear(source: Source) -> None:
    if anatomy_of(source.config).mlp.experts is not None:
        raise ShearingError(
            "model",
            value=f"{source.config.model_type}, whose experts are kept in stacks",
            allowed="models whose matrices are linear layers: kernels for 2:4 matrices multiply one at a time",
            mend="serve the sparse model as it is",
        )


def _look(measurement: _Measurement, matrices: Sequence[Matrix], *, console: Console) -> _Found:
    """Read every matrix once: whether it is 2:4, and has negative zeros."""
    found = _Found()
    with activity("looking for 2:4 in the weights", total=len(matrices), console=console) as advance:
        for matrix in matrices:
            weight = measurement.source.read([matrix.name])[matrix.name].to(measurement.hardware.device)
            violation = first_violation(weight)
            if violation is not None:
                found.verdicts[_module(matrix)] = Verdict("not 2:4", str(violation))
            else:
                found.two_of_four.append(matrix)
                if has_negative_zeros(weight):
                    found.negative_zeros.append(matrix.name)
            advance(1)
    if not found.two_of_four:
        name, verdict = next(iter(found.verdicts.items()))
        raise ShearingError(
            "model",
            value=f"{name}.weight, {verdict.detail}",
            allowed="a model with matrices in which at most 2 of each 4 consecutive inputs of a row are not zero",
            mend="make them: shear sparsify MODEL --pattern 2:4 …, and export what that writes",
        )
    return found


def _measure(measurement: _Measurement, matrices: Sequence[Matrix], *, console: Console) -> dict[str, Verdict]:
    """Time each kind of layer once, then check the results of every layer that gains."""
    kinds: dict[_Kind, list[Matrix]] = {}
    for matrix in matrices:
        kinds.setdefault(measurement.kind(matrix), []).append(matrix)
    steps = len(kinds) * len(measurement.hardware.converters) * len(measurement.batches)
    name = f"timing {len(kinds)} shapes on {measurement.hardware.name}"
    with activity(name, total=steps, console=console) as advance:
        of_kinds = {kind: _verdict(measurement, members, advance=advance) for kind, members in kinds.items()}
    verdicts: dict[str, Verdict] = {}
    with activity("comparing results with dense ones", total=len(matrices), console=console) as advance:
        for matrix in matrices:
            verdicts[_module(matrix)] = _checked(measurement, matrix, of_kinds[measurement.kind(matrix)])
            advance(1)
    return verdicts


def _verdict(measurement: _Measurement, members: Sequence[Matrix], *, advance: _Advance) -> Verdict:
    rows, columns, hardware = members[0].rows, members[0].columns, measurement.hardware
    size = members[0].size * measurement.dtype.itemsize
    layers = [measurement.read(matrix) for matrix in members[: layers_to_measure(len(members), bytes_each=size)]]
    ratios: dict[str, dict[int, float]] = {}
    refusals: list[str] = []
    for backend, convert in hardware.converters.items():
        refusal = misalignment(rows=rows, columns=columns, backend=backend, dtype=measurement.dtype)
        if refusal is not None:
            refusals.append(refusal)
            advance(len(measurement.batches))
            continue
        ratios[backend] = {}
        for tokens in measurement.batches:
            ratios[backend][tokens] = speedup(layers, convert=convert, tokens=tokens, hardware=hardware)
            advance(1)
    if not ratios:
        return Verdict("not aligned", "; ".join(refusals))
    best = best_backend(ratios)
    if not is_faster(ratios[best], margin=measurement.margin):
        return Verdict("not faster", f"less than {1 + measurement.margin:g} times as fast as dense", best, ratios[best])
    return Verdict(None, "", best, ratios[best])


def _checked(measurement: _Measurement, matrix: Matrix, verdict: Verdict) -> Verdict:
    if verdict.backend is None or not verdict.converted:
        return verdict
    convert = measurement.hardware.converters[verdict.backend]
    error = largest_error(measurement.read(matrix), convert=convert, batches=measurement.batches)
    if error <= TOLERANCES[measurement.dtype]:
        return verdict
    detail = (
        "results that are not finite" if math.isnan(error) else f"results differ from dense ones by {100 * error:.3g} %"
    )
    return Verdict("wrong", detail, verdict.backend, verdict.ratios)


def _manifest(
    measurement: _Measurement,
    matrices: Sequence[Matrix],
    *,
    verdicts: Mapping[str, Verdict],
    negative_zeros: Sequence[str],
) -> dict[str, Any]:
    shapes = {_module(matrix): [matrix.rows, matrix.columns] for matrix in matrices}
    about = {name: {"shape": shape, **verdicts[name].described()} for name, shape in shapes.items()}
    return {
        "format": FORMAT,
        "convention": "2:4 means 2 kept of each 4 consecutive inputs",
        "precision": next(name for name, dtype in PRECISIONS.items() if dtype == measurement.dtype),
        "batches": list(measurement.batches),
        "margin": measurement.margin,
        "measured": {**environment(measurement.hardware.device), "device": measurement.hardware.name},
        "layers": {name: of for name, of in about.items() if verdicts[name].converted},
        "dense": {name: of for name, of in about.items() if not verdicts[name].converted},
        "negative_zeros": list(negative_zeros),
    }


def _write(output: Path, *, beside: Path, source: Source, manifest: dict[str, Any], console: Console) -> None:
    with activity("writing the model", total=source.weight_bytes(), console=console) as advance:
        copy_files(source, beside, advance=advance)
        for name in manifest["negative_zeros"]:
            overwrite(beside / source.files[name], {name: without_negative_zeros(source.read([name])[name])})
        write_json(beside / MANIFEST, manifest)
        flush_tree(beside)
    beside.rename(output)
    flush_folder(output.parent)


def _require_options(*, batches: Sequence[int], precision: str, backend: str, margin: float) -> None:
    if not batches or min(batches) < 1:
        raise ShearingError(
            "--batch",
            value=list(batches),
            allowed="numbers of tokens, at least 1",
            mend=f"give those that will go through a layer at once, as --batch {' --batch '.join(map(str, BATCHES))}",
        )
    for option, value, choices in (("--precision", precision, PRECISIONS), ("--backend", backend, BACKENDS)):
        if value != "auto" and value not in choices:
            raise ShearingError(
                option, value=value, allowed=f"auto, {', '.join(choices)}", mend="choose one of them, or leave it out"
            )
    if not 0 <= margin < math.inf:
        raise ShearingError(
            "--margin", value=margin, allowed="a number, at least 0", mend="0.05 asks for 5 % more than dense"
        )


def _require_room(output: Path, *, source: Source) -> None:
    if shutil.disk_usage(output.parent).free < source.weight_bytes():
        raise no_room_for_model(output, field="--output")


def _require_gain(verdicts: Mapping[str, Verdict], *, batches: Sequence[int]) -> None:
    if not any(verdict.converted for verdict in verdicts.values()):
        raise ShearingError(
            "--batch",
            value=sorted(set(batches)),
            allowed="numbers of tokens at which some layer is faster than dense (see the table); there is none, so "
            "nothing was written",
            mend="give only the numbers that you will run with, or use the sparse model as it is",
        )


def _precision_of(source: Source, matrices: Sequence[Matrix], *, asked: str) -> str:
    if asked != "auto":
        return asked
    return "fp16" if dtype_of(source, matrices[0].name) == torch.float16 else "bf16"


def _module(matrix: Matrix) -> str:
    return matrix.name.removesuffix(".weight")


def _bias(matrix: Matrix) -> str:
    return f"{_module(matrix)}.bias"
