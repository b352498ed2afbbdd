"""Models, their configs and tokenizers, from a folder or the hub; the empty skeleton of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shearing.errors import ShearingError, key
from shearing.models.anatomy import anatomy_of
from shearing.models.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_config(source: str, *, revision: str | None = None) -> PretrainedConfig:
    """Config of the source model.

    Raises:
        ShearingError: there is no model there, or its family is not supported.
    """
    from transformers import AutoConfig

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ShearingError(
            "source",
            value=source,
            allowed="a Hugging Face model folder (config.json, *.safetensors, tokenizer) or a hub name",
            mend=f"point {key('source')} at the folder that holds config.json",
        )
    try:
        if Path(source).is_dir():
            model_type = json.loads((Path(source) / "config.json").read_text()).get("model_type")
            if model_type not in FAMILIES:
                raise ShearingError(
                    "source (architecture)",
                    value=model_type,
                    allowed=", ".join(sorted(FAMILIES)),
                    mend="choose a source model of a supported family, "
                    "or declare the family under shearing/models/families",
                )
        config: PretrainedConfig = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, json.JSONDecodeError) as error:
        raise ShearingError(
            "source",
            value=source,
            allowed="an existing model folder, or a hub name that can be reached",
            mend=f"check the path or the network ({str(error).splitlines()[0]})",
        ) from error
    anatomy_of(config)
    return config


def load_tokenizer(source: str, *, revision: str | None = None) -> Any:
    """The tokenizer beside a model.

    Raises:
        ShearingError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ShearingError(
            "source",
            value=source,
            allowed="a model with its tokenizer beside it",
            mend=f"add the tokenizer's files ({str(error).splitlines()[0]})",
        ) from error


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
        ShearingError: no such model, an unsupported family, weights missing, or weights that are not finite.
    """
    from transformers import AutoModelForCausalLM

    load_config(source, revision=revision)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
    )
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"]:
        raise ShearingError(
            "source (weights)",
            value=sorted(report["missing_keys"])[:5],
            allowed="a checkpoint with every parameter of its config",
            mend="the checkpoint is incomplete: fetch or convert it again",
        )
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

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
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
