"""What recipes and plans have to know of every engine, said once, and without torch.

A new engine is a file beside this one and a line in `ENGINES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What is known of an engine before it is imported.

    Attributes:
        home: `module:class`.
        summary: what it is, as the documentation of `training.engine` says it.
        package: what has to be installed beside torch, which is also the name of the extra; None: nothing.
        adapters: whether it trains models most of whose weights are frozen.
        holds_as: the stage of ZeRO that shares out what it shares out, which plans go by; None: as
            `training.deepspeed.zero_stage` says.
    """

    home: str
    summary: str
    package: str | None = None
    adapters: bool = False
    holds_as: Literal[0, 1, 2, 3] | None


ENGINES: dict[str, EngineFacts] = {
    "torch": EngineFacts(
        home="shearing.training.engines.torch_engine:TorchEngine",
        summary="every process holds everything",
        adapters=True,
        holds_as=0,
    ),
    "deepspeed": EngineFacts(
        home="shearing.training.engines.deepspeed_engine:DeepSpeedEngine",
        summary="ZeRO",
        package="deepspeed",
        holds_as=None,
    ),
    "fsdp2": EngineFacts(
        home="shearing.training.engines.fsdp2_engine:Fsdp2Engine",
        summary="torch's own sharing out of everything (fully_shard)",
        adapters=True,
        holds_as=3,
    ),
}
"""By name, as recipes say it."""

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[tuple(ENGINES)]
