"""The dry run recommends a number of steps for the number of images, with the overrides for it, and published ones."""

import logging
import shlex
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from test_preflight import PROCESSES
from tiny import run_train, write_images

from dinov2 import config
from dinov2.config import Config
from dinov2.data import make_dataset
from dinov2.flags import evaluation, visualization
from dinov2.train.preflight import plan
from dinov2.train.preflight.checks import check_settings
from dinov2.train.preflight.plan import advise_few_images, check_length, describe_length, recommended_epochs
from dinov2.train.stages.several_students import PlannedRun, planned_runs

CONTINUE = "train/continue_vits14"  # 256 images in a step, epochs of 250 steps, 1,000 frozen steps and 1,000 of a ramp


@pytest.mark.parametrize(
    ("recipe", "num_images", "steps"),
    [
        (CONTINUE, 1, 3_000),  # the backbone has 1,000 steps at its full rate, at least
        (CONTINUE, 7_680, 3_000),  # 100 times each
        (CONTINUE, 32_000, 12_500),
        (CONTINUE, 64_000, 25_000),
        (CONTINUE, 10_000_000, 25_000),  # as FINO
        ("train/continue_vitl14", 100_000, 9_750),
        ("train/vits14_1gpu", 100, 12_500),
        ("train/vits14_1gpu", 100_000, 77_500),
        ("train/vitl16_short", 1_281_167, 125_000),  # ImageNet-1k: the published number
        ("train/vitl14", 14_197_087, 625_000),  # ImageNet-22k: the published number
        ("train/vitg14", 142_109_386, 625_000),
        ("train/vitl14_distilled", 142_109_386, 625_000),  # the published number
        ("train/vitl14_gram", 142_109_386, 10_000),
    ],
)
def test_recommended_steps(recipe: str, num_images: int, steps: int) -> None:
    cfg = config.load(recipe)
    assert recommended_epochs(cfg, num_images, PROCESSES[recipe]) * cfg.train.OFFICIAL_EPOCH_LENGTH == steps


@pytest.mark.parametrize("recipe", PROCESSES)
def test_more_images_never_get_fewer_steps_and_larger_steps_never_more(recipe: str) -> None:
    cfg = config.load(recipe)
    by_images = [recommended_epochs(cfg, 3**power, 1) for power in range(18)]
    by_processes = [recommended_epochs(cfg, 10**6, 2**power) for power in range(12)]
    assert all(fewer <= more for fewer, more in pairwise(by_images))
    assert all(more >= fewer for more, fewer in pairwise(by_processes))


@pytest.mark.parametrize("recipe", PROCESSES)
@pytest.mark.parametrize("num_images", [10, 30_000, 10_000_000])
def test_a_run_with_the_printed_overrides_is_as_recommended_without_a_warning(recipe: str, num_images: int) -> None:
    def first_run(*overrides: str) -> PlannedRun:
        return planned_runs(Namespace(config_file=recipe, output_dir="", opts=list(overrides)), PROCESSES[recipe])[0]

    cfg, number = first_run()
    printed = describe_length(cfg, num_images, number)["recommended steps"]
    overrides = [word for word in printed.split() if "=" in word]
    assert overrides or "as configured" in printed
    cfg, number = first_run(*overrides)
    assert "as configured" in describe_length(cfg, num_images, number)["recommended steps"]
    assert check_length(cfg, num_images, number) == check_settings(cfg, number) == []


def test_the_overrides_shorten_warm_ups_that_would_fill_the_run() -> None:
    text = describe_length(config.load("train/vits14_1gpu"), 100, 1)["recommended steps"]
    assert text == (
        "12,500, the dataset 32000.0 times: optim.epochs=10 optim.warmup_epochs=1 teacher.warmup_teacher_temp_epochs=3 "
        "(our rule: 200 times, but 12,500 to 625,000 steps)"
    )


def test_the_steps_of_a_frozen_backbone_come_on_top() -> None:
    """With FINO's 10,000 the limits hold its 25,000 steps."""
    cfg = config.load(CONTINUE, ["optim.freeze_backbone_steps=10000"])
    assert recommended_epochs(cfg, 1, 1) * 250 == 12_000
    cfg = config.load(CONTINUE, ["optim.freeze_backbone_steps=30000"])
    assert recommended_epochs(cfg, 10**6, 1) * 250 == 32_000


@pytest.mark.parametrize("key", ["student.pretrained_weights", "MODEL.WEIGHTS", "init_from"])
def test_published_runs_are_those_of_the_same_start(key: str) -> None:
    assert "published: FINO, ViT-L" in describe_length(config.load("train/vitl14", [f"{key}=x"]), 100, 1)
    assert "published: DINOv2, ViT-L and g" in describe_length(config.load("train/vitl14"), 100, 1)


def published(cfg: Config) -> set[str]:
    return {name for name in describe_length(cfg, 10**8, 1) if name.startswith("published")}


def test_a_stage_is_compared_with_published_runs_of_this_stage(tmp_path: Path) -> None:
    assert published(config.load("train/vitl14_distilled")) == set(plan.PUBLISHED_DISTILLED)
    assert published(config.load("train/vitl14_gram")) == set(plan.PUBLISHED_GRAM)
    long_run = config.load("train/vitl14", ["gram.loss_weight=2", "gram.start_step=500000"])
    assert published(long_run) == set(plan.PUBLISHED_GRAM)
    assert recommended_epochs(long_run, 10**8, 96) == 500, "from random weights it is no short stage"

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "eval" / "best").mkdir(parents=True)
    (tmp_path / "eval" / "best" / "teacher_checkpoint.pth").touch()
    config.save(config.load("train/vitl14_distilled"), tmp_path / "config.yaml")  # 224 pixels
    for size, texts, steps in (
        (518, plan.PUBLISHED_HIGH_RESOLUTION, 10_000),
        (224, plan.PUBLISHED_FROM_WEIGHTS, 25_000),
    ):
        cfg = config.load("train/vitl14_highres", [f"init_from={tmp_path}", f"crops.global_crops_size={size}"])
        assert published(cfg) == set(texts)
        assert recommended_epochs(cfg, 10**8, 32) * cfg.train.OFFICIAL_EPOCH_LENGTH == steps
        assert recommended_epochs(cfg, 10**5, 32) * cfg.train.OFFICIAL_EPOCH_LENGTH == 4_900, "100 times"


def test_names_of_published_runs_fit_the_column_of_the_plan() -> None:
    tables = (plan.PUBLISHED_FROM_WEIGHTS, plan.PUBLISHED_FROM_SCRATCH, plan.PUBLISHED_DISTILLED)
    assert all(
        len(name) <= 32 for table in (*tables, plan.PUBLISHED_HIGH_RESOLUTION, plan.PUBLISHED_GRAM) for name in table
    )


def test_a_run_of_more_than_four_times_the_steps_gets_a_warning() -> None:
    assert check_length(config.load(CONTINUE, ["optim.epochs=48"]), 100, 1) == []
    assert check_length(config.load(CONTINUE, ["optim.epochs=49"]), 100, 1) == [
        "optim.epochs = 49 are 12,250 steps, 4.1 times the 3,000 recommended for 100 images (--dry-run prints the "
        "override): longer runs are seldom better"
    ]
    assert check_length(config.load("train/vitl14"), 14_000_000, 96) == []
    assert len(check_length(config.load("train/vitl14"), 1_000, 96)) == 1


def test_the_run_itself_warns_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_EXCESS", 0)
    with caplog.at_level(logging.WARNING):
        run_train(tmp_path, "optim.epochs=1", "health.period=0")
    assert sum("optim.epochs = 1 are 2 steps" in message for message in caplog.messages) == 1


def test_a_dry_run_recommends_steps_and_a_run_that_has_begun_keeps_its_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_train(tmp_path, "--dry-run")
    out = capsys.readouterr().out
    assert "recommended steps                100,000, the dataset 200.0 times: optim.epochs=50000 (our rule" in out
    assert "published: DINOv2, ViT-L short   125,000 steps of 2,048 images" in out
    assert "note: 2,000 images are few: first evaluate dinov2_vits14 as it is" in out
    run_train(tmp_path, "optim.epochs=1", "health.period=0")
    capsys.readouterr()
    run_train(tmp_path, "--dry-run")
    resumed = capsys.readouterr().out
    assert "resumes" in resumed
    assert "recommended steps" not in resumed and "images are few" not in resumed


# --- Few images ------------------------------------------------------------------------------------------------------


def with_images(cfg: Config, folder: Path) -> Config:
    """A config whose dataset is a folder with a space in its name."""
    return replace(cfg, train=replace(cfg.train, dataset_path=f"ImageFolder:root={folder}", output_dir="OUT"))


def advice(folder: Path, *overrides: str, recipe: str = CONTINUE) -> list[str]:
    cfg = with_images(config.load(recipe, overrides), folder)
    return advise_few_images(cfg, make_dataset(dataset_str=cfg.train.dataset_path))


def test_labeled_images_are_classified_by_the_frozen_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_WEIGHTS_URL", "https://mirror")
    for label in "ab":
        write_images(tmp_path / "my images" / label, 2)
    note, command = advice(tmp_path / "my images", recipe="train/continue_vits14_reg4")
    assert note == "note: 4 images are few: first evaluate dinov2_vits14_reg as it is, which may be all that you need:"
    python, program, *words = shlex.split(command)
    args = evaluation.knn_parser().parse_args(words)
    assert (python, program) == ("python", "dinov2/eval/knn.py")
    assert args.pretrained_weights == "dinov2_vits14_reg"
    assert args.train_dataset == f"ImageFolder:root={tmp_path / 'my images'}" and args.output_dir == "OUT/frozen_knn"
    assert config.load(args.config_file).student.num_register_tokens == 4


@pytest.mark.parametrize(
    ("overrides", "recipe", "flag", "source"),
    [
        ([], CONTINUE, "model", "dinov2_vits14"),
        (["student.pretrained_weights=my weights.pth"], CONTINUE, "pretrained_weights", "my weights.pth"),
        ([], "train/vitb14_1gpu", "model", "dinov2_vitb14"),
    ],
)
def test_images_without_labels_get_their_neighbors(
    overrides: list[str], recipe: str, flag: str, source: str, tmp_path: Path
) -> None:
    _, command = advice(write_images(tmp_path / "my images", 3), *overrides, recipe=recipe)
    python, module, *words = shlex.split(command.replace("python -m ", "python "))
    args = visualization.parse(words)
    assert (python, module, args.command) == ("python", "dinov2.visualization", "neighbors")
    assert getattr(args, flag) == source
    assert args.query == args.images == [f"ImageFolder:root={tmp_path / 'my images'}"]


def test_own_checkpoints_and_many_images_get_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path, 3)
    assert advice(folder, "student.pretrained_weights=", "init_from=OUT") == []
    monkeypatch.setattr(plan, "FEW_IMAGES", 3)
    assert advice(folder) == []
