"""What `shear plan` says of memory, traced and by arithmetic, against peaks of training steps of a random model.

    python benchmarks/memory.py [--quick]

Each configuration runs in a process of its own, a stage's task as it runs: masks or none, micro-batches, activation
checkpointing, precision. Peaks are of live tensors: on a CPU the sum over every allocation and release that torch's
profiler records, on a GPU `torch.cuda.max_memory_allocated`. Quantities that do not depend on a model's size (the
random state that checkpointing keeps for every layer, masks, token ids) are in the measurement and not in the estimate,
so small models are the harder test; bf16 on a CPU also has an fp32 buffer behind each matrix product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from shearing.evaluation.environment import environment
from shearing.models.attention import drop_attention_mask
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.objectives.language_model import LanguageModelLoss
from shearing.pruning.structured.learner import MaskLearner
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.masking.learned import Masking
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.runs.planning.memory import Checkpointing, Sharding, Workload
from shearing.runs.planning.step.estimate import estimate
from shearing.runs.planning.step.traced_step import StepModel, measure
from shearing.training.device import checkpoint_activations
from shearing.training.engines.optimizer import Optimization
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.learning_rates import LearningRates

GRANULARITIES = ("layers", "kv_groups", "query_heads", "intermediate", "hidden")
QUICK = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
FULL = {**QUICK, "vocab_size": 16384, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
TARGET = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 2}


@dataclass(frozen=True)
class Configuration:
    """What a measured step computes."""

    model: dict[str, int | bool]
    masked: bool
    checkpointing: Checkpointing
    micro_batch_size: int
    micro_batches: int
    sequence_length: int
    chunk_tokens: int
    bf16: bool

    @property
    def name(self) -> str:
        """The settings in one word."""
        stage = "prune" if self.masked else "pretrain"
        precision = "bf16" if self.bf16 else "fp32"
        return f"{stage}-{self.checkpointing}-{self.micro_batches}x{self.micro_batch_size}-{precision}"


def planned(configuration: Configuration) -> tuple[int, int]:
    """Bytes, as the plan has them: of a traced step, and by arithmetic."""
    workload = Workload(
        micro_batch_size=configuration.micro_batch_size,
        micro_batches=configuration.micro_batches,
        sequence_length=configuration.sequence_length,
        bf16=configuration.bf16,
        checkpointing=configuration.checkpointing,
        chunk_tokens=configuration.chunk_tokens,
        masked=configuration.masked,
    )
    granularities = GRANULARITIES if configuration.masked else ()
    model = StepModel(config=LlamaConfig(**configuration.model), granularities=granularities)
    traced = measure(model, workload=workload, sharding=Sharding())
    return traced.total, estimate(model.shape, workload=workload, sharding=Sharding()).total


def train(configuration: Configuration, *, device: torch.device) -> None:
    """Two optimiser steps: AdamW's moments are there from the first one's end."""
    torch.manual_seed(0)
    length = configuration.sequence_length
    model = AutoModelForCausalLM.from_config(LlamaConfig(**configuration.model)).train().to(device)
    drop_attention_mask(model, sequence_length=length)
    masking = None
    if configuration.masked:
        source = Shape.of(model.config)
        target = replace(source, **TARGET)
        section = PruneRecipe.model_validate({"duration": 100, "batch_size": 1, "freeze": 0})
        settings = MaskSettings.of(section, tokens_per_step=1, seed=0)
        learner = MaskLearner(GRANULARITIES, source=source, target=target, settings=settings, device=device)
        masking = Masking(model=MaskedModel(model), learner=learner, draws=configuration.micro_batches)
    if configuration.checkpointing != "none":
        checkpoint_activations(model, selective=configuration.checkpointing == "selective")
    optimization = Optimization(
        rates=LearningRates(
            schedule="cosine",
            peak=1e-4,
            total_steps=100,
            warmup_steps=0,
            decay_steps=0,
            final=0.1,
            first_step=0,
        ),
        betas=(0.9, 0.95),
        epsilon=1e-8,
        weight_decay=0.0,
        gradient_clipping=1.0,
    )
    precision = torch.bfloat16 if configuration.bf16 else torch.float32
    engine = TorchEngine(optimization, device=device, precision=precision)
    objective = engine.prepare(LanguageModelLoss(model, chunk_tokens=configuration.chunk_tokens))
    shape = (configuration.micro_batch_size, length + 1)
    for step in range(2):
        for index in range(configuration.micro_batches):
            tokens = torch.randint(configuration.model["vocab_size"], shape, device=device)
            if masking is not None:
                masking.draw(step=step, sequence=index, of=configuration.micro_batches)
            with engine.autocast():
                loss = objective(tokens).total / tokens[:, 1:].numel()
            engine.backward(loss, last=index + 1 == configuration.micro_batches)
        if masking is not None:
            masking.after_backward(step=step, scale=1.0)
        skipped = engine.step(step=step)
        if masking is not None:
            masking.update(step=step, skip=skipped)


def measured(configuration: Configuration) -> int:
    """Bytes that were live at the same time, at most."""
    if torch.cuda.is_available():
        train(configuration, device=torch.device("cuda"))
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train(configuration, device=torch.device("cpu"))
    events = recorded.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(itertools.accumulate(size for _, size in changes))


def _send_peak(sender: Connection, configuration: Configuration) -> None:
    sender.send(measured(configuration))


def peak_of_fresh_process(configuration: Configuration) -> int:
    """`measured` in a process of its own: on a GPU nothing of the others is left."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, configuration))
    process.start()
    sender.close()  # so that a process that dies is noticed
    result: int = receiver.recv()
    process.join()
    return result


def configurations(*, quick: bool) -> list[Configuration]:
    """Both stages, every way to recompute, and steps of one and of several micro-batches."""
    sizes = [(1, 4), (4, 1)] if quick else [(1, 8), (2, 4), (4, 1)]
    precisions = [False] if quick else [False, True]
    return [
        Configuration(
            model=QUICK if quick else FULL,
            masked=masked,
            checkpointing=checkpointing,
            micro_batch_size=size,
            micro_batches=count,
            sequence_length=128 if quick else 256,
            chunk_tokens=128 if quick else 256,
            bf16=bf16,
        )
        for bf16, masked, checkpointing, (count, size) in itertools.product(
            precisions, (True, False), ("none", "selective", "full"), sizes
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller, about two minutes on 2 cores")
    quick = parser.parse_args().quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, object] = {"benchmark": "memory", "quick": quick, "model": QUICK if quick else FULL}
    rows: dict[str, dict[str, float]] = {}
    for configuration in configurations(quick=quick):
        (traced, estimated), peak = planned(configuration), peak_of_fresh_process(configuration)
        error, by_arithmetic = traced / peak - 1, estimated / peak - 1
        rows[configuration.name] = {
            "traced": traced,
            "estimated": estimated,
            "measured": peak,
            "relative_error": error,
            "relative_error_by_arithmetic": by_arithmetic,
        }
        print(
            f"{configuration.name:28} {peak / 1e6:9.1f} MB; traced {error:+7.1%}, by arithmetic {by_arithmetic:+7.1%}"
        )
    result |= {"configurations": rows, "worst_relative_error": max(abs(row["relative_error"]) for row in rows.values())}
    result["environment"] = environment(device)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
