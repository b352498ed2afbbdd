"""`shear data …`: from raw text to tokenised domains, and what stands in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer
from rich.console import Console

from shearing.cli.frame import Overrides, RecipeFile, data, load, reference_loss
from shearing.data.corpus.bos import BosChoice
from shearing.data.recipe import DataRecipe
from shearing.errors import ShearingError
from shearing.training.recipe import TrainingRecipe

CorpusFolder = Annotated[Path, typer.Argument(metavar="CORPUS", help="Folder of a prepared corpus.")]


def _key(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


@data.command()
def prepare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]…", help="A YAML file, as in recipes/data/, and keys over it."),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH of a file, folder, glob or URL, or NAME=hf:DATASET; may be repeated."),
    ] = None,
    tokenizer: Annotated[str | None, _key("Folder or hub name of the model's tokenizer.")] = None,
    output: Annotated[str | None, _key("Folder of the corpus.", "--output", "-o")] = None,
    text_field: Annotated[
        str | None, _key("Field of the text, as text or data.text; `text` if unset, of chats `messages`.")
    ] = None,
    format: Annotated[str | None, _key("text (the default), or chat: lists of messages.")] = None,  # noqa: A002
    loss: Annotated[str | None, _key("Of chats, what counts in a loss: all (the default) or answers.")] = None,
    document_separator: Annotated[
        str | None, _key(r"Divides .txt and .md files into documents; \n is a line break.")
    ] = None,
    separator_token: Annotated[str | None, _key("Token after each document; the tokenizer's own if unset.")] = None,
    bos: Annotated[
        str | None, _key("Token in front of texts: auto (the default, as the tokenizer does), document, row or none.")
    ] = None,
    validation: Annotated[
        str | None, _key("Of each domain, for what steers: 5% of its tokens (the default), or '2M tokens'.")
    ] = None,
    test: Annotated[str | None, _key("The same for what judges: no document is in both.")] = None,
    split_seed: Annotated[int | None, _key("Another one holds out other documents.")] = None,
    duplicates: Annotated[str | None, _key("keep (the default) or remove equal documents of a domain.")] = None,
    near_duplicates: Annotated[
        str | None, _key("ignore (the default), keep together on one side, or remove nearly equal documents.")
    ] = None,
    bad_input: Annotated[str | None, _key("stop (the default) at what cannot be read, or skip and count it.")] = None,
    max_document_bytes: Annotated[int | None, _key("Longer documents are bad input.")] = None,
    documents_per_file: Annotated[int | None, _key("Read only the first so many of each file, for a try.")] = None,
    executor: Annotated[str | None, _key("local (the default), slurm or ray.")] = None,
    workers: Annotated[int | None, _key("Tasks at a time; the number of cores if unset.")] = None,
) -> None:
    """Tokenise text into the domains of a corpus. The same command continues what was interrupted."""
    from data_tools.preparation.prepare import prepare as run
    from data_tools.preparation.recipe import domains_of_options, load_preparation

    given: dict[str, Any] = {
        "tokenizer": tokenizer,
        "output": output,
        "text_field": text_field,
        "format": format,
        "loss": loss,
        "document_separator": document_separator.replace(r"\n", "\n") if document_separator else None,
        "separator_token": separator_token,
        "bos": bos,
        "validation": validation,
        "test": test,
        "split_seed": split_seed,
        "duplicates": duplicates,
        "near_duplicates": near_duplicates,
        "bad_input": bad_input,
        "max_document_bytes": max_document_bytes,
        "documents_per_file": documents_per_file,
        "executor": executor,
        "workers": workers,
    }
    set_by_options: dict[str, tuple[Any, str]] = {
        key: (value, f"--{key.replace('_', '-')} {value}") for key, value in given.items() if value is not None
    }
    if domain:
        set_by_options["domains"] = (domains_of_options(domain), f"--domain {' --domain '.join(domain)}")
    arguments = arguments or []
    file = Path(arguments[0]) if arguments and "=" not in arguments[0] else None
    run(load_preparation(file, overrides=arguments[1 if file else 0 :], options=set_by_options))


@data.command()
def adopt(
    domain: Annotated[list[str], typer.Option(metavar="NAME=PATH", help="A tokenised set; once for each domain.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of the tokenizer that made the tokens.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the corpus.")],
    validation: Annotated[str, typer.Option(help="Of each domain, for what steers: 5% or '2M tokens'.")] = "5%",
    test: Annotated[str, typer.Option(help="The same for what judges: no document is in both.")] = "5%",
    separator_token: Annotated[
        str | None, typer.Option(help="Token after each document; the tokenizer's end-of-sequence token if unset.")
    ] = None,
) -> None:
    """Use sets that are tokenised already, of datatrove, nanotron or `datasets`, where they lie."""
    from data_tools.adoption.adoption import adopt as adopt_sets
    from data_tools.tokenisation import domain_table, next_steps

    pairs = [item.partition("=") for item in domain]
    for item, (name, _, path) in zip(domain, pairs, strict=True):
        if not (name and path):
            raise ShearingError("--domain", value=item, allowed="NAME=PATH", mend="write --domain books=sets/books")
    names = [name for name, _, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ShearingError(
            "--domain",
            value=[item for item in domain if item.startswith(f"{twice}=")],
            allowed="each name once",
            mend="put the sets of a domain into one folder, and name that",
        )
    console = Console(stderr=True)
    corpus = adopt_sets(
        domains={name: Path(path) for name, _, path in pairs},
        tokenizer=tokenizer,
        output=output,
        validation=validation,
        test=test,
        separator_token=separator_token,
        console=console,
    )
    Console().print(domain_table(corpus))
    Console().print(next_steps(corpus), soft_wrap=True, highlight=False)


@data.command()
def inspect(
    corpus: CorpusFolder,
    recipe: Annotated[Path | None, typer.Option(help="Compare with what this recipe will read.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a picture: .png, .svg or .pdf.")] = None,
    samples: Annotated[int, typer.Option(help="Decoded documents of each domain to print.")] = 0,
    longest_document: Annotated[int, typer.Option(help="Tokens above which a document is a problem.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Chooses what is read and printed.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 if there are problems.")] = False,
) -> None:
    """Say what is in a corpus: sizes, lengths, duplicates, samples, and what looks wrong."""
    resolved = None if recipe is None else load(recipe, None)
    from data_tools.inspection.inspection import inspect as look, require_output
    from data_tools.inspection.view import draw, render

    if output is not None:
        require_output(output)
    found = look(corpus, recipe=resolved, longest_document=longest_document, seed=seed, console=Console(stderr=True))
    Console().print(render(found, samples=samples), soft_wrap=not Console().is_terminal)
    if output is not None:
        draw(found, output)
        Console().print(f"picture {output}", soft_wrap=True, highlight=False)
    if strict and found.problems:
        raise typer.Exit(1)


@data.command()
def verify(
    corpus: CorpusFolder,
    sources: Annotated[bool, typer.Option("--sources", help="Read the files that it was made from too.")] = False,
    rows: Annotated[int, typer.Option(help="Pieces decoded from each part of each domain.")] = 8,
    seed: Annotated[int, typer.Option(help="Chooses them.")] = 0,
) -> None:
    """Read all of a corpus and name every file that is not what it was. Exit code 1 if there is one."""
    from data_tools.inspection.verification import render, verify as read_all

    result = read_all(corpus, sources=sources, rows=rows, seed=seed, console=Console(stderr=True))
    Console().print(render(result), soft_wrap=True)
    if result.damages:
        raise typer.Exit(1)


@data.command()
def teacher(
    corpus: CorpusFolder,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the teacher.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the cache.")] = Path("teacher-cache"),
    sequence_length: Annotated[int | None, typer.Option(help="As in the recipe; 4096 if unset.")] = None,
    attention: Annotated[str | None, typer.Option(help="full or documents, as in the recipe; full if unset.")] = None,
    bos: Annotated[str | None, typer.Option(help="How texts are to begin, as data.bos; auto if unset.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws of each token's distribution; 50 if unset.")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep so many likeliest tokens and the rest's mass instead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    domain: Annotated[list[str] | None, typer.Option(help="Of the corpus; may be repeated. Unset: all.")] = None,
    rows: Annotated[int | None, typer.Option(help="Only the first so many rows of each domain.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Only rows that this recipe will read, cut and attended to as it says.")
    ] = None,
    micro_batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 4,
    revision: Annotated[str | None, typer.Option(help="Hub revision; only for hub names.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    verify_only: Annotated[bool, typer.Option("--verify", help="Read all of a cache instead.")] = False,
) -> None:
    """Keep what a teacher says of a corpus' rows, for distill.cache. The same command continues, on any processes."""
    from shearing.runs.teacher_cache import Asked, verify as read_all, write

    if verify_only:
        damages = read_all(output, console=Console(stderr=True))
        for damage in damages:
            typer.echo(str(damage), err=True)
        if damages:
            raise typer.Exit(1)
        Console().print(f"{output} is what was written", soft_wrap=True, highlight=False)
        return
    resolved = None if recipe is None else load(recipe, None)
    if model is None:
        raise ShearingError("--model", value=None, allowed="the teacher", mend="add --model FOLDER")
    if draws is not None and top_k is not None:
        raise ShearingError("--top-k", value=top_k, allowed="nothing beside --draws", mend="leave one of them out")
    if attention is None:
        attention = "full" if resolved is None else resolved.data.attention
    if attention not in (allowed := get_args(DataRecipe.model_fields["attention"].annotation)):
        raise ShearingError("--attention", value=attention, allowed=", ".join(allowed), mend="choose one of them")
    if sequence_length is None:
        sequence_length = 4096 if resolved is None else resolved.data.sequence_length
    write(
        Asked(
            model=model,
            revision=revision,
            corpus=corpus,
            output=output,
            domains=domain or (None if resolved is None else resolved.data.domains),
            sequence_length=sequence_length,
            attention=cast("Literal['full', 'documents']", attention),
            bos=_bos(bos or ("auto" if resolved is None else resolved.data.bos)),
            draws=50 if draws is None else draws,
            top_k=top_k,
            seed=seed,
            rows=rows,
            recipe=resolved,
            micro_batch_size=micro_batch_size,
            training=_training(device=device, precision=precision),
        )
    )


@reference_loss.command("measure")
def measure_reference_loss(
    corpus: Annotated[Path, typer.Option(help="Folder of a prepared corpus.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The loss table (JSON); models are added to it.")],
    model: Annotated[list[str], typer.Option(help="Model folder or hub name; may be repeated.")],
    domain: Annotated[list[str] | None, typer.Option(help="Of the corpus; may be repeated. Unset: all.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of context, as in the recipe.")] = 4096,
    tokens: Annotated[int, typer.Option(help="Validation tokens per domain.")] = 2_048_000,
    bos: Annotated[str, typer.Option(help="How texts are to begin, as data.bos.")] = "auto",
    micro_batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
) -> None:
    """Measure models on the validation text of each domain. An interrupted measurement continues."""
    training = _training(device=device, precision=precision)
    from shearing.runs.stages.reference_loss import measure

    measure(
        model,
        corpus=corpus,
        output=output,
        domains=domain or None,
        sequence_length=sequence_length,
        tokens_per_domain=tokens,
        micro_batch_size=micro_batch_size,
        training=training,
        console=Console(),
        bos=_bos(bos),
    )


@reference_loss.command("fit")
def fit_reference_loss(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Of `measure`, or published losses as JSON or CSV.")],
    at: Annotated[str | None, typer.Option(help="Size to predict at, embeddings included: 1.3B.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose target is that size.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Of the table; may be repeated. Unset: all.")] = None,
    unbounded: Annotated[bool, typer.Option("--unbounded", help="Let c be negative, as in published fits.")] = False,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Predict outside of the sizes of the table too.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Reference file (JSON) for mixture.reference.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Points, laws and predictions: .png, .svg or .pdf.")] = None,
) -> None:
    """Fit L(N) = a N^-b + c to each domain and predict the loss at a size."""
    resolved = None if recipe is None else load(recipe, None)
    from shearing.runs.stages.reference_loss import fit

    fit(
        table,
        at=at,
        recipe=resolved,
        models=model or (),
        bounded=not unbounded,
        extrapolate=extrapolate,
        output=output,
        picture=picture,
        console=Console(),
    )


@reference_loss.command("source")
def source_reference_loss(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Reference file (JSON) for mixture.reference.")] = Path(
        "reference.json"
    ),
) -> None:
    """Write the source model's own loss on validation text, as `mixture.reference: source` measures it."""
    resolved = load(recipe, overrides)
    from shearing.runs.context import RunContext
    from shearing.runs.stages.reference_loss import source

    source(RunContext(resolved), output=output)


def _bos(choice: str) -> BosChoice:
    """How texts are to begin, checked as in a recipe."""
    if choice not in (allowed := get_args(BosChoice)):
        raise ShearingError("--bos", value=choice, allowed=", ".join(allowed), mend="choose one of them")
    return cast("BosChoice", choice)


def _training(*, device: str, precision: str) -> TrainingRecipe:
    """Where and how to compute, checked as in a recipe."""
    for field, value in (("device", device), ("precision", precision)):
        choices = get_args(TrainingRecipe.model_fields[field].annotation)
        if value not in choices:
            raise ShearingError(
                f"--{field}", value=value, allowed=", ".join(choices), mend="choose one of them, or leave it out"
            )
    return TrainingRecipe.model_validate({"device": device, "precision": precision})
