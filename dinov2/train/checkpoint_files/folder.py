"""Find checkpoint folders, and read their small files."""

import json
import logging
import os
import re
import zlib
from pathlib import Path

from dinov2.files import atomic_write, read_json, read_regular_file, runs_below

logger = logging.getLogger(__name__)

METADATA_FILE, CHECKSUMS_FILE = ".metadata", "checksums.json"
_CHECKED = (METADATA_FILE, "state.json")  # tensors have their own checksums
ADVICE = "copy the checkpoint again, or use another one"

_FOLDER = re.compile(r"model_(\d{7,})")

UNFINISHED = ".unfinished"
"""Suffix of a checkpoint that is not complete, or replaced; deleted when the next one is complete."""


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


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` with the CRC-32 of `.metadata` and `state.json`."""
    checksums = {name: zlib.crc32((folder / name).read_bytes()) for name in _CHECKED}
    with atomic_write(folder / CHECKSUMS_FILE) as file:
        file.write(json.dumps(checksums).encode())


def read_checked(folder: Path, name: str) -> bytes:
    """Read `.metadata` or `state.json` and verify its checksum, if there is one; a ValueError if it is damaged."""
    try:
        content = read_regular_file(folder / name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"no {folder / name}: not a checkpoint folder, or an incomplete one; {ADVICE}"
        ) from error
    try:
        checksums = read_json(folder / CHECKSUMS_FILE)
    except FileNotFoundError:
        unverified = f"{folder / name} has no checksum: damage to it may not be detected"
        logger.info("%s", unverified, extra={"only_in_file": True})
        return content
    except ValueError as error:
        raise ValueError(f"{error}: {ADVICE}") from error
    if not isinstance(checksums, dict) or checksums.get(name) != zlib.crc32(content):
        raise ValueError(f"{folder / name} is damaged (its checksum is not that in {CHECKSUMS_FILE}): {ADVICE}")
    return content
