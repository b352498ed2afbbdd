"""What a preparation of text is: which files make which domains, and how; YAML, overrides and options of the command.

python -m data_tools.preparation.recipe docs/data.md     rewrites the table of keys inside that file
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from shearing.data.corpus.bos import BosChoice
from shearing.data.corpus.format import require_domain_name
from shearing.data.corpus.splits import SIZE_FORMS, SplitSize, SplitSizes
from shearing.errors import CombinedShearingError, ShearingError
from shearing.settings.document import embed_reference
from shearing.settings.mistakes import located
from shearing.settings.reading import Places, apply_overrides, read_recipe_file
from shearing.settings.section import Section

HUB_PREFIX = "hf:"

Format = Literal["text", "chat"]
SpecialTokens = Literal["letters", "tokens"]
Loss = Literal["all", "answers"]


class DomainSources(Section):
    """What one domain is made of. A path alone, or a list of paths, may stand in place of the section."""

    paths: list[str] = Field(
        description="Files, folders (read recursively), globs (`*`, `**`), URLs that fsspec knows (s3://, gs://, "
        "hf://, https://…), `datasets.save_to_disk` folders, or `hf:OWNER/NAME`, on the Hugging Face hub.",
        min_length=1,
    )
    text_field: str | None = Field(None, description="Field of the text; unset: the recipe's own `text_field`.")
    format: Format | None = Field(None, description="What a document is; unset: the recipe's own `format`.")
    special_tokens: SpecialTokens | None = Field(
        None, description="What special tokens are that texts spell out; unset: the recipe's own `special_tokens`."
    )
    loss: Loss | None = Field(
        None, description="Of chats: which tokens count in a loss; unset: the recipe's own `loss`."
    )
    config: str | None = Field(None, description="Of `hf:` data sets: which configuration; unset: the only one.")
    split: str = Field("train", description="Of `hf:` data sets and of folders with several: which split.")
    revision: str | None = Field(None, description="Of `hf:` data sets: branch, tag or commit; unset: the newest.")
    streaming: bool = Field(
        True, description="Of `hf:` data sets: read over the network instead of downloading all of it first."
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class SlurmSettings(Section):
    """How `executor: slurm` asks for nodes. The folder of the corpus must be one that all nodes see."""

    partition: str | None = Field(None, description="Partition; required with `executor: slurm`.")
    time: str = Field("04:00:00", description="Time limit of each task.")
    cpus_per_task: int = Field(2, ge=1, description="Cores of each task; the tokenizer uses all of them.")
    mem_per_cpu_gb: int = Field(4, ge=1, description="Memory for each core.")
    qos: str | None = Field(None, description="Quality of service.")
    account: str | None = Field(None, description="Account.")
    setup: str | None = Field(
        None,
        description="Shell command that each job runs first, as `module load python`; unset: the environment "
        "that this command runs in is activated.",
    )
    srun: bool = Field(True, description="Start each task with srun inside its job.")


class RaySettings(Section):
    """How `executor: ray` uses a cluster. The folder of the corpus must be one that all nodes see."""

    address: str | None = Field(None, description="Of a running cluster, or `auto`; unset: one on this machine.")
    cpus_per_task: int = Field(1, ge=1, description="Cores of each task; the tokenizer uses all of them.")
    memory_gb: float = Field(1.0, gt=0.0, description="Memory that Ray reserves for each core.")


class PreparationRecipe(Section):
    """A preparation of text."""

    output: Path = Field(description="Folder of the corpus; may hold domains that were prepared earlier.")
    tokenizer: str = Field(description="Folder or hub name of the model's tokenizer.")
    domains: dict[str, DomainSources] = Field(description="Domains by name.", min_length=1)
    text_field: str | None = Field(
        None,
        description="Field of the text in JSON, Parquet and data sets; `data.text` is the field text inside of data. "
        "Unset: text, or messages with `format: chat`.",
    )
    format: Format = Field(
        "text",
        description="What a document is. text: text; chat: a list of messages with role and content, which the "
        "tokenizer's chat template writes.",
    )
    special_tokens: SpecialTokens = Field(
        "letters",
        description="What `<|im_end|>` is where a text or a message spells it out. letters: the letters that it is "
        "written with; tokens: the token, for texts that a chat template has written already.",
    )
    loss: Loss = Field(
        "all",
        description="Of chats: which tokens count in a loss, in training as held out. all; answers: what an assistant "
        "says, and the token that ends its turn.",
    )
    document_separator: str | None = Field(
        None, description="Divides .txt and .md files into documents; unset: each file is one."
    )
    separator_token: str | None = Field(
        None, description="Token put after each document; unset: the tokenizer's end-of-sequence token."
    )
    bos: BosChoice = Field(
        "auto",
        description="The token that begins a text: auto: in front of each document, if the tokenizer puts one in front "
        "of a text; document: in front of each in any case; row: in front of each row that is read; or none.",
    )
    validation: str = Field(
        "5%",
        description="How much of each domain is for what steers a run and for choosing constants: a share of its "
        "tokens (5%) or a number (2M tokens).",
    )
    test: str = Field("5%", description="The same for what judges; no document is in both.")
    split_seed: int = Field(0, ge=0, description="Another one holds out other documents.")
    duplicates: Literal["keep", "remove"] = Field(
        "keep",
        description="Documents of the same text in a domain: counted and kept in one split, or only the first.",
    )
    near_duplicates: Literal["ignore", "together", "remove"] = Field(
        "ignore",
        description="Documents of nearly the same text, found by MinHash over all domains of the preparation: not "
        "looked for, kept in one split, or only the first of them kept.",
    )
    bad_input: Literal["stop", "skip"] = Field(
        "stop", description="A document that cannot be read: an error that names its place, or counted and left out."
    )
    max_document_bytes: int = Field(
        32_000_000, ge=1, description="Longer documents count as bad input; a task needs about 130 times its longest."
    )
    documents_per_file: int | None = Field(
        None, ge=1, description="Read only so many documents of each file or piece of a data set, for a try."
    )
    executor: Literal["local", "slurm", "ray"] = Field("local", description="Where the tasks run.")
    workers: int | None = Field(
        None, ge=1, description="Tasks at a time; unset: as many as there are cores here, with Slurm as it has room."
    )
    task_bytes: int = Field(
        256_000_000, ge=1, description="Small files that follow each other are one task up to this size together."
    )
    slurm: SlurmSettings = SlurmSettings()
    ray: RaySettings = RaySettings()

    @field_validator("domains", mode="before")
    @classmethod
    def _paths_alone(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: {"paths": each} if isinstance(each, (str, list)) else each for name, each in value.items()}

    @field_validator("validation", "test", mode="before")
    @classmethod
    def _size(cls, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(SIZE_FORMS)
        try:
            return str(SplitSize.parse(value))
        except ValueError:
            raise ValueError(SIZE_FORMS) from None

    @property
    def sizes(self) -> SplitSizes:
        """Of the held-out splits."""
        return SplitSizes(SplitSize.parse(self.validation), SplitSize.parse(self.test))

    def domain(self, name: str) -> DomainSources:
        """What a domain is made of, with what it leaves unset as the recipe says it."""
        own = self.domains[name]
        form = own.format or self.format
        field = own.text_field or self.text_field or {"text": "text", "chat": "messages"}[form]
        tokens = own.special_tokens or self.special_tokens
        loss = (own.loss or self.loss) if form == "chat" else "all"
        values = {"format": form, "text_field": field, "special_tokens": tokens, "loss": loss}
        return own.model_copy(update=values)

    @model_validator(mode="after")
    def _without_contradictions(self) -> PreparationRecipe:
        errors = []
        try:
            _ = self.sizes
        except ValueError as error:
            value = f"{self.test}, with validation = {self.validation}"
            errors.append(ShearingError("test", value=value, allowed=str(error), mend="hold out less"))
        for name in self.domains:
            try:
                require_domain_name(name)
            except ShearingError as error:  # noqa: PERF203 (a handful of names)
                errors.append(ShearingError(f"domains.{name}", value=name, allowed=error.allowed, mend=error.mend))
        errors += _without_answers(self)
        if self.executor == "slurm" and self.slurm.partition is None:
            errors.append(
                ShearingError(
                    "slurm.partition",
                    value=None,
                    allowed="a partition of the cluster",
                    mend="`sinfo` lists them: slurm.partition=NAME",
                )
            )
        if self.document_separator == "":
            errors.append(
                ShearingError(
                    "document_separator", value="", allowed="at least one character", mend="leave it unset, or name one"
                )
            )
        if errors:
            raise CombinedShearingError(errors)
        return self


def _without_answers(recipe: PreparationRecipe) -> Iterator[ShearingError]:
    """Answers alone are to count where nobody answers."""
    formats = {name: recipe.domain(name).format for name in recipe.domains}
    wrong = [
        f"domains.{name}.loss"
        for name, each in recipe.domains.items()
        if each.loss == "answers" and formats[name] == "text"
    ]
    if recipe.loss == "answers" and "chat" not in formats.values():
        wrong.append("loss")
    for field in wrong:
        yield ShearingError(
            field,
            value="answers",
            allowed="all, where documents are text: nobody answers in there",
            mend="set format: chat, if documents are messages, or loss: all",
        )


def load_preparation(
    path: Path | None, *, overrides: Sequence[str] = (), options: Mapping[str, tuple[Any, str]] | None = None
) -> PreparationRecipe:
    """Read and validate the recipe of a preparation.

    Args:
        path: YAML file; None: everything is in the options.
        overrides: `dotted.key=value`, values in YAML, applied in order.
        options: of each key set by an option of the command its value and what the user typed; over everything else.

    Raises:
        ShearingError: all errors found, each with its place, its dotted key and the nearest valid key.
    """
    if path is None:
        data: dict[str, Any] = {}
        places = Places("the command")
        apply_overrides(data, overrides, places=places)
    else:
        data, places = read_recipe_file(path, overrides=overrides)
    for key, (value, typed) in (options or {}).items():
        data[key] = value
        places.set_override((key,), text=typed)
    try:
        return PreparationRecipe.model_validate(data)
    except ValidationError as error:
        errors = located(error, model=PreparationRecipe, data=data, places=places)
    raise errors[0] if len(errors) == 1 else CombinedShearingError(errors)


def domains_of_options(options: Sequence[str]) -> dict[str, list[str]]:
    """Paths of each domain out of `NAME=PATH`, in the order of their first naming.

    Raises:
        ShearingError: something of another form.
    """
    domains: dict[str, list[str]] = {}
    for item in options:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ShearingError("--domain", value=item, allowed="NAME=PATH", mend="write --domain books=my/books.jsonl")
        domains.setdefault(name, []).append(path)
    return domains


if __name__ == "__main__":
    file = Path(sys.argv[1])
    document = embed_reference(file.read_text(encoding="utf-8"), model=PreparationRecipe, heading="###")
    file.write_text(document, encoding="utf-8")
