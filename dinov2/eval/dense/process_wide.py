"""Layers of heads that act on the images of all processes together, so that their number does not matter."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2 import distributed


class FrozenInputBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes, for inputs that need no gradient.

    The statistics then need no gradient either, so that a sum over the processes is enough, on any device;
    `nn.SyncBatchNorm` requires a GPU. With one process, the numbers are those of `nn.BatchNorm2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, D, h, w); a `ValueError` if the input needs a gradient in training."""
        if not self.training or not distributed.is_enabled():
            return super().forward(input)
        if input.requires_grad:
            raise ValueError("the input of this batch norm must be frozen: its statistics have no gradient")
        values = input.float()
        count = torch.full((1,), values.numel() / values.shape[1], dtype=torch.float64, device=values.device)
        sums = torch.cat([values.sum(dim=(0, 2, 3), dtype=torch.float64), count])
        total = distributed.all_reduce_sum(sums)
        mean = (total[:-1] / total[-1]).to(values.dtype)
        squares = (values - mean[:, None, None]).square().sum(dim=(0, 2, 3), dtype=torch.float64)
        biased = distributed.all_reduce_sum(squares) / total[-1]
        with torch.no_grad():
            running_mean, running_var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
            unbiased = biased * (total[-1] / (total[-1] - 1).clamp_min(1))
            momentum = 0.1 if self.momentum is None else self.momentum
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_(unbiased.to(running_var), momentum)
            cast(Tensor, self.num_batches_tracked).add_(1)
        return functional.batch_norm(
            values, mean, biased.to(values.dtype), self.weight, self.bias, training=False, eps=self.eps
        )


class ProcessWideDropout2d(nn.Dropout2d):
    """`nn.Dropout2d` whose channels are drawn for the images of all processes, of which this one takes its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop channels of images (B, D, h, w); processes have the same random state, and equal B."""
        if not self.training or not self.p:
            return input
        count, channels = input.shape[:2]
        kept = torch.rand(count * distributed.world_size(), channels, device=input.device) >= self.p
        mine = kept[distributed.rank() * count :][:count]
        return input * mine[..., None, None] / (1 - self.p)


def make_process_wide(module: nn.Module) -> None:
    """Let batch norms and dropouts below `module` act on the images of all processes; parameter names stay."""
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = FrozenInputBatchNorm
        elif type(part) is nn.Dropout2d:
            part.__class__ = ProcessWideDropout2d
