"""Estimate of the memory and communication of one process by sharding strategy, from the networks alone.

The model of `parallelize` and `fully_shard`:

- A parameter is split along its first dimension over n processes and padded to equal shards. Weights of student and
  teacher, gradients and the two moments of AdamW are float32: 5 x 4 bytes per element of every shard. Without
  accumulation the gradients are absent while activations add up.
- A unit (a block or several; the rest of a backbone; a head) is gathered before it runs, in `param_dtype`: a receive
  buffer, then the whole parameters. If freed after use, the peak is the rest of the backbone, one unit and the buffer
  of the next. Otherwise units add up until the backward pass frees them one by one.
- The whole gradients of a unit, in `param_dtype`, are copied to a buffer in `reduce_dtype`, summed, and sharded. Each
  network keeps the buffer of its last unit until the backward pass ends, and with replicas those in which shards are
  summed, which count unless they are the gradients themselves or reuse the memory of freed weights.
- In a ring of n processes each sends (n - 1) / n of the total for an all-gather or reduce-scatter, and twice that for
  an all-reduce. Each micro-batch gathers the teacher once, the student once or, if freed in between, twice, and
  sums the gradients once; replicas of shards then sum theirs.

One process alone gathers nothing, but autocast keeps the student's weights in `param_dtype` until the backward pass.
Not counted: temporary memory of the optimizer and kernels, and buffers of communication libraries.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args, get_type_hints

import torch
from torch import Tensor, nn

from dinov2.config import DTYPES, Config, ModulePrecision, has_masks
from dinov2.loss.targets import LARGEST_PIECE
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.parallel import FREED_AFTER_FORWARD, local_tensors, num_shards, units_of_blocks
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, SSLMetaArch

STRATEGIES: tuple[str, ...] = get_args(get_type_hints(ModulePrecision)["sharding_strategy"])

FLOAT32 = 4  # bytes
COPIES_OF_STUDENT = 4  # Weights, gradients and two AdamW moments. The teacher has weights only


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process, the one with the most if parameters cannot be divided evenly."""

    state: float  # shards of weights, gradients and moments
    gradients: float  # those of the state that are absent when the backward pass begins
    gathered: float  # whole weights, at the peak
    reducing: float  # whole gradients before they are sharded, at the peak
    activations: float  # approximate
    sent: float  # per optimizer step
    sent_by_machine: float  # to other machines per optimizer step, by all processes of a machine

    @property
    def memory(self) -> float:
        """Peak memory in bytes: gradients grow while activations shrink."""
        return self.state + self.gathered + self.reducing + max(self.activations - self.gradients, 0)


def estimate(
    cfg: Config, model: SSLMetaArch, num_processes: int, processes_per_machine: int, job_size: int | None = None
) -> Estimate:
    """Estimate memory and communication of one process of a run of networks that may be on the meta device.

    `job_size` is the number of processes of all students together, by default `num_processes`.
    """
    per_machine, job_size = min(processes_per_machine, num_processes), job_size or num_processes
    networks = []
    for name, network in model.student.items():
        how = getattr(cfg.compute_precision.student, name), getattr(cfg.compute_precision.teacher, name)
        networks.append(_Network(sharding_units(network, cfg.student.block_chunks), *how, num_processes, per_machine))
    frozen = []
    for parts, processes in ((model.frozen_networks, num_processes), (model.shared_networks, job_size)):
        for name, network in (item for each in parts for item in each.items()):
            as_teacher = getattr(cfg.compute_precision.teacher, name)
            units = sharding_units(network, cfg.student.block_chunks)
            frozen.append(_Network(units, as_teacher, as_teacher, processes, min(processes_per_machine, processes)))
    steps = cfg.train.accumulate_steps
    shards = sum(network.shard for network in networks) * FLOAT32
    tokens = _shared_tokens(cfg, model)
    return Estimate(
        state=shards * (COPIES_OF_STUDENT + 1) + sum(network.shard for network in frozen) * FLOAT32,
        gradients=shards if steps == 1 else 0,
        gathered=max(_gathered(networks), *(network.passing(network.teacher_bytes) for network in frozen), 0),
        reducing=_reducing(networks, steps),
        activations=_activations(cfg, model) + tokens,
        sent=steps * sum(network.sent_around_shards + network.sent_around_replicas for network in networks)
        + steps * sum(network.sent_to_gather for network in frozen)
        + tokens * (1 - num_processes / job_size),
        sent_by_machine=steps * sum(network.sent_by_machine for network in networks),
    )


def allocated_bytes(model: SSLMetaArch, optimizer: torch.optim.Optimizer) -> int:
    """Measured bytes of weights, gradients and moments after a step: the `state` of an `Estimate`."""
    student = list(model.student.parameters())
    gradients = [param.grad for param in student if param.grad is not None]
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    tensors = local_tensors([*student, *model.teacher.parameters(), *gradients, *moments])
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sharding_units(network: nn.Module, block_chunks: int) -> list[list[Tensor]]:
    """The parameters that `parallelize` gathers and frees together: those outside of blocks, then block by block."""
    units: list[list[Tensor]] = [
        [param for block in unit for param in block.parameters()] for unit in units_of_blocks(network, block_chunks)
    ]
    in_blocks = {id(param) for unit in units for param in unit}
    return [[param for param in network.parameters() if id(param) not in in_blocks], *units]


# --- Weights and gradients -------------------------------------------------------------------------------------------


class _Network:
    """One network of the student, its teacher, and their sharding."""

    def __init__(
        self,
        units: Iterable[Iterable[Tensor]],
        student: ModulePrecision,
        teacher: ModulePrecision,
        num_processes: int,
        per_machine: int,
    ) -> None:
        strategy = student.sharding_strategy
        self.num_shards = num_shards(strategy, num_processes, per_machine)
        self.alone = num_processes == 1
        self.machines = math.ceil(num_processes / per_machine)
        self.replicas = num_processes // self.num_shards
        self.units = [sum(_shard_numel(param, self.num_shards) for param in unit) * self.num_shards for unit in units]
        self.shard = sum(self.units) // self.num_shards
        self.kept = self.alone or strategy not in FREED_AFTER_FORWARD
        self.param_bytes = _itemsize(student.mixed_precision.param_dtype)
        self.teacher_bytes = _itemsize(teacher.mixed_precision.param_dtype)
        self.reduce_bytes = _itemsize(student.mixed_precision.reduce_dtype)

    @property
    def all_gathered(self) -> int:
        """Bytes of the student's weights if they are kept."""
        if self.alone and self.param_bytes == FLOAT32:
            return 0  # computes with the parameters themselves
        return sum(self.units) * self.param_bytes

    def passing(self, itemsize: int) -> int:
        """Peak bytes of weights that are freed after use: the rest, a unit and the buffer of the next."""
        if self.alone:
            return 0  # one matrix at a time
        rest, block = self.units[0], max(self.units[1:], default=0)
        elements = rest + block if self.num_shards == 1 else rest + max(rest, 2 * block)
        return elements * itemsize

    @property
    def sent_around_shards(self) -> float:
        """Bytes sent per process and micro-batch among the shards of a copy: weights and gradients."""
        gathers = (1 if self.kept else 2) * self.param_bytes + self.teacher_bytes
        return (self.num_shards - 1) * self.shard * (gathers + self.reduce_bytes)

    @property
    def sent_to_gather(self) -> float:
        """Bytes sent per process and micro-batch for the weights of a forward pass without gradients."""
        return (self.num_shards - 1) * self.shard * self.teacher_bytes

    @property
    def sent_around_replicas(self) -> float:
        """Bytes sent per process and micro-batch among replicas of a shard: gradients."""
        return 2 * (self.replicas - 1) / self.replicas * self.shard * self.reduce_bytes

    @property
    def sent_by_machine(self) -> float:
        """Bytes per micro-batch sent to other machines. A ring over all machines leaves each of them once."""
        if self.machines == 1:
            return 0.0
        rings_of_shards = 1 if self.replicas == 1 else 0  # else they stay within machines
        return rings_of_shards * self.sent_around_shards + self.num_shards * self.sent_around_replicas


def _gathered(networks: Sequence[_Network]) -> float:
    """Peak bytes of gathered weights: teacher and student, and their networks, alternate except for kept weights."""
    teacher = max(network.passing(network.teacher_bytes) for network in networks)
    kept = sum(network.all_gathered for network in networks if network.kept)
    return max(teacher, kept + max((n.passing(n.param_bytes) for n in networks if not n.kept), default=0))


def _reducing(networks: Sequence[_Network], accumulate_steps: int) -> float:
    """Peak bytes of whole gradients: those of the largest unit, and buffers of each network."""
    if any(network.alone for network in networks):
        return 0.0
    gradients = max(max(network.units) * network.param_bytes for network in networks)
    buffers = sum(max(network.units) * network.reduce_bytes for network in networks)
    of_replicas = sum(
        network.shard * network.reduce_bytes
        for network in networks
        if network.replicas > 1 and not network.kept and (network.reduce_bytes != FLOAT32 or accumulate_steps > 1)
    )
    return gradients + buffers + of_replicas


def _shard_numel(param: Tensor, num_shards: int) -> int:
    """Elements of the largest shard, to which the others are padded."""
    return math.ceil(param.shape[0] / num_shards) * math.prod(param.shape[1:])


def _itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize


# --- Activations -----------------------------------------------------------------------------------------------------


def saved_in_block(block: nn.Module, value_bytes: int, rate: float, checkpointing: str) -> tuple[int, int]:
    """Bytes kept for the backward pass of a block: (for each token, for each token that stochastic depth keeps).

    On CUDA with autocast: norms compute in float32 and keep their input, everything else is in `value_bytes`, and so
    are the tokens between blocks if there is stochastic depth.

    Args:
        block: A block of a vision transformer; may be on the meta device.
        value_bytes: Bytes of a number in `param_dtype`.
        rate: Rate of stochastic depth.
        checkpointing: Value of `train.activation_checkpointing`.
    """
    parts = cast(Any, block)
    width, mlp = parts.norm1.weight.numel(), parts.mlp
    hidden = 2 * mlp.w3.in_features if hasattr(mlp, "w12") else mlp.fc1.out_features if hasattr(mlp, "fc1") else 0
    stream_bytes = value_bytes if rate > 0 else FLOAT32
    branches = 2 * width * stream_bytes  # outputs of attention and MLP, before LayerScale
    products = 4 * width + hidden  # qkv, attention, hidden layer
    if checkpointing == "none":  # inputs and outputs of the norms; the hidden layer after its activation
        return 0, 2 * width * (stream_bytes + value_bytes) + (products + hidden) * value_bytes + branches
    selective = (products + 2 * width) * value_bytes
    return width * stream_bytes, selective if checkpointing == "selective" else 0


def _activations(cfg: Config, model: SSLMetaArch) -> float:
    """Bytes for the backward pass of a micro-batch, when it begins, and the targets of all micro-batches of a step."""
    arch, crops, masked = cfg.student, cfg.crops, masked_patches_per_image(cfg)
    blocks, batch_size = list(model.student_backbone.blocks), cfg.train.batch_size_per_gpu
    value_bytes = _itemsize(cfg.compute_precision.student.backbone.mixed_precision.param_dtype)
    extra = 1 + arch.num_register_tokens
    tokens = NUM_GLOBAL_CROPS * ((crops.global_crops_size // arch.patch_size) ** 2 + extra)
    tokens += crops.local_crops_number * ((crops.local_crops_size // arch.patch_size) ** 2 + extra)
    grams = 0
    if cfg.gram.loss_weight > 0:  # similarities of all pairs of patches, theirs, their difference and its gradient
        grams = NUM_GLOBAL_CROPS * FLOAT32 * 4 * (crops.global_crops_size // arch.patch_size) ** 4
        grams += 2 * 3 * NUM_GLOBAL_CROPS * (cfg.gram.crops_scale * crops.global_crops_size) ** 2 * value_bytes
    pixels = NUM_GLOBAL_CROPS * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2
    of_all, of_kept = saved_in_block(blocks[0], value_bytes, arch.drop_path_rate, cfg.train.activation_checkpointing)
    per_token = len(blocks) * (of_all + of_kept * (1 - arch.drop_path_rate))
    batches = 2 * 3 * pixels * value_bytes  # this one, and the next one of the loader
    rows = (  # scores: rows of the student, rows of the teacher, prototypes
        (NUM_GLOBAL_CROPS + crops.local_crops_number, NUM_GLOBAL_CROPS, cfg.dino.head_n_prototypes),
        (masked, masked, (cfg.ibot if cfg.ibot.separate_head else cfg.dino).head_n_prototypes),
    )
    targets = FLOAT32 * cfg.train.accumulate_steps
    scores = sum((student * 2 * value_bytes + teacher * targets) * width for student, teacher, width in rows)
    largest = batch_size * max(student * width for student, _, width in rows)
    pieces = 2 * FLOAT32 * min(largest, LARGEST_PIECE)  # of scores and their softmax in float32
    return batch_size * (tokens * per_token + batches + scores + grams) + pieces


def _shared_tokens(cfg: Config, model: SSLMetaArch) -> float:
    """Bytes of the tokens of a teacher that several students share, for the images of a step of one process."""
    if not model.shared_networks:
        return 0.0
    backbone = cast(DinoVisionTransformer, model.shared_networks[0]["backbone"])
    per_crop = 1 + (cfg.crops.global_crops_size // cfg.student.patch_size) ** 2
    images = cfg.train.batch_size_per_gpu * cfg.train.accumulate_steps
    itemsize = _itemsize(cfg.compute_precision.teacher.dino_head.mixed_precision.param_dtype)
    return float(images * NUM_GLOBAL_CROPS * per_crop * backbone.embed_dim * itemsize)


def masked_patches_per_image(cfg: Config) -> float:
    """Mean number of patches in all global crops of an image that the patch-level loss takes."""
    if cfg.ibot.loss_weight <= 0:
        return 0.0
    patches = (cfg.crops.global_crops_size // cfg.student.patch_size) ** 2
    if not has_masks(cfg):  # all patches, see `dinov2.train.stages.distillation`
        return float(NUM_GLOBAL_CROPS * patches)
    return NUM_GLOBAL_CROPS * patches * cfg.ibot.mask_sample_probability * sum(cfg.ibot.mask_ratio_min_max) / 2
