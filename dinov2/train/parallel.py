"""Several processes training one model: equal replicas that start alike and average their gradients."""

import torch
from torch import nn

from dinov2 import distributed


def replicate(model: nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0."""
    if distributed.is_enabled():
        for tensor in model.state_dict().values():
            tensor.copy_(distributed.broadcast(tensor, source=0))


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Replace each gradient by its mean over the processes."""
    if distributed.is_enabled():
        for param in module.parameters():
            if param.grad is not None:
                param.grad.copy_(distributed.all_reduce_sum(param.grad) / distributed.world_size())
