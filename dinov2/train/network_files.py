"""The networks of a run in files: loaded before training, and the teacher exported for evaluation."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.files import atomic_write, root_cause, shortened
from dinov2.models.carry_over import fit_positions
from dinov2.models.weights import check_numbers, read_state_dict
from dinov2.train.checkpoint_files.folder import METADATA_FILE, latest_checkpoint
from dinov2.train.parallel import full_tensor
from dinov2.train.ssl_meta_arch import METHOD_STATE, SSLMetaArch

logger = logging.getLogger(__name__)

_TABLE = "backbone.pos_embed"


def load_training_weights(model: SSLMetaArch, source: str | Path) -> str | Path:
    """Load networks and centers into a model that is not sharded yet, without optimizer state.

    The source is a checkpoint folder, a run's output (its newest checkpoint), a file with a whole checkpoint, or an
    exported teacher or its folder: one network with its heads, which initializes both student and teacher. Position
    tables of another grid are resampled. Returns the file or checkpoint folder. A ValueError if it does not fit the
    model, or is not finite.
    """
    if (folder := Path(source)).is_dir() and not (folder / METADATA_FILE).exists():
        teacher = folder / "teacher_checkpoint.pth"
        source = teacher if teacher.is_file() else latest_checkpoint(folder / "checkpoints") or folder
    if Path(source).is_dir():
        from dinov2.train.checkpoint_files.tensors import load_tensors, read_shapes, stored_names

        prefixes = tuple(f"model.{part}" for part in METHOD_STATE)
        names_and_values = ((f"model.{name}", value) for name, value in model.state_dict().items())
        state = {name: value for name, value in names_and_values if name.startswith(prefixes)}
        try:
            stored = {name for name in stored_names(Path(source)) if name.startswith(prefixes)}
            tables = _tables_of_other_grids(state, read_shapes(Path(source)))
            load_tensors(state | tables, Path(source), stored)
            for name, table in tables.items():
                level = logging.DEBUG if name.startswith("model.teacher.") else logging.WARNING  # say it once
                state[name].copy_(fit_positions(table, model.student_backbone, str(source), level=level))
            check_numbers(state, str(source))
        except Exception as error:  # a damaged file can raise any error
            raise ValueError(f"cannot load the model from {source}: {root_cause(error)}") from error
    else:
        state = read_state_dict(source)
        check_numbers(state, str(source))
        whole = any(name.startswith("student.") for name in state)
        for name in [name for name in state if name.endswith(_TABLE)]:
            if state[name].shape != model.student_backbone.pos_embed.shape:
                state[name] = fit_positions(state[name], model.student_backbone, str(source))
        try:
            if whole:
                kept = {name: value for name, value in state.items() if name.startswith(METHOD_STATE)}
                own = {name: value for name, value in model.state_dict().items() if not name.startswith(METHOD_STATE)}
                model.load_state_dict(kept | own)
            for module in () if whole else (model.student, model.teacher):
                module.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{source} does not hold a whole network with heads of this shape, as teachers exported by a run do "
                f"(for a backbone alone use student.pretrained_weights): {shortened(error)}"
            ) from error
    logger.info("loaded the model from %s", source)
    return source


def _tables_of_other_grids(state: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Room for stored position tables that are of the same width, but for another number of patches."""
    shapes = {name: value.shape for name, value in stored.items() if name.endswith(_TABLE)}
    return {
        name: torch.empty(shape)
        for name, shape in shapes.items()
        if name in state and shape != state[name].shape and shape[2:] == state[name].shape[2:]
    }


def save_teacher(teacher: nn.Module, path: Path) -> None:
    """Export the teacher in the published format, `{"teacher": state dict}`; all processes must call this."""
    state = {}
    for name, value in teacher.state_dict().items():
        unsharded = full_tensor(value.detach())
        if distributed.is_main():
            state[name] = unsharded.cpu()
    if not distributed.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as file:
            torch.save({"teacher": state}, file)
    except (OSError, RuntimeError) as error:
        raise OSError(f"could not write the teacher to {path}: {root_cause(error)}") from error
    logger.info("teacher: %s", path)
