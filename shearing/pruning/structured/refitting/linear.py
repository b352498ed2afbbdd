"""Refit: weights that stay make up for the units that go, layer by layer, before any of them is trained.

Legend: T tokens, B sequences, S positions; I and O inputs and outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from shearing.data.documents import Inputs
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families import Family, SubLayer
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import weights_here
from shearing.models.stored.paging.passing import Reached
from shearing.processes.processes import Processes
from shearing.pruning.calibration.places import Place, named_places, weight_of
from shearing.pruning.calibration.shares import shares_of
from shearing.pruning.calibration.walk import first_inputs, listening, run_layer
from shearing.pruning.structured.importance.metric import Cost
from shearing.pruning.structured.importance.reconstruction import token_weights
from shearing.pruning.structured.refitting.blocks import BlockErrors, Blocks, block_refit_cost
from shearing.pruning.structured.refitting.least_squares import RIDGE, RIDGES, Fit, Ridge, held_out
from shearing.pruning.structured.refitting.recipe import BlockRefitRecipe


@dataclass(frozen=True)
class Refitted:
    """What a refit has found.

    Attributes:
        ridges: with which each matrix, or those that read the same, was held, by layer and place.
        blocks: by layer, what its block lacked before and after steps of its own; empty without these.
    """

    ridges: Mapping[str, float]
    blocks: Mapping[int, BlockErrors]


@torch.no_grad()
def refit(
    model: MaskedModel,
    *,
    masks: Masks,
    batches: Sequence[Inputs],
    ridge: Ridge = RIDGE,
    blocks: BlockRefitRecipe | None = None,
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes | None = None,
    keep: Callable[[int, nn.Module], None] = lambda _index, _layer: None,
) -> Refitted:
    """Refit the weights that stay under binary masks to what the whole model computes, layer by layer, in place.

    A linear layer W that reads x' under the masks, where the whole model reads x and should give y, becomes

        W + argmin_D Σ_t w_t |y_t - (W + D) x'_t|² + δ tr(D diag(Σ_t w_t x'_t x'_tᵀ) Dᵀ),   δ = `ridge`

    over the columns and rows that stay. For what reads the residual stream, y = W x. For what writes into it, y leads
    to the residual stream of the whole model; so a layer also makes up for the layers below it that are gone. Where a
    norm stands behind the write, y is what the whole model writes in front of it, and w_t has its inverse mean square
    as a factor: a norm takes the scale away, and with it what the layers below lack could not be told. Inputs
    x' come from layers that are refitted already (as in SparseGPT). Where a write has a bias, it is refitted with it,
    free of δ: so it holds the mean of what goes (as in FLAP, arXiv 2312.11983). Other biases, norms, embedding and head
    stay as they are, and so do experts and their routers. With `blocks`, all weights of each layer go on from there by
    steps of their own; see `Blocks`.

    Args:
        model: masked model, on any device, whole or with weights that come on demand; its masks are left as `masks`.
        masks: binary.
        batches: tokens [B, S], on the model's device; all of them on every process.
        ridge: how strongly weights are held where they are; auto: rows that are held out choose it for each matrix,
            see `Fit`. Of fewer than `LEAST_ROWS` rows none is held out, and it is `RIDGE`.
        blocks: steps of each block by itself; None: none.
        advance: called with 1 after every layer.
        processes: those that refit together, each with a share of the text; all of them call this, and the weights of
            all become the same.
        keep: called with every layer's index and the layer, whose refitted weights are there for the last time where
            they come on demand.

    Returns:
        The ridges, and what blocks of their own steps lack.
    """
    source_model = model.model
    family = anatomy_of(source_model)
    multiplier = family.multiplier(source_model.config)
    processes = processes or Processes()
    shares = shares_of(batches, processes=processes)
    own = [share.inputs for share in shares]
    was_training = source_model.training
    source_model.eval()
    model.set_masks(None)
    whole, calls = first_inputs(source_model, own)
    model.set_masks(masks)
    masked, _ = first_inputs(source_model, own)
    hidden = None if masks.hidden is None else masks.hidden.nonzero()[:, 0]
    attention_read, attention_write, mlp_norm, mlp_read, mlp_write = named_places(
        family, "attention read", "attention write", "mlp norm", "mlp read", "mlp write"
    )
    listened = [attention_read, mlp_norm, mlp_read]
    listened += [attention_write] if family.parallel or family.attention.after else []
    listened += [mlp_write] if family.mlp.after else []
    held = [held_out(share.numbers).to(source_model.device) for share in shares]
    fitting = _Fitting(ridge=ridge, held=held, processes=processes)
    refit_readers, refit_write = partial(_refit_readers, fitting=fitting), partial(_refit_write, fitting=fitting)
    ridges: dict[str, float] = {}
    behind_kept = whole  # of the whole model, behind the last layer that stays
    trained = None
    if blocks is not None and blocks.steps:
        trained = Blocks(model, blocks, batches=batches, kept=hidden, processes=processes, keep=keep)
    for index, layer in enumerate(decoder_layers(source_model)):
        with weights_here(layer):
            model.set_masks(None)
            dense = [
                run_layer(layer.forward, layer, stream, of_layers[index], places=listened)
                for stream, of_layers in zip(whole, calls, strict=True)
            ]
            between = _between(layer, family, whole, dense)
            whole = [after for _, after in dense]
            seen_whole = [seen for seen, _ in dense]
            attention_wanted = _wanted_writes(layer, family.attention, "attention write", between, seen=seen_whole)
            mlp_wanted = _wanted_writes(layer, family.mlp, "mlp write", whole, seen=seen_whole)
            model.set_masks(masks)
            units = None if masks.intermediate is None else masks.intermediate[index].nonzero()[:, 0]
            before = masked
            if _kept(masks.attention, index):
                heads = _inputs_of_heads(masks.heads(index), inputs=weight_of(layer, family.attention.write).shape[1])
                inputs = _read(layer, family.attention, masked)
                normed = family.attention.before is not None
                ridges[f"{index}: {attention_read.name}"] = refit_readers(
                    layer, attention_read, inputs=inputs, dense=dense, columns=hidden, normed=normed
                )
                places = (attention_write, mlp_norm)
                found = [
                    run_layer(layer.forward, layer, x, of_layers[index], places=places, until=mlp_norm.name)
                    for x, of_layers in zip(masked, calls, strict=True)
                ]
                inputs = [seen[attention_write.name] for seen, _ in found]
                write = _Write.of(layer, family.attention, multiplier=multiplier)
                masked, ridges[f"{index}: {attention_write.name}"] = refit_write(
                    write, masked, inputs, attention_wanted, rows=hidden, columns=heads
                )
            if _kept(masks.mlp, index) and family.mlp.experts is not None:
                mlp = layer.get_submodule(family.mlp.module)
                written = [mlp(x) for x in _read(layer, family.mlp, masked)]
                masked = [stream + multiplier * each for stream, each in zip(masked, written, strict=True)]
            elif _kept(masks.mlp, index):
                inputs = _read(layer, family.mlp, before if family.parallel else masked)
                normed = family.mlp.before is not None
                ridges[f"{index}: {mlp_read.name}"] = refit_readers(
                    layer, mlp_read, inputs=inputs, dense=dense, columns=hidden, normed=normed
                )
                inputs = [_inputs_of_write(layer, family, x) for x in inputs]
                write = _Write.of(layer, family.mlp, multiplier=multiplier)
                masked, ridges[f"{index}: {mlp_write.name}"] = refit_write(
                    write, masked, inputs, mlp_wanted, rows=hidden, columns=units
                )
            if trained is None or not (_kept(masks.attention, index) or _kept(masks.mlp, index)):
                keep(index, layer)
            else:
                trained.take(index, layer, shares=shares, inputs=behind_kept, wanted=whole)
                behind_kept = whole
        advance(1)
    if trained is not None:
        trained.finish()
    source_model.train(was_training)
    return Refitted(ridges, {} if trained is None else trained.errors)


def refit_cost(
    source: Shape,
    *,
    target: Shape,
    text_tokens: int,
    ridge: Ridge = RIDGE,
    blocks: BlockRefitRecipe | None = None,
    sequence_length: int = 0,
) -> Cost:
    """What `refit` takes: two passes over the text, and in each layer that stays four systems of equations, or two.

    A system with n inputs that take part and O outputs takes 2 T n (n + O) for its sums, n^3 / 3 for the factor and
    2 n^2 O for the solution; of each ridge that is tried a factor and a solution more, and 2 n^2 O for what it leaves.

    Args:
        source: shape of the model.
        target: shape that its masks leave.
        text_tokens: T, of the batches.
        ridge: see `refit`.
        blocks: see `refit`.
        sequence_length: tokens of a row of the text; only read with `blocks`.
    """
    tried = len(RIDGES) if ridge == "auto" else 0
    d, kept = source.hidden_size, target.hidden_size
    heads, units = target.num_attention_heads * target.head_dim, target.intermediate_size
    flops = 0.0
    for sublayer, inputs in zip(source.family.sublayers.values(), (heads, units), strict=True):
        flops += 2.0 * text_tokens * inputs * d if sublayer.after else 0.0  # what the whole model writes
    of_attention, of_mlp = ((kept, d), (heads, kept)), ((kept, d), (units, kept))
    for inputs, outputs in of_attention if source.num_experts else of_attention + of_mlp:
        flops += 2.0 * text_tokens * inputs * (inputs + outputs)
        flops += (1 + tried) * (inputs**3 / 3 + 2.0 * inputs**2 * outputs) + tried * 2.0 * inputs**2 * outputs
    flops *= target.num_hidden_layers
    if blocks is not None and blocks.steps:
        steps = block_refit_cost(
            source, target=target, settings=blocks, text_tokens=text_tokens, sequence_length=sequence_length
        )
        flops += steps.other_flops
    return Cost(forward_tokens=2 * text_tokens, other_flops=flops)


@dataclass(frozen=True)
class _Fitting:
    """What all fits of a refit have in common.

    Attributes:
        ridge: see `refit`.
        held: of each share of rows, which are held out, bool [B].
        processes: that fit together.
    """

    ridge: Ridge
    held: Sequence[Tensor]
    processes: Processes


def _refit_readers(
    layer: nn.Module,
    place: Place,
    *,
    inputs: Sequence[Tensor],
    dense: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    columns: Tensor | None,
    fitting: _Fitting,
    normed: bool,
) -> float:
    """Corrects what reads the residual stream, from its inputs with masks and without; returns the ridge."""
    first = weight_of(layer, place.members[0])
    fit = Fit(first, columns=columns, outputs=first.shape[1], ridge=fitting.ridge)
    for x, (seen, _), held in zip(inputs, dense, fitting.held, strict=True):
        # Where no norm makes tokens alike, those of large streams would outweigh all others.
        weights = None if normed else token_weights(seen[place.name])
        fit.add(x, lacks=seen[place.name] - x, weights=weights, held=held)
    gain, _, ridge = fit.solve(fitting.processes)
    for name in place.members:
        weight = weight_of(layer, name)
        # What the output lacks is W (x - x').
        weight[:, fit.columns] += (weight.double() @ gain.T).to(weight.dtype)
    return ridge


@dataclass(frozen=True)
class _Write:
    """What writes into the residual stream, and what stands in between.

    Attributes:
        linear: [O, I].
        after: the norm behind it.
        multiplier: of what is added.
    """

    linear: nn.Module
    after: nn.Module | None
    multiplier: float

    @classmethod
    def of(cls, layer: nn.Module, sublayer: SubLayer, *, multiplier: float) -> Self:
        after = None if sublayer.after is None else layer.get_submodule(sublayer.after.name)
        return cls(layer.get_submodule(sublayer.write), after, multiplier)

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        """The stream behind it, when it reads x."""
        written = self.linear(x)
        written = written if self.after is None else self.after(written)
        behind: Tensor = stream + self.multiplier * written
        return behind

    def lacks(self, stream: Tensor, x: Tensor, *, wanted: _Wanted) -> Tensor:
        """What its output lacks, when it reads x."""
        should = (wanted.stream - stream) / self.multiplier if wanted.written is None else wanted.written
        written: Tensor = self.linear(x)
        return should - written


class _Wanted(NamedTuple):
    """What a write should lead to, [B, S, d].

    Attributes:
        stream: the residual stream behind it.
        written: what it puts out, where a norm is behind it; else None.
    """

    stream: Tensor
    written: Tensor | None

    def weights(self) -> Tensor:
        """How much each token counts, [B, S]."""
        weights = token_weights(self.stream)
        return weights if self.written is None else weights * token_weights(self.written)


def _wanted_writes(
    layer: nn.Module,
    sublayer: SubLayer,
    read: str,
    streams: Sequence[Tensor],
    *,
    seen: Sequence[Mapping[str, Tensor]],
) -> list[_Wanted]:
    """Of the whole model, from its residual streams behind the write and what the place `read` reads; without masks."""
    if sublayer.after is None:
        return [_Wanted(stream, None) for stream in streams]
    write = layer.get_submodule(sublayer.write)
    return [_Wanted(stream, write(each[read])) for stream, each in zip(streams, seen, strict=True)]


def _read(layer: nn.Module, sublayer: SubLayer, streams: Sequence[Tensor]) -> list[Tensor]:
    """What a sub-layer makes of residual streams before anything else."""
    if sublayer.before is None:
        return list(streams)
    norm = layer.get_submodule(sublayer.before.name)
    return [norm(stream) for stream in streams]


def _refit_write(
    write: _Write,
    streams: Sequence[Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[_Wanted],
    *,
    rows: Tensor | None,
    columns: Tensor | None,
    fitting: _Fitting,
) -> tuple[list[Tensor], float]:
    """Corrects what writes into the residual stream; returns the stream after it, and the ridge."""
    weight, bias = write.linear.weight, write.linear.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    index_O = torch.arange(weight.shape[0], device=weight.device) if rows is None else rows
    fit = Fit(weight, columns=columns, outputs=index_O.numel(), ridge=fitting.ridge, intercept=bias is not None)
    for stream, x, y, held in zip(streams, inputs, wanted, fitting.held, strict=True):
        lacks = write.lacks(stream, x, wanted=y)
        fit.add(x, lacks=lacks if rows is None else lacks[..., rows], weights=y.weights(), held=held)
    correction, intercept, ridge = fit.solve(fitting.processes)
    weight[index_O[:, None], fit.columns] += correction.T.to(weight.dtype)
    if bias is not None:
        assert intercept is not None
        bias[index_O] += intercept.to(bias.dtype)
    return [write.add(stream, x) for stream, x in zip(streams, inputs, strict=True)], ridge


def _between(
    layer: nn.Module,
    family: Family,
    streams: Sequence[Tensor],
    dense: Sequence[tuple[Mapping[str, Tensor], Tensor]],
) -> list[Tensor]:
    """The whole model's residual stream with what attention adds, and without what the MLP adds."""
    if not family.parallel:
        return [seen["mlp norm"] for seen, _ in dense]
    write = layer.get_submodule(family.attention.write)
    return [stream + write(seen["attention write"]) for stream, (seen, _) in zip(streams, dense, strict=True)]


def _kept(mask: Tensor | None, index: int) -> bool:
    return mask is None or bool(mask[index])


def _inputs_of_heads(heads: Tensor | None, *, inputs: int) -> Tensor | None:
    """Indices of the kept inputs of the attention's write, from a mask of its heads or groups."""
    return None if heads is None else heads.repeat_interleave(inputs // heads.numel()).nonzero()[:, 0]


def _inputs_of_write(layer: nn.Module, family: Family, x: Tensor) -> Tensor:
    """What the MLP's write reads when the MLP reads x."""
    with listening(layer, named_places(family, "mlp write"), until="mlp write") as seen, suppress(Reached):
        layer.get_submodule(family.mlp.module)(x)
    return seen["mlp write"]
