"""The files that a pattern such as `/data/shard-{000000..000123}.tar` or `s3://bucket/*.tar` stands for."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov2.data.shards.storage import DataFile, LocalFile, RemoteFile, attempt, file_system

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MOST = 1_000_000  # files of a pattern


def expand(pattern: str, suffix: str) -> list[DataFile]:
    """Expand ranges `{000..123}`, choices `{a,b}`, lists with commas, globs, and folders to their files with a suffix.

    A URL is that of a remote file, a folder with such files (with `/` at its end, behind http), or a glob.

    Files are in the order of the pattern, those of a glob or folder sorted by name.

    Raises:
        FileNotFoundError: A file or folder is missing, or nothing matches; names the first. Of a remote file that is
            named completely this is found when it is listed.
        DataSourceError, ImportError: A server cannot be asked.
        ValueError: A range is empty or too long, or a file is named twice.
    """
    found: list[DataFile] = []
    for part in _split(pattern):
        for text in _expand_braces(os.path.expanduser(part)):
            found += _files(text, suffix)
    if len(set(found)) < len(found):
        twice = next(path for index, path in enumerate(found) if path in found[:index])
        raise ValueError(f"files={pattern} names {twice} twice")
    return found


def _split(pattern: str) -> list[str]:
    """The parts between commas outside braces."""
    return [part for part in re.split(r",(?![^{]*\})", pattern) if part]


def _expand_braces(text: str) -> list[str]:
    match = _RANGE.search(text) or _CHOICE.search(text)
    if match is None:
        return [text]
    if match.re is _CHOICE:
        values = match[1].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        if not 0 <= last - first < _MOST:
            raise ValueError(f"the range {match[0]} in files={text} has {max(0, last - first + 1):,} numbers")
        values = [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    rest = [(text[: match.start()] + value + text[match.end() :]) for value in values]
    return [each for one in rest for each in _expand_braces(one)]


def _files(text: str, suffix: str) -> Sequence[DataFile]:
    if "://" not in text:
        return [LocalFile(str(path)) for path in _local_files(text, suffix)]
    files, path = file_system(text)
    if "file" in files.protocol:
        return [LocalFile(str(each)) for each in _local_files(path, suffix)]
    return [RemoteFile(url) for url in attempt(text, lambda: _urls(text, suffix, files, path))]


def _urls(text: str, suffix: str, files: Any, path: str) -> list[str]:
    """URLs of files; those that end in the suffix are not searched for. A question mark is no pattern in a URL."""
    if {"*", "["} & set(text):
        found = files.glob(path)
    elif text.partition("?")[0].lower().endswith(suffix) or _is_remote_file(text, files, path):
        return [text]
    else:
        listed = files.ls(path, detail=True)
        found = [each["name"] for each in listed if each["type"] == "file" and each["name"].lower().endswith(suffix)]
    if not found:
        raise FileNotFoundError(text)
    return sorted(files.unstrip_protocol(name) for name in found)


def _is_remote_file(text: str, files: Any, path: str) -> bool:
    return not text.endswith("/") and files.info(path)["type"] == "file"  # behind http everything is a file


def _local_files(text: str, suffix: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if each.name.lower().endswith(suffix) and each.is_file())
        if not found:
            raise FileNotFoundError(f"no file that ends in {suffix} in the folder files={text}")
        return found
    if glob.has_magic(text):
        found = sorted(Path(each) for each in glob.glob(text, recursive=True) if Path(each).is_file())
        if found:
            return found
    raise FileNotFoundError(f"files={text}: no such file or folder")
