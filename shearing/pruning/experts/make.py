"""`shear moe`: a dense model written as a mixture of experts that Hugging Face has a class for.

Every MLP's units go into E experts of equal size. The mixture adds up what k experts give, each times a weight; weights
are a softmax over the chosen, 1 / k each as long as the router's logits are alike, which they are within a percent
(`split.SPREAD`). So down projections are multiplied by k, and by how much smaller the sum of the chosen is than that of
all: the output keeps its norm. With all experts active the router is 0, weights are 1 / E, and the mixture is the dense
model.

Shapes: T tokens, I units, d hidden, E experts.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen3MoeConfig

from shearing.data.documents import Inputs
from shearing.errors import ShearingError, key
from shearing.files.durable import flush_folder, flush_tree, require_new, require_writable, write_json
from shearing.files.full_disk import full_disk_said, no_room_for_model
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.loading import load_config, load_source
from shearing.models.stored.companions import folder_of
from shearing.models.stored.saving import save_model
from shearing.models.stored.stored_model import dtype_of_weights
from shearing.models.tokenizer import open_tokenizer
from shearing.pruning.calibration.places import named_places, weight_of
from shearing.pruning.calibration.text import load_calibration
from shearing.pruning.calibration.walk import first_inputs, run_layer
from shearing.pruning.experts.recipe import MoeRecipe
from shearing.pruning.experts.split import at_random, by_coactivation, outputs_of, router_of, strength_of
from shearing.pruning.sparse.stored.manifest import MANIFEST

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUMMARY = "experts.json"
CHUNK_TOKENS = 8192
"""Tokens that go through a layer together."""

_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sliding_window",
    "attention_dropout",
    "rope_parameters",
)


@dataclass(frozen=True)
class Experts:
    """What becomes of one MLP.

    Attributes:
        groups: units [E, I / E].
        router: [E, d].
        factor: of the down projection.
        strength: of the chosen experts' sum, see `strength_of`.
        error: of that sum, as a share of the whole.
    """

    groups: Tensor
    router: Tensor
    factor: float
    strength: float
    error: float


def make_experts(recipe: MoeRecipe, *, console: Console | None = None) -> Path:
    """Write a dense model as a mixture of experts; the folder appears as a whole or not at all.

    The model is in memory twice, in fp32, on the CPU; of the text what one MLP reads and makes of it.

    Args:
        recipe: what to do.
        console: where is said what came of it; stdout if None.

    Returns:
        The folder: config, weights, tokenizer, and experts.json with the units of every expert.

    Raises:
        ShearingError: something the user can mend, before anything is computed.
    """
    console = console or Console()
    transformers.utils.logging.disable_progress_bar()
    require_new(recipe.output, field="output")
    require_writable(recipe.output, field="output")
    source = load_config(recipe.model, revision=recipe.revision)
    config = mixture_config(source, experts=recipe.experts, active=recipe.active)
    _require_positions(source, seqlen=recipe.seqlen)
    dense = load_source(recipe.model, revision=recipe.revision, dtype=torch.float32)
    tokenizer = open_tokenizer(recipe.model, revision=recipe.revision).full
    calibration = load_calibration(
        recipe.calibration,
        tokenizer=tokenizer,
        vocab_size=source.vocab_size,
        samples=recipe.samples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        text_field=recipe.text_field,
        bos=recipe.bos,
    )
    layers = find_experts(dense, tokens=calibration.tokens, recipe=recipe)
    mixture: Any = mixture_of(dense, config=config, layers=layers)
    dtype = dtype_of_weights(recipe.model, config=source)  # the dense model's own config says fp32, as it was loaded
    _write(mixture.to(dtype), recipe=recipe, layers=layers)
    if (folder_of(recipe.model, revision=recipe.revision) / MANIFEST).is_file():
        lost = f"masks of {recipe.model} are not kept: training of the mixture changes its zeros as all other weights"
        console.print(lost, style="yellow", soft_wrap=True, highlight=False)
    errors = [layer.error for layer in layers]
    said = f"{recipe.experts} experts of {layers[0].groups.shape[1]} units, {recipe.active} active"
    missing = f"what is missing of an MLP's output: {min(errors):.0%} to {max(errors):.0%} of its norm"
    console.print(f"{recipe.output} is written: {said}; {missing}", soft_wrap=True, highlight=False)
    return recipe.output


def mixture_config(config: PretrainedConfig, *, experts: int, active: int) -> Any:
    """Config of the mixture that a dense model of this config becomes.

    Raises:
        ShearingError: no mixture of Hugging Face computes what this architecture does, or experts of unequal size.
    """
    kinds: dict[str, type[Any]] = {"llama": MixtralConfig, "mistral": MixtralConfig, "qwen3": Qwen3MoeConfig}
    more = [name for name in ("attention_bias", "mlp_bias", "use_sliding_window") if getattr(config, name, False)]
    if config.model_type not in kinds or more:
        raise ShearingError(
            "model",
            value=" with ".join([config.model_type, *more]),
            allowed=f"{', '.join(kinds)}, without biases: there is no mixture of other kinds that computes the same",
            mend="choose another model",
        )
    fitting = [each for each in range(2, 257) if config.intermediate_size % (8 * each) == 0]
    if experts not in fitting:
        raise ShearingError(
            "experts",
            value=experts,
            allowed=f"a number that shares {config.intermediate_size} units out by multiples of 8, as products of "
            f"experts want it: {', '.join(map(str, fitting)) or 'none'}",
            mend=f"take {min(fitting, key=lambda each: abs(each - experts))}" if fitting else "choose another model",
        )
    size = config.intermediate_size // experts
    common = {name: getattr(config, name) for name in _COPIED if hasattr(config, name)}
    if kinds[config.model_type] is MixtralConfig:
        return MixtralConfig(**common, intermediate_size=size, num_local_experts=experts, num_experts_per_tok=active)
    return Qwen3MoeConfig(
        **common,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=size,
        num_experts=experts,
        num_experts_per_tok=active,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _require_positions(config: PretrainedConfig, *, seqlen: int) -> None:
    longest: int = config.max_position_embeddings
    if seqlen > longest:
        raise ShearingError(
            "seqlen",
            value=seqlen,
            allowed=f"at most {longest}, what the model can read (max_position_embeddings)",
            mend=f"set {key('seqlen')} to {longest}",
        )


@torch.no_grad()
def find_experts(dense: PreTrainedModel, *, tokens: Tensor, recipe: MoeRecipe) -> list[Experts]:
    """What becomes of every MLP, found layer by layer on what the dense model makes of the text [samples, S]."""
    generator = torch.Generator().manual_seed(recipe.seed)
    places = named_places(anatomy_of(dense), "mlp read", "mlp write")
    parts = tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1]))
    streams, calls = first_inputs(dense, map(Inputs, parts))
    found: list[Experts] = []
    for index, layer in enumerate(decoder_layers(dense)):
        seen: dict[str, list[Tensor]] = {place.name: [] for place in places}
        for part, of_layers in enumerate(calls):
            reads, streams[part] = run_layer(layer, layer, streams[part], of_layers[index], places=places)
            for name, inputs in reads.items():
                seen[name].append(inputs.flatten(0, -2))
        inputs_Td, activations_TI = (torch.cat(seen.pop(place.name)) for place in places)
        down_dI = weight_of(layer, places[1].members[0])
        found.append(_experts_of(inputs_Td, activations_TI, down_dI, recipe=recipe, generator=generator))
    return found


def _experts_of(
    inputs_Td: Tensor, activations_TI: Tensor, down_dI: Tensor, *, recipe: MoeRecipe, generator: torch.Generator
) -> Experts:
    if recipe.split == "random":
        groups = at_random(activations_TI.shape[1], experts=recipe.experts, generator=generator)
    else:
        groups = by_coactivation(activations_TI, experts=recipe.experts, generator=generator)
    outputs = partial(outputs_of, activations_TI, down_dI, groups=groups)
    router = router_of(inputs_Td, outputs())
    if recipe.active == recipe.experts:
        router.zero_()  # there is nothing to choose, and weights are alike to the last bit
    strength, error = strength_of(inputs_Td, outputs(), router=router, active=recipe.active)
    return Experts(groups, router, recipe.active * strength, strength, error)


@torch.no_grad()
def mixture_of(dense: PreTrainedModel, *, config: Any, layers: list[Experts]) -> PreTrainedModel:
    """The mixture, fp32: attention, norms and embeddings of the dense model, and experts in place of its MLPs."""
    mixture: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    own = dict(mixture.named_parameters())
    for name, weight in dense.named_parameters():
        if name in own:
            own[name].copy_(weight)
    for source, target, experts in zip(decoder_layers(dense), _layers(mixture), layers, strict=True):
        mlp, mixed = _mlp(source), _mlp(target)
        mixed.gate.weight.copy_(experts.router)
        for index, units in enumerate(experts.groups):
            mixed.experts.gate_up_proj[index].copy_(torch.cat([mlp.gate_proj.weight[units], mlp.up_proj.weight[units]]))
            mixed.experts.down_proj[index].copy_(mlp.down_proj.weight[:, units] * experts.factor)
    return mixture


def _layers(mixture: PreTrainedModel) -> Any:
    """Both kinds of mixtures have them there."""
    return mixture.get_submodule("model.layers")


def _mlp(layer: nn.Module) -> Any:
    return layer.mlp


def _write(mixture: PreTrainedModel, *, recipe: MoeRecipe, layers: list[Experts]) -> None:
    output, beside = recipe.output, recipe.output.with_name(f".{recipe.output.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with full_disk_said(lambda: no_room_for_model(output, field="output")):
            save_model(mixture, beside, like=recipe.model, revision=recipe.revision)
            write_json(beside / SUMMARY, _summary(recipe, layers=layers))
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush_tree(beside)
    beside.rename(output)
    flush_folder(output.parent)


def _summary(recipe: MoeRecipe, *, layers: list[Experts]) -> dict[str, Any]:
    return {
        "settings": recipe.model_dump(mode="json"),
        "layers": [
            {"strength": layer.strength, "error": layer.error, "units": layer.groups.tolist()} for layer in layers
        ],
    }
