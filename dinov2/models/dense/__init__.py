"""Dense prediction on frozen features: segmentation and depth heads, and how they are applied to images."""

from dinov2.models.dense.averaging import predict_depth, predict_probabilities
from dinov2.models.dense.dense_model import DenseModel
from dinov2.models.dense.depther import Depther
from dinov2.models.dense.dpt import DPTDepthHead
from dinov2.models.dense.head_files import HeadFile, read_head, save_head
from dinov2.models.dense.layers import Layer, last_blocks, resize, spread_blocks
from dinov2.models.dense.linear_depth_head import LinearDepthHead
from dinov2.models.dense.padding import CenterPadding, Size, center_pad
from dinov2.models.dense.segmentation_head import SegmentationHead
from dinov2.models.dense.segmenter import Segmenter
from dinov2.models.dense.sliding_window import Window, slide, sliding_windows

__all__ = [
    "CenterPadding",
    "DPTDepthHead",
    "DenseModel",
    "Depther",
    "HeadFile",
    "Layer",
    "LinearDepthHead",
    "SegmentationHead",
    "Segmenter",
    "Size",
    "Window",
    "center_pad",
    "last_blocks",
    "predict_depth",
    "predict_probabilities",
    "read_head",
    "resize",
    "save_head",
    "slide",
    "sliding_windows",
    "spread_blocks",
]
