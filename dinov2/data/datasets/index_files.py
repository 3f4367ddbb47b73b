"""The `.npy` tables that lie beside a dataset: written once, checked and mapped into memory when first used."""

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

    Opened read-only and memory-mapped on first use. A pickled copy (for a worker process that is spawned) opens its
    own map instead of carrying the array, which for ImageNet is some 600 MB.

    Args:
        path: The file, which need not exist yet.
        creation: Python statements that create it, for messages.
        fields: Name of each field of the table -> kinds of NumPy types it may have; None for a list of texts.
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
        """The content, one-dimensional.

        Raises:
            FileNotFoundError: The file is missing; says how to create it.
            ValueError: It is damaged or something else; says how to create it anew.
        """
        if self._array is None:
            try:
                self._array = self._read()
            except (FileNotFoundError, NotADirectoryError) as error:
                raise FileNotFoundError(
                    f"missing {self.path}; create the extra files, once, with:\n{self._command}"
                ) from error
            except OSError:
                raise
            except Exception as error:  # a damaged file raises nearly anything
                raise self.damaged(str(error)) from error
        return self._array

    def damaged(self, what: str) -> ValueError:
        """An error that says what is wrong with the file, and how to create it anew."""
        return ValueError(f"{self.path} is damaged or of something else: {what}; create it anew with:\n{self._command}")

    def _read(self) -> np.ndarray:
        if self.path.exists() and not self.path.is_file():
            raise ValueError("it is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what NumPy remarks on strange headers
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("it is no .npy file")
        if array.ndim != 1 or not len(array):
            raise ValueError(f"its shape is {array.shape}, not that of a list")
        if self._fields is None:
            if array.dtype.kind != TEXT:
                raise ValueError(f"its type is {array.dtype}, not text")
        elif wrong := [name for name, kinds in self._fields.items() if not _has_field(array.dtype, name, kinds)]:
            raise ValueError(f"it has no field {', '.join(wrong)} of the right type, but {array.dtype}")
        if self.path.stat().st_size != array.offset + array.nbytes:
            raise ValueError(f"it has {self.path.stat().st_size} bytes, its header says {array.offset + array.nbytes}")
        return array

    def save(self, array: np.ndarray) -> None:
        """Writes the file, and its folder if needed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            np.save(file, array)
        self._array = None


def _has_field(dtype: np.dtype, name: str, kinds: str) -> bool:
    return dtype.names is not None and name in dtype.names and dtype[name].kind in kinds and dtype[name].shape == ()


def check_classes(entries: ExtraFile, class_ids: ExtraFile, index: int | slice = slice(None)) -> None:
    """Checks that the classes of entries are those of the list of classes.

    Args:
        entries: A table with the fields `class_index` and `class_id`.
        class_ids: Id of each class.
        index: Which entries.

    Raises:
        ValueError: Naming the file and the first entry that does not fit.
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
            f"entry {first + wrong} is of class {row['class_index']}, {str(row['class_id'])!r}, which is not so in "
            f"{class_ids.path} of {len(class_ids.array)} classes"
        )
