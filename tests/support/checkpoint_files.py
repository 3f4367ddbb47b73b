"""Checkpoint folders as a run writes them, made by hand, and pickles that would harm."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn


def write_checkpoint(folder: Path, content: dict[str, Any], **state: Any) -> Path:
    """Write a checkpoint folder; with a process group, all processes call it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(content, storage_writer=dcp.FileSystemWriter(folder), no_dist=not dist.is_initialized())
    (folder / "state.json").write_text(json.dumps({"iteration": 7, "scaler": {}, **state}))
    return folder


def run_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Model and optimizer under the names of a checkpoint."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, param in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(param, {}).items()}
    return tensors


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the student with moments that differ everywhere; weights stay as they are."""
    params = list(model.student.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.0)
    for param in params:
        param.grad = param.detach() * 2
    optimizer.step()
    return optimizer


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, shapes, dtypes and bits, all on the CPU."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].device.type == "cpu", name
        assert torch.equal(found[name], value), name


class Unsafe:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.target,)
