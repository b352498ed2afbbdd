"""The folder of a run: where every file is, which stages are complete, and who may write in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from shearing.errors import ShearingError
from shearing.files.durable import LOCK, locked, read_json, require_writable, write_json

Stage = Literal["prune", "compact", "sparsify", "pretrain", "evaluate"]


class RunDirectory:
    """Paths of a run and the completion marks of its stages.

    A stage writes its files, then calls `mark_complete`; everything before that mark may be half-written, nothing
    after it is. Nothing here reads a recipe or imports torch.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def recipe(self) -> Path:
        """The fully resolved recipe (YAML)."""
        return self.path / "recipe.yaml"

    @property
    def prune(self) -> Path:
        """Folder of mask learning: checkpoints/, metrics.jsonl, masks.safetensors, model.safetensors, summary.json."""
        return self.path / "prune"

    @property
    def moments(self) -> Path:
        """State of mask learning's optimiser for the weights that are kept, under the cut model's names."""
        return self.prune / "moments.safetensors"

    @property
    def compact(self) -> Path:
        """Folder of the cut model, plain Hugging Face, and shape.json."""
        return self.path / "compact"

    @property
    def sparsify(self) -> Path:
        """Folder of one-shot sparsity: the sparse model."""
        return self.path / "sparsify"

    @property
    def sparse(self) -> Path:
        """Folder of the sparse model, plain Hugging Face, with its masks and its manifest."""
        return self.sparsify / "model"

    @property
    def pretrain(self) -> Path:
        """Folder of continued pretraining: checkpoints/, metrics.jsonl."""
        return self.path / "pretrain"

    @property
    def salient(self) -> Path:
        """Positions of the weights that continued pretraining changes, where it changes few."""
        return self.pretrain / "salient.safetensors"

    @property
    def input_norms(self) -> Path:
        """Norms of what masked matrices read as continued pretraining begins, where moving masks go by them."""
        return self.pretrain / "input-norms.safetensors"

    @property
    def changes(self) -> Path:
        """Keys that were changed after continued pretraining had begun (JSON)."""
        return self.pretrain / "changes.json"

    @property
    def model(self) -> Path:
        """Folder of the final model, plain Hugging Face."""
        return self.path / "model"

    @property
    def kept_tokens(self) -> Path:
        """Folder of the final model with the tokens alone that the corpus uses most; where the recipe says so."""
        return self.path / "model-kept-tokens"

    @property
    def family(self) -> Path:
        """Folder of the smaller models that were trained inside the final one, each in a folder of its name."""
        return self.path / "family"

    @property
    def family_masks(self) -> Path:
        """Units that each of those keeps of the final one."""
        return self.pretrain / "family.safetensors"

    @property
    def evaluation(self) -> Path:
        """Held-out losses and speed of every model of the run (JSON)."""
        return self.path / "evaluation.json"

    @property
    def report(self) -> Path:
        """The page about the run (HTML)."""
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        """File whose lock the working process holds."""
        return self.path / LOCK

    def folder(self, stage: Stage) -> Path:
        """The folder that holds what `stage` writes."""
        return self.path if stage == "evaluate" else self.path / stage

    def checkpoints(self, stage: Literal["prune", "pretrain"]) -> Path:
        """Folder of the checkpoints of a training stage."""
        return self.folder(stage) / "checkpoints"

    def metrics(self, stage: Literal["prune", "pretrain"]) -> Path:
        """metrics.jsonl of a training stage."""
        return self.folder(stage) / "metrics.jsonl"

    def complete(self, stage: Stage) -> Path:
        """The file that says that `stage` is complete; evaluation's own result is its mark."""
        return self.evaluation if stage == "evaluate" else self.folder(stage) / "complete.json"

    def is_complete(self, stage: Stage) -> bool:
        """Whether `stage` has written everything it writes."""
        return self.complete(stage).is_file()

    def mark_complete(self, stage: Stage, payload: dict[str, Any]) -> None:
        """Declare `stage` complete, atomically.

        Args:
            stage: the stage that has written all its other files.
            payload: JSON-able values for the stages that follow.
        """
        write_json(self.complete(stage), payload)

    def read_complete(self, stage: Stage) -> dict[str, Any]:
        """What `mark_complete` was given.

        Raises:
            ShearingError: the stage is not complete, or its file is no JSON object.
        """
        path = self.complete(stage)
        if not path.is_file():
            # One-shot sparsity has a command of its own, for models outside of a run.
            command = {"evaluate": "`shear eval` or ", "sparsify": ""}.get(stage, f"`shear {stage}` or ")
            raise ShearingError(
                "run_dir",
                value=str(self.path),
                allowed=f"a run whose stage '{stage}' is complete ({path.name} in {path.parent})",
                mend=f"run {command}`shear run` with this recipe first",
            )
        return read_json(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and keep other processes from working in it; see `locked`.

        Raises:
            ShearingError: no write permission, no folder, or another process is at work here.
        """
        self.require_writable()
        with locked(self.path, field="run_dir"):
            yield

    def require_writable(self) -> None:
        """Check that the run's files can be written, without writing any.

        Raises:
            ShearingError: the folder, or the nearest folder above it that exists, is no folder or not writable.
        """
        require_writable(self.path, field="run_dir")
