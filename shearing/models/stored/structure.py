"""Linear layers of a model that no family declares, found by its structure: a model is lists of modules that are alike.

For what prunes matrices where they are. Nothing is known of heads, widths and what adds up to what, so nothing is cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shearing.errors import ShearingError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_TOWERS = ("vision_config", "audio_config")
"""What a config of more than text calls the configs of its other towers."""


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer inside one of a model's lists of modules.

    Attributes:
        name: of its weight in the files.
        member: of its module, inside its element of the list.
        block: number of that element; decoder layers are the first, in their order.
    """

    name: str
    member: str
    block: int


@dataclass(frozen=True, eq=False)
class MadeTensor:
    """A parameter that transformers makes of others in the files, as a stack of the weights of all experts.

    Attributes:
        name: of the parameter.
        converter: of transformers, that makes it.
        sources: names in the files by the converter's pattern that they meet, in the order in which they are merged.
    """

    name: str
    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def stored_names(self) -> list[str]:
        """All names in the files."""
        return [name for names in self.sources.values() for name in names]

    def of(self, stored: Mapping[str, Tensor], *, model: PreTrainedModel) -> Tensor:
        """The parameter, of what is stored by its names in the files."""
        made: dict[str, Any] = {pattern: [stored[name] for name in names] for pattern, names in self.sources.items()}
        for operation in self.converter.operations:
            made = operation.convert(
                made,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.name,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        found = next(value for pattern, value in made.items() if len(made) == 1 or pattern in self.name)
        tensor: Tensor = found[0] if isinstance(found, list) else found
        return tensor


@dataclass(frozen=True, eq=False)
class Structure:
    """What is found of a model.

    Attributes:
        model: without weights.
        linears: every linear layer in a list of modules, block by block, without the towers that were left out.
        layers: name of the list of decoder layers; None where there is none that all of a text goes through.
        stored_names: parameter or buffer of the model -> its name in the files, for those that are there as they are.
        made: those that are made of others in the files.
        towers: names of modules that read images or sound.
        left_out: those of them that were left out.
    """

    model: PreTrainedModel
    linears: tuple[StoredLinear, ...]
    layers: str | None
    stored_names: Mapping[str, str]
    made: Mapping[str, MadeTensor]
    towers: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def num_blocks(self) -> int:
        """Elements of lists that have linear layers, or are decoder layers."""
        return 1 + max(linear.block for linear in self.linears)

    @property
    def num_layers(self) -> int:
        """Decoder layers; 0 without any."""
        return 0 if self.layers is None else len(list(self.model.get_submodule(self.layers).children()))

    def not_stored(self) -> list[str]:
        """What of the decoder layers is not in the files, nor made of what is."""
        inside = [name for name in self.model.state_dict() if name.startswith(f"{self.layers}.")]
        return [name for name in inside if name not in self.stored_names and name not in self.made]


def structure_of(config: PretrainedConfig, *, stored: Iterable[str], towers: bool) -> Structure:
    """The structure of a model.

    Args:
        config: its config.
        stored: names of the tensors in its files.
        towers: whether towers for images and sound count.

    Raises:
        ShearingError: it has no linear layers in lists of modules.
    """
    model = _built(config)
    names, made = _stored_names(model, stored)
    found = tuple(_towers(model, config))
    left_out = () if towers else found
    layers = _decoder_layers(model, config, besides=found)
    blocks: dict[str, int] = {}
    if layers is not None:
        blocks = {f"{layers}.{index}": index for index, _ in enumerate(model.get_submodule(layers).children())}
    linears = []
    for name, module in model.named_modules():
        stored_name = names.get(f"{name}.weight")
        block = _block_of(model, name)
        if not isinstance(module, nn.Linear) or stored_name is None or block is None or _is_inside(name, left_out):
            continue
        number = blocks.setdefault(block, len(blocks))
        linears.append(StoredLinear(stored_name, name.removeprefix(f"{block}."), number))
    if not linears:
        raise ShearingError(
            "source (architecture)",
            value=config.model_type,
            allowed="a model with linear layers (torch.nn.Linear) in lists of layers",
            mend="choose another model: this one's weights are in modules of other kinds, or under names that "
            "transformers changes when it reads them",
        )
    linears.sort(key=lambda linear: linear.block)
    return Structure(model, tuple(linears), layers, names, made, found, left_out)


def _built(config: PretrainedConfig) -> PreTrainedModel:
    """A model of the class that its config names; its parameters are on the device `meta`."""
    import transformers
    from accelerate import init_empty_weights

    named: list[Any] = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    of_config = [found for found in named if found is not None and isinstance(config, found.config_class)]
    architecture: Any = next(iter(of_config), None)
    with init_empty_weights(include_buffers=False):
        if architecture is None:
            auto = transformers.AutoModelForCausalLM
            architecture = auto if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else transformers.AutoModel
            built = architecture.from_config(config)
        else:
            built = architecture(config)
    model: PreTrainedModel = built.eval()
    return model


def _stored_names(model: PreTrainedModel, stored: Iterable[str]) -> tuple[dict[str, str], dict[str, MadeTensor]]:
    """Parameter -> its name in the files, where transformers renames it at the most; and those that it makes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping: list[Any] = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    own, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."

    def of_model(name: str) -> str | None:
        return next((each for each in (name, prefix + name, name.removeprefix(prefix)) if each in own), None)

    found, made = dict[str, str](), dict[str, MadeTensor]()
    for name in sorted(stored, key=_by_number):
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for converter in converters:
            target, pattern = converter.rename_source_key(renamed)
            if pattern is not None and (parameter := of_model(target)) is not None:
                sources = made.setdefault(parameter, MadeTensor(parameter, converter)).sources
                sources.setdefault(pattern, []).append(name)
                break
        else:
            if (parameter := of_model(renamed)) is not None:
                found[parameter] = name
    return found, made


def _by_number(name: str) -> list[tuple[int, str]]:
    """What sorts names as transformers does: expert 2 before expert 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _towers(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[str]:
    """Modules whose config is that of another tower than the text's."""
    from transformers import PreTrainedModel

    kinds = tuple(type(found) for name in _TOWERS if (found := getattr(config, name, None)) is not None)
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and isinstance(module.config, kinds):
            yield name


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _block_of(model: nn.Module, name: str) -> str | None:
    """The outermost element of a list of modules that a module is in."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return None


def _decoder_layers(model: PreTrainedModel, config: PretrainedConfig, *, besides: tuple[str, ...]) -> str | None:
    """The one list of as many layers as the text's config has, in a model that predicts the next token.

    Of a model of more than text it is in the module whose config is the text's.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel as PreTrained

    text = config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    architectures: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    of_text_alone = any(architecture is type(model) for _, architecture in architectures.items())
    predicts = of_text_alone or (text is not config and model.get_output_embeddings() is not None)
    if not predicts or any(getattr(each, "is_encoder_decoder", False) for each in (config, text)):
        return None
    of_text = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrained) and isinstance(module.config, type(text))
    ]
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and not _is_inside(name, besides)
        and (of_text_alone or _is_inside(name, of_text))
    ]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return outermost[0] if len(outermost) == 1 else None
