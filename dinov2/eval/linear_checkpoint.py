"""Checkpoints of the linear evaluation: one file each, with the published keys (model, optimizer, scheduler, ...)."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dinov2 import distributed
from dinov2.files import replacing

logger = logging.getLogger(__name__)

RUNNING, FINAL = "running_checkpoint_linear_eval", "model_final"


class LinearCheckpointer:
    """Saves (rank 0) and restores the state of a run; every process has the same one."""

    def __init__(
        self,
        output_dir: Path,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        run: dict[str, Any],
    ) -> None:
        """Keep references.

        Args:
            output_dir: where the files and `last_checkpoint`, which names the newest, are.
            model: the classifiers, not wrapped.
            optimizer, scheduler: saved and restored with them.
            run: what makes this run the one it is; a checkpoint of another run is not resumed from.
        """
        self.output_dir, self.run = output_dir, run
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        self.pointer = output_dir / "last_checkpoint"

    def save(self, name: str, iteration: int, history: list[dict[str, Any]]) -> None:
        """Write `NAME.pth` after `iteration` (the last finished one), replacing an older file of that name whole."""
        if not distributed.is_main():
            return
        state = {key: part.state_dict() for key, part in self.parts.items()}
        state |= {"iteration": iteration, "history": history, "run": self.run}
        path = self.output_dir / f"{name}.pth"
        with replacing(path) as file:
            torch.save(state, file)
        with replacing(self.pointer) as file:
            file.write(path.name.encode())
        logger.info("checkpoint of iteration %d: %s", iteration, path)

    def load_latest(self) -> tuple[int, list[dict[str, Any]]]:
        """Restore the newest checkpoint if there is one: first iteration to do, and the history so far.

        Raises:
            ValueError: if the checkpoint belongs to another run, or is damaged.
        """
        if not self.pointer.is_file():
            return 0, []
        path = self.output_dir / self.pointer.read_text().strip()
        state = read_checkpoint(path)
        stored = state.get("run", {})
        other = [key for key, value in self.run.items() if stored.get(key) != value]
        if other:
            differences = "; ".join(f"{key}: {stored.get(key)!r} then, {self.run[key]!r} now" for key in other)
            raise ValueError(
                f"{path} belongs to another run ({differences}); "
                "start anew with --no-resume, or use another --output-dir"
            )
        for key, part in self.parts.items():
            part.load_state_dict(state[key])
        logger.info("resumed from %s, finished iteration %d", path, state["iteration"])
        return state["iteration"] + 1, state["history"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no checkpoint of linear classifiers.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged bytes surface as an error of any type
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path} is no checkpoint of a linear evaluation: it has no 'model'")
    return state
