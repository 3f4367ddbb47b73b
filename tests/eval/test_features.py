"""Features of a dataset: in its order, whole on every rank, whatever the batches, ranks and broken files."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_images import ImageSet, tiny_backbone, to_tensor
from eval_processes import run_in_processes
from eval_shared_work import shared_work
from PIL import Image
from torch.nn.functional import normalize

from dinov2.data.images import BadImageError
from dinov2.eval import features as features_module
from dinov2.eval.features import (
    ModelWithIntermediateLayers,
    ModelWithNormalize,
    ModelWithPooledTokens,
    extract_features,
    run_model,
    tokens_of_blocks,
)
from dinov2.eval.linear_heads import create_linear_input
from dinov2.eval.skip_unreadable import collate_skipping_unreadable, skip_unreadable_batches


@pytest.mark.parametrize(("batch_size", "num_workers"), [(4, 0), (100, 0), (3, 2)])
def test_features_are_those_of_the_model_in_the_order_of_the_data(batch_size: int, num_workers: int) -> None:
    model, dataset = tiny_backbone(), ImageSet(10)
    images = torch.stack([dataset[i][0] for i in range(10)])
    features, labels = extract_features(model, dataset, batch_size, num_workers, gather_on_cpu=True)
    torch.testing.assert_close(features, model(images))
    assert labels.tolist() == dataset.labels.tolist()
    normalized, _ = extract_features(ModelWithNormalize(model), dataset, batch_size, num_workers)
    torch.testing.assert_close(normalized, normalize(model(images), dim=1))


def test_a_cpu_runs_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = torch.stack([ImageSet(5)[i][0] for i in range(5)]), []
    monkeypatch.setattr(features_module, "CPU_PIXELS", 2 * images[0, 0].numel() + 1)

    def model(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part.flatten(1)

    assert torch.equal(run_model(model, images), images.flatten(1))
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(features_module, "CPU_PIXELS", 1)
    assert torch.equal(run_model(model, images[:2]), images[:2].flatten(1))
    assert sizes[3:] == [1, 1], "one at least"


def test_autocast_is_for_the_model_only() -> None:
    model, dataset = tiny_backbone(), ImageSet(4)
    exact, _ = extract_features(model, dataset, 4, 0)
    half, _ = extract_features(model, dataset, 4, 0, autocast_dtype=torch.bfloat16)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.2


def test_broken_images_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    dataset = ImageSet(200, broken=[7, 8])
    with caplog.at_level(logging.WARNING):
        features, labels = extract_features(tiny_backbone(), dataset, 64, 0)
    whole, _ = extract_features(tiny_backbone(), ImageSet(200), 64, 0)
    kept = [i for i in range(200) if i not in (7, 8)]
    torch.testing.assert_close(features, whole[kept])
    assert labels.tolist() == dataset.labels[kept].tolist()
    assert "sample 7" in caplog.text and "sample 8" in caplog.text
    assert "2 of 200 images cannot be read and are omitted" in caplog.text


def test_too_many_broken_images_are_an_error() -> None:
    with pytest.raises(
        ValueError,
        match="3 of 200 images cannot be read, more than the 1% .*; the first: .*sample 1 .*no supported image",
    ):
        extract_features(tiny_backbone(), ImageSet(200, broken=[1, 70, 190]), 64, 0)
    batch = collate_skipping_unreadable([BadImageError("no file a.png"), BadImageError("no file b.png")])
    with pytest.raises(ValueError, match="none of the 2 images of a batch can be read; the first: no file a.png"):
        list(skip_unreadable_batches([batch]))


def test_weights_that_are_not_finite_are_named_whatever_is_around_the_backbone() -> None:
    model = tiny_backbone()
    model.blocks[2].attn.proj.weight.data[0, :2] = torch.nan
    for around in (model, ModelWithNormalize(model), ModelWithPooledTokens(ModelWithIntermediateLayers(model, 4))):
        with pytest.raises(
            ValueError, match=r"2 of the 576 values of blocks\.2\.attn\.proj\.weight are NaN or infinite"
        ):
            extract_features(around, ImageSet(10), 4, 0)


def overflowing(image: Image.Image) -> torch.Tensor:
    """A transform that one of the images does not survive."""
    tensor = to_tensor(image)
    return tensor * torch.inf if np.array_equal(np.array(image), ImageSet(10).get_image(6)) else tensor


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_image_whose_features_are_not_finite_is_named(num_workers: int) -> None:
    with pytest.raises(ValueError, match="features of ImageSet sample 6 are NaN or infinite, those of 1 of 4 images"):
        extract_features(tiny_backbone(), ImageSet(10, transform=overflowing), 4, num_workers)


def test_weights_that_are_finite_but_too_large_are_blamed() -> None:
    model = tiny_backbone()
    model.patch_embed.proj.weight.data *= 1e38
    with pytest.raises(ValueError, match="those of 4 of 4 images .* the weights, though finite, are too large"):
        extract_features(model, ImageSet(10), 4, 0)


def test_tokens_of_the_last_blocks_are_frozen_and_go_from_shallow_to_deep() -> None:
    model = tiny_backbone()
    images = torch.stack([ImageSet(2)[i][0] for i in range(2)])
    tokens = ModelWithIntermediateLayers(model, 3)(images)
    assert [(tuple(patches.shape), tuple(cls.shape)) for patches, cls in tokens] == [((2, 4, 24), (2, 24))] * 3
    torch.testing.assert_close(tokens[-1][1], model(images))
    assert not tokens[-1][1].requires_grad


def test_pooled_tokens_give_classifiers_the_same_input() -> None:
    model = ModelWithIntermediateLayers(tiny_backbone(), 4)
    images = torch.stack([ImageSet(3)[i][0] for i in range(3)])
    pooled = ModelWithPooledTokens(model)(images)
    assert pooled.shape == (3, 4, 2, 24) and pooled.dtype == torch.float32
    for n in (1, 4):
        for avgpool in (False, True):
            expected = create_linear_input(model(images), n, avgpool)
            assert torch.equal(create_linear_input(tokens_of_blocks(pooled), n, avgpool), expected)


class Relabeled(ImageSet):
    """ImageSet with lists of labels: [0], [1, 2], [] ..."""

    def get_target(self, index: int) -> list[int]:
        return [[0], [1, 2], []][index % 3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lists_of_labels_are_filled_up_to_one_width_and_may_be_empty(num_workers: int) -> None:
    dataset = Relabeled(200, broken=[4])
    features, labels = extract_features(tiny_backbone(), dataset, 3, num_workers)
    table = [[0, -1], [1, 2], [-1, -1]] * 67
    assert dataset.get_targets().tolist() == table[:200]
    assert labels.tolist() == table[:4] + table[5:200]
    assert len(features) == 199


def launch(folder: Path, world_size: int) -> list[dict]:
    """What each of several processes finds that share out the work of `eval_shared_work`."""
    run_in_processes("tests/support/eval_shared_work.py", [folder], world_size, options=("-W", "error"))
    return [json.loads((folder / f"results{rank}.json").read_text()) for rank in range(world_size)]


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = json.loads(json.dumps(shared_work(tmp_path / "one")))
    first, second = launch(tmp_path / "two", 2)
    for results in (first, second):
        torch.testing.assert_close(torch.tensor(results["features"]), torch.tensor(alone["features"]))
        assert results["knn"] == alone["knn"]
        assert results["linear"] == alone["linear"]
        assert alone["share"] == 7 and first["share"] == 4 and second["share"] == 3
        for name, weight in alone["heads"].items():
            torch.testing.assert_close(torch.tensor(results["heads"][name]), torch.tensor(weight))
    assert first["logreg"] == alone["logreg"] and second["logreg"] == {}
    assert (tmp_path / "two" / "model_final.pth").is_file()
