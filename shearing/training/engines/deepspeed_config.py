"""The settings that DeepSpeed is started with: the recipe's, ours, and the user's own on top, checked."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shearing.errors import CombinedShearingError, ShearingError, key
from shearing.training.recipe import DeepSpeedRecipe

FIELD = "config"

OWNED: Mapping[str, str] = {
    "train_batch_size": key("batch_size"),
    "train_micro_batch_size_per_gpu": key("micro_batch_size"),
    "gradient_accumulation_steps": "batch_size and micro_batch_size of the stages",
    "gradient_clipping": key("gradient_clipping"),
    "optimizer": "betas, epsilon, weight_decay and learning_rate of the stages",
    "scheduler": "warmup, learning_rate and final_learning_rate of the stages",
    "bf16": key("precision"),
    "bfloat16": key("precision"),
    "fp16": key("precision"),
    "amp": key("precision"),
    "torch_autocast": key("precision"),
    "zero_optimization.stage": key("zero_stage"),
    "zero_optimization.offload_optimizer.device": key("offload_optimizer"),
    "zero_optimization.offload_param.device": key("offload_parameters"),
    "activation_checkpointing": key("activation_checkpointing"),
}
"""Who decides what the recipe decides: a second place to say it would be a place to contradict it."""

# Top-level keys of https://www.deepspeed.ai/docs/config-json/ that make sense here; DeepSpeed itself ignores others.
_KNOWN = frozenset(
    {
        "aio",
        "autotuning",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compression_training",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "disable_allgather",
        "dump_state",
        "elasticity",
        "flops_profiler",
        "gradient_predivide_factor",
        "memory_breakdown",
        "nebula",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "sparse_gradients",
        "steps_per_print",
        "tensorboard",
        "tensor_parallel",
        "use_data_before_expert_parallelism",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)

_BUCKET_ELEMENTS = 200_000_000


def deepspeed_config(
    settings: DeepSpeedRecipe,
    *,
    low_precision: bool,
    gradient_clipping: float,
    micro_batch_size: int,
    accumulation: int,
    num_processes: int,
    parameters: int,
    on_gpu: bool,
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        settings: the recipe's section.
        low_precision: bf16 weights with fp32 master weights.
        gradient_clipping: largest norm, 0 for none; always written, because DeepSpeed's default has become 1.
        micro_batch_size: sequences of one forward pass of one process.
        accumulation: forward passes of one process in a step.
        num_processes: of the run.
        parameters: of the model; buffers need not be larger.
        on_gpu: whether communication can overlap with computing.

    Raises:
        ShearingError: all that is wrong with the user's own settings, together.
    """
    extra = user_config(settings)
    bucket = max(1, min(_BUCKET_ELEMENTS, parameters))
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": on_gpu,
        # It replaces torch.nn.functional.linear for the whole process.
        "memory_efficient_linear": False,
    }
    if settings.zero_stage > 0 and settings.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if settings.zero_stage == 3 and settings.offload_parameters == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    config: dict[str, Any] = {
        "train_batch_size": micro_batch_size * accumulation * num_processes,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": 1 << 60,
        # torch's fused AdamW, on every device: the same rounding whatever is offloaded where.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if low_precision:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if settings.zero_stage == 1:
            config["bf16"]["immediate_grad_update"] = True  # or a gradient stays beside the sum it was added to
        # Gradients come in bf16; sums of many of them lose in it what a single one adds.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return _merged(config, extra)


def user_config(settings: DeepSpeedRecipe) -> dict[str, Any]:
    """The user's own DeepSpeed settings, checked as far as that is possible without starting it.

    Raises:
        ShearingError: no such file, no JSON object, keys that DeepSpeed would ignore, or keys that the recipe owns.
    """
    config = settings.config
    if config is None:
        return {}
    extra = _read(config) if isinstance(config, Path) else config
    errors = [*_owned(extra), *_unknown(extra)]
    if errors:
        raise errors[0] if len(errors) == 1 else CombinedShearingError(errors)
    return extra


def _read(path: Path) -> dict[str, Any]:
    try:
        extra = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShearingError(
            FIELD, value=str(path), allowed="a readable JSON file", mend=f"correct the path or the file ({error})"
        ) from error
    if not isinstance(extra, dict):
        raise ShearingError(FIELD, value=str(path), allowed="a JSON object", mend="write {…} at the top of the file")
    return extra


def _owned(extra: Mapping[str, Any]) -> Iterator[ShearingError]:
    for setting, owner in OWNED.items():
        found: Any = extra
        for part in setting.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found not in (None, "auto"):
            yield ShearingError(
                f"{key(FIELD)}: {setting}",
                value=found,
                allowed="nothing: the recipe decides it",
                mend=f"remove it; set {owner}",
            )


def _unknown(extra: Mapping[str, Any]) -> Iterator[ShearingError]:
    known = _KNOWN | {setting for setting in OWNED if "." not in setting}
    for setting in extra:
        if setting not in known:
            yield _unknown_key(setting, known=known, where="DeepSpeed's top-level keys")
    zero = extra.get("zero_optimization", {})
    if isinstance(zero, Mapping) and zero:
        try:
            from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        except ImportError:
            return  # that it is missing is an error of its own
        fields = DeepSpeedZeroConfig.model_fields
        names = {field.alias or name for name, field in fields.items()} | set(fields)
        for setting in zero:
            if setting not in names:
                yield _unknown_key(
                    setting, known=names, where="the keys of zero_optimization", prefix="zero_optimization."
                )


def _unknown_key(setting: str, *, known: frozenset[str] | set[str], where: str, prefix: str = "") -> ShearingError:
    near = difflib.get_close_matches(setting, known, n=1)
    return ShearingError(
        f"{key(FIELD)}: {prefix}{setting}",
        value="unknown",
        allowed=f"one of {where}",
        mend=f"did you mean {prefix}{near[0]}?" if near else "remove it",
    )


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for setting, value in theirs.items():
        if value == "auto":
            continue
        nested = isinstance(value, Mapping) and isinstance(merged.get(setting), Mapping)
        merged[setting] = _merged(merged[setting], value) if nested else value
    return merged
