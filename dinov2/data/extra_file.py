"""The `.npy` tables that lie beside a data set: written once, mapped into memory when first used."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.files import replacing


class ExtraFile:
    """One array in an `.npy` file.

    Opened read-only and memory-mapped on first use. A pickled copy (for a worker process that is spawned) opens its
    own map instead of carrying the array, which for ImageNet is some 600 MB.

    Args:
        path: the file, which need not exist yet.
        creation: Python statements that create it, for the message when it is missing.
    """

    def __init__(self, path: Path, creation: str) -> None:
        self.path = path
        self._creation = creation
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None}

    @property
    def array(self) -> np.ndarray:
        """The content.

        Raises:
            FileNotFoundError: the file is missing; says how to create it.
        """
        if self._array is None:
            try:
                self._array = np.load(self.path, mmap_mode="r")
            except FileNotFoundError as error:
                command = f"python -c {shlex.quote(self._creation)}"
                raise FileNotFoundError(
                    f"missing {self.path}; create the extra files, once, with:\n{command}"
                ) from error
        return self._array

    def save(self, array: np.ndarray) -> None:
        """Writes the file, and its folder if needed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            np.save(file, array)
        self._array = None
