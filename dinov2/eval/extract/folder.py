"""A folder of features that is continued after an interruption, with the bytes of an uninterrupted extraction.

`metadata.json` has the settings from the start. A shard is finished when, after its files of features, its entry is
written: a file `.features_00000.json` with the rows, and the SHA-256 of the files. When all shards are finished, the
rows become `names.jsonl`, `metadata.json` is written anew with a list of the shards, and the entries are deleted.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.images import BadImageError
from dinov2.eval.extract.extraction import Extraction, Shard, Unreadable, check_unreadable
from dinov2.eval.extract.files import METADATA_FILE, NAMES_FILE, ShardArray, arrays_of_shard, shard_files, write_arrays
from dinov2.eval.results import counted
from dinov2.files import atomic_write, folder_lock, read_json, remove_leftovers

logger = logging.getLogger(__name__)

FORMAT = 1  # version of the folder's layout
_FEATURE_FILE = re.compile(r"features_\d{5,}\.(safetensors|\w+\.npy)|\.features_\d{5,}\.json")


class FeatureFolder(NamedTuple):
    """The output folder of one extraction."""

    path: Path
    settings: Mapping[str, Any]  # everything the features depend on, as JSON

    @property
    def shards(self) -> list[range]:
        """The images of each shard."""
        count, size = self.settings["num_images"], self.settings["shard_size"]
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def begin(self, dataset: ImageDataset, *, overwrite: bool = False) -> list[int]:
        """Prepare the folder, and return the numbers of the shards to compute.

        Raises:
            ValueError: The folder has features of other settings, or damaged ones that were finished.
        """
        remove_leftovers(self.path)
        if overwrite:
            self._delete()
        former = self._read_metadata()
        if former is not None and former["settings"] != self.settings:
            if _feature_files(self.path):
                raise _other_settings(self.path, former["settings"], self.settings)
            former = None
        if former is None:
            check_folder(self.path)
            self._write_metadata({"complete": False})
            return list(range(len(self.shards)))
        if former["complete"]:
            self._check_complete(former)
            return []
        pending = [number for number in range(len(self.shards)) if not self._is_finished(number, dataset)]
        logger.info("%s: %d of %d shards are finished", self.path, len(self.shards) - len(pending), len(self.shards))
        return pending

    def write(self, number: int, shard: Shard, arrays: Mapping[str, ShardArray]) -> None:
        """Write the files of a shard, then its entry."""
        metadata = {"settings": _as_json(self.settings), "shard": str(number)}
        files = {
            name: write_arrays(self.path / name, {key: arrays[key] for key in keys}, metadata)
            for name, keys in shard_files(number, list(arrays), self.settings["format"]).items()
        }
        entry = {"files": files, "rows": shard.rows, "unreadable": shard.unreadable}
        with atomic_write(self._entry_path(number)) as file:
            file.write(_as_json(entry).encode())

    def finish(self) -> None:
        """Write the names and the metadata, after all shards are finished."""
        if (self._read_metadata() or {}).get("complete"):
            self._delete_entries()  # left by a process that was killed while it did this
            return
        shards, unreadable = [], []
        for number in range(len(self.shards)):
            entry = read_json(self._entry_path(number))
            shards.append({"images": len(entry["rows"]), "files": entry["files"]})
            unreadable += [Unreadable(*each) for each in entry["unreadable"]]
        check_unreadable(unreadable, self.settings["num_images"])
        if unreadable:
            text = "%d of %s cannot be read and have no features: %s"
            logger.warning(text, len(unreadable), counted(self.settings["num_images"], "image"), unreadable[0].reason)
        with atomic_write(self.path / NAMES_FILE) as file:
            for number in range(len(shards)):
                for name, label, grid in read_json(self._entry_path(number))["rows"]:
                    row = {"name": name} | ({} if label is None else {"label": label}) | {"grid": grid}
                    file.write(json.dumps(row).encode() + b"\n")
        images = sum(shard["images"] for shard in shards)
        omitted = [each._asdict() for each in unreadable]
        self._write_metadata({"complete": True, "images": images, "unreadable": omitted, "shards": shards})
        self._delete_entries()

    # --- Parts ---

    def _entry_path(self, number: int) -> Path:
        return self.path / f".features_{number:05d}.json"

    def _read_metadata(self) -> Any:
        path = self.path / METADATA_FILE
        if not path.exists():
            return None
        metadata = read_json(path)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or "settings" not in metadata:
            raise ValueError(
                f"{path} is not that of features in format {FORMAT}: give another --output, or --overwrite to delete it"
            )
        return metadata

    def _write_metadata(self, content: Mapping[str, Any]) -> None:
        with atomic_write(self.path / METADATA_FILE) as file:
            text = json.dumps({"format": FORMAT, "settings": self.settings, **content}, indent=2)
            file.write(text.encode() + b"\n")

    def _is_finished(self, number: int, dataset: ImageDataset) -> bool:
        """Whether the files of a shard are intact, and images that could not be read still cannot be."""
        path = self._entry_path(number)
        if not path.exists():
            return False
        entry = read_json(path)
        if damaged := self._damaged(entry["files"]):
            logger.warning("%s is missing or damaged, and is computed again", damaged)
            return False
        return not any(_is_readable(dataset, index) for index, _, _ in entry["unreadable"])

    def _damaged(self, files: Mapping[str, str]) -> Path | None:
        """The first file, of names and SHA-256, that is missing or has other content."""
        return next((self.path / name for name, digest in files.items() if _sha256(self.path / name) != digest), None)

    def _check_complete(self, metadata: Mapping[str, Any]) -> None:
        for shard in metadata["shards"]:
            if damaged := self._damaged(shard["files"]):
                raise ValueError(
                    f"{damaged} is missing or damaged since the extraction finished: --overwrite extracts all anew"
                )
        logger.info("%s: the features of %s are complete", self.path, counted(metadata["images"], "image"))

    def _delete(self) -> None:
        """Delete the files of an extraction; metadata last, so that a killed process leaves what can be recognized."""
        for file in _feature_files(self.path):
            file.unlink()
        for name in (NAMES_FILE, METADATA_FILE):
            (self.path / name).unlink(missing_ok=True)

    def _delete_entries(self) -> None:
        for number in range(len(self.shards)):
            self._entry_path(number).unlink(missing_ok=True)


def write_features(extraction: Extraction, folder: FeatureFolder, *, overwrite: bool = False) -> None:
    """Compute the shards that a folder lacks, shared out over the processes, and finish it."""
    distributed.from_main(lambda: folder.path.mkdir(parents=True, exist_ok=True))
    with distributed.on_main(_locked(folder.path)):
        pending = distributed.from_main(lambda: folder.begin(extraction.dataset, overwrite=overwrite))
        mine = pending[distributed.rank() :: distributed.world_size()]
        width, grid = extraction.backbone.model.embed_dim, extraction.preprocessing.grid
        for shard, number in zip(extraction.run([folder.shards[each] for each in mine]), mine, strict=True):
            folder.write(number, shard, arrays_of_shard(shard, extraction.choice, width, grid))
        distributed.barrier()
        distributed.from_main(folder.finish)
    if distributed.is_main():
        logger.info("features of %s: %s", counted(len(extraction.dataset), "image"), folder.path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a folder; unlike `folder_lock`, leave nothing in it."""
    with folder_lock(path):
        try:
            yield
        finally:
            (path / ".lock").unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Raise an error if an output is a file, or has features without metadata, of which nothing is known."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--output {path} is a file: give a folder")
    if path.is_dir() and not (path / METADATA_FILE).exists() and (found := _feature_files(path)):
        raise ValueError(
            f"--output {path} has {found[0].name} but no {METADATA_FILE}, so its settings are unknown: give another "
            "--output, or --overwrite to delete the features there"
        )


def _feature_files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if _FEATURE_FILE.fullmatch(file.name))


def _other_settings(path: Path, former: Mapping[str, Any], new: Mapping[str, Any]) -> ValueError:
    """The error for features of other settings, which names the settings that differ."""
    before, after = dict(_flat(former)), dict(_flat(new))
    changes = [
        f"{key} {_short(key, before.get(key))} there, {_short(key, after.get(key))} now"
        for key in before | after
        if before.get(key) != after.get(key)
    ]
    return ValueError(
        f"--output {path} has features of other settings: {'; '.join(changes[:4])}{'; ...' * (len(changes) > 4)}. Give "
        "these settings again to continue, or another --output, or --overwrite to delete the features there"
    )


def _short(key: str, value: Any) -> str:
    """A setting for a message: of a SHA-256 the beginning."""
    return value[:8] if key.endswith("sha256") and isinstance(value, str) else json.dumps(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_readable(dataset: ImageDataset, index: int) -> bool:
    try:
        dataset.get_image(index)
    except BadImageError:
        return False
    return True


def _sha256(path: Path) -> str:
    """SHA-256 of a file; "" if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
