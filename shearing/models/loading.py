"""Models and their configs, from a folder or the hub; the empty skeleton of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shearing.errors import ShearingError, key
from shearing.models.anatomy import anatomy_of
from shearing.models.attention import requested
from shearing.models.families import FAMILIES
from shearing.models.families.unsupported import unsupported
from shearing.models.place import folder_here, require_place
from shearing.models.stored import headers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_config(source: str, *, revision: str | None = None) -> PretrainedConfig:
    """Config of the source model.

    Raises:
        ShearingError: there is no model there, its family is not supported, transformers refuses its config, or it is
            quantised.
    """
    from transformers import AutoConfig

    require_place(source, revision=revision)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ShearingError(
            "source",
            value=source,
            allowed="a Hugging Face model folder (config.json, *.safetensors, tokenizer) or a hub name",
            mend=f"point {key('source')} at the folder that holds config.json",
        )
    try:
        values = _values(source, revision=revision)
        if values.get("model_type") not in FAMILIES:
            raise unsupported(values)
        with _said_of_config(source):
            config: PretrainedConfig = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ShearingError(
            "source",
            value=source,
            allowed="an existing model folder, or a hub name that can be reached",
            mend=f"check the path or the network ({str(error).splitlines()[0]})",
        ) from error
    if getattr(config, "quantization_config", None):
        raise ShearingError(
            "source",
            value=f"{source}, which is quantised",
            allowed="dense weights in fp32, bf16 or fp16",
            mend="take the model that it was quantised from, and quantise the result",
        )
    anatomy_of(config)
    return config


def _values(source: str, *, revision: str | None) -> dict[str, Any]:
    """What config.json says, also of a model that transformers would not load."""
    from transformers import PretrainedConfig

    if Path(source).is_dir():
        values: dict[str, Any] = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    else:
        values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    return values


def require_weights(source: str, *, revision: str | None = None) -> None:
    """Check that a model's files hold the weights of its config, each dense and in its shape, and no others.

    Headers are read, no weights. Of a name on the hub only files are looked at that are here already.

    Raises:
        ShearingError: they do not; see `headers.require_weights`, `load_config`.
    """
    config, folder = load_config(source, revision=revision), folder_here(source, revision=revision)
    if folder is not None and (Path(source).is_dir() or headers.is_whole(folder)):
        headers.require_weights(folder, model=skeleton(config), source=source)


def load_source(
    source: str,
    *,
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Loads a causal language model of a supported family, in evaluation mode, cache off.

    Raises:
        ShearingError: no such model, an unsupported family, weights that are not those of the config or not finite.
    """
    from transformers import AutoModelForCausalLM

    require_weights(source, revision=revision)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            attn_implementation=requested(attn_implementation),
            use_safetensors=True,
        )
    except OSError as error:
        raise ShearingError(
            "source (weights)",
            value=source,
            allowed="weights in safetensors files, here or on a hub that can be reached",
            mend=f"check the network, or download and convert them ({str(error).splitlines()[0]})",
        ) from error
    if not Path(source).is_dir():
        require_weights(source, revision=revision)  # now that the hub's are here
    anatomy_of(model)
    refuse_nonfinite(model, source=source)
    model.config.use_cache = False
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return model


def skeleton(
    config: PretrainedConfig, *, attn_implementation: str = "sdpa", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A model without weights: each parameter has its shape and dtype fp32, and takes no memory until it is filled.

    What every process but the main one starts from, so that the weights exist once and not once per process.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with _said_of_config(config.name_or_path or config.model_type), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=requested(attn_implementation)
        )
    model.tie_weights()
    placeholders: dict[int, nn.Parameter] = {}  # by identity: tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            setattr(module, name, placeholders.setdefault(id(parameter), nn.Parameter(empty)))
    model.config.use_cache = False
    model.eval()
    return model


def refuse_nonfinite(model: PreTrainedModel, *, source: str) -> None:
    """Raises `ShearingError` naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ShearingError(
                f"source (parameter {name})",
                value=source,
                allowed="finite weights",
                mend="the checkpoint holds NaN or infinity: fetch or convert it again",
            )


@contextmanager
def _said_of_config(source: str) -> Iterator[None]:
    """What transformers refuses of a config, in one message; it has no one kind of error for it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ShearingError(
            "source (config.json)",
            value=source,
            allowed=f"a config that transformers accepts; it says: {said}",
            mend="correct config.json, or fetch the model again",
        ) from error
