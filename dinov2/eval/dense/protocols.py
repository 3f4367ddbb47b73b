"""The published protocols of segmentation and depth by name: every setting that moves a score.

Sources: the configurations that the authors of DINOv2 published beside their heads, Table 10 and 11 of arXiv
2304.07193, and Appendix D of arXiv 2508.10104 for DINOv3. Sizes are in pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

PATCH_OF_SIZES = 16  # DINOv3: the sizes of its protocols are for patches of 16 pixels, all models see as many tokens


@dataclass(frozen=True)
class Training:
    """How a head is trained on frozen tokens, with AdamW; iterations count batches of all processes together."""

    iterations: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup: int  # iterations in which a factor grows linearly from `warmup_ratio` to 1
    warmup_ratio: float
    decay: Literal["linear", "cosine"]  # of the other factor, from 1 to `final_ratio`
    decay_from_start: bool = True  # whether it falls during the warm-up as well, as in MMCV, or only afterwards
    final_ratio: float = 0.0
    batch_size: int = 16
    clip_norm: float | None = None
    first_beta_range: tuple[float, float] | None = None  # of AdamW's first beta, which falls and rises (one cycle)
    lowest_beta_at: float = 0.3  # share of the iterations; MMCV's default, which the authors' configurations leave

    def lr_factor(self, step: int) -> float:
        """The learning rate of iteration `step`, from 0, relative to `learning_rate`."""
        grown = self.warmup_ratio + (1 - self.warmup_ratio) * min(step / max(self.warmup, 1), 1)
        first = 0 if self.decay_from_start else self.warmup
        progress = max(step - first, 0) / max(self.iterations - first, 1)
        share = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return grown * (self.final_ratio + (1 - self.final_ratio) * share)

    def first_beta(self, step: int) -> float:
        """The first beta of AdamW at iteration `step`."""
        if self.first_beta_range is None:
            return self.betas[0]
        low, high = self.first_beta_range
        lowest = self.lowest_beta_at * self.iterations
        progress = step / lowest if step < lowest else (self.iterations - step) / (self.iterations - lowest)
        return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))

    def for_iterations(self, iterations: int) -> "Training":
        """The same training compressed to another length, its warm-up in proportion."""
        return replace(self, iterations=iterations, warmup=round(self.warmup * iterations / self.iterations))


@dataclass(frozen=True)
class SegmentationProtocol:
    """Linear segmentation: a batch norm and a 1x1 convolution on the patch tokens of the last blocks."""

    name: str
    source: str
    last_blocks: int
    short_side: int  # to which images are resized, ratio kept, times `train_scale` in training
    train_scale: tuple[float, float]
    crop_size: int  # of training, and the side of the sliding window
    stride: int  # of the sliding window
    training: Training
    dropout: float = 0.0
    test_scales: tuple[float, ...] = (1.0,)  # of `short_side`
    test_mirror: bool = False
    small_windows: Literal["whole", "squares"] = "whole"  # for images below the window in both directions
    eval_period: int = 10_000
    keep: Literal["last", "best"] = "last"  # the head that is scored at the end; best: chosen on the validation set
    max_class_share: float = 0.75  # of a training crop, tried ten times

    def scaled(self, crop_size: int) -> "SegmentationProtocol":
        """The same with another crop size, and short side and stride in proportion."""
        ratio = crop_size / self.crop_size
        short_side, stride = round(self.short_side * ratio), max(1, round(self.stride * ratio))
        return replace(self, crop_size=crop_size, short_side=short_side, stride=stride)


@dataclass(frozen=True)
class DepthProtocol:
    """Linear depth: bins between the smallest and largest depth, predicted by a 1x1 convolution."""

    name: str
    source: str
    layers: int  # 4, spread over the depth of the backbone, or 1, the last
    training: Training
    final_norm: bool  # whether tokens pass the last norm of the backbone
    class_token: bool  # whether it is concatenated to every patch token
    upsample: int  # of the token grid before the convolution
    batch_norm: bool
    brightness: tuple[float, float] = (0.75, 1.25)
    rotation: float = 2.5  # degrees, with probability 0.5
    gradient_loss: float = 0.0  # weight beside SigLoss; the published one is 0 as its trainings call it
    mirror: bool = True  # average with the prediction of the mirror image in testing
    eval_period: int = 1_600


@dataclass(frozen=True)
class DepthData:
    """What a protocol prescribes for one dataset: depths in meters, crops in pixels (height, width)."""

    min_depth: float
    max_depth: float
    mask: Literal["nyu_eigen", "kitti_garg", "kitti_eigen", "none"]  # the pixels that are scored
    train_crop: tuple[int, int]
    train_box: Literal["nyu", "kitti", "none"]
    test_box: Literal["kitti", "none"] = "none"
    test_size: tuple[int, int] | None = None  # (height, width) of the input, ratio not kept


_DINOV2_SEGMENTATION = Training(
    iterations=40_000, learning_rate=1e-3, weight_decay=1e-4, betas=(0.9, 0.999), warmup=1_500, warmup_ratio=1e-6,
    decay="linear",
)  # fmt: skip

SEGMENTATION: dict[str, SegmentationProtocol] = {
    "dinov2": SegmentationProtocol(
        name="dinov2",
        source="DINOv2 linear (arXiv 2304.07193, Table 10 'lin.', and the configurations beside the released heads)",
        last_blocks=1,
        short_side=512,
        train_scale=(0.5, 2.0),
        crop_size=512,
        stride=341,
        training=_DINOV2_SEGMENTATION,
    ),
    "dinov2_ms": SegmentationProtocol(
        name="dinov2_ms",
        source="DINOv2 multi-scale (arXiv 2304.07193, Table 10 '+ms', and the configurations beside the heads)",
        last_blocks=4,
        short_side=640,
        train_scale=(1.0, 3.0),
        crop_size=640,
        stride=320,
        training=_DINOV2_SEGMENTATION,
        test_scales=(1.0, 1.32, 1.73, 2.28, 3.0),
        test_mirror=True,
    ),
    "dinov3": SegmentationProtocol(
        name="dinov3",
        source="DINOv3 linear (arXiv 2508.10104, Appendix D.1, one learning rate and weight decay)",
        last_blocks=1,
        short_side=512,
        train_scale=(0.5, 2.0),
        crop_size=512,
        stride=341,
        training=replace(_DINOV2_SEGMENTATION, weight_decay=1e-3, decay="cosine", decay_from_start=False),
        dropout=0.1,
        small_windows="squares",
        eval_period=5_000,
        keep="best",
    ),
}

PROBE_PROTOCOL = "capi"  # patch k-NN and logistic regression, see `probes`

_DINOV2_DEPTH = Training(
    iterations=38_400, learning_rate=1e-4, weight_decay=0.01, betas=(0.9, 0.999), warmup=12_800, warmup_ratio=1e-3,
    decay="cosine", final_ratio=1e-8, clip_norm=35.0, first_beta_range=(0.85, 0.95),
)  # fmt: skip

DEPTH: dict[str, DepthProtocol] = {
    "dinov2": DepthProtocol(
        name="dinov2",
        source="DINOv2 linear (arXiv 2304.07193, Table 11, and the configurations beside the released heads)",
        layers=4,
        training=_DINOV2_DEPTH,
        final_norm=False,
        class_token=True,
        upsample=4,
        batch_norm=False,
    ),
    "dinov3": DepthProtocol(
        name="dinov3",
        source="DINOv3 linear (arXiv 2508.10104, Appendix D.2)",
        layers=1,
        training=replace(
            _DINOV2_DEPTH, learning_rate=3e-4, weight_decay=1e-4, betas=(0.9, 0.99), decay_from_start=False,
            final_ratio=1e-3, lowest_beta_at=1 / 3,
        ),
        final_norm=True,
        class_token=False,
        upsample=1,
        batch_norm=True,
    ),
}  # fmt: skip

DEPTH_DATA: dict[str, DepthData] = {
    "NYUv2": DepthData(1e-3, 10.0, "nyu_eigen", (416, 544), "nyu"),
    "KITTIDepth": DepthData(1e-3, 80.0, "kitti_garg", (352, 704), "kitti", test_box="kitti"),
    "SUNRGBD": DepthData(1e-3, 10.0, "none", (416, 544), "none", test_size=(480, 640)),
}
"""By the name of the dataset; other datasets are scored whole, in the range that the command line gives."""


def adapted(protocol: SegmentationProtocol, patch_size: int) -> SegmentationProtocol:
    """The protocol for a patch size: DINOv3 keeps the number of tokens, DINOv2 the size in pixels."""
    if protocol.name != "dinov3" or patch_size == PATCH_OF_SIZES:
        return protocol
    return protocol.scaled(protocol.crop_size * patch_size // PATCH_OF_SIZES)


FOLLOW = ("short_side", "stride", "warmup", "eval_period")  # the crop size and the iterations, in proportion


def changes(protocol: Any, published: Any) -> dict[str, Any]:
    """The settings in which a protocol differs from the published one, without those that follow: {name: value}."""
    before, after = _flat(asdict(published)), _flat(asdict(protocol))
    return {name: value for name, value in after.items() if value != before.get(name) and name not in FOLLOW}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: value for key, value in settings.items() if isinstance(value, dict)}
    return {key: value for key, value in settings.items() if key not in nested} | {
        name: value for part in nested.values() for name, value in part.items()
    }


def describe(protocol: SegmentationProtocol | DepthProtocol, published: SegmentationProtocol | DepthProtocol) -> str:
    """ "dinov2" or "dinov2 with crop_size=28, iterations=200": what stands beside every score."""
    changed = ", ".join(f"{name}={value}" for name, value in changes(protocol, published).items())
    return f"{protocol.name} with {changed}" if changed else protocol.name


def with_flags(protocol: Any, args: Any, world_size: int) -> Any:
    """A protocol with the changes of the command line: iterations, batch size, learning rate, period of validations."""
    training, period = protocol.training, protocol.eval_period
    if args.iterations is not None:
        period = max(1, round(period * args.iterations / training.iterations))
        training = training.for_iterations(args.iterations)
    if args.batch_size is not None:
        training = replace(training, batch_size=args.batch_size * world_size)
    if args.learning_rate is not None:
        training = replace(training, learning_rate=args.learning_rate)
    return replace(protocol, training=training, eval_period=args.eval_period_iterations or period)
