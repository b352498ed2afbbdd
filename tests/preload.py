"""What the processes of tests import, imported once by the server that they are forks of (see `forks`)."""

from __future__ import annotations

import contextlib
import gc
import importlib

import torch

from shearing.errors import ShearingError
from shearing.training.engines.deepspeed_engine import import_deepspeed

# The last of them come late: a model with its family, an optimiser of DeepSpeed, which wants torch's compiler, with the
# first engine, adapters with the first stage that trains them.
MODULES = (
    "shearing.cli",
    "shearing.objectives.language_model",
    "shearing.pruning.sparse.one_shot",
    "shearing.runs.race.race",
    *(f"shearing.runs.stages.{stage}" for stage in ("run", "prune", "compact", "sparsify", "pretrain")),
    "shearing.training.engines.torch_engine",
    "transformers.models.llama.modeling_llama",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft",
)

with contextlib.suppress(ShearingError):
    import_deepspeed(torch.device("cpu"))
for _module in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(_module)
# What is here stays: no fork has to look at it again for what could be freed.
gc.collect()
gc.freeze()
