"""`shear export`: a model or any state of a run as a folder for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shearing.cli.frame import app
from shearing.errors import ShearingError, named
from shearing.settings.quantities import BYTES_FORMS, parse_bytes

_TWO_OF_FOUR = "With --semi-structured"


def _hub(text: str, name: str) -> Any:
    return typer.Option(name, help=text, rich_help_panel="To a hub")


def _two_of_four(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_TWO_OF_FOUR)


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run, RUN/pretrain/checkpoints/step-…, a model's folder, or a hub name."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the exported model.")],
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; unset: the source's.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Of the largest file of weights; unset: 5 GB.")] = None,
    vocab_size: Annotated[
        str | None,
        typer.Option(help="Tokens to keep, those that --corpus uses most: a number, or auto for all that it uses."),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="With --vocab-size: a tokenised corpus; unset: that of the run.")
    ] = None,
    gguf: Annotated[
        str | None, typer.Option(help="Write a GGUF file for llama.cpp too: f32, f16, bf16 or q8_0.", metavar="KIND")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision; only for hub names.")] = None,
    push: Annotated[str | None, _hub("Repository to push the folder to, as ORGANISATION/NAME.", "--push")] = None,
    private: Annotated[bool, _hub("A new repository is for its owners alone.", "--private")] = False,
    dry_run: Annotated[
        bool, _hub("Write the folder, say what would be pushed, and push nothing.", "--dry-run")
    ] = False,
    semi_structured: Annotated[
        bool,
        typer.Option(
            "--semi-structured", help="For GPUs that multiply 2:4 matrices faster.", rich_help_panel=_TWO_OF_FOUR
        ),
    ] = False,
    batch: Annotated[
        list[int] | None,
        _two_of_four("Tokens at a time at which a layer has to be faster; may be repeated: 1, 64, 2048 if unset."),
    ] = None,
    precision: Annotated[str | None, _two_of_four("auto, bf16 or fp16; unset: auto, as stored, bf16 for fp32.")] = None,
    backend: Annotated[
        str | None, _two_of_four("auto, cusparselt or cutlass; unset: auto, the better for each layer.")
    ] = None,
    margin: Annotated[float | None, _two_of_four("Share that a layer has to be faster by; unset: 0.05.")] = None,
) -> None:
    """Write a model or any state of a run as a Hugging Face folder, open it and compare logits; push it to a hub.

    With --semi-structured: time a model's 2:4 layers on the GPU here and write which of them to convert. 2:4 is 2 kept
    of 4.
    """
    plain = {"--dtype": dtype, "--shard-size": shard_size, "--gguf": gguf, "--push": push, "--vocab-size": vocab_size}
    _require_with("--vocab-size", vocab_size, options={"--corpus": corpus})
    _require_with("--push", push, options={"--private": private or None, "--dry-run": dry_run or None})
    two_of_four = {"--batch": batch, "--precision": precision, "--backend": backend, "--margin": margin}
    _require_unset(plain if semi_structured else two_of_four, semi_structured=semi_structured)
    if not semi_structured:
        from shearing.models.stored.saving import SHARD_BYTES
        from shearing.runs.export.export import export as write

        write(
            model,
            output=output,
            dtype=dtype,
            shard_bytes=SHARD_BYTES if shard_size is None else _bytes(shard_size),
            revision=revision,
            repository=push,
            private=private,
            dry_run=dry_run,
            gguf=gguf,
            vocab_size=None if vocab_size is None else _vocab_size(vocab_size),
            corpus=corpus,
        )
        return
    from shearing.pruning.sparse.semi_structured.export import BATCHES, MARGIN, export as time_and_write

    with named({"model": "MODEL"}):
        time_and_write(
            model,
            output=output,
            batches=batch or BATCHES,
            precision=precision or "auto",
            backend=backend or "auto",
            margin=MARGIN if margin is None else margin,
            revision=revision,
        )


def _require_with(name: str, value: object, *, options: dict[str, Any]) -> None:
    """Options that mean nothing without another one."""
    for option, given in options.items():
        if value is None and given is not None:
            raise ShearingError(
                option, value=given, allowed=f"nothing without {name}", mend=f"leave it out, or add {name}"
            )


def _require_unset(options: dict[str, Any], *, semi_structured: bool) -> None:
    for option, value in options.items():
        if value not in (None, []):
            raise ShearingError(
                option,
                value=value,
                allowed=f"nothing {'with' if semi_structured else 'without'} --semi-structured",
                mend=f"leave it out, or {'leave out' if semi_structured else 'add'} --semi-structured",
            )


def _vocab_size(text: str) -> int | str:
    if text == "auto":
        return text
    if not (text.isascii() and text.isdigit()):
        raise ShearingError(
            "--vocab-size", value=text, allowed="a number of tokens, or auto", mend="write it as 32768, or leave it out"
        )
    return int(text)


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ShearingError("--shard-size", value=text, allowed=BYTES_FORMS, mend=str(error)) from None
