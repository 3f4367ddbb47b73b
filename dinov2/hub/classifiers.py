"""The eight published ImageNet classifiers: a frozen backbone and a linear layer on its last features.

model = dinov2_vits14_lc(layers=4)   # images (B, 3, H, W) -> logits (B, 1000)
"""

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.hub.backbones import as_member, make_backbone, weights_url
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import read_state_dict

NUM_CLASSES = 1000


class Weights(Enum):
    """What the published linear heads were trained on."""

    IMAGENET1K = "IMAGENET1K"


class LinearClassifier(nn.Module):
    """Logits from a backbone of width D.

    The input of the linear layer are the class tokens of the last `layers` blocks, from shallow to deep, and the mean
    of the last block's patch tokens, all after the final norm: (1 + layers) * D numbers.

    Raises:
        ValueError: if `layers` is neither 1 nor 4.
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
    weights: Weights | str = Weights.IMAGENET1K,
    **kwargs: Any,
) -> LinearClassifier:
    """Build one of the published classifiers.

    Args:
        arch: a key of `dinov2.models.ARCHS`.
        registers: whether it is the variant with four registers.
        layers: how many last blocks the linear layer sees, 1 or 4.
        pretrained: whether to load the published weights, of the backbone and of the linear layer.
        weights: which weights of the linear layer (there is one choice).
        kwargs: for the backbone, see `make_backbone`.

    Raises:
        ValueError: if `layers` or `weights` is none of the choices.
    """
    as_member(Weights, weights)
    model = LinearClassifier(make_backbone(arch, registers=registers, pretrained=pretrained, **kwargs), layers)
    if pretrained:
        content = "linear_head" if layers == 1 else f"linear{layers}_head"
        model.linear_head.load_state_dict(read_state_dict(weights_url(arch, content, registers=registers)))
    return model
