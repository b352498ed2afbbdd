"""What masks cost: a mask-learning step against the same step of the dense model, and against the usual way.

The usual way multiplies activations at every site (heads, intermediate units, both sub-layers' outputs, every norm's
output). Ours scales the output projections and the embedding. The sides take turns in one process for the times, in
turned order every other round, and each runs alone in a process of its own for the memory. Times are of the GPU's work,
or of the processors', which other work on the machine lengthens less than it does what a clock on the wall shows.

    python benchmarks/mask_overhead.py [--quick] [--model FOLDER | --family MODEL_TYPE]

The usual way is written for families with Llama's norms; for others `--family` compares with the dense step alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shearing.models.anatomy import anatomy_of, backbone, decoder_layers, head_of
from shearing.models.attention import drop_attention_mask
from shearing.models.families import FAMILIES
from shearing.models.families.experts.products import compute_experts_under_autocast
from shearing.models.loading import load_source
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.objectives.cross_entropy import causal_lm_loss
from shearing.pruning.structured.learner import MaskLearner
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.recipe import PruneRecipe

GRANULARITIES = ("layers", "kv_groups", "query_heads", "intermediate", "hidden")
SIDES = ("dense", "masked", "usual")
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QUICK = {**SMOLLM2_135M, "vocab_size": 8192, "num_hidden_layers": 6}
EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 768,
    "moe_intermediate_size": 768,
}
"""Of families with experts; a token is computed by as many units as in the others."""


class ActivationMasks:
    """The usual way, with hooks: masks multiply activations where they arise."""

    def __init__(self, model: PreTrainedModel) -> None:
        family, shape = anatomy_of(model), Shape.of(model.config)
        self.masks = Masks()
        self.head_dim = shape.head_dim
        model.get_submodule(family.embedding).register_forward_hook(lambda _m, _i, x: x * self.masks.hidden)
        for name in [family.final_norm.name] + [
            f"{family.layers}.{layer}.{norm}"
            for layer in range(shape.num_hidden_layers)
            for norm in (family.attention.entry, family.mlp.entry)
        ]:
            norm = model.get_submodule(name)
            norm.forward = self._norm(norm)
        for index, layer in enumerate(decoder_layers(model)):
            attention, mlp = layer.get_submodule(family.attention.write), layer.get_submodule(family.mlp.write)
            attention.register_forward_pre_hook(self._heads(index))
            mlp.register_forward_pre_hook(lambda _m, x, index=index: (x[0] * self.masks.intermediate[index],))
            attention.register_forward_hook(self._write("attention", index))
            mlp.register_forward_hook(self._write("mlp", index))

    def _heads(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
        return lambda _m, x: (x[0] * self.masks.heads(layer).repeat_interleave(self.head_dim),)

    def _write(self, name: str, layer: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda _m, _i, x: x * getattr(self.masks, name)[layer] * self.masks.hidden

    def _norm(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            dtype, hidden = x.dtype, self.masks.hidden
            x = x.float()
            variance = (x * (hidden > 0)).pow(2).sum(-1, keepdim=True) / (hidden > 0).sum()
            return norm.weight * (x * torch.rsqrt(variance + norm.variance_epsilon)).to(dtype) * hidden

        return forward


def make_step(side: str, *, model: PreTrainedModel, bf16: bool) -> Callable[[int, Tensor], None]:
    """One training step of a side: forward, loss, backward, optimisers."""
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    head, learner, apply = head_of(model), None, None
    if side != "dense":
        source = Shape.of(model.config)
        target = dataclasses.replace(
            source,
            num_hidden_layers=2 * source.num_hidden_layers // 3,
            hidden_size=5 * source.hidden_size // 6,
            intermediate_size=2 * source.intermediate_size // 3,
            num_attention_heads=2 * source.num_attention_heads // 3,
            num_experts=3 * source.num_experts // 4,
        )
        section = PruneRecipe.model_validate(
            {"duration": 1000, "batch_size": 1, "initial_masks": "open", "sparsity_warmup": 200, "freeze": 0}
        )
        settings = MaskSettings.of(section, tokens_per_step=1, seed=0)
        granularities = (*GRANULARITIES, "experts") if source.num_experts else GRANULARITIES
        learner = MaskLearner(granularities, source=source, target=target, settings=settings, device=device)
        for granularity in learner.granularities:
            with torch.no_grad():
                learner.log_alpha[granularity.name].uniform_(-2, 2)
        if side == "masked":
            apply = MaskedModel(model).set_masks
        else:
            usual = ActivationMasks(model)

            def apply(masks: Masks) -> None:
                kv_groups = torch.ones(source.num_hidden_layers, source.num_key_value_heads, device=device)
                usual.masks = Masks(**{"kv_groups": kv_groups, **masks.tensors()})

    def step(number: int, tokens: Tensor) -> None:
        if learner is not None and apply is not None:
            apply(learner.sample(step=number, draw=0))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = backbone(model)(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            loss = causal_lm_loss(hidden, head, tokens[:, 1:], chunk_tokens=1024)[0] / tokens[:, 1:].numel()
        loss.backward()
        if learner is not None:
            penalty = learner.penalty(step=number)
            if penalty.requires_grad:  # of an estimator that pulls sizes to their target
                penalty.backward()
            learner.optimizer_step(step=number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def load(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model to measure, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.model:
        model = load_source(arguments.model, device=device)
    else:
        torch.manual_seed(0)
        sizes = {**(QUICK if arguments.quick else SMOLLM2_135M), "pad_token_id": None}
        sizes |= {} if FAMILIES[arguments.family].mlp.experts is None else EXPERTS
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arguments.family, **sizes))
        model = model.to(device).eval()
    if anatomy_of(model.config).mlp.experts is not None:
        compute_experts_under_autocast(model)  # as in training
    drop_attention_mask(model, sequence_length=arguments.sequence_length)
    return model


def sides_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What is measured."""
    return SIDES if arguments.model or arguments.family == "llama" else ("dense", "masked")


def seconds_so_far() -> float:
    """A clock that stops where a step ends."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_times(arguments: argparse.Namespace, *, bf16: bool) -> dict[str, float]:
    """Median seconds a step of each side, the sides taking turns."""
    sides = sides_of(arguments)
    steps = {side: make_step(side, model=load(arguments), bf16=bf16) for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(arguments.repetitions + 1):
        for side in sides if number % 2 else reversed(sides):
            tokens = batch(arguments, seed=number)
            started = seconds_so_far()
            steps[side](number, tokens)
            if number:
                seconds[side].append(seconds_so_far() - started)
        print(f"  round {number}: " + ", ".join(f"{s} {v[-1]:.2f} s" for s, v in seconds.items() if v), flush=True)
    # Ratios pair by pair: what drifts in the machine drifts for both.
    ratios = {
        f"{side}_ratio": statistics.median(a / b for a, b in zip(seconds[side], seconds["dense"], strict=True))
        for side in sides
    }
    return {**{side: statistics.median(values) for side, values in seconds.items()}, **ratios}


def batch(arguments: argparse.Namespace, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = (QUICK if arguments.quick else SMOLLM2_135M)["vocab_size"]
    tokens = torch.randint(vocabulary, (arguments.sequences, arguments.sequence_length + 1), generator=generator)
    return tokens.to("cuda" if torch.cuda.is_available() else "cpu")


def measure_memory(side: str, *, bf16: bool) -> float:
    """Peak bytes of one side, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", side, *(["--bf16"] if bf16 else []), *sys.argv[1:]]
    # Freed memory goes back at once, or the peak of the process says how glibc's heap was cut up, not what was alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(run.stdout.split()[-1])


def report_memory(arguments: argparse.Namespace) -> None:
    step = make_step(arguments.memory_of, model=load(arguments), bf16=arguments.bf16)
    for number in range(2):
        step(number, batch(arguments, seed=number))
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        # Not getrusage: a process that was spawned inherits its parent's maximum there.
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six layers, small vocabulary, random weights, fp32 only")
    parser.add_argument("--model", help="folder of a model; random weights of the 135M shape without it")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama", help="of the random weights")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        report_memory(arguments)
        return
    result: dict[str, object] = {
        "benchmark": "mask_overhead",
        "quick": arguments.quick,
        "family": arguments.family,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_per_micro_batch": arguments.sequences * arguments.sequence_length,
    }
    for precision in ["fp32"] if arguments.quick else arguments.precisions:
        bf16 = precision == "bf16"
        sides = sides_of(arguments)
        print(f"{precision}: dense, masked (ours), usual (activations at each site)", flush=True)
        times = measure_times(arguments, bf16=bf16)
        memory = {side: measure_memory(side, bf16=bf16) for side in sides}
        suffix = "" if precision == "fp32" else "_bf16"
        result[f"seconds_per_step{suffix}"] = {side: round(times[side], 4) for side in sides}
        result[f"step_time_ratio{suffix}"] = round(times["masked_ratio"], 4)
        result[f"peak_memory_ratio{suffix}"] = round(memory["masked"] / memory["dense"], 4)
        if "usual" in sides:
            result[f"usual_step_time_ratio{suffix}"] = round(times["usual_ratio"], 4)
            result[f"usual_peak_memory_ratio{suffix}"] = round(memory["usual"] / memory["dense"], 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
