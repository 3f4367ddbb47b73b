"""Parallelism, applied to the networks from outside; their parameters keep their names.

With several processes, parameters, gradients, moments and the moving average are sharded by PyTorch's `fully_shard`.
A strategy is a mesh of processes, over which parameters are split or replicated, and the choice whether the student
gathers its weights once per step or again in the backward pass:

| strategy | sharded over | weights between forward and backward |
| --- | --- | --- |
| NO_SHARD | nothing: each process has everything | kept |
| SHARD_GRAD_OP | all processes | kept |
| FULL_SHARD | all processes | freed, gathered again |
| HYBRID_SHARD_ZERO2 | the processes of a machine, replicated over machines | kept |
| HYBRID_SHARD | the processes of a machine, replicated over machines | freed, gathered again |

The teacher has no backward pass and always frees its weights after use.
"""

import importlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinov2 import distributed
from dinov2.config import DTYPES, SHARDED_OVER, ComputePrecision, ModulePrecision, NetworkPrecision
from dinov2.layers.attention import best_backend

ActivationCheckpointing = Literal["none", "selective", "full"]

FREED_AFTER_FORWARD = ("FULL_SHARD", "HYBRID_SHARD")


def parallelize(
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    precision: ComputePrecision,
    *,
    frozen: Sequence[nn.ModuleDict] = (),
    shared: Sequence[nn.ModuleDict] = (),
    block_chunks: int = 0,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile_blocks: bool = False,
) -> None:
    """Prepare student and teacher for training on all processes, in place, with the weights of rank 0.

    To be called on the final device, and before the optimizer is built, which needs the sharded parameters.

    Args:
        student, teacher: Networks by name; `backbone` has `blocks`.
        precision: Sharding strategy and dtypes of each network.
        frozen: Further networks that do not learn, treated like the teacher.
        shared: The same, sharded over the processes of the whole job.
        block_chunks: Number of sharding units of the blocks of a backbone; 0: one unit per block.
        activation_checkpointing: Activations of the student's blocks recomputed in the backward pass: none, all but the
            outputs of matrix products and attention ("selective"), or all ("full").
        compile_blocks: Whether to compile each block by `torch.compile`.
    """
    if activation_checkpointing != "none":
        for block in _blocks(student):
            _recompute(block, selective=activation_checkpointing == "selective")
    if compile_blocks:
        _compile([block for networks in (student, teacher, *frozen, *shared) for block in _blocks(networks)])
    # It warns of in-place operations on views, of which there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    _distribute([student], precision.student, block_chunks=block_chunks, always_free=False)
    _distribute([teacher, *frozen], precision.teacher, block_chunks=block_chunks, always_free=True)
    with distributed.whole_job():
        _distribute(shared, precision.teacher, block_chunks=block_chunks, always_free=True)


def _distribute(
    parts: Iterable[nn.ModuleDict], precision: NetworkPrecision, *, block_chunks: int, always_free: bool
) -> None:
    """Shard networks over the processes, if there are several, with the weights of rank 0."""
    if not distributed.is_enabled():
        return
    meshes: dict[int, DeviceMesh] = {}
    for networks in parts:
        for name, network in networks.items():
            _broadcast_weights(network)
            how: ModulePrecision = getattr(precision, name)
            shards = num_shards(how.sharding_strategy, distributed.world_size(), distributed.local_world_size())
            mesh = meshes[shards] = meshes.get(shards) or distributed.device_mesh(shards)
            free = always_free or how.sharding_strategy in FREED_AFTER_FORWARD
            _shard(network, how, mesh, block_chunks=block_chunks, reshard_after_forward=free)


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The local part of each tensor: its shard, or the whole tensor if it is not sharded."""
    return [cast(Any, tensor).to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes must call this."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, without importing that class, which takes a third of the time of PyTorch's."""
    return hasattr(tensor, "to_local")


def _blocks(networks: nn.ModuleDict) -> list[nn.Module]:
    return list(cast(nn.ModuleList, networks["backbone"].blocks)) if "backbone" in networks else []


def _compile(blocks: Sequence[nn.Module]) -> None:
    """Compile each block; blocks that differ only in weights share a program, for any number of masked patches."""
    torch.compiler.assume_constant_result(best_backend)  # not at its definition, which would import the compiler
    dynamo: Any = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 2 * len(blocks))  # drop path rates may differ
    for block in blocks:
        block.compile()


def _broadcast_weights(network: nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to all processes."""
    for tensor in network.state_dict().values():
        tensor.copy_(distributed.broadcast(tensor, source=0))


def num_shards(strategy: str, num_processes: int, processes_per_machine: int) -> int:
    """Number of processes over which a strategy shards a parameter."""
    return {"nothing": 1, "a machine": processes_per_machine, "all processes": num_processes}[SHARDED_OVER[strategy]]


def units_of_blocks(network: nn.Module, block_chunks: int) -> list[list[nn.Module]]:
    """Groups of blocks of a backbone that are gathered and freed together; empty for a head."""
    blocks = list(getattr(network, "blocks", []))
    size = max(len(blocks) // block_chunks, 1) if block_chunks else 1
    return [blocks[first : first + size] for first in range(0, len(blocks), size)]


def _shard(
    network: nn.Module, precision: ModulePrecision, mesh: DeviceMesh, *, block_chunks: int, reshard_after_forward: bool
) -> None:
    """Shard a backbone in units of blocks, with the rest as one unit; a head is one unit."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtypes = precision.mixed_precision
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=DTYPES[dtypes.param_dtype],
            reduce_dtype=DTYPES[dtypes.reduce_dtype],
            cast_forward_inputs=False,  # autocast does, as with one process
        ),
    }
    for unit in units_of_blocks(network, block_chunks):
        fully_shard(unit if len(unit) > 1 else unit[0], **settings)
    fully_shard(network, **settings)


# --- Activation checkpointing ----------------------------------------------------------------------------------------


def _recompute(block: nn.Module, *, selective: bool) -> None:
    """Make a block recompute its activations in the backward pass, with the same random numbers."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    block.forward = partial(checkpoint, block.forward, **settings)


def _keep_products(_: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy that keeps the outputs of matrix products and attention, which are expensive to compute."""
    kept = operation in _PRODUCTS or any(word in str(operation) for word in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_ATTENTION = ("attention", "_varlen_attn", "flash_fwd")  # in the names of operators of PyTorch and xFormers
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
