"""Whole commands on CUDA's host code: training with checkpoints and a resume, several processes, what reads a teacher.

All numbers are zeros on the stub: what is tested is that everything runs, on the device that it should.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rehearsal
from PIL import Image

pytestmark = pytest.mark.cuda

MODULES = [f"{side}.{name}" for side in ("student", "teacher") for name in ("backbone", "dino_head", "ibot_head")]
SETTINGS = [
    *(f"compute_precision.{module}.mixed_precision.param_dtype=bf16" for module in MODULES),
    *("student.embed_dim=128", "student.num_heads=2", "train.OFFICIAL_EPOCH_LENGTH=6", "optim.epochs=1"),
    *("optim.warmup_epochs=0", "teacher.warmup_teacher_temp_epochs=0", "train.checkpoint_period=2"),
    *("health.period=3", "evaluation.eval_period_iterations=3"),
]


def train_words(output_dir: Path, *overrides: str) -> list[str]:
    config_file = str(rehearsal.ROOT / "tests" / "train" / "tiny.yaml")
    return [
        "dinov2/train/train.py",
        "--config-file",
        config_file,
        "--output-dir",
        str(output_dir),
        *SETTINGS,
        *overrides,
    ]


def steps(output_dir: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (output_dir / "training_metrics.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(stub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints that was resumed for two steps, with compiled blocks."""
    output_dir = tmp_path_factory.mktemp("cuda") / "run"
    rehearsal.run(stub, *train_words(output_dir))
    output = rehearsal.run(stub, *train_words(output_dir, "optim.epochs=2", "train.augment_on=device"))
    assert "device cuda:0" in output and "resum" in output
    return output_dir


def test_a_run_writes_checkpoints_and_resumes(run: Path) -> None:
    assert steps(run) == list(range(12))
    names = sorted(path.name for path in (run / "checkpoints").glob("model_*"))
    assert names == ["model_0000007", "model_0000009", "model_0000011"]
    assert (run / "eval" / "training_11" / "teacher_checkpoint.pth").is_file()


def test_its_teacher_is_evaluated_drawn_and_exported(run: Path, stub: Path, tmp_path: Path) -> None:
    weights = ["--config-file", run / "config.yaml", "--pretrained-weights", run / "eval" / "training_11"]
    datasets = ["--train-dataset", "FashionMNIST:split=VAL", "--val-dataset", "FashionMNIST:split=VAL"]
    Image.new("RGB", (60, 40)).save(tmp_path / "image.png")
    image = ["--images", tmp_path, "--output", tmp_path / "pca.jpg"]
    knn = ["--output-dir", tmp_path / "knn", "--num-workers", "0", "--batch-size", "256"]
    assert "cuda" in rehearsal.run(stub, "dinov2/eval/knn.py", *weights, *datasets, *knn)
    rehearsal.run(stub, "-m", "dinov2.visualization", "pca", *weights, *image)
    rehearsal.run(stub, "-m", "dinov2.tools", "convert", run / "eval" / "training_11", tmp_path / "hf", "--to", "hf")
    tokens = ["--output", tmp_path / "features", "--tokens", "both", "--num-workers", "0"]
    rehearsal.run(stub, "-m", "dinov2.eval.extract", *weights, "--images", tmp_path / "image.png", *tokens)
    assert (tmp_path / "features" / "metadata.json").is_file()
    assert (tmp_path / "pca.jpg").is_file() and (tmp_path / "knn").is_dir() and (tmp_path / "hf").is_dir()


def test_heads_of_its_patch_tokens_are_trained_and_tested(run: Path, stub: Path, tmp_path: Path) -> None:
    weights = ["--config-file", run / "config.yaml", "--pretrained-weights", run / "eval" / "training_11"]
    scenes = "FashionScenes:split=VAL:length=20:kind"
    short = ["--iterations", "3", "--batch-size", "4", "--num-workers", "0", "--precision", "bf16"]
    for kind, more in (
        ("segmentation", ["--protocol", "dinov3"]),
        ("segmentation", ["--protocol", "capi", "--max-train-images", "10"]),
        ("depth", ["--protocol", "dinov3", "--max-depth", "5", "--train-crop", "28", "28"]),
    ):
        data = [flag for name in ("train", "val") for flag in (f"--{name}-dataset", f"{scenes}={kind}")]
        out = tmp_path / more[1] / kind
        printed = rehearsal.run(
            stub, f"dinov2/eval/dense/{kind}.py", *weights, *data, *short, *more, "--output-dir", out
        )
        assert (out / f"results_eval_{kind}.json").is_file(), printed


@pytest.mark.parametrize(("strategy", "starts"), [("FULL_SHARD", 2), ("HYBRID_SHARD", 1)])
def test_two_processes_shard_on_two_gpus_and_resume(strategy: str, starts: int, stub: Path, tmp_path: Path) -> None:
    overrides = [f"compute_precision.{module}.sharding_strategy={strategy}" for module in MODULES]
    for start in range(1, starts + 1):
        words = train_words(tmp_path / "run", *overrides, f"optim.epochs={start}")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        rehearsal.run(stub, *launch, *words, num_devices=2)
    assert steps(tmp_path / "run") == list(range(6 * starts))


def test_more_processes_than_gpus_are_refused_with_their_numbers(stub: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    result = subprocess.run(
        [sys.executable, *launch, *train_words(tmp_path / "run")],
        cwd=rehearsal.ROOT,
        env=rehearsal.environment(stub, 2),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert "3 processes on this machine" in result.stderr, result.stderr
    assert "2 GPUs: start at most" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_from_weights_measures_its_start_and_trains_with_a_frozen_backbone(
    run: Path, stub: Path, tmp_path: Path
) -> None:
    words = [f"student.pretrained_weights={run / 'eval' / 'training_11'}", "optim.freeze_backbone_steps=2"]
    words += [f"compute_precision.{module}.sharding_strategy=FULL_SHARD" for module in MODULES]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    output = rehearsal.run(stub, *launch, *train_words(tmp_path / "run", *words), num_devices=2)
    assert "step 0: features of 8 images differ by up to 0 from those of" in output
    assert steps(tmp_path / "run") == list(range(-1, 6))
    assert (tmp_path / "run" / "eval" / "start" / "teacher_checkpoint.pth").is_file()


def test_later_stages_and_bands_run_there(run: Path, stub: Path, tmp_path: Path) -> None:
    short = ["optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=3", "student.drop_path_rate=0", "train.augment_on=device"]
    stages = {
        "distilled": [f"distillation.teacher={run}", "student.embed_dim=64"],
        "anchored": [f"gram.teacher={run}", "gram.loss_weight=2"],
        "bands": ["images.bands=[0,1,2,0]", "train.dataset_path=ImageFolder:root=" + str(tmp_path / "images")],
    }
    (tmp_path / "images").mkdir()
    for number in range(8):
        Image.new("RGB", (60, 40), (number, 2, 3)).save(tmp_path / "images" / f"{number}.png")
    for name, words in stages.items():
        rehearsal.run(stub, *train_words(tmp_path / name, *short, *words))
        assert steps(tmp_path / name)[-1] == 2


def test_two_students_share_a_teacher_on_two_gpus(run: Path, stub: Path, tmp_path: Path) -> None:
    text = (
        (rehearsal.ROOT / "tests" / "train" / "tiny.yaml")
        .read_text()
        .replace("drop_path_rate: 0.3", "drop_path_rate: 0")
    )
    for name, width in (("small", 64), ("wide", 128)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("embed_dim: 32", f"embed_dim: {width}"))
    students = f"distillation.students=[{tmp_path}/small.yaml,{tmp_path}/wide.yaml]"
    (tmp_path / "both.yaml").write_text("distillation: {global_batch_size: 8}\n")
    words = [word for word in SETTINGS if not word.startswith("student.")]
    words += [students, f"distillation.teacher={run}", "train.OFFICIAL_EPOCH_LENGTH=3"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "dinov2/train/train.py"]
    files = ["--config-file", tmp_path / "both.yaml", "--output-dir", tmp_path / "out"]
    rehearsal.run(stub, *launch, *files, *words, num_devices=2)
    assert steps(tmp_path / "out" / "small") == steps(tmp_path / "out" / "wide") == list(range(3))
