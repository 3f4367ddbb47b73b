"""A checkpoint folder without model and process group: find it, and read what is in it.

`OUT/checkpoints/model_<iteration>/` holds tensors under flat names (`model.teacher.backbone.cls_token`,
`optimizer.student.backbone.cls_token.exp_avg`), each in one or more parts in the files `__<rank>_<n>.distcp`, the
table of contents `.metadata`, `state.json` (see `checkpoint_state`) and `checksums.json` for both; each part of a
tensor carries its own. Nothing in such a folder is trusted to run code or to be undamaged.
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

from dinov2.models.checksums import check_zip
from dinov2.train.checkpoint_metadata import ADVICE, read_metadata

_FOLDER = re.compile(r"model_(\d{7,})")


class SafeReader(dcp.FileSystemReader):
    """Reads a checkpoint folder for `torch.distributed.checkpoint.load`: tensors only, no code, errors name the file.

    The tensors themselves torch reads with `weights_only=True`.
    """

    def read_metadata(self, *args: object) -> Metadata:  # no rank: all processes share one table
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read file by file, each from its beginning to its end, and compare the checksum of each part."""

        def place(item: ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        for name, group in groupby(sorted(plan.items, key=place), key=lambda item: place(item)[0]):
            path, items = Path(self.path) / name, list(group)
            try:
                self._check(path, items)
                super().read_data(replace(plan, items=items), planner)
            except OSError as error:
                raise OSError(error.errno, f"cannot read: {error.strerror}", str(path)) from error
            except Exception as error:  # on bytes it does not expect torch.load fails in many ways
                reason = str(error) if type(error) is ValueError else type(error).__name__
                raise ValueError(
                    f"{path} is damaged ({reason}): {ADVICE}"
                ) from None  # torch's words advise to run code
        return super().read_data(replace(plan, items=[]), planner)  # a future that is done

    def _check(self, path: Path, items: Sequence[ReadItem]) -> None:
        """Compare checksums of parts of tensors, which are files of `torch.save` one after the other.

        Raises:
            ValueError: if one is damaged; names the tensor.
        """
        with path.open("rb") as file:
            for index in dict.fromkeys(item.storage_index for item in items):
                info = self.storage_data[index]
                file.seek(info.offset)
                try:
                    check_zip(io.BytesIO(file.read(info.length)))
                except ValueError as error:
                    raise ValueError(f"{index.fqn}: {error}") from error


def stored_names(folder: Path) -> Set[str]:
    """Names of the tensors in a checkpoint."""
    return read_metadata(folder).state_dict_metadata.keys()


def read_shapes(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint without their numbers: on the meta device."""
    return _empty_tensors(folder, "", "meta")


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, whole, on the CPU, whatever number of processes wrote them.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if a file is damaged, which is named then, or if there is no such tensor.
    """
    tensors = _empty_tensors(folder, prefix, "cpu")
    if not tensors:
        raise ValueError(f"{folder} holds no tensors with names that start with {prefix!r}")
    one_process_is_enough()
    try:
        dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=True)
    except CheckpointException as error:  # of one process: its failure says it all
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
    """Silence the remark of `torch.distributed.checkpoint`, also from its thread, that there is no process group."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def complete_checkpoints(directory: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder of checkpoints, by their last finished iteration, in order.

    None if there is no such folder.

    Raises:
        OSError: naming the folder, if what is in it cannot be told: it may not be read, is a file, a link to nothing.
    """
    try:
        names = os.listdir(directory)  # unlike Path.glob it does not pass over errors
    except FileNotFoundError as error:
        if directory.is_symlink():
            raise FileNotFoundError(error.errno, "a link to nothing that is there", str(directory)) from error
        return {}
    except OSError as error:
        raise OSError(error.errno, f"cannot list the checkpoints: {error.strerror}", str(directory)) from error
    found = {int(match[1]): directory / name for name in names if (match := _FOLDER.fullmatch(name))}
    return dict(sorted(found.items()))


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints; None if there is none.

    Raises:
        OSError: as `complete_checkpoints`.
    """
    return next(reversed(complete_checkpoints(directory).values()), None)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest complete one of a run or of its `checkpoints`.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if a folder cannot be read.
    """
    if (path / ".metadata").exists() or (path / "state.json").exists():
        return path
    folder = latest_checkpoint(path / "checkpoints") or latest_checkpoint(path)
    if folder is None:
        raise FileNotFoundError(
            f"no checkpoint in {path}: give a folder model_<iteration>, the `checkpoints` with it, or a run's output"
        )
    return folder
