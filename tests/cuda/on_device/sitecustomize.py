"""Imported by every Python process on the stub device: replaces what needs values or libraries of a real one."""

import torch
import torch.nn.attention.varlen

torch.backends.cudnn.enabled = False  # a library of its own, which the stub does not have
torch.backends.cuda.enable_cudnn_sdp(False)

_trunc_normal_ = torch.nn.init.trunc_normal_


def trunc_normal_(tensor, *args, **kwargs):  # redraws until all values are within bounds
    return tensor if tensor.is_cuda else _trunc_normal_(tensor, *args, **kwargs)


torch.nn.init.trunc_normal_ = trunc_normal_
torch.special.entr = lambda tensor: torch.where(tensor > 0, -tensor * tensor.log(), 0.0)  # is compiled at run time

torch.nn.attention.varlen._should_use_cudnn = lambda *_: False
