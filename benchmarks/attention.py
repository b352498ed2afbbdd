"""Time and peak memory of a training step with attention within documents: ours against two others, in one run.

    python benchmarks/attention.py [--quick]

`full` attends over whole rows and heeds no documents, `documents` is ours, and `mask` is the usual way: position ids
that restart, from which transformers makes an S x S mask for scaled_dot_product_attention. The model has two
layers of a 135M model's sizes, or on a GPU of LLaMA-2-7B's. On a CPU, memory is the growth of the
resident peak of a fresh process per side; on a GPU what torch's allocator says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.data.documents import DocumentRules
from shearing.evaluation.environment import environment
from shearing.models.anatomy import backbone, head_of
from shearing.models.attention import drop_attention_mask, keep_attention_within_documents
from shearing.objectives.cross_entropy import causal_lm_loss
from shearing.objectives.language_model import LanguageModelLoss
from shearing.progress import max_memory

CHUNK_TOKENS = 1024
SIDES = ("full", "documents", "mask")
WITHIN = DocumentRules(attention_within=True)


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a micro-batch."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    rows: int
    length: int


QUICK = Sizes(hidden=128, intermediate=256, heads=4, kv_heads=2, layers=2, rows=2, length=1024)
ON_CPU = Sizes(hidden=576, intermediate=1536, heads=9, kv_heads=3, layers=2, rows=1, length=2048)
ON_GPU = Sizes(hidden=4096, intermediate=11008, heads=32, kv_heads=32, layers=2, rows=4, length=4096)


def make_step(side: str, sizes: Sizes, *, document: int, device: torch.device) -> Callable[[], Tensor]:
    """Forward pass over rows of documents of `document` tokens; returns what calls it for its loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.length,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(device).train()
    tokens_BT = torch.randint(4096, (sizes.rows, sizes.length + 1), device=device)
    # Rows begin inside documents, each at another place.
    starts_B1 = torch.arange(sizes.rows)[:, None] * (document // 3)
    places_BT = torch.arange(sizes.length + 1) + starts_B1
    positions_BT = torch.where(
        places_BT // document == starts_B1 // document, places_BT - starts_B1, places_BT % document
    )
    if side == "mask":
        position_ids_BS = positions_BT[:, :-1].to(device)

        def usual() -> Tensor:
            hidden_BSD = backbone(model)(
                input_ids=tokens_BT[:, :-1], position_ids=position_ids_BS, use_cache=False
            ).last_hidden_state
            return causal_lm_loss(hidden_BSD, head_of(model), tokens_BT[:, 1:], chunk_tokens=CHUNK_TOKENS)[0]

        return usual
    if side == "full":
        drop_attention_mask(model, sequence_length=sizes.length)
    else:
        keep_attention_within_documents(model)
    objective, rules = (
        LanguageModelLoss(model, chunk_tokens=CHUNK_TOKENS),
        WITHIN if side != "full" else DocumentRules(),
    )
    # Boundaries are found in each step, as in training.
    return lambda: objective(tokens_BT, rules.documents(positions_BT, device=device)).total


def one_step(forward: Callable[[], Tensor], *, device: torch.device, precision: torch.dtype) -> float:
    """Seconds of forward and backward."""
    started = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = forward()
    (loss / loss.detach()).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(side: str, sizes: Sizes, document: int, device: torch.device, precision: torch.dtype) -> int:
    """Growth of peak memory over the model, gradients included."""
    # What libraries allocate at their first use is not attention's.
    small = Sizes(hidden=64, intermediate=64, heads=2, kv_heads=1, layers=1, rows=1, length=64)
    one_step(make_step(side, small, document=32, device=device), device=device, precision=precision)
    forward = make_step(side, sizes, document=document, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = max_memory()
    one_step(forward, device=device, precision=precision)
    return max_memory() - before


def _send_peak(sender: Connection, *arguments: object) -> None:
    sender.send(peak_bytes(*arguments))  # type: ignore[arg-type]


def peak_of_fresh_process(*arguments: object) -> int:
    """`peak_bytes` in a process of its own: a resident peak never falls."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, *arguments))
    process.start()
    result: int = receiver.recv()
    process.join()
    return result


def seconds_of(
    sizes: Sizes, *, document: int, repeats: int, device: torch.device, precision: torch.dtype
) -> dict[str, float]:
    """Median seconds of a step of each side, the sides in turns."""
    steps = {side: make_step(side, sizes, document=document, device=device) for side in SIDES}
    losses = {side: float(forward().detach()) for side, forward in steps.items()}
    if abs(losses["documents"] - losses["mask"]) > 1e-3 * losses["mask"]:
        raise RuntimeError(f"the two ways compute different losses: {losses}")
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for repeat in range(repeats + 1):
        for side, forward in steps.items():
            taken = one_step(forward, device=device, precision=precision)
            if repeat:  # the first of each is warm-up
                seconds[side].append(taken)
    return {side: statistics.median(taken) for side, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute and a half on 2 cores")
    quick = parser.parse_args().quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = QUICK if quick else (ON_GPU if device.type == "cuda" else ON_CPU)
    lengths = (64, 512) if quick else (64, 512, sizes.length)
    repeats = 5 if quick or device.type == "cuda" else 3
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Before this process has grown: a child's resident peak begins at its parent's.
    peaks = {
        document: {side: peak_of_fresh_process(side, sizes, document, device, precision) for side in SIDES}
        for document in lengths
    }
    found = []
    for document in lengths:
        peak = peaks[document]
        seconds = seconds_of(sizes, document=document, repeats=repeats, device=device, precision=precision)
        for side in SIDES:
            print(f"documents of {document:5} tokens  {side:10} {peak[side] / 1e6:9.0f} MB {seconds[side]:8.3f} s")
        others = [side for side in SIDES if side != "documents"]
        found.append(
            {
                "document_tokens": document,
                "peak_bytes": peak,
                "seconds": seconds,
                "peak_memory_ratio": {side: peak["documents"] / peak[side] for side in others},
                "step_time_ratio": {side: seconds["documents"] / seconds[side] for side in others},
            }
        )
    result = {
        "benchmark": "attention",
        "quick": quick,
        "sizes": vars(sizes),
        "precision": str(precision).removeprefix("torch."),
        "by_document_length": found,
        "environment": environment(device),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
