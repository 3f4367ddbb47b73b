"""Neighbors: by falling similarity, never the query itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from dinov2.eval.extract.frozen_backbone import FrozenBackbone
from dinov2.models import build_model
from dinov2.visualization.inputs import list_inputs
from dinov2.visualization.neighbors import find_neighbors, nearest


def test_neighbors_come_by_falling_similarity_without_the_excluded() -> None:
    gallery = functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), dim=1)
    excluded = torch.tensor([[True, False, False]])
    cosines, found = nearest(gallery[:1], gallery, 2, excluded)
    assert found.tolist() == [[1, 2]]
    torch.testing.assert_close(cosines, torch.tensor([[0.5**0.5, 0.0]]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_many_images_in_batches_are_compared_as_each_alone(tmp_path: Path, num_workers: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_bytes(b"no image")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "init_std": 0.3}
    backbone = FrozenBackbone(build_model("vit_small", **sizes).eval(), "tiny", shorter_side=16)
    images = list_inputs([str(tmp_path)])
    rows, tokens = find_neighbors(backbone, images[5:8], images, count=2, num_workers=num_workers)
    assert tokens.shape == (39, 24) and [Path(row.query.path).name for row in rows] == ["05.png", "06.png"]
    for number, row in zip((5, 6), rows, strict=True):
        similarity = tokens @ tokens[number]
        similarity[number] = -1
        assert [cosine for _, cosine in row.found] == pytest.approx(similarity.topk(2).values.tolist(), abs=1e-6)
        best = int(similarity.argmax())
        assert Path(row.found[0][0].path).name == f"{best + (best >= 7):02}.png"
