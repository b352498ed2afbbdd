"""What a GPU can do at most, and what a training step asks of it.

Peaks are dense: where a data sheet gives the figure with structured sparsity, half of it. They are of matrix products
on the units that training uses: tensor cores with fp32 accumulation for bf16 and fp16, and for fp32 the ordinary units,
because torch does not use TF32 unless it is told to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from shearing.data.corpus.corpus import whole_rows
from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.objectives.recipe import DistillRecipe
from shearing.pruning.structured.importance.metric import Cost
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.runs.planning.memory import Memory

_NVIDIA = "https://www.nvidia.com/content/dam/en-zz/Solutions"
_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf"


@dataclass(frozen=True)
class GPU:
    """A product.

    Attributes:
        name: as people say it.
        pattern: regular expression of what drivers call it, without the maker's name.
        memory: bytes; None where there are several sizes and the driver's name does not say which.
        peak: dense FLOP/s by precision; a precision that is not there is unknown or emulated.
        source: data sheet.
    """

    name: str
    pattern: str
    memory: int | None
    peak: Mapping[torch.dtype, float]
    source: str


def _peaks(*, fp32: float | None = None, fp16: float, bf16: bool = True) -> Mapping[torch.dtype, float]:
    """TFLOP/s as FLOP/s; bf16 runs at fp16's speed where there are units for it."""
    peaks = {torch.float16: fp16 * 1e12}
    if bf16:
        peaks[torch.bfloat16] = fp16 * 1e12
    if fp32 is not None:
        peaks[torch.float32] = fp32 * 1e12
    return peaks


def _gigabytes(count: int) -> int:
    return count * 10**9


GPUS = (
    GPU(
        "A100 40GB",
        r"A100-(SXM4|PCIE)-40GB|A100 40GB",
        _gigabytes(40),
        _peaks(fp32=19.5, fp16=312),
        f"{_NVIDIA}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    ),
    GPU(
        "A100 80GB",
        r"A100-SXM4-80GB|A100 80GB PCIe|A100-PCIE-80GB|A100 80GB|A100-SXM-80GB",
        _gigabytes(80),
        _peaks(fp32=19.5, fp16=312),
        f"{_NVIDIA}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    ),
    GPU(
        "A100",
        r"A100",
        None,
        _peaks(fp32=19.5, fp16=312),
        f"{_NVIDIA}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    ),
    GPU("H100 SXM", r"H100( SXM5?)?|H100 80GB HBM3|H100-SXM5-80GB", _gigabytes(80), _peaks(fp32=67, fp16=989.4), _H100),
    GPU("H100 PCIe", r"H100 PCIe|H100 80GB HBM2e", _gigabytes(80), _peaks(fp32=51, fp16=756), _H100),
    GPU("H100 NVL", r"H100 NVL", _gigabytes(94), _peaks(fp16=835.5), _H100),
    GPU(
        "H200",
        r"H200( SXM)?",
        _gigabytes(141),
        _peaks(fp32=67, fp16=989.4),
        "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446",
    ),
    GPU(
        "B200",
        r"B200",
        _gigabytes(180),
        _peaks(fp16=2250),
        "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703",
    ),
    GPU(
        "A10",
        r"A10",
        _gigabytes(24),
        _peaks(fp32=31.2, fp16=125),
        f"{_NVIDIA}/Data-Center/a10/pdf/a10-datasheet.pdf",
    ),
    GPU(
        "A40",
        r"A40",
        _gigabytes(48),
        _peaks(fp32=37.4, fp16=149.7),
        "https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf",
    ),
    GPU("L4", r"L4", _gigabytes(24), _peaks(fp32=30.3, fp16=121), "https://www.nvidia.com/en-us/data-center/l4/"),
    GPU(
        "L40S",
        r"L40S",
        _gigabytes(48),
        _peaks(fp32=91.6, fp16=362.05),
        "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413",
    ),
    GPU("RTX 4090", r"RTX 4090", _gigabytes(24), _peaks(fp32=82.6, fp16=165.2), _ADA),
    GPU("RTX 3090", r"RTX 3090", _gigabytes(24), _peaks(fp32=35.6, fp16=71), _AMPERE),
    GPU(
        "V100 SXM2",
        r"V100-SXM2-(16|32)GB|V100-SXM3-32GB|V100",
        None,
        _peaks(fp32=15.7, fp16=125, bf16=False),
        "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
    ),
    GPU(
        "V100 PCIe",
        r"V100-PCIE-(16|32)GB",
        None,
        _peaks(fp32=14, fp16=112, bf16=False),
        "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
    ),
    GPU(
        "T4",
        r"T4",
        _gigabytes(16),
        _peaks(fp32=8.1, fp16=65, bf16=False),
        f"{_NVIDIA}/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
    ),
    GPU(
        "MI300X",
        r"MI300X( OAM)?",
        _gigabytes(192),
        _peaks(fp32=163.4, fp16=1307.4),
        "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
    ),
)

_MAKER = re.compile(r"^((NVIDIA|AMD|Tesla|GeForce|Instinct)\s+)+", re.IGNORECASE)


def gpu_of(device_name: str) -> GPU | None:
    """The product that a driver, or a person, calls `device_name`; None for one that is not in the table.

    A partition of a GPU (MIG), a laptop's chip and a cloud's own cut of one are other products than the whole one.

    Args:
        device_name: what `torch.cuda.get_device_name` returns, or a name of `GPUS`.
    """
    name = _MAKER.sub("", device_name.strip())
    for gpu in GPUS:
        if name.lower() == gpu.name.lower() or re.fullmatch(gpu.pattern, name, re.IGNORECASE):
            return gpu
    return None


def peak_flops(device_name: str, *, precision: torch.dtype) -> float | None:
    """Dense matrix products' peak in FLOP/s.

    Args:
        device_name: see `gpu_of`.
        precision: dtype of the products.

    Returns:
        None for a device that is not in the table, and for a precision that it emulates or whose peak is not known.
    """
    gpu = gpu_of(device_name)
    return None if gpu is None else gpu.peak.get(precision)


def forward_flops_per_token(shape: Shape, *, sequence_length: int) -> float:
    """FLOPs of a forward pass with its loss, per token; a third of `training_flops_per_token`, with its conventions."""
    # The embedding is looked up, not multiplied; a tied one is multiplied as the head. Of experts a token's own count.
    multiplied = shape.active_parameters() - (0 if shape.tied else shape.vocab_size * shape.hidden_size)
    # Scores and weighted values: 2 products of 2 FLOPs for each of the S / 2 positions a token sees on average.
    width = shape.num_attention_heads * shape.head_dim
    return 2.0 * multiplied + 2.0 * shape.num_hidden_layers * width * sequence_length


def rotation_flops(source: Shape, *, prune: PruneRecipe, sequence_length: int) -> float:
    """FLOPs of finding the basis that a source is rotated into: a forward pass over the calibration text, if any."""
    if prune.rotate == "none":
        return 0.0
    tokens = whole_rows(prune.calibration_tokens, sequence_length=sequence_length) * sequence_length
    return forward_flops_per_token(source, sequence_length=sequence_length) * tokens


def teacher_flops_per_token(shape: Shape | None, *, distill: DistillRecipe | None, sequence_length: int) -> float:
    """FLOPs of the teacher of every step, per training token; 0 where none reads along.

    Args:
        shape: of the teacher; None: there is none.
        distill: how it is listened to. Where a cache stands for it, it does not read; where tokens are chosen by its
            entropy before the loss, its head is multiplied twice.
        sequence_length: tokens of a sequence.
    """
    if shape is None or distill is None or not distill.listens_online:
        return 0.0
    again = 2.0 * shape.vocab_size * shape.hidden_size if distill.skip_low_entropy else 0.0
    return forward_flops_per_token(shape, sequence_length=sequence_length) + again


def training_flops_per_token(shape: Shape, *, sequence_length: int) -> float:
    """FLOPs of a training step, forward and backward, per token: the numerator of model FLOPs utilisation (MFU).

    6 for each parameter but those of an embedding that is only looked up, and 6·L·H·dh·S for attention (the 12 of
    arXiv 2204.02311, appendix B, halved: causal attention leaves out half of the scores). What activation
    checkpointing computes twice is not counted, nor is what masks cost; while masks are learned the shape is the
    source's, because masked units are computed like the others.

    Args:
        shape: of the model that is trained.
        sequence_length: S, tokens of a sequence.
    """
    return 3 * forward_flops_per_token(shape, sequence_length=sequence_length)


def flops_of(cost: Cost, source: Shape, *, sequence_length: int) -> float:
    """FLOPs of choosing units or of a refit, with the conventions of `training_flops_per_token`.

    Args:
        cost: of a metric or a refit.
        source: shape of the model that is read.
        sequence_length: S, tokens of a sequence of its text.
    """
    # A backward pass takes twice the forward pass, which `forward_tokens` counts.
    tokens = cost.forward_tokens + 2 * cost.backward_tokens
    return tokens * forward_flops_per_token(source, sequence_length=sequence_length) + cost.other_flops


Fit = Literal["yes", "tight", "no", "?"]

USABLE = 0.9
"""Share of a GPU: CUDA's context, the workspaces of libraries and fragmentation want about a tenth."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What to plan for.

    Attributes:
        processes: one on each GPU.
        name: the GPU as it was named, or "cpu".
        gpu: its row of the table; None if it has none.
        memory: bytes of one GPU; None if unknown.
        mfu: share of the peak that training reaches.
    """

    processes: int
    name: str
    gpu: GPU | None
    memory: int | None
    mfu: float

    @classmethod
    def of(cls, *, processes: int | None, gpu: str | None, gigabytes: float | None, mfu: float) -> Hardware:
        """What the user gave, and for the rest what is here.

        Raises:
            ShearingError: a number that cannot be.
        """
        for field, value, valid, allowed in (
            ("--gpus", processes, processes is None or processes >= 1, "at least 1"),
            ("--memory", gigabytes, gigabytes is None or 0 < gigabytes < math.inf, "a number of GB, more than 0"),
            ("--mfu", mfu, 0 < mfu <= 1, "more than 0 and at most 1: 0.4 is usual"),
        ):
            if not valid:
                raise ShearingError(field, value=value, allowed=allowed, mend="correct the value, or leave it out")
        here = torch.cuda.is_available()
        name = gpu or (torch.cuda.get_device_name() if here else "cpu")
        known = gpu_of(name)
        memory = known.memory if known else None
        if gigabytes is not None:
            memory = int(gigabytes * 1e9)
        elif gpu is None and here:
            memory = torch.cuda.get_device_properties(0).total_memory
        return cls(
            processes=processes or max(1, torch.cuda.device_count()), name=name, gpu=known, memory=memory, mfu=mfu
        )

    def fit(self, memory: Memory) -> Fit:
        """Whether a GPU can hold that."""
        if self.memory is None:
            return "?"
        if memory.total <= USABLE * self.memory:
            return "yes"
        return "tight" if memory.total <= self.memory else "no"
