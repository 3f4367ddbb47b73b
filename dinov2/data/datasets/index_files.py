"""Index tables of a dataset in `.npy` files: written once, checked and memory-mapped on first use."""

import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.files import atomic_write

INTEGERS, TEXT = "iu", "U"  # kinds of NumPy types, for the fields of a table


class ExtraFile:
    """One array in an `.npy` file.

    It is memory-mapped read-only on first use. A pickled copy (in a spawned worker process) maps the file itself
    instead of carrying the array, which for ImageNet has about 600 MB.

    Args:
        path: The file, which may not exist yet.
        creation: Python statements that create it, for messages.
        fields: Name of each field of the table -> allowed kinds of NumPy types; None for a list of texts.
    """

    def __init__(self, path: Path, creation: str, fields: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._command = f"python -c {shlex.quote(creation)}"
        self._fields = fields
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None}

    @property
    def array(self) -> np.ndarray:
        """The one-dimensional content.

        Raises:
            FileNotFoundError: The file is missing; the message has the command that creates it.
            ValueError: The file is damaged or of another kind; the message has the command that recreates it.
        """
        if self._array is None:
            try:
                self._array = self._read()
            except (FileNotFoundError, NotADirectoryError) as error:
                raise FileNotFoundError(
                    f"missing {self.path}; create the extra files once, with:\n{self._command}"
                ) from error
            except OSError:
                raise
            except Exception as error:  # damaged files raise exceptions of any type
                raise self.damaged(str(error)) from error
        return self._array

    def damaged(self, what: str) -> ValueError:
        """The error for a damaged file, with the command that recreates it."""
        return ValueError(f"{self.path} is damaged or of another kind: {what}; recreate it with:\n{self._command}")

    def _read(self) -> np.ndarray:
        if self.path.exists() and not self.path.is_file():
            raise ValueError("it is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns of unusual headers
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("it is not an .npy file")
        if array.ndim != 1 or not len(array):
            raise ValueError(f"its shape is {array.shape}, not one-dimensional")
        if self._fields is None:
            if array.dtype.kind != TEXT:
                raise ValueError(f"its type is {array.dtype}, not text")
        elif wrong := [name for name, kinds in self._fields.items() if not _has_field(array.dtype, name, kinds)]:
            raise ValueError(f"it has no field {', '.join(wrong)} of the right type, but {array.dtype}")
        if self.path.stat().st_size != array.offset + array.nbytes:
            raise ValueError(
                f"it has {self.path.stat().st_size} bytes, its header declares {array.offset + array.nbytes}"
            )
        return array

    def save(self, array: np.ndarray) -> None:
        """Write the file, and create its folder if needed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            np.save(file, array)
        self._array = None


def _has_field(dtype: np.dtype, name: str, kinds: str) -> bool:
    return dtype.names is not None and name in dtype.names and dtype[name].kind in kinds and dtype[name].shape == ()


def check_classes(entries: ExtraFile, class_ids: ExtraFile, index: int | slice = slice(None)) -> None:
    """Check that the classes of entries match the list of classes.

    Args:
        entries: Table with the fields `class_index` and `class_id`.
        class_ids: Id of each class.
        index: Index or slice of the entries to check.

    Raises:
        ValueError: An entry does not match; the message names the file and the first such entry.
    """
    first = index if isinstance(index, int) else index.start or 0
    rows = np.atleast_1d(entries.array[index])
    outside = rows["class_index"] >= len(class_ids.array)
    if not outside.any():
        outside = class_ids.array[rows["class_index"]] != rows["class_id"]
    if outside.any():
        wrong = int(outside.argmax())
        row = rows[wrong]
        raise entries.damaged(
            f"entry {first + wrong} is of class {row['class_index']}, {str(row['class_id'])!r}, which does not "
            f"match {class_ids.path} of {len(class_ids.array)} classes"
        )
