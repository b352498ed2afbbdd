"""Peak memory and time of the loss, forward and backward: chunked against whole logits, both sides in one run.

    python benchmarks/loss_memory.py [--quick]

The default sizes are those of a 135M model with 49,152 tokens of vocabulary at 4 x 1,024 tokens. On a CPU, memory is
the growth of the resident peak of a fresh process per side; on a GPU what torch's allocator says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.nn import functional as F

from shearing.evaluation.environment import environment
from shearing.models.anatomy import Head
from shearing.objectives.cross_entropy import causal_lm_loss
from shearing.progress import max_memory

CHUNK_TOKENS = 1024
Inputs = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
    """The usual way: all logits, in fp32."""
    logits_NV = (hidden_BSD @ weight_VD.T).float().flatten(0, 1)
    return F.cross_entropy(logits_NV, labels_BS.flatten(), reduction="sum")


def chunked(hidden_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
    """Ours."""
    return causal_lm_loss(hidden_BSD, Head(weight_VD), labels_BS, chunk_tokens=CHUNK_TOKENS)[0]


SIDES: dict[str, Loss] = {"naive": naive, "chunked": chunked}


def make_inputs(tokens: int, vocabulary: int, hidden: int, *, device: torch.device) -> Inputs:
    """Hidden states, head weight and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden_BSD = torch.randn(4, tokens // 4, hidden, generator=generator).to(device)
    weight_VD = (torch.randn(vocabulary, hidden, generator=generator) * 0.02).to(device)
    labels_BS = torch.randint(vocabulary, (4, tokens // 4), generator=generator).to(device)
    return hidden_BSD.requires_grad_(), weight_VD.requires_grad_(), labels_BS


def one_step(loss: Loss, inputs: Inputs, *, precision: torch.dtype) -> float:
    """Seconds of forward and backward."""
    hidden, weight, labels = inputs
    hidden.grad = weight.grad = None
    device = hidden.device
    started = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        value = loss(hidden, weight, labels) / labels.numel()
    value.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(side: str, sizes: tuple[int, int, int], device: torch.device, precision: torch.dtype) -> int:
    """Growth of peak memory over the inputs, gradients included."""
    inputs = make_inputs(*sizes, device=device)
    # What libraries allocate at their first use is not the loss's.
    one_step(SIDES[side], make_inputs(16, 64, 16, device=device), precision=precision)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = max_memory()
    one_step(SIDES[side], inputs, precision=precision)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, about half a minute on 2 cores")
    quick = parser.parse_args().quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, repeats = ((2048, 16384, 128), 3) if quick else ((4096, 49152, 576), 5)
    result: dict[str, object] = {"benchmark": "loss_memory", "quick": quick, "chunk_tokens": CHUNK_TOKENS}
    result |= dict(zip(("tokens", "vocabulary", "hidden"), sizes, strict=True))
    precisions = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
    for precision in precisions:
        name = str(precision).removeprefix("torch.")
        peaks = {side: peak_of_fresh_process(side, sizes, device, precision) for side in SIDES}
        inputs = make_inputs(*sizes, device=device)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for repeat in range(repeats + 1):
            for side, loss in SIDES.items():
                taken = one_step(loss, inputs, precision=precision)
                if repeat:  # the first of each is warm-up
                    seconds[side].append(taken)
        medians = {side: statistics.median(taken) for side, taken in seconds.items()}
        for side in SIDES:
            print(f"{name:9} {side:8} {peaks[side] / 1e6:9.0f} MB {medians[side]:8.3f} s")
        result[name] = {
            "peak_bytes": peaks,
            "seconds": medians,
            "peak_memory_ratio": peaks["chunked"] / peaks["naive"],
            "step_time_ratio": medians["chunked"] / medians["naive"],
        }
    result["environment"] = environment(device)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
