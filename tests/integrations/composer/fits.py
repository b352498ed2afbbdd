"""The tiny task of `tests.training.tasks` under Composer's trainer; as a program it is one fit, which may be killed."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger

from shearing.data import DynamicMixture, MixtureRecipe, rule_of
from shearing.integrations.composer import DynamicBatchLoading, LearnMasks, MixtureBatches, ObjectiveModel
from tests.training import tasks

INTERVAL, HELD_OUT_TOKENS = 3, 64


class Killed(Callback):
    """SIGKILL after a batch, before its checkpoint."""

    def __init__(self, after: int) -> None:
        self.after = after

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch.value) == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def dynamic_mixture() -> DynamicMixture:
    """Weights that follow how far held-out losses are above a reference that tells the two domains apart."""
    mixture = MixtureRecipe.model_validate({"update": "paper"})
    return DynamicMixture(
        rule=rule_of(mixture, prior={"letters": 0.5, "digits": 0.5}),
        reference={"letters": 2.0, "digits": 2.9},
        parameters=10_000,
        tokens=tasks.STEPS * tasks.SEQUENCES * tasks.LENGTH,
        online=False,
        state={"memory": {}},
    )


def fit(inputs: Path, *, estimator: str = "hard_concrete", dynamic: bool = False, **settings: Any) -> dict[str, Any]:
    """Mask learning as in `tasks.tiny_task`: weights, log_alpha, the loss of each step, domain weights in the end."""
    callbacks = settings.pop("callbacks", [])
    objective, masking = tasks.masked_objective(inputs, estimator=estimator)
    batches = MixtureBatches(tasks.mixture_of(inputs), sequences_per_step=tasks.SEQUENCES)
    if dynamic:
        updates = DynamicBatchLoading(
            batches,
            dynamic=dynamic_mixture(),
            interval=INTERVAL,
            model=objective.model,
            tokens_per_domain=HELD_OUT_TOKENS,
            micro_batch_size=tasks.MICRO_BATCH,
            masking=masking,
        )
        callbacks = [updates, *callbacks]
    matrices = [p for p in objective.parameters() if p.ndim >= 2]
    vectors = [p for p in objective.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": tasks.DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=tasks.RATE,
        betas=tasks.BETAS,
        eps=tasks.EPSILON,
        fused=True,
    )
    logger = InMemoryLogger()
    trainer = Trainer(
        model=ObjectiveModel(objective),
        train_dataloader=batches.loader(),
        optimizers=optimizer,
        max_duration=f"{tasks.STEPS}ba",
        device_train_microbatch_size=tasks.MICRO_BATCH,
        algorithms=[
            LearnMasks(masking),
            GradientClipping(clipping_type="norm", clipping_threshold=tasks.CLIPPING),
        ],
        callbacks=callbacks,
        loggers=[logger],
        precision="fp32",
        device="cpu",
        progress_bar=False,
        **settings,
    )
    trainer.fit()
    losses = [float(value) for _, value in logger.data["loss/train/total"]]
    weights = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    logged = sorted(logger.data)
    batches.close()
    trainer.close()
    return {
        "losses": losses,
        "weights": weights,
        "masking": masking.state_dict(),
        "domain_weights": batches.weights,
        "logged": logged,
    }


def main() -> None:
    """One fit with checkpoints, by Composer's own means; the result goes into a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-after", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = fit(
        options.inputs,
        dynamic=True,
        callbacks=[] if options.kill_after is None else [Killed(options.kill_after)],
        save_folder=str(options.folder / "checkpoints"),
        save_interval="2ba",
        run_name="tiny",
        autoresume=True,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(result, options.folder / "result.pt")


if __name__ == "__main__":
    main()
