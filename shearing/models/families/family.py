"""What a family declares: its two sub-layers, what is outside the layers, and how its config names the sizes.

Everything else follows from it: what is masked (`models.masked`), how it is cut (`models.cutting`), how many
parameters a shape has (`models.shape`), what a budget of parameters is spent on and what a step holds in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shearing.models.families.axes import EXPERTS, HIDDEN, VOCABULARY, Axes, Parameter, When, never
from shearing.models.families.experts.declaration import Experts
from shearing.models.families.norms import Norm


@dataclass(frozen=True)
class SubLayer:
    """The attention or the MLP of a decoder layer, with its norms; all names are those inside the layer.

    Attributes:
        module: what computes it, from what it reads to what it writes.
        linears: weights and biases of its linear layers, in the order in which they are computed.
        write: the linear layer that writes into the residual stream.
        before: norm of what it reads from the residual stream.
        after: norm of what it writes, before that is added to the residual stream.
        inside: norms of queries and keys.
        experts: what it is made of, if it is an MLP of experts; `write` then is the module that computes them.
    """

    module: str
    linears: tuple[Parameter, ...]
    write: str
    before: Norm | None = None
    after: Norm | None = None
    inside: tuple[Norm, ...] = ()
    experts: Experts | None = None

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All of its norms."""
        return tuple(norm for norm in (self.before, *self.inside, self.after) if norm is not None)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """All of its parameters."""
        return (*self.linears, *(parameter for norm in self.norms for parameter in norm.parameters))

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Parameter -> its axes."""
        return {parameter.name: parameter.axes for parameter in self.parameters}

    @property
    def readers(self) -> tuple[str, ...]:
        """The linear layers that read the residual stream, in the order in which they are computed."""
        return tuple(p.name.removesuffix(".weight") for p in self.linears if p.axes[1:] == (HIDDEN,))

    @property
    def reads(self) -> str:
        """A module that reads what the sub-layer computes from: the residual stream, or that normalised."""
        return self.module if self.experts is not None else self.readers[0]

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the weight, and of the bias if there is one, that write into the residual stream."""
        return (f"{self.write}.weight", f"{self.write}.bias") if self.experts is None else (self.experts.write,)

    @property
    def stacks(self) -> tuple[Parameter, ...]:
        """Those of its parameters that are stacks of all experts' matrices."""
        return tuple(p for p in self.linears if p.axes[0] == EXPERTS and len(p.axes) > 2)

    @property
    def entry(self) -> str:
        """The module whose input is the residual stream."""
        return self.module if self.before is None else self.before.name

    def weight(self, linear: str) -> Parameter:
        """The weight of a linear layer."""
        return next(parameter for parameter in self.linears if parameter.name == f"{linear}.weight")

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer has a bias; see `Family.of`."""
        return any(parameter.name == f"{linear}.bias" for parameter in self.linears)

    def of(self, config: Any) -> SubLayer:
        """The sub-layer without the parameters that `config` does not have."""
        linears = tuple(parameter for parameter in self.linears if parameter.when(config))
        inside = tuple(norm for norm in self.inside if norm.when(config))
        experts = None if self.experts is None else replace(self.experts, count=config.num_experts)
        return replace(self, linears=linears, inside=inside, experts=experts)


def standard_sizes(config: Any) -> dict[str, int]:
    """Sizes of a config with Hugging Face's usual names: those of `models.shape.Shape`."""
    heads = config.num_attention_heads
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }


def standard_values(values: Mapping[str, Any], *, sizes: Mapping[str, int], head_dim: int) -> dict[str, Any]:
    """A config's `values` at other sizes, with Hugging Face's usual names.

    Args:
        values: of the source's config.
        sizes: those that can be pruned.
        head_dim: written where the config has it, or where it does not follow from the sizes.
    """
    changed = {**values, **sizes}
    if "head_dim" in values or head_dim != sizes["hidden_size"] // sizes["num_attention_heads"]:
        changed["head_dim"] = head_dim
    return changed


Holder = Callable[[Mapping[str, Any]], "dict[str, Any] | None"]
"""From the values of a family's config, those of another architecture's that computes the same; None if it cannot."""


def nothing(_config: Any) -> str | None:
    """There is nothing in any config that is not supported."""
    return None


def unscaled(_hidden_size: int) -> float:
    """An embedding that is looked up and no more."""
    return 1.0


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: `config.model_type` of Hugging Face.
        attention, mlp: the sub-layers of a decoder layer.
        backbone, layers, embedding, head: names of modules in the model.
        stored_head: what files call the head, where that is another name.
        final_norm: the norm of what the head reads.
        embedding_scale: what the embedding's module multiplies by, from the hidden size.
        residual_multiplier: attribute of the config that what sub-layers write is multiplied by as it is added to the
            residual stream; "" where nothing is.
        logits_divisor: attribute of the config that logits are divided by, or "".
        logits_cap: attribute of the config c, or None, of logits that are c tanh(l / c), or "".
        attention_cap: the same of attention scores; torch's fused attention has no such cap, so transformers' own
            attention computes them.
        per_layer: attributes of the config that are lists with one entry for each layer's attention.
        side_by_side: which configs have attention and MLP read the same residual stream, and add both to it.
        parallel: whether a config is one of those; see `of`.
        models: which models are stored as it, for people.
        read_sizes, write_values: the sizes of a config, and a config's values at other sizes.
        holders: other architectures, for sizes that the family's own config refuses; the most widely known first.
        refuses: what a config has that is not supported, in words; None: nothing.
    """

    model_type: str
    attention: SubLayer
    mlp: SubLayer
    backbone: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    stored_head: str | None = None
    final_norm: Norm = Norm("model.norm")  # noqa: RUF009 - frozen
    embedding_scale: Callable[[int], float] = unscaled
    residual_multiplier: str = ""
    logits_divisor: str = ""
    logits_cap: str = ""
    attention_cap: str = ""
    per_layer: tuple[str, ...] = ("layer_types",)
    side_by_side: When = never
    parallel: bool = False
    models: str = ""
    read_sizes: Callable[[Any], dict[str, int]] = standard_sizes
    write_values: Callable[..., dict[str, Any]] = standard_values
    holders: tuple[Holder, ...] = ()
    refuses: Callable[[Any], str | None] = nothing

    @property
    def sublayers(self) -> dict[str, SubLayer]:
        """Attention and MLP, by name."""
        return {"attention": self.attention, "mlp": self.mlp}

    @property
    def embeddings(self) -> tuple[Parameter, Parameter]:
        """The embedding, and the head, which is the same where they are tied."""
        axes = (VOCABULARY, HIDDEN)
        return Parameter(f"{self.embedding}.weight", axes), Parameter(f"{self.head}.weight", axes)

    @property
    def outer_axes(self) -> Mapping[str, Axes]:
        """Parameter outside the layers -> its axes."""
        return {parameter.name: parameter.axes for parameter in (*self.embeddings, *self.final_norm.parameters)}

    def axes(self, name: str) -> Axes:
        """Axes of the parameter called `name` in the model's state dict; `KeyError` for one that is not declared."""
        prefix = self.layers + "."
        if not name.startswith(prefix):
            return self.outer_axes[name]
        inner = name[len(prefix) :].split(".", 1)[1]
        return {**self.attention.axes, **self.mlp.axes}[inner]

    def stored_name(self, name: str) -> str:
        """What files call a parameter."""
        return f"{self.stored_head}.weight" if self.stored_head and name == f"{self.head}.weight" else name

    def own_name(self, stored: str) -> str:
        """What the model calls a parameter that has the name `stored` in a file."""
        return f"{self.head}.weight" if self.stored_head and stored == f"{self.stored_head}.weight" else stored

    def multiplier(self, config: Any) -> float:
        """What of a write reaches the residual stream; see `residual_multiplier`."""
        return float(getattr(config, self.residual_multiplier)) if self.residual_multiplier else 1.0

    def of(self, config: Any) -> Family:
        """The family as `config` has it: without the parameters that the config leaves out."""
        return replace(
            self,
            attention=self.attention.of(config),
            mlp=self.mlp.of(config),
            parallel=self.side_by_side(config),
        )
