"""Features of images in one call: `dinov2.extract_features`, in memory or into a folder."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, overload

from PIL import Image
from torch import Tensor

from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.extract.extraction import Extraction, check_unreadable
from dinov2.eval.extract.files import ImageFeatures, gather_features
from dinov2.eval.extract.folder import FeatureFolder, check_folder, write_features
from dinov2.eval.extract.frozen_backbone import FrozenBackbone, load_frozen_backbone
from dinov2.eval.extract.preprocessing import check_sizes, make_preprocessing, no_preprocessing
from dinov2.eval.extract.settings import settings_of, weights_facts
from dinov2.eval.extract.sources import MemoryImages, check_sources, open_sources
from dinov2.eval.extract.tokens import ARRAY_NAMES, check_names, choose_tokens
from dinov2.flags import extract as flags
from dinov2.models.vision_transformer import DinoVisionTransformer

MOST_SOURCES = 10  # that are recorded; the digest of the names is that of all images

Images = str | Path | Image.Image | Tensor | Sequence[str | Path] | Sequence[Image.Image]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is extracted and how, as by the flags of `python -m dinov2.eval.extract`."""

    tokens: str | Sequence[str] = "class"
    layers: int | Sequence[int] = 1
    size: int | str | None = None
    resize_size: int | None = None
    crop_size: int | None = None
    fps: float | None = None
    dtype: str = "float32"
    format: str = "safetensors"
    shard_size: int | None = None
    batch_size: int | None = None
    num_workers: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Options":
        """Check options; a TypeError for an unknown name, a ValueError for a value that suits no model."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"unknown option {unknown[0]!r} of extract_features; known: {', '.join(known)}")
        checked = cls(**options)
        check_names(checked.token_names, checked.dtype)
        check_sizes(checked.size, checked.resize_size, checked.crop_size)
        if checked.format not in flags.FORMATS:
            raise ValueError(f"unknown --format {checked.format!r}; known: {', '.join(flags.FORMATS)}")
        for name, least in {"shard_size": 1, "batch_size": 1, "num_workers": 0}.items():
            if (value := getattr(checked, name)) is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if checked.fps is not None and not checked.fps > 0:
            raise ValueError(f"--fps {checked.fps:g} must be above 0")
        return checked

    @property
    def token_names(self) -> list[str]:
        return [self.tokens] if isinstance(self.tokens, str) else list(self.tokens)

    @property
    def images_per_shard(self) -> int:
        has_patches = not {"patch", "both"}.isdisjoint(self.token_names)
        return self.shard_size or (flags.SHARD_SIZE_WITH_PATCHES if has_patches else flags.SHARD_SIZE)

    @property
    def images_per_batch(self) -> int:
        return self.batch_size or (flags.BATCH_SIZE if self.size is None else flags.BATCH_SIZE_OF_WHOLE_IMAGES)


@overload
def extract_features(images: Images, *, output: None = None, **others: Any) -> ImageFeatures: ...


@overload
def extract_features(images: Images, *, output: str | Path, **others: Any) -> Path: ...


def extract_features(
    images: Images,
    *,
    model: str | DinoVisionTransformer | FrozenBackbone | None = None,
    pretrained_weights: str | Path | None = None,
    config_file: str | Path | None = None,
    random_init: bool = False,
    num_heads: int | None = None,
    opts: Sequence[str] = (),
    output: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> ImageFeatures | Path:
    """Extract the features of images by a frozen backbone, in memory or into a folder.

    Args:
        images: A folder, image file, glob, list of images, dataset string or video, or several of these; a PIL image or
            several; or a tensor (n, C, H, W) of normalized images, which are not preprocessed.
        model: A published name such as `dinov2_vits14`, or a backbone.
        pretrained_weights: File, URL, folder of transformers or of a run's teacher (`OUT/eval/best`).
        config_file, random_init, num_heads, opts: As the flags of the command.
        output: A folder to write to, shard by shard. An interrupted extraction to it is continued.
        overwrite: Whether to delete the features in `output` first.
        options: `tokens`, `layers`, `size`, `resize_size`, `crop_size`, `fps`, `dtype`, `format`, `shard_size`,
            `batch_size`, `num_workers`, as the flags of the command; see `Options` for the defaults.

    Returns:
        The features, or `output`, whose features `dinov2.load_features` reads.

    Raises:
        ValueError, OSError: A value, image or file is missing, unknown or unsuitable; the message names it.
    """
    chosen, sources = Options.of(options), as_sources(images)
    if isinstance(sources, list):
        check_sources(sources)
    if output is not None and not overwrite:
        check_folder(Path(output))
    selected = argparse.Namespace(
        model=model if isinstance(model, str) else None,
        pretrained_weights=None if pretrained_weights is None else str(pretrained_weights),
        config_file=None if config_file is None else str(config_file),
        random_init=random_init,
        num_heads=num_heads,
        opts=list(opts),
    )
    backbone = load_frozen_backbone(selected) if model is None or isinstance(model, str) else given(model, selected)
    dataset = open_sources(sources, backbone.image_options, chosen.fps) if isinstance(sources, list) else sources
    extraction = make_extraction(backbone, dataset, chosen)
    if output is None:
        return in_memory(extraction)
    weights, described = weights_facts(selected, backbone), describe_sources(sources)
    settings = settings_of(extraction, weights, described, chosen.format, chosen.images_per_shard)
    write_features(extraction, FeatureFolder(Path(output), settings), overwrite=overwrite)
    return Path(output)


def as_sources(images: Images) -> list[str] | MemoryImages:
    """Sources of images as text, or images in memory; a `TypeError` for anything else."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or not images.is_floating_point():
            shape = " x ".join(map(str, images.shape))
            raise ValueError(f"a tensor of images is (n, C, H, W) float, normalized, not {shape} {images.dtype}")
        return MemoryImages(images)
    items = [images] if isinstance(images, str | Path | Image.Image) else list(images)
    if items and all(isinstance(item, Image.Image) for item in items):
        return MemoryImages([item for item in items if isinstance(item, Image.Image)])
    if not all(isinstance(item, str | Path) for item in items):
        kinds = ", ".join(dict.fromkeys(type(item).__name__ for item in items))
        raise TypeError(f"images are paths or dataset strings, or PIL images, or one tensor (n, C, H, W), not {kinds}")
    return [str(item) for item in items]


def describe_sources(sources: Sequence[str] | MemoryImages) -> list[str]:
    """Sources for the record of what was done; of many, the first ones."""
    if isinstance(sources, MemoryImages):
        return [f"in memory, SHA-256 {sources.digest()}"]
    more = len(sources) - MOST_SOURCES
    return [*sources[:MOST_SOURCES], *([f"and {more} more"] if more > 0 else [])]


def given(model: DinoVisionTransformer | FrozenBackbone, selected: argparse.Namespace) -> FrozenBackbone:
    """A backbone that was given, on the device of this process; a `ValueError` if flags select another one."""
    if others := [name for name, value in vars(selected).items() if value]:
        raise ValueError(f"{', '.join(others)} cannot be used with a model that is a backbone already")
    backbone = model if isinstance(model, FrozenBackbone) else FrozenBackbone.of(model)
    backbone.model.eval().to(distributed.device())
    return backbone


def make_extraction(backbone: FrozenBackbone, dataset: ImageDataset, chosen: Options) -> Extraction:
    """Put the parts of an extraction together."""
    if isinstance(dataset, MemoryImages) and isinstance(dataset.images, Tensor):
        if given := [name for name in ("size", "resize_size", "crop_size") if getattr(chosen, name) is not None]:
            raise ValueError(f"{', '.join(given)} cannot be used with a tensor, whose images are not preprocessed")
        preprocessing = no_preprocessing(backbone, dataset.images)
    else:
        preprocessing = make_preprocessing(
            backbone, size=chosen.size, resize_size=chosen.resize_size, crop_size=chosen.crop_size
        )
    choice = choose_tokens(backbone.model, chosen.token_names, chosen.layers, chosen.dtype)
    return Extraction(backbone, dataset, preprocessing, choice, chosen.images_per_batch, chosen.num_workers)


def in_memory(extraction: Extraction) -> ImageFeatures:
    """Compute all features in this process."""
    [shard] = extraction.run([range(len(extraction.dataset))])
    check_unreadable(shard.unreadable, len(extraction.dataset))
    return gather_features(shard.rows, {ARRAY_NAMES[kind]: parts for kind, parts in shard.arrays.items()})
