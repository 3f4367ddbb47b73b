"""Parallelism, applied from outside: the networks do not know of it, and their parameters keep their names.

With several processes parameters, gradients, moments and the moving average are sharded by PyTorch's `fully_shard`.
Every strategy is a mesh of processes, over which a parameter is split or replicated, and a choice whether the student
gathers its weights once per step or once more in the backward pass:

| strategy | split over | weights between forward and backward |
| --- | --- | --- |
| NO_SHARD | nothing: each process holds everything | kept |
| SHARD_GRAD_OP | all processes | kept |
| FULL_SHARD | all processes | freed, gathered again |
| HYBRID_SHARD_ZERO2 | the processes of a machine, replicated over machines | kept |
| HYBRID_SHARD | the processes of a machine, replicated over machines | freed, gathered again |

The teacher has no backward pass, so that it always frees its weights after use. With one process nothing is sharded.
"""

import importlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinov2 import distributed
from dinov2.config import DTYPES, SHARDED_OVER, ComputePrecision, ModulePrecision
from dinov2.layers.attention import best_backend

ActivationCheckpointing = Literal["none", "selective", "full"]

FREED_AFTER_FORWARD = ("FULL_SHARD", "HYBRID_SHARD")


def parallelize(
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    precision: ComputePrecision,
    *,
    block_chunks: int = 0,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile_blocks: bool = False,
) -> None:
    """Make student and teacher ready to train on all processes, in place; they start as those of rank 0.

    To be called on the final device and before the optimizer is made, which must hold the sharded parameters.

    Args:
        student, teacher: Networks by name; `backbone` has `blocks`.
        precision: Strategy and dtypes of each network.
        block_chunks: How many units the blocks of a backbone are sharded in; 0 makes each block one.
        activation_checkpointing: What the student's blocks compute again in the backward pass instead of keeping it:
            nothing, all but the results of matrix products and attention, or everything.
        compile_blocks: Compile each block by `torch.compile`.

    Raises:
        ValueError: If the processes of a machine are to share and the machines have different numbers of them.
    """
    if activation_checkpointing != "none":
        for block in _blocks(student):
            _recompute(block, selective=activation_checkpointing == "selective")
    if compile_blocks:
        _compile([*_blocks(student), *_blocks(teacher)])
    if distributed.is_enabled():
        # It warns of in-place operations on the features, which are views. There are none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        meshes: dict[int, DeviceMesh] = {}
        for networks, precisions in ((student, precision.student), (teacher, precision.teacher)):
            for name, network in networks.items():
                _start_alike(network)
                how: ModulePrecision = getattr(precisions, name)
                shards = num_shards(how.sharding_strategy, distributed.world_size(), distributed.local_world_size())
                mesh = meshes[shards] = meshes.get(shards) or distributed.device_mesh(shards)
                free = networks is teacher or how.sharding_strategy in FREED_AFTER_FORWARD
                _shard(network, how, mesh, block_chunks=block_chunks, reshard_after_forward=free)


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor: its shard, or all of it."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _blocks(networks: nn.ModuleDict) -> list[nn.Module]:
    return list(cast(nn.ModuleList, networks["backbone"].blocks))


def _compile(blocks: Sequence[nn.Module]) -> None:
    """Compile each block; one program serves all that differ in weights only, for any number of masked patches."""
    torch.compiler.assume_constant_result(best_backend)  # marks it; not where it is defined, as that loads the compiler
    dynamo: Any = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 2 * len(blocks))  # rates of depth may differ
    for block in blocks:
        block.compile()


def _start_alike(network: nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0."""
    for tensor in network.state_dict().values():
        tensor.copy_(distributed.broadcast(tensor, source=0))


def num_shards(strategy: str, num_processes: int, processes_per_machine: int) -> int:
    """Over how many processes a strategy splits a parameter."""
    return {"nothing": 1, "a machine": processes_per_machine, "all processes": num_processes}[SHARDED_OVER[strategy]]


def units_of_blocks(network: nn.Module, block_chunks: int) -> list[list[nn.Module]]:
    """The blocks of a backbone that are gathered and freed together; none for a head."""
    blocks = list(getattr(network, "blocks", []))
    size = max(len(blocks) // block_chunks, 1) if block_chunks else 1
    return [blocks[first : first + size] for first in range(0, len(blocks), size)]


def _shard(
    network: nn.Module,
    how: ModulePrecision,
    mesh: DeviceMesh,
    *,
    block_chunks: int,
    reshard_after_forward: bool,
) -> None:
    """Shard a backbone in units of blocks, and what else there is in one unit; a head is one unit."""
    dtypes = how.mixed_precision
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=DTYPES[dtypes.param_dtype],
            reduce_dtype=DTYPES[dtypes.reduce_dtype],
            cast_forward_inputs=False,  # autocast does, where it matters, as with one process
        ),
    }
    for unit in units_of_blocks(network, block_chunks):
        fully_shard(unit if len(unit) > 1 else unit[0], **settings)
    fully_shard(network, **settings)


# --- Activation checkpointing ----------------------------------------------------------------------------------------


def _recompute(block: nn.Module, *, selective: bool) -> None:
    """Let a block compute its activations again in the backward pass, with the same random numbers."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    block.forward = partial(checkpoint, block.forward, **settings)


def _keep_products(_: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is expensive to compute: the results of matrix products and attention."""
    kept = operation in _PRODUCTS or "attention" in str(operation)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
