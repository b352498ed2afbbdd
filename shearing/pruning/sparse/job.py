"""What a one-shot run will do, known and checked before its first expensive step."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from shearing.data.corpus.corpus import Corpus
from shearing.data.documents import DocumentRules
from shearing.errors import ShearingError, key, named
from shearing.files.durable import existing_folder
from shearing.files.full_disk import full_disk_said
from shearing.models.loading import skeleton
from shearing.models.stored.headers import shapes_in_files
from shearing.models.stored.stored_model import Source, dtype_of, open_any
from shearing.models.tokenizer import load_tokenizer
from shearing.pruning.calibration.gradients import gather_gradients, gradient_bytes
from shearing.pruning.calibration.places import Matrix, matrices_in, matrices_of
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration, load_calibration, require_text
from shearing.pruning.sparse.allocation.allocator import require_fit, units_of
from shearing.pruning.sparse.allocation.facts import ALLOCATIONS
from shearing.pruning.sparse.allocation.file import StoredAllocation, read_allocation
from shearing.pruning.sparse.allocation.level_budget import nearest_budget
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.criteria.criterion import Criterion
from shearing.pruning.sparse.criteria.facts import CRITERIA
from shearing.pruning.sparse.patterns import KeptOf, Pattern, is_like, pattern_of, runs_on_2_4, unstructured
from shearing.pruning.sparse.recipe import OneShotRecipe, SparsifyRecipe
from shearing.pruning.sparse.reconstruction import reconstructions, require_valid
from shearing.pruning.sparse.reconstruction.reconstruction import Reconstruction
from shearing.pruning.sparse.search.database import database_bytes
from shearing.settings.neutral import neutral_keys
from shearing.training.device import resolve_device

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEFAULT_SEQLEN = 2048
CHUNK_TOKENS = 8192
UNSTRUCTURED_STEPS = 32
_PLACES = {"model", "revision", "calibration"}
"""Settings that say where something lies: a folder may be moved between two calls."""


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first expensive step.

    Attributes:
        source: the dense model.
        matrices: what is pruned, layer by layer.
        levels: patterns to choose from, sparsest first.
        asked: share of the weights to keep.
        budget: the nearest share that the levels can be mixed to.
        allocation: levels that were chosen earlier, or None.
        criterion, reconstruction: how.
        calibration: None where no text is read.
        fitness: sequences that candidates are compared on, none of them calibration; None unless there is a search.
        compute: where; its folder is the run's.
        seqlen: tokens of a sequence.
        settings: what two runs have in common that may continue each other, JSON-able.
    """

    source: Source
    matrices: list[Matrix]
    levels: list[Pattern]
    asked: Fraction
    budget: Fraction
    allocation: StoredAllocation | None
    criterion: Criterion
    reconstruction: Reconstruction
    calibration: Calibration | None
    fitness: Calibration | None
    compute: Compute
    seqlen: int
    settings: dict[str, Any]

    @property
    def pattern_name(self) -> str:
        """The one pattern, or all that may occur."""
        return "mixed " + ", ".join(map(str, self.levels)) if len(self.levels) > 1 else str(self.levels[0])

    @property
    def pattern_in_words(self) -> str:
        """As a person says it."""
        if len(self.levels) == 1:
            return self.levels[0].in_words
        return f"{100 * float(1 - self.budget):g} % removed in all, {self.levels[0]} to {self.levels[-1]}"


@dataclass(frozen=True, kw_only=True)
class Working:
    """Bytes that are on disk beside models while one of them is made sparse.

    Attributes:
        gradients: of matrices, first of all, until the end.
        streams: what these are computed from, until they are there.
        activations: that are offloaded, after that, until the end.
        levels: of what a search chooses from; they go before anything of the result is written.
        num_levels: how many these are.
    """

    gradients: int = 0
    streams: int = 0
    activations: int = 0
    levels: int = 0
    num_levels: int = 0

    def most(self, *, models: int = 0) -> int:
        """What is there at the same time, at most, with so many bytes of models that are written in the end."""
        return self.gradients + max(self.streams, self.activations + max(self.levels, models))

    @property
    def parts(self) -> dict[str, int]:
        """All that is there at some time, by what it is of."""
        parts = {
            "gradients": self.gradients + self.streams,
            "activations": self.activations,
            f"{self.num_levels} levels to choose from": self.levels,
        }
        return {what: size for what, size in parts.items() if size}


def prepare(
    recipe: SparsifyRecipe,
    *,
    folder: Path,
    tokenizer: Any = None,
    corpus: Corpus | None = None,
    documents: DocumentRules | None = None,
) -> Job:
    """Check a recipe against the model, the text and the machine.

    Args:
        recipe: what to do.
        folder: of the run's own files.
        tokenizer: the model's, where it is loaded already.
        corpus: the calibration's, where it is open already; see `load_calibration`.
        documents: what their ends mean in it; see `load_calibration`.

    Raises:
        ShearingError: something the user can mend.
    """
    device = resolve_device(recipe.device)
    with full_disk_said(lambda: no_room(folder, what="the model once more, in safetensors files")):
        source = open_any(
            recipe.model, revision=recipe.revision, converted=folder / "source", towers=recipe.include_towers
        )
    matrices = _selected(_matrices(source, recipe=recipe), recipe=recipe)
    allocation = read_allocation(recipe.allocation, source=source) if isinstance(recipe.allocation, Path) else None
    levels, asked, budget = _levels(recipe, allocation=allocation, matrices=matrices)
    seqlen = _seqlen(recipe, config=source.config)
    calibration, fitness = _texts(
        recipe, source=source, seqlen=seqlen, tokenizer=tokenizer, corpus=corpus, documents=documents
    )
    dtype = torch.float32 if device.type == "cpu" else dtype_of(source, matrices[0].name)
    if recipe.precision != "auto":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision]
    chunk = recipe.micro_batch_size or max(1, CHUNK_TOKENS // seqlen)
    return Job(
        source=source,
        matrices=matrices,
        levels=levels,
        asked=asked,
        budget=budget,
        allocation=allocation,
        criterion=criteria()[recipe.criterion],
        reconstruction=reconstructions()[recipe.resolved_reconstruction],
        calibration=calibration,
        fitness=fitness,
        compute=Compute(device, dtype, chunk, recipe.offload, folder),
        seqlen=seqlen,
        settings=_settings(recipe, source=source, calibration=calibration, allocation=allocation, seqlen=seqlen),
    )


def require_possible(recipe: SparsifyRecipe, *, config: PretrainedConfig, sizes_known: bool) -> list[Pattern]:
    """Check what can be of a recipe before there is the model, of which no weights are needed for it.

    Args:
        recipe: what to do, with a model of a declared family.
        config: of the model.
        sizes_known: whether it is of these sizes; otherwise its modules have names as here, and sizes of their own.

    Returns:
        Levels that matrices may get, sparsest first.

    Raises:
        ShearingError: see `prepare`; but for whose an allocation file is, and what is in calibration text.
    """
    _seqlen(recipe, config=config)
    matrices = _selected(matrices_in(config, shapes=shapes_in_files(skeleton(config))), recipe=recipe)
    allocation = read_allocation(recipe.allocation, source=None) if isinstance(recipe.allocation, Path) else None
    return _levels(recipe, allocation=allocation, matrices=matrices if sizes_known else None)[0]


def require_calibration(recipe: SparsifyRecipe, *, config: PretrainedConfig, corpus: Corpus | None = None) -> None:
    """Check what can be of calibration text before the model is there: see `require_text`.

    Args:
        recipe: what to do.
        config: of the model.
        corpus: the calibration's, where it is open already; see `load_calibration`.
    """
    if recipe.needs_text:
        require_text(
            recipe.calibration or [],
            vocab_size=config.get_text_config(decoder=True).vocab_size,
            samples=recipe.samples + _fitness_samples(recipe),
            seqlen=_seqlen(recipe, config=config),
            corpus=corpus,
        )


def require_same(earlier: dict[str, Any], now: dict[str, Any], *, where: Path) -> None:
    """Raises `ShearingError` unless two runs have the same `settings`; `where` is what the earlier one left.

    Where model and text lie does not matter: what they are stands beside it.
    """
    keys = (earlier.keys() | now.keys()) - _PLACES
    changed = sorted(key for key in keys if earlier.get(key) != now.get(key))
    if changed:
        raise ShearingError(
            "output",
            value=str(where),
            allowed="a new folder, or one of the same run; what differs: "
            + "; ".join(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}" for key in changed),
            mend=f"choose another output, take those values back, or remove {where}",
        )


def disk_bytes(job: Job) -> int:
    """What is on disk at the same time, at most; in the end the result, and its layers once more until it is whole."""
    return working(job).most(models=2 * job.source.weight_bytes())


def working(job: Job) -> Working:
    """What it needs on disk beside its models."""
    activations, gradients, streams, num_levels, levels = 0, 0, 0, 0, 0
    if job.calibration is not None and job.compute.offload == "disk":
        width = job.source.config.get_text_config(decoder=True).hidden_size
        activations = job.calibration.tokens.numel() * width * job.compute.dtype.itemsize
    if job.calibration is not None and "gradients" in job.criterion.needs:
        gradients, streams = gradient_bytes(
            job.source, matrices=job.matrices, calibration=job.calibration, compute=job.compute
        )
    if job.fitness is not None:
        num_levels = len(job.levels)
        levels = database_bytes(
            levels=num_levels,
            weights=sum(matrix.size for matrix in job.matrices),
            stored_bytes=job.source.bytes_of(matrix.name for matrix in job.matrices),
            changes=bool(job.reconstruction.needs),
        )
    return Working(gradients=gradients, streams=streams, activations=activations, levels=levels, num_levels=num_levels)


def gather(job: Job, *, console: Console) -> None:
    """Gradients, if the criterion needs any: all that is learned of the dense model before levels are chosen."""
    if job.calibration is not None and "gradients" in job.criterion.needs:
        gather_gradients(
            job.source, matrices=job.matrices, calibration=job.calibration, compute=job.compute, console=console
        )


def no_room(folder: Path, *, what: str) -> ShearingError:
    """That the disk under `folder`, which is a run's own, is too small for `what`."""
    return ShearingError(
        "output",
        value=f"{folder.parent}, with {shutil.disk_usage(existing_folder(folder)).free / 1e9:.2f} GB free",
        allowed=f"a disk with room for {what}",
        mend="free space and run the same command again, or choose an output on another disk",
    )


def levels_of(recipe: OneShotRecipe) -> list[Pattern]:
    """Patterns to choose from, sparsest first; one where the allocation is uniform and no levels are given.

    Args:
        recipe: whose allocation is no file.

    Raises:
        ShearingError: two levels keep the same share, or none is what the hardware runs.
    """
    if recipe.levels is not None:
        levels = [pattern_of(text) for text in recipe.levels]
    elif recipe.allocation == "uniform":
        assert recipe.budget is not None
        levels = [
            unstructured(1 - recipe.budget, group=recipe.resolved_group)
            if recipe.kept_of is None
            else KeptOf(*recipe.kept_of)
        ]
    elif recipe.kept_of is not None:
        levels = [KeptOf(kept, recipe.kept_of[1]) for kept in range(1, recipe.kept_of[1] + 1)]
    else:
        shares = (Fraction(step, UNSTRUCTURED_STEPS) for step in range(1, UNSTRUCTURED_STEPS))
        levels = [unstructured(share, group=recipe.resolved_group) for share in shares]
    if recipe.hardware is not None:
        fitting = [level for level in levels if runs_on_2_4(level)]
        if not fitting:
            raise _not_on_hardware(recipe, levels, mend="set levels: 1:8,2:8, or pattern: 2:4")
        levels = fitting
    levels.sort(key=lambda level: level.density)
    for sparser, denser in pairwise(levels):
        if sparser.density == denser.density:
            raise ShearingError(
                "levels",
                value=f"{sparser} and {denser}",
                allowed="levels that keep different shares",
                mend=f"leave {denser} out",
            )
    return levels


def _levels(
    recipe: SparsifyRecipe, *, allocation: StoredAllocation | None, matrices: Sequence[Matrix] | None
) -> tuple[list[Pattern], Fraction, Fraction]:
    """Levels, sparsest first, the share to keep that was asked for, and the nearest that they can be mixed to.

    Args:
        allocation: levels that were chosen earlier, or None.
        matrices: what is pruned; None where their sizes are not known yet, which then cannot be at odds with levels.
    """
    if allocation is not None:
        levels = sorted(set(allocation.patterns.values()), key=lambda level: level.density)
        asked = budget = recipe.budget or allocation.budget
        if recipe.pattern is not None:
            _require_like(levels, pattern=recipe.pattern)
        if matrices is not None:
            require_fit(allocation.patterns, matrices=matrices, budget=budget)
        if recipe.hardware is not None and (others := [level for level in levels if not runs_on_2_4(level)]):
            raise _not_on_hardware(recipe, others, mend="allocate again with hardware: 2:4")
    else:
        levels = levels_of(recipe)
        assert recipe.budget is not None
        asked = budget = recipe.budget
        if len(levels) > 1 and matrices is not None:
            budget = nearest_budget(units_of(matrices, unit=recipe.unit), levels=levels, budget=asked)
    criterion, reconstruction = criteria()[recipe.criterion], reconstructions()[recipe.resolved_reconstruction]
    for level in levels:
        require_valid(criterion, reconstruction=reconstruction, pattern=level)
        for matrix in (matrices or ()) if allocation is None else ():
            with named({} if recipe.levels is None else {"pattern": "levels"}):
                level.check(rows=matrix.rows, columns=matrix.columns, name=matrix.name)
    return levels, asked, budget


def _require_like(levels: Sequence[Pattern], *, pattern: str) -> None:
    if others := [str(level) for level in levels if not is_like(str(level), pattern)]:
        raise ShearingError(
            "pattern",
            value=pattern,
            allowed=f"unset with an allocation file that has other kinds of levels: {', '.join(others[:3])}",
            mend="remove pattern, or run `shear allocate` with it",
        )


def _not_on_hardware(recipe: OneShotRecipe, levels: Sequence[Pattern], *, mend: str) -> ShearingError:
    return ShearingError(
        "hardware",
        value=recipe.hardware,
        allowed=f"levels whose masks are 2:4 masks, which none of {', '.join(map(str, levels))} is",
        mend=f"{mend}, or remove hardware",
    )


def _texts(
    recipe: SparsifyRecipe,
    *,
    source: Source,
    seqlen: int,
    tokenizer: Any,
    corpus: Corpus | None,
    documents: DocumentRules | None,
) -> tuple[Calibration | None, Calibration | None]:
    if not recipe.needs_text:
        return None, None
    more = _fitness_samples(recipe)
    text = load_calibration(
        recipe.calibration or [],
        tokenizer=tokenizer or load_tokenizer(str(source.folder)),
        vocab_size=source.config.get_text_config(decoder=True).vocab_size,
        samples=recipe.samples,
        seqlen=seqlen,
        seed=recipe.seed,
        text_field=recipe.text_field,
        corpus=corpus,
        bos=recipe.bos,
        documents=documents,
        more=more,
    )
    of_losses = {name for name, facts in ALLOCATIONS.items() if facts.reads_loss}
    if "gradients" not in CRITERIA[recipe.criterion].needs and recipe.allocation not in of_losses:
        text = dataclasses.replace(text, counted=None)  # it changes nothing, so it is none of the settings
    return text.part(slice(recipe.samples)), text.part(slice(recipe.samples, None)) if more else None


def _fitness_samples(recipe: SparsifyRecipe) -> int:
    return recipe.search.fitness_samples if recipe.allocation == "msp" else 0


def _settings(
    recipe: SparsifyRecipe,
    *,
    source: Source,
    calibration: Calibration | None,
    allocation: StoredAllocation | None,
    seqlen: int,
) -> dict[str, Any]:
    neutral = neutral_keys(SparsifyRecipe)
    settings = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in neutral}
    return {
        **settings,
        "allocation": settings["allocation"] if allocation is None else allocation.fingerprint,
        "seqlen": seqlen,
        "group": None if recipe.kept_of else recipe.resolved_group,
        "reconstruction": recipe.resolved_reconstruction,
        "source_files": source.identity,
        "calibration_fingerprint": None if calibration is None else calibration.fingerprint,
    }


def _matrices(source: Source, *, recipe: SparsifyRecipe) -> list[Matrix]:
    """What may be pruned; of a model that no family declares its decoder layers, where layers are walked through.

    Raises:
        ShearingError: the recipe wants of such a model what takes more than its structure tells.
    """
    matrices, structure = matrices_of(source), source.structure
    if structure is None:
        return matrices
    if recipe.evaluate is not None and structure.layers is None:
        raise ShearingError(
            "evaluate",
            value=str(recipe.evaluate),
            allowed=f"unset, for {type(structure.model).__name__}, which is no model that predicts text by layers that "
            "can be walked through one after the other",
            mend="leave evaluate out",
        )
    if not recipe.needs_text and recipe.allocation != "depth":
        return matrices
    field = "criterion" if recipe.pruning_reads_text else "allocation"
    others = {
        "criterion": "what reads no text, as magnitude",
        "allocation": "uniform, alpha, or redundancy by magnitude",
    }

    def refused(why: str) -> ShearingError:
        return ShearingError(
            field,
            value=str(getattr(recipe, field)),
            allowed=f"{others[field]}: {why}",
            mend="choose criterion magnitude with such an allocation",
        )

    if structure.layers is None:
        raise refused(
            f"{type(structure.model).__name__} is no model that predicts text by layers which can be walked through "
            "one after the other"
        )
    if recipe.include_towers and structure.towers:
        raise ShearingError(
            "include_towers",
            value=True,
            allowed=f"false with {field} {getattr(recipe, field)}: text goes through the text's layers alone, and not "
            f"through {', '.join(structure.towers)}",
            mend="set include_towers=false, or choose criterion magnitude with allocation uniform or alpha",
        )
    architecture = repr(source.config.model_type)
    if missing := structure.not_stored():
        raise refused(
            f"for text to go through the layers of {architecture}, its files have to have {', '.join(missing[:3])}, or "
            "what transformers makes it of"
        )
    members = [
        {linear.member for linear in structure.linears if linear.block == layer}
        for layer in range(structure.num_layers)
    ]
    if unlike := next((layer for layer, found in enumerate(members) if found != members[0]), None):
        raise refused(
            f"layers of {architecture} are not alike, {unlike} has other linear layers than 0: "
            f"{', '.join(sorted(members[0] ^ members[unlike])[:5])}"
        )
    return [matrix for matrix in matrices if matrix.layer < structure.num_layers]


def _selected(matrices: Sequence[Matrix], *, recipe: SparsifyRecipe) -> list[Matrix]:
    """The matrices whose modules `include` names and `exclude` does not."""
    modules = {matrix.name.removesuffix(".weight"): matrix for matrix in matrices}
    for field, patterns in (("include", recipe.include or []), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in modules):
                first = next(iter(modules))
                raise ShearingError(
                    field,
                    value=pattern,
                    allowed=f"a pattern of linear layers inside decoder layers, as {first} or "
                    f"*.{first.rpartition('.')[2]}; embedding and head are never pruned",
                    mend="check the name; * stands for any text",
                )
    included = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in recipe.include or ["*"])]
    chosen = [name for name in included if not any(fnmatchcase(name, pattern) for pattern in recipe.exclude)]
    if not chosen:
        raise ShearingError(
            "exclude",
            value=recipe.exclude,
            allowed="patterns that leave something to prune",
            mend="exclude less, or include more",
        )
    return [modules[name] for name in chosen]


def _seqlen(recipe: SparsifyRecipe, *, config: PretrainedConfig) -> int:
    text = config.get_text_config(decoder=True)
    longest: int = getattr(text, "max_position_embeddings", None) or recipe.seqlen or DEFAULT_SEQLEN
    if recipe.seqlen is not None and recipe.seqlen > longest:
        raise ShearingError(
            "seqlen",
            value=recipe.seqlen,
            allowed=f"at most {longest}, what the model can read (max_position_embeddings)",
            mend=f"set {key('seqlen')}={min(longest, DEFAULT_SEQLEN)}",
        )
    return recipe.seqlen or min(longest, DEFAULT_SEQLEN)
