"""Checkpoints of the linear evaluation: one file each, with the published keys (model, optimizer, scheduler, ...)."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dinov2 import distributed
from dinov2.files import atomic_write
from dinov2.models.weights import read_file

logger = logging.getLogger(__name__)

START_ANEW = "start anew with --no-resume, or use another --output-dir"
RUNNING, FINAL = "running_checkpoint_linear_eval", "model_final"


class LinearCheckpointer:
    """Saves (rank 0) and restores the state of a run; every process has the same one.

    Args:
        output_dir: Folder of the checkpoints and of `last_checkpoint`, which contains the name of the newest one.
        model: The classifiers, not wrapped.
        optimizer, scheduler: Saved and restored with the classifiers.
        run: Settings that identify the run; checkpoints of other runs are rejected.
        validated_on: Identity of the validation images; the history of other images is discarded.
    """

    def __init__(
        self,
        output_dir: Path,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        run: dict[str, Any],
        validated_on: str = "",
    ) -> None:
        self.output_dir, self.run, self.validated_on = output_dir, run, validated_on
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        self.pointer = output_dir / "last_checkpoint"

    def save(self, name: str, iteration: int, history: list[dict[str, Any]]) -> None:
        """Write `NAME.pth` after `iteration` (the last finished one), atomically replacing an older file."""
        if not distributed.is_main():
            return
        state = {key: part.state_dict() for key, part in self.parts.items()}
        state |= {"iteration": iteration, "history": history, "run": self.run, "validated_on": self.validated_on}
        path = self.output_dir / f"{name}.pth"
        with atomic_write(path) as file:
            torch.save(state, file)
        with atomic_write(self.pointer) as file:
            file.write(path.name.encode())
        logger.info("checkpoint of iteration %d: %s", iteration, path)

    def load_latest(self) -> tuple[int, list[dict[str, Any]]]:
        """Restore the newest checkpoint if there is one; returns the next iteration, and the history of validations."""
        if not self.pointer.is_file():
            return 0, []
        name = self.pointer.read_bytes().decode(errors="replace").strip()
        if not re.fullmatch(r"[\w-]+\.pth", name):
            raise ValueError(f"{self.pointer} is damaged: {name[:40]!r} is not a name of a checkpoint; {START_ANEW}")
        path = self.output_dir / name
        try:
            state = read_checkpoint(path)
        except FileNotFoundError as error:
            raise ValueError(f"{self.pointer} names {name}, which is missing; {START_ANEW}") from error
        except ValueError as error:
            raise ValueError(f"{error}; {START_ANEW}") from error
        stored = state["run"]
        other = [key for key, value in self.run.items() if stored.get(key) != value]
        if other:
            differences = "; ".join(f"{key}: {stored.get(key)!r} then, {self.run[key]!r} now" for key in other)
            raise ValueError(f"{path} belongs to another run ({differences}); {START_ANEW}")
        try:
            for key, part in self.parts.items():
                part.load_state_dict(state[key])
            iteration, history = int(state["iteration"]), [dict(record) for record in state["history"]]
        except Exception as error:  # of any type, for wrong keys, types and shapes
            raise ValueError(f"{path} is damaged: {error}; {START_ANEW}") from error
        if history and state.get("validated_on") != self.validated_on:
            logger.warning("%s: its validations were on other images and are discarded", path)
            history = []
        logger.info("resumed from %s, finished iteration %d", path, iteration)
        return iteration + 1, history


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; `run` is empty if it is missing, as in published checkpoints."""
    state = read_file(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of a linear evaluation: it has no 'model'")
    return state | {"run": state["run"] if isinstance(state.get("run"), dict) else {}}
