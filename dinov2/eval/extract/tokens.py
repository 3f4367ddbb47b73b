"""Which tokens of which blocks are extracted, and their arrays.

Shapes: B images of a batch, L blocks, h x w patches of an image, D feature dimension. With one block there is no L.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.flags.extract import TOKENS
from dinov2.models.vision_transformer import DinoVisionTransformer

ARRAY_NAMES = {"class": "class_token", "patch": "patch_tokens", "mean": "mean_patch_token"}
"""Name of the array of each kind of tokens."""

DTYPES: dict[str, type[np.floating]] = {"float32": np.float32, "float16": np.float16}


class TokenChoice(NamedTuple):
    """What is extracted from a model."""

    kinds: Sequence[str]  # keys of ARRAY_NAMES, in their order
    layers: Sequence[int]  # indices of blocks from 0, ascending
    dtype: type[np.floating]

    def shape(self, kind: str, width: int, grid: tuple[int, int] | None) -> tuple[int, ...]:
        """Shape of the array of a kind without its first dimension, which counts images.

        For patch tokens whose `grid` varies, None, the first dimension counts patches.
        """
        layers = (len(self.layers),) if len(self.layers) > 1 else ()
        return (*layers, *(grid or ()), width) if kind == "patch" else (*layers, width)


def choose_tokens(
    model: DinoVisionTransformer, tokens: Sequence[str], layers: int | Sequence[int], dtype: str
) -> TokenChoice:
    """Check a choice of tokens.

    Args:
        model: The backbone.
        tokens: Some of `TOKENS`; `both` is `class` and `patch`.
        layers: Number of last blocks, or indices of blocks; negative ones count from the end.
        dtype: `float32` or `float16`.
    """
    check_names(tokens, dtype)
    wanted = {kind for name in tokens for kind in (("class", "patch") if name == "both" else (name,))}
    depth = model.n_blocks
    indices = (
        list(range(depth - layers, depth)) if isinstance(layers, int) else [i % depth if i < 0 else i for i in layers]
    )
    asked = layers if isinstance(layers, int) else ",".join(map(str, layers))
    is_far = not isinstance(layers, int) and min(layers, default=0) < -depth
    if not indices or is_far or not all(0 <= index < depth for index in indices):
        raise ValueError(f"--layers {asked}: the model has {depth} blocks, 0 to {depth - 1}")
    if len(set(indices)) < len(indices):
        raise ValueError(f"--layers {asked} names a block twice, of {depth} blocks")
    return TokenChoice([kind for kind in ARRAY_NAMES if kind in wanted], sorted(indices), DTYPES[dtype])


def check_names(tokens: Sequence[str], dtype: str) -> None:
    """Raise a `ValueError` for unknown tokens or an unknown dtype."""
    for name in tokens:
        if name not in TOKENS:
            raise ValueError(f"unknown --tokens {name!r}; known: {', '.join(TOKENS)}")
    if not tokens:
        raise ValueError(f"no --tokens; known: {', '.join(TOKENS)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown --dtype {dtype!r}; known: {', '.join(DTYPES)}")


class TokenModel(nn.Module):
    """The chosen tokens of a backbone, each after the final norm: images (B, 3, H, W) -> (B, L, T, D) float32.

    T are the tokens of one block: the class token, the mean of the patch tokens, the patch tokens, as far as chosen.
    """

    def __init__(self, backbone: DinoVisionTransformer, choice: TokenChoice) -> None:
        super().__init__()
        self.backbone, self.choice = backbone, choice

    def forward(self, images: Tensor) -> Tensor:
        blocks = self.backbone.get_intermediate_layers(images, self.choice.layers, return_class_token=True)
        return torch.stack([self._chosen(*block) for block in cast(tuple[tuple[Tensor, Tensor], ...], blocks)], dim=1)

    def _chosen(self, patches: Tensor, class_token: Tensor) -> Tensor:
        patches = patches.float()
        found = {"class": class_token[:, None].float(), "mean": patches.mean(dim=1, keepdim=True), "patch": patches}
        return torch.cat([found[kind] for kind in sorted(self.choice.kinds)], dim=1)  # class, mean, patch


def arrays_of(output: Tensor, choice: TokenChoice, grid: tuple[int, int], *, flat: bool) -> dict[str, np.ndarray]:
    """Arrays by kind of the output (B, L, T, D) of a `TokenModel` for images of one size.

    Returns:
        `class` and `mean`: (B, L, D). `patch`: (B, L, h, w, D), if `flat` (B, h * w, L, D).
    """
    arrays, position = {}, 0
    values = output.cpu().numpy()
    for kind in sorted(choice.kinds):
        if kind == "patch":
            found = values[:, :, position:]
            found = found.swapaxes(1, 2) if flat else found.reshape(*found.shape[:2], *grid, -1)
        else:
            found, position = values[:, :, position], position + 1
        if len(choice.layers) == 1:
            found = found.squeeze(2 if flat and kind == "patch" else 1)
        with np.errstate(over="ignore"):  # the caller checks what is infinite
            arrays[kind] = np.ascontiguousarray(found, choice.dtype)
    return arrays
