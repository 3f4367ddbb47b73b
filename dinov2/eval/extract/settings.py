"""The settings of an extraction, as they are recorded beside the features: everything that these depend on."""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import dinov2
from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.extract.extraction import Extraction
from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.eval.extract.sources import parts_of
from dinov2.eval.results import weights_fingerprint
from dinov2.models.vision_transformer import DinoVisionTransformer


def settings_of(
    extraction: Extraction, weights: Mapping[str, str], images: Sequence[str], file_format: str, shard_size: int
) -> dict[str, Any]:
    """Settings as JSON, without anything that depends on the machine, the time or the number of processes.

    Args:
        extraction: What is run over what.
        weights: See `weights_facts`.
        images: Sources of the images, as they were given.
        file_format: Of the files of features.
        shard_size: Images per file.
    """
    backbone, dataset, choice = extraction.backbone, extraction.dataset, extraction.choice
    settings = {
        "versions": {"dinov2": dinov2.__version__, "torch": str(torch.__version__)},
        "model": {"name": backbone.name, "weights": weights, **architecture(backbone.model)},
        "images": list(images),
        "num_images": len(dataset),
        "names_sha256": names_digest(dataset),
        "preprocessing": extraction.preprocessing.facts,
        "image_options": [part.image_options.facts() for part in parts_of(dataset)],
        "tokens": list(choice.kinds),
        "layers": list(choice.layers),
        "final_norm": True,
        "dtype": np.dtype(choice.dtype).name,
        "precision": str(backbone.autocast_dtype).removeprefix("torch."),
        "device": distributed.device().type,
        "format": file_format,
        "shard_size": shard_size,
        "batch_size": extraction.batch_size,
    }
    normalized: dict[str, Any] = json.loads(json.dumps(settings))
    return normalized


def architecture(model: DinoVisionTransformer) -> dict[str, Any]:
    """What of a model the names and shapes of its tensors do not determine, and its size."""
    return {
        "embed_dim": model.embed_dim,
        "depth": model.n_blocks,
        "num_heads": model.num_heads,
        "patch_size": model.patch_size,
        "num_register_tokens": model.num_register_tokens,
        "interpolate_antialias": model.interpolate_antialias,
        "interpolate_offset": model.interpolate_offset,
    }


def weights_facts(args: argparse.Namespace, backbone: FrozenBackbone) -> dict[str, str]:
    """Source and SHA-256 of the weights that flags select: of their files, else of the tensors of the backbone."""
    source = args.pretrained_weights or (None if args.random_init else args.model)
    if source is not None and (fingerprint := weights_fingerprint(source)):
        return {"source": source, "sha256": fingerprint["sha256"]}
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.model.state_dict().items()):
        values = tensor.detach().cpu().float().contiguous().numpy()
        digest.update(f"{name} {values.shape}".encode() + values.tobytes())
    return {"source": "random" if args.random_init else "in memory", "tensors_sha256": digest.hexdigest()}


def names_digest(dataset: ImageDataset) -> str:
    """SHA-256 of the names and labels of all images, in order."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(json.dumps([dataset.describe(index), dataset.get_target(index)]).encode() + b"\n")
    return digest.hexdigest()
