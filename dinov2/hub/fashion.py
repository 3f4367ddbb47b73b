"""`dinov2_fashion`: a small backbone that this code has trained, with real weights that need no download."""

from typing import Any

from dinov2.models.published import weights_url_or_path
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import load_backbone

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # of the images that it expects, for levels from 0 to 1


def dinov2_fashion(*, pretrained: bool = True, **kwargs: Any) -> DinoVisionTransformer:
    """ViT of width 128 with 3 blocks and patches of 7 pixels for images of 28 x 28 pixels, as in `train/quickstart`.

    It was trained on `FashionScenes`, scenes of clothes, and serves to try things; normalize images with `MEAN` and
    `STD`. It is on the CPU and in training mode, by default with its weights. Keywords are arguments of
    `DinoVisionTransformer`, which override its settings.
    """
    settings = {"img_size": 28, "patch_size": 7, "embed_dim": 128, "depth": 3, "num_heads": 4, "init_std": 0.09}
    model = DinoVisionTransformer(**{**settings, **kwargs})
    return load_backbone(model, weights_url_or_path("dinov2_fashion")) if pretrained else model
