"""Health metrics of a run: the values are right, and measuring changes nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import metrics, random_batch, run_train, tensors, tiny_config, tiny_model, write_images
from torch import Tensor, nn

from dinov2.data import make_dataset
from dinov2.train.monitor.best_teacher import rate_teacher
from dinov2.train.monitor.probe import Probe
from dinov2.train.monitor.probe_images import LabeledImages
from dinov2.train.monitor.target_stats import TargetStats, relative_distance
from dinov2.train.ssl_meta_arch import Predictions, Targets


def stats_of(cls: Tensor, patch: Tensor, features: Tensor) -> dict[str, float]:
    """The statistics of one micro-batch."""
    stats = TargetStats()
    stats.add(Targets(cls, patch), Predictions(None, None, None, features))
    return {name: float(value) for name, value in stats.compute().items()}


def test_targets_are_measured_as_defined() -> None:
    rows = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    found = stats_of(rows.view(2, 6, 6), rows[:5], torch.eye(4))
    entropies = -(rows * rows.log()).sum(dim=1)
    mean = rows.mean(dim=0)
    of_mean = -(mean * mean.log()).sum()
    winners = rows.argmax(dim=1).bincount(minlength=6)
    assert found["cls_target_entropy"] == pytest.approx(entropies.mean().item(), rel=1e-5)
    assert found["cls_target_information"] == pytest.approx((of_mean - entropies.mean()).item(), rel=1e-4)
    assert found["cls_target_perplexity"] == pytest.approx(of_mean.exp().item(), rel=1e-5)
    assert found["cls_target_capacity"] == pytest.approx(math.log(6), rel=1e-5)
    assert found["cls_prototypes_used"] == (winners > 0).sum()
    assert found["cls_largest_prototype"] == pytest.approx(winners.max().item() / 12)
    assert found["patch_target_capacity"] == pytest.approx(math.log(5), rel=1e-5)
    assert found["koleo_distance"] == pytest.approx(math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("alike", [torch.full((2, 20, 8), 1 / 8), torch.eye(8)[0].repeat(2, 20, 1)])
def test_equal_targets_have_no_information_whether_flat_or_sharp(alike: Tensor) -> None:
    assert stats_of(alike, alike[0], torch.eye(4))["cls_target_information"] == pytest.approx(0, abs=1e-5)


def test_a_batch_without_masked_patches_can_be_measured() -> None:
    found = stats_of(torch.eye(4).view(2, 2, 4), torch.empty(0, 4), torch.eye(2))
    assert found["patch_prototypes_used"] == 0


def test_distance_of_student_and_teacher_is_relative_to_the_teacher() -> None:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    ours, theirs = (torch.cat([p.detach().flatten() for p in side.parameters()]) for side in (student, teacher))
    assert float(relative_distance(student, teacher)) == pytest.approx(float((ours - theirs).norm() / theirs.norm()))


def test_measuring_changes_no_weight(tmp_path: Path) -> None:
    for name, period in (("with", 1), ("without", 0)):
        run_train(tmp_path / name, f"health.period={period}", "optim.epochs=2")
    first, second = tensors(tmp_path / "with", 3), tensors(tmp_path / "without", 3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "probe_cls_rank_me" in metrics(tmp_path / "with")[1]
    assert not (tmp_path / "without" / "health").exists()
    assert not any(name.startswith(("probe", "cls", "grad")) for name in metrics(tmp_path / "without")[0])


def test_a_run_writes_what_its_report_needs(tmp_path: Path) -> None:
    run_train(tmp_path, "health.knn_period=3")
    lines = {line["iteration"]: line for line in metrics(tmp_path)}
    assert [step for step in lines if "probe_cls_rank_me" in lines[step]] == [0, 2, 3, 5, 7]
    assert [step for step in lines if "knn" in lines[step]] == [0, 2, 3, 5, 7]
    assert all(0 <= line["knn"] <= 100 for line in lines.values() if "knn" in line)
    assert all(line["grad_norm_backbone"] > 0 for line in lines.values())
    images = np.load(tmp_path / "health" / "images.npz")["images"]
    assert images.shape == (8, 3, 28, 28)
    assert images.std(axis=0).max() > 10, "different images"
    dumps = sorted(path.name for path in (tmp_path / "health").glob("*.npy"))
    assert dumps == [f"patch_tokens_{step:07d}.npy" for step in (0, 3, 7)]
    model = tiny_model()
    stored = tensors(tmp_path, 7)
    model.load_state_dict({n.removeprefix("model."): v for n, v in stored.items() if n.startswith("model.")})
    normed = (torch.from_numpy(images) / 255 - torch.tensor(model.cfg.augmentation.mean).view(3, 1, 1)) / torch.tensor(
        model.cfg.augmentation.std
    ).view(3, 1, 1)
    tokens = model.teacher_features(normed)["x_norm_patchtokens"].unflatten(1, (4, 4))
    saved = torch.from_numpy(np.load(tmp_path / "health" / dumps[-1])).float()
    assert saved.shape == (8, 28, 28, 32), "as fine as shifted views make it"
    torch.testing.assert_close(saved[:, 3::7, 3::7], tokens, atol=5e-3, rtol=1e-2)


def test_the_record_of_a_measurement_is_written_even_between_log_periods(tmp_path: Path) -> None:
    run_train(tmp_path, "train.log_period=5", "health.period=100")
    assert [line["iteration"] for line in metrics(tmp_path)] == [0, 3, 5, 7]


def test_without_labels_the_teacher_is_rated_by_rank(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 10)
    run_train(tmp_path / "run", f"train.dataset_path=ImageFolder:root={images}", "optim.epochs=2")
    rating = json.loads((tmp_path / "run" / "eval" / "best" / "health.json").read_text())
    assert rating["signal"] == "probe_cls_rank_me"


def test_labels_may_come_from_another_dataset_and_must_exist(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 10)
    data = f"train.dataset_path=ImageFolder:root={images}"
    run_train(tmp_path / "run", data, "optim.epochs=1", "health.knn_dataset=FashionMNIST:split=VAL")
    assert "knn" in metrics(tmp_path / "run")[0]
    for wrong, why in ((f"ImageFolder:root={images}", "labels"), ("Birds", "unknown dataset 'Birds'")):
        with pytest.raises(ValueError, match=f"health.knn_dataset='{wrong}.*{why}"):
            run_train(tmp_path / "other", data, f"health.knn_dataset={wrong}")


def test_without_labels_nothing_is_measured_every_knn_period(tmp_path: Path) -> None:
    run_train(tmp_path, "health.knn_dataset=none", "health.knn_period=2", "evaluation.eval_period_iterations=0")
    assert [line["iteration"] for line in metrics(tmp_path) if "probe_cls_rank_me" in line] == [0, 3, 7]


def test_features_of_other_images_are_moved_away(tmp_path: Path) -> None:
    run_train(tmp_path / "run", "optim.epochs=2")
    images = write_images(tmp_path / "images", 10)
    run_train(tmp_path / "run", f"train.dataset_path=ImageFolder:root={images}")
    assert sorted(path.name for path in (tmp_path / "run" / "health").glob("*.npy")) == ["patch_tokens_0000007.npy"]
    moved = tmp_path / "run" / "health.earlier.1"
    assert sorted(path.name for path in moved.glob("*.npy")) == ["patch_tokens_0000000.npy", "patch_tokens_0000003.npy"]


def test_best_is_a_link_to_the_teacher_with_the_highest_value(tmp_path: Path) -> None:
    for iteration, measured in ((3, {"knn": 50.0}), (7, {"knn": 60.0}), (11, {"knn": 55.0}), (15, {})):
        folder = tmp_path / f"training_{iteration}"
        folder.mkdir()
        rate_teacher(folder, iteration, {"probe_cls_rank_me": 100 - iteration, **measured} if measured else {})
        assert (tmp_path / "best").resolve() == tmp_path / f"training_{3 if iteration == 3 else 7}"
    (tmp_path / "training_7" / "health.json").write_text("{")  # torn
    rate_teacher(tmp_path / "training_11", 11, {"knn": 55.0})
    assert (tmp_path / "best").resolve() == tmp_path / "training_11"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"no such thing"])
def test_damaged_images_of_earlier_measurements_do_not_stop_a_run(content: bytes, tmp_path: Path) -> None:
    run_train(tmp_path, "optim.epochs=2")
    (tmp_path / "health" / "images.npz").write_bytes(content)
    run_train(tmp_path)
    assert np.load(tmp_path / "health" / "images.npz")["images"].shape == (8, 3, 28, 28)


def test_the_metric_that_rates_teachers_is_configurable(tmp_path: Path) -> None:
    run_train(tmp_path, "health.best_by=patch_rank_me")
    ranks = {
        line["iteration"]: line["probe_patch_rank_me"] for line in metrics(tmp_path) if line["iteration"] in (3, 7)
    }
    best = max(ranks, key=lambda iteration: (ranks[iteration], iteration))
    assert (tmp_path / "eval" / "best").resolve().name == f"training_{best}"


def test_no_gradient_flows_through_the_statistics() -> None:
    model = tiny_model()
    batch = random_batch()
    [targets] = model.targets([batch], 0.05)
    predictions = model.predictions(batch)
    stats = TargetStats()
    stats.add(targets, predictions)
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in stats.compute().values())


# --- Metrics that are not informative --------------------------------------------------------------------------------


def write_classes(folder: Path, sizes: dict[str, int]) -> str:
    """Folders of so many photographs each, as a dataset string; no two are the same."""
    photographs = sorted(write_images(folder / "all", sum(sizes.values())).iterdir())
    for name, size in sizes.items():
        (folder / "classes" / name).mkdir(parents=True)
        for _ in range(size):
            path = photographs.pop()
            path.rename(folder / "classes" / name / path.name)
    return f"ImageFolder:root={folder / 'classes'}"


@pytest.mark.parametrize("sizes", [{f"P{i:02d}": 1 for i in range(9)}, {"only": 9}, {"many": 8, "one": 1}])
def test_without_two_classes_of_two_images_there_is_no_knn(
    sizes: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_classes(tmp_path, sizes)
    with caplog.at_level("INFO", "dinov2"):
        run_train(tmp_path / "run", f"train.dataset_path={data}", "optim.epochs=2")
    assert "k-NN: none, labels of two classes with two images each are needed" in caplog.text
    assert not any("knn" in line for line in metrics(tmp_path / "run"))
    assert "probe_cls_rank_me" in (tmp_path / "run" / "eval" / "best" / "health.json").read_text()
    with pytest.raises(ValueError, match=r"health.knn_dataset='ImageFolder.*two images each.*none switches k-NN off"):
        run_train(tmp_path / "named", f"train.dataset_path={data}", f"health.knn_dataset={data}")


def test_classes_of_one_image_are_left_out_of_knn(tmp_path: Path) -> None:
    data = write_classes(tmp_path, {"a": 3, "b": 1, "c": 4, "d": 1})
    probe = Probe(tiny_config(f"train.dataset_path={data}"), tiny_model(), make_dataset(dataset_str=data))
    assert probe.labeled is not None
    assert probe.labeled.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_images_under_two_labels_are_named_and_left_out_of_knn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_classes(tmp_path, {"a": 4, "b": 4})
    twice = next((tmp_path / "classes" / "a").iterdir())
    (tmp_path / "classes" / "b" / "z.png").symlink_to(twice)
    probe = Probe(tiny_config(f"train.dataset_path={data}"), tiny_model(), make_dataset(dataset_str=data))
    assert probe.labeled is not None and len(probe.labeled.labels) == 7
    assert "2 of 9 images for k-NN are identical to one of another class" in caplog.text
    assert str(twice) in caplog.text and "z.png (class 1)" in caplog.text
    for path in (tmp_path / "classes" / "a").iterdir():
        (tmp_path / "classes" / "b" / path.name).symlink_to(path)
    for path in (tmp_path / "classes" / "b").iterdir():
        if not path.is_symlink():
            (tmp_path / "classes" / "a" / path.name).symlink_to(path)
    everything_twice = make_dataset(dataset_str=data)
    assert Probe(tiny_config(f"train.dataset_path={data}"), tiny_model(), everything_twice).labeled is None


def test_an_unreadable_image_does_not_make_the_next_one_its_own_neighbor(tmp_path: Path) -> None:
    data = write_classes(tmp_path, {"a": 4, "b": 4})
    next((tmp_path / "classes" / "a").iterdir()).write_bytes(b"")
    probe = Probe(tiny_config(f"train.dataset_path={data}"), tiny_model(), make_dataset(dataset_str=data))
    assert probe.labeled is not None and sorted(probe.labeled.labels.tolist()) == [0, 0, 0, 1, 1, 1, 1]


def test_chance_is_what_guessing_reaches() -> None:
    images = Probe(tiny_config(), tiny_model(), make_dataset(dataset_str="FashionMNIST:split=VAL")).images
    labeled = LabeledImages(images, torch.arange(100), torch.arange(100) % 4, 10)
    assert "of 4 of 10 classes (health.knn_images=160 for all), each" in labeled.describe()
    assert labeled.chance == pytest.approx(100 * (0.25 + 2 * math.sqrt(0.25 * 0.75 / 100)))
    assert LabeledImages(images, torch.arange(4), torch.tensor([0, 0, 1, 1]), 2).chance == 100


@pytest.mark.parametrize(
    ("useless", "by"),
    [
        ({"knn": 0.0}, "probe_cls_rank_me"),
        ({"knn": 30.0, "knn_chance": 35.0}, "probe_cls_rank_me"),
        ({"knn": math.nan}, "probe_cls_rank_me"),
        ({"knn": 40.0, "knn_chance": 35.0}, "knn"),
    ],
)
def test_the_best_teacher_is_not_chosen_by_an_uninformative_metric(
    useless: dict[str, float], by: str, tmp_path: Path
) -> None:
    for iteration, rank in ((3, 9.0), (7, 5.0), (11, 5.0)):
        folder = tmp_path / f"training_{iteration}"
        folder.mkdir()
        rate_teacher(folder, iteration, {"probe_cls_rank_me": rank, **useless})
    assert json.loads((tmp_path / "best" / "health.json").read_text())["signal"] == by
    assert (tmp_path / "best").resolve().name == ("training_11" if by == "knn" else "training_3")
    (tmp_path / "training_15").mkdir()
    rate_teacher(tmp_path / "training_15", 15, {"probe_cls_rank_me": 1.0, "knn": 50.0, "knn_chance": 35.0})
    assert (tmp_path / "best").resolve().name == "training_15", "the best by k-NN"
    (tmp_path / "training_19").mkdir()
    rate_teacher(tmp_path / "training_19", 19, {"probe_cls_rank_me": math.nan, "knn": 35.0, "knn_chance": 35.0})
    assert (tmp_path / "best").resolve().name == "training_15"
    rate_teacher(tmp_path / "training_19", 19, {"probe_cls_rank_me": 1.0, "probe_distinct_images": 1.0})
    assert not (tmp_path / "training_19" / "health.json").exists()
