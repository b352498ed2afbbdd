"""A whole model in memory, whether a family declares it or not: what it says of text, and its matrices by name.

Of one that no family declares no more is known than its decoder layers: what comes after the last of them is computed
by the model itself (`after_layers`). Legend: B sequences, S positions, d hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shearing.data.documents import Inputs
from shearing.models.anatomy import anatomy_of, backbone, decoder_layers, head_of
from shearing.models.attention import keep_attention_within_documents
from shearing.models.families.experts.separate import separate_experts
from shearing.models.loading import load_source
from shearing.models.stored.expert_files import name_in_files
from shearing.models.stored.paging.passing import Reached
from shearing.models.stored.stored_model import Source
from shearing.objectives.cross_entropy import causal_lm_loss, per_token_loss
from shearing.pruning.calibration.walk import after_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_TOKENS = 1024


class WholeModel:
    """A model of `Source`, loaded whole, in evaluation mode; nothing of it requires a gradient.

    Attributes:
        model: the model.
        layers: its decoder layers, first to last.

    Args:
        source: where it is.
        device, dtype: of its weights.
        attention_within: whether its inputs tell of documents, inside of which tokens attend.

    Raises:
        ShearingError: see `load_source`.
    """

    model: PreTrainedModel
    layers: list[Any]

    def __init__(
        self, source: Source, *, device: torch.device, dtype: torch.dtype, attention_within: bool = False
    ) -> None:
        structure = source.structure
        self._declared = structure is None
        if structure is None:
            self.model = load_source(str(source.folder), device=device, dtype=dtype)
            family = anatomy_of(source.config)
            separate_experts(self.model, share=True)
            own = {name_in_files(family, name): name for name, _ in self.model.named_parameters()}
            self.layers = list(decoder_layers(self.model))
        else:
            loaded = type(structure.model).from_pretrained(str(source.folder), dtype=dtype, use_safetensors=True)
            self.model = loaded.to(device).eval()  # type: ignore[arg-type]
            own = {stored: name for name, stored in structure.stored_names.items()}
            assert structure.layers is not None
            self.layers = list(self.model.get_submodule(structure.layers).children())
        if attention_within:
            keep_attention_within_documents(self.model)
        self._own_names = own
        self.model.requires_grad_(requires_grad=False)

    def parameter(self, name: str) -> nn.Parameter:
        """A matrix [O, I] by the name that `matrices_of` gives it."""
        return self.model.get_parameter(self._own_names[name])

    def states(self, text: Inputs) -> Tensor:
        """What predictions are made from [B, S, d], with gradient: after the final norm, or after the last layer."""
        if self._declared:
            states: Tensor = backbone(self.model)(**text.keywords()).last_hidden_state
            return states
        found: list[Tensor] = []

        def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise Reached

        handle = self.layers[-1].register_forward_hook(keep)
        try:
            self.model(**text.keywords())
        except Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    def logits(self, states_BSD: Tensor) -> Iterator[Tensor]:
        """Of `states`, in their order, some tokens at a time: [C, V] with gradient."""
        if self._declared:
            head = head_of(self.model)
            for chunk_CD in states_BSD.flatten(0, 1).split(_CHUNK_TOKENS):
                yield head.logits(chunk_CD)
            return
        for states_SD in states_BSD:
            yield after_layers(self.model, self.layers, states_SD[None])[0]

    def loss(self, states_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """Sum of the cross-entropies of labels that count in nats, fp32, with gradient."""
        if self._declared:
            return causal_lm_loss(states_BSD, head_of(self.model), labels_BS, chunk_tokens=_CHUNK_TOKENS)[0]
        pairs = zip(self.logits(states_BSD), labels_BS, strict=True)
        return torch.stack([cross_entropy(l_SV.float(), of_S, reduction="sum") for l_SV, of_S in pairs]).sum()

    @torch.no_grad()
    def losses(self, states_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """The cross-entropy of each label in nats, fp32 [B, S]; 0 of those that do not count."""
        if self._declared:
            return per_token_loss(states_BSD, head_of(self.model), labels_BS, chunk_tokens=_CHUNK_TOKENS)
        pairs = zip(self.logits(states_BSD), labels_BS, strict=True)
        return torch.stack([cross_entropy(l_SV.float(), of_S, reduction="none") for l_SV, of_S in pairs])
