"""Hardware that is not there: converted weights that know it, and a clock that counts what linear layers would cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from shearing.pruning.sparse.patterns import KeptOf
from shearing.pruning.sparse.semi_structured.hardware import Hardware

Cost = Callable[[Tensor, int], float]
"""Weight and tokens -> seconds."""


class Converted(Tensor):
    """A dense weight that says it is converted."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func is Tensor.detach else result


class Clock(TorchFunctionMode):
    """Adds up what linear layers cost."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost, self.seconds = cost, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            inputs, weight = args[:2]
            self.seconds += self.cost(weight, inputs.numel() // inputs.shape[-1])
        return func(*args, **(kwargs or {}))


def seconds(weight: Tensor, tokens: int) -> float:
    """Half the time for a converted weight, and two microseconds of overhead for its call."""
    work = weight.numel() * tokens * 1e-9
    return work / 2 + 2e-6 if isinstance(weight, Converted) else work


def pretended(
    cost: Cost = seconds,
    *,
    backends: tuple[str, ...] = ("cusparselt",),
    convert: Callable[[Tensor], Tensor] = lambda weight: weight.as_subclass(Converted),
    name: str = "Pretended GPU",
) -> Hardware:
    """Hardware on which the time of a linear layer is what `cost` says."""

    def stopwatch(work: Callable[[], object]) -> float:
        with Clock(cost) as clock:
            work()
        return clock.seconds

    return Hardware(torch.device("cpu"), name, dict.fromkeys(backends, convert), stopwatch)


def two_of_four_model(
    folder: Path,
    *,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    dense: tuple[str, ...] = (),
) -> Path:
    """A random model whose linear layers are 2:4, but those whose names end in one of `dense`; no manifest of ours."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or small_config())
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
            if not name.endswith(dense or ("\0",)):
                module.weight.data *= KeptOf(2, 4).keep(module.weight.detach().abs())  # leaves negative zeros
    model.to(dtype).save_pretrained(folder)
    return folder


def small_config(**settings: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**(sizes | settings))
