"""The three losses of DINOv2, and their targets."""

from dinov2.loss.dino import DINOLoss
from dinov2.loss.ibot import iBOTPatchLoss
from dinov2.loss.koleo import KoLeoLoss

__all__ = ["DINOLoss", "KoLeoLoss", "iBOTPatchLoss"]
