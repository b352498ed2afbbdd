"""How much a model's loss bends along each matrix: the trace of its Hessian, by Hutchinson's estimator.

Legend: S inputs of a sequence, T = S + 1 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from shearing.data.documents import IGNORED_LABEL
from shearing.files.result_cache import Cached
from shearing.models.stored.stored_model import Source
from shearing.progress import activity
from shearing.pruning.calibration.places import Matrix
from shearing.pruning.calibration.stored_walk import Compute, not_finite
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.calibration.whole import WholeModel

VERSION = 1
"""Of what is computed: a change of it makes results that were kept before worthless."""


def hessian_trace(
    source: Source,
    *,
    matrices: Sequence[Matrix],
    calibration: Calibration,
    compute: Compute,
    seed: int = 0,
    console: Console,
) -> dict[str, float]:
    """Trace of the Hessian of the loss by each matrix, on the dense model; it may be negative.

    tr H = E[zᵀHz] for entries ±1 of z: one z a sequence, one product with the Hessian for all matrices together, whose
    share of it each reads off (what other matrices add to it has mean 0). The loss is the mean cross-entropy in nats of
    those of a sequence's S next-token predictions that count, 0 where none does, and the result a mean over sequences.

    A product differentiates twice: in fp32 whatever the compute dtype, with the graph of both passes, so that it takes
    several times the memory of training on one sequence. Results are kept as those of `fisher_trace`.

    Args:
        source: the dense model, which is loaded whole.
        matrices: whose traces; nothing else gets a gradient.
        calibration: the text, [samples, T].
        compute: the device.
        seed: of the probes z.
        console: for progress.

    Returns:
        Traces by name of the matrix, in nats.

    Raises:
        ShearingError: a product is NaN or infinite.
    """
    key: dict[str, Any] = {
        "version": VERSION,
        "model": source.fingerprint,
        "text": calibration.fingerprint,
        "matrices": [matrix.name for matrix in matrices],
        "seed": seed,
        "device": compute.device.type,
    }
    cached = Cached.of("hessian-trace", key=key)
    found = cached.read()
    if found is not None:
        console.print(f"trace of the Hessian: from an earlier run, {cached.path}", soft_wrap=True, highlight=False)
        return {name: float(trace) for name, trace in found.items()}
    model = WholeModel(
        source, device=compute.device, dtype=torch.float32, attention_within=calibration.attention_within
    )
    names, samples = [matrix.name for matrix in matrices], len(calibration.tokens)
    with activity("trace of the Hessian", total=samples, console=console) as advance:
        sums = _sums(model, names, calibration=calibration, device=compute.device, seed=seed, advance=advance)
    traces = {name: total / samples for name, total in zip(names, sums, strict=True)}
    for name, trace in traces.items():
        if not math.isfinite(trace):
            raise not_finite(f"the Hessian by {name}")
    try:
        cached.write(traces)
    except OSError as error:
        console.print(f"the trace of the Hessian is not kept: {error}", soft_wrap=True, highlight=False)
    return traces


def _sums(
    model: WholeModel,
    names: Sequence[str],
    *,
    calibration: Calibration,
    device: torch.device,
    seed: int,
    advance: Callable[[int], None],
) -> list[float]:
    """Sum over sequences [samples, T] of zᵀHz for each named parameter."""
    weights = [model.parameter(name).requires_grad_() for name in names]
    generator = torch.Generator().manual_seed(seed)
    sums = [0.0] * len(weights)
    for row in range(len(calibration.tokens)):
        inputs, labels = calibration.predictions(slice(row, row + 1), device=device)
        if bool((labels == IGNORED_LABEL).all()):
            advance(1)
            continue
        # Fused attention cannot be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            logits_SV = torch.cat(list(model.logits(model.states(inputs))))
            loss = cross_entropy(logits_SV.float(), labels[0], ignore_index=IGNORED_LABEL)
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            probes = [_signs(weight, generator=generator) for weight in weights]
            along = torch.stack([(g * z).sum() for g, z in zip(gradients, probes, strict=True)]).sum()
            products = torch.autograd.grad(along, weights)
        for index, (product, probe) in enumerate(zip(products, probes, strict=True)):
            sums[index] += float((product * probe).sum(dtype=torch.float64))
        advance(1)
    return sums


def _signs(weight: Tensor, *, generator: torch.Generator) -> Tensor:
    """±1 at random, drawn on the CPU, so that they are the same on every device."""
    return torch.randint(0, 2, weight.shape, generator=generator).mul_(2).sub_(1).to(weight)
