"""Mask learning under MosaicML's Composer, with domain weights that follow held-out losses, in a few minutes of a CPU.

    .venv-composer/bin/python examples/prune_with_composer.py --output runs/composer

takes the model and text of `make demo` (`python -m data_tools.demo --output runs/demo-data` makes them); `make
test-composer` makes the environment. The same command continues what was interrupted, from Composer's checkpoints.
Eight steps show how it is done, not what comes of it: masks that move so fast break more than they mend.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.optim import ConstantWithWarmupScheduler

from shearing.data import Corpus, DynamicMixture, Inputs, Mixture, MixtureRecipe, rule_of
from shearing.evaluation import heldout_loss
from shearing.integrations.composer import DynamicBatchLoading, LearnMasks, MixtureBatches, ObjectiveModel
from shearing.models import TargetRecipe, load_source, resolve_target, save_model
from shearing.objectives import LanguageModelLoss
from shearing.pruning.structured import Evidence, Masking, PruneRecipe, metric_of, refit

SEQUENCE_LENGTH, SEQUENCES, CALIBRATION, INTERVAL, HELD_OUT_TOKENS = 256, 4, 32, 3, 256


def main() -> None:
    """Prune, cut, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="runs/demo-data/model", help="Hugging Face folder or name")
    parser.add_argument("--corpus", type=Path, default=Path("runs/demo-data/corpus"), help="tokenised domains")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints and of the smaller model")
    options = parser.parse_args()

    model = load_source(options.model, device=torch.device("cpu"), dtype=torch.float32)
    corpus = Corpus.open(options.corpus, vocab_size=model.config.vocab_size, sequence_length=SEQUENCE_LENGTH)
    weights = dict.fromkeys(corpus.domains, 1 / len(corpus.domains))
    mixture = Mixture(corpus, seed=0, sequence_length=SEQUENCE_LENGTH, weights=weights)
    target = resolve_target(
        TargetRecipe(num_hidden_layers=20, hidden_size=480, intermediate_size=1024, num_attention_heads=6),
        source=model.config,
    )
    stage = PruneRecipe.model_validate({"duration": options.steps, "batch_size": SEQUENCES, "learning_rate": 1e-4})

    # Losses to come back to are the source's own; then masks start where a metric grades them.
    measured = heldout_loss(
        model,
        corpus,
        split="validation",
        tokens_per_domain=HELD_OUT_TOKENS,
        sequence_length=SEQUENCE_LENGTH,
        micro_batch_size=SEQUENCES,
    )
    # Training goes on after the text that is read here.
    text = [Inputs(mixture.batch(first_sample=0, num_sequences=CALIBRATION).tokens[:, :-1])]
    scores = metric_of(stage.initial_masks).scores(model, evidence=Evidence(text=text, target=target))
    masking = Masking.of(model, stage, target=target, tokens_per_step=SEQUENCES * SEQUENCE_LENGTH, scores=scores)
    refit(masking.model, masks=masking.learner.final_masks(), batches=text)

    dynamic = DynamicMixture(
        rule=rule_of(MixtureRecipe(step_size=0.25), prior=weights),
        reference={domain: loss.loss for domain, loss in measured.items()},
        parameters=target.num_parameters(),
        tokens=options.steps * SEQUENCES * SEQUENCE_LENGTH,
        online=False,
        state={},
    )
    batches = MixtureBatches(mixture, sequences_per_step=SEQUENCES)
    updates = DynamicBatchLoading(
        batches,
        dynamic=dynamic,
        interval=INTERVAL,
        model=model,
        tokens_per_domain=HELD_OUT_TOKENS,
        micro_batch_size=SEQUENCES,
        masking=masking,
    )
    trainer = Trainer(
        model=ObjectiveModel(LanguageModelLoss(model, chunk_tokens=1024)),
        train_dataloader=batches.loader(),
        optimizers=torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=stage.betas),
        schedulers=ConstantWithWarmupScheduler(t_warmup="2ba"),
        algorithms=[LearnMasks(masking), GradientClipping(clipping_type="norm", clipping_threshold=1.0)],
        callbacks=[updates],
        max_duration=f"{options.steps}ba",
        device_train_microbatch_size=SEQUENCES,
        precision="fp32",
        device="cpu",
        save_folder=str(options.output / "checkpoints"),
        save_interval=f"{INTERVAL}ba",
        run_name="prune",
        autoresume=True,
        log_to_console=True,
        console_log_interval="1ba",
        progress_bar=False,
    )
    trainer.fit()
    batches.close()
    small = masking.cut()
    save_model(small, options.output / "model", like=options.model)  # with the source's tokenizer
    print(f"{small.num_parameters():,} parameters in {options.output / 'model'}, as any Hugging Face model")
    print("domain weights:", ", ".join(f"{name} {weight:.3f}" for name, weight in batches.weights.items()))


if __name__ == "__main__":
    main()
