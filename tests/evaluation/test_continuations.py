"""What a model writes, against decoding by hand; repetition and distinct n-grams, against counting by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import GenerationConfig, PreTrainedModel

from shearing.evaluation.continuations import continuations, distinct_share, repeated_share
from shearing.models.loading import load_source


@pytest.fixture(scope="module")
def model(tiny_inputs: Path) -> PreTrainedModel:
    return load_source(str(tiny_inputs / "model"))


def prompts() -> torch.Tensor:
    return torch.randint(2, 20, (3, 7), generator=torch.Generator().manual_seed(1))


def by_hand(model: PreTrainedModel, prompt: list[int], *, num_tokens: int, ends: set[int]) -> list[int]:
    """The likeliest token each time, the whole text read anew."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            following = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if following in ends:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


def test_greedy_continuations_are_those_of_the_likeliest_token(model: PreTrainedModel) -> None:
    written = continuations(model, prompts(), num_tokens=9, ends=[1]).greedy
    assert written == [by_hand(model, prompt, num_tokens=9, ends={1}) for prompt in prompts().tolist()]
    end = written[0][-1]
    until = continuations(model, prompts(), num_tokens=9, ends=[1, end]).greedy
    assert until == [by_hand(model, prompt, num_tokens=9, ends={1, end}) for prompt in prompts().tolist()]
    assert len(until[0]) < 9


def test_draws_are_the_same_each_time_and_leave_random_numbers_and_the_model_as_they_were(
    model: PreTrainedModel,
) -> None:
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig(repetition_penalty=9.0, do_sample=True, temperature=0.01)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = continuations(model, prompts(), num_tokens=9, ends=[1], seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.generation_config.repetition_penalty == 9.0
    assert first == continuations(model, prompts(), num_tokens=9, ends=[1], seed=3)
    assert first.sampled != continuations(model, prompts(), num_tokens=9, ends=[1], seed=4).sampled
    assert first.sampled != first.greedy
    assert first.greedy == continuations(model, prompts(), num_tokens=9, ends=[1], seed=4).greedy


tokens = st.lists(st.integers(0, 4), max_size=12)


@given(st.lists(tokens, max_size=4), st.integers(1, 4))
def test_repetitions_and_distinct_ngrams_are_counted_as_by_hand(sequences: list[list[int]], n: int) -> None:
    shares, seen, number = [], [], 0
    for sequence in sequences:
        again = places = 0
        for end in range(n, len(sequence) + 1):
            gram = sequence[end - n : end]
            places += 1
            again += any(sequence[other - n : other] == gram for other in range(n, end))
            number += 1
            if gram not in seen:
                seen.append(gram)
        if places:
            shares.append(again / places)
    repeated, distinct = repeated_share(sequences, n=n), distinct_share(sequences, n=n)
    if not number:
        assert repeated is None
        assert distinct is None
        return
    assert repeated == pytest.approx(sum(shares) / len(shares))
    assert distinct == len(seen) / number
