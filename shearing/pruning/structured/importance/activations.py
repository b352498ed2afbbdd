"""Importance by activations: how much each unit writes on calibration text.

Shapes: B sequences of S tokens, L layers, G KV groups, Q query heads of a group, M intermediate units, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from shearing.models.anatomy import anatomy_of, decoder_layers, head_weight
from shearing.models.shape import Shape
from shearing.models.stored.paging.passing import last_states
from shearing.processes.processes import Processes
from shearing.pruning.structured.granularities import unit_sizes
from shearing.pruning.structured.importance.expert_activations import ExpertRecorder
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Activations:
    """Importance of Minitron (arXiv 2407.14679, section 2) from forward passes alone; see `Metric`.

    For a channel c: sqrt(sum over sequences of (mean over positions of |x_c|)^2), in fp32. Heads and intermediate
    units read the inputs of `o_proj` and `down_proj`; a head's score is the L2 norm over its channels, a group's
    over its heads. Hidden dimensions sum it over what attention and MLP of every layer read. Layers and sub-layers
    score 1 - mean cosine of their input and output, summed over sequences (block influence, arXiv 2403.03853). Where
    both sub-layers of a layer read the same, the output of one is what it reads with what it adds. Experts and their
    units: see `ExpertRecorder`.
    """

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One pass for each batch of the text."""
        del source
        return len(evidence.own)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """One forward pass over the text."""
        del source
        return Cost(forward_tokens=evidence.text_tokens)

    @torch.no_grad()
    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `Activations`."""
        evidence.require_text()
        with ActivationRecorder.listening(model) as recorder:
            for _ in last_states(model, (share.inputs.keywords() for share in evidence.own)):
                advance(1)
        return recorder.scores(Shape.of(model.config), processes=evidence.processes)


class ActivationRecorder:
    """Running sums of what `Activations` is made of: (name, layer) -> [channels] or scalar."""

    def __init__(self, *, device: torch.device) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._layer_input = self._mlp_input = torch.empty(0, device=device)

    @classmethod
    @contextmanager
    def listening(cls, model: PreTrainedModel) -> Iterator[Self]:
        """Records what passes through `model` inside the context."""
        recorder = cls(device=head_weight(model).device)
        handles = recorder._listen(model)
        try:
            yield recorder
        finally:
            for handle in handles:
                handle.remove()

    def scores(self, source: Shape, *, processes: Processes) -> Scores:
        """Scores of everything that all processes recorded; `source` is the model's shape."""
        K, G, dh = source.num_key_value_heads, source.query_heads_per_group, source.head_dim
        sizes = {"heads": (K * G * dh,), "intermediate": unit_sizes(source)["intermediate"][1:]}
        sizes["experts"] = (source.num_experts,)
        sizes |= dict.fromkeys(("attention read", "mlp read"), (source.hidden_size,))

        def of_layers(name: str) -> Tensor:
            nothing = self._layer_input.new_zeros(sizes.get(name, ()), dtype=torch.float32)
            sums = [self._sums.get((name, layer), nothing) for layer in range(source.num_hidden_layers)]
            return processes.sum(torch.stack(sums)).cpu()

        heads = of_layers("heads").view(-1, K, G, dh).sum(-1)
        return {
            "layers": of_layers("layers"),
            "attention": of_layers("attention"),
            "mlp": of_layers("mlp"),
            "kv_groups": heads.sum(-1).sqrt(),
            "query_heads": heads.sqrt(),
            **({"experts": of_layers("experts").sqrt()} if source.num_experts else {}),
            "intermediate": of_layers("intermediate").sqrt(),
            "hidden": (of_layers("attention read").sqrt() + of_layers("mlp read").sqrt()).sum(0),
        }

    def _listen(self, model: PreTrainedModel) -> list[Any]:
        family = anatomy_of(model)
        handles: list[Any] = []
        for index, layer in enumerate(decoder_layers(model)):
            handles += [
                layer.register_forward_pre_hook(self._enter_layer),
                layer.register_forward_hook(partial(self._leave_layer, index)),
            ]
            if family.parallel:
                handles += [
                    layer.get_submodule(sublayer.write).register_forward_hook(partial(self._write, (name, index)))
                    for name, sublayer in family.sublayers.items()
                ]
            else:
                entry = layer.get_submodule(family.mlp.entry)
                handles += [
                    entry.register_forward_pre_hook(partial(self._enter_mlp, index)),
                    layer.register_forward_hook(partial(self._leave_mlp, index)),
                ]
            for name, sublayer, units in (
                ("attention", family.attention, "heads"),
                ("mlp", family.mlp, "intermediate"),
            ):
                reader, write = (layer.get_submodule(module) for module in (sublayer.reads, sublayer.write))
                handles.append(reader.register_forward_pre_hook(partial(self._input, (f"{name} read", index))))
                if sublayer.experts is None:
                    handles.append(write.register_forward_pre_hook(partial(self._input, (units, index))))
                else:
                    handles.append(
                        ExpertRecorder(
                            write,
                            sequences=lambda: self._mlp_input.shape[0],
                            add=partial(self._add_of_experts, index),
                        )
                    )
        return handles

    def _add(self, key: tuple[str, int], value: Tensor) -> None:
        self._sums[key] = self._sums[key] + value if key in self._sums else value

    def _add_of_experts(self, layer: int, name: str, value: Tensor) -> None:
        self._add((name, layer), value)

    def _channels(self, key: tuple[str, int], x_BSC: Tensor) -> None:
        self._add(key, x_BSC.float().abs().mean(1).square().sum(0))

    def _influence(self, key: tuple[str, int], before: Tensor, after: Tensor) -> None:
        self._add(key, (1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).mean(1).sum(0))

    def _input(self, key: tuple[str, int], _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._channels(key, arguments[0])

    def _enter_layer(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._layer_input = arguments[0]

    def _enter_mlp(self, layer: int, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._mlp_input = arguments[0]
        self._influence(("attention", layer), self._layer_input, arguments[0])

    def _write(self, key: tuple[str, int], _module: nn.Module, _arguments: Any, output: Tensor) -> None:
        self._influence(key, self._layer_input, self._layer_input + output)

    def _leave_mlp(self, layer: int, _module: nn.Module, _arguments: Any, output: Any) -> None:
        self._influence(("mlp", layer), self._mlp_input, output[0] if isinstance(output, tuple) else output)

    def _leave_layer(self, layer: int, _module: nn.Module, _arguments: Any, output: Any) -> None:
        self._influence(("layers", layer), self._layer_input, output[0] if isinstance(output, tuple) else output)
