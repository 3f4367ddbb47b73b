"""Earlier runs that a run starts from or learns from: their weights and their configuration."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from dinov2 import config
from dinov2.config import Config, ConfigError
from dinov2.files import runs_below
from dinov2.models import build_model
from dinov2.models.published import PACKAGED, PUBLISHED
from dinov2.models.weights import TEACHER_FILE, backbone_state_dict, read_state_dict
from dinov2.train.checkpoint_files.folder import complete_checkpoints, latest_checkpoint

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
        raise FileNotFoundError(f"{run} is not the output folder of a run: {_why_no_run(run)}")
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
        hint = runs_below(run) or ": is it the output folder?"
        raise FileNotFoundError(f"{run} has neither checkpoints nor eval/best/{TEACHER_FILE}{hint}")
    logger.warning("%s has no checkpoints: its best teacher is used", run)
    return best


def _why_no_run(path: Path) -> str:
    if path.is_file():
        return "it is a file; give the folder that --output-dir named, or OUT:STEP"
    if str(path) in (*PUBLISHED, *PACKAGED):
        return "it is a backbone without heads, see docs/stages.md; to start from it, set student.pretrained_weights"
    if str(path).endswith("_RUN"):
        return "the recipe leaves it to you, as the output folder of your run"
    return "there is no such folder"


def pinned(cfg: Config, *, resume: bool) -> Config:
    """The configuration with the step of the teacher of a distillation, and of a run that resumes with its origin.

    The step is the newest now, or that of the run so far. So the record of the run names it, and it resumes with the
    same, also if the teacher's run has gone on. The record keeps the weights that the run began with: others have no
    effect, which is a warning.
    """
    source, output = cfg.distillation.teacher, Path(cfg.train.output_dir)
    if resume and latest_checkpoint(output / "checkpoints") is not None and (former := _recorded(output)) is not None:
        cfg = _with_sources_of(former, cfg)
        recorded = former.distillation.teacher
        if source and recorded.rpartition(":")[0] == source:
            return replace(cfg, distillation=replace(cfg.distillation, teacher=recorded))
    if not source:
        return cfg
    with naming_key("distillation.teacher"):
        path = weights_of_run(source)
    if not path.is_dir() or source.endswith(f":{int(path.name.rpartition('_')[2])}"):
        return cfg
    return replace(cfg, distillation=replace(cfg.distillation, teacher=f"{source}:{int(path.name.rpartition('_')[2])}"))


def _recorded(output: Path) -> Config | None:
    """The configuration of the run in an output folder; None if it cannot be read, which resuming reports."""
    try:
        return config.load(output / "config.yaml")
    except (ConfigError, OSError):
        return None


def _with_sources_of(former: Config, cfg: Config) -> Config:
    """The configuration with the initial weights of a run that it resumes."""
    before, now = config.sources_of(former), config.sources_of(cfg)
    if ignored := [f"{key}={source}" for key, source in now.items() if before.get(key) != source]:
        logger.warning(
            "%s has no effect, the run in %s resumes from its checkpoint: give another --output-dir, or --no-resume, "
            "to start from these weights",
            " ".join(ignored),
            cfg.train.output_dir,
        )
    return replace(
        cfg,
        init_from=former.init_from,
        init_from_optimizer=former.init_from_optimizer,
        MODEL=former.MODEL,
        student=replace(cfg.student, pretrained_weights=former.student.pretrained_weights),
    )


def check_fits(source: str, there: Config, here: Config, keys: Mapping[str, str]) -> None:
    """Raise a ValueError for a setting of another run that must be that of this one; `keys` has the reason of each."""
    for key, reason in keys.items():
        theirs, ours = attrgetter(key)(there), attrgetter(key)(here)
        if theirs != ours:
            raise ValueError(f"{source} has {key} = {theirs}, but this run has {ours}: {reason}")


SAME_PIXELS = {
    "augmentation.mean": "both see the same normalized pixels",
    "augmentation.std": "both see the same normalized pixels",
    "images.bands": "both see the same channels",
}
"""Settings of images that a run shares with one that it starts from or learns from."""


def check_heads(source: str, there: Config, here: Config) -> None:
    """Raise a ValueError for another number of attention heads, which tensors do not show."""
    with torch.device("meta"):
        theirs, ours = (build_model(**config.backbone_arguments(cfg)).num_heads for cfg in (there, here))
    if theirs != ours:
        raise ValueError(f"{source} has student.num_heads = {theirs}, but this run has {ours}: another network")


def check_source_runs(cfg: Config, *, resume: bool) -> None:
    """Raise the error of a run that is named but missing, before large networks are built.

    A run that resumes needs the teacher of a distillation only.
    """
    begins = not resume or latest_checkpoint(Path(cfg.train.output_dir) / "checkpoints") is None
    named = {"distillation.teacher": cfg.distillation.teacher}
    if begins:
        named |= {"init_from": cfg.init_from, "gram.teacher": cfg.gram.teacher if cfg.gram.loss_weight > 0 else ""}
    problems = []
    for key, source in named.items():
        try:
            with naming_key(key):
                path = weights_of_run(source) if source else None
        except (FileNotFoundError, ValueError) as error:
            problems.append(error)
            continue
        if key == "init_from" and cfg.init_from_optimizer and path is not None and not path.is_dir():
            raise ValueError(f"init_from_optimizer: {source} has no checkpoints, so the state of its optimizer is lost")
    if problems:
        raise type(problems[0])("; ".join(map(str, problems)))


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Name the key of the configuration in errors about weights."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from error


def teacher_backbone(path: str | Path) -> dict[str, Tensor]:
    """The state dict of the teacher's backbone in a checkpoint folder or file, as it is there."""
    if not Path(path).is_dir():
        return backbone_state_dict(read_state_dict(path), source=str(path))
    from dinov2.train.checkpoint_files.tensors import read_tensors

    prefix = "model.teacher.backbone."
    return {name.removeprefix(prefix): value for name, value in read_tensors(Path(path), prefix).items()}
