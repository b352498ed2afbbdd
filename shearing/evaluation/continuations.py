"""What a model writes after a prompt, and how much of it says the same again.

Shapes: B prompts, S tokens of each, T tokens written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

TOP_P = 0.95
"""Of sampled continuations (nucleus sampling, Holtzman et al., arXiv 1904.09751, section 3.1), at temperature 1."""

NGRAMS = (1, 2, 3, 4)
REPEATED = 4
"""Tokens of what counts as a repetition."""


@dataclass(frozen=True)
class Continuations:
    """Tokens after each prompt, up to the end of a text."""

    greedy: list[list[int]]
    sampled: list[list[int]]


def continuations(
    model: PreTrainedModel,
    prompts_BS: Tensor,
    *,
    num_tokens: int,
    ends: Iterable[int],
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> Continuations:
    """Continue each prompt twice: by the likeliest token each time, and by drawing (`TOP_P`).

    The draws of every model begin at the same state of the random numbers, which are left as they were.

    Args:
        model: a causal language model; put into eval mode and back.
        prompts_BS: int64, prompts of one length.
        num_tokens: T, at most.
        ends: tokens that end a text; what would follow is left out.
        seed: of the draws.
        precision: dtype of autocast; None or float32: the dtype of the parameters.
    """
    device = model.device
    prompts_BS, stops = prompts_BS.to(device), sorted(set(ends))
    was_training = model.training
    model.train(False)
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, dtype=precision, enabled=precision not in (None, torch.float32)),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            written = []
            for sample in (False, True):
                torch.manual_seed(seed)
                written.append(_write(model, prompts_BS, num_tokens=num_tokens, ends=stops, sample=sample))
    finally:
        model.train(was_training)
    return Continuations(*written)


def _write(
    model: PreTrainedModel, prompts_BS: Tensor, *, num_tokens: int, ends: Sequence[int], sample: bool
) -> list[list[int]]:
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": TOP_P} if sample else {}
    generation = GenerationConfig(
        max_new_tokens=num_tokens,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        **{"do_sample": False, **settings},
    )
    generate: Any = model.generate
    # A model's own way to write (temperature, penalties) is set aside: all are asked alike.
    kept, model.generation_config = model.generation_config, generation
    try:
        tokens_BT = generate(prompts_BS, attention_mask=torch.ones_like(prompts_BS))[:, prompts_BS.shape[1] :]
    finally:
        model.generation_config = kept
    return [list(_until(tokens, ends)) for tokens in tokens_BT.tolist()]


def _until(tokens: Iterable[int], ends: Sequence[int]) -> Iterator[int]:
    for token in tokens:
        if token in ends:
            return
        yield token


def repeated_share(sequences: Iterable[Sequence[int]], *, n: int = REPEATED) -> float | None:
    """Mean over sequences of the share of n-grams that were there before in the same one.

    1 - distinct / all of a sequence: seq-rep-n of Welleck et al. (arXiv 1908.04319, equation 7).

    Args:
        sequences: tokens; those shorter than n are left out.
        n: tokens of an n-gram.

    Returns:
        Between 0 and 1; None where no sequence has n tokens.
    """
    shares = []
    for sequence in sequences:
        grams = list(_ngrams(sequence, n=n))
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else None


def distinct_share(sequences: Iterable[Sequence[int]], *, n: int) -> float | None:
    """Distinct n-grams of all sequences together over all of them: distinct-n (Li et al., arXiv 1510.03055, section 6).

    Args:
        sequences: tokens.
        n: tokens of an n-gram.

    Returns:
        Between 0 and 1; None where no sequence has n tokens.
    """
    counts = Counter(gram for sequence in sequences for gram in _ngrams(sequence, n=n))
    return len(counts) / counts.total() if counts else None


def _ngrams(sequence: Sequence[int], *, n: int) -> Iterator[tuple[int, ...]]:
    return (tuple(sequence[start : start + n]) for start in range(len(sequence) - n + 1))
