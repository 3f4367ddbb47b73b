"""Training learns, on one process and on two alike; and the commands of training."""

import subprocess
from pathlib import Path

import pytest
import torch
from tiny import CONFIG_FILE, metrics, run_script, run_train, tensors, tiny_config, write_images

from dinov2 import config
from dinov2.data import make_dataset
from dinov2.run.launch import launch
from dinov2.train import train
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.training_run import build_loader


def test_thirty_steps_on_forty_images_learn_something(tmp_path: Path) -> None:
    settings = [f"train.dataset_path=ImageFolder:root={write_images(tmp_path / 'images', 40)}", *LEARNING]
    run_train(tmp_path, *settings)
    losses = [line["total_loss"] for line in metrics(tmp_path)]  # medians of the last 20
    assert len(losses) == 30
    assert losses[-1] < 0.9 * losses[0], "the loss falls"

    cfg = tiny_config(*settings)
    model = SSLMetaArch(cfg)
    stored = tensors(tmp_path, 29)
    model.load_state_dict({n.removeprefix("model."): v for n, v in stored.items() if n.startswith("model.")})
    student, teacher = (torch.cat([p.flatten() for p in side.parameters()]) for side in (model.student, model.teacher))
    distance = (student - teacher).norm() / student.norm()
    assert 0.001 < distance < 0.5, "the teacher follows the student and is not the same"

    batch = next(iter(build_loader(cfg, make_dataset(dataset_str=cfg.train.dataset_path), images_seen=600)))
    targets = model.targets([batch], cfg.teacher.teacher_temp)[0].cls.flatten(0, 1)
    features = model.teacher["backbone"](batch.global_crops)
    similarity = torch.nn.functional.cosine_similarity(features[None], features[:, None], dim=-1)
    assert targets.mean(0).max() < 0.5, "targets use many prototypes"
    assert targets.max(dim=-1).values.mean() > 1.5 / targets.shape[1], "and prefer some for each image"
    assert similarity.mean() < 0.95, "features of different images differ"


LEARNING = [
    *("optim.epochs=15", "optim.warmup_epochs=2", "optim.base_lr=0.004", "train.batch_size_per_gpu=20"),
    *("teacher.momentum_teacher=0.9", "student.drop_path_rate=0", "train.checkpoint_period=30"),
    *("teacher.warmup_teacher_temp_epochs=0", "teacher.teacher_temp=0.05", "evaluation.eval_period_iterations=0"),
]


def test_published_losses_can_be_logged_instead_and_change_nothing_else(tmp_path: Path) -> None:
    for name, setting in (("true", "false"), ("published", "true")):
        run_train(tmp_path / name, f"train.log_published_losses={setting}", "ibot.loss_weight=0.5", "optim.epochs=1")
    own, published = metrics(tmp_path / "true")[0], metrics(tmp_path / "published")[0]
    assert published["ibot_loss"] == pytest.approx(own["ibot_loss"])  # 0.5 of what is optimized at weight 0.5
    assert published["koleo_loss"] == pytest.approx(own["koleo_loss"] / 2)
    assert published["dino_local_crops_loss"] == pytest.approx(own["dino_local_crops_loss"])
    for line in (own, published):
        terms = [value for name, value in line.items() if name.endswith("_loss") and name != "total_loss"]
        assert line["total_loss"] == pytest.approx(sum(terms))
    first, second = tensors(tmp_path / "true", 1), tensors(tmp_path / "published", 1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        run_train(tmp_path / name, f"train.seed={seed}", "optim.epochs=1")
    first, second = metrics(tmp_path / "a")[0], metrics(tmp_path / "b")[0]
    assert all(first[name] != second[name] for name in first if name.endswith("_loss"))


# --- Several processes -----------------------------------------------------------------------------------------------


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    return run_script("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *words)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path: Path) -> None:
    """Without what is drawn for each process by itself: masks, stochastic depth, neighbors in the batch."""
    common = ["ibot.loss_weight=0", "dino.koleo_loss_weight=0", "student.drop_path_rate=0", "train.log_period=2"]
    run_train(tmp_path / "one", *common, "train.batch_size_per_gpu=6")
    words = ["--config-file", str(CONFIG_FILE), "--output-dir", str(tmp_path / "two"), *common]
    result = torchrun("dinov2/train/train.py", *words, "train.batch_size_per_gpu=3")
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stdout
    one, two = tensors(tmp_path / "one", 7), tensors(tmp_path / "two", 7)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)
    for ours, reference in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours["total_loss"] == pytest.approx(reference["total_loss"], rel=1e-4)
    assert (tmp_path / "two" / "logs" / "log.txt.rank1").exists()
    run_train(tmp_path / "two", *common, "train.batch_size_per_gpu=6", "optim.epochs=5")  # one process takes over
    assert [line["iteration"] for line in metrics(tmp_path / "two")] == [0, 2, 3, 4, 6, 7, 8, 9]  # health every 4 steps


# --- Commands --------------------------------------------------------------------------------------------------------


TRAIN, LAUNCHER = "dinov2/train/train.py", "dinov2/run/train/train.py"


@pytest.mark.slow
@pytest.mark.parametrize("script", [TRAIN, LAUNCHER])
def test_the_command_by_path_with_flags_and_overrides_in_any_order(script: str, tmp_path: Path) -> None:
    words = ["optim.epochs=1", "--config-file", str(CONFIG_FILE), "train.seed=3", "--output-dir", str(tmp_path)]
    result = run_script(script, *words, "--no-resume")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    cfg = config.load(tmp_path / "config.yaml")
    assert (cfg.optim.epochs, cfg.train.seed, cfg.train.output_dir) == (1, 3, str(tmp_path))
    assert cfg.optim.lr == 0.002, "the learning rate of the run is on record"
    assert (tmp_path / "checkpoints" / "model_0000001").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "status", "message"),
    [
        (TRAIN, ["optim.epoch=1"], 1, "error: unknown key 'optim.epoch'; nearest known keys: optim.epochs"),
        (TRAIN, ["train.dataset_path=ImageFolder:root=/nowhere"], 1, "error: no folder /nowhere"),
        (LAUNCHER, ["train.dataset_path=ImageFolder:root=/nowhere"], 1, "error: no folder /nowhere"),
        (LAUNCHER, ["optim.epoch=1"], 2, "error: unknown key 'optim.epoch'; nearest known keys: optim.epochs"),
        (TRAIN, ["--outptu-dir", "x"], 2, "unrecognized arguments: --outptu-dir"),
    ],
)
def test_a_user_error_is_reported_without_a_traceback(
    script: str, words: list[str], status: int, message: str, tmp_path: Path
) -> None:
    result = run_script(script, "--config-file", str(CONFIG_FILE), "--output-dir", str(tmp_path), *words)
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_a_dry_run_of_the_launcher_reckons_with_the_processes_it_would_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM
    words = ["--config-file", str(CONFIG_FILE), "--output-dir", str(tmp_path), "--dry-run"]
    status = launch(
        "dinov2.train.train:main", train.get_args_parser, "train", [*words, "--launcher", "local", "--ngpus", "2"]
    )
    assert status == 0
    assert "8 images (4 x 2 processes)" in capsys.readouterr().out


def test_the_published_flags_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    parser = train.get_args_parser()
    args = parser.parse_intermixed_args(["a.b=1", "--config-file", "x", "--output_dir", "y", "--eval-only", "c=2"])
    assert (args.config_file, args.output_dir, args.opts) == ("x", "y", ["a.b=1", "c=2"])
    assert (args.eval_only, args.no_resume, args.dry_run) == (True, False, False)
    for words, culprit in (([], "--config-file"), (["--config-file", "x", "--eval", "y"], "--eval")):
        with pytest.raises(SystemExit) as exit_info:
            parser.parse_intermixed_args(words)
        assert exit_info.value.code == 2 and culprit in capsys.readouterr().err


def test_the_record_of_a_run_is_a_config_for_another(tmp_path: Path) -> None:
    run_train(tmp_path / "first", "optim.epochs=1", "optim.scaling_rule=sqrt_wrt_1024")
    args = ["--config-file", str(tmp_path / "first" / "config.yaml"), "--output-dir", str(tmp_path / "second")]
    train.main(train.get_args_parser().parse_args(args))
    first, second = (config.load(tmp_path / name / "config.yaml") for name in ("first", "second"))
    assert first.optim.lr == second.optim.lr == 0.002 * (4 / 1024) ** 0.5, "scaled once, not twice"
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")
