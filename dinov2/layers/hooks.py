"""Modules whose work is fused into that of others, and who listens to them."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook, or a `forward` put in place, listens to what `module` computes or changes it.

    Such a module must really be called.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
