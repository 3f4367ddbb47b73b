"""--dry-run prints the plan of a run, trains and writes nothing, and fails on whatever would stop the run."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import CONFIG_FILE, run_script, run_train, tiny_model, write_images

from dinov2.train import train


def dry_run(output_dir: Path, *words: str, config_file: str | Path = CONFIG_FILE) -> None:
    args = ["--dry-run", "--config-file", str(config_file), "--output-dir", str(output_dir), *words]
    train.main(train.get_args_parser().parse_intermixed_args(args))


def test_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(tmp_path / "out", "optim.scaling_rule=sqrt_wrt_1024", "optim.base_lr=0.032")
    out = capsys.readouterr().out
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if re.match(r"[A-Za-z].*  +\S", line))
    head = 32 * 32 + 32 + 32 * 8 + 8 + 16 * 8 + 16
    assert facts["dataset"] == "FashionMNIST:split=VAL, 2,000 images"
    assert facts["global batch"] == "4 images (4 x 1 processes)"
    assert facts["peak learning rate"] == "0.002 (base_lr 0.032, sqrt_wrt_1024)"
    assert facts["optimizer steps"] == "8 (4 nominal epochs of 2)"
    assert facts["learning-rate warm-up"] == "2 steps"
    assert facts["learning rate"] == "0 at step 0, 0.002 at step 1, 0.0001349 at step 7"
    assert facts["weight decay"] == "0.04 to 0.3863"
    assert facts["teacher momentum"] == "0.9 to 0.996194"
    assert facts["teacher temperature"] == "0.04 to 0.07 at step 1, then constant"
    assert facts["last layer of the heads"] == "learns from step 0"
    assert facts["checkpoints"] == "4: every 2 steps and after the last one"
    assert facts["teacher checkpoints"] == "2: every 4 steps and after the last one"
    assert facts["images seen"] == "32, the dataset 0.0 times"
    assert facts["parameters of dino_head"] == f"{head:,}"
    assert facts["parameters of backbone"] == "30,944"
    assert re.fullmatch(
        r"[\d.]+ MFLOP per image, [\d.]+ MFLOP per step and process, [\d.]+ MFLOP in all", facts["compute"]
    )
    floor = r"[\d.e-]+ ms at 790 TFLOP/s \(an H200 in half precision\), about .* GFLOP/s \(this CPU in fp32\)"
    assert re.fullmatch(floor, facts["a step takes at least"])
    assert facts["memory per process, estimated"].startswith("0.00 GiB")
    assert "  momentum_teacher: 0.9\n" in out and "  lr: 0.002\n" in out, "the whole resolved config"


def test_settings_that_are_hardly_wanted_are_lines_that_begin_with_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And are computed for the processes of the run, here one, of a step of four images."""
    dry_run(tmp_path, "optim.min_lr=0.1", "teacher.warmup_teacher_temp_epochs=30", "dino.head_n_prototypes=1000")
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert warnings[0] == (
        "warning: teacher.warmup_teacher_temp_epochs = 30 is longer than the run (optim.epochs = 4): "
        "teacher.teacher_temp = 0.07 is never reached, it ends at 0.04356"
    )
    for text in (
        "optim.min_lr = 0.1 is above the peak learning rate 0.002",
        "dino.head_n_prototypes = 1000: 125 to each of the 8 class tokens in a step of 4 images",
    ):
        assert sum(text in warning for warning in warnings) == 1
    assert "teacher temperature              0.04 to 0.04356; 0.07 is not reached\n" in out
    assert "everything is in order" in out


def test_it_writes_nothing_touches_no_gpu_and_no_process_group(tmp_path: Path) -> None:
    dry_run(tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []
    assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()


def test_blocks_without_a_feed_forward_network_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(tmp_path, "student.ffn_layer=identity")
    assert "everything is in order" in capsys.readouterr().out


def test_it_does_not_import_the_compiler(tmp_path: Path) -> None:
    """Which PyTorch does to draw normal numbers on the meta device, and which takes a second."""
    words = ["--dry-run", "--config-file", str(CONFIG_FILE), "--output-dir", str(tmp_path / "out")]
    start = "import sys; from dinov2.train import train; imported = 'torch._dynamo' in sys.modules"
    run = f"train.main(train.get_args_parser().parse_intermixed_args({words}))"
    result = run_script("-c", f"{start}; {run}; assert imported or 'torch._dynamo' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_the_batch_of_all_processes_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"MASTER_ADDR": "node", "MASTER_PORT": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    for name, value in {**place, "WORLD_SIZE": "64"}.items():
        monkeypatch.setenv(name, value)
    dry_run(tmp_path, "optim.scaling_rule=linear_wrt_256", "optim.base_lr=0.1")
    out = capsys.readouterr().out
    assert "256 images (4 x 64 processes)" in out
    assert re.search(r"peak learning rate +0\.1 ", out)


def test_what_a_process_holds_and_sends_is_that_of_the_run_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """25.7 million parameters: 0.48 GiB of five copies; 0.28 GiB of them once for teacher, student and gradients.

    The activations are smaller than the gradients, which come after them.
    """
    settings = ["dino.head_n_prototypes=100000", "dino.head_bottleneck_dim=256", "train.batch_size_per_gpu=1"]
    dry_run(tmp_path, *settings)
    alone = capsys.readouterr().out
    assert re.search(r"estimated +0\.48 GiB \(weights, gradients and AdamW 0\.48 GiB, ", alone)
    assert "sharding " not in alone and "sent in a step" not in alone
    place = {"MASTER_ADDR": "node", "MASTER_PORT": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**place, "WORLD_SIZE": "64"}.items():
        monkeypatch.setenv(name, value)
    dry_run(tmp_path, *settings)
    shared = capsys.readouterr().out
    assert re.search(r"sharding +backbone SHARD_GRAD_OP, dino_head SHARD_GRAD_OP\n", shared)
    assert re.search(r"weights, gradients and AdamW 0\.01 GiB, gathered", shared)
    assert re.search(r"sent in a step +0\.28 GiB by a process, 0\.28 GiB by a machine of 4 to others", shared)


COMPUTE = {  # TFLOP of an image, of a step of a process, and of the run in millions; milliseconds
    "train/vitl16_short": ("1.12", "71.9", "8.99", "91.1"),
    "train/vitl14": ("1.34", "42.8", "26.8", "54.2"),
    "train/vitg14": ("4.88", "58.6", "36.6", "74.1"),
}


@pytest.mark.parametrize("recipe", COMPUTE)
def test_published_recipes_pass(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(
        tmp_path, "train.dataset_path=FashionMNIST:split=VAL", "student.attention_backend=xformers", config_file=recipe
    )
    out = capsys.readouterr().out
    assert "everything is in order" in out
    image, step, run, floor = COMPUTE[recipe]
    assert f" {image} TFLOP per image, {step} TFLOP per step and process, {run} EFLOP in all\n" in out
    assert f" {floor} ms at 790 TFLOP/s (an H200 in half precision), about " in out


# --- What is wrong ---------------------------------------------------------------------------------------------------


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def folder_of_broken_images(folder: Path, num_broken: int) -> Path:
    for path in sorted(write_images(folder, 20).iterdir())[:num_broken]:
        path.write_bytes(b"no image")
    return folder


Problem = Callable[[Path], list[str]]

PROBLEMS: dict[str, tuple[Problem, str]] = {
    "unknown dataset": (lambda _: ["train.dataset_path=Imagenet"], "Imagenet.*ImageNet"),
    "dataset without a root": (lambda _: ["train.dataset_path=ImageNet:split=TRAIN"], "root"),
    "no folder": (lambda tmp: [f"train.dataset_path=ImageFolder:root={tmp / 'none'}"], "no folder .*none"),
    "broken images": (
        lambda tmp: [f"train.dataset_path=ImageFolder:root={folder_of_broken_images(tmp / 'images', 2)}"],
        r"2 of 20 images tried cannot be read; the first: .*000\.png",
    ),
    "unknown key": (lambda _: ["optim.epoch=3"], "unknown key 'optim.epoch'.*optim.epochs"),
    "wrong value": (lambda _: ["optim.epochs=0"], "optim.epochs: expected an integer, at least 1, got 0"),
    "crop": (lambda _: ["crops.global_crops_size=30"], "30 is not a multiple of student.patch_size = 7"),
    "warm-up": (lambda _: ["optim.warmup_epochs=5"], "optim.warmup_epochs = 5 is longer"),
    "one prototype": (lambda _: ["dino.head_n_prototypes=1"], "dino.head_n_prototypes = 1"),
    "nothing to train": (lambda _: ["dino.loss_weight=0", "ibot.loss_weight=0"], "nothing to train"),
    "unknown arch": (lambda _: ["student.arch=vit_huge"], "vit_huge"),
    "no weights": (
        lambda _: ["student.pretrained_weights=/none.pth"],
        "student.pretrained_weights: no weights at /none.pth",
    ),
    "no model": (lambda _: ["MODEL.WEIGHTS=/none.pth"], "MODEL.WEIGHTS: no weights at /none.pth"),
    "no checkpoint": (lambda tmp: [f"MODEL.WEIGHTS={tmp}"], "cannot load the model from"),
    "pretrained weights of another model": (
        lambda tmp: (
            [f"student.pretrained_weights={saved(tmp / 'w.pth', tiny_model().student['backbone'].state_dict())}"]
            + ["student.depth=1"]
        ),
        "do not fit this backbone",
    ),
    "weights of another model": (
        lambda tmp: (
            [f"MODEL.WEIGHTS={saved(tmp / 'w.pth', {'teacher': tiny_model().teacher.state_dict()})}"]
            + ["dino.head_n_prototypes=3"]
        ),
        "w.pth does not hold a whole network",
    ),
}


@pytest.mark.parametrize(("problem", "message"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_what_would_stop_a_run_stops_the_dry_run(problem: Problem, message: str, tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match=f"(?s){message}"):
        dry_run(tmp_path / "out", *problem(tmp_path))


def test_changes_of_a_run_that_it_would_resume_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_train(tmp_path, "optim.epochs=1")
    dry_run(tmp_path, "optim.epochs=1")
    assert "with other settings" not in capsys.readouterr().out
    dry_run(tmp_path, "optim.epochs=2", "train.seed=5")
    assert re.search(
        r"\nwarning: resuming with other settings than before: (?=.*optim.epochs: 1 -> 2).*train.seed: 0 -> 5",
        capsys.readouterr().out,
    )
    with pytest.raises(ValueError, match=r"cannot resume from .*--no-resume.*there -> here: student.depth: 2 -> 3$"):
        dry_run(tmp_path, "student.depth=3")
    with pytest.raises(ValueError, match="trained with gram.loss_weight = 0.0, not 1.0"):
        dry_run(tmp_path, "gram.loss_weight=1", f"gram.teacher={tmp_path}")


def test_an_output_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot write to the output folder {tmp_path / 'file' / 'out'}"):
        dry_run(tmp_path / "file" / "out")
    with pytest.raises(OSError, match="cannot write to the output folder /proc/out"):
        dry_run(Path("/proc/out"))


def test_one_broken_image_is_a_warning_and_good_weights_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_broken_images(tmp_path / "images", 1)
    run_train(tmp_path / "out", "optim.epochs=1", "evaluation.eval_period_iterations=2")
    weights = tmp_path / "out" / "checkpoints" / "model_0000001"
    dump = tmp_path / "out" / "eval" / "training_1" / "teacher_checkpoint.pth"
    dry_run(
        tmp_path / "other",
        f"train.dataset_path=ImageFolder:root={folder}",
        f"MODEL.WEIGHTS={weights}",
        f"student.pretrained_weights={dump}",
    )
    printed = capsys.readouterr().out
    assert "warning: 1 of 20 images sampled cannot be read: the run stops once" in printed
    assert "above train.max_bad_image_share=0.01" in printed and "everything is in order but for" in printed
