"""The flags of all commands: nearest names, and answers before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.flags import tools
from dinov2.flags.evaluation import knn_parser
from dinov2.flags.train import get_args_parser
from dinov2.models import export
from dinov2.tools import checkpoint_forms

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "dinov2/train/train.py",
    "dinov2/eval/knn.py",
    "dinov2/eval/linear.py",
    "dinov2/eval/log_regression.py",
    "dinov2/run/train/train.py",
    "dinov2/run/eval/knn.py",
    "dinov2/run/eval/linear.py",
    "dinov2/run/eval/log_regression.py",
    "dinov2/run/eval/retrieval.py",
    "dinov2/run/eval/tracking.py",
    "-m dinov2.curate",
    "-m dinov2.eval.extract",
    "-m dinov2.report",
    "-m dinov2.tools",
    "-m dinov2.visualization",
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--no-such-flag", 2)])
def test_help_and_unknown_flags_are_answered_without_importing_torch(command: str, flag: str, status: int) -> None:
    words = [sys.executable, "-X", "importtime", *command.split(), flag]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == status
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }
    assert "dinov2.flags" in imported
    assert not {"torch", "torchvision", "torchmetrics", "numpy", "PIL", "sklearn", "omegaconf"} & imported
    if flag == "--help":
        assert result.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dryrun"], "unrecognized arguments: --dryrun; did you mean --dry-run?"),
        (["--outputdir=OUT"], "unrecognized arguments: --outputdir=OUT; did you mean --output-dir?"),
        (["--dryrun", "--noresume"], "did you mean --dry-run, --no-resume?"),
        (["--zzz"], "unrecognized arguments: --zzz\n"),
    ],
)
def test_an_unknown_flag_of_the_training_gets_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        get_args_parser().parse_intermixed_args(["--config-file", "train/vitl16_short", *words])
    assert message in capsys.readouterr().err


def test_an_unknown_flag_of_a_command_of_the_tool_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tools.get_args_parser().parse_args(["convert", "a", "b", "--to", "hf", "--checkpointkey", "teacher"])
    assert "did you mean --checkpoint-key?" in capsys.readouterr().err


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        knn_parser().parse_args(["--config-file", "eval/vits14_pretrain", "--random-init", "--batch", "8"])
    assert "unrecognized arguments: --batch" in capsys.readouterr().err


def test_the_flags_list_all_forms_of_conversion() -> None:
    assert set(tools.CHECKPOINT_FORMS) == set(checkpoint_forms.FORMS)
    assert set(tools.BACKBONE_FORMS) == set(export.FORMS)
