"""What continued pretraining starts from: the sparse model of the run, the cut one, or the source itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from shearing.data.documents import Documents
from shearing.data.mixture.sampler import Batch
from shearing.errors import ShearingError, named
from shearing.files.tensors import read_tensors, write_tensors
from shearing.models.attention import attention_within_documents
from shearing.models.loading import load_config, skeleton
from shearing.models.stored.companions import folder_of
from shearing.models.stored.expert_files import whole_masks
from shearing.models.stored.paging.places import Place, give_places, place_of
from shearing.models.stored.saving import DTYPES
from shearing.models.stored.stored_model import dtype_of_weights
from shearing.objectives.language_model import LanguageModelLoss
from shearing.objectives.objective import PARAMETER_PREFIX, Losses
from shearing.pruning.sparse.stored.masks import EARLIER_NAME, FILE_NAME, read_masks
from shearing.pruning.sparse.stored.trained import groups_of, masks_beside
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import first_source
from shearing.runs.names import ADAPTER_NAMES
from shearing.runs.stages.source_model import open_files
from shearing.settings.quantities import Duration
from shearing.training.adapters.adapted import (
    ADAPTER,
    AdaptedLinear,
    adapted_layers,
    linear_layers,
    merge_in_place,
    require_dropped_in,
)
from shearing.training.adapters.lora import add_adapters, merge_adapters
from shearing.training.adapters.recipe import AdapterRecipe, LoraRecipe, SpeftRecipe, SppRecipe, adapter_name
from shearing.training.adapters.speft import add_deltas, choose, read_chosen, saliences, write_chosen
from shearing.training.adapters.spp import add_factors
from shearing.training.checkpoints.checkpoints import checkpoints_in
from shearing.training.checkpoints.pieces import SET_ASIDE, WEIGHT, ShardedState
from shearing.training.checkpoints.state import seed_random
from shearing.training.engines.moving_masks import MovingMasks, MovingMatrix, MovingSchedule
from shearing.training.recipe import AstRecipe, PretrainRecipe

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Start:
    """A model to train.

    Attributes:
        source, revision: its folder, or its name and revision on the hub.
        folder: where its config, tokenizer and masks are.
        masks: of a sparse model; None for a dense one.
        dense: where what the masks drop is still there: folder, or name and revision; None: nowhere.
        salient: file of the weights that are changed, where few are; it appears before adapters are made.
    """

    source: str
    revision: str | None
    folder: Path
    masks: Path | None
    dense: tuple[str, str | None] | None = None
    salient: Path | None = None

    @classmethod
    def of(cls, context: RunContext) -> Start:
        """What the stages before have left.

        Raises:
            ShearingError: masks without manifest, or the other way round.
        """
        recipe, run = context.recipe, context.directory
        source, revision = recipe.model.source, recipe.model.revision
        dense: tuple[str, str | None] | None = None
        for stage, made in (("compact", run.compact), ("sparsify", run.sparse)):
            if stage in recipe.stages:
                dense = (source, revision) if stage == "sparsify" else None
                source, revision = str(made), None
        folder = folder_of(source, revision=revision, also=[FILE_NAME, EARLIER_NAME])
        return cls(source, revision, folder, masks_beside(folder), dense, run.salient)

    def kept(self, *, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Names of masked weights, after a prefix, and their bool masks, one at a time; nothing for a dense model."""
        if self.masks is not None:
            model = skeleton(load_config(self.source, revision=self.revision))
            for name, mask in whole_masks(model, read_masks(self.masks)):
                yield prefix + name, mask

    def adapt(
        self,
        model: PreTrainedModel,
        *,
        adapters: AdapterRecipe,
        seed: int,
        masks: Iterable[tuple[str, Tensor]] | None = None,
    ) -> PreTrainedModel | PeftModel:
        """Put adapters into a model of this kind, in place.

        Args:
            model: without them.
            adapters: which.
            seed: of what they start from.
            masks: of adapted weights, where adapters keep them; None: those of the model.

        Raises:
            ShearingError: peft is not installed, no layer has such a name, or a rank that does not fit.
        """
        seed_random(seed)
        with named(ADAPTER_NAMES[adapter_name(adapters)]):
            if isinstance(adapters, LoraRecipe):
                return add_adapters(
                    model,
                    masks=self.kept() if masks is None else masks,
                    rank=adapters.rank,
                    alpha=adapters.alpha,
                    dropout=adapters.dropout,
                    targets=adapters.targets,
                )
            if isinstance(adapters, SppRecipe):
                add_factors(
                    model,
                    rank=adapters.rank,
                    scale=adapters.scale,
                    dropout=adapters.dropout,
                    targets=adapters.targets,
                )
            else:
                assert self.salient is not None
                add_deltas(model, chosen=read_chosen(self.salient))
        return model

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, its config as it is stored."""
        config = load_config(self.source, revision=self.revision)
        uses_cache = config.use_cache
        model = skeleton(config)
        model.config.use_cache = uses_cache
        return model

    def weights(self, state: ShardedState) -> Iterator[tuple[str, Tensor]]:
        """The weights of a checkpoint of this model one after the other, fp32 on the CPU."""
        for name, weight in state.whole(WEIGHT):
            yield name.removeprefix(PARAMETER_PREFIX), weight

    @torch.no_grad()
    def restored(self, state: ShardedState, *, adapters: AdapterRecipe | None) -> PreTrainedModel | PeftModel:
        """The model with the weights of a checkpoint as training has it, fp32 on the CPU; adapters are beside it."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.source, revision=self.revision, dtype=torch.float32
        )
        adapted = None if adapters is None else self.adapt(model, adapters=adapters, seed=0)
        for name, weight in self.weights(state):
            model.get_parameter(name).copy_(weight)
        return model if adapted is None else adapted

    @torch.no_grad()
    def merged_weights(self, state: ShardedState, *, adapters: AdapterRecipe) -> Iterator[tuple[str, Tensor]]:
        """As `weights`, with adapters merged into them: what `merged` has of `restored`, a weight at a time.

        Raises:
            ShearingError: a weight that a mask drops is not 0 after merging.
        """
        left = [name for name, _ in self.skeleton().named_parameters()]
        model = self.skeleton()
        self.adapt(model, adapters=adapters, seed=0, masks=())

        def read(name: str) -> Tensor:
            shape = state.shapes[PARAMETER_PREFIX + name]
            numel = torch.Size(shape).numel()
            return state.read(WEIGHT, PARAMETER_PREFIX + name, start=0, numel=numel).view(shape)

        for name, mask in self.kept():
            weight = _merged(model, name, mask=mask, read=read)
            require_dropped_in(name, weight=weight, mask=mask)
            left.remove(name)
            yield name, weight
        for name in left:
            yield name, _merged(model, name, mask=None, read=read)

    @torch.no_grad()
    def merged(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
        """The plain model of what `restored` gave, which is not to be used afterwards.

        Raises:
            ShearingError: a weight that a mask drops is not 0 after merging.
        """
        if not isinstance(model, PreTrainedModel):
            return merge_adapters(model, masks=self.kept())
        # All weights were trained: under masks that stayed, which every checkpoint was checked with, or that moved.
        return merge_in_place(model, masks=self.kept()) if any(adapted_layers(model)) else model


def _merged(model: PreTrainedModel, name: str, *, mask: Tensor | None, read: Callable[[str], Tensor]) -> Tensor:
    """One weight of a plain model, of the weights of the same with adapters.

    Args:
        model: with adapters, without weights; as it was afterwards.
        name: of the weight.
        mask: its, where it has one.
        read: gives a weight of the model with adapters by its name there.
    """
    module, _, own = name.rpartition(".")
    layer: Any = model.get_submodule(module)
    if isinstance(layer, AdaptedLinear) and own == "weight":
        parameters = {each: getattr(layer, each) for each in (own, *layer.trained)}
        before = {each: parameter.data for each, parameter in parameters.items()}
        for each, parameter in parameters.items():
            parameter.data = read(f"{module}.{each}")
        weight: Tensor = layer.merged().weight.detach()
        for each, parameter in parameters.items():
            parameter.data = before[each]
        return weight
    if not hasattr(layer, "base_layer"):
        return read(name)
    weight = read(f"{module}.base_layer.{own}")
    if own == "weight":
        for part in ("lora_A", "lora_B"):
            getattr(layer, part)[ADAPTER].weight.data = read(f"{module}.{part}.{ADAPTER}.weight")
        layer.kept = mask
        weight += layer.get_delta_weight(ADAPTER)
        layer.kept = None
    return weight


def moved_masks(state: ShardedState) -> Callable[[], Iterator[tuple[str, Tensor]]] | None:
    """Masks by name of the weight that a checkpoint has, one at a time; None where they do not move."""
    if SET_ASIDE not in state.kinds:
        return None

    def masks() -> Iterator[tuple[str, Tensor]]:
        for name, aside in state.whole(SET_ASIDE):
            yield name.removeprefix(PARAMETER_PREFIX), aside.isnan()

    return masks


def dropped_weights(context: RunContext, *, start: Start) -> Mapping[str, Place]:
    """Where weights are as they were before masks dropped some, by name; empty where they are nowhere.

    A sparse model that came as one has nothing to bring back: what it drops begins at 0.

    Args:
        context: of the run; each of its processes calls this.
        start: the sparse model.

    Raises:
        ShearingError: see `open_source`.
    """
    if start.dense is None:
        return {}
    source, revision = start.dense
    files = open_files(context, source=source, revision=revision)
    model = skeleton(files.config)
    are_stored = give_places(model, files=[files.folder / name for name in files.weight_files()], source=source)
    assert are_stored, f"{files.folder} has parameters of {source} under their own names"
    return {name: place for name, parameter in model.named_parameters() if (place := place_of(parameter)) is not None}


def moving_masks(
    context: RunContext, *, settings: AstRecipe, start: Start, dropped: Mapping[str, Place]
) -> MovingMasks:
    """The masks of a sparse model, to move while it is trained.

    Args:
        context: of the run.
        settings: when they move.
        start: the sparse model.
        dropped: see `dropped_weights`.

    Raises:
        ShearingError: the model is not sparse, or not N:M.
    """
    recipe = context.recipe
    groups = groups_of(start.folder)
    norms = read_tensors(context.directory.input_norms, list(groups)) if settings.scores == "wanda" else {}
    length = recipe.data.sequence_length

    def steps(duration: Duration) -> int:
        return recipe.pretrain.in_steps(duration, sequence_length=length)

    def matrices() -> Iterator[MovingMatrix]:
        for name, mask in start.kept():
            pattern = groups[name]
            yield MovingMatrix(
                name=PARAMETER_PREFIX + name,
                mask=mask,
                kept=pattern.kept,
                of=pattern.of,
                scale=norms.get(name),
                dropped=dropped.get(name),
            )

    return MovingMasks(
        matrices,
        schedule=MovingSchedule(
            interval=max(1, steps(settings.interval)),
            decay=settings.decay,
            ramp_steps=steps(settings.ramp),
            freeze_step=settings.freeze_step(recipe.pretrain, sequence_length=length),
        ),
        processes=context.processes,
    )


def measure_input_norms(context: RunContext, *, settings: AstRecipe, start: Start, model: PreTrainedModel) -> None:
    """Write root mean squares of what every masked matrix reads, unless they are there.

    Args:
        context: of the run.
        settings: how much text is read.
        start: has the masks.
        model: the sparse model; its weights may stay in their files.
    """
    path = context.directory.input_norms
    if path.is_file():
        return
    sums: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            squares_I = arguments[0].detach().float().square().flatten(0, -2).mean(0)
            sums[name] = sums[name] + squares_I if name in sums else squares_I

        return add

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(listen(name))
        for name in groups_of(start.folder)
    ]
    samples = settings.samples
    try:
        with torch.no_grad():
            for loss in _losses(context, model=model, samples=samples, together=True):
                loss()
    finally:
        for handle in handles:
            handle.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {name: total.sqrt().cpu() for name, total in sums.items()})


def choose_salient(
    context: RunContext, *, settings: SpeftRecipe, start: Start, whole: Callable[[], PreTrainedModel]
) -> None:
    """Write which weights are trained, unless it is there.

    Args:
        context: of the run.
        settings: how they are chosen.
        start: has the masks.
        whole: gives the model that is to be trained, all of it in memory.

    Raises:
        ShearingError: no layer has such a name; they were chosen and are gone.
    """
    path = context.directory.salient
    if path.is_file():
        return
    if checkpoints := checkpoints_in(context.directory.checkpoints("pretrain")):
        raise ShearingError(
            "pretrain.speft",
            value=f"{path}, which is not there",
            allowed=f"the file that says which weights the changes in {next(reversed(checkpoints.values()))} are of",
            mend="take it back from a copy of the run, or start a new run",
        )
    scores = _saliences(context, settings=settings, model=whole())
    masks = {name: mask for name, mask in start.kept() if name in scores}
    chosen = choose(
        scores,
        kept=masks.get,
        share=settings.share,
        unit=settings.unit,
        among_all=settings.among == "model",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_chosen(path, chosen)


def _saliences(context: RunContext, *, settings: SpeftRecipe, model: PreTrainedModel) -> dict[str, Tensor]:
    """How much each weight of the targets matters, [O, I] by name; nothing else of the model is needed from then on."""
    with named(ADAPTER_NAMES["speft"]):
        layers = linear_layers(model, targets=settings.targets)
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    losses = _losses(context, model=model, samples=settings.samples, together=settings.salience != "fisher")
    return saliences(weights, losses=losses, kind=settings.salience)


def _losses(
    context: RunContext, *, model: PreTrainedModel, samples: int, together: bool
) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """Losses of the run's first training samples, read as the run reads them, computed when called.

    Each is the sum over its tokens, and how many of them count.

    Args:
        context: of the run.
        model: on the run's device; whole where losses are to have gradients.
        samples: sequences.
        together: as many at once as divide them, up to the stage's micro-batch; else one at a time.
    """
    recipe, mixture = context.recipe, context.initial_mixture()
    most = recipe.pretrain.micro_batch_size if together else 1
    size = max(each for each in range(1, most + 1) if samples % each == 0)
    objective = LanguageModelLoss(model, chunk_tokens=recipe.training.loss_chunk_tokens)
    for first in range(0, samples, size):
        batch = mixture.batch(first_sample=first, num_sequences=size)
        documents = mixture.documents.documents(batch.positions, device=context.device, counted_BT=batch.counted)

        def loss(batch: Batch = batch, documents: Documents | None = documents) -> tuple[Tensor, Tensor]:
            with (
                attention_within_documents(model, on=mixture.documents.attention_within),
                torch.autocast(context.device.type, dtype=torch.bfloat16, enabled=context.precision == torch.bfloat16),
            ):
                losses: Losses = objective(batch.tokens.to(context.device), documents)
            return losses.total, losses.labels.sum()

        yield loss


def way_of(pretrain: PretrainRecipe) -> dict[str, Any]:
    """What a manifest says of how a sparse model was trained: the method, and the settings of adapters or masks."""
    if (adapters := pretrain.adapters) is not None:
        return {"method": adapter_name(adapters), "adapters": adapters.model_dump(mode="json")}
    if pretrain.ast is not None:
        return {"method": "ast", "adapters": None, "masks": pretrain.ast.model_dump(mode="json")}
    return {"method": "all weights", "adapters": None}


def result_dtype(context: RunContext) -> torch.dtype:
    """Of the final model's weights, from which nothing is trained on.

    Raises:
        ShearingError: it is that of a cascade's first source, which is no longer there.
    """
    model = context.recipe.model
    if model.save_dtype != "source":
        return DTYPES[model.save_dtype]
    first = first_source(context.recipe)  # runs on the way hand over fp32, whatever that is stored in
    if first == model:
        return dtype_of_weights(model.source, config=context.config)
    return dtype_of_weights(first.source, config=load_config(first.source, revision=first.revision))
