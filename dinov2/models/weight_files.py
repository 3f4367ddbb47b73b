"""Read files of weights without running code in them: of `torch.save`, safetensors, folders and URLs."""

import argparse
import importlib
import json
import logging
import re
import zipfile
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

from dinov2.models.checksums import check_safetensors, check_zip
from dinov2.models.download import download
from dinov2.models.published import PACKAGED, PUBLISHED, weights_url_or_path

logger = logging.getLogger(__name__)

TEACHER_FILE = "teacher_checkpoint.pth"  # written by a run
_UNSAFE_ADVICE = "weights_only"  # in the message of torch about a refused pickle, which advises to run its code
_WEB = ("http", "https")
_FILES_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", TEACHER_FILE)


def read_file(path_or_url: str | Path, *, mapped: bool = False) -> object:
    """Read a file, folder or URL without running code that may be in it, after comparing `checksums`; on the CPU.

    Args:
        path_or_url: A file of `torch.save`, one that ends in `.safetensors`, a folder of transformers or of a run's
            teacher, or the name of a published or packaged backbone.
        mapped: Map tensors from the file until they are used; it must not change meanwhile.

    Raises:
        FileNotFoundError, ConnectionError: There is no such file, or it cannot be downloaded.
        ValueError: It is truncated, would need an unsafe pickle, or needs the package safetensors.
    """
    path_or_url = weights_url_or_path(str(path_or_url))
    path = local_path(path_or_url)
    downloaded = urlparse(path_or_url).scheme in _WEB
    remedy = f" (from {path_or_url}; delete it to download it again)" if downloaded else ""
    if path.is_dir():
        return _read_folder(path, mapped)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}{known_names(path_or_url)}")
    safetensors = import_safetensors() if path.suffix == ".safetensors" else None
    try:
        _check(path)
        if safetensors:
            return safetensors.load_file(path)
        can_be_mapped = mapped and zipfile.is_zipfile(path)  # unlike files of torch before 1.6
        with torch.serialization.safe_globals([argparse.Namespace]):  # many trainers save their flags; it runs nothing
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
    except PermissionError:
        raise
    except Exception as error:  # on bytes they do not expect both readers fail in many ways, even with KeyError
        text = f"{path}{remedy} is no checkpoint of plain tensors, or is truncated or damaged: {_reason(path, error)}"
        if path.name == TEACHER_FILE and (path.parents[2] / "checkpoints").is_dir():
            text += f"; the teacher of the run's newest checkpoint: {_export_command(path.parents[2])}"
        raise ValueError(text) from (None if _UNSAFE_ADVICE in str(error) else error)


def local_path(path_or_url: str | Path) -> Path:
    """The local path of a file or folder; http and https URLs are downloaded to the cache first (see `download`)."""
    url = urlparse(str(path_or_url))
    if url.scheme in _WEB:
        return download(str(path_or_url))
    return Path(url2pathname(url.path) if url.scheme == "file" else path_or_url)


def _begins_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def known_names(text: str) -> str:
    """The names of backbones, as the end of a message, if a text that is no file could be meant as one of them."""
    if Path(text).name != text or Path(text).suffix:
        return ""
    nearest = get_close_matches(text, [*PUBLISHED, *PACKAGED], n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"; {hint}Names: {', '.join([*PUBLISHED, *PACKAGED])}"


def _check(path: Path) -> None:
    """Compare the checksums in a file with its content; damage is a ValueError."""
    if not path.stat().st_size:
        raise ValueError("it is empty")
    if path.suffix == ".safetensors":
        check_safetensors(path)
    elif zipfile.is_zipfile(path):
        check_zip(path)
    elif _begins_as_zip(path):
        raise ValueError("its end is missing")  # a zip archive has its directory there
    else:
        logger.info("%s is of torch before 1.6 and has no checksums: damage to its numbers is not detected", path)


def _read_folder(folder: Path, mapped: bool) -> object:
    """Read the weights in a folder, in one file or in several with an index."""
    files = files_in(folder)
    if len(files) == 1:
        return read_file(files[0], mapped=mapped)
    content: dict[str, object] = {}
    for file in files:
        tensors = read_file(file, mapped=mapped)
        content |= tensors if isinstance(tensors, dict) else {}
    return content


def _export_command(run: Path) -> str:
    """The command that writes the teacher of a run's newest checkpoint, or of a checkpoint folder, to a file."""
    return f"python -m dinov2.tools convert {run} teacher.pth --to teacher"


def files_in(folder: Path) -> list[Path]:
    """The weight files in a folder of transformers or of a run's teacher; errors name the teachers of a run."""
    for name in _FILES_IN_FOLDERS:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _parts(folder / f"{name}.index.json")
    if found := sorted([*folder.glob(f"eval/*/{TEACHER_FILE}"), *folder.glob(f"*/{TEACHER_FILE}")]):
        teachers = ", ".join(str(path.parent) for path in found[:3])
        hint = f"; teachers of this run: {teachers}{', ...' * (len(found) > 3)}"
    elif (folder / "checkpoints").exists() or (folder / ".metadata").exists():
        hint = f"; of a run use OUT/eval/best, or export its teacher: {_export_command(folder)}"
    else:
        hint = ""
    wanted = f"{', '.join(_FILES_IN_FOLDERS[:-1])} or {_FILES_IN_FOLDERS[-1]}"
    raise FileNotFoundError(f"no weights at {folder}: a folder without {wanted}{hint}")


def _parts(index: Path) -> list[Path]:
    """The files listed in an index, all in the same folder; a damaged index is a ValueError that names it."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not names or any(Path(name).name != name or not name.strip(".") for name in names):
            raise ValueError(f"it lists {names[:3]}")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged, it is not an index of weight files: {error}") from error
    return [index.with_name(name) for name in names]


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be read: the text it begins with, or the message of torch without its unsafe advice."""
    with path.open("rb") as file:
        head = file.read(24)
    if not head:
        return "it is empty"
    if head.isascii() and head.decode().replace("\n", " ").isprintable():
        return f"it begins with the text {head.decode()!r}"
    text = str(error).rpartition("WeightsUnpickler error: ")[2].partition(" Please use")[0]
    if match := re.search(r"GLOBAL (\S+) was not an allowed", text):
        return f"it holds more than tensors, {match[1]}: save its state dict alone where it was written"
    if "Unsupported operand" in text and not head.startswith(b"PK"):
        return "it is not a file of torch.save; a file of safetensors must be named .safetensors"
    lines = [line.strip() for line in text.splitlines() if line.strip() and _UNSAFE_ADVICE not in line]
    return lines[0] if lines else "it holds more than tensors, such as the code of TorchScript"


def import_safetensors() -> ModuleType:
    """Import `safetensors.torch`; see `import_optional`."""
    return import_optional("safetensors.torch", "reading and writing safetensors")


def import_optional(module: str, purpose: str) -> ModuleType:
    """Import an optional package; a missing one is a ValueError with its `purpose` and the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{purpose} needs a package that is missing: pip install {package}") from error
