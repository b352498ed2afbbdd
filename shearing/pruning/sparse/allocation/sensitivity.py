"""How much a model's loss minds each matrix: the trace of its empirical Fisher information.

Legend: S inputs of a sequence, T = S + 1 tokens, d hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shearing.data.documents import IGNORED_LABEL
from shearing.files.result_cache import Cached
from shearing.models.stored.stored_model import Source
from shearing.progress import activity
from shearing.pruning.calibration.places import Matrix
from shearing.pruning.calibration.stored_walk import Compute, not_finite
from shearing.pruning.calibration.text import Calibration, num_counted
from shearing.pruning.calibration.whole import WholeModel

Labels = Literal["true", "sampled"]

VERSION = 1
"""Of what is computed: a change of it makes results that were kept before worthless."""


def fisher_trace(
    source: Source,
    *,
    matrices: Sequence[Matrix],
    calibration: Calibration,
    compute: Compute,
    labels: Labels = "true",
    seed: int = 0,
    console: Console,
) -> dict[str, float]:
    """Trace of the empirical Fisher information of each matrix, on the dense model.

    tr F = mean over sequences x of Σ_w (∂l(x)/∂w)², w over the weights of the matrix and l(x) the mean cross-entropy of
    those of a sequence's S next-token predictions that count, in nats, 0 where none does. With `sampled` labels, drawn
    independently for each position from what the model predicts there, it is an unbiased estimate of the trace of the
    Fisher information proper of S predictions, divided by S² (arXiv 1412.1193 on the difference).

    Gradients are of one sequence at a time: the square of a batch's gradient is not the sum of squares. Each is squared
    and summed in fp32 as soon as it is there, and let go of, so that beside the model there are the gradient of one
    matrix, the activations of one decoder layer and the streams between layers. Results are kept in `cache_folder()`
    and found there again.

    Args:
        source: the dense model, which is loaded whole.
        matrices: whose traces; nothing else gets a gradient.
        calibration: the text, [samples, T].
        compute: device and dtype; bf16 in place of fp16, in which gradients vanish.
        labels: true: the text's own; sampled: from the model's distribution.
        seed: of what is sampled.
        console: for progress.

    Returns:
        Traces by name of the matrix, in nats². On a CPU the same bits for the same arguments; on a GPU up to the order
        in which the backward pass of attention adds.

    Raises:
        ShearingError: gradients are NaN or infinite.
    """
    dtype = torch.bfloat16 if compute.dtype == torch.float16 else compute.dtype
    key: dict[str, Any] = {
        "version": VERSION,
        "model": source.fingerprint,
        "text": calibration.fingerprint,
        "matrices": [matrix.name for matrix in matrices],
        "labels": labels,
        "seed": seed if labels == "sampled" else None,
        "dtype": str(dtype),
        "device": compute.device.type,
    }
    cached = Cached.of("fisher-trace", key=key)
    found = cached.read()
    if found is not None:
        console.print(f"Fisher information: from an earlier run, {cached.path}", soft_wrap=True, highlight=False)
        return {name: float(trace) for name, trace in found.items()}
    model = WholeModel(source, device=compute.device, dtype=dtype, attention_within=calibration.attention_within)
    samples = calibration.tokens.shape[0]
    with activity("Fisher information", total=samples, console=console) as advance:
        sums = _sums_of_squares(
            model,
            [matrix.name for matrix in matrices],
            calibration=calibration,
            device=compute.device,
            label=_Sampling(seed, device=compute.device) if labels == "sampled" else _true_labels,
            advance=advance,
        )
    traces = {matrix.name: of_matrix / samples for matrix, of_matrix in zip(matrices, sums, strict=True)}
    for name, trace in traces.items():
        if not math.isfinite(trace):
            raise not_finite(f"the gradient of {name}")
    try:
        cached.write(traces)
    except OSError as error:
        console.print(f"Fisher information is not kept for later: {error}", soft_wrap=True, highlight=False)
    return traces


def _sums_of_squares(
    model: WholeModel,
    names: Sequence[str],
    *,
    calibration: Calibration,
    device: torch.device,
    label: Callable[[WholeModel, Tensor, Tensor], Tensor],
    advance: Callable[[int], None],
) -> list[float]:
    """Sum over sequences [samples, T] of Σ (∂l/∂w)² for each named parameter."""
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    samples, length = calibration.tokens.shape
    for index, name in enumerate(names):
        parameter = model.parameter(name).requires_grad_()
        parameter.register_post_accumulate_grad_hook(partial(_square_and_let_go, into=sums[index]))
    try:
        for layer in model.layers:
            # Not `gradient_checkpointing_enable`: that works in training mode alone, which has dropout.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        for row in range(samples):
            inputs, labels = calibration.predictions(slice(row, row + 1), device=device)
            states = model.states(inputs)
            total = model.loss(states, label(model, states.detach(), labels))
            (total * ((length - 1) / num_counted(labels))).backward()
            advance(1)
    finally:
        for layer in model.layers:
            del layer.forward  # each refers to its layer: the model would stay until the next collection
    # The gradient was of the mean over predictions times S: of their sum where all count.
    sums /= (length - 1) ** 2
    return sums.tolist()


def _square_and_let_go(parameter: Tensor, *, into: Tensor) -> None:
    assert parameter.grad is not None
    # In place: the gradient goes anyway, and where it is in fp32 already there is no copy.
    into.add_(parameter.grad.float().square_().sum())
    parameter.grad = None


def _true_labels(model: WholeModel, states: Tensor, labels: Tensor) -> Tensor:
    del model, states
    return labels


class _Sampling:
    """Draws labels [1, S] from the model's own predictions; those that do not count stay."""

    def __init__(self, seed: int, *, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def __call__(self, model: WholeModel, states: Tensor, labels: Tensor) -> Tensor:
        drawn = []
        for logits in model.logits(states):
            probabilities = logits.float().softmax(-1)
            # NaN cannot be drawn from. It is found in the gradients, whatever the labels.
            probabilities.nan_to_num_(nan=1.0)
            drawn.append(torch.multinomial(probabilities, 1, generator=self._generator))
        return torch.cat(drawn).view(labels.shape).where(labels != IGNORED_LABEL, labels)
