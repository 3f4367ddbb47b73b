"""Images with a class or a depth for every pixel: datasets, and transforms of image and map together."""

from dinov2.data.dense.base import (
    IGNORED,
    DenseDataset,
    DepthDataset,
    MapSummary,
    SegmentationDataset,
    check_maps,
)
from dinov2.data.dense.color import DepthColors, PhotometricDistortion
from dinov2.data.dense.map_files import BadMapError
from dinov2.data.dense.transforms import KITTI_CROPS, NYU_CROPS, DepthCrops, EvaluationInputs, SegmentationCrops

__all__ = [
    "IGNORED",
    "KITTI_CROPS",
    "NYU_CROPS",
    "BadMapError",
    "DenseDataset",
    "DepthColors",
    "DepthCrops",
    "DepthDataset",
    "EvaluationInputs",
    "MapSummary",
    "PhotometricDistortion",
    "SegmentationCrops",
    "SegmentationDataset",
    "check_maps",
]
