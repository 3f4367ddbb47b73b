"""The eight published ImageNet classifiers: a frozen backbone and a linear layer on its last features.

model = dinov2_vits14_lc(layers=4)   # images (B, 3, H, W) -> logits (B, 1000)
"""

from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.hub.backbones import make_backbone, weights_source
from dinov2.models.published import weights_url
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import check_numbers, load_backbone, read_state_dict

NUM_CLASSES = 1000


class Weights(Enum):
    """Training data of the published linear heads."""

    IMAGENET1K = "IMAGENET1K"


class LinearClassifier(nn.Module):
    """A linear classifier on the features of a backbone of width D.

    The input of the linear layer is the concatenation of the class tokens of the last `layers` blocks (1 or 4), by
    increasing depth, and the mean of the last block's patch tokens, all after the final norm: (1 + layers) * D.
    """

    def __init__(self, backbone: DinoVisionTransformer, layers: int = 4) -> None:
        super().__init__()
        if layers not in (1, 4):
            raise ValueError(f"layers must be 1 or 4, not {layers!r}")
        self.backbone = backbone
        self.linear_head = nn.Linear((1 + layers) * backbone.embed_dim, NUM_CLASSES)
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, 1000)."""
        outputs: Any = self.backbone.get_intermediate_layers(x, n=self.layers, return_class_token=True)
        class_tokens = [class_token for _, class_token in outputs]
        last_patches, _ = outputs[-1]
        return self.linear_head(torch.cat([*class_tokens, last_patches.mean(dim=1)], dim=1))


def dinov2_vits14_lc(**kwargs: Any) -> LinearClassifier:
    """Linear classifier on ViT-S/14. Keywords: see `make_classifier`."""
    return make_classifier("vit_small", **kwargs)


def dinov2_vitb14_lc(**kwargs: Any) -> LinearClassifier:
    """Linear classifier on ViT-B/14. Keywords: see `make_classifier`."""
    return make_classifier("vit_base", **kwargs)


def dinov2_vitl14_lc(**kwargs: Any) -> LinearClassifier:
    """Linear classifier on ViT-L/14. Keywords: see `make_classifier`."""
    return make_classifier("vit_large", **kwargs)


def dinov2_vitg14_lc(**kwargs: Any) -> LinearClassifier:
    """Linear classifier on ViT-g/14. Keywords: see `make_classifier`."""
    return make_classifier("vit_giant2", **kwargs)


def dinov2_vits14_reg_lc(**kwargs: Any) -> LinearClassifier:
    """Linear classifier on ViT-S/14 with registers. Keywords: see `make_classifier`."""
    return make_classifier("vit_small", registers=True, **kwargs)


def dinov2_vitb14_reg_lc(**kwargs: Any) -> LinearClassifier:
    """Linear classifier on ViT-B/14 with registers. Keywords: see `make_classifier`."""
    return make_classifier("vit_base", registers=True, **kwargs)


def dinov2_vitl14_reg_lc(**kwargs: Any) -> LinearClassifier:
    """Linear classifier on ViT-L/14 with registers. Keywords: see `make_classifier`."""
    return make_classifier("vit_large", registers=True, **kwargs)


def dinov2_vitg14_reg_lc(**kwargs: Any) -> LinearClassifier:
    """Linear classifier on ViT-g/14 with registers. Keywords: see `make_classifier`."""
    return make_classifier("vit_giant2", registers=True, **kwargs)


def make_classifier(
    arch: str,
    *,
    registers: bool = False,
    layers: int = 4,
    pretrained: bool = True,
    weights: Weights | str | Path = Weights.IMAGENET1K,
    **kwargs: Any,
) -> LinearClassifier:
    """Build one of the published classifiers, by default with the weights of the backbone and of the linear layer.

    Args:
        arch, registers, kwargs: See `make_backbone`.
        layers: Number of last blocks whose class tokens are used, 1 or 4.
        weights: Published weights of the linear layer (there is one choice), or a file, folder or URL of others. If it
            has a backbone as well (as a classifier of transformers does), that is loaded, too.
    """
    backbone = make_backbone(arch, registers=registers, pretrained=False, **kwargs)
    model = LinearClassifier(backbone, layers)
    content = "linear_head" if layers == 1 else f"linear{layers}_head"
    source = weights_source(Weights, weights, weights_url(arch, content, registers=registers))
    if pretrained:
        state = read_state_dict(source)
        whole = any(name.startswith("backbone.") for name in state)
        load_backbone(backbone, source if whole else weights_url(arch, "pretrain", registers=registers))
        _load_head(model.linear_head, state, str(source))
    return model


def _load_head(head: nn.Linear, state: dict[str, Tensor], source: str) -> None:
    """Load a linear layer from a file of its own, or from the part `linear_head.` of a classifier."""
    names = {name.removeprefix("linear_head."): name for name in state if not name.startswith("backbone.")}
    check_numbers({name: state[name] for name in names.values()}, source)
    try:
        head.load_state_dict({name: state[origin] for name, origin in names.items()})
    except RuntimeError as error:
        raise ValueError(f"the weights in {source} do not fit this classifier: {error}") from error
