"""Checkpoints, or networks of them, as one file: `python -m dinov2.tools convert PATH OUTPUT --to FORM`.

| form | file of `torch.save` | safetensors |
| --- | --- | --- |
| `full` | `{"model": ..., "optimizer": {"state": ...}, "iteration": ...}` | flat names; other entries in the metadata |
| `teacher`, `student` | `{"teacher": {"backbone....": ...}}`, as a run exports its teacher | flat names |
| `backbone` | the state dict of the teacher's backbone, as the released files | the same |
"""

import json
import logging
import shlex
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dinov2.files import atomic_write
from dinov2.models.checksums import CHECKSUM_KEY, NO_CHECKSUM, with_checksum
from dinov2.models.key_mapping import flatten_block_names
from dinov2.models.weight_files import import_safetensors
from dinov2.tools.contents import NETWORKS, Contents, read_contents
from dinov2.train.checkpoint_files.tensors import read_tensors

logger = logging.getLogger(__name__)

FORMS = {"full": "", "teacher": "model.teacher.", "student": "model.student.", "backbone": "model.teacher.backbone."}
"""The prefix of the tensors of each form in a checkpoint folder."""
_SUFFIXES = {".pth": "torch", ".pt": "torch", ".safetensors": "safetensors"}


def convert_checkpoint(source: str, output: Path, form: str, *, file_format: str | None, force: bool) -> None:
    """Write a checkpoint, or a part of it, as one file.

    Args:
        source: See `read_contents`.
        output: The file to write; an existing one is replaced only with `force`.
        form: A key of `FORMS`; a ValueError if the source does not contain what it needs.
        file_format: "torch" or "safetensors"; None to infer it from the suffix of `output`.
    """
    file_format = _file_format(output, file_format)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder: give the name of a file in it")
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists already: give another name, or --force to replace it")
    if file_format == "safetensors":
        import_safetensors()  # fails before everything is read if it is missing
    contents = read_contents(source)
    tensors = _selected_tensors(contents, form)
    write = _write_safetensors if file_format == "safetensors" else _write_torch
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(output) as file:
            write(file, form, tensors, contents.metadata)
    except RuntimeError as error:  # raised by torch for a full disk
        raise OSError(f"could not write {output}: {error}") from error
    logger.info("%s: %s of %s, %d tensors", output, form, contents.source, len(tensors))
    logger.info("to evaluate it: %s", _evaluation_command(contents, output))


def _file_format(output: Path, requested: str | None) -> str:
    """The format of a file, which readers infer from its suffix."""
    known = _SUFFIXES.get(output.suffix)
    if known is None and requested != "torch":
        raise ValueError(f"the suffix of {output} indicates no format; known: {', '.join(_SUFFIXES)}")
    if known and requested and known != requested:
        raise ValueError(f"--format {requested} but the suffix of {output} indicates {known}, which readers go by")
    return known or "torch"


def _selected_tensors(contents: Contents, form: str) -> dict[str, Tensor]:
    """The tensors of a form by their names in the file, on the CPU."""
    names = _selected_names(contents, form)
    if contents.folder is not None:
        stored = read_tensors(contents.folder, FORMS[form])
        tensors = {name: stored[origin] for name, origin in names.items()}
    else:  # copies, as tensors in a file may be views of larger ones or share their memory
        contiguous = torch.contiguous_format
        tensors = {name: contents.tensors[origin].clone(memory_format=contiguous) for name, origin in names.items()}
    return flatten_block_names(tensors)


def _selected_names(contents: Contents, form: str) -> dict[str, str]:
    """The tensors of a form: {name in the file: name in the contents}."""
    parts = contents.parts()
    held = ", ".join(" ".join(filter(None, part)) or "other tensors" for part in sorted(parts))
    missing = ValueError(f"{contents.source} does not hold what --to {form} needs; it holds: {held}")
    if form == "backbone":
        found = [parts[network, "backbone"] for network in ("teacher", "", "student") if (network, "backbone") in parts]
        if not found:
            raise missing
        return found[0]
    networks = NETWORKS if form == "full" else (form,)
    if any((network, "backbone") not in parts for network in networks):
        raise missing
    if form == "full":
        return {".".join(filter(None, (*part, name))): origin for part in parts for name, origin in parts[part].items()}
    own = {module: names for (network, module), names in parts.items() if network == form}
    return {f"{module}.{name}": origin for module, names in own.items() for name, origin in names.items()}


def _write_torch(file: BinaryIO, form: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    content: dict[str, Any] = tensors if form == "backbone" else {form: tensors}
    if form == "full":
        moments: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                parameter, _, moment = name.removeprefix("optimizer.").rpartition(".")
                moments.setdefault(parameter, {})[moment] = value
        model = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
        content = {"model": model, "optimizer": {"state": moments}, **metadata}
    torch.save(content, file)


def _write_safetensors(file: BinaryIO, form: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Flat names; other entries become JSON in the metadata: all of them, or for a part the iteration."""
    kept = {name: value for name, value in metadata.items() if form == "full" or name == "iteration"}
    texts = {name: json.dumps(value, default=str) for name, value in kept.items()}
    texts |= {"format": "pt", "contents": form, CHECKSUM_KEY: NO_CHECKSUM}
    file.writelines(with_checksum(import_safetensors().save(tensors, texts)))


def _evaluation_command(contents: Contents, output: Path) -> str:
    """The command that evaluates a converted file, with the config of its run if there is one."""
    path = contents.folder or contents.files[0]
    configs = [folder / "config.yaml" for folder in path.absolute().parents[:3]]
    config_file = next((str(path) for path in configs if path.is_file()), "CONFIG")
    words = ["python", "dinov2/run/eval/knn.py", "--config-file", config_file, "--pretrained-weights", str(output)]
    words += ["--output-dir", str(output.with_suffix("") / "knn")]
    return f"{shlex.join(words)} --train-dataset TRAIN --val-dataset VAL"
