"""Frozen features of a whole dataset.

Shapes: n images, B images in a batch, D feature width.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from dinov2 import distributed
from dinov2.data import DatasetWithEnumeratedTargets, SamplerType, make_data_loader
from dinov2.data.datasets.base import ImageDataset, label_table
from dinov2.data.images import BadImageError
from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.skip_unreadable import SkipUnreadable, collate_skipping_unreadable, skip_unreadable_batches
from dinov2.meters import MetricLogger
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger(__name__)

# Pixels per forward pass on a CPU. Activations then fit in memory that the process already has; allocating new pages in
# each block would take a sixth of the time of a ViT-S.
CPU_PIXELS = 8 * 224 * 224

MAX_BAD_SHARE = 0.01  # fraction of unreadable images; with more, results would be those of another dataset

AutocastContext = Callable[[], AbstractContextManager[object]]


class ModelWithNormalize(nn.Module):
    """The output of a model with L2-normalized rows: (B, D) float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return functional.normalize(self.model(images).float(), dim=1)


class ModelWithIntermediateLayers(nn.Module):
    """The tokens of the last blocks of a frozen backbone, after the final norm.

    The output is one pair per block, from shallow to deep: patch tokens (B, N, D) and class token (B, D).
    """

    def __init__(
        self, feature_model: DinoVisionTransformer, n_last_blocks: int, autocast_ctx: AutocastContext = nullcontext
    ) -> None:
        super().__init__()
        self.feature_model = feature_model
        feature_model.eval()
        self.n_last_blocks = n_last_blocks
        self.autocast_ctx = autocast_ctx

    @torch.no_grad()  # not inference mode: heads are trained on these tensors
    def forward(self, images: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        with self.autocast_ctx():
            tokens = self.feature_model.get_intermediate_layers(images, self.n_last_blocks, return_class_token=True)
        return cast(Sequence[tuple[Tensor, Tensor]], tokens)


class ModelWithPooledTokens(nn.Module):
    """The input of linear classifiers: (B, L, 2, D) float32, class token and mean patch token of each of L blocks."""

    def __init__(self, model: ModelWithIntermediateLayers) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        blocks = [torch.stack([class_token, patches.mean(dim=1)], dim=1) for patches, class_token in self.model(images)]
        return torch.stack(blocks, dim=1).float()


def tokens_of_blocks(pooled: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pooled tokens (B, L, 2, D) in the form of `ModelWithIntermediateLayers`, with their mean as the patch token."""
    return [(block[:, 1:], block[:, 0]) for block in pooled.unbind(dim=1)]


def autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast on the device of this process; no effect for float32."""
    return torch.autocast(distributed.device().type, dtype=dtype, enabled=dtype != torch.float32)


def run_model(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Compute the features (B, ...) of images (B, 3, H, W); on a CPU a few at a time, which is faster."""
    if images.device.type != "cpu":
        return model(images)
    at_once = max(CPU_PIXELS // (images.shape[-2] * images.shape[-1]), 1)
    return torch.cat([model(part) for part in images.split(at_once)])


def require_finite(features: Tensor, names: Callable[[int], str], model: nn.Module) -> None:
    """Raise a `ValueError` if the features (n, ...) of a batch of images by a model are not finite.

    It names the tensor of the weights that is not finite, else the first such image, by `names` (row -> description).
    """
    is_bad = ~features.isfinite().flatten(1).all(dim=1)
    if not is_bad.any():
        return
    backbone = next((module for module in model.modules() if isinstance(module, DinoVisionTransformer)), model)
    first = names(int(is_bad.int().argmax()))
    for name, weight in backbone.state_dict().items():
        if num_bad := int((~weight.isfinite()).sum()):
            raise ValueError(
                f"the weights of the model are damaged or have diverged: {num_bad} of the {weight.numel()} values of "
                f"{name} are NaN or infinite, and so are the features of {first}"
            )
    cause = "the weights, though finite, are too large" if is_bad.all() else "the image is unusual"
    if distributed.device().type != "cpu":
        cause += ", or half precision overflows (compute_precision.teacher.backbone.mixed_precision.param_dtype=fp32)"
    raise ValueError(
        f"the features of {first} are NaN or infinite, those of {int(is_bad.sum())} of {len(is_bad)} images that were "
        f"run together: {cause}"
    )


def extract_features(
    model: nn.Module,
    dataset: ImageDataset,
    batch_size: int,
    num_workers: int,
    gather_on_cpu: bool = False,
    *,
    autocast_dtype: torch.dtype = torch.float32,
    cache: FeatureCache | None = None,
    kind: str = "class_token",
) -> tuple[Tensor, Tensor]:
    """Run a backbone over a dataset, or read the result from the cache; each rank gets the whole result.

    Args:
        model: Images (B, 3, H, W) -> features (B, ...).
        dataset: Gives (image tensor, label); a label of None is replaced by the index of the image.
        batch_size: Images per batch and process; the ranks share the dataset.
        num_workers: Data loader workers per process.
        gather_on_cpu: Whether to keep the result in host memory.
        autocast_dtype: Precision of the model.
        cache: Where to look the features up, by `kind`, and to store them.
        kind: Name of the features of this `model` in the cache.

    Returns:
        Features (n, ...) float32 and labels (n,) int64 in the order of the dataset, without unreadable images, of which
        at most `MAX_BAD_SHARE` is allowed. Lists of labels are (n, maximum length), padded with -1.
    """
    device = torch.device("cpu") if gather_on_cpu else distributed.device()
    compute = partial(_run_over, model, dataset, batch_size, num_workers, device, autocast_dtype)
    features, labels = (cache or FeatureCache()).get(kind, dataset, compute)
    return features.to(device), labels.to(device)


@torch.inference_mode()
def _run_over(
    model: nn.Module,
    dataset: ImageDataset,
    batch_size: int,
    num_workers: int,
    target_device: torch.device,
    autocast_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Features and labels on `target_device`; other arguments as in `extract_features`."""
    device = distributed.device()
    all_labels = dataset.get_targets()
    width = all_labels.shape[1] if all_labels is not None and all_labels.ndim > 1 else None
    world_size = distributed.world_size()
    loader = make_data_loader(
        dataset=SkipUnreadable(DatasetWithEnumeratedTargets(dataset)),
        batch_size=batch_size,
        num_workers=num_workers,
        shuffle=False,
        sampler_type=SamplerType.DISTRIBUTED,
        drop_last=False,
        collate_fn=partial(collate_skipping_unreadable, collate=partial(collate_enumerated, width=width)),
        rank=distributed.rank(),
        world_size=world_size,
    )
    model.eval()
    features, labels, seen = torch.empty(0), torch.empty(0), torch.zeros(len(dataset), dtype=torch.bool)
    progress, batches = MetricLogger("  ", is_main=distributed.is_main()), skip_unreadable_batches(loader)
    logged = progress.log_every(batches, 10, "Features:", len(loader), batch_size=batch_size * world_size)
    for images, (index, targets) in logged:
        with autocast(autocast_dtype):
            output = run_model(model, images.to(device, non_blocking=True)).float()
        if not len(features):
            features = torch.zeros(len(dataset), *output.shape[1:], device=target_device)
            labels = torch.full((len(dataset), *targets.shape[1:]), -1, device=target_device)
        index = distributed.all_gather_varied(index)
        output, targets = (distributed.all_gather_varied(t.to(device)).to(target_device) for t in (output, targets))
        require_finite(output, partial(_describe, dataset, index), model)
        # By position: images that were dealt twice to fill up the last batches land in the same place.
        seen[index] = True
        rows = index.to(target_device)
        features[rows], labels[rows] = output, targets
    if seen.all():
        return features, labels
    _check_unreadable(dataset, (~seen).nonzero().flatten().tolist())
    kept = seen.to(target_device)
    return features[kept], labels[kept]


def _describe(dataset: ImageDataset, indices: Tensor, row: int) -> str:
    return dataset.describe(int(indices[row]))


def collate_enumerated(samples: Sequence[tuple[Tensor, tuple[int, Any]]], width: int | None = None) -> Any:
    """Collate to images (B, 3, H, W), indices (B,) and labels (B,) or (B, width), see `label_table`."""
    images, targets = zip(*samples, strict=True)
    indices, labels = zip(*targets, strict=True)
    table = torch.tensor(labels) if width is None else torch.from_numpy(label_table(labels, width))
    return default_collate(list(images)), (torch.tensor(indices), table)


def _check_unreadable(dataset: ImageDataset, unreadable: Sequence[int]) -> None:
    """Warn of unreadable images; raise a `ValueError` if there are too many."""
    reason = ""
    try:
        dataset.get_image(unreadable[0])
    except BadImageError as error:
        reason = f"; the first: {error}"
    if len(unreadable) > MAX_BAD_SHARE * len(dataset):
        raise ValueError(
            f"{len(unreadable)} of {len(dataset)} images cannot be read, more than the {MAX_BAD_SHARE:.0%} that may be "
            f"omitted: remove or repair them{reason}"
        )
    logger.warning("%d of %d images cannot be read and are omitted%s", len(unreadable), len(dataset), reason)
