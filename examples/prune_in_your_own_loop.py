"""Mask learning in a training loop of your own: a Hugging Face model in, a smaller one out.

    python examples/prune_in_your_own_loop.py --output runs/own-loop

takes the model and text of `make demo` (`python -m data_tools.demo --output runs/demo-data` makes them). The loop is
`learn`: what mask learning adds to it are the four lines with `masking`. Batches, the loss and the optimiser of the
weights are the loop's own business. Eight steps show how it is done, not what comes of it: masks that move so fast
break more than they mend, and `--steps` of some hundreds are hours on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shearing.data import Corpus, Inputs, Mixture
from shearing.evaluation import heldout_loss
from shearing.models import TargetRecipe, load_source, resolve_target, save_model
from shearing.pruning.structured import Evidence, Masking, PruneRecipe, metric_of, refit

SEQUENCE_LENGTH, SEQUENCES = 256, 4


def learn(
    model: PreTrainedModel, masking: Masking, *, optimizer: torch.optim.Optimizer, batches: Iterable[torch.Tensor]
) -> list[float]:
    """Train weights and masks together; the loss of each step, nats per token.

    Args:
        model: in whose layers the masks act.
        masking: the masks.
        optimizer: of the weights alone; the masks have one of their own.
        batches: token ids [B, T], one tensor a step.
    """
    losses = []
    model.train()
    for step, tokens_BT in enumerate(batches):
        masking.draw(step=step)  # before each forward pass
        loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        masking.after_backward(step=step)  # the masks' gradients, and the penalty that holds sizes
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        masking.update(step=step)  # the masks' own optimiser
        losses.append(float(loss.detach()))
    masking.settle()  # without noise, at exactly the target: what the cut computes
    return losses


def main() -> None:
    """Prune, cut, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="runs/demo-data/model", help="Hugging Face folder or name")
    parser.add_argument("--corpus", type=Path, default=Path("runs/demo-data/corpus"), help="tokenised domains")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True, help="folder of the smaller model")
    options = parser.parse_args()

    model = load_source(options.model, device=torch.device("cpu"), dtype=torch.float32)
    corpus = Corpus.open(options.corpus, vocab_size=model.config.vocab_size, sequence_length=SEQUENCE_LENGTH)
    mixture = Mixture(corpus, seed=0, sequence_length=SEQUENCE_LENGTH, weights=dict.fromkeys(corpus.domains, 1.0))
    target = resolve_target(
        TargetRecipe(num_hidden_layers=20, hidden_size=480, intermediate_size=1024, num_attention_heads=6),
        source=model.config,
    )
    stage = PruneRecipe.model_validate({"duration": options.steps, "batch_size": SEQUENCES, "learning_rate": 1e-4})
    batches = [
        mixture.batch(first_sample=SEQUENCES * step, num_sequences=SEQUENCES).tokens for step in range(options.steps)
    ]

    # Masks start where a metric grades them, and the weights that stay make up for what the masks close.
    text = [Inputs(tokens_BT[:, :-1]) for tokens_BT in batches]
    scores = metric_of(stage.initial_masks).scores(model, evidence=Evidence(text=text, target=target))
    masking = Masking.of(model, stage, target=target, tokens_per_step=SEQUENCES * SEQUENCE_LENGTH, scores=scores)
    refit(masking.model, masks=masking.learner.final_masks(), batches=text)

    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=stage.betas)
    losses = learn(model, masking, optimizer=optimizer, batches=batches)
    print("loss by step:", " ".join(f"{loss:.2f}" for loss in losses))
    small = masking.cut()
    save_model(small, options.output, like=options.model)  # with the source's tokenizer
    print(f"{small.num_parameters():,} parameters in {options.output}, as any Hugging Face model")
    measured = heldout_loss(
        small, corpus, split="test", tokens_per_domain=1024, sequence_length=SEQUENCE_LENGTH, micro_batch_size=4
    )
    print("test loss:", ", ".join(f"{name} {domain.loss:.2f}" for name, domain in measured.items()))


if __name__ == "__main__":
    main()
