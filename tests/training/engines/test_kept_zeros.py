from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.objectives.language_model import LanguageModelLoss
from shearing.processes.processes import Processes
from shearing.training.checkpoints.fingerprints import add_fingerprints
from shearing.training.checkpoints.pieces import SET_ASIDE, WEIGHT, ShardedState
from shearing.training.engines.engine import Engine, EngineParts, engine_of
from shearing.training.engines.moving_masks import MovingMasks, MovingMatrix, MovingSchedule, keep_highest
from shearing.training.engines.optimizer import Optimization
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import DeepSpeedRecipe, Fsdp2Recipe, TrainingRecipe
from tests.distributed.harness import spawn
from tests.models.tiny import tiny_model

CPU = torch.device("cpu")
OPTIMIZATION = Optimization(
    rates=LearningRates(
        schedule="cosine",
        peak=1e-2,
        total_steps=8,
        warmup_steps=1,
        decay_steps=0,
        final=0.1,
        first_step=0,
    ),
    betas=(0.9, 0.95),
    epsilon=1e-3,
    weight_decay=0.1,
    gradient_clipping=0.5,
)
SEQUENCES, LENGTH, STEPS = 4, 9, 4


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Half of every matrix of every layer, by chance."""
    generator = torch.Generator().manual_seed(3)
    return {
        f"model.{name}": torch.rand(parameter.shape, generator=generator) < 0.5
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "layers" in name
    }


def make_engine(
    kind: str,
    *,
    processes: Processes,
    precision: torch.dtype,
    optimization: Optimization = OPTIMIZATION,
    sequences: int = SEQUENCES,
) -> Engine:
    """An engine by name; `zero2+offload` is DeepSpeed's at that stage, with the optimiser on the host.

    `fsdp2+each` sums gradients of each micro-batch.
    """
    training = TrainingRecipe()
    if kind == "fsdp2+each":
        kind, training = "fsdp2", TrainingRecipe(fsdp2=Fsdp2Recipe(sum_gradients="micro_batch"))
    if kind.startswith("zero"):
        stage, _, offloaded = kind.removeprefix("zero").partition("+")
        settings = DeepSpeedRecipe(
            zero_stage=int(stage),  # type: ignore[arg-type]
            offload_optimizer="cpu" if offloaded else "none",
            offload_parameters="cpu" if offloaded and stage == "3" else "none",
        )
        kind, training = "deepspeed", TrainingRecipe(deepspeed=settings)
    parts = EngineParts(
        optimization=optimization,
        training=training,
        device=CPU,
        precision=precision,
        processes=processes,
        micro_batch_size=1,
        accumulation=sequences // processes.size,
    )
    return engine_of(kind, parts=parts)


MOVING = MovingSchedule(interval=1, decay=0.3, ramp_steps=2, freeze_step=STEPS)


def moving_masks(model: nn.Module, *, processes: Processes) -> MovingMasks:
    """Of the same matrices, half kept by magnitude at first: of four, or of whole rows, which processes may share.

    Later choices compare magnitudes times factors of the columns in every second one.
    """
    return MovingMasks(lambda: moving_matrices(model), schedule=MOVING, processes=processes)


def moving_matrices(model: nn.Module) -> list[MovingMatrix]:
    matrices = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers" in name:
            of = parameter.shape[1] if name.split(".")[-2] in ("q_proj", "o_proj", "gate_proj") else 4
            mask = keep_highest(parameter.detach().abs().view(-1, of), kept=of // 2).view(parameter.shape)
            scale = torch.linspace(0.2, 3.0, parameter.shape[1]) if len(matrices) % 2 else None
            matrices.append(MovingMatrix(name=f"model.{name}", mask=mask, kept=of // 2, of=of, scale=scale))
    return matrices


def train(folder: Path, kind: str, precision: torch.dtype, resume_after: int | None, moves: bool = False) -> None:
    """What every process runs: steps with the masks; a checkpoint at the end, or one in between that is continued."""
    sequences = 6 if moves else SEQUENCES
    with Processes.start() as processes:
        first = 0
        engine: Engine | None = None
        for last in [STEPS] if resume_after is None else [resume_after, STEPS]:
            model = tiny_model("llama")
            masks = masks_of(model)
            engine = make_engine(kind, processes=processes, precision=precision, sequences=sequences)
            objective = engine.prepare(LanguageModelLoss(model, chunk_tokens=64))
            objective.train()
            moving = None
            if moves:
                moving = moving_masks(tiny_model("llama"), processes=processes)
                engine.move_masks(moving)
            if first:
                saved = json.loads((folder / f"{first}.json").read_text())
                engine.load(folder / str(first), saved=saved)
            if moving is None:
                engine.keep_zeros(masks.items())
            else:
                moving.begin(step=first)
            losses = []
            for step in range(first, last):
                tokens = torch.randint(
                    model.config.vocab_size, (sequences, LENGTH), generator=torch.Generator().manual_seed(step)
                )
                micro_batches = tokens.tensor_split(processes.size)[processes.rank].split(1)
                for index, micro_batch in enumerate(micro_batches):
                    with engine.autocast():
                        loss = objective(micro_batch).total / (sequences * (LENGTH - 1))
                    engine.backward(loss, last=index + 1 == len(micro_batches))
                    losses.append(float(loss.detach()))
                skipped = engine.step(step=step)
                assert not skipped
                if moving is not None:
                    moving.after_step(step=step + 1, skipped=skipped)
            place = folder / str(last)
            place.mkdir(parents=True, exist_ok=True)
            processes.barrier()
            everyone = processes.gather(engine.stage().write_into(place))
            if processes.is_main:
                (folder / f"{last}.json").write_text(json.dumps(add_fingerprints(everyone)))
            processes.barrier()
            first = last


def weights(folder: Path, *, kind: str = WEIGHT) -> dict[str, Tensor]:
    return dict(ShardedState(folder / str(STEPS)).whole(kind))


def test_dropped_weights_stay_zero_and_kept_ones_that_are_zero_learn(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    mask = torch.rand(5, 6) < 0.5
    mask[0, 0] = True
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0  # type: ignore[index]
    engine = TorchEngine(OPTIMIZATION, device=CPU, precision=torch.float32)
    engine.prepare(model)
    engine.keep_zeros([("0.weight", mask)])
    for step in range(5):
        engine.backward(model(torch.randn(3, 6)).square().sum(), last=True)
        engine.step(step=step)
        assert torch.equal(model[0].weight != 0, mask)
    engine.stage().write_into(tmp_path)


def test_a_weight_that_came_back_is_never_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    engine = TorchEngine(OPTIMIZATION, device=CPU, precision=torch.float32)
    engine.prepare(model)
    engine.keep_zeros([("0.weight", torch.zeros(5, 6, dtype=torch.bool))])
    with torch.no_grad():
        model[0].weight[1, 2] = 1e-30  # type: ignore[index]
    with pytest.raises(ShearingError, match=r"1 dropped weights are not 0"):
        engine.stage().write_into(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "shape", "said"), [("absent.weight", (5, 6), "own parameters"), ("0.weight", (6, 5), "shape")]
)
def test_masks_of_another_model_are_refused(name: str, shape: tuple[int, int], said: str) -> None:
    engine = TorchEngine(OPTIMIZATION, device=CPU, precision=torch.float32)
    engine.prepare(nn.Sequential(nn.Linear(6, 5)))
    with pytest.raises(ShearingError, match=said):
        engine.keep_zeros([(name, torch.ones(shape, dtype=torch.bool))])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights that plain torch on one process, uninterrupted, ends with."""
    folder = tmp_path_factory.mktemp("reference")
    spawn(train, folder / "run", "torch", torch.float32, None, size=1, folder=folder / "out")
    return weights(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "resume_after"),
    [
        ("torch", torch.float32, 2),
        ("zero0", torch.float32, None),
        ("zero1", torch.float32, 2),
        ("zero2+offload", torch.float32, None),
        ("zero3", torch.float32, 2),
        ("zero3+offload", torch.float32, None),
        ("fsdp2", torch.float32, 2),
        ("fsdp2", torch.bfloat16, None),
        ("torch", torch.bfloat16, None),
        ("zero1", torch.bfloat16, 2),
        ("zero1+offload", torch.bfloat16, None),
        ("zero2", torch.bfloat16, 2),
        ("zero3", torch.bfloat16, 2),
    ],
)
def test_every_engine_keeps_them(
    kind: str, precision: torch.dtype, resume_after: int | None, reference: dict[str, Tensor], tmp_path: Path
) -> None:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    spawn(train, tmp_path / "run", kind, precision, resume_after, size=2, folder=tmp_path / "out")
    masks = masks_of(tiny_model("llama"))
    for name, weight in weights(tmp_path / "run").items():
        if name in masks:
            assert not weight[~masks[name]].any(), name
            assert weight[masks[name]].all(), name
        if precision == torch.float32:
            torch.testing.assert_close(weight, reference[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain torch on one process, uninterrupted, under masks that move."""
    folder = tmp_path_factory.mktemp("moved")
    spawn(train, folder / "run", "torch", torch.float32, None, True, size=1, folder=folder / "out")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "resume_after", "size"),
    [
        ("zero0", torch.float32, None, 2),
        ("zero1", torch.float32, 2, 3),  # thirds begin inside of rows
        ("zero2+offload", torch.bfloat16, 2, 2),
        ("zero3", torch.float32, 2, 3),
        ("fsdp2", torch.float32, 2, 2),
    ],
)
def test_every_engine_moves_masks_alike(
    kind: str, precision: torch.dtype, resume_after: int | None, size: int, moved: Path, tmp_path: Path
) -> None:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    spawn(train, tmp_path / "run", kind, precision, resume_after, True, size=size, folder=tmp_path / "out")
    found, asides = weights(tmp_path / "run"), weights(tmp_path / "run", kind=SET_ASIDE)
    expected, expected_asides = weights(moved), weights(moved, kind=SET_ASIDE)
    first = {each.name: each for each in moving_matrices(tiny_model("llama"))}
    assert asides.keys() == first.keys()
    changed = 0
    for name, aside in asides.items():
        kept, of = aside.isnan(), first[name].of
        assert (kept.view(-1, of).sum(1) == of // 2).all(), name
        assert torch.equal(found[name] != 0, kept), name
        assert not aside.nan_to_num().any()
        changed += int((kept != first[name].mask).sum())
        if precision == torch.float32:
            assert torch.equal(kept, expected_asides[name].isnan()), name
    assert changed
    if precision == torch.float32:
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
