"""Set j: names, order, shapes and counts of the parameters of the standard architectures and heads."""

import math

import torch
from torch import nn

from dinov2 import layers
from dinov2.models import vision_transformer
from dinov2.models.weights import flatten_block_names
from scripts.golden.comparison import Comparison
from scripts.golden.recording import Recording


def replay_names(recording: Recording, comparison: Comparison) -> None:
    for label, model in recording.json["models"].items():
        info = model["info"]
        # Shapes need no memory: the giant has 1.1 billion parameters.
        with torch.device("meta"):
            ours = _builder(info["builder"])(**info["kwargs"])
        shapes = [(name, list(value.shape)) for name, value in ours.state_dict().items()]
        # Ours are flat whatever the chunking; chunked checkpoints are renamed when they are read.
        recorded = list(flatten_block_names(model["state_dict"]).items())
        comparison.exact(f"{label}: names, order and shapes", shapes, recorded)
        comparison.exact(f"{label}: tensors", len(shapes), info["n_tensors"])
        comparison.exact(f"{label}: parameters", sum(math.prod(shape) for _, shape in shapes), info["n_parameters"])


def _builder(name: str) -> type[nn.Module]:
    for home in (vision_transformer, layers):
        if hasattr(home, name):
            return getattr(home, name)
    raise ValueError(f"unknown builder {name!r}; it is neither in dinov2.models.vision_transformer nor dinov2.layers")
