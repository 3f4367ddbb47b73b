"""Find and read checkpoint folders, without model and process group.

`OUT/checkpoints/model_<iteration>/` contains tensors with flat names (`model.teacher.backbone.cls_token`,
`optimizer.student.backbone.cls_token.exp_avg`), each in one or more chunks in the files `__<rank>_<n>.distcp`, the
index `.metadata`, `state.json` (see `checkpoint_state`), and `checksums.json` for these two; each chunk of a tensor has
its own checksum. Folders are not trusted: reading them runs no code, and damage is detected.
"""

import io
import os
import re
import warnings
from collections.abc import Sequence, Set
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from dinov2.files import runs_below
from dinov2.models.checksums import check_zip
from dinov2.train.checkpoint_metadata import ADVICE, read_metadata

_FOLDER = re.compile(r"model_(\d{7,})")

UNFINISHED = ".unfinished"
"""Suffix of a checkpoint that is not complete, or replaced; deleted when the next one is complete."""


class SafeReader(dcp.FileSystemReader):
    """Reader for `torch.distributed.checkpoint.load` that runs no code; errors name the file."""

    def read_metadata(self, *args: object) -> Metadata:  # no rank: all processes share one index
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read file by file, in the order of offsets, and verify the checksum of each chunk."""

        def file_and_offset(item: ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        for name, group in groupby(sorted(plan.items, key=file_and_offset), key=lambda item: file_and_offset(item)[0]):
            path, items = Path(self.path) / name, list(group)
            try:
                self._check(path, items)
                super().read_data(replace(plan, items=items), planner)
            except OSError as error:
                raise OSError(error.errno, f"cannot read: {error.strerror}", str(path)) from error
            except Exception as error:  # on bytes it does not expect torch.load fails in many ways
                reason = str(error) if type(error) is ValueError else type(error).__name__
                raise ValueError(f"{path} is damaged ({reason}): {ADVICE}") from None  # torch advises to run its code
        return super().read_data(replace(plan, items=[]), planner)  # a future that is done

    def _check(self, path: Path, items: Sequence[ReadItem]) -> None:
        """Verify the checksums of chunks of tensors, which are concatenated files of `torch.save`."""
        with path.open("rb") as file:
            for index in dict.fromkeys(item.storage_index for item in items):
                info = self.storage_data[index]
                file.seek(info.offset)
                try:
                    check_zip(io.BytesIO(file.read(info.length)))
                except ValueError as error:
                    raise ValueError(f"{index.fqn}: {error}") from error


def stored_names(folder: Path) -> Set[str]:
    """The names of the tensors in a checkpoint folder."""
    return read_metadata(folder).state_dict_metadata.keys()


def read_shapes(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder on the meta device: names, shapes and dtypes."""
    return _empty_tensors(folder, "", "meta")


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint folder whose names start with `prefix`, unsharded, on the CPU.

    A FileNotFoundError if a file is missing, a ValueError if one is damaged or there are no such tensors.
    """
    tensors = _empty_tensors(folder, prefix, "cpu")
    if not tensors:
        raise ValueError(f"{folder} holds no tensors with names that start with {prefix!r}")
    one_process_is_enough()
    try:
        dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=True)
    except CheckpointException as error:  # has the failure of the only process
        failure, _ = next(iter(error.failures.values()))
        raise failure from error
    return tensors


def _empty_tensors(folder: Path, prefix: str, device: str) -> dict[str, Tensor]:
    return {
        name: torch.empty(stored.size, dtype=stored.properties.dtype, device=device)
        for name, stored in read_metadata(folder).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }


def one_process_is_enough() -> None:
    """Silence the warning of `torch.distributed.checkpoint`, also in its thread, that there is no process group."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def complete_checkpoints(directory: Path) -> dict[int, Path]:
    """The complete checkpoints in `OUT/checkpoints` by iteration, ascending; none if it does not exist."""
    try:
        names = os.listdir(directory)  # unlike Path.glob it does not ignore errors
    except FileNotFoundError as error:
        if directory.is_symlink():
            raise FileNotFoundError(error.errno, "a broken link", str(directory)) from error
        return {}
    except OSError as error:
        raise OSError(error.errno, f"cannot list the checkpoints: {error.strerror}", str(directory)) from error
    found = {int(match[1]): directory / name for name in names if (match := _FOLDER.fullmatch(name))}
    return dict(sorted(found.items()))


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest of the `complete_checkpoints`; None if there is none."""
    return next(reversed(complete_checkpoints(directory).values()), None)


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder itself, or the newest complete checkpoint of `OUT/checkpoints` or `OUT`."""
    if (path / ".metadata").exists() or (path / "state.json").exists():
        return path
    folder = latest_checkpoint(path / "checkpoints") or latest_checkpoint(path)
    if folder is None:
        raise FileNotFoundError(
            f"no checkpoint in {path}: give a folder model_<iteration>, the `checkpoints` with it, or a run's output"
            f"{runs_below(path)}"
        )
    return folder
