"""The architecture of a configuration."""

from dinov2.config import Config
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.stages.distillation import DistillationArch


def build_arch(cfg: Config) -> SSLMetaArch:
    """Build the networks and the objective of a run."""
    return DistillationArch(cfg) if cfg.distillation.teacher else SSLMetaArch(cfg)
