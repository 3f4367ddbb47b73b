"""LayerNorm that computes in half precision under autocast."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose result has the dtype of its input also under autocast; sums are in float32 in any case.

    CUDA's autocast would convert the input to float32, and the following linear layer the result back: half of the
    traffic of the element-wise operations of a block. The weights are rounded to half precision instead, as they are in
    sharded training. An input in float32, as in evaluation, is normalized as by `nn.LayerNorm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if x.dtype is torch.float32 or not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        weight, bias = (param if param is None else param.to(x.dtype) for param in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
