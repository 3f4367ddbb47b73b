"""The teacher of several students: its backbone runs once for each image of a step, on any process of the job.

The students have the same images in each step, divided over the processes of each in its own way. So for every image
there is one process of each student that has it. One of them computes the tokens of the teacher, and sends them to the
others; heads and targets are then those of each student. All of it depends on the numbers of processes only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from dinov2 import distributed
from dinov2.config import DTYPES, Config
from dinov2.data.collate import Batch
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS
from dinov2.train.stages.distillation import DistillationArch

_THUMBNAIL = 4  # pixels a side, of crops that are compared between processes
_TOLERANCE = 0.05  # largest difference of their normalized values


class Division(NamedTuple):
    """How the images of a step are divided over the processes of a student, in blocks of consecutive images."""

    num_processes: int
    accumulate_steps: int
    batch_size: int  # images of a process in a micro-batch

    def holder(self, image: int) -> tuple[int, int]:
        """The process that has an image of the step, and the number of the image there."""
        block, row = divmod(image, self.batch_size)
        micro_batch, process = divmod(block, self.num_processes)
        return process, micro_batch * self.batch_size + row


class Exchange(NamedTuple):
    """What a process computes, sends and receives in each step; its images are numbered from 0 on."""

    computed: Tensor  # numbers of the images whose tokens it computes, on all processes equally many: some repeat one
    outgoing: Tensor  # rows of `computed` for process 0 of the job, then for process 1, ...
    sent: list[int]  # how many of them for each process
    received: list[int]  # how many from each process
    order: Tensor  # rows of what is received, by number of the image

    def to(self, device: torch.device) -> "Exchange":
        computed, outgoing, order = (index.to(device) for index in (self.computed, self.outgoing, self.order))
        return self._replace(computed=computed, outgoing=outgoing, order=order)


def plan_exchange(divisions: Sequence[Division], rank: int) -> Exchange:
    """Plan the exchange of a process of the job; a ValueError if the students have different numbers of images."""
    numbers = {d.num_processes * d.accumulate_steps * d.batch_size for d in divisions}
    if len(numbers) != 1:
        raise ValueError(f"students have different numbers of images in a step: {sorted(numbers)}")
    first = [sum(d.num_processes for d in divisions[:number]) for number in range(len(divisions) + 1)]
    # Who has an image: a process of each student, and the number of the image there.
    holders = [
        {
            offset + process: number
            for offset, (process, number) in zip(first, (d.holder(i) for d in divisions), strict=False)
        }
        for i in range(numbers.pop())
    ]
    owners = _evenly(holders, first[-1])
    mine = [image for image, owner in enumerate(owners) if owner == rank]
    computed = [holders[image][rank] for image in mine]
    missing = max(map(owners.count, range(first[-1]))) - len(mine)
    outgoing = [[row for row, image in enumerate(mine) if other in holders[image]] for other in range(first[-1])]
    held = sorted((owners[image], image, places[rank]) for image, places in enumerate(holders) if rank in places)
    return Exchange(
        computed=torch.tensor(computed + missing * (computed[:1] or [0])),
        outgoing=torch.tensor([row for rows in outgoing for row in rows], dtype=torch.int64),
        sent=[len(rows) for rows in outgoing],
        received=[sum(owner == other for owner, _, _ in held) for other in range(first[-1])],
        order=torch.tensor([number for _, _, number in held]).argsort(),
    )


def _evenly(holders: Sequence[Mapping[int, int]], num_processes: int) -> list[int]:
    """Choose one of the holders of each image, so that all have about as many: images move until none has two more."""
    owners = [next(iter(ranks)) for ranks in holders]
    work = [owners.count(rank) for rank in range(num_processes)]
    moved = True
    while moved:
        moved = False
        for image, ranks in enumerate(holders):
            least = min(ranks, key=lambda rank: work[rank])
            if work[owners[image]] > work[least] + 1:
                work[owners[image]] -= 1
                work[least] += 1
                owners[image], moved = least, True
    return owners


class SharedTeacherArch(DistillationArch):
    """One of several students: the frozen backbone is sharded over the whole job, the frozen heads as the student's."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self._exchange: Exchange | None = None
        self._chunk = 0

    @property
    def frozen_networks(self) -> list[nn.ModuleDict]:
        return [nn.ModuleDict({name: head for name, head in self.target_networks.items() if name != "backbone"})]

    @property
    def shared_networks(self) -> list[nn.ModuleDict]:
        return [nn.ModuleDict({"backbone": self.target_networks["backbone"]})]

    @property
    def has_frozen_teacher(self) -> bool:
        """False, as the health panel of one student cannot run the teacher alone: its own run has been measured."""
        return False

    def load_frozen(self, *, resuming: bool = False) -> None:
        """Load the frozen teacher, which must be the same for all students; a ValueError if it is not."""
        super().load_frozen(resuming=resuming)
        with distributed.whole_job():
            teachers = distributed.all_gather_object((str(self.source), self._loaded.tolist()))
        if others := [name for name, digest in teachers if digest != teachers[0][1]]:
            raise ValueError(
                f"distillation.teacher: students have begun with different teachers, {teachers[0][0]} and {others[0]}"
            )

    def _teacher_tokens(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        crops = torch.cat([_by_image(self._target_crops(batch.global_crops)) for batch in batches])
        if self._exchange is None:
            self._exchange = self._plan().to(crops.device)
            self._check_same_images(self._exchange, crops)
        exchange = self._exchange
        tokens = torch.cat([self._tokens(crops[rows]) for rows in exchange.computed.split(self._chunk)])
        received = _exchanged(exchange, tokens)
        for part in received.split([len(batch.global_crops) // NUM_GLOBAL_CROPS for batch in batches]):
            by_crop = part.transpose(0, 1).flatten(0, 1)
            yield by_crop[:, 0], by_crop[:, 1:].flatten(0, 1)

    def _plan(self) -> Exchange:
        """Agree with all processes on who computes what."""
        train = self.cfg.train
        own = Division(distributed.world_size(), train.accumulate_steps, train.batch_size_per_gpu)
        is_first = distributed.is_main()
        with distributed.whole_job():
            all_divisions, rank = distributed.all_gather_object((is_first, own)), distributed.rank()
        divisions = [division for is_first, division in all_divisions if is_first]  # one of each student
        self._chunk = min(division.batch_size for division in divisions)
        return plan_exchange(divisions, rank)

    def _tokens(self, crops: Tensor) -> Tensor:
        """Class and patch tokens of images (n, 2, C, G, G) by the teacher, (n, 2, 1 + N, D), of its heads' type."""
        with self._precision("teacher", "backbone") as dtype:
            stacked = crops.transpose(0, 1).flatten(0, 1).to(dtype)
            [features] = self.target_networks["backbone"]([stacked], is_training=True)
        tokens = torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]], dim=1)
        precision, names = self.cfg.compute_precision.teacher, self.target_networks.keys() - {"backbone"}
        kinds = {getattr(precision, name).mixed_precision.param_dtype for name in names}
        return _by_image(tokens.to(DTYPES[kinds.pop()]) if len(kinds) == 1 else tokens)

    def _check_same_images(self, exchange: Exchange, crops: Tensor) -> None:
        """Raise a ValueError if another process would compute tokens of other images than those of this one."""
        small = adaptive_avg_pool2d(crops.flatten(0, 1).float(), _THUMBNAIL).unflatten(0, crops.shape[:2])
        theirs = _exchanged(exchange, small[exchange.computed])
        difference = (theirs - small).abs().amax().nan_to_num(torch.inf)
        with distributed.whole_job():
            largest = distributed.all_reduce_max(difference).item()
        if largest > _TOLERANCE:
            raise ValueError(
                f"distillation.students: the students do not have the same images in a step (crops differ by "
                f"{largest:.3g}): was a folder of {self.cfg.train.dataset_path} changed while the run started?"
            )


def _by_image(rows: Tensor) -> Tensor:
    """Rows of crops, crop by crop, to (images, 2, ...)."""
    return rows.unflatten(0, (NUM_GLOBAL_CROPS, -1)).transpose(0, 1)


def _exchanged(exchange: Exchange, computed: Tensor) -> Tensor:
    """Rows of the images that this process has, from rows of those that the processes of the job have computed."""
    with distributed.whole_job():
        arrived = distributed.exchange(computed[exchange.outgoing], exchange.sent, exchange.received)
    return arrived[exchange.order]
