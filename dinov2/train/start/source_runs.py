"""Earlier runs that a run starts from or learns from: their weights and their configuration."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from dinov2 import config
from dinov2.config import Config
from dinov2.models.weights import TEACHER_FILE, backbone_state_dict, read_state_dict
from dinov2.train.checkpoint_folder import complete_checkpoints, latest_checkpoint, read_tensors

logger = logging.getLogger(__name__)


def weights_of_run(source: str) -> Path:
    """The checkpoint of `OUT` or `OUT:STEP`, or the best teacher of a run whose checkpoints were deleted.

    Raises:
        ValueError, FileNotFoundError: The text is no such source, or there is no such run or checkpoint.
    """
    folder, colon, text = source.rpartition(":")
    if not colon or Path(source).is_dir():
        folder, text = source, ""
    if text and not text.isdecimal():
        raise ValueError(f"{source}: expected OUT or OUT:STEP with the number of a checkpoint, such as OUT:12499")
    run = Path(folder)
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not the output folder of a run: there is no such folder")
    found = complete_checkpoints(run / "checkpoints")
    if found and not text:
        return found[max(found)]
    if text:
        if int(text) not in found:
            steps = ", ".join(map(str, found)) or "none"
            raise FileNotFoundError(f"{run} has no checkpoint of step {text}; there are: {steps}")
        return found[int(text)]
    best = run / "eval" / "best" / TEACHER_FILE
    if not best.is_file():
        raise FileNotFoundError(f"{run} has neither checkpoints nor eval/best/{TEACHER_FILE}: is it the output folder?")
    logger.warning("%s has no checkpoints: its best teacher is used", run)
    return best


def check_source_runs(cfg: Config, *, resume: bool) -> None:
    """Raise the error of a run that is named but missing, before large networks are built.

    A run that resumes needs the teacher of a distillation only.
    """
    begins = not resume or latest_checkpoint(Path(cfg.train.output_dir) / "checkpoints") is None
    named = {"distillation.teacher": cfg.distillation.teacher}
    if begins:
        named |= {"init_from": cfg.init_from, "gram.teacher": cfg.gram.teacher if cfg.gram.loss_weight > 0 else ""}
    for key, source in named.items():
        if source:
            with naming_key(key):
                weights_of_run(source)


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Name the key of the configuration in errors about weights."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from error


def config_of(weights: Path) -> Config | None:
    """The configuration of the run in whose folder some weights are; None if there is none."""
    found = next((folder / "config.yaml" for folder in weights.parents if (folder / "config.yaml").is_file()), None)
    return None if found is None else config.load(found)


def teacher_backbone(path: str | Path) -> dict[str, Tensor]:
    """The state dict of the teacher's backbone in a checkpoint folder or file, as it is there."""
    if not Path(path).is_dir():
        return backbone_state_dict(read_state_dict(path), source=str(path))
    prefix = "model.teacher.backbone."
    return {name.removeprefix(prefix): value for name, value in read_tensors(Path(path), prefix).items()}
