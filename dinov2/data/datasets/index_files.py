"""Datasets that are listed in tables: `.npy` files, written once, checked and memory-mapped on first use."""

import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.files import atomic_write

INTEGERS, TEXT = "iu", "U"  # kinds of NumPy types, for the fields of a table
_NUM_CHECKED = 100  # entries checked when the tables are opened, as checking all of them is slow
_AT_ONCE = 2**18  # entries compared at once; bounds the memory


class ExtraFile:
    """One array in an `.npy` file, which may not exist yet; memory-mapped read-only on first use.

    A pickled copy (in a spawned worker process) maps the file itself instead of carrying the array, which for ImageNet
    has about 600 MB.

    Args:
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
            FileNotFoundError, ValueError: The file is missing or damaged; the message has the command that creates it.
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
        kinds = {name: field[0].kind for name, field in (array.dtype.fields or {}).items()}  # of nested arrays: "V"
        if self._fields is None:
            if array.dtype.kind != TEXT:
                raise ValueError(f"its type is {array.dtype}, not text")
        elif wrong := [name for name in self._fields if kinds.get(name, "V") not in self._fields[name]]:
            raise ValueError(f"it has no field {', '.join(wrong)} of the right type, but {array.dtype}")
        if (size := self.path.stat().st_size) != (declared := array.offset + array.nbytes):
            raise ValueError(f"it has {size} bytes, its header declares {declared}")
        return array

    def save(self, array: np.ndarray) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            np.save(file, array)
        self._array = None


class IndexedDataset(ImageDataset):
    """A dataset whose images and classes are listed in extra files, which subclasses open."""

    _entries: ExtraFile  # a row per image, with the fields `class_index` and `class_id` among others
    _class_ids: ExtraFile  # WordNet id of each class
    _is_checked = False

    def __len__(self) -> int:
        if not self._is_checked:
            self._check_tables()
            self._is_checked = True
        return len(self._entries.array)

    def _check_tables(self) -> None:
        """Raise a `ValueError` if the tables are inconsistent; checks only some of the entries."""
        length = len(self._entries.array)
        for index in range(0, length, max(length // _NUM_CHECKED, 1)):
            self._check_classes(index)

    def _check_classes(self, index: int | slice) -> None:
        """Raise a `ValueError` if the class of an entry is not in the list of classes; names the first such entry."""
        entries, class_ids = self._entries.array, self._class_ids.array
        first = index if isinstance(index, int) else index.start
        rows = np.atleast_1d(entries[index])
        outside = rows["class_index"] >= len(class_ids)
        if not outside.any():
            outside = class_ids[rows["class_index"]] != rows["class_id"]
        if outside.any():
            wrong = int(outside.argmax())
            row = rows[wrong]
            raise self._entries.damaged(
                f"entry {first + wrong} is of class {row['class_index']}, {str(row['class_id'])!r}, which does not "
                f"match {self._class_ids.path} of {len(class_ids)} classes"
            )

    def get_target(self, index: int) -> int | list[int] | None:
        self._check_classes(index)
        return int(self._entries.array[index]["class_index"])

    def get_targets(self) -> np.ndarray | None:
        for start in range(0, len(self), _AT_ONCE):
            self._check_classes(slice(start, start + _AT_ONCE))
        return self._entries.array["class_index"].astype(np.int64)

    def get_class_id(self, index: int) -> str | None:
        """Returns the WordNet id of the class of a sample; None without labels."""
        return str(self._entries.array[index]["class_id"])

    def find_class_id(self, class_index: int) -> str:
        """Returns the WordNet id of a class."""
        return str(self._class_ids.array[class_index])
