"""The vision transformer of DINOv2, with the published parameter names.

Legend: B images, (H, W) pixels, p patch side, n = H/p * W/p patches, R register tokens, D width.
A sequence is [class token, R registers, n patches row by row].
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn

from dinov2.layers import Block, Mlp, PatchEmbed, SwiGLUFFN, pack, unpack
from dinov2.layers.attention import backend_keyword
from dinov2.layers.layer_norm import LayerNorm
from dinov2.layers.packing import Segments
from dinov2.layers.stochastic_depth import Branch, draw_branches
from dinov2.models.key_mapping import flatten_block_names
from dinov2.models.positions import Grid, resample_positions

NORM_EPS = 1e-6
FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFN,
    "swiglufused": SwiGLUFFN,
    "identity": lambda **_: nn.Identity(),
}


class DinoVisionTransformer(nn.Module):
    """Vision transformer with optional registers, LayerScale, SwiGLU and stochastic depth.

    Args:
        img_size: Image size in pixels, an int or (height, width), which determines the size of the position table.
        patch_size: Patch side p in pixels.
        embed_dim, depth, num_heads: Width D, number of blocks, and of attention heads.
        mlp_ratio: Width of the hidden layers of the feed-forward networks, relative to D.
        drop_path_rate: Rate of stochastic depth in the last block, in [0, 1); it increases linearly from 0.
        drop_path_uniform: Whether all blocks have the rate `drop_path_rate`.
        init_values: Initial value of LayerScale; None or 0 for no LayerScale.
        embed_layer, block_fn: Classes with the signatures of `PatchEmbed` and `Block`.
        act_layer: Activation of the feed-forward networks; `swiglu` ignores it.
        ffn_layer: A key of `FFN_LAYERS` (`swiglu` and `swiglufused` are the same).
        block_chunks: Number of groups in which blocks are sharded, used by `train.parallel`. Parameter names are
            always flat (`blocks.7.`); `models.weights` renames those of chunked checkpoints.
        num_register_tokens: Number R of register tokens, which have no position (arXiv 2309.16588).
        interpolate_antialias, interpolate_offset: See `positions.resample_positions`.
        attention_backend: See `layers.attention`.
        init_std, pos_embed_std: Standard deviation of the initial linear weights and positions. The published 0.02
            suits widths from 384 up; for a narrow model about 1 / sqrt(embed_dim) is better.
    """

    num_tokens = 1  # published attributes: tokens without registers and patches,
    chunked_blocks = False  # and whether `blocks` has chunks

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        embed_layer: Callable[..., Any] = PatchEmbed,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        block_fn: Callable[..., nn.Module] = Block,
        ffn_layer: str = "mlp",
        block_chunks: int = 0,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        attention_backend: str = "auto",
        init_std: float = 0.02,
        pos_embed_std: float = 0.02,
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise ValueError(f"unknown ffn_layer {ffn_layer!r}; known: {', '.join(FFN_LAYERS)}")
        self.num_features = self.embed_dim = embed_dim
        self.n_blocks, self.num_heads = depth, num_heads
        self.patch_size, self.block_chunks = patch_size, block_chunks
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias, self.interpolate_offset = interpolate_antialias, interpolate_offset
        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self._add_tokens()

        sizes = {"dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "init_values": init_values}
        biases = {"qkv_bias": qkv_bias, "proj_bias": proj_bias, "ffn_bias": ffn_bias}
        norm_layer = partial(LayerNorm, eps=NORM_EPS)
        layers = {"act_layer": act_layer, "norm_layer": norm_layer, "ffn_layer": FFN_LAYERS[ffn_layer]}
        arguments: dict[str, Any] = sizes | biases | layers | backend_keyword(attention_backend)
        ramp = [drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList(
            block_fn(drop_path=drop_path_rate if drop_path_uniform else rate, **arguments) for rate in ramp
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)  # features are in float32 under autocast
        self.head = nn.Identity()
        self.init_weights(init_std, pos_embed_std)

    def _add_tokens(self) -> None:
        width, registers = self.embed_dim, self.num_register_tokens
        if registers < 0:
            raise ValueError(f"num_register_tokens must be at least 0, not {registers}")
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, width))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        self.mask_token = nn.Parameter(torch.empty(1, width))

    def init_weights(self, init_std: float = 0.02, pos_embed_std: float = 0.02) -> None:
        """Initialize tokens, positions and linear weights; the patch projection keeps PyTorch's default."""
        if self.pos_embed.is_meta:  # there is nothing to initialize, and drawing normal numbers imports the compiler
            return
        nn.init.trunc_normal_(self.pos_embed, std=pos_embed_std)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.mask_token)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Rename chunked blocks of published training checkpoints to flat names before loading."""
        blocks = {name: value for name, value in state_dict.items() if name.startswith(f"{prefix}blocks.")}
        for name in blocks:
            del state_dict[name]
        state_dict |= flatten_block_names(blocks)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def position_grid(self) -> Grid:
        """Rows and columns of the position table, which other code may have replaced.

        The grid is that of `img_size` if it has as many positions as the table, else a square; a ValueError if neither.
        """
        shape = self.pos_embed.shape
        if len(shape) == 3 and shape[2] == self.embed_dim:
            built_for: Grid = getattr(self.patch_embed, "patches_resolution", (0, 0))
            side = math.isqrt(max(shape[1] - 1, 0))
            if built_for[0] * built_for[1] == shape[1] - 1:
                return built_for
            if side * side == shape[1] - 1:
                return side, side
        raise ValueError(
            f"pos_embed {tuple(shape)} is not a position table of a square grid of patches after a class token: "
            f"(1, 1 + side * side, {self.embed_dim})"
        )

    def interpolate_pos_encoding(self, x: Tensor, height: int, width: int) -> Tensor:
        """The position table for images of `height` x `width` pixels: (1, 1 + n, D), in the dtype of the tokens `x`.

        At the native size this is the table itself, otherwise see `positions.resample_positions`. Name and order of the
        arguments are the published ones, as other code calls and replaces this method.
        """
        positions = resample_positions(
            self.pos_embed,
            self.position_grid,
            (height // self.patch_size, width // self.patch_size),
            offset=self.interpolate_offset,
            antialias=self.interpolate_antialias,
        )
        return positions.to(x.dtype)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), masks (B, n) bool or None -> tokens (B, 1 + R + n, D).

        Masked patches are replaced by the mask token before positions are added; registers get no position.
        """
        images, x = x, self.patch_embed(x)
        height, width = images.shape[-2:]
        if masks is not None:
            _check_masks(masks, x)
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.interpolate_pos_encoding(x, height, width)
        if self.register_tokens is not None:
            registers = self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return x

    def forward_features(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | None | Sequence[Tensor | None] = None,
        patches: Sequence[Tensor] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Features of a batch of images, or of several batches with different image sizes in one packed pass.

        Args:
            x: Images (B, C, H, W), or a list of such batches.
            masks: True for masked patches, (B, n) bool, or None; for a list of batches a list.
            patches: For a list of batches, the patches to return, see `forward_features_list`.

        Returns:
            For each batch a dict: `x_norm_clstoken` (B, D), `x_norm_regtokens` (B, R, D), `x_norm_patchtokens`
            (B, n, D), `x_prenorm` (B, 1 + R + n, D, before the last norm), `masks`.
        """
        if isinstance(x, list | tuple):
            masks_list: Any = [None] * len(x) if masks is None else masks
            return self.forward_features_list(x, masks_list, patches)
        if patches is not None:
            raise ValueError("patches can be selected only for a list of batches; give [images] for one batch")
        tokens = self.prepare_tokens_with_masks(x, masks)  # type: ignore[arg-type]
        for block in self.blocks:
            tokens = block(tokens)
        return self._features(tokens, masks)

    def forward_features_list(
        self,
        x_list: Sequence[Tensor],
        masks_list: Sequence[Tensor | None],
        patches_list: Sequence[Tensor] | None = None,
    ) -> list[dict[str, Any]]:
        """Features of several batches with different image sizes, whose tokens are packed into one sequence.

        Args:
            x_list: Batches of images, each (B, C, H, W).
            masks_list: Masks (B, n) bool or None for each batch.
            patches_list: Indices (M,) of the patches to return among the B * n patches of each batch. The last block
                then skips what only the others need, and the features are `x_norm_clstoken` (B, D),
                `x_norm_patchtokens` (M, D), and `masks`; otherwise those of `forward_features`.
        """
        if not len(x_list) == len(masks_list) == len(x_list if patches_list is None else patches_list) > 0:
            raise ValueError(f"{len(x_list)} batches of images with {len(masks_list)} masks: give one or None for each")
        tokens, segments = pack(
            [self.prepare_tokens_with_masks(x, masks) for x, masks in zip(x_list, masks_list, strict=True)]
        )
        branches = draw_branches(segments, [cast(Block, block).rate for block in self.blocks], tokens.device)
        if patches_list is not None:
            return self._some_features(tokens, segments, branches, masks_list, patches_list)
        for block, of_block in zip(self.blocks, branches, strict=True):
            tokens = block(tokens, segments, branches=of_block)
        return [self._features(group, masks) for group, masks in zip(unpack(tokens, segments), masks_list, strict=True)]

    def _some_features(
        self,
        tokens: Tensor,
        segments: Segments,
        branches: Sequence[tuple[Branch, Branch]],
        masks_list: Sequence[Tensor | None],
        patches_list: Sequence[Tensor],
    ) -> list[dict[str, Any]]:
        rows, start, first_patch = [], 0, 1 + self.num_register_tokens
        for (count, length), patches in zip(segments, patches_list, strict=True):
            image, patch = patches // (length - first_patch), patches % (length - first_patch)
            rows.append(start + length * torch.arange(count, device=tokens.device))  # class tokens
            rows.append(start + length * image + first_patch + patch)
            start += count * length
        *blocks, last = self.blocks
        for block, of_block in zip(blocks, branches, strict=False):
            tokens = block(tokens, segments, branches=of_block)
        wanted = self.norm(last(tokens, segments, torch.cat(rows), branches[-1])).split([len(part) for part in rows])
        return [
            {"x_norm_clstoken": cls, "x_norm_patchtokens": patches, "masks": masks}
            for cls, patches, masks in zip(wanted[::2], wanted[1::2], masks_list, strict=True)
        ]

    def _features(self, tokens: Tensor, masks: Any) -> dict[str, Any]:
        x_norm = self.norm(tokens)
        first_patch = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": x_norm[:, 0],
            "x_norm_regtokens": x_norm[:, 1:first_patch],
            "x_norm_patchtokens": x_norm[:, first_patch:],
            "x_prenorm": tokens,
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: SupportsIndex | Iterable[SupportsIndex] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens after some of the blocks of images (B, C, H, W), one entry per block in increasing depth.

        Args:
            n: Number of last blocks, or indices of blocks (negative ones count from the end); integers of any library.
            reshape: Whether patch tokens are (B, D, H/p, W/p) instead of (B, n, D).
            return_class_token: Whether to return pairs (patch tokens, class token (B, D)), without registers.
            norm: Whether the last norm is applied to every output.

        Raises:
            ValueError: If a block does not exist or is requested twice, or the images have an unsuitable shape.
        """
        wanted = self._block_indices(n)
        tokens = self.prepare_tokens_with_masks(x)
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in wanted:
                outputs.append(self.norm(tokens) if norm else tokens)
        patches = [output[:, 1 + self.num_register_tokens :] for output in outputs]
        if reshape:
            grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
            patches = [patch.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for patch in patches]
        if return_class_token:
            return tuple((patch, output[:, 0]) for patch, output in zip(patches, outputs, strict=True))
        return tuple(patches)

    def _block_indices(self, n: SupportsIndex | Iterable[SupportsIndex]) -> list[int]:
        depth = len(self.blocks)  # other code shortens the list
        try:
            if isinstance(n, Iterable) and getattr(n, "ndim", 1) != 0:
                indices = [index % depth if -depth <= index < 0 else index for index in map(operator.index, n)]
            else:  # a number, also one of a library whose numbers are arrays without dimensions
                indices = list(range(depth - operator.index(n), depth))  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"n must be a number of last blocks, or a list of block indices, not {n!r}") from error
        if not indices or not all(0 <= index < depth for index in indices):
            raise ValueError(f"blocks {n} requested of a model with {depth} blocks")
        if len(set(indices)) < len(indices):
            raise ValueError(
                f"blocks {n} of a model with {depth} blocks include one twice; each is returned once, in order"
            )
        return indices

    def forward(
        self, x: Any, masks: Any = None, is_training: bool = False, patches: Sequence[Tensor] | None = None
    ) -> Tensor | dict[str, Any] | list[dict[str, Any]]:
        """The normalized class token (B, D) through `head` (the identity), or with `is_training` all features."""
        if isinstance(x, list | tuple) and not is_training:
            raise ValueError(
                "for a list of batches use is_training=True; class tokens alone are returned for one batch only"
            )
        features: Any = self.forward_features(x, masks, patches)
        return features if is_training else self.head(features["x_norm_clstoken"])


def _check_masks(masks: Tensor, patches: Tensor) -> None:
    """Raise a ValueError unless `masks` are (B, n) or (1, n) bool for patches (B, n, D)."""
    batch, num_patches, _ = patches.shape
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        kind = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"masks must be a bool tensor, True for masked patches, not {kind}")
    if masks.ndim != 2 or masks.shape[1] != num_patches or masks.shape[0] not in (1, batch):
        raise ValueError(f"masks {tuple(masks.shape)} are not of {batch} images of {num_patches} patches")


def vit_small(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-S: width 384, 12 blocks, 6 heads."""
    arguments = {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0} | kwargs
    return DinoVisionTransformer(patch_size=patch_size, num_register_tokens=num_register_tokens, **arguments)


def vit_base(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-B: width 768, 12 blocks, 12 heads."""
    arguments = {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0} | kwargs
    return DinoVisionTransformer(patch_size=patch_size, num_register_tokens=num_register_tokens, **arguments)


def vit_large(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-L: width 1024, 24 blocks, 16 heads."""
    arguments = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0} | kwargs
    return DinoVisionTransformer(patch_size=patch_size, num_register_tokens=num_register_tokens, **arguments)


def vit_giant2(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-g: width 1536, 40 blocks, 24 heads of 64 channels (the original ViT-g has 16 heads of 88, slower)."""
    arguments = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 4.0} | kwargs
    return DinoVisionTransformer(patch_size=patch_size, num_register_tokens=num_register_tokens, **arguments)
