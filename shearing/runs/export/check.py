"""Whether an exported folder computes what training computed: opened with transformers alone, logits compared.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shearing.errors import ShearingError

if TYPE_CHECKING:
    from peft import PeftModel

TOKENS = 64
LARGEST_DIFFERENCE = 1e-4
"""Relative difference of fp32 logits above which a folder is refused; rounding, and merged adapters, are below 1e-5."""


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, *, context: int = TOKENS) -> Tensor:
    """Logits [1, S, V] of tokens drawn with seed 0, in double precision; of no more than a context has."""
    config: Any = model.config
    length = min(TOKENS, context, config.max_position_embeddings)
    tokens = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.double()


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by that of what was expected."""
    return float((found - expected).norm() / expected.norm())


def opened(folder: Path) -> PreTrainedModel:
    """The model of a folder as anybody opens it, in fp32, and its tokenizer tried.

    Raises:
        ShearingError: weights are missing, or there are others than the model has.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    if wrong := {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}:
        raise _refused(f"{folder}: {wrong}", allowed="every weight of the model, and no others")
    if (folder / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(folder)
    result: PreTrainedModel = model.eval()
    return result


def require_same(found: Tensor, *, expected: Tensor, what: str) -> float:
    """Compare logits.

    Args:
        found, expected: logits of both.
        what: was compared, in words.

    Returns:
        Their relative difference.

    Raises:
        ShearingError: it is larger than rounding explains.
    """
    apart = difference(found, expected)
    if not apart <= LARGEST_DIFFERENCE:
        raise _refused(f"{what}: logits differ by {apart:.3g}", allowed=f"at most {LARGEST_DIFFERENCE:g}, relatively")
    return apart


def _refused(value: str, *, allowed: str) -> ShearingError:
    return ShearingError(
        "model",
        value=value,
        allowed=allowed,
        mend="the weights may hold NaN, or the checkpoint's run and its source may not belong together; else please "
        "report it. Nothing was written",
    )
