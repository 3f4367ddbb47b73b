"""Segmentation by k-NN of patches during training: values, sampling error, resumption, processes, errors, report."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_probe_work import dense_probe_work
from eval_processes import run_in_processes
from PIL import Image
from tiny import killed_after, metrics, run_train, tiny_config, tiny_model
from torch import Tensor

from dinov2.analysis.patch_segmentation import Patches, Standardizer, areas_by_image, mean_iou, to_patches
from dinov2.config import ConfigError
from dinov2.data import make_dataset
from dinov2.eval.dense.patch_probes import fit_knn, score_patches
from dinov2.report.__main__ import main as report
from dinov2.train.monitor.alarms import find_alarms
from dinov2.train.monitor.best_teacher import Rating, rate_teacher
from dinov2.train.monitor.conclusion import conclude
from dinov2.train.monitor.dense_images import DenseImages, MappedImages, _chance
from dinov2.train.monitor.probe import Probe
from dinov2.train.monitor.probe_images import ProbeImages
from dinov2.train.monitor.starting_point import START
from dinov2.train.preflight.checks import check_settings

SCENES = "FashionScenes:split=VAL:length=40:background=black"
DENSE = [f"health.dense_dataset={SCENES}", "health.dense_images=18"]
COLUMNS = ("patch_knn_miou", "patch_knn_error", "patch_knn_chance", "patch_knn_images")
CLASSES, GRID, PATCH = 4, 5, 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mapped(classes: Tensor) -> MappedImages:
    """Images without pixels, whose patches are of one class each: classes (n, GRID, GRID)."""
    maps = classes.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).to(torch.int16)
    return MappedImages(ProbeImages(torch.empty(0), torch.arange(len(maps)), []), maps)


def made_up(count: int = 12, seed: int = 0) -> tuple[DenseImages, Tensor, Tensor]:
    """Images of random classes, and the classes of the patches of bank and queries, (count, GRID * GRID)."""
    bank, queries = torch.randint(CLASSES, (2, count, GRID, GRID), generator=seeded(seed))
    sides = mapped(bank), mapped(queries)
    images = DenseImages(*sides, CLASSES, _chance(sides[0].maps, sides[1].maps, CLASSES))
    return images, bank.flatten(1), queries.flatten(1)


# --- Values ----------------------------------------------------------------------------------------------------------


def test_features_that_encode_classes_segment_without_error() -> None:
    images, bank, queries = made_up()
    centers = torch.randn(CLASSES, 16, generator=seeded(1))
    tokens = [
        centers[classes] + 0.01 * torch.randn(*classes.shape, 16, generator=seeded(2)) for classes in (bank, queries)
    ]
    found = images.scores(*tokens)
    assert found["patch_knn_miou"] == 100 and found["patch_knn_error"] == 0 and found["patch_knn_images"] == 12
    assert found["patch_knn_chance"] < 20


def test_random_features_are_near_chance() -> None:
    images, bank, queries = made_up(count=40)
    tokens = [torch.randn(*classes.shape, 16, generator=seeded(seed)) for seed, classes in enumerate((bank, queries))]
    found = images.scores(*tokens)
    guessed = 100 / 7  # random guesses of one of four classes: 1/16 of the pixels over 1/4 + 1/4 - 1/16
    assert found["patch_knn_miou"] == pytest.approx(guessed, abs=3)
    assert guessed < found["patch_knn_chance"] < guessed + 3


def test_features_that_are_not_finite_have_no_score() -> None:
    images, bank, _ = made_up()
    tokens = torch.randn(*bank.shape, 8)
    broken = tokens.clone()
    broken[3, 2] = torch.inf
    assert np.isnan(images.scores(tokens, broken)["patch_knn_miou"])
    assert np.isnan(images.scores(broken, tokens)["patch_knn_error"])


def test_the_value_is_that_of_the_evaluation_on_the_same_images() -> None:
    """FashionScenes has patches of several classes; a few pixels are ignored here."""
    cfg, model = tiny_config(*DENSE), tiny_model(*DENSE)
    probe = Probe(cfg, model, make_dataset(dataset_str=cfg.train.dataset_path))
    assert probe.dense is not None
    for each in (probe.dense.bank, probe.dense.queries):
        each.maps[:3, :9, :9] = -1
    sets = []
    for each in (probe.dense.bank, probe.dense.queries):
        tokens = probe._features(each.images)["x_norm_patchtokens"]
        sets.append(to_patches(tokens, each.maps, (4, 4)))
    standardize = Standardizer.of(sets[0].features)
    bank, queries = (Patches(standardize(each.features), each.labels) for each in sets)
    scores = score_patches(fit_knn(bank, ks=[10]), queries, 11)[10]
    assert probe.patch_knn()["patch_knn_miou"] == pytest.approx(100 * scores.mIoU, rel=1e-9)


def test_few_patches_are_all_neighbors() -> None:
    one = torch.zeros(1, GRID, GRID, dtype=torch.int64)
    images = DenseImages(mapped(one), mapped(one.repeat(2, 1, 1)), CLASSES, 0.0)
    images.bank.maps[0, PATCH:] = -1
    images.bank.maps[0, :, 2 * PATCH :] = -1  # two patches are left
    assert images.scores(torch.randn(1, 25, 8), torch.randn(2, 25, 8))["patch_knn_miou"] == 100


def test_the_mean_iou_is_that_of_a_loop_and_its_error_that_of_a_bootstrap() -> None:
    labels = torch.randint(-1, 3, (60, 40), generator=seeded(0))
    predictions = labels.clone()
    easy = torch.rand(60, generator=seeded(1))[:, None]  # images differ in difficulty
    wrong = torch.rand(60, 40, generator=seeded(2)) > easy
    predictions[wrong] = torch.randint(3, (int(wrong.sum()),), generator=seeded(3))
    predictions[labels == -1] = 2
    areas = areas_by_image(predictions, labels, 3)
    ious = []
    for index in range(3):
        mine, theirs = (labels == index), (predictions == index) & (labels != -1)
        ious.append(float((mine & theirs).sum() / (mine | theirs).sum()))
    found = mean_iou(areas)
    assert found.value == pytest.approx(np.mean(ious), rel=1e-6)
    draws = torch.randint(60, (2000, 60), generator=seeded(4))
    deviation = np.std([mean_iou(areas[draw]).value for draw in draws])
    assert found.error == pytest.approx(deviation, rel=0.06)
    predictions[0, labels[0] == 0] = -1
    assert mean_iou(areas_by_image(predictions, labels, 3)).value < 0.8 * found.value, "one more class, with IoU 0"


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("trained")
    run_train(output_dir, *DENSE)
    return output_dir


def test_a_run_has_the_columns_with_k_nn_and_a_resumed_one_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = metrics(trained)
    assert [record["iteration"] for record in records if "patch_knn_miou" in record] == [0, 3, 7]
    assert all(name in record for record in records if "knn" in record for name in COLUMNS)
    assert all(0 < record["patch_knn_miou"] < 100 for record in records if "knn" in record)
    with killed_after(5, monkeypatch):
        run_train(tmp_path, *DENSE)
    run_train(tmp_path, *DENSE)
    assert metrics(tmp_path) == records


def test_without_labels_of_images_it_has_its_own_period(tmp_path: Path) -> None:
    run_train(tmp_path, *DENSE, "health.knn_dataset=none", "health.knn_period=2", "health.best_by=patch_knn_miou")
    measured = {record["iteration"]: record for record in metrics(tmp_path) if "patch_knn_miou" in record}
    assert list(measured) == [0, 1, 3, 5, 7] and not any("knn" in record for record in measured.values())
    assert measured[7]["patch_knn_miou"] > measured[7]["patch_knn_chance"]
    rating = json.loads((tmp_path / "eval" / "training_7" / "health.json").read_text())
    assert rating == {"iteration": 7, "signal": "patch_knn_miou", "value": measured[7]["patch_knn_miou"]}


def test_the_starting_model_is_measured_and_the_conclusion_compares_with_it(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    standstill = ["optim.base_lr=0", "optim.min_lr=0", "teacher.momentum_teacher=1", "health.knn_dataset=none"]
    with caplog.at_level("INFO"):
        run_train(tmp_path, *DENSE, *standstill, f"student.pretrained_weights={trained / 'eval' / 'training_7'}")
    first, *_, last = (record for record in metrics(tmp_path) if "patch_knn_miou" in record)
    assert first["iteration"] == START and last["iteration"] == 7
    assert first["patch_knn_miou"] == last["patch_knn_miou"] == metrics(trained)[-1]["patch_knn_miou"]
    value = f"{first['patch_knn_miou']:.1f}"
    assert f"Dense features did not change measurably: mean IoU {value} -> {value} %" in caplog.messages[-1]
    assert "Whether continuing improved class tokens was not measured" in caplog.messages[-1]


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Of sharded weights; of 9 images in the bank and 9 queries their shares are unequal."""
    run_in_processes("tests/support/dense_probe_work.py", [tmp_path, *DENSE])
    alone = dense_probe_work(*DENSE)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, rel=1e-3)


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ("Birds", "unknown dataset 'Birds'"),
        ("FashionScenes:splt=VAL", "unknown key 'splt' .did you mean split"),
        ("SegmentationFolder:root=/nowhere", "nowhere"),
        ("FashionMNIST:split=VAL", "has no maps; segmentation maps are needed"),
        ("FashionScenes:split=VAL:kind=depth", "has depth maps; segmentation maps are needed"),
        ("FashionScenes:split=VAL:length=9", "9 images are too few; at least 16 are needed"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_wrong_dataset_is_an_error_before_the_first_step(dataset: str, why: str, dry: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s)health.dense_dataset='{dataset}': .*{why}"):
        run_train(tmp_path, f"health.dense_dataset={dataset}", *(["--dry-run"] if dry else []))
    assert not (tmp_path / "training_metrics.json").exists()


def folder_of_maps(root: Path, values: Callable[[int], np.ndarray]) -> str:
    """17 images of 20 x 30 pixels, and maps with these values; a dataset string."""
    for index in range(17):
        for kind, array in (("images", np.full((20, 30, 3), 9 * index, np.uint8)), ("masks", values(index))):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{index:02d}.png")
    return f"SegmentationFolder:root={root}"


def test_maps_of_one_class_or_of_another_size_are_errors(tmp_path: Path) -> None:
    dataset = folder_of_maps(tmp_path / "one", lambda index: np.ones((20, 30), np.uint8))
    with pytest.raises(ValueError, match=r"health.dense_dataset='.*': the 9 images of the bank have 1 class.*two are"):
        run_train(tmp_path / "out", f"health.dense_dataset={dataset}")
    wrong = folder_of_maps(
        tmp_path / "size", lambda index: np.indices((20, 30 + (index == 16)))[0].astype(np.uint8) // 10
    )
    with pytest.raises(ValueError, match=r"health.dense_dataset='.*': image .*16.png.* has 30 x 20 .* has 31 x 20"):
        run_train(tmp_path / "out", f"health.dense_dataset={wrong}", "--dry-run")


def test_typos_few_images_and_sides_are_errors_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"health.dense_images: expected an integer, at least 16, got 8"):
        tiny_config("health.dense_images=8")
    with pytest.raises(ConfigError, match=r"unknown key 'health.dense_data'; nearest known keys: health.dense_dataset"):
        tiny_config(f"health.dense_data={SCENES}")
    with pytest.raises(ConfigError, match=r"crops.global_crops_size = 30 is not a multiple of student.patch_size = 7"):
        tiny_config(*DENSE, "crops.global_crops_size=30")


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["health.best_by=patch_knn_miou"], "health.best_by = patch_knn_miou, health.dense_dataset = '': this is not"),
        ([*DENSE, "health.knn_period=0"], "health.knn_period = 0: k-NN of patches is not measured"),
    ],
)
def test_settings_without_effect_are_warnings(words: list[str], warning: str) -> None:
    assert any(warning in text for text in check_settings(tiny_config(*words), 1))


def test_the_dry_run_describes_the_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_train(tmp_path, *DENSE, "--dry-run")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("k-NN of patches"))
    assert (
        "9 images of " in line and " by the patches of 9 of " in line and line.endswith("with every teacher checkpoint")
    )


# --- Comparison with the start, best teacher, report -----------------------------------------------------------------


def records_of(values: list[float], knn: float = 70.0) -> list[dict[str, float]]:
    """A start with a mean IoU of 40 %, and a measurement every 20 steps."""
    shared = {
        **{"knn": knn, "knn_chance": 12.0, "knn_images": 1000.0, "drift_cls_cosine": 1.0, "probe_cls_rank_me": 20.0},
        **{"patch_knn_error": 1.5, "patch_knn_chance": 9.0, "patch_knn_images": 32.0, "probe_patch_similarity": 0.2},
    }
    values = [40.0, *values]
    return [
        {"iteration": 20 * index if index else START, "patch_knn_miou": value, **shared}
        for index, value in enumerate(values)
    ]


def test_dense_features_below_the_start_are_an_alarm() -> None:
    kind = "worse than the starting model"
    (alarm,) = (each for each in find_alarms(records_of([39, 36, 36, 35])) if each.kind == kind)
    assert alarm.finding == "the mean IoU of k-NN of patches is 35.0 %, that of the starting model 40.0 %"
    assert alarm.first == 40
    assert not [each for each in find_alarms(records_of([37.1] * 9)) if each.kind == kind], "two standard errors are 3"


@pytest.mark.parametrize(
    ("values", "best", "text"),
    [
        (
            [45, 50, 44],
            Rating(40, "patch_knn_miou", 50.0),
            " Dense features improved: mean IoU 40.0 -> 50.0 % of the teacher of step 40 by k-NN of patches on 32 "
            "images (+10.0 points, standard error 2.1, guessing up to 9.0 %).",
        ),
        ([41, 30], Rating(START, "knn", 70.0), "Dense features got worse: mean IoU 40.0 -> 30.0 % of the last teacher"),
        ([44], Rating(20, "knn", 70.0), "Dense features did not change measurably: mean IoU 40.0 -> 44.0 %"),
    ],
)
def test_the_conclusion_says_what_became_of_dense_features(values: list[float], best: Rating, text: str) -> None:
    found = conclude(records_of(values), best)
    assert text in found and found.index("k-NN on 1,000 images") < found.index("Dense features")


def test_a_teacher_chosen_by_its_patches_is_compared_by_its_own_k_nn() -> None:
    records = records_of([45, 50, 44])
    records[2] = {**records[2], "knn": 60.0}
    found = conclude(records, Rating(40, "patch_knn_miou", 50.0))
    assert found.startswith("Continuing made class tokens worse: 70.0 -> 60.0 %") and "no saved teacher" not in found


def test_the_best_teacher_by_dense_features_must_be_better_than_guessing(tmp_path: Path) -> None:
    def rate(iteration: int, value: float, chance: float) -> bool:
        folder = tmp_path / f"training_{iteration}"
        folder.mkdir()
        measured = {"knn": 90.0, "patch_knn_miou": value, "patch_knn_chance": chance, "probe_distinct_images": 1.0}
        rate_teacher(folder, iteration, measured, "patch_knn_miou")
        return (folder / "health.json").exists()

    assert not rate(3, 9.0, 9.5)
    assert rate(7, 30.0, 9.5) and rate(11, 20.0, 9.5)
    assert (tmp_path / "best").resolve().name == "training_7"


def test_the_report_has_the_curve_the_table_and_the_sentence(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report([str(trained), "--output", str(page)])
    text = " ".join(page.read_text().split())
    values = [record["patch_knn_miou"] for record in metrics(trained) if "patch_knn_miou" in record]
    assert "k-NN of patches, mIoU" in text and "health.dense_dataset, in which each pixel" in text
    assert "Features of patches, by which 9 images with class maps are segmented: the mean IoU" in text
    change = f"{values[0]:.1f} % at step 0 (untrained) to {values[-1]:.1f} % at step 7 (standard error of the diff"
    assert change in text
