"""Pre-norm transformer block on packed tokens, with the two published forms of stochastic depth.

Legend: T packed tokens, D width, (b, n) the sequences of a group and their length.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dinov2.layers.attention import Attention, backend_keyword
from dinov2.layers.drop_path import DropPath
from dinov2.layers.ffn import Mlp
from dinov2.layers.hooks import has_hooks
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.packing import Segments, pack, unpack
from dinov2.layers.stochastic_depth import Branch, add_residual, draw_branches, token_scale

_TAKES_SEGMENTS = Attention.forward  # user code may replace it, in a class or a module, by one for batches

SUBSET_THRESHOLD = 0.1
"""Up to this rate a single batch masks its residuals; above it, and always for several groups, work is skipped."""


class Block(nn.Module):
    """x <- x + ls1(attn(norm1 x)); x <- x + ls2(ffn(norm2 x)).

    Args:
        dim: Width D.
        mlp_ratio: Hidden width of the feed-forward network over `dim`.
        qkv_bias, proj_bias, ffn_bias: Whether these linear layers have biases.
        drop, attn_drop: Dropout rates of the outputs of both parts, and of the attention maps, in [0, 1].
        init_values: Initial gain of LayerScale; None or 0 disables LayerScale.
        drop_path: Rate rho of stochastic depth, in [0, 1).
        norm_layer: Normalization of D channels.
        attn_class, ffn_layer: Classes with the arguments of `Attention` and `Mlp`; `act_layer` is passed to the latter.
        attention_backend: See `layers.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        *,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
            **backend_keyword(attention_backend),
        )
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path)
        self.sample_drop_ratio = drop_path

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        segments: Segments | None = None,
        rows: Tensor | None = None,
        branches: tuple[Branch, Branch] | None = None,
    ) -> Tensor | list[Tensor]:
        """Apply the block; sequences attend to themselves only, and the result has the form of the input.

        Args:
            x: One batch (B, N, D); or packed tokens (T, D) with their `segments`; or a list of batches (b_k, n_k, D).
            rows: With packed tokens, indices of the required tokens: the feed-forward network skips the others, and
                the result is (len(rows), D).
            branches: With packed tokens, the result of `draw_branches` for attention and feed-forward network.
        """
        if not isinstance(x, Tensor):
            tokens, segments = pack(x)
            return unpack(self._forward_packed(tokens, self._draw(segments, x[0].device)), segments)
        if segments is None and self._skips_work():
            tokens, segments = pack([x])
            return self._forward_packed(tokens, self._draw(segments, x.device)).view_as(x)
        if segments is None:
            x = self._add(x, self._attention(x, None), self.ls1, self.drop_path1)
            return self._add(x, self._ffn(x), self.ls2, self.drop_path2)
        return self._forward_packed(x, branches or self._draw(segments, x.device), rows)

    def _forward_packed(self, x: Tensor, branches: tuple[Branch, Branch], rows: Tensor | None = None) -> Tensor:
        """Apply the block to packed tokens (T, D)."""
        for_attention, for_ffn = branches
        if for_attention.rows is None:
            x = self._add(x, self._attention(x, for_attention), self.ls1, self.drop_path1)
            x = x if rows is None else x.index_select(0, rows)
            return self._add(x, self._ffn(x), self.ls2, self.drop_path2)
        x = add_residual(x, for_attention, lambda part: self.ls1(self._attention(part, for_attention)))
        if rows is None:
            return add_residual(x, for_ffn, lambda part: self.ls2(self._ffn(part)))
        x, scale = x.index_select(0, rows), token_scale(x, for_ffn).index_select(0, rows)
        return x + self.ls2(self._ffn(x)) * scale

    def _draw(self, segments: Segments, device: torch.device) -> tuple[Branch, Branch]:
        [branches] = draw_branches(segments, [self.rate], device)
        return branches

    @property
    def rate(self) -> float:
        """Rate of stochastic depth in the present mode: 0 in evaluation."""
        return self.sample_drop_ratio if self.training else 0.0

    def _add(self, x: Tensor, residual: Tensor, scale: nn.Module, drop_path: nn.Module) -> Tensor:
        """x + drop_path(scale(residual)), in one operation if nothing is dropped."""
        if type(scale) is LayerScale and self.rate == 0 and not has_hooks(scale) and not has_hooks(drop_path):
            return torch.addcmul(x, residual, scale.gamma)
        return x + drop_path(scale(residual))

    def _skips_work(self) -> bool:
        """Whether stochastic depth skips sequences of a single batch, rather than computing and masking them."""
        return self.rate > SUBSET_THRESHOLD

    def _attention(self, x: Tensor, branch: Branch | None) -> Tensor:
        x = self.norm1(x)
        if branch is None:
            return self.attn(x)
        # Compilers evaluate this as Python does, unlike a comparison of `self.attn.forward.__func__`.
        if type(self.attn).forward is _TAKES_SEGMENTS and "forward" not in self.attn.__dict__:
            return self.attn(x, branch.segments, branch.ends)
        return pack([self.attn(group) for group in unpack(x, branch.segments)])[0]  # custom attention takes batches

    def _ffn(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


NestedTensorBlock = Block  # published name of the block that takes lists, which every block does here
