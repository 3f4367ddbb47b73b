"""Processes that train or evaluate together: rank and world size, one process group, sums and gathers.

A process learns its rank from torchrun, a submitit job on this machine, a SLURM step, or it is alone. Alone there is
no process group, on no device, and every helper below is the identity: the laptop path is the cluster path.

    with distributed.session():
        total = distributed.all_reduce_sum(torch.ones(1, device=distributed.device()))
"""

import itertools
import logging
import os
import random
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dinov2.allocation import keep_freed_memory

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Longer than a teacher checkpoint of ViT-g or listing a dataset takes on one process while the others wait.
DEFAULT_TIMEOUT = timedelta(minutes=30)

_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SUBMITIT_LOCAL = tuple(f"SUBMITIT_LOCAL_{name}" for name in ("JOB_ID", "GLOBALID", "NTASKS", "LOCALID"))
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


@dataclass(frozen=True)
class ProcessInfo:
    """Rank of a process among `world_size`, and the address of rank 0."""

    source: Literal["torchrun", "submitit", "slurm", "alone"]
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size <= self.world_size):
            raise ValueError(f"the environment ({self.source}) describes an impossible process: {self}")


_process: ProcessInfo | None = None
_group: dist.ProcessGroup | None = None  # of this process after `split`; None: all processes of the job
_cpu_group: dist.ProcessGroup | None = None  # the same processes, for `cpu_group`


# --- Detection of the process ----------------------------------------------------------------------------------------


def detect_process(env: Mapping[str, str] = os.environ) -> ProcessInfo:
    """Read rank, world size and address of this process from environment variables.

    In this order: all variables of torchrun; a task of a submitit job on this machine; a task of a SLURM step (the
    variables of an allocation, as in an sbatch script or an salloc shell, do not suffice); a single process.

    Raises:
        ValueError: The variables mean several processes, but are incomplete or contradictory.
    """
    if all(name in env for name in _TORCHRUN):
        address, port, rank, world_size, local_rank, local_world_size = (env[name] for name in _TORCHRUN)
        return ProcessInfo(
            "torchrun", int(rank), int(world_size), int(local_rank), int(local_world_size), address, int(port)
        )
    if env.get("SUBMITIT_EXECUTOR") == "local" and all(name in env for name in _SUBMITIT_LOCAL):
        job_id, rank, world_size, local_rank = (env[name] for name in _SUBMITIT_LOCAL)
        return ProcessInfo(
            "submitit",
            *(int(rank), int(world_size), int(local_rank), int(world_size)),
            master_port=_master_port(env, job_id),
        )
    if all(name in env for name in _SLURM_STEP):
        return _slurm_process(env)
    _reject_incomplete_torchrun(env)
    return ProcessInfo("alone")


def expand_nodelist(text: str) -> list[str]:
    """Expand a SLURM node list: `a1,b[2-3,07-09]` -> a1 b2 b3 b07 b08 b09; other text is a ValueError."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        pieces = re.split(r"\[([^\[\]]*)\]", item)  # literal, range list, literal, range list, ...
        choices = [[p] if i % 2 == 0 else _expand_ranges(p, text) for i, p in enumerate(pieces)]
        names.extend("".join(parts) for parts in itertools.product(*choices))
    if not names or text.count("[") != text.count("]"):
        raise ValueError(f"not a SLURM node list: {text!r}")
    return names


def _expand_ranges(text: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"not a SLURM node list: {nodelist!r} (cannot read {part!r})")
        first, last = match[1], match[2] or match[1]
        numbers.extend(f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    return numbers


def _slurm_process(env: Mapping[str, str]) -> ProcessInfo:
    nodelist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    nodes = expand_nodelist(nodelist)
    num_nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_JOB_NUM_NODES") or len(nodes))
    if len(nodes) != num_nodes:
        raise ValueError(f"SLURM counts {num_nodes} nodes but lists {len(nodes)}: {nodelist!r}")
    world_size = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or f"{int(world_size) // num_nodes}(x{num_nodes})"
    return ProcessInfo(
        "slurm",
        rank=int(env["SLURM_PROCID"]),
        world_size=int(world_size),
        local_rank=int(env["SLURM_LOCALID"]),
        local_world_size=_tasks_on_node(tasks, int(env["SLURM_NODEID"])),
        master_addr=nodes[0],
        master_port=_master_port(env, env["SLURM_JOB_ID"]),
    )


def _tasks_on_node(text: str, node: int) -> int:
    """Parse task counts of SLURM, such as `2(x3),1`: two tasks on each of three nodes, one on the fourth."""
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts.extend([int(count)] * int(repeats or 1))
    if node >= len(counts):
        raise ValueError(f"SLURM lists task counts {text!r}, but this is node number {node}")
    return counts[node]


def _master_port(env: Mapping[str, str], job_id: str) -> int:
    """MASTER_PORT if set, else a port derived from the job id, so that all tasks agree."""
    return int(env["MASTER_PORT"]) if "MASTER_PORT" in env else random.Random(int(job_id)).randint(20000, 60000)


def _reject_incomplete_torchrun(env: Mapping[str, str]) -> None:
    found = [name for name in _TORCHRUN if name in env]
    missing = ", ".join(name for name in _TORCHRUN if name not in env)
    several = [f"{n}={env[n]}" for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE") if env.get(n, "1") != "1"]
    several += [f"{n}={env[n]}" for n in ("RANK", "LOCAL_RANK") if env.get(n, "0") != "0"]
    if several:
        raise ValueError(
            f"{', '.join(several)} means several processes, but {missing} not set: start them with torchrun or srun, "
            "or unset these variables to run one process"
        )
    if found:
        logger.warning("ignoring %s (%s not set): running as a single process", ", ".join(found), missing)


# --- The process group -----------------------------------------------------------------------------------------------


def init(timeout: timedelta = DEFAULT_TIMEOUT) -> ProcessInfo:
    """Detect rank and world size of this process, select its GPU and connect the processes if there are several.

    Collectives on CUDA tensors go through NCCL, those on CPU tensors through gloo. A ValueError if the environment is
    invalid, or there are fewer GPUs than processes on this machine.
    """
    global _process
    if dist.is_initialized():
        raise RuntimeError("the process group exists already: init() was called twice without close()")
    process = detect_process()
    target = _choose_device(process)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if process.world_size > 1:
        address = "env://" if process.source == "torchrun" else f"tcp://{process.master_addr}:{process.master_port}"
        logger.debug("process %d of %d connects to %s", process.rank, process.world_size, address)
        store, *_ = next(dist.rendezvous(address, process.rank, process.world_size, timeout=timeout))
        if target.type == "cuda":
            _refuse_shared_gpu(store, process, target)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo",
            store=store,
            rank=process.rank,
            world_size=process.world_size,
            timeout=timeout,
            device_id=target if target.type == "cuda" else None,
        )
    _process = process
    return process


def _refuse_shared_gpu(store: dist.Store, process: ProcessInfo, device: torch.device) -> None:
    """Raise a ValueError if two processes of this machine have the same GPU: NCCL would fail, or wait forever."""
    mine = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"gpu of {process.rank}", mine)
    first = process.rank - process.local_rank
    ranks = range(first, min(first + process.local_world_size, process.world_size))  # usually those of this machine
    gpus = [store.get(f"gpu of {rank}").decode() for rank in ranks]
    if gpus.count(mine) > 1:
        raise ValueError(
            f"{len(gpus)} processes on this machine have {len(set(gpus))} GPUs: start at most one process for each GPU"
        )


def close() -> None:
    """Destroy the process group, if there is one."""
    global _process, _group, _cpu_group
    if dist.is_initialized():
        dist.destroy_process_group()
    _process = _group = _cpu_group = None


@contextmanager
def session(timeout: timedelta = DEFAULT_TIMEOUT) -> Iterator[ProcessInfo]:
    """Call `init()` before and `close()` after the body; an error in the body makes the other processes fail quickly.

    A process that computes on the CPU keeps freed memory. The traceback of an error, with the rank, is written to the
    log file, and passed to torchrun if that started the process. The group is then not closed, which would wait for the
    others: the process ends, its connections break, and they fail.
    """
    process = init(timeout)
    if device().type == "cpu":
        keep_freed_memory()
    try:
        yield process
    except Exception as error:
        if process.world_size > 1:
            error.add_note(f"in process {process.rank} of {process.world_size} on {socket.gethostname()}")
            logger.critical("this process failed", exc_info=True, extra={"only_in_file": True})  # the caller reports it
            get_error_handler().record_exception(error)
        raise
    close()


def _choose_device(process: ProcessInfo) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:  # the only GPU, or the one that the scheduler made visible to this task
        return torch.device("cuda", 0)
    if process.local_rank >= count:
        raise ValueError(
            f"{process.local_world_size} processes on this machine but {count} GPUs: start at most {count}"
        )
    return torch.device("cuda", process.local_rank)


# --- Queries: of the group of this process, by default the whole job --------------------------------------------------


def is_enabled() -> bool:
    """Whether there are several processes."""
    return world_size() > 1


def rank() -> int:
    return dist.get_rank(_group) if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size(_group) if dist.is_initialized() else 1


def local_rank() -> int:
    """Index of this process among those on this machine."""
    return _process.local_rank if _process else 0


def local_world_size() -> int:
    """Number of processes on this machine."""
    return min(_process.local_world_size, world_size()) if _process else 1


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """The device of this process: its GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# --- Groups of processes ---------------------------------------------------------------------------------------------


def split(sizes: Sequence[int]) -> int:
    """Divide the processes of the job into groups of consecutive ranks; returns the number of the group of this one.

    Queries and collectives are then of its group, but within `whole_job`. All processes must call this, once. A
    ValueError if the sizes are not those of all processes together.
    """
    global _group, _cpu_group
    if sum(sizes) != world_size():
        raise ValueError(f"{world_size()} processes cannot be divided into groups of {', '.join(map(str, sizes))}")
    if len(sizes) == 1:
        return 0
    rank_in_job, ends, number = rank(), list(itertools.accumulate(sizes)), 0
    for index, (size, end) in enumerate(zip(sizes, ends, strict=True)):  # all processes create all groups
        ranks = list(range(end - size, end))
        groups = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")
        if rank_in_job in ranks:
            number, (_group, _cpu_group) = index, cast("tuple[dist.ProcessGroup, dist.ProcessGroup]", groups)
    return number


@contextmanager
def whole_job() -> Iterator[None]:
    """Within the body, queries and collectives are of all processes, also those of other groups."""
    global _group
    own, _group = _group, None
    try:
        yield
    finally:
        _group = own


def device_mesh(num_shards: int) -> DeviceMesh:
    """Arrange the processes in rows of `num_shards`: a mesh of one dimension for a single row, else of two.

    Tensors are sharded within a row and replicated over the rows. Requires several processes, whose number is a
    multiple of `num_shards`; after `split` it must be that number.
    """
    if world_size() % num_shards or (_group is not None and num_shards != world_size()):
        raise ValueError(f"{world_size()} processes cannot be divided into groups of {num_shards}")
    if _group is not None:
        return DeviceMesh.from_group(_group, device().type)
    if num_shards == world_size():
        return init_device_mesh(device().type, (num_shards,))
    return init_device_mesh(
        device().type, (world_size() // num_shards, num_shards), mesh_dim_names=("replicate", "shard")
    )


def group() -> dist.ProcessGroup | None:
    """The group of this process, for functions of PyTorch; None is that of all processes, or no group."""
    return _group


def cpu_group() -> dist.ProcessGroup | None:
    """A group for CPU collectives of another thread, not to be mixed up; None with one process."""
    if not is_enabled():
        return None
    return _cpu_group or cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


# --- Collectives: they return new tensors without gradient; with one process, copies ----------------------------------


def barrier() -> None:
    if is_enabled():
        dist.barrier(_group)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over processes: any shape -> the same shape."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over processes: any shape -> the same shape."""
    return all_reduce_sum(tensor) / world_size()


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum over processes: any shape -> the same shape."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, operation: Any) -> Tensor:
    result = tensor.detach().clone()
    if is_enabled():
        dist.all_reduce(result, op=operation, group=_group)
    return result


def all_gather_cat(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all processes by rank; equal shapes: (n, ...) -> (world_size * n, ...)."""
    mine = tensor.detach().contiguous()
    if not is_enabled():
        return mine.clone()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine, group=_group)
    return torch.cat(parts)


def all_gather_varied(tensor: Tensor) -> Tensor:
    """Concatenate by rank tensors whose first dimension may differ: (n_r, ...) -> (sum of n_r, ...)."""
    mine = tensor.detach()
    if not is_enabled():
        return mine.clone()
    sizes = all_gather_object(len(mine))  # on the host, which needs them
    padded = mine.new_zeros((max(sizes), *mine.shape[1:]))
    padded[: len(mine)] = mine
    parts = all_gather_cat(padded).split(max(sizes)) if max(sizes) else (padded,) * len(sizes)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def exchange(tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Send the first `sent[0]` rows to rank 0, the next `sent[1]` to rank 1, ...; returns the rows that are received.

    (sum of `sent`, ...) -> (sum of `received`, ...), by rank of the sender; `received[r]` is what rank r sends here.
    """
    mine = tensor.detach().contiguous()
    if not is_enabled():
        return mine.clone()
    result = mine.new_empty((sum(received), *mine.shape[1:]))
    dist.all_to_all_single(result, mine, list(received), list(sent), group=_group)
    return result


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Returns the tensor of rank `source` on all processes, which must pass tensors of equal shape and dtype."""
    result = tensor.detach().clone()
    if is_enabled():
        dist.broadcast(result, group=_group, group_src=source)
    return result


@contextmanager
def on_main(resource: AbstractContextManager[T]) -> Iterator[T | None]:
    """Enter a context on rank 0 only, None elsewhere; its OSError or ValueError on entry is raised on all ranks."""
    with ExitStack() as stack:
        failure, value = None, None
        if is_main():
            try:
                value = stack.enter_context(resource)
            except (OSError, ValueError) as error:
                failure = error
        if (reason := all_gather_object(failure)[0]) is not None:
            raise reason
        yield value


def from_main(compute: Callable[[], T]) -> T:
    """Compute on rank 0 and return the value on all processes; an OSError or ValueError is raised on all of them."""
    value: Any = None
    if is_main():
        try:
            value = compute()
        except (OSError, ValueError) as error:
            value = error
    value = all_gather_object(value)[0]
    if isinstance(value, Exception):
        raise value
    return cast(T, value)


def all_gather_object(value: Any) -> list[Any]:
    """Returns the values of all processes by rank; for small picklable values such as names and counts."""
    if not is_enabled():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group)
    return values
