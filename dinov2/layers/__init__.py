"""Building blocks of the vision transformer and of the projection heads."""

from dinov2.layers.attention import Attention, MemEffAttention
from dinov2.layers.block import Block, NestedTensorBlock
from dinov2.layers.dino_head import DINOHead
from dinov2.layers.drop_path import DropPath
from dinov2.layers.ffn import Mlp, SwiGLUFFN, SwiGLUFFNFused
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.packing import Segments, pack, unpack
from dinov2.layers.patch_embed import PatchEmbed

__all__ = [
    "Attention",
    "Block",
    "DINOHead",
    "DropPath",
    "LayerScale",
    "MemEffAttention",
    "Mlp",
    "NestedTensorBlock",
    "PatchEmbed",
    "Segments",
    "SwiGLUFFN",
    "SwiGLUFFNFused",
    "pack",
    "unpack",
]
