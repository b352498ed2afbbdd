"""Raw text to a corpus: `shear data prepare`.

Find the files, check all that can be checked, divide them into tasks, and run the stages of a preparation:
tokenise, (pairs and clusters of near-duplicates,) decide what is held out, write the domains, finish. Typed again after
a kill, the same command finds what is done and does the rest; the result is the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from data_tools.corpus_output import (
    alone_in,
    publishing,
    require_begun_alike,
    require_nothing_skipped,
    require_tokenizer,
)
from data_tools.preparation.decision import Decision
from data_tools.preparation.forms import Form
from data_tools.preparation.recipe import DomainSources, PreparationRecipe
from data_tools.preparation.sources import Input, find_inputs
from data_tools.preparation.work_folder import PLAN_NAME, PREFIX, Task, WorkFolder, plan_tasks
from data_tools.tokenisation import domain_table, next_steps
from data_tools.tokenizer import NamedTokenizer, load_tokenizer
from shearing.data.corpus.bos import resolve_bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.domain_folder import DomainSettings, domains_of, is_complete, make_corpus_folder, write_index
from shearing.data.corpus.format import FORMAT, INDEX_NAME, DomainManifest
from shearing.data.corpus.splits import far_from_asked
from shearing.data.texts.chat import ChatTemplate
from shearing.errors import ShearingError, named
from shearing.files.durable import read_json, write_json, write_text
from shearing.files.full_disk import full_disk_said
from shearing.progress import PLAIN_SECONDS
from shearing.runs.names import COMPONENT_NAMES
from shearing.settings.extras import require_extra

if TYPE_CHECKING:
    from data_tools.preparation.executors import Stage


PACKAGES = ("datatrove", "numpy", "shearing", "tokenizers")


@dataclass(frozen=True)
class _Job:
    """A preparation that is planned and not yet complete."""

    recipe: PreparationRecipe
    work: WorkFolder
    settings: DomainSettings
    domains: Mapping[str, range]
    inputs: Mapping[str, str]
    forms: Mapping[str, Form]
    tasks: Sequence[Task]

    def threads(self, *, workers: int) -> int:
        """Cores for the tokenizer of each task."""
        if self.recipe.executor == "slurm":
            return self.recipe.slurm.cpus_per_task
        if self.recipe.executor == "ray":
            return self.recipe.ray.cpus_per_task
        return max(1, available_cores() // min(workers, len(self.tasks)))


def prepare(recipe: PreparationRecipe, *, console: Console | None = None) -> Corpus | None:
    """Tokenise text into a corpus; domains that are there already, from the same files and settings, are kept.

    Args:
        recipe: from `load_preparation`.
        console: shows how far it is; standard error if None.

    Returns:
        The corpus; None where Slurm is still to make it.

    Raises:
        ShearingError: a path, a document, the tokenizer or a domain cannot be used.
    """
    require_extra("data", modules=["datatrove", "orjson", "pyarrow", "zstandard"], what="shear data prepare")
    console = console or Console(stderr=True)
    if "://" in str(recipe.output) or ":/" in str(recipe.output):
        raise ShearingError(
            "output",
            value=str(recipe.output),
            allowed="a folder, as training maps it into memory",
            mend="name a folder",
        )
    tokenizer, settings = _load_tokenizer(recipe, console=console)
    domains = {name: recipe.domain(name) for name in recipe.domains}
    forms = {name: _form(sources, tokenizer=tokenizer) for name, sources in domains.items()}
    found = {name: find_inputs(name, sources=sources) for name, sources in domains.items()}
    for name, each in found.items():
        if each.passed_over:
            console.print(f"{name}: {each.passed_over} files with other endings are passed over", highlight=False)
    fingerprint = settings.tokenizer_fingerprint
    require_tokenizer(recipe.output, tokenizer=settings.tokenizer, fingerprint=fingerprint)
    require_begun_alike(recipe.output, bos=settings.bos, field="bos", mend="bos={}")
    inputs = {
        name: _identity(recipe, settings=settings, inputs=each.inputs, form=forms[name]) for name, each in found.items()
    }
    complete = {name: is_complete(recipe.output / name, inputs=inputs[name]) for name in inputs}
    if recipe.bad_input == "stop":
        for folder in (recipe.output / name for name, is_there in complete.items() if is_there):
            left_out = DomainManifest.read(folder).left_out
            require_nothing_skipped(folder.name, left_out=left_out, mend="prepare it into another output")
    key = hashlib.sha256(json.dumps([inputs, recipe.task_bytes]).encode()).hexdigest()[:16]
    work = WorkFolder((recipe.output / f"{PREFIX}{key}").absolute())
    tokenizer_json = tokenizer.backend.to_str()
    made = not all(complete.values())
    if not made and not _is_indexed(recipe.output, names=inputs):
        # What wrote the domains did not come to the index, or it is gone, or a domain that it names is.
        with full_disk_said(lambda: _no_room(recipe.output)), alone_in(recipe.output), publishing(recipe.output):
            write_index(recipe.output, tokenizer_fingerprint=fingerprint, tokenizer_json=tokenizer_json)
    elif made:
        make_corpus_folder(recipe.output)
        with full_disk_said(lambda: _no_room(recipe.output)), alone_in(recipe.output):
            job = _plan(
                recipe,
                work=work,
                settings=settings,
                tokenizer_json=tokenizer_json,
                forms=forms,
                inputs=inputs,
                files={name: each.inputs for name, each in found.items()},
                complete=complete,
            )
            if not _run(job, console=console):
                return None
    shutil.rmtree(work.path, ignore_errors=True)
    with named(COMPONENT_NAMES):
        corpus = Corpus.open(recipe.output, tokenizer_fingerprint=fingerprint)
    console.print(domain_table(corpus))
    for far in (f"{name}: {each}" for name in inputs for each in far_from_asked(corpus.manifests[name])):
        console.print(far, style="yellow", soft_wrap=True, highlight=False)
    console.print(next_steps(corpus, already=not made), soft_wrap=True, highlight=False)
    if others := [path.name for path in recipe.output.glob(f"{PREFIX}*")]:
        console.print(
            f"unfinished preparations with other files or settings: {', '.join(others)} in the same folder; "
            "delete them if they are not to be continued",
            highlight=False,
        )
    return corpus


def _no_room(output: Path) -> ShearingError:
    return ShearingError(
        "output",
        value=f"{output}, with {shutil.disk_usage(output).free / 1e9:.2f} GB free",
        allowed="a disk with room for twice the corpus, while it is made",
        mend="free space and type the same command again: finished shards are kept",
    )


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_tokenizer(recipe: PreparationRecipe, *, console: Console) -> tuple[NamedTokenizer, DomainSettings]:
    """The tokenizer itself, and what manifests say of it and of the recipe."""
    loaded = load_tokenizer(recipe.tokenizer, separator_token=recipe.separator_token)
    if loaded.notice:
        console.print(loaded.notice, style="yellow", soft_wrap=True, highlight=False, markup=False)
    bos = resolve_bos(recipe.bos, front=loaded.begin.front, named=loaded.begin.named)
    if bos.token is not None:
        console.print(
            f"{loaded.backend.id_to_token(bos.token)} stands in front of each {bos.mode}", highlight=False, markup=False
        )
    settings = DomainSettings(
        vocab_size=loaded.vocab_size,
        separator_id=loaded.separator_id,
        tokenizer=loaded.name,
        tokenizer_fingerprint=loaded.fingerprint,
        split_seed=recipe.split_seed,
        sizes=recipe.sizes,
        versions={package: version(package) for package in PACKAGES},
        bos=bos,
    )
    return loaded, settings


def _form(sources: DomainSources, *, tokenizer: NamedTokenizer) -> Form:
    trusted = sources.special_tokens == "tokens"
    if sources.format == "text":
        return Form(special_tokens=trusted)
    return Form(ChatTemplate.of(tokenizer.full, answers=sources.loss == "answers", trusted=trusted), trusted)


def _identity(recipe: PreparationRecipe, *, settings: DomainSettings, inputs: Sequence[Input], form: Form) -> str:
    """Hash of all that a domain's bytes depend on, other domains aside."""
    parts: list[list[object]] = [
        [each.identity for each in inputs],
        [settings.tokenizer_fingerprint, settings.separator_id, settings.sizes.to_json(), settings.split_seed, FORMAT],
        *([settings.bos.identity()] if settings.bos.identity() else []),
        [recipe.document_separator, recipe.max_document_bytes, recipe.documents_per_file],
        [recipe.duplicates, recipe.near_duplicates],
    ]
    if form != Form():
        parts.append([form.special_tokens, form.chat and asdict(form.chat)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _is_indexed(output: Path, *, names: Iterable[str]) -> bool:
    """Whether the index names these domains, and beside them what is in the folder.

    Where it differs in a domain of an unfinished preparation, it stays as it is: the end of that one writes it.
    """
    path = output / INDEX_NAME
    if not path.is_file():
        return False
    indexed = set(read_json(path)["domains"])
    if not set(names) <= indexed:
        return False
    differing = indexed ^ set(domains_of(output))
    plans = output.glob(f"{PREFIX}*/{PLAN_NAME}") if differing else []
    return not differing or any(differing & set(read_json(plan)["domains"]) for plan in plans)


def _plan(
    recipe: PreparationRecipe,
    *,
    work: WorkFolder,
    settings: DomainSettings,
    tokenizer_json: str,
    forms: Mapping[str, Form],
    inputs: Mapping[str, str],
    files: Mapping[str, Sequence[Input]],
    complete: Mapping[str, bool],
) -> _Job:
    """Divide what is to be done into tasks, or find how an earlier start of the same command divided it."""
    if not work.plan.is_file():
        write_text(work.tokenizer, tokenizer_json)
        write_json(work.plan, {"domains": [name for name in inputs if not complete[name]]})
    names: list[str] = read_json(work.plan)["domains"]
    tasks: list[Task] = []
    domains = {}
    for name in names:
        first = len(tasks)
        tasks += plan_tasks(name, inputs=files[name], task_bytes=recipe.task_bytes)
        domains[name] = range(first, len(tasks))
    return _Job(recipe=recipe, work=work, settings=settings, domains=domains, inputs=inputs, forms=forms, tasks=tasks)


def _stages(job: _Job, *, threads: int) -> list[Stage]:
    from data_tools.preparation import steps
    from data_tools.preparation.executors import Stage

    recipe, work = job.recipe, job.work
    near = recipe.near_duplicates != "ignore"
    reading = steps.Reading()
    assembly = steps.Assembly(
        output=recipe.output.absolute(),
        domains=job.domains,
        inputs=job.inputs,
        settings=job.settings,
        remove_duplicates=recipe.duplicates == "remove",
        near_duplicates=recipe.near_duplicates,
        policy=recipe.bad_input,
    )
    read = steps.ReadTexts(
        job.tasks,
        forms=job.forms,
        separator=recipe.document_separator,
        policy=recipe.bad_input,
        max_document_bytes=recipe.max_document_bytes,
        documents_per_file=recipe.documents_per_file,
        reading=reading,
    )
    tokenise = steps.TokeniseShard(
        work,
        forms=[job.forms[task.domain] for task in job.tasks],
        settings=job.settings,
        reading=reading,
        threads=threads,
        hand_on=near,
    )
    stages = [Stage(steps.TOKENISE, [read, tokenise], len(job.tasks))]
    if near:
        from data_tools.preparation import near_duplicates

        stages = [Stage(steps.TOKENISE, [read, tokenise, near_duplicates.Signatures(work)], len(job.tasks))]
        stages.append(Stage("pairs", [near_duplicates.find_pairs(work)], near_duplicates.NUM_BUCKETS))
        stages.append(Stage("clusters", [near_duplicates.join_clusters(work)], 1))
    stages.append(Stage(steps.DECIDE, [steps.DecidePlaces(work, assembly)], 1))
    stages.append(Stage(steps.WRITE, [steps.WriteDomain(work, assembly)], len(job.domains)))
    stages.append(Stage(steps.FINISH, [steps.FinishCorpus(work, assembly)], 1))
    return stages


def _run(job: _Job, *, console: Console) -> bool:
    """Run the stages; returns whether the corpus is there, and not only on its way."""
    from data_tools.preparation import executors, steps

    recipe, work = job.recipe, job.work
    executors.require_none_queued(work)
    # Nobody was there to be told what befell jobs of a cluster. It is told once: then they are submitted again.
    untold = work.first_failure() if work.jobs.is_file() else None
    shutil.rmtree(work.failures, ignore_errors=True)
    work.jobs.unlink(missing_ok=True)
    if untold is not None:
        raise untold
    if work.places.exists() and (new := Decision(work.places, recipe.output).newcomers()):
        console.print(f"{', '.join(new)} came meanwhile: it is decided anew what is held out", highlight=False)
        shutil.rmtree(work.logs(steps.DECIDE), ignore_errors=True)  # which says that it is done
    workers = recipe.workers or available_cores()
    threads = job.threads(workers=workers)
    stages = _stages(job, threads=threads)
    finished = [rank for rank in range(len(job.tasks)) if work.is_complete(rank)]
    counts = {"domain": len(job.domains), "file": sum(len(task.inputs) for task in job.tasks), "task": len(job.tasks)}
    domains, files, tasks = (f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items())
    size = _bytes(sum(task.bytes for task in job.tasks))
    before = f", {len(finished)} finished before" if finished else ""
    console.print(f"{domains}, {files}, {size}, {tasks}{before}", highlight=False)
    if recipe.executor == "slurm":
        jobs = executors.submit_to_slurm(
            stages, work=work, workers=recipe.workers, settings=recipe.slurm, name=f"prepare-{recipe.output.name}"
        )
        _print_jobs(jobs, work=work, console=console)
        return False
    with _shown(job, console=console) as watch:
        if recipe.executor == "ray":
            executors.run_on_ray(stages, work=work, workers=recipe.workers, settings=recipe.ray, watch=watch)
        else:
            executors.run_locally(stages, work=work, workers=workers, watch=watch)
    return True


def _print_jobs(jobs: Mapping[str, str], *, work: WorkFolder, console: Console) -> None:
    for stage, number in jobs.items():
        console.print(f"submitted {stage}: job {number}", highlight=False)
    numbers = ",".join(jobs.values())
    console.print(
        f"watch:  squeue -j {numbers}\nlogs:   {work.path / 'logs'}\n"
        "ended:  type the same command again: it shows the corpus, or says what went wrong, or submits what is missing",
        soft_wrap=True,
        highlight=False,
    )


@contextmanager
def _shown(job: _Job, *, console: Console) -> Iterator[Watch]:
    """Show how far the tokens are: a bar on a terminal, else a line every few seconds."""
    watch = Watch(job.work, tasks=job.tasks, console=console)
    try:
        yield watch
    finally:
        watch.close()


class Watch:
    """Shows bytes read, tokens and tokens/s over all tasks each time it is called."""

    def __init__(self, work: WorkFolder, *, tasks: Sequence[Task], console: Console) -> None:
        self._work = work
        self._console = console
        self._sizes = [task.bytes for task in tasks]
        for rank in range(len(tasks)):
            if not work.is_complete(rank):
                work.report_progress(rank, bytes_read=0, tokens=0)
        self._total = sum(self._sizes)
        self._before = work.read_progress(len(tasks)).sum(axis=0)
        self._started = self._last_line = time.monotonic()
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[tokens]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("tokenise", total=self._total or None, tokens="")
            self._progress.start()

    def __call__(self) -> None:
        bytes_read, tokens = self._work.read_progress(len(self._sizes)).sum(axis=0).tolist()
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (tokens - int(self._before[1])) / seconds
        text = f"{tokens / 1e6:,.1f} M tokens, {rate / 1e3:,.0f} k tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=bytes_read, tokens=text, description=self._stage(bytes_read))
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            new = bytes_read - int(self._before[0])
            left = f", {(self._total - bytes_read) / new * seconds:.0f} s left" if new > 0 else ""
            share = f"{_bytes(bytes_read)} of {_bytes(self._total)}"
            self._console.print(f"{self._stage(bytes_read)}: {share}, {text}{left}", highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _stage(self, bytes_read: int) -> str:
        return "tokenise" if bytes_read < self._total else "assemble"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
