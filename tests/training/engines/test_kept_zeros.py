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
from shearing.training.checkpoints.pieces import WEIGHT, ShardedState
from shearing.training.engines.engine import Engine, EngineParts, engine_of
from shearing.training.engines.optimizer import Optimization
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import DeepSpeedRecipe, TrainingRecipe
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
    """An engine by name; `zero2+offload` is DeepSpeed's at that stage, with the optimiser on the host."""
    training = TrainingRecipe()
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


def train(folder: Path, kind: str, precision: torch.dtype, resume_after: int | None) -> None:
    """What every process runs: steps with the masks; a checkpoint at the end, or one in between that is continued."""
    with Processes.start() as processes:
        first = 0
        engine: Engine | None = None
        for last in [STEPS] if resume_after is None else [resume_after, STEPS]:
            model = tiny_model("llama")
            masks = masks_of(model)
            engine = make_engine(kind, processes=processes, precision=precision)
            objective = engine.prepare(LanguageModelLoss(model, chunk_tokens=64))
            objective.train()
            if first:
                saved = json.loads((folder / f"{first}.json").read_text())
                engine.load(folder / str(first), saved=saved)
            engine.keep_zeros(masks.items())
            losses = []
            for step in range(first, last):
                tokens = torch.randint(
                    model.config.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step)
                )
                micro_batches = tokens.tensor_split(processes.size)[processes.rank].split(1)
                for index, micro_batch in enumerate(micro_batches):
                    with engine.autocast():
                        loss = objective(micro_batch).total / (SEQUENCES * (LENGTH - 1))
                    engine.backward(loss, last=index + 1 == len(micro_batches))
                    losses.append(float(loss.detach()))
                assert not engine.step(step=step)
            place = folder / str(last)
            place.mkdir(parents=True, exist_ok=True)
            processes.barrier()
            everyone = processes.gather(engine.stage().write_into(place))
            if processes.is_main:
                (folder / f"{last}.json").write_text(json.dumps(add_fingerprints(everyone)))
            processes.barrier()
            first = last


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(ShardedState(folder / str(STEPS)).whole(WEIGHT))


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
