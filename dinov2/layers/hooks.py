"""Detection of hooks on modules whose computation is fused into that of others."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook or a replaced `forward` observes the output of `module`, which must then be called, not fused."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
