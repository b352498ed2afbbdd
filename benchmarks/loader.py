"""Tokens per second that the loader deals, ours against the usual ways over the same rows, in one run.

The usual ways: `datasets.interleave_datasets` with probabilities over Arrow sets of the same rows, in torch format
behind a `DataLoader`; and a plain memory-map reader that draws a domain and a row at random for each sample, which can
neither resume nor walk its rows once each. At 1, 2 and 4 workers: of a `DataLoader` for `datasets`, processes that each
deal their own batches for the other two.

Then, over sparse files, 10 billion tokens in 1,000 domains: seconds from opening the corpus to the first batch, memory,
and the size of a saved state after many updates of the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import FORMAT, DomainManifest, SourceFile, SplitManifest
from shearing.data.corpus.writer import CorpusWriter
from shearing.data.mixture.prefetcher import Prefetcher
from shearing.data.mixture.sampler import Mixture
from shearing.files.durable import write_json

VOCAB_SIZE = 49_152
WEIGHTS = [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15]  # the paper's, for its seven domains
UPDATE_INTERVAL_STEPS = 50
WORKERS = (1, 2, 4)
MANY_DOMAINS, MANY_TOKENS = 1_000, 10_000_000_000
DOCUMENTS_PER_DOMAIN = 2_000

Take = Callable[[], object]


def write_corpus(folder: Path, *, tokens_per_domain: int) -> Corpus:
    """Seven domains of random tokens."""
    writer = CorpusWriter(
        folder, vocab_size=VOCAB_SIZE, separator_id=0, tokenizer="random", tokenizer_fingerprint="random"
    )
    generator = np.random.default_rng(0)
    for i in range(len(WEIGHTS)):
        with writer.domain(f"domain_{i}", sources=["random numbers"], inputs="random") as domain:
            for document in range(50):
                tokens: Any = generator.integers(1, VOCAB_SIZE, size=tokens_per_domain // 50)
                domain.add(f"{i} {document}", token_ids=tokens)
    return writer.finish()


def write_arrow(corpus: Corpus, folder: Path, *, sequence_length: int) -> None:
    """The rows of the corpus as one Arrow set of each domain."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    for name in corpus.domains:
        count = corpus.train_rows(name, sequence_length=sequence_length)
        rows = corpus.rows([(name, i) for i in range(count)], sequence_length=sequence_length)
        offsets = pa.array(np.arange(count + 1, dtype=np.int32) * (sequence_length + 1))
        lists = pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1).astype(np.int32)))
        datasets.Dataset(pa.table({"input_ids": lists})).save_to_disk(folder / name)


def ours(corpus_path: Path, *, sequence_length: int, sequences: int, rank: int, world_size: int) -> Take:
    """Batches of one process of a run, prefetched, with weights that change as in training."""
    corpus = Corpus.open(corpus_path)
    weights = dict(zip(corpus.domains, WEIGHTS, strict=True))
    mixture = Mixture(corpus, seed=0, sequence_length=sequence_length, weights=weights)
    prefetcher = Prefetcher(mixture, sequences_per_step=sequences * world_size, rank=rank, world_size=world_size)
    steps = 0

    def take() -> Tensor:
        nonlocal steps
        steps += 1
        if steps % UPDATE_INTERVAL_STEPS == 0:
            prefetcher.update_weights(weights)
        return prefetcher.next().tokens

    return take


def plain(corpus_path: Path, *, sequence_length: int, sequences: int, rank: int, **_: int) -> Take:
    """Random rows of random domains from memory-mapped files."""
    corpus = Corpus.open(corpus_path)
    maps = [np.memmap(corpus.path / name / "train.bin", dtype=np.uint16, mode="r") for name in corpus.domains]
    chance = np.random.default_rng(rank)
    weights = np.array(WEIGHTS) / sum(WEIGHTS)

    def take() -> Tensor:
        rows = []
        for domain in chance.choice(len(maps), size=sequences, p=weights):
            start = chance.integers(0, (len(maps[domain]) - 1) // sequence_length) * sequence_length
            rows.append(maps[domain][start : start + sequence_length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))

    return take


def interleaved(arrow: Path, *, sequences: int, workers: int) -> Take:
    """`datasets` as its documentation has it."""
    import datasets
    from torch.utils.data import DataLoader

    sets = [datasets.load_from_disk(folder).with_format("torch") for folder in sorted(arrow.iterdir())]
    weights = np.array(WEIGHTS) / sum(WEIGHTS)
    mixed: Any = datasets.interleave_datasets(
        sets, probabilities=weights.tolist(), seed=0, stopping_strategy="all_exhausted"
    )
    loader: Iterator[Any] = iter(
        cycle_loader(DataLoader(mixed, batch_size=sequences, num_workers=workers, persistent_workers=True))
    )
    return lambda: next(loader)["input_ids"]


def cycle_loader(loader: Any) -> Iterator[Any]:
    """Its batches, again and again, none of them kept."""
    for again in cycle([loader]):
        yield from again


def batches_per_second(take: Take, *, seconds: float) -> float:
    """Rate of `take` over about this many seconds, the first calls aside."""
    for _ in range(3):
        take()
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        take()
        count += 1
    return count / elapsed


def in_processes(make: Callable[..., Take], corpus: Path, *, workers: int, seconds: float, **settings: int) -> float:
    """Batches per second of so many processes together, all at work at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(
            target=_work,
            args=(make, corpus, rank, workers, barrier, results, seconds, settings),
        )
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    rates = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return float(sum(rates))


def _work(
    make: Callable[..., Take],
    corpus: Path,
    rank: int,
    world_size: int,
    barrier: Any,
    results: Any,
    seconds: float,
    settings: dict[str, int],
) -> None:
    torch.set_num_threads(1)
    take = make(corpus, rank=rank, world_size=world_size, **settings)
    take()
    barrier.wait(timeout=300)
    results.put(batches_per_second(take, seconds=seconds))
    # The prefetching thread is a daemon: nothing else has to end.
    results.close()
    results.join_thread()
    os._exit(0)


def measure_rates(folder: Path, *, quick: bool, sequence_length: int, sequences: int) -> dict[str, dict[str, float]]:
    """Tokens per second of every way at every number of workers; rounds alternate, the best of each counts."""
    corpus = write_corpus(folder / "corpus", tokens_per_domain=4_000_000 if quick else 40_000_000)
    write_arrow(corpus, folder / "arrow", sequence_length=sequence_length)
    seconds, rounds = (1.0, 2) if quick else (5.0, 3)
    settings = {"sequence_length": sequence_length, "sequences": sequences}
    rates: dict[str, dict[str, float]] = {"ours": {}, "memory_map": {}, "interleave_datasets": {}}

    def measure(workers: int) -> None:
        ways: dict[str, Callable[[], float]] = {
            "ours": lambda: in_processes(ours, corpus.path, workers=workers, seconds=seconds, **settings),
            "memory_map": lambda: in_processes(plain, corpus.path, workers=workers, seconds=seconds, **settings),
            "interleave_datasets": lambda: batches_per_second(
                interleaved(folder / "arrow", sequences=sequences, workers=workers), seconds=seconds
            ),
        }
        for _ in range(rounds):
            for name, rate in ways.items():
                found = rate() * sequences * sequence_length
                rates[name][str(workers)] = max(found, rates[name].get(str(workers), 0.0))

    for workers in WORKERS:
        measure(workers)
    return rates


def write_sparse(folder: Path) -> None:
    """Many domains whose tokens are holes in files: all of them separators, as far as anyone can tell."""
    train, held_out = MANY_TOKENS // MANY_DOMAINS, 1_000_000
    arrays: dict[str, bytes] = {}
    splits = {}
    for split, tokens in (("train", train), ("validation", held_out), ("test", held_out)):
        ends = np.linspace(0, tokens, DOCUMENTS_PER_DOMAIN + 1).astype(np.int64)[1:]
        hashes = np.arange(DOCUMENTS_PER_DOMAIN, dtype=np.uint64)
        for name, array in (("ends", ends), ("hashes", hashes)):
            file = io.BytesIO()
            np.save(file, array)
            arrays[f"{split}_{name}"] = file.getvalue()
        sums = {key: hashlib.sha256(arrays[f"{split}_{key}"]).hexdigest() for key in ("ends", "hashes")}
        splits[split] = SplitManifest(
            documents=DOCUMENTS_PER_DOMAIN,
            tokens=tokens,
            bytes=4 * tokens,
            sha256="",
            ends_sha256=sums["ends"],
            hashes_sha256=sums["hashes"],
        )
    names = [f"domain_{i:04d}" for i in range(MANY_DOMAINS)]
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for file_name, content in arrays.items():
            (folder / name / f"{file_name}.npy").write_bytes(content)
        for split, counts in splits.items():
            with (folder / name / f"{split}.bin").open("wb") as bin_file:
                bin_file.truncate(2 * counts.tokens)
        manifest = DomainManifest(
            domain=name,
            parts=splits,
            dtype="uint16",
            vocab_size=VOCAB_SIZE,
            largest_token=0,
            separator_id=0,
            tokenizer="none",
            tokenizer_fingerprint="none",
            sources=(SourceFile("holes"),),
            split_seed=0,
            sizes={"validation": "10%", "test": "10%"},
            duplicates=0,
            left_out={},
            versions={},
            inputs=str(i),
        )
        (folder / name / "manifest.json").write_text(json.dumps(asdict(manifest)))
    write_json(folder / "corpus.json", {"format": FORMAT, "domains": names, "tokenizer_fingerprint": "none"})


def measure_scale(folder: Path, *, sequence_length: int, sequences: int, updates: int) -> dict[str, float]:
    """Figures of 10 billion tokens in 1,000 domains, in a process of its own."""
    write_sparse(folder)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_scale, args=(folder, sequence_length, sequences, updates, results))
    process.start()
    figures: dict[str, float] = results.get(timeout=600)
    process.join()
    return figures


def _scale(folder: Path, sequence_length: int, sequences: int, updates: int, results: Any) -> None:
    before = _memory()
    start = time.perf_counter()
    corpus = Corpus.open(folder, sequence_length=sequence_length)
    opened = time.perf_counter() - start
    generator = np.random.default_rng(0)
    weights = dict(zip(corpus.domains, generator.random(len(corpus.domains)).tolist(), strict=True))
    mixture = Mixture(corpus, seed=0, sequence_length=sequence_length, weights=weights)
    with Prefetcher(mixture, sequences_per_step=sequences) as prefetcher:
        prefetcher.next()
        started = time.perf_counter() - start
        after = _memory()
        largest, steps = 0, 0
        start = time.perf_counter()
        for _ in range(updates):
            for _ in range(UPDATE_INTERVAL_STEPS):
                prefetcher.next()
                steps += 1
            weights = dict(zip(corpus.domains, generator.random(len(corpus.domains)).tolist(), strict=True))
            prefetcher.update_weights(weights)
            largest = max(largest, len(json.dumps(prefetcher.state_dict())))
        seconds = time.perf_counter() - start
        state = json.dumps(prefetcher.state_dict())
    start = time.perf_counter()
    resumed = Mixture(corpus, seed=0, sequence_length=sequence_length, weights=weights)
    resumed.load_state_dict(json.loads(state))
    resumed.batch(first_sample=resumed.next_sample, num_sequences=1)
    results.put(
        {
            "domains": len(corpus.domains),
            "tokens": sum(manifest.train.tokens for manifest in corpus.manifests.values()),
            "open_seconds": round(opened, 3),
            "start_seconds": round(started, 3),
            "start_memory_mb": round((after - before) / 1e6, 1),
            "run_memory_mb": round((_memory() - before) / 1e6, 1),
            "updates": updates,
            "state_bytes": largest,
            "resume_seconds": round(time.perf_counter() - start, 4),
            "tokens_per_second": round(steps * sequences * sequence_length / seconds),
        }
    )


def _memory() -> int:
    """Bytes of memory of this process that are no pages of mapped files."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about a minute, on a small corpus")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=32, help="of a batch")
    arguments = parser.parse_args()
    shape = {"sequence_length": arguments.sequence_length, "sequences": arguments.sequences}
    with tempfile.TemporaryDirectory() as folder:
        rates = measure_rates(Path(folder), quick=arguments.quick, **shape)
        scale = measure_scale(Path(folder) / "sparse", updates=10 if arguments.quick else 200, **shape)
    for name, by_workers in rates.items():
        print(f"{name:<22}" + "".join(f"{rate / 1e6:10.1f} M at {workers}" for workers, rate in by_workers.items()))
    print(f"{MANY_DOMAINS} domains, {MANY_TOKENS:,} tokens: {scale}")
    result = {
        "benchmark": "loader",
        "quick": arguments.quick,
        **shape,
        "cores": os.cpu_count(),
        "tokens_per_second": {
            name: {workers: round(rate) for workers, rate in by_workers.items()} for name, by_workers in rates.items()
        },
        **{
            f"ratio_to_{name}": {
                workers: round(rates["ours"][workers] / rate, 2) for workers, rate in rates[name].items()
            }
            for name in ("interleave_datasets", "memory_map")
        },
        "scale": scale,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
