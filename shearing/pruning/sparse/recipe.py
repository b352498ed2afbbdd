"""What `shear sparsify` does, as a file or as options of the command: typed, documented, validated.

python -m shearing.pruning.sparse.recipe docs/sparsity.md     rewrites the table of keys inside that file
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, ValidationError, model_validator
from typing_extensions import Self

from shearing.data.corpus.bos import BosChoice
from shearing.errors import CombinedShearingError, ShearingError
from shearing.pruning.sparse.allocation.facts import ALLOCATIONS, RULES, STARTS, AllocationName, RuleName
from shearing.pruning.sparse.criteria.facts import CRITERIA, CriterionName
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS, Group, ReconstructionName
from shearing.settings.document import embed_reference
from shearing.settings.mistakes import located
from shearing.settings.neutral import Neutral
from shearing.settings.reading import Places, apply_overrides, read_recipe_file
from shearing.settings.section import Section


def _pattern(value: object) -> object:
    # YAML 1.1 takes 2:4 for 2 minutes and 4 seconds, 124; nobody writes a pattern as one number.
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        return f"{value // 60}:{value % 60}"
    return value


def _levels(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _unless_set(defaults: Mapping[str, str]) -> str:
    """'row for wanda and gblm, or layer': what criteria have by default, the commonest last."""
    commonest = Counter(defaults.values()).most_common(1)[0][0]
    criteria: dict[str, list[str]] = {}
    for criterion, default in defaults.items():
        criteria.setdefault(default, []).append(criterion)
    others = [f"{default} for {' and '.join(names)}" for default, names in criteria.items() if default != commonest]
    return f"{', '.join(others)}, or {commonest}"


def _groups_of_reconstructions() -> str:
    """'layer with admm and alps, row with dsnot': what reconstructions have of their own."""
    groups: dict[str, list[str]] = {}
    for name, facts in RECONSTRUCTIONS.items():
        if facts.group is not None:
            groups.setdefault(facts.group, []).append(name)
    return ", ".join(f"{group} with {', '.join(names)}" for group, names in groups.items())


def _without_text() -> str:
    """'magnitude with reconstruction none': what reads no text."""
    criteria = [name for name, facts in CRITERIA.items() if not facts.needs]
    ways = [name for name, facts in RECONSTRUCTIONS.items() if not facts.needs]
    return f"{', '.join(criteria)} with reconstruction {' or '.join(ways)}"


PatternText = Annotated[str, BeforeValidator(_pattern)]


class SearchKeys(Section):
    """The evolutionary search of msp."""

    population: int = Field(24, ge=2, description="Candidates that survive a generation.")
    offspring: int = Field(24, ge=1, description="New candidates in a generation.")
    generations: int = Field(20, ge=0, description="Rounds; 0: the best of the first population.")
    crossover: float = Field(0.3, ge=0.0, le=1.0, description="Share of new candidates that have two parents.")
    more_swaps: float = Field(
        0.5,
        ge=0.0,
        lt=1.0,
        description="Of the others, the chance of one more paired swap after each: 0: one, 0.5: two on average.",
    )
    fitness: Literal["loss", "kl"] = Field(
        "loss", description="loss: next-token cross-entropy; kl: divergence from the dense model's predictions."
    )
    fitness_samples: int = Field(
        16, ge=1, description="Sequences that candidates are compared on; other rows than the calibration's."
    )
    training_steps: int = Field(
        0,
        ge=0,
        description="Steps for which a candidate is trained under its masks before it is compared, so that what "
        "training mends does not count against it; 0: none. Each costs about three passes.",
    )
    training_learning_rate: float = Field(1e-5, gt=0.0, description="Of these steps, of Adam.")
    training_batch: int = Field(4, ge=1, description="Calibration sequences of one of these steps.")
    starts: list[RuleName] = Field(
        STARTS,
        description="Rules whose allocations join the first population, so that none is better on those sequences.",
    )


class AllocationKeys(Section):
    """How the budget is shared out."""

    allocation: AllocationName | Path = Field(
        "uniform",
        description=f"How the budget is shared out: uniform; {', '.join(RULES)}: rules; msp: search; or the "
        "allocation.json of an earlier run or of `shear allocate`.",
    )
    levels: Annotated[list[PatternText], BeforeValidator(_levels)] | None = Field(
        None,
        min_length=1,
        description="Patterns to choose from, as 1:8,2:8,4:8. Unset: with `pattern` N:M, 1:M to M:M; unstructured, "
        "every 32nd.",
    )
    unit: Literal["block", "matrix"] = Field(
        "block", description="What has a level of its own: a decoder layer, or each matrix."
    )
    hardware: Literal["2:4"] | None = Field(
        None, description="2:4: only levels that sparse tensor cores run, at most 2 kept of each aligned 4."
    )
    spread: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="How far rules go from the mean: alpha: its epsilon; the others: sparsity to either side. "
        "Unset: as published, where that is known.",
    )
    outlier_ratio: float = Field(
        5.0, gt=1.0, description="owl, redundancy: an outlier's score is this many times the mean."
    )
    labels: Literal["true", "sampled"] = Field(
        "true",
        description="rank, msp: labels of the Fisher trace; true: the text's own next tokens; sampled: drawn from the "
        "model's predictions.",
    )
    search: SearchKeys = Field(SearchKeys(), description="Of msp.")

    @property
    def allocation_reads_text(self) -> bool:
        """Whether choosing levels needs calibration text."""
        return not isinstance(self.allocation, Path) and ALLOCATIONS[self.allocation].reads_text

    @property
    def allocation_reads_loss(self) -> bool:
        """Whether levels go by losses, for which the model is loaded whole."""
        return not isinstance(self.allocation, Path) and ALLOCATIONS[self.allocation].reads_loss


class _Folders(Section):
    """First, so that the reference of keys begins with them."""

    model: str = Field(description="Folder or hub name of a Hugging Face causal language model.")
    revision: str | None = Field(None, description="Hub revision; only for hub names.")
    output: Neutral[Path] = Field(
        description="Folder of the sparse model; of `shear allocate`: the file, as allocation.json."
    )


class OneShotRecipe(AllocationKeys):
    """One-shot sparsity, whatever the model and wherever it goes. N:M means N kept of M."""

    criterion: CriterionName = Field(description="What scores the weights.")
    sparsity: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        validation_alias=AliasChoices("sparsity", "target"),
        description="Share of weights removed: from each matrix, or on the whole where levels differ. Also `target`.",
    )
    pattern: PatternText | None = Field(
        None,
        description="N:M, N kept of each M consecutive inputs, M a divisor of the inputs: 2:4 for sparse tensor cores. "
        "Unset: unstructured, at `sparsity`.",
    )
    group: Group | None = Field(
        None,
        description="Unstructured only: which weights compete. row: those of an output; layer: those of a matrix; "
        "cumulative: rows lose the same share of their total score (Wanda's variant). Not with levels, or those of a "
        "file, which say it themselves. Unset: "
        f"{_groups_of_reconstructions()}; else "
        f"{_unless_set({name: facts.group for name, facts in CRITERIA.items()})}.",
    )
    reconstruction: ReconstructionName | None = Field(
        None,
        description="What is done about removed weights. obs: kept ones make up for them, column by column; admm: all "
        "at once, nearly the optimum; closed_form: the optimum; admm_gradual: the same while the mask is chosen anew; "
        "alps: while it is searched; dsnot: the mask is moved until outputs keep their means. Unset: "
        f"{_unless_set({name: facts.reconstruction for name, facts in CRITERIA.items()})}.",
    )
    calibration: list[Path] | None = Field(
        None,
        description="Folder of a prepared corpus, or files of text: .txt, .json, .jsonl, .parquet, also .gz and .zst; "
        f"not needed for {_without_text()}. Unset in a run: data.corpus.",
    )
    text_field: str = Field(
        "text", description="Of calibration files with documents (JSON, Parquet): field of the text; data.text: nested."
    )
    samples: int = Field(128, ge=1, description="Sequences of calibration text.")
    seqlen: int | None = Field(
        None, ge=2, description="Tokens of a sequence. Unset: 2048, or what the model can read if that is less."
    )
    bos: Neutral[BosChoice] = Field(
        "auto",
        description="How texts begin: auto: with the token that the model's tokenizer puts in front of a text, if any; "
        "document or row: with one in front of each; or none. A corpus that begins its texts otherwise is refused. "
        "auto in a run: data.bos.",
    )
    damping: float = Field(
        0.01, gt=0.0, le=1.0, description="Share of its mean diagonal that is added to the inputs' second moment."
    )
    true_sequential: bool = Field(
        False,
        description="Inside a layer, prune in the order query/key/value, attention output, gate/up, down, each seeing "
        "those before it pruned; four passes over the text instead of one.",
    )
    include: list[str] | None = Field(
        None, description="Patterns of module names to prune, as '*.down_proj' or 'model.layers.0.*'; unset: all."
    )
    exclude: list[str] = Field([], description="Patterns of module names to leave dense.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Of activations; auto: as the model is stored on a GPU, fp32 on a CPU."
    )
    micro_batch_size: Neutral[int | None] = Field(
        None, ge=1, description="Sequences on the device at a time. Unset: as many as make 8192 tokens, at least one."
    )
    offload: Neutral[Literal["none", "cpu", "disk"]] = Field(
        "cpu", description="Where activations wait between layers; none: on the device; disk: in a file beside output."
    )

    @model_validator(mode="after")
    def _without_contradictions(self) -> Self:
        if errors := list(self._contradictions()):
            raise CombinedShearingError(errors)
        return self

    def _contradictions(self) -> Iterator[ShearingError]:
        yield from _contradictions(self)

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """N and M of an N:M pattern; None where unstructured."""
        if self.pattern is None:
            return None
        kept, _, of = self.pattern.partition(":")
        return int(kept), int(of)

    @property
    def budget(self) -> Fraction | None:
        """Share of weights kept; None where only an allocation says it."""
        if self.kept_of is not None:
            return Fraction(*self.kept_of)
        return None if self.sparsity is None else 1 - Fraction(str(self.sparsity))

    @property
    def resolved_group(self) -> Group:
        """The group, as published for the reconstruction, or else for the criterion, if it is unset."""
        published = RECONSTRUCTIONS[self.resolved_reconstruction].group or CRITERIA[self.criterion].group
        return self.group or published

    @property
    def resolved_reconstruction(self) -> ReconstructionName:
        """The reconstruction, as published for the criterion if it is unset."""
        return self.reconstruction or CRITERIA[self.criterion].reconstruction

    @property
    def pruning_reads_text(self) -> bool:
        """Whether pruning itself needs calibration text."""
        return bool(CRITERIA[self.criterion].needs | RECONSTRUCTIONS[self.resolved_reconstruction].needs)

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is read."""
        return self.pruning_reads_text or self.allocation_reads_text


class SparsifyRecipe(OneShotRecipe, _Folders):
    """One-shot sparsity of one model. N:M means N kept of M."""

    include_towers: bool = Field(
        False, description="Of a multimodal model also the towers for images and sound, not its text's layers alone."
    )
    seed: int = Field(0, ge=0, description="Draws the calibration text.")
    device: Neutral[Literal["auto", "cpu", "cuda"]] = Field("auto", description="auto: a GPU if there is one.")
    evaluate: Neutral[Path | None] = Field(None, description="Corpus on whose test text dense and sparse are compared.")
    evaluate_tokens: Neutral[int] = Field(65_536, ge=2, description="Held-out tokens per domain.")

    def _contradictions(self) -> Iterator[ShearingError]:
        yield from super()._contradictions()
        if self.needs_text and not self.calibration:
            reads = (
                f"{self.criterion} with reconstruction {self.resolved_reconstruction} looks at the inputs of each layer"
            )
            if not self.pruning_reads_text:
                reads = f"allocation {self.allocation} reads text"
            yield ShearingError(
                "calibration",
                value=None,
                allowed="the folder of a prepared corpus, or files of text",
                mend=f"{reads}: say on which text",
            )


COMPONENT_NAMES: Mapping[str, str] = {"source": "model"}
"""What components that load a model call, by these keys."""


def load_sparsify_recipe(path: Path, *, overrides: Sequence[str] = ()) -> SparsifyRecipe:
    """Read and validate a file of `shear sparsify`; see `load_recipe`."""
    data, places = read_recipe_file(path, overrides=overrides)
    return _validated(data, places=places)


def recipe_of_options(options: Mapping[str, Any], *, overrides: Sequence[str] = ()) -> SparsifyRecipe:
    """The recipe that options of the command line spell; those that are None were not given.

    Args:
        options: key -> value.
        overrides: `key=value` on top, values in YAML.

    Raises:
        ShearingError: all errors found, each with the option at fault.
    """
    places = Places("command line")
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        places.set_override((name,), text=f"--{name.replace('_', '-')} {value}")
    apply_overrides(given, overrides, places=places)
    return _validated(given, places=places)


def _validated(data: dict[str, Any], *, places: Places) -> SparsifyRecipe:
    try:
        return SparsifyRecipe.model_validate(data)
    except ValidationError as error:
        errors = located(error, model=SparsifyRecipe, data=data, places=places)
    raise errors[0] if len(errors) == 1 else CombinedShearingError(errors)


def _contradictions(recipe: OneShotRecipe) -> Iterator[ShearingError]:
    if recipe.sparsity is None and recipe.pattern is None and not isinstance(recipe.allocation, Path):
        yield ShearingError(
            "sparsity",
            value=None,
            allowed="a share of weights to remove, or a pattern N:M (N kept of M)",
            mend="say how much goes: sparsity: 0.5, or pattern: 2:4",
        )
    if recipe.pattern is not None:
        yield from _pattern_contradictions(recipe, pattern=recipe.pattern)
    yield from _level_contradictions(recipe)


def _level_contradictions(recipe: OneShotRecipe) -> Iterator[ShearingError]:
    from_file = isinstance(recipe.allocation, Path)
    if recipe.levels is not None and from_file:
        yield ShearingError(
            "levels",
            value=recipe.levels,
            allowed="unset where a file says which matrix has which level",
            mend="remove levels, or choose levels anew with allocation: msp",
        )
    if recipe.group is not None and recipe.pattern is None and (recipe.levels is not None or from_file):
        given = "an allocation file" if from_file else "levels"
        yield ShearingError(
            "group",
            value=recipe.group,
            allowed=f"unset with {given}: each level says which weights compete",
            mend="remove group" if from_file else f"remove group, and write levels as '{recipe.group} 0.5'",
        )
    if recipe.levels is None:
        return
    # Late: a recipe is read, and mistakes in it are said, without waiting for torch.
    from shearing.pruning.sparse.patterns import is_like, is_pattern

    for text in recipe.levels:
        if not is_pattern(text):
            yield ShearingError(
                "levels",
                value=text,
                allowed="N:M, N kept of each M consecutive inputs, or row, layer or cumulative and a share",
                mend="write 1:8,2:8,4:8",
            )
    pattern, patterns = recipe.pattern, [text for text in recipe.levels if is_pattern(text)]
    if pattern is None or not is_pattern(pattern):
        return
    if unlike := [text for text in patterns if not is_like(text, pattern)]:
        yield ShearingError(
            "levels",
            value=", ".join(unlike),
            allowed=f"N:{pattern.partition(':')[2]} with pattern {pattern}",
            mend="remove pattern and say by sparsity how much goes, or give levels of that M",
        )


def _pattern_contradictions(recipe: OneShotRecipe, *, pattern: str) -> Iterator[ShearingError]:
    kept, _, of = pattern.partition(":")
    if not (kept.isdecimal() and of.isdecimal() and 1 <= int(kept) <= int(of)):
        yield ShearingError(
            "pattern",
            value=pattern,
            allowed="N:M, N kept of each M consecutive inputs, 1 ≤ N ≤ M",
            mend="write 2:4 to keep 2 of 4; for unstructured sparsity give sparsity alone",
        )
        return
    removed = 1 - Fraction(int(kept), int(of))
    if recipe.sparsity is not None and Fraction(str(recipe.sparsity)) != removed:
        yield ShearingError(
            "sparsity",
            value=recipe.sparsity,
            allowed=f"{float(removed):g}, which is what {pattern} removes ({kept} kept of {of})",
            mend="give sparsity or pattern alone",
        )
    if recipe.group is not None:
        yield ShearingError(
            "group",
            value=recipe.group,
            allowed=f"unset with an N:M pattern: weights compete within each group of {of} inputs of a row",
            mend="remove group, or give sparsity instead of pattern",
        )


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(embed_reference(file.read_text(encoding="utf-8"), model=SparsifyRecipe), encoding="utf-8")
