"""Checkpoints to resume from exactly, and teacher dumps to evaluate.

A checkpoint is a folder `OUT/checkpoints/model_<iteration>/` written by `torch.distributed.checkpoint` (weights,
centres, AdamW moments) with a `state.json` beside the tensors (iteration, gradient scaler, meters). It is written
under a temporary name and renamed when it is complete, so that a folder of the final name is always whole. Random
numbers and the data position need no storing: both are functions of the seed and the iteration.
"""

import itertools
import json
import logging
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from dinov2 import distributed
from dinov2.files import replacing
from dinov2.models.weights import read_state_dict
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"model_(\d{7,})")
OUTPUTS = ("checkpoints", "eval", "training_metrics.json", "config.yaml")
"""What a run leaves in its folder, besides the log."""

_UNFINISHED = ".unfinished"


class Checkpointer:
    """Saves and restores the state of a run.

    Args:
        directory: folder of the checkpoints.
        model, optimizer, scaler: what is saved and restored in place.
        period: steps between two checkpoints.
        last_step: the step after which a checkpoint is always written.
        keep: how many of the newest checkpoints stay.
        keep_every: also keep those of every so many steps for good; 0 keeps none.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        *,
        period: int,
        last_step: int,
        keep: int = 3,
        keep_every: int = 0,
    ) -> None:
        self.directory = directory
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.period = period
        self.last_step = last_step
        self.keep = keep
        self.keep_every = keep_every

    def after_step(self, step: int, extra_state: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint if one is due; `extra_state` gives what else belongs into `state.json`."""
        if (step + 1) % self.period == 0 or step == self.last_step:
            self.save(step, extra_state())

    def save(self, step: int, extra_state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, the last finished iteration, and delete the ones no longer kept.

        Raises:
            OSError: if it cannot be written (disk full, ...); older checkpoints are untouched then.
        """
        started = time.perf_counter()
        folder = self.directory / f"model_{step:07d}"
        unfinished = folder.with_suffix(_UNFINISHED)
        try:
            if distributed.is_main():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            distributed.barrier()
            with _one_process_is_enough():
                writer = dcp.FileSystemWriter(unfinished)
                dcp.save(self._tensors(), storage_writer=writer, no_dist=not distributed.is_enabled())
            if distributed.is_main():
                state = {"iteration": step, "scaler": self.scaler.state_dict(), **extra_state}
                with replacing(unfinished / "state.json") as file:
                    file.write(json.dumps(state).encode())
                unfinished.rename(folder)
                self._delete_old()
        except (OSError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"could not write the checkpoint of iteration {step} to {folder}: {_root_cause(error)}. "
                f"Last complete checkpoint: {latest_checkpoint(self.directory) or 'none'}. "
                f"Run the same command again when that is mended: it continues from there."
            ) from error
        distributed.barrier()
        logger.info("checkpoint of iteration %d: %s (%.1f s)", step, folder, time.perf_counter() - started)
        return folder

    def load_latest(self) -> dict[str, Any] | None:
        """Restore the newest checkpoint in place; returns its `state.json`, or None if there is no checkpoint.

        Raises:
            ValueError: if it is damaged or belongs to another model.
        """
        folder = latest_checkpoint(self.directory)
        if folder is None:
            return None
        try:
            state = read_state(folder)
            stored = _stored_names(folder)
            self._allocate_moments(stored)
            _load_tensors(self._tensors(), folder, stored)
            if state["scaler"]:  # empty if it was not in use
                self.scaler.load_state_dict(state["scaler"])
        except (Exception, CheckpointException) as error:  # a damaged file raises nearly anything
            raise ValueError(
                f"cannot resume from {folder}: {_root_cause(error)}. If the config of the run was changed, change it "
                f"back or use --no-resume or another --output-dir; if the folder is damaged, delete it to continue "
                f"from the one before."
            ) from error
        logger.info("resumed from %s, finished iteration %d", folder, state["iteration"])
        return state

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.state.get(param, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def _allocate_moments(self, stored: Set[str]) -> None:
        """Give AdamW empty moments to load into, for the parameters that have some in the checkpoint."""
        for name, param in self.model.named_parameters():
            if f"optimizer.{name}.step" in stored:
                moments = {key: torch.zeros_like(param, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[param] = {"step": torch.tensor(0.0), **moments}

    def _delete_old(self) -> None:
        folders = _complete_checkpoints(self.directory)
        for iteration in sorted(folders)[: -self.keep]:
            if not (self.keep_every and (iteration + 1) % self.keep_every == 0):
                folders[iteration].rename(folders[iteration].with_suffix(_UNFINISHED))
        for leftover in self.directory.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(leftover, ignore_errors=True)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints."""
    folders = _complete_checkpoints(directory)
    return folders[max(folders)] if folders else None


def set_aside(output_dir: Path) -> None:
    """Move what an earlier run left in the folder to `earlier.<n>` in it, neither to mix with it nor to lose it."""
    former = [path for name in OUTPUTS if (path := output_dir / name).exists()]
    if distributed.is_main() and former:
        names = (output_dir / f"earlier.{number}" for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        aside.mkdir()
        for path in former:
            path.rename(aside / path.name)
        logger.warning("starting anew: what an earlier run left here is now in %s", aside)
    distributed.barrier()


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: `iteration`, `scaler` and what the run added."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def load_training_weights(model: SSLMetaArch, source: str | Path) -> None:
    """Load networks and centres, but no optimizer, from a checkpoint folder or from a teacher dump.

    A teacher dump holds one network with its heads, which student and teacher then both start from.

    Raises:
        ValueError: if the weights do not fit the model.
    """
    if Path(source).is_dir():
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        try:
            stored = {name for name in _stored_names(Path(source)) if name.startswith("model.")}
            _load_tensors(state, Path(source), stored)
        except (Exception, CheckpointException) as error:  # a damaged file raises nearly anything
            raise ValueError(f"cannot load the model from {source}: {_root_cause(error)}") from error
    else:
        network = read_state_dict(source)
        for side in (model.student, model.teacher):
            try:
                side.load_state_dict(network)
            except RuntimeError as error:
                raise ValueError(
                    f"{source} does not hold a whole network with heads, as teacher dumps of a run do "
                    f"(for a backbone alone use student.pretrained_weights): {error}"
                ) from error
    logger.info("loaded the model from %s", source)


def _stored_names(folder: Path) -> Set[str]:
    """Names of the tensors in a checkpoint."""
    return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.keys()


def _load_tensors(tensors: dict[str, Tensor], folder: Path, stored: Set[str]) -> None:
    """Read all `stored` tensors of a checkpoint into those of the same names; there must be neither more nor fewer."""
    if unknown := sorted(stored - tensors.keys()):
        raise ValueError(f"it holds {len(unknown)} tensors that this model does not have, such as {unknown[0]}")
    with _one_process_is_enough():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=not distributed.is_enabled())


@contextmanager
def _one_process_is_enough() -> Iterator[None]:
    """Silence the remark of `torch.distributed.checkpoint` that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _complete_checkpoints(directory: Path) -> dict[int, Path]:
    found = directory.glob("model_*")
    return {int(match[1]): path for path in found if (match := _FOLDER.fullmatch(path.name))}


def save_teacher(teacher: nn.Module, path: Path) -> None:
    """Write the teacher in the published layout: {"teacher": state dict on the CPU}; rank 0 only."""
    if not distributed.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu() for name, value in teacher.state_dict().items()}
    try:
        with replacing(path) as file:
            torch.save({"teacher": state}, file)
    except (OSError, RuntimeError) as error:
        raise OSError(f"could not write the teacher to {path}: {_root_cause(error)}") from error
    logger.info("teacher: %s", path)


def _root_cause(error: BaseException) -> str:
    """The message of the first error of a chain, which names the thing that went wrong."""
    if isinstance(error, CheckpointException) and error.failures:
        return _root_cause(next(iter(error.failures.values()))[0])
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}".strip()
