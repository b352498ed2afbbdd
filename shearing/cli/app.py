"""`shear …`: one thin function per command. Heavy imports are inside the commands that need them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.syntax import Syntax
from typer.core import TyperGroup

from shearing.errors import ShearingError
from shearing.recipe import Recipe, TrainingRecipe, load_recipe
from shearing.run_directory import RunDirectory

if TYPE_CHECKING:
    from shearing.run_directory import Stage
    from shearing.sparsity.recipe import SparsifyRecipe


class _Commands(TyperGroup):
    """Turns an error that the user can mend into one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ShearingError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: the same command continues the run", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="shear",
    cls=_Commands,
    help="Make a language model smaller: learn which parts to cut, cut them exactly, train on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config = typer.Typer(help="Look at a recipe without running it.", no_args_is_help=True)
app.add_typer(config, name="config")
data = typer.Typer(help="From raw text to the domains of a run.", no_args_is_help=True)
app.add_typer(data, name="data")
reference_loss = typer.Typer(help="Losses to aim at: measure models, fit a law to them, predict.", no_args_is_help=True)
data.add_typer(reference_loss, name="reference-loss")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Dotted keys over the file: prune.learning_rate=1e-4."),
]
CorpusFolder = Annotated[Path, typer.Argument(metavar="CORPUS", help="Folder of a prepared corpus.")]


def _slurm(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="With --slurm")


def _key(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="SHEARING_DEBUG", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command."""


@app.command("run")
def run_all(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run all stages: prune, compact, sparsify, pretrain, eval, report. An interrupted run continues."""
    _run(recipe, overrides, stages=None)


@app.command()
def prune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Learn the masks."""
    _run(recipe, overrides, stages=["prune"])


@app.command()
def compact(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Cut the model to the learned shape."""
    _run(recipe, overrides, stages=["compact"])


@app.command()
def pretrain(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train the cut or sparse model on, or the source itself."""
    _run(recipe, overrides, stages=["pretrain"])


@app.command("eval")
def evaluate(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Measure every model of the run so far and its baselines."""
    _run(recipe, overrides, stages=["evaluate"])


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Processes, one on each GPU; unset: the GPUs here, or 1.")] = None,
    gpu: Annotated[str | None, typer.Option(help="What kind, as H100 or A100-SXM4-80GB; unset: the one here.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of one GPU; unset: as its kind has.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPU's peak that training reaches.")] = 0.4,
) -> None:
    """Say what the run will take: memory for each way to share it out, FLOPs, time, disk. Loads no weights."""
    resolved = _load(recipe, overrides)
    from shearing.stages.plan import Hardware, plan as make, render

    hardware = Hardware.of(processes=gpus, gpu=gpu, gigabytes=memory, mfu=mfu)
    Console().print(render(make(resolved, hardware=hardware)))


@app.command()
def report(target: Annotated[Path, typer.Argument(metavar="RECIPE|RUN_DIR")], overrides: Overrides = None) -> None:
    """Write report.html from what the run has so far."""
    from shearing.stages.run import report as write

    directory = RunDirectory(target if target.is_dir() else _load(target, overrides).run_dir)
    write(directory)
    Console().print(str(directory.report), soft_wrap=True, highlight=False)


@app.command()
def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print the script of a Slurm job.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it instead and print its number.")] = False,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs, and so processes, on each: the GPUs of this machine; with --slurm, 8.")
    ] = None,
    time: Annotated[str, _slurm("Time limit of one start of the job; a longer run is queued again.")] = "24:00:00",
    partition: Annotated[str | None, _slurm("Partition.")] = None,
    account: Annotated[str | None, _slurm("Account.")] = None,
    qos: Annotated[str | None, _slurm("Quality of service.")] = None,
    cpus_per_task: Annotated[int | None, _slurm("CPU cores of each process.")] = None,
    mem: Annotated[str | None, _slurm("Memory of each node.")] = None,
    name: Annotated[str | None, _slurm("Name of the job; from the recipe if unset.", "--job-name")] = None,
    output: Annotated[str, _slurm("Log of the job.")] = "slurm-%j.out",
    signal_before: Annotated[int, _slurm("Seconds before the limit at which the run saves and stops.")] = 300,
    directives: Annotated[
        list[str] | None, _slurm("Any other option of sbatch, KEY=VALUE or KEY; may be repeated.", "--sbatch")
    ] = None,
    setup: Annotated[
        list[str] | None, _slurm("Shell line to run before, as 'module load cuda'; may be repeated.")
    ] = None,
    python: Annotated[str | None, _slurm("Interpreter on the nodes; the one that runs now if unset.")] = None,
) -> None:
    """Start a recipe on many processes: print what to type, or a Slurm job that continues until the run is complete."""
    from shearing import launch as launching

    resolved = _load(recipe, overrides)
    if not slurm:
        launching.require_slurm(submit=submit)
        processes = launching.gpus_here() if gpus_per_node is None else gpus_per_node
        text = launching.commands(recipe, overrides=overrides or (), nodes=nodes, processes=processes)
        launching.require_equal_shares(resolved, num_processes=nodes * processes)
        typer.echo(text, nl=False)
        return
    job = launching.SlurmJob(
        name=name or launching.job_name(resolved),
        nodes=nodes,
        gpus_per_node=launching.GPUS_PER_NODE if gpus_per_node is None else gpus_per_node,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        cpus_per_task=cpus_per_task,
        mem=mem,
        output=output,
        signal_before=signal_before,
        directives=directives or (),
        setup=setup or (),
        python=python,
    )
    script = launching.slurm_script(
        job, recipe=recipe, overrides=overrides or (), folder=Path.cwd(), gpus=resolved.training.device != "cpu"
    )
    launching.require_equal_shares(resolved, num_processes=job.nodes * job.gpus_per_node)
    typer.echo(launching.submit(script, job=job) if submit else script, nl=submit)


def _sparsity(text: str, *names: str, panel: str = "Method") -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


SparseModel = Annotated[
    str | None,
    typer.Argument(metavar="MODEL|RECIPE", help="A folder, a hub name, or a YAML file that says all of this."),
]
SparseOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Any other key (docs/sparsity.md): offload=disk."),
]
Criterion = Annotated[str | None, _sparsity("magnitude, wanda or sparsegpt.")]
Sparsity = Annotated[float | None, _sparsity("Share of weights to remove: 0.5.", "--sparsity", "--target")]
PatternOption = Annotated[str | None, _sparsity("N:M, N kept of each M consecutive inputs: 2:4 keeps 2 of 4.")]
Group = Annotated[
    str | None, _sparsity("Unstructured: row, layer or cumulative; row for wanda and layer for others if unset.")
]
Reconstruction = Annotated[str | None, _sparsity("none or obs; obs for sparsegpt and none for others if unset.")]
Include = Annotated[list[str] | None, _sparsity("Modules to prune, as '*.down_proj'; may be repeated.")]
Exclude = Annotated[list[str] | None, _sparsity("Modules to leave dense; may be repeated.")]
Levels = Annotated[str | None, _sparsity("Patterns to choose from, N kept of M: 1:8,2:8,4:8.", panel="Allocation")]
Unit = Annotated[str | None, _sparsity("What has a level of its own: block or matrix.", panel="Allocation")]
Hardware = Annotated[str | None, _sparsity("2:4: only levels that sparse tensor cores run.", panel="Allocation")]
CalibrationText = Annotated[
    list[str] | None,
    _sparsity("A prepared corpus, or plain text files (repeat the option).", panel="Calibration"),
]
Samples = Annotated[int | None, _sparsity("Sequences: 128.", panel="Calibration")]
Seqlen = Annotated[int | None, _sparsity("Tokens of each: 2048.", panel="Calibration")]
Seed = Annotated[int | None, _sparsity("Of the draw, and of a search: 0.", panel="Calibration")]


@app.command()
def sparsify(
    model: SparseModel = None,
    overrides: SparseOverrides = None,
    criterion: Criterion = None,
    sparsity: Sparsity = None,
    pattern: PatternOption = None,
    group: Group = None,
    reconstruction: Reconstruction = None,
    true_sequential: Annotated[
        bool | None, _sparsity("Inside a layer too, see what is pruned already.", "--true-sequential")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    allocation: Annotated[
        str | None,
        _sparsity("uniform, depth, alpha, owl, rank, msp, or an allocation.json.", panel="Allocation"),
    ] = None,
    levels: Levels = None,
    unit: Unit = None,
    hardware: Hardware = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder of the sparse model.")] = None,
    evaluate: Annotated[str | None, typer.Option(help="Corpus to compare dense and sparse on, held-out text.")] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only compare a sparse model with its manifest and its masks.")
    ] = None,
) -> None:
    """Zero weights in one shot: an ordinary model of the same shape, its masks, and a manifest. N:M is N kept of M."""
    if check is not None:
        _check_sparsity(check)
        return
    options = {
        "criterion": criterion,
        "sparsity": sparsity,
        "pattern": pattern,
        "group": group,
        "reconstruction": reconstruction,
        "true_sequential": true_sequential,
        "include": include or None,
        "exclude": exclude or None,
        "allocation": allocation,
        "levels": levels,
        "unit": unit,
        "hardware": hardware,
        "calibration": calibration or None,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "output": output,
        "evaluate": evaluate,
    }
    recipe = _sparsify_recipe(model, options=options, overrides=overrides)
    from shearing.sparsity.sparsify import sparsify as run

    run(recipe)


@app.command()
def allocate(
    model: SparseModel = None,
    overrides: SparseOverrides = None,
    criterion: Criterion = None,
    sparsity: Sparsity = None,
    pattern: PatternOption = None,
    group: Group = None,
    reconstruction: Reconstruction = None,
    include: Include = None,
    exclude: Exclude = None,
    allocation: Annotated[str | None, _sparsity("depth, alpha, owl, rank or msp.", panel="Allocation")] = None,
    levels: Levels = None,
    unit: Unit = None,
    hardware: Hardware = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="The file, as allocation.json.")] = None,
) -> None:
    """Choose how much of each layer goes, and prune nothing: `shear sparsify --allocation FILE` does."""
    options = {
        "criterion": criterion,
        "sparsity": sparsity,
        "pattern": pattern,
        "group": group,
        "reconstruction": reconstruction,
        "include": include or None,
        "exclude": exclude or None,
        "allocation": allocation,
        "levels": levels,
        "unit": unit,
        "hardware": hardware,
        "calibration": calibration or None,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "output": output,
    }
    recipe = _sparsify_recipe(model, options=options, overrides=overrides)
    from shearing.sparsity.allocate import allocate as run

    run(recipe)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A sparse model: a folder, or a hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the exported model.")],
    semi_structured: Annotated[
        bool, typer.Option("--semi-structured", help="For GPUs that multiply 2:4 matrices faster.")
    ] = False,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Tokens at a time at which a layer has to be faster; may be repeated: 1, 64, 2048 if unset."),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp16; auto: as stored, bf16 for fp32.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="auto, cusparselt or cutlass; auto: the better for each layer.")
    ] = "auto",
    margin: Annotated[float, typer.Option(help="Share that a layer has to be faster by.")] = 0.05,
    revision: Annotated[str | None, typer.Option(help="Hub revision; only for hub names.")] = None,
) -> None:
    """Time a model's 2:4 layers on the GPU here and write which of them to convert. 2:4 is 2 kept of 4."""
    if not semi_structured:
        raise ShearingError(
            "--semi-structured",
            value=False,
            allowed="the one kind of export there is; every other model that is written here is ready for use",
            mend="add --semi-structured",
        )
    from shearing.sparsity.semi_structured.export import BATCHES, export as run

    run(
        model,
        output=output,
        batches=batch or BATCHES,
        precision=precision,
        backend=backend,
        margin=margin,
        revision=revision,
    )


@config.command()
def show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print the fully resolved recipe, each key documented."""
    _print_source(_load(recipe, overrides).to_yaml(), language="yaml")


@config.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check everything that can be checked without loading weights, and say what the run will do."""
    resolved = _load(recipe, overrides)
    from shearing.stages.preflight import preflight, render

    # A budget that is not uniform is fine for mask learning; the summary says what it is not fine for.
    Console().print(render(preflight(resolved, stages=["prune"])))


@config.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    _print_source(json.dumps(Recipe.model_json_schema(), indent=2), language="json")


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
    text_field: Annotated[str | None, _key("Field of the text; `text` if unset.")] = None,
    document_separator: Annotated[
        str | None, _key(r"Divides .txt and .md files into documents; \n is a line break.")
    ] = None,
    separator_token: Annotated[str | None, _key("Token after each document; the tokenizer's own if unset.")] = None,
    heldout: Annotated[
        str | None, _key("Held out of each domain: 5% of its tokens (the default), or '2M tokens'.")
    ] = None,
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
    from data_tools.prepare import prepare as run
    from data_tools.recipe import domains_of_options, load_preparation

    given: dict[str, Any] = {
        "tokenizer": tokenizer,
        "output": output,
        "text_field": text_field,
        "document_separator": document_separator.replace(r"\n", "\n") if document_separator else None,
        "separator_token": separator_token,
        "heldout": heldout,
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


@reference_loss.command("measure")
def measure_reference_loss(
    corpus: Annotated[Path, typer.Option(help="Folder of a prepared corpus.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The loss table (JSON); models are added to it.")],
    model: Annotated[list[str], typer.Option(help="Model folder or hub name; may be repeated.")],
    domain: Annotated[list[str] | None, typer.Option(help="Of the corpus; may be repeated. Unset: all.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of context, as in the recipe.")] = 4096,
    tokens: Annotated[int, typer.Option(help="Held-out tokens per domain.")] = 2_048_000,
    micro_batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
) -> None:
    """Measure models on the held-out text of each domain. An interrupted measurement continues."""
    training = _training(device=device, precision=precision)
    from shearing.stages.reference_loss import measure

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
    resolved = None if recipe is None else _load(recipe, None)
    from shearing.stages.reference_loss import fit

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
    """Write the source model's own loss, which `mixture.reference: source` measures when a run begins."""
    resolved = _load(recipe, overrides)
    from shearing.stages.reference_loss import source

    source(resolved, output=output, console=Console())


@data.command()
def adopt(
    domain: Annotated[list[str], typer.Option(metavar="NAME=PATH", help="A tokenised set; once for each domain.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of the tokenizer that made the tokens.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the corpus.")],
    heldout: Annotated[str, typer.Option(help="How much of each domain is held out: 5% or '2M tokens'.")] = "5%",
    separator_token: Annotated[
        str | None, typer.Option(help="Token after each document; the tokenizer's end-of-sequence token if unset.")
    ] = None,
) -> None:
    """Use sets that are tokenised already, of datatrove, nanotron or `datasets`, where they lie."""
    from data_tools.adoption import adopt as adopt_sets
    from data_tools.tokenisation import domain_table

    pairs = [item.partition("=") for item in domain]
    for item, (name, _, path) in zip(domain, pairs, strict=True):
        if not (name and path):
            raise ShearingError("--domain", value=item, allowed="NAME=PATH", mend="write --domain books=sets/books")
    console = Console(stderr=True)
    corpus = adopt_sets(
        domains={name: Path(path) for name, _, path in pairs},
        tokenizer=tokenizer,
        output=output,
        heldout=heldout,
        separator_token=separator_token,
        console=console,
    )
    Console().print(domain_table(corpus))
    Console().print(f"corpus {corpus.path}", soft_wrap=True, highlight=False)


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
    resolved = None if recipe is None else _load(recipe, None)
    from data_tools.inspection import inspect as look, require_output
    from data_tools.inspection_view import draw, render

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
    rows: Annotated[int, typer.Option(help="Pieces decoded from each split of each domain.")] = 8,
    seed: Annotated[int, typer.Option(help="Chooses them.")] = 0,
) -> None:
    """Read all of a corpus and name every file that is not what it was. Exit code 1 if there is one."""
    from data_tools.verification import render, verify as read_all

    result = read_all(corpus, sources=sources, rows=rows, seed=seed, console=Console(stderr=True))
    Console().print(render(result), soft_wrap=True)
    if result.damages:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app()


def _load(path: Path, overrides: Sequence[str] | None) -> Recipe:
    return load_recipe(path, overrides=overrides or ())


def _training(*, device: str, precision: str) -> TrainingRecipe:
    """Where and how to compute, checked as in a recipe."""
    for field, value in (("device", device), ("precision", precision)):
        choices = get_args(TrainingRecipe.model_fields[field].annotation)
        if value not in choices:
            raise ShearingError(
                f"--{field}", value=value, allowed=", ".join(choices), mend="choose one of them, or leave it out"
            )
    return TrainingRecipe.model_validate({"device": device, "precision": precision})


def _run(path: Path, overrides: Sequence[str] | None, *, stages: Sequence[Stage] | None) -> None:
    # The recipe first: what is wrong with it should not wait for torch.
    try:
        recipe = _load(path, overrides)
    except ShearingError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        # The first process of the host says it; a launcher would kill that one as soon as this one has ended.
        time.sleep(2)
        raise typer.Exit(2) from None
    # Before torch: its C++ warnings of a lost connection come with a page of frames, ahead of our own message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from shearing.stages.run import run

    run(recipe, stages=stages)


def _sparsify_recipe(model: str | None, *, options: dict[str, Any], overrides: Sequence[str] | None) -> SparsifyRecipe:
    from shearing.sparsity.recipe import load_sparsify_recipe, recipe_of_options

    if model is not None and model.endswith((".yaml", ".yml")):
        given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
        return load_sparsify_recipe(Path(model), overrides=[*(overrides or ()), *given])
    return recipe_of_options({"model": model, **options}, overrides=overrides or ())


def _check_sparsity(folder: Path) -> None:
    from shearing.sparsity.check import bytes_to_check, differences
    from shearing.training.metrics import activity

    console = Console()
    with activity(f"checking {folder}", total=bytes_to_check(folder), console=console) as advance:
        found = differences(folder, advance=advance)
    for difference in found:
        typer.echo(difference)
    if found:
        raise typer.Exit(1)
    console.print(f"{folder} is what its manifest says", soft_wrap=True, highlight=False)


def _print_source(text: str, *, language: str) -> None:
    console = Console()
    if console.is_terminal:
        console.print(Syntax(text, language, background_color="default"))
    else:
        typer.echo(text, nl=False)
