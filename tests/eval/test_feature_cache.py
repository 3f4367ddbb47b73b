"""Features on disk are used again where they would be the same, and nowhere else."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_pictures import Pictures, tiny_backbone
from torch import Tensor, nn

from dinov2.eval.feature_cache import FeatureCache
from dinov2.eval.features import extract_features


class Counting(nn.Module):
    """A backbone that counts the batches it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_backbone()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.backbone(images)


def extract(model: nn.Module, cache: FeatureCache, dataset: Pictures | None = None) -> tuple[Tensor, Tensor]:
    return extract_features(model, dataset or Pictures(12), 4, 0, cache=cache)


def test_the_second_time_they_come_from_disk_and_are_the_same(tmp_path: Path) -> None:
    model, cache = Counting(), FeatureCache(tmp_path, {"weights": "a"})
    first, second = extract(model, cache), extract(model, cache)
    assert model.calls == 3, "once for each batch of 4"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = extract(model, FeatureCache(None, {}))
    assert all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))


@pytest.mark.parametrize(
    ("facts", "dataset"),
    [
        ({"weights": "b"}, {}),
        ({"weights": "a", "image sizes": [16, 16]}, {}),
        ({"weights": "a"}, {"count": 9}),
    ],
)
def test_other_weights_sizes_or_images_are_computed(facts: dict, dataset: dict[str, Any], tmp_path: Path) -> None:
    model = Counting()
    extract(model, FeatureCache(tmp_path, {"weights": "a"}))
    before = model.calls
    extract(model, FeatureCache(tmp_path, facts), Pictures(**({"count": 12} | dataset)))
    assert model.calls > before


def test_other_labels_are_other_data(tmp_path: Path) -> None:
    model, cache, relabelled = Counting(), FeatureCache(tmp_path, {}), Pictures(12)
    relabelled.labels = relabelled.labels[::-1].copy()
    _, labels = extract(model, cache)
    _, others = extract(model, cache, relabelled)
    assert labels.tolist() == others.tolist()[::-1]


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_damaged_file_is_computed_again(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, cache = Counting(), FeatureCache(tmp_path, {})
    first, _ = extract(model, cache)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again, _ = extract(model, cache)
    assert torch.equal(first, again) and "computed again" in caplog.text
    assert torch.equal(extract(nn.Identity(), cache)[0], first), "the file is whole again"
