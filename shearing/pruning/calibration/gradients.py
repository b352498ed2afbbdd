"""How much the loss on calibration text minds each weight: root mean squares of gradients, one layer at a time.

Forward, layer by layer, with what each reads left on disk; then backward, each layer computed once more. Neither the
model nor its gradients are ever whole in memory: there are one layer's weights, their gradients and sums.

Legend: S tokens of a sequence, d hidden, O outputs, I inputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shearing.data.documents import IGNORED_LABEL
from shearing.files.tensors import read_tensors, write_tensors
from shearing.models.anatomy import Head, anatomy_of
from shearing.models.loading import skeleton
from shearing.models.stored.stored_model import Source
from shearing.objectives.cross_entropy import causal_lm_loss
from shearing.progress import activity
from shearing.pruning.calibration.places import Matrix, num_layers
from shearing.pruning.calibration.residual_streams import Streams
from shearing.pruning.calibration.stored_walk import Compute, LayerWalk, fill, not_finite, not_reached
from shearing.pruning.calibration.text import Calibration, num_counted

FOLDER = "gradients"

_CHUNK_TOKENS = 1024


def gather_gradients(
    source: Source, *, matrices: Sequence[Matrix], calibration: Calibration, compute: Compute, console: Console
) -> None:
    """Make what `read_gradients` reads, unless it is there: roots of the mean over sequences of (∂l/∂w)².

    w is of a matrix, l the mean cross-entropy in nats of those of a sequence's S - 1 next-token predictions that count,
    by the dense model; 0 of a sequence in which none does.
    Gradients are of one sequence at a time, squared and summed in fp32.

    Args:
        source: the dense model, of which one layer is read at a time.
        matrices: whose gradients.
        calibration: the text, [samples, S].
        compute: device and dtype (bf16 in place of fp16, in which gradients vanish); files go to its folder.
        console: for progress.

    Raises:
        ShearingError: gradients are NaN or infinite.
    """
    names: dict[int, list[str]] = {}
    for matrix in matrices:
        names.setdefault(matrix.layer, []).append(matrix.name)
    folder = compute.folder / FOLDER
    if all(_path(folder, layer).is_file() for layer in names):
        return
    folder.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if compute.dtype == torch.float16 else compute.dtype
    alone = replace(compute, micro_batch_size=1, dtype=dtype, folder=folder / "streams")
    samples, layers = len(calibration.tokens), num_layers(source)
    total = samples * (2 * layers - min(names) + 1)
    with _own(alone.folder), activity("gradients", total=total, console=console) as advance:
        _Pass(source, calibration=calibration, compute=alone, advance=advance).run(names, folder=folder)


def gradient_bytes(
    source: Source, *, matrices: Sequence[Matrix], calibration: Calibration, compute: Compute
) -> tuple[int, int]:
    """What `gather_gradients` leaves on disk, and needs there until then: what layers read, its gradients."""
    stream: int = calibration.tokens.numel() * source.config.get_text_config(decoder=True).hidden_size
    of_streams = stream * ((num_layers(source) + 1) * compute.dtype.itemsize + 4)
    return 4 * sum(matrix.size for matrix in matrices), of_streams


def read_gradients(name: str, *, layer: int, folder: Path) -> Tensor:
    """Root mean squares [O, I] fp32 on the CPU that `gather_gradients` has left in `folder`, of a layer's matrix."""
    return read_tensors(_path(folder / FOLDER, layer), [name])[name]


@dataclass(frozen=True)
class _Pass:
    source: Source
    calibration: Calibration
    compute: Compute
    advance: Callable[[int], None]

    def run(self, names: dict[int, list[str]], *, folder: Path) -> None:
        walk = LayerWalk(self.source, calibration=self.calibration, compute=self.compute, advance=self.advance)
        last = num_layers(self.source) - 1
        reads: list[Streams] = []
        with torch.no_grad():
            for layer in range(last + 1):
                reads.append(self._copied(walk, name=str(layer)))
                module, _ = walk.load(layer)
                walk.propagate(layer, module)
                walk.let_go(module)
        upstream = self._streams("upstream", dtype=torch.float32, width=walk.width)
        self._through_the_head(walk, upstream)
        for layer in range(last, min(names) - 1, -1):
            found = self._back(walk, layer, reads=reads.pop(), upstream=upstream, names=names.get(layer, []))
            (self.compute.folder / f"{layer}.bin").unlink()
            if found:
                write_tensors(_path(folder, layer), found)

    def _back(
        self, walk: LayerWalk, layer: int, *, reads: Streams, upstream: Streams, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Replaces gradients after the layer by those before it; root mean squares of its weights' by name."""
        module, _ = walk.load(layer)
        parameters = {walk.name(layer, name): parameter for name, parameter in module.named_parameters()}
        weights = [parameters[name].requires_grad_() for name in names]
        sums = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
        for chunk in walk.chunks:
            stream = reads.read(chunk).requires_grad_()
            after = walk.run(layer, module, stream, chunk)
            from_above = upstream.read(chunk).to(after.dtype)
            gradient, *of_weights = torch.autograd.grad(after, [stream, *weights], from_above, allow_unused=True)
            upstream.write(chunk, gradient.float())
            for name, total, of_weight in zip(names, sums, of_weights, strict=True):
                if of_weight is None:
                    raise not_reached(name, module=name.removesuffix(".weight"))
                total += of_weight.float().square()
            self.advance(1)
        walk.let_go(module)
        found = {name: (total / len(walk.chunks)).sqrt().cpu() for name, total in zip(names, sums, strict=True)}
        for name, root in found.items():
            if not bool(root.isfinite().all()):
                raise not_finite(f"the gradient of {name}")
        return found

    def _through_the_head(self, walk: LayerWalk, upstream: Streams) -> None:
        """Gradients of each sequence's loss by the last layer's output."""
        loss_of = self._loss_of_declared() if self.source.structure is None else partial(_loss_of_structure, walk)
        for chunk in walk.chunks:
            _, labels = self.calibration.predictions(chunk, device=self.compute.device)
            stream = walk.stream(chunk).requires_grad_()
            total = loss_of(stream, labels)
            (gradient,) = torch.autograd.grad(total / num_counted(labels), stream)
            upstream.write(chunk, gradient.float())
            self.advance(1)

    def _loss_of_declared(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Of residual streams [B, S, d] after the last layer and labels [B, S - 1]: the sum of the losses."""
        config, device = self.source.config, self.compute.device
        family = anatomy_of(config)
        norm: nn.Module = skeleton(config).get_submodule(family.final_norm.name)
        names = {f"{family.final_norm.name}.{name}": name for name, _ in norm.named_parameters()}
        fill(norm, names=names, stored=self.source.read(names), device=device, dtype=self.compute.dtype)
        tied = config.tie_word_embeddings
        head = f"{family.embedding if tied else family.head}.weight"
        weight_VD = self.source.read([head])[head].to(device, self.compute.dtype)
        own_head = Head.of_config(config, weight=weight_VD)

        def loss_of(stream: Tensor, labels: Tensor) -> Tensor:
            return causal_lm_loss(norm(stream[:, :-1]), own_head, labels, chunk_tokens=_CHUNK_TOKENS)[0]

        return loss_of

    def _copied(self, walk: LayerWalk, *, name: str) -> Streams:
        copy = self._streams(name, dtype=self.compute.dtype, width=walk.width)
        for chunk in walk.chunks:
            copy.write(chunk, walk.stream(chunk))
        return copy

    def _streams(self, name: str, *, dtype: torch.dtype, width: int) -> Streams:
        shape = (*self.calibration.tokens.shape, width)
        device, folder = self.compute.device, self.compute.folder
        return Streams(shape, dtype=dtype, device=device, offload="disk", folder=folder, name=name)


def _loss_of_structure(walk: LayerWalk, stream: Tensor, labels: Tensor) -> Tensor:
    logits = walk.logits(stream)[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL)


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """A folder that is empty at the beginning and gone at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _path(folder: Path, layer: int) -> Path:
    return folder / f"{layer:05d}.safetensors"
