"""The initial weights of a run: `student.pretrained_weights`, `MODEL.WEIGHTS` or `init_from`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from dinov2 import config
from dinov2.config import Config, sources_of
from dinov2.models.backbones import num_heads_beside, unstored_settings
from dinov2.models.weights import backbone_state_dict, load_state, read_state_dict
from dinov2.train.network_files import load_training_weights
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.start.source_runs import (
    SAME_PIXELS,
    check_heads,
    naming_key,
    teacher_backbone,
    weights_of_run,
)

logger = logging.getLogger(__name__)

_NETWORK_KEYS = (
    "student.",
    "dino.head_",
    "ibot.head_",
    "ibot.separate_head",
    "crops.global_crops_size:",
    "images.bands:",
)


class InitialWeights(NamedTuple):
    """The backbone that a run starts from, as its source has it."""

    key: str  # of the configuration
    source: str
    backbone: dict[str, Tensor]  # state dict with the published names
    num_heads: int | None  # attention heads of the source, if it states them; else those of the model


def load_initial_weights(model: SSLMetaArch, cfg: Config) -> InitialWeights | None:
    """Load the initial weights of the configuration into student and teacher, before sharding.

    None if they are random. A ValueError or FileNotFoundError that names the key if they do not fit or are missing.
    """
    sources = sources_of(cfg)
    if not sources:
        return None
    (key, source), *replaced = sources.items()
    for other, name in replaced:
        logger.info("%s=%s replaces %s=%s", key, source, other, name)
    with naming_key(key):
        if key == "student.pretrained_weights":
            loaded = _load_backbone(model, source)
            model.teacher.load_state_dict(model.student.state_dict())
            _check_registers(cfg, loaded.backbone)
            return loaded
        path = load_training_weights(model, source) if key == "MODEL.WEIGHTS" else _load_run(model, cfg, source)
        return InitialWeights(key, str(path), teacher_backbone(path), None)


def _load_backbone(model: SSLMetaArch, name: str) -> InitialWeights:
    """Load a published name, file, folder or URL into the student's backbone, with all that can be carried over."""
    state = backbone_state_dict(read_state_dict(name), source=name)
    load_state(model.student_backbone, state, name, carry_over=True)
    run = config.of_run(name)
    num_heads = (
        num_heads_beside(name) if run is None else unstored_settings(**config.backbone_arguments(run))["num_heads"]
    )
    return InitialWeights("student.pretrained_weights", name, state, num_heads)


def _check_registers(cfg: Config, state: dict[str, Tensor]) -> None:
    """Warn of new registers that would stay as they are while the backbone is frozen."""
    new = cfg.student.num_register_tokens and "register_tokens" not in state
    if new and cfg.optim.freeze_backbone_steps and cfg.optim.freeze_backbone_except != "patch_embed_and_registers":
        logger.warning(
            "the registers are new, but learn only after optim.freeze_backbone_steps = %d: consider "
            "optim.freeze_backbone_except=patch_embed_and_registers",
            cfg.optim.freeze_backbone_steps,
        )


def _load_run(model: SSLMetaArch, cfg: Config, source: str) -> str | Path:
    """Load an own run; a ValueError names the settings of its networks that differ from those of this run."""
    path = weights_of_run(source)
    former = config.of_run(path)
    if former is not None:
        check_heads(source, former, cfg)
        for problem in (text for text in config.differences(former, cfg) if text.startswith(tuple(SAME_PIXELS))):
            logger.warning("%s was trained on other pixels: %s", source, problem)
    try:
        return load_training_weights(model, path)
    except ValueError as error:
        if former is None:
            raise
        changes = network_changes(config.differences(former, cfg))
        raise ValueError(f"{error}. Settings there -> here: {'; '.join(changes) or 'the same'}") from error


def network_changes(changes: Sequence[str]) -> list[str]:
    """Those of `config.differences` that can change the names and shapes of weights."""
    return [text for text in changes if text.startswith(_NETWORK_KEYS) and "pretrained_weights" not in text]
