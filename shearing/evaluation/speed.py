"""How fast a model reads a prompt and writes the next token, models taking turns so that a ratio means something.

Shapes: S prompt tokens; batch 1 throughout.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Speed of a model at batch 1, with what it was measured on.

    Attributes:
        prefill_tokens_per_second: prompt tokens read per second in one forward pass.
        decode_milliseconds: time per greedily decoded token, with KV cache.
        prompt_tokens: length of the prompt of the prefill.
        decode_tokens: decoded tokens per repetition, after a prompt of `decode_context` tokens.
        decode_context: prompt of the decoding.
        repetitions: timed repetitions; the figures are medians.
        device: name of the device.
        dtype: dtype of the parameters.
        threads: CPU threads of torch.
    """

    prefill_tokens_per_second: float
    decode_milliseconds: float
    prompt_tokens: int
    decode_tokens: int
    decode_context: int
    repetitions: int
    device: str
    dtype: str
    threads: int


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int = 512,
    decode_context: int = 32,
    decode_tokens: int = 16,
    repetitions: int = 3,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> dict[str, Speed]:
    """Prefill and decoding speed of several models, one repetition of each in turn after one untimed repetition.

    Whatever else the machine does then slows all of them alike. A GPU is synchronised around each timing.

    Args:
        models: models by name, on their devices and in their dtypes; put into eval mode and back.
        prompt_tokens: S, tokens of the prompt of the prefill.
        decode_context: tokens in the cache before decoding is timed.
        decode_tokens: tokens decoded per repetition.
        repetitions: timed repetitions; the median counts.
        seed: of the random prompt.
        progress: called after each repetition of each model.

    Returns:
        One `Speed` per model.
    """
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    was_training = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            model.train(False)
        with torch.inference_mode():
            for repetition in range(repetitions + 1):
                for name, model in models.items():
                    prefill_seconds = _time_prefill(model, _prompt(model, length=prompt_tokens, seed=seed))
                    decode_seconds = _time_decode(
                        model, _prompt(model, length=decode_context, seed=seed), num_tokens=decode_tokens
                    )
                    if repetition > 0:
                        prefill[name].append(prefill_seconds)
                        decode[name].append(decode_seconds)
                    if progress is not None:
                        progress()
    finally:
        for name, model in models.items():
            model.train(was_training[name])
    return {
        name: Speed(
            prefill_tokens_per_second=prompt_tokens / statistics.median(prefill[name]),
            decode_milliseconds=1000 * statistics.median(decode[name]) / decode_tokens,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            decode_context=decode_context,
            repetitions=repetitions,
            device=device_name(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )
        for name, model in models.items()
    }


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _prompt(model: PreTrainedModel, *, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _time_prefill(model: PreTrainedModel, prompt_1S: torch.Tensor) -> float:
    start = _now(model.device)
    model(input_ids=prompt_1S, use_cache=True, logits_to_keep=1)
    return _now(model.device) - start


def _time_decode(model: PreTrainedModel, prompt_1S: torch.Tensor, *, num_tokens: int) -> float:
    output = model(input_ids=prompt_1S, use_cache=True, logits_to_keep=1)
    start = _now(model.device)
    for _ in range(num_tokens):
        next_11 = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=next_11, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return _now(model.device) - start
