"""Distillation (paper, section 5): a student learns the targets of a larger, frozen teacher.

The objective is that of pretraining, but no patch is masked, and the patch-level loss is over all patches of the global
crops. The moving average of the student takes no part in training; it is the result, and is called teacher in the
outputs of the run like every average.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dinov2.config import Config, of_run
from dinov2.data.collate import Batch
from dinov2.models.weights import check_numbers, read_state_dict
from dinov2.train.ssl_meta_arch import Losses, Predictions, SSLMetaArch, Targets, build_networks
from dinov2.train.start.source_runs import SAME_PIXELS, check_fits, naming_key, weights_of_run

_EQUAL = SAME_PIXELS | {  # settings that frozen teacher and student share, and why
    "dino.head_n_prototypes": "the student predicts the prototypes of the teacher",
    "ibot.separate_head": "each head of the student has one of the teacher as its model",
}


class DistillationArch(SSLMetaArch):
    """Student, its moving average `teacher`, and the frozen networks of `distillation.teacher`, which give the targets.

    Raises:
        ValueError: The run that the teacher comes from does not fit; names the setting and both values.
    """

    frozen_digest: Tensor  # (16,) uint8, of the frozen weights that the run has begun with

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.source, self.source_cfg = _source_of(cfg.distillation.teacher)
        self._check()
        # Outside of the registered modules, so that checkpoints do not contain them again and again.
        self._frozen = [build_networks(self.source_cfg).eval().requires_grad_(False)]
        self.register_buffer("frozen_digest", torch.zeros(16, dtype=torch.uint8))

    def _check(self) -> None:
        equal = dict(_EQUAL)
        if self.separate_head:
            equal["ibot.head_n_prototypes"] = equal["dino.head_n_prototypes"]
        if not self.use_ibot:
            del equal["ibot.separate_head"]
        check_fits(f"distillation.teacher={self.cfg.distillation.teacher}", self.source_cfg, self.cfg, equal)

    def stage_facts(self) -> dict[str, str]:
        backbone, student = self.target_networks["backbone"], self.cfg.student
        number = sum(param.numel() for param in backbone.parameters())
        side = self.cfg.crops.global_crops_size // student.patch_size * self.source_cfg.student.patch_size
        trained = self.source_cfg.crops.global_crops_size
        crops = f"global crops of {side} pixels" + ("" if side == trained else f" (it was trained on {trained})")
        return {"distills": f"{self.source}: backbone of {number:,} parameters, {crops}"}

    @property
    def target_networks(self) -> nn.ModuleDict:
        return self._frozen[0]

    @property
    def frozen_networks(self) -> list[nn.ModuleDict]:
        return self._frozen

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]  # as torch's; moves and casts all networks
        for networks in self._frozen:
            networks._apply(fn)
        return super()._apply(fn, recurse)

    def load_frozen(self, *, resuming: bool = False) -> None:
        """Load the frozen teacher, and the centers of its run as the initial ones; a ValueError if they do not fit."""
        state, centers = _read_source(self.source)
        check_numbers(state, str(self.source))
        device = self.dino_loss.center.device
        try:
            self.target_networks.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"distillation.teacher: {self.source} does not hold backbone and heads: {error}"
            ) from error
        self.target_networks.eval().requires_grad_(False)
        if device.type != "meta":
            self.target_networks.to(device)
        for loss, name in ((self.dino_loss, "dino_loss.center"), (self.ibot_patch_loss, "ibot_patch_loss.center")):
            if name in centers:
                loss.center.copy_(centers[name])
        self._loaded = _digest(state)
        self.frozen_digest.copy_(self._loaded)

    def check_frozen(self) -> None:
        if not torch.equal(self.frozen_digest.cpu(), self._loaded):
            raise ValueError(
                f"distillation.teacher={self.cfg.distillation.teacher}: {self.source} holds other weights than those "
                "that the run has begun with; name the same, as OUT:STEP, or start anew with --no-resume"
            )

    def predictions(self, batch: Batch) -> Predictions:
        return super().predictions(_all_patches(batch))

    def losses(self, batch: Batch, targets: Targets, predictions: Predictions) -> Losses:
        return super().losses(_all_patches(batch), targets, predictions)

    def _teacher_tokens(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        return super()._teacher_tokens([_all_patches(batch) for batch in batches])

    def _target_crops(self, crops: Tensor) -> Tensor:
        """Global crops, resized if the teacher has patches of another size, so that it has as many of them."""
        side = self.cfg.crops.global_crops_size // self.cfg.student.patch_size * self.source_cfg.student.patch_size
        if side == crops.shape[-1]:
            return crops
        return interpolate(crops.float(), (side, side), mode="bicubic", antialias=True).to(crops.dtype)

    def _student_masks(self, batch: Batch) -> None:
        return None


def _source_of(name: str) -> tuple[Path, Config]:
    """The weights of a run, and its configuration; errors name the key."""
    with naming_key("distillation.teacher"):
        source = weights_of_run(name)
        cfg = of_run(source)
    if cfg is None:
        raise FileNotFoundError(f"distillation.teacher: there is no config.yaml above {source}")
    return source, cfg


def _all_patches(batch: Batch) -> Batch:
    """The batch with all patches of the global crops as those of the patch-level loss."""
    count = batch.masks.numel()
    return batch._replace(
        masks=torch.ones_like(batch.masks),
        mask_index=torch.arange(count, device=batch.masks.device),
        mask_weight=torch.full((count,), 1 / batch.masks.shape[1], device=batch.masks.device),
        upperbound=count,
    )


def _read_source(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Networks of the teacher of a checkpoint or exported teacher, and the centers of the former, by their names."""
    if not path.is_dir():
        return dict(read_state_dict(path)), {}
    from dinov2.train.checkpoint_files.tensors import read_tensors

    found = read_tensors(path, "model.")
    networks = {
        name.removeprefix("model.teacher."): value for name, value in found.items() if name.startswith("model.teacher.")
    }
    return networks, {name.removeprefix("model."): value for name, value in found.items() if name.endswith(".center")}


def _digest(state: dict[str, Tensor]) -> Tensor:
    """A hash of weights, (16,) uint8."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        digest.update(name.encode() + state[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
