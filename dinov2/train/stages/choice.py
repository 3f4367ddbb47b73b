"""The architecture of a configuration."""

from dinov2.config import Config
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.stages.distillation import DistillationArch
from dinov2.train.stages.gram_anchoring import GramAnchoringArch
from dinov2.train.stages.shared_teacher import SharedTeacherArch


def build_arch(cfg: Config, *, among_students: bool = False) -> SSLMetaArch:
    """Build the networks and the objective of a run, which may be one of several in the job."""
    if cfg.distillation.teacher:
        return SharedTeacherArch(cfg) if among_students else DistillationArch(cfg)
    return GramAnchoringArch(cfg) if cfg.gram.loss_weight > 0 else SSLMetaArch(cfg)
