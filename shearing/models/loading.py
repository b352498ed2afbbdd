"""Models and their configs, from a folder or the hub; the empty skeleton of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shearing.errors import ShearingError, key
from shearing.files.permissions import forbidden
from shearing.models.anatomy import anatomy_of
from shearing.models.attention import requested
from shearing.models.families import FAMILIES
from shearing.models.families.unsupported import unsupported
from shearing.models.place import folder_here, require_place
from shearing.models.stored import headers
from shearing.models.stored.companions import folder_of
from shearing.models.stored.paging.paged import Pages
from shearing.models.stored.paging.places import give_places, no_weight, not_finite

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_config(source: str, *, revision: str | None = None) -> PretrainedConfig:
    """Config of the source model.

    Raises:
        ShearingError: there is no model there, its config.json cannot be read, its family is not supported,
            transformers refuses its config, or it is quantised.
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
        with said_of_config(source):
            config: PretrainedConfig = AutoConfig.from_pretrained(source, revision=revision)
    except OSError as error:
        raise forbidden(Path(source) / "config.json") or ShearingError(
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

    if not Path(source).is_dir():
        values: dict[str, Any]
        values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
        return values
    path = Path(source) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        said = f"line {error.lineno}: {error.msg}"
    except UnicodeDecodeError as error:
        said = str(error)
    else:
        if isinstance(values, dict):
            return values
        said = f"a {type(values).__name__}"
    raise ShearingError(
        "source (config.json)",
        value=f"{path}, {said}",
        allowed="a config.json that is a JSON object",
        mend="correct the file, or fetch the model again",
    )


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
    # Tensor by tensor to where it is wanted: never whole on the host.
    placed = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            attn_implementation=requested(attn_implementation),
            use_safetensors=True,
            **placed,
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
    model.to(device)  # type: ignore[arg-type]  # buffers too
    refuse_nonfinite(model, source=source)
    model.config.use_cache = False
    model.eval()
    return model


def load_paged(
    source: str,
    *,
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    changes: Path | None = None,
) -> PreTrainedModel:
    """A model as `load_source` has it in fp32, whose weights stay in their files; see `stored.paging.paged`.

    A model whose parameters are neither stored as they are, nor expert by expert, is loaded whole.

    Args:
        source, revision: of the model.
        attn_implementation: see transformers.
        device: where it runs.
        changes: folder of safetensors files with weights that replace some of these once an engine takes over.

    Raises:
        ShearingError: see `load_source`.
    """
    config = load_config(source, revision=revision)
    folder = folder_of(source, revision=revision, also=["*.safetensors"])
    headers.require_weights(folder, model=skeleton(config), source=source)
    files = [folder / name for name in headers.weight_files(folder, source=source)]
    model = paged_model(
        config,
        files=files,
        source=source,
        pages=Pages(torch.device(device), changes),
        attn_implementation=attn_implementation,
    )
    if model is None:
        return load_source(source, revision=revision, attn_implementation=attn_implementation, device=device)
    return model


def paged_model(
    config: PretrainedConfig, *, files: Sequence[Path], source: str, pages: Pages, attn_implementation: str = "sdpa"
) -> PreTrainedModel | None:
    """A model whose weights stay in these files; None where its parameters are made of what is in them.

    Args:
        config: the model's.
        files: safetensors.
        source: what the model is called.
        pages: new ones; where the model runs.
        attn_implementation: see transformers.

    Raises:
        ShearingError: the architecture is not supported, or a weight outside of the layers is not finite.
    """
    model = skeleton(config, attn_implementation=attn_implementation, device=pages.device)
    anatomy_of(model)
    if not give_places(model, files=files, source=source):
        return None
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(pages.device))
    pages.open(model)
    return model


def skeleton(
    config: PretrainedConfig, *, attn_implementation: str = "sdpa", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A model without weights: each parameter has its shape and dtype fp32, and takes no memory until it is filled.

    What every process but the main one starts from, so that the weights exist once and not once per process.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Drawing numbers for weights that are not there would be most of the time.
    with (
        said_of_config(config.name_or_path or config.model_type),
        init_empty_weights(include_buffers=False),
        no_init_weights(),
    ):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=requested(attn_implementation)
        )
    model.tie_weights()
    placeholders: dict[int, nn.Parameter] = {}  # by identity: tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = no_weight(parameter, device=torch.device(device))
            setattr(module, name, placeholders.setdefault(id(parameter), nn.Parameter(empty)))
    model.config.use_cache = False
    model.eval()
    return model


def refuse_nonfinite(model: PreTrainedModel, *, source: str) -> None:
    """Raises `ShearingError` naming the first parameter that holds NaN or infinity; waits for the device once."""
    names, finite = zip(*((name, torch.isfinite(each).all()) for name, each in model.named_parameters()), strict=True)
    for name, is_finite in zip(names, torch.stack(finite).tolist(), strict=True):
        if not is_finite:
            raise not_finite(name, source=source)


@contextmanager
def said_of_config(source: str) -> Iterator[None]:
    """What transformers refuses of a config, in one message; it has no one kind of error for it.

    Raises:
        ShearingError: it does.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except ShearingError:
        raise
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
