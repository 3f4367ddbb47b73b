"""Checkpoints for bitwise exact resumption, initial weights, and export of the teacher for evaluation.

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
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dinov2 import distributed
from dinov2.files import atomic_write, numbered_path
from dinov2.log import read_records
from dinov2.models.carry_over import fit_positions
from dinov2.models.weights import check_numbers, read_state_dict
from dinov2.train.checkpoint_folder import (
    UNFINISHED,
    SafeReader,
    complete_checkpoints,
    latest_checkpoint,
    one_process_is_enough,
    read_shapes,
    stored_names,
)
from dinov2.train.checkpoint_metadata import METADATA_FILE, write_checksums
from dinov2.train.checkpoint_state import STATE_FILE, read_state
from dinov2.train.parallel import full_tensor
from dinov2.train.ssl_meta_arch import METHOD_STATE, SSLMetaArch

logger = logging.getLogger(__name__)

OUTPUTS = (
    *("checkpoints", "eval", "health", "training_metrics.json", "config.yaml", "environment.json", "report.html"),
    *("tensorboard", "wandb", "wandb_run_id"),
)
"""The outputs of a run in its folder, besides the log."""

_TABLE = "backbone.pos_embed"

MESSAGE_LENGTH = 600


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
            written = dcp.async_save(
                self._tensors(),
                storage_writer=dcp.FileSystemWriter(unfinished),
                async_stager=self._copies,
                process_group=self._group,
                no_dist=not distributed.is_enabled(),
            )
        except (OSError, RuntimeError, CheckpointException) as error:
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
            written.result()  # on rank 0 only when all processes have written their part
            if distributed.is_main():
                unfinished = folder.with_suffix(UNFINISHED)
                write_checksums(unfinished)
                unfinished.rename(folder)
                self._delete_old()
        except (OSError, RuntimeError, CheckpointException) as error:
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
            f"could not write the checkpoint of iteration {step} to {folder}: {_root_cause(error)}. "
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
            _load_tensors(self._tensors(), folder, stored)
            if state["scaler"]:  # empty if it was not used
                self.scaler.load_state_dict(state["scaler"])
        except (Exception, CheckpointException) as error:  # a damaged file can raise any error
            if isinstance(cause := _first_cause(error), OSError) and not isinstance(cause, FileNotFoundError):
                raise OSError(
                    f"cannot read the checkpoint {folder}: {cause}. Nothing was changed; run the same command again "
                    f"when it can be read"
                ) from error
            raise ValueError(
                f"cannot resume from {folder}: {_root_cause(error)}. If the config of the run was changed, change it "
                f"back or use --no-resume or another --output-dir; if the folder is damaged, delete it to continue "
                f"from the one before."
            ) from error
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
        _load_tensors({name: self._tensors()[name] for name in fitting}, folder, fitting)
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


def has_lost_checkpoints(output_dir: Path, period: int) -> bool:
    """Whether an earlier run has no checkpoints although its metrics are too long for that; logs a warning if so.

    They were deleted, or are on a disk that is not mounted. Metrics of less than two periods may be from a run that was
    stopped before its first checkpoint was complete.
    """
    records = read_records(output_dir / "training_metrics.json")
    if not records or records[-1]["iteration"] < 2 * period:
        return False
    logger.warning(
        "there is no checkpoint in %s, but the metrics of an earlier run go to step %d",
        output_dir / "checkpoints",
        records[-1]["iteration"],
    )
    return True


def archive_run(output_dir: Path) -> None:
    """Move the outputs of an earlier run to `OUT/earlier.<n>`, so that they are neither mixed nor lost."""
    former = [path for name in OUTPUTS if (path := output_dir / name).exists()]
    if distributed.is_main() and former:
        archive = numbered_path(output_dir / "earlier")
        archive.mkdir()
        for path in former:
            path.rename(archive / path.name)
        logger.warning("starting anew: the outputs of an earlier run are now in %s", archive)
    distributed.barrier()


def load_training_weights(model: SSLMetaArch, source: str | Path) -> str | Path:
    """Load networks and centers into a model that is not sharded yet, without optimizer state.

    The source is a checkpoint folder, a run's output (its newest checkpoint), a file with a whole checkpoint, or an
    exported teacher or its folder: one network with its heads, which initializes both student and teacher. Position
    tables of another grid are resampled. Returns the file or checkpoint folder. A ValueError if it does not fit the
    model, or is not finite.
    """
    if (folder := Path(source)).is_dir() and not (folder / METADATA_FILE).exists():
        teacher = folder / "teacher_checkpoint.pth"
        source = teacher if teacher.is_file() else latest_checkpoint(folder / "checkpoints") or folder
    if Path(source).is_dir():
        prefixes = tuple(f"model.{part}" for part in METHOD_STATE)
        names_and_values = ((f"model.{name}", value) for name, value in model.state_dict().items())
        state = {name: value for name, value in names_and_values if name.startswith(prefixes)}
        try:
            stored = {name for name in stored_names(Path(source)) if name.startswith(prefixes)}
            tables = _tables_of_other_grids(state, Path(source))
            _load_tensors(state | tables, Path(source), stored)
            for name, table in tables.items():
                level = logging.DEBUG if name.startswith("model.teacher.") else logging.WARNING  # say it once
                state[name].copy_(fit_positions(table, model.student_backbone, str(source), level=level))
            check_numbers(state, str(source))
        except (Exception, CheckpointException) as error:  # a damaged file can raise any error
            raise ValueError(f"cannot load the model from {source}: {_root_cause(error)}") from error
    else:
        state = read_state_dict(source)
        check_numbers(state, str(source))
        whole = any(name.startswith("student.") for name in state)
        for name in [name for name in state if name.endswith(_TABLE)]:
            if state[name].shape != model.student_backbone.pos_embed.shape:
                state[name] = fit_positions(state[name], model.student_backbone, str(source))
        try:
            if whole:
                kept = {name: value for name, value in state.items() if name.startswith(METHOD_STATE)}
                own = {name: value for name, value in model.state_dict().items() if not name.startswith(METHOD_STATE)}
                model.load_state_dict(kept | own)
            for module in () if whole else (model.student, model.teacher):
                module.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{source} does not hold a whole network with heads of this shape, as teachers exported by a run do "
                f"(for a backbone alone use student.pretrained_weights): {_shortened(error)}"
            ) from error
    logger.info("loaded the model from %s", source)
    return source


def _tables_of_other_grids(state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Room for the position tables of a checkpoint that are of the same width, but for another number of patches."""
    shapes = {name: value.shape for name, value in read_shapes(folder).items() if name.endswith(_TABLE)}
    return {
        name: torch.empty(shape)
        for name, shape in shapes.items()
        if name in state and shape != state[name].shape and shape[2:] == state[name].shape[2:]
    }


def _load_tensors(tensors: dict[str, Tensor], folder: Path, stored: Set[str]) -> None:
    """Read all `stored` tensors of a checkpoint into those of the same names, which must be the same set."""
    if unknown := sorted(stored - tensors.keys()):
        raise ValueError(f"it holds {len(unknown)} tensors that this model does not have, such as {unknown[0]}")
    one_process_is_enough()
    alone = not distributed.is_enabled()
    dcp.load(tensors, storage_reader=SafeReader(folder), process_group=distributed.group(), no_dist=alone)


def save_teacher(teacher: nn.Module, path: Path) -> None:
    """Export the teacher in the published format, `{"teacher": state dict}`; all processes must call this."""
    state = {}
    for name, value in teacher.state_dict().items():
        unsharded = full_tensor(value.detach())
        if distributed.is_main():
            state[name] = unsharded.cpu()
    if not distributed.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as file:
            torch.save({"teacher": state}, file)
    except (OSError, RuntimeError) as error:
        raise OSError(f"could not write the teacher to {path}: {_root_cause(error)}") from error
    logger.info("teacher: %s", path)


def _root_cause(error: BaseException) -> str:
    """The message of the root cause in a chain of errors, with its type unless it is a ValueError or OSError."""
    error = _first_cause(error)
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return f"{kind}{_shortened(error)}".strip().rstrip(".")


def _first_cause(error: BaseException) -> BaseException:
    """The root cause in a chain of errors: the last ValueError or OSError, or else the first error."""
    if isinstance(error, CheckpointException) and error.failures:
        return _first_cause(next(iter(error.failures.values()))[0])
    while (earlier := error.__cause__ or error.__context__) and not isinstance(error, (ValueError, OSError)):
        error = earlier
    return error


def _shortened(error: BaseException) -> str:
    """The message of an error, truncated to `MESSAGE_LENGTH` characters."""
    text = str(error)
    return text if len(text) < MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]} ..."


if __name__ == "__main__":  # the former name of a command
    runpy.run_module("dinov2.tools", run_name="__main__", alter_sys=True)
