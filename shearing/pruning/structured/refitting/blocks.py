"""Refit of whole blocks: each is trained alone to put out what the source does, from what the source gives it.

So blocks do not wait for each other: of several processes each trains one at a time.

Legend: R rows of the text, S positions, d hidden, K dimensions of it that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shearing.data.documents import Inputs
from shearing.errors import ShearingError, key
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import weights_here
from shearing.models.stored.paging.passing import Call
from shearing.processes.processes import Processes
from shearing.pruning.calibration.shares import Share
from shearing.pruning.calibration.walk import first_inputs
from shearing.pruning.structured.importance.metric import Cost
from shearing.pruning.structured.importance.reconstruction import token_weights
from shearing.pruning.structured.refitting.recipe import BlockRefitRecipe


@dataclass(frozen=True)
class BlockErrors:
    """What a block's output lacks on the calibration text, as a share of it; see `Blocks`.

    Attributes:
        before: after the linear refit.
        after: after its steps.
    """

    before: float
    after: float


@dataclass(frozen=True)
class _Block:
    """What one process needs to train a block by itself.

    Attributes:
        number: of its layer.
        layer: under masks.
        weights: of the layer, by name: copies.
        calls: of each row, what the layer is called with.
        inputs, wanted: of each row, the source's residual stream in front of it, without what goes, and behind it,
            [1, S, d].
        kept: dimensions of the stream that stay, [K]; None: all.
    """

    number: int
    layer: nn.Module
    weights: dict[str, Tensor]
    calls: Sequence[Call]
    inputs: Sequence[Tensor]
    wanted: Sequence[Tensor]
    kept: Tensor | None

    def error(self, row: int, weights: dict[str, Tensor]) -> Tensor:
        """What the output lacks of the target: its mean square over that of the target, in the mean over tokens."""
        call = self.calls[row]
        around = _Around(self.layer)
        output = functional_call(
            around,
            {f"layer.{name}": weight for name, weight in weights.items()},
            (self.inputs[row], *call.arguments),
            call.keywords,
        )
        stream = output[0] if isinstance(output, tuple) else output
        lacks = self.wanted[row] - stream
        lacks = lacks if self.kept is None else lacks[..., self.kept]
        error: Tensor = (lacks.square().mean(-1) * token_weights(self.wanted[row])).mean()
        return error

    @torch.no_grad()
    def whole_error(self, weights: dict[str, Tensor]) -> float:
        """Of all rows."""
        return sum(float(self.error(row, weights)) for row in range(len(self.inputs))) / len(self.inputs)


class _Around(nn.Module):
    """Calls a layer's `forward`, so that what listens to the layer, as what brings its weights, does not hear of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.layer.forward(*arguments, **keywords)


def require_dense(source: Shape, *, blocks: BlockRefitRecipe | None) -> None:
    """Check that a model has no experts: in a refit they stay as they are, and steps of whole blocks would move them.

    Raises:
        ShearingError: it has.
    """
    if blocks is not None and source.num_experts:
        raise ShearingError(
            "block_refit",
            value=f"{blocks.steps} steps",
            allowed=f"none with the experts of a {source.family.model_type}",
            mend=f"set {key('block_refit')}=null",
        )


class Blocks:
    """Trains blocks by themselves, towards what the source puts out.

    What is lessened is

        Σ_t w_t |y_t - f(x'_t)|²,   w_t = 1 / mean square of y_t,

    over all weights of a block f: x' is what stays of the whole model's residual stream behind the block before that is
    kept, y that behind f, over the dimensions that stay. So a block makes up for layers that are gone before it, not
    for what the blocks below lack: all of them would, once each. Adam takes `steps`, each on rows that follow upon each
    other in the text, in an order that depends on the layer alone. A block that is no better afterwards stays as it
    was. (Blockwise local distillation, Puzzle, arXiv 2411.19146.)

    Args:
        model: whose blocks they are, under masks while one is taken or finished.
        settings: how many steps.
        batches: tokens [B, S]; all of them on every process.
        kept: hidden dimensions that stay; None: all.
        processes: each with a share of the rows; all of them make every call.
        keep: see `refit`; called once a block is what it stays.

    Attributes:
        errors: by layer, of all blocks that are finished.
    """

    def __init__(
        self,
        model: MaskedModel,
        settings: BlockRefitRecipe,
        *,
        batches: Sequence[Inputs],
        kept: Tensor | None,
        processes: Processes,
        keep: Callable[[int, nn.Module], None],
    ) -> None:
        self._settings, self._kept, self._processes, self._keep = settings, kept, processes, keep
        self._batches = [len(batch.tokens) for batch in batches]
        rows = [batch.part(row, row + 1) for batch in batches for row in range(len(batch.tokens))]
        streams, self._calls = first_inputs(model.model, rows)
        self._row, self._device = streams[0].shape[1:], streams[0].device
        self._round: list[tuple[int, nn.Module]] = []
        self._own: _Block | None = None
        self.errors: dict[int, BlockErrors] = {}

    def take(
        self,
        number: int,
        layer: nn.Module,
        *,
        shares: Sequence[Share],
        inputs: Sequence[Tensor],
        wanted: Sequence[Tensor],
    ) -> None:
        """The next block, whose weights are here; once every process has one, they are trained.

        Args:
            number: of the layer.
            layer: under masks, refitted.
            shares: rows of this process.
            inputs: the whole model's residual stream behind the layer before that stays, of each share [B, S, d].
            wanted: the same behind this one.
        """
        owner = len(self._round)
        whole_inputs, whole_wanted = (self._gathered(shares, each, owner=owner) for each in (inputs, wanted))
        self._round.append((number, layer))
        if owner == self._processes.rank:
            weights = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
            calls = [of_row[number] for of_row in self._calls]
            kept = torch.ones_like(whole_inputs[0][0, 0])
            if self._kept is not None:
                kept = torch.zeros_like(kept).index_fill(0, self._kept, 1.0)
            inputs_kept = [row * kept for row in whole_inputs]  # under masks the others are zero
            self._own = _Block(number, layer, weights, calls, inputs_kept, whole_wanted, self._kept)
        if len(self._round) == self._processes.size:
            self.finish()

    def finish(self) -> None:
        """Train the blocks that were taken and are not yet; every process has the weights of all afterwards."""
        trained: dict[str, Tensor] = {}
        errors = BlockErrors(0.0, 0.0)
        if self._own is not None:
            trained, errors = _train(self._own, settings=self._settings)
        for owner, (number, layer) in enumerate(self._round):
            with weights_here(layer), torch.no_grad():
                for name, weight in layer.named_parameters():
                    value = trained[name] if owner == self._processes.rank else torch.empty_like(weight)
                    weight.copy_(self._processes.share(value, rank=owner))
                said = torch.tensor([errors.before, errors.after], dtype=torch.float64, device=weight.device)
                before, after = self._processes.share(said, rank=owner).tolist()
                self.errors[number] = BlockErrors(before, after)
                self._keep(number, layer)
        self._round, self._own = [], None

    def _gathered(self, shares: Sequence[Share], streams: Sequence[Tensor], *, owner: int) -> list[Tensor]:
        """Of every row of the text, what its process has of it; only of use to the owner."""
        own = {share.batch: (share, stream) for share, stream in zip(shares, streams, strict=True)}
        if self._processes.size == 1:
            return [row for stream in streams for row in stream.split(1)]
        rows: list[Tensor] = []
        for batch, length in enumerate(self._batches):
            whole = torch.zeros(length, *self._row, device=self._device)
            if batch in own:
                share, stream = own[batch]
                whole[share.numbers.start - len(rows) : share.numbers.stop - len(rows)] = stream
            rows.extend(self._processes.sum_on(whole, rank=owner).split(1))
        return rows


@torch.enable_grad()
def _train(block: _Block, *, settings: BlockRefitRecipe) -> tuple[dict[str, Tensor], BlockErrors]:
    """Its weights after the steps, or before where these are no better."""
    weights = {name: weight.clone().requires_grad_() for name, weight in block.weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(block.number)
    groups = torch.arange(len(block.inputs)).split(settings.sequences)
    order: list[int] = []
    for step in range(settings.steps):
        order = order or torch.randperm(len(groups), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.steps)
        optimizer.zero_grad()
        rows = groups[order.pop()].tolist()
        for row in rows:
            (block.error(row, weights) / len(rows)).backward()
        optimizer.step()
    trained = {name: weight.detach() for name, weight in weights.items()}
    before, after = block.whole_error(block.weights), block.whole_error(trained)
    # A comparison with what is not finite is false.
    return (trained, BlockErrors(before, after)) if after < before else (block.weights, BlockErrors(before, before))


def block_refit_cost(
    source: Shape, *, target: Shape, settings: BlockRefitRecipe, text_tokens: int, sequence_length: int
) -> Cost:
    """What `Blocks` takes, without attention's scores: a block under masks computes what it would without.

    That is 6 FLOPs for each token of a step and weight, and 2 for each of two passes over the text.

    Args:
        source: shape of the model.
        target: shape that its masks leave.
        settings: how many steps.
        text_tokens: of the calibration text.
        sequence_length: tokens of one of its rows.
    """
    layer = (source.active_parameters() - source.num_parameters()) // source.num_hidden_layers
    layer += sum(source.layer_parameters())
    per_weight = 6.0 * settings.steps * min(settings.sequences * sequence_length, text_tokens) + 4.0 * text_tokens
    return Cost(other_flops=per_weight * layer * target.num_hidden_layers)
