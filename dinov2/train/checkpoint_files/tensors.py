"""Read the tensors of checkpoint folders by `torch.distributed.checkpoint`, without running code in them."""

import io
import warnings
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from dinov2 import distributed
from dinov2.models.checksums import check_zip
from dinov2.train.checkpoint_files.folder import ADVICE
from dinov2.train.checkpoint_files.index import read_metadata

_Result = TypeVar("_Result")


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
    raising_first_failure(lambda: dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=True))
    return tensors


def load_tensors(tensors: dict[str, Tensor], folder: Path, stored: Set[str]) -> None:
    """Read all `stored` tensors of a checkpoint into those of the same names, which must be the same set.

    All processes must call this; each reads its shards.
    """
    if unknown := sorted(stored - tensors.keys()):
        raise ValueError(f"it holds {len(unknown)} tensors that this model does not have, such as {unknown[0]}")
    one_process_is_enough()
    among: dict[str, Any] = {"process_group": distributed.group(), "no_dist": not distributed.is_enabled()}
    raising_first_failure(lambda: dcp.load(tensors, storage_reader=SafeReader(folder), **among))


def _empty_tensors(folder: Path, prefix: str, device: str) -> dict[str, Tensor]:
    return {
        name: torch.empty(stored.size, dtype=stored.properties.dtype, device=device)
        for name, stored in read_metadata(folder).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }


def raising_first_failure(call: Callable[[], _Result]) -> _Result:
    """Call, and raise the first failure of a process instead of torch's collection of them, which is no `Exception`."""
    try:
        return call()
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
    raise failures[0] if failures else RuntimeError("writing or reading a checkpoint failed")  # its cause is its own


def one_process_is_enough() -> None:
    """Silence the warning of `torch.distributed.checkpoint`, also in its thread, that there is no process group."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
