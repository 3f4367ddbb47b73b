"""From a dataset string to batches: datasets, augmentation, masks, collation, samplers, loader."""

from dinov2.data.adapters import DatasetWithEnumeratedTargets
from dinov2.data.augment import DataAugmentationDINO
from dinov2.data.collate import Batch, collate_data_and_cast
from dinov2.data.datasets import make_dataset
from dinov2.data.loader import make_data_loader
from dinov2.data.masking import MaskingGenerator
from dinov2.data.samplers import SamplerType

__all__ = [
    "Batch",
    "DataAugmentationDINO",
    "DatasetWithEnumeratedTargets",
    "MaskingGenerator",
    "SamplerType",
    "collate_data_and_cast",
    "make_data_loader",
    "make_dataset",
]
