"""Patch probes of a dataset whose images have labels, too: every image keeps its own map."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2.data.dense.base import DenseDataset
from dinov2.data.dense.fashion_scenes import FashionScenes
from dinov2.eval.dense.patch_probes import to_label_maps
from dinov2.eval.dense.probes import Squeezed, patches_of
from dinov2.eval.features import extract_features


class Pixels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return functional.unfold(images, 7, stride=7).transpose(1, 2)


def test_every_image_keeps_its_own_map() -> None:
    scenes = FashionScenes(split=FashionScenes.Split.VAL, length=20)
    scenes.transform = Squeezed(28, [0.0] * 3, [1.0] * 3)

    def extract(dataset: DenseDataset) -> tuple[Tensor, Tensor]:
        return extract_features(Pixels(), dataset, batch_size=8, num_workers=0)

    patches = patches_of(scenes, extract, side=28, patch_size=7, num_workers=0)
    maps = torch.from_numpy(np.stack([scenes.get_map(index) for index in range(20)]))
    assert torch.equal(to_label_maps(patches.labels, (4, 4), (7, 7)), maps)
