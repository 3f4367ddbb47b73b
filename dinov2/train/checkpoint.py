"""Checkpoints for bitwise exact resumption.

A checkpoint is a folder `OUT/checkpoints/model_<iteration>/` written by `torch.distributed.checkpoint` (weights,
centers, AdamW moments) with a `state.json` beside the tensors (iteration, images seen, gradient scaler, meters). It is
written to a temporary name and renamed when it is complete, so that a folder with the final name is always complete.
The state of random generators is not stored: random numbers are functions of the seed and the step.
"""

import json
import logging
import runpy
import shutil
import time
from collections.abc import Sequence, Set
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dinov2 import distributed
from dinov2.files import atomic_write, first_cause, root_cause
from dinov2.train.checkpoint_files.folder import (
    ADVICE,
    UNFINISHED,
    complete_checkpoints,
    latest_checkpoint,
    write_checksums,
)
from dinov2.train.checkpoint_files.state import STATE_FILE, read_state
from dinov2.train.checkpoint_files.tensors import (
    load_tensors,
    one_process_is_enough,
    raising_first_failure,
    read_shapes,
    stored_names,
)

logger = logging.getLogger(__name__)


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    step: int
    folder: Path  # its final name
    written: Future[Any]
    started: float  # seconds, of time.perf_counter
    waited: float  # seconds for which training was blocked


class _LastingStager(DefaultStager):
    """Copies tensors to CPU memory that is reused for the next checkpoint."""

    def __init__(self) -> None:
        super().__init__(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
        )
        # Torch 2.11 closes the inner stager after each checkpoint, which frees the memory.
        self._state_dict_stager.close = lambda: None  # type: ignore[method-assign]


@dataclass(eq=False)
class Checkpointer:
    """Saves and restores the state of a run.

    Tensors are copied to CPU memory while training waits, and written by a thread while it continues. The memory is
    reused for the next checkpoint, as allocating pages takes longer than filling them. Each process writes its own
    shards. A run can be resumed on another number of processes; shards are redistributed.

    Args:
        directory: Folder of the checkpoints.
        model, optimizer, scaler: Objects that are saved, and restored in place.
        period: Number of steps between two checkpoints; there is always one after `last_step`.
        keep: Number of newest checkpoints to keep.
        keep_every: Number of steps between checkpoints that are never deleted; 0 for none.
    """

    directory: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    _: KW_ONLY
    period: int
    last_step: int
    keep: int = 3
    keep_every: int = 0

    def __post_init__(self) -> None:
        self._group = distributed.cpu_group()  # for the writing thread
        self._copies = _LastingStager()
        self._pending: _Pending | None = None
        self._newest = -1  # step of the newest checkpoint that is written, being written, or loaded

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.finish()
        except OSError as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # the error that stopped the run is raised

    def is_due(self, step: int) -> bool:
        return (step + 1) % self.period == 0 or step == self.last_step

    def save(self, step: int, extra_state: dict[str, Any]) -> None:
        """Start to write the checkpoint of a step, unless it exists; `finish` completes it.

        `extra_state` are further entries of `state.json`. An OSError if this or the previous checkpoint cannot be
        written (disk full, ...); complete ones are kept.
        """
        self.finish()
        if step <= self._newest:
            return
        started = time.perf_counter()
        folder = self.directory / f"model_{step:07d}"
        unfinished = folder.with_suffix(UNFINISHED)
        try:
            if distributed.is_main():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                facts = {"iteration": step, "world_size": distributed.world_size(), **extra_state}
                state = {**facts, "scaler": self.scaler.state_dict()}
                with atomic_write(unfinished / STATE_FILE) as file:
                    file.write(json.dumps(state).encode())
            distributed.barrier()
            one_process_is_enough()
            written = raising_first_failure(
                lambda: dcp.async_save(
                    self._tensors(),
                    storage_writer=dcp.FileSystemWriter(unfinished),
                    async_stager=self._copies,
                    process_group=self._group,
                    no_dist=not distributed.is_enabled(),
                )
            )
        except Exception as error:
            raise self._failure(step, folder, error) from error
        assert isinstance(written, Future), "async_save returns a future when it stages in the foreground"
        self._newest = step
        self._pending = _Pending(step, folder, written, started, time.perf_counter() - started)

    def finish(self, *, wait: bool = True) -> None:
        """Rename the checkpoint that is being written, if it is complete or `wait`, and delete old ones."""
        if self._pending is None or not (wait or self._pending.written.done()):
            return
        step, folder, written, started, waited = self._pending
        self._pending = None
        try:
            raising_first_failure(written.result)  # on rank 0 only when all processes have written their part
            if distributed.is_main():
                unfinished = folder.with_suffix(UNFINISHED)
                write_checksums(unfinished)
                unfinished.rename(folder)
                self._delete_old()
        except Exception as error:
            raise self._failure(step, folder, error) from error
        seconds = time.perf_counter() - started
        logger.info("checkpoint of iteration %d: %s (%.1f s, training waited %.1f s)", step, folder, seconds, waited)

    def _failure(self, step: int, folder: Path, error: BaseException) -> OSError:
        """Remove a checkpoint that could not be written; the error to raise."""
        shutil.rmtree(folder.with_suffix(UNFINISHED), ignore_errors=True)
        try:
            newest: object = latest_checkpoint(self.directory) or "none"
        except OSError as unreadable:
            newest = f"unknown ({unreadable})"
        return OSError(
            f"could not write the checkpoint of iteration {step} to {folder}: {root_cause(error)}. "
            f"Last complete checkpoint: {newest}. "
            f"Run the same command again when the problem is fixed: it resumes from there."
        )

    def load(self, folder: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
        """Restore a checkpoint in place; returns its `state.json`, which must have the entries `needed`.

        A ValueError if it is damaged or belongs to another model, an OSError if it cannot be read.
        """
        try:
            state = read_state(folder)
            if missing := [name for name in ("scaler", *needed) if name not in state]:
                raise ValueError(f"{folder / STATE_FILE} lacks {', '.join(missing)}")
            stored = stored_names(folder)
            self._allocate_moments(stored)
            load_tensors(self._tensors(), folder, stored)
            if state["scaler"]:  # empty if it was not used
                self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # a damaged file can raise any error
            if isinstance(cause := first_cause(error), OSError) and not isinstance(cause, FileNotFoundError):
                raise OSError(
                    f"cannot read the checkpoint {folder}: {cause}. Nothing was changed; run the same command again "
                    f"when it can be read"
                ) from error
            reason = root_cause(error)
            others = [path.name for path in complete_checkpoints(folder.parent).values() if path != folder]
            before = f"to continue from {others[-1]}" if others else "to start anew, as there is no earlier one"
            remedy = (
                f"Or delete the folder {folder.name} {before}."
                if ADVICE in reason
                else "If the config of the run was changed, change it back or use --no-resume or another --output-dir; "
                f"if the folder {folder.name} is damaged, delete it {before}."
            )
            raise ValueError(f"cannot resume from {folder}: {reason}. {remedy}") from error
        self._newest = state["iteration"]
        logger.info("resumed from %s, finished iteration %d", folder, state["iteration"])
        return state

    def load_moments(self, folder: Path) -> int:
        """Start from the moments of AdamW in the checkpoint of another run; returns for how many parameters.

        Those whose parameters have another shape there, such as the position table, start anew.
        """
        stored = read_shapes(folder)
        fitting = {
            f"optimizer.{name}.{key}"
            for name, param in self.model.named_parameters()
            if (found := stored.get(f"optimizer.{name}.exp_avg")) is not None and found.shape == param.shape
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
        self._allocate_moments(fitting)
        load_tensors({name: self._tensors()[name] for name in fitting}, folder, fitting)
        return len(fitting) // 3

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.state.get(param, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def _allocate_moments(self, stored: Set[str]) -> None:
        """Allocate the moments of AdamW for the parameters that have them in the checkpoint."""
        for name, param in self.model.named_parameters():
            if f"optimizer.{name}.step" in stored:
                moments = {key: torch.zeros_like(param, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[param] = {"step": torch.tensor(0.0, device=param.device), **moments}

    def _delete_old(self) -> None:
        folders = complete_checkpoints(self.directory)
        for iteration in sorted(folders)[: -self.keep]:
            if not (self.keep_every and (iteration + 1) % self.keep_every == 0):
                folders[iteration].rename(folders[iteration].with_suffix(UNFINISHED))
        for leftover in self.directory.glob(f"*{UNFINISHED}"):
            shutil.rmtree(leftover, ignore_errors=True)


if __name__ == "__main__":  # the former name of a command
    runpy.run_module("dinov2.tools", run_name="__main__", alter_sys=True)
