"""Features on disk are used again where they would be the same, and nowhere else."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_images import ImageSet, tiny_backbone, to_tensor, write_images
from torch import Tensor, nn

from dinov2.data import make_dataset
from dinov2.data.datasets.base import ImageDataset
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


def extract(model: nn.Module, cache: FeatureCache, dataset: ImageDataset | None = None) -> tuple[Tensor, Tensor]:
    return extract_features(model, dataset or ImageSet(12), 4, 0, cache=cache)


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
    extract(model, FeatureCache(tmp_path, facts), ImageSet(**({"count": 12} | dataset)))
    assert model.calls > before


def test_other_labels_are_other_data(tmp_path: Path) -> None:
    model, cache, relabeled = Counting(), FeatureCache(tmp_path, {}), ImageSet(12)
    relabeled.labels = relabeled.labels[::-1].copy()
    _, labels = extract(model, cache)
    _, others = extract(model, cache, relabeled)
    assert labels.tolist() == others.tolist()[::-1]


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_damaged_file_is_computed_again(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, cache = Counting(), FeatureCache(tmp_path, {})
    first, _ = extract(model, cache)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again, _ = extract(model, cache)
    assert torch.equal(first, again) and "recomputing them" in caplog.text
    assert torch.equal(extract(nn.Identity(), cache)[0], first), "the file is whole again"


def test_images_that_were_replaced_under_their_names_are_computed(tmp_path: Path) -> None:
    name, model, cache = write_images(tmp_path / "set", 6, seed=0), Counting(), FeatureCache(tmp_path / "cache")
    red, green = tmp_path / "set" / "r" / "0.png", tmp_path / "set" / "g" / "1.png"
    before, _ = extract(model, cache, make_dataset(dataset_str=name, transform=to_tensor))
    content = red.read_bytes(), green.read_bytes()
    green.write_bytes(content[0])
    red.write_bytes(content[1])
    os.utime(red, (0, 0))
    after, _ = extract(model, cache, make_dataset(dataset_str=name, transform=to_tensor))
    # In the order of the paths: b/2 b/5 g/1 g/4 r/0 r/3.
    torch.testing.assert_close(after, before[[0, 1, 4, 3, 2, 5]])


def replaced(path: Path, **entries: object) -> None:
    torch.save(torch.load(path, weights_only=True) | entries, path)


def flip_a_bit(path: Path) -> None:
    """In the middle of the numbers."""
    data = bytearray(path.read_bytes())
    features = torch.load(path, weights_only=True)["features"].numpy().tobytes()
    data[data.index(features) + len(features) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit, "damaged"),
        (lambda path: torch.save({"features": Counting()}, path), "more than tensors, .*Counting"),
        (lambda path: replaced(path, of="{}"), "its content is of other images, weights or settings"),
        (lambda path: replaced(path, features=torch.zeros(11, 24)), "11 features and 12 labels"),
        (lambda path: replaced(path, features=torch.zeros(12, 24).double()), "float64"),
        (lambda path: replaced(path, features=torch.full((12, 24), torch.inf)), "not finite"),
        (
            lambda path: replaced(path, labels=torch.zeros(12, dtype=torch.int64)),
            "labels differ from those",
        ),
        (lambda path: replaced(path, features=torch.zeros(13, 24), labels=torch.zeros(13).long()), "of 12 images"),
        (lambda path: replaced(path, features="zeros"), "recomputing them"),
        (lambda path: torch.save([1, 2], path), "recomputing them"),
    ],
)
def test_a_file_is_used_only_if_it_is_right(
    damage: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, cache = Counting(), FeatureCache(tmp_path, {})
    first, _ = extract(model, cache)
    (file,) = tmp_path.iterdir()
    damage(file)
    again, _ = extract(model, cache)
    assert torch.equal(first, again) and model.calls == 6
    (warning,) = [record.getMessage() for record in caplog.records if "recomputing them" in record.getMessage()]
    assert re.search(reason, warning)


def test_a_file_without_some_images_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, cache, some_broken = Counting(), FeatureCache(tmp_path, {}), ImageSet(200, broken=[7])
    extract(model, cache, some_broken)
    caplog.clear()
    features, labels = extract(model, cache, some_broken)
    assert len(features) == len(labels) == 199 and model.calls == 50
    assert "1 of 200 images could not be read and are omitted" in caplog.text


def test_features_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    model = Counting()
    model.backbone.norm.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"1 of the 24 values of norm\.bias are NaN or infinite"):
        extract(model, FeatureCache(tmp_path, {}))
    assert not list(tmp_path.iterdir())
