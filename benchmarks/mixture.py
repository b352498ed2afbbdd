"""Tokens per second that one process deals, ours against the usual ways over the same corpus, in one run.

The usual ways: a shuffled list of row numbers per domain and one `random.choices` per sample, as a plain loop and as
a `torch.utils.data.IterableDataset` behind a `DataLoader` of one worker. Neither can resume or change its weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from shearing.mixture import Corpus, CorpusWriter, Mixture, Prefetcher

VOCAB_SIZE = 49_152
WEIGHTS = [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15]  # the paper's, for its seven domains
UPDATE_INTERVAL_STEPS = 50


def write_corpus(folder: Path, *, tokens_per_domain: int) -> Corpus:
    """Seven domains of random tokens."""
    writer = CorpusWriter(
        folder, vocab_size=VOCAB_SIZE, separator_id=0, tokenizer="random", tokenizer_fingerprint="random"
    )
    generator = np.random.default_rng(0)
    for i in range(len(WEIGHTS)):
        with writer.domain(f"domain_{i}", sources=["random numbers"], inputs="random") as domain:
            for document in range(20):
                tokens = generator.integers(1, VOCAB_SIZE, size=tokens_per_domain // 20)
                domain.add(f"{i} {document}", token_ids=tokens.tolist())
    return writer.finish()


class RandomChoice(IterableDataset[Tensor]):
    """The usual way: draw a domain at random, then the next row of its shuffled list."""

    def __init__(self, corpus: Corpus, *, sequence_length: int, weights: dict[str, float]) -> None:
        self.corpus, self.sequence_length, self.weights = corpus, sequence_length, weights

    def __iter__(self) -> Iterator[Tensor]:
        chance = random.Random(0)
        order = {}
        for name in self.weights:
            order[name] = list(range(self.corpus.train_rows(name, sequence_length=self.sequence_length)))
            chance.shuffle(order[name])
        taken = dict.fromkeys(self.weights, 0)
        while True:
            [name] = chance.choices(list(self.weights), weights=list(self.weights.values()))
            row = order[name][taken[name] % len(order[name])]
            taken[name] += 1
            yield torch.from_numpy(self.corpus.row(name, row, sequence_length=self.sequence_length))


def tokens_per_second(take: Callable[[], object], *, tokens_per_step: int, seconds: float) -> float:
    """Rate of `take`, one call a step, over about this many seconds, the first call aside."""
    take()
    steps = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        take()
        steps += 1
    return steps * tokens_per_step / elapsed


def measure(corpus: Corpus, *, sequence_length: int, sequences: int, seconds: float) -> dict[str, float]:
    """Tokens per second of every way, alternating over three rounds; the best round of each."""
    weights = dict(zip(corpus.domains, WEIGHTS, strict=True))
    mixture = Mixture(corpus, seed=0, sequence_length=sequence_length, weights=weights)

    def deal() -> None:
        first_sample = mixture.next_sample
        if first_sample // sequences % UPDATE_INTERVAL_STEPS == 0:
            mixture.update_weights(weights, first_sample=first_sample)
        mixture.batch(first_sample=first_sample, num_sequences=sequences)

    dataset = RandomChoice(corpus, sequence_length=sequence_length, weights=weights)
    plain = iter(dataset)
    loader = iter(DataLoader(dataset, batch_size=sequences, num_workers=1))
    ahead = Mixture(corpus, seed=1, sequence_length=sequence_length, weights=weights)
    best: dict[str, float] = {}
    with Prefetcher(ahead, sequences_per_step=sequences) as prefetcher:
        ways: dict[str, Callable[[], object]] = {
            "tokens_per_second": deal,
            "prefetched_tokens_per_second": prefetcher.next,
            "random_choice_tokens_per_second": lambda: torch.stack([next(plain) for _ in range(sequences)]),
            "data_loader_tokens_per_second": lambda: next(loader),
        }
        for _ in range(3):
            for name, take in ways.items():
                rate = tokens_per_second(take, tokens_per_step=sequences * sequence_length, seconds=seconds / 3)
                best[name] = max(best.get(name, 0.0), rate)
    return best


def measure_resume(corpus: Corpus, *, sequence_length: int, samples: int) -> dict[str, float]:
    """Seconds and bytes that saving a state after so many samples, and going on from it, take."""
    weights = dict(zip(corpus.domains, WEIGHTS, strict=True))
    mixture = Mixture(corpus, seed=0, sequence_length=sequence_length, weights=weights)
    mixture.samples_per_domain(next_sample=samples)
    start = time.perf_counter()
    state = json.dumps(mixture.state_dict(next_sample=samples))
    resumed = Mixture(corpus, seed=0, sequence_length=sequence_length, weights=weights)
    resumed.load_state_dict(json.loads(state))
    resumed.batch(first_sample=samples, num_sequences=1)
    return {"resume_seconds": time.perf_counter() - start, "state_bytes": float(len(state))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds on a small corpus")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=32, help="global batch size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder), tokens_per_domain=400_000 if arguments.quick else 20_000_000)
        rates = measure(
            corpus,
            sequence_length=arguments.sequence_length,
            sequences=arguments.sequences,
            seconds=3.0 if arguments.quick else 30.0,
        )
        resume = measure_resume(
            corpus, sequence_length=arguments.sequence_length, samples=10_000 if arguments.quick else 1_000_000
        )
    for name, rate in rates.items():
        print(f"{name:<34} {rate / 1e6:8.1f} M")
    result = {
        "benchmark": "mixture",
        "quick": arguments.quick,
        "sequence_length": arguments.sequence_length,
        "sequences_per_step": arguments.sequences,
        **{name: round(rate) for name, rate in rates.items()},
        "ratio_to_random_choice": round(rates["tokens_per_second"] / rates["random_choice_tokens_per_second"], 3),
        "resume_seconds": round(resume["resume_seconds"], 4),
        "state_bytes": round(resume["state_bytes"]),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
