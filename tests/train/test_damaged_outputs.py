"""Whatever has become of a file in a run's folder: an error that names it, or a warning, and never a traceback."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write_checkpoint
from tiny import run_train, tiny_config

from dinov2.files import folder_lock
from dinov2.log import last_error
from dinov2.metrics_file import read_records, truncate_metrics
from dinov2.report.images import gallery
from dinov2.report.read_run import read_run
from dinov2.train.checkpoint_files.folder import write_checksums
from dinov2.train.checkpoint_files.state import Setup, read_state
from dinov2.train.checkpoint_files.tensors import read_tensors
from dinov2.train.environment import read_environment
from dinov2.train.monitor.alarms import AlarmMonitor
from dinov2.train.monitor.best_teacher import rate_teacher, read_rating
from dinov2.train.training_run import changed_settings

VALUES = (
    None,
    True,
    -1,
    0.5,
    10**400,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    {},
    [[1]],
    {"a": {"b": None}},
    "\udc80",
)
RESULTS = {
    "evaluation": "knn",
    "metrics": {"full": {"10": {"top-1": 81.5}}, "per_class": [1.0, 2.0]},
    "settings": {"train_dataset": "A", "val_dataset": "B"},
    "weights": {"path": "eval/training_3/teacher_checkpoint.pth"},
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an evaluation."""
    output_dir = tmp_path_factory.mktemp("intact") / "out"
    run_train(output_dir, "optim.epochs=2", "train.log_period=1")
    (output_dir / "results_eval_knn.json").write_text(json.dumps(RESULTS))
    return output_dir


@pytest.fixture
def run(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / "out", symlinks=True)


# --- Damage ----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, generator: random.Random) -> Iterator[bytes]:
    """A file as faults and hands leave it, in a hundred ways."""
    yield from (b"", b"\0" * len(content), b"PK\3\4", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[1, 2]", b"1e999")
    yield from (generator.randbytes(200), content + content, content[len(content) // 2 :], content + b"\xff\n")
    for _ in range(20):
        yield content[: generator.randrange(len(content))]
    for _ in range(40):
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        yield bytes(flipped)
    yield from (damaged_json(content, generator) for _ in range(40))


def damaged_json(content: bytes, generator: random.Random) -> bytes:
    """JSON, or lines of it, in which a value is another one or missing."""
    try:
        text, rest = (content, b"") if content.count(b"\n{") == 0 else content.split(b"\n", 1)
        root = json.loads(text)
    except ValueError:
        return generator.randbytes(len(content))
    place: Any = root
    while isinstance(place, dict | list) and place:
        parent, key = place, generator.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = parent[key]
        if generator.random() < 0.3:
            break
    if generator.random() < 0.3:
        del parent[key]
    else:
        parent[key] = copy.deepcopy(generator.choice(VALUES))
    return json.dumps(root).encode() + (b"\n" + rest if rest else b"")


def reported(out: Path) -> None:
    """What a report reads before it draws anything."""
    found = read_run(out, "run")
    assert all(type(value) is float for record in found.records for value in record.values())


def drawn(out: Path) -> None:
    """The images of a report."""
    gallery(read_run(out, "run"))


def metrics_again(out: Path) -> None:
    """What a run that resumes does with its metrics."""
    path = out / "training_metrics.json"
    AlarmMonitor(read_records(path)).summary()
    truncate_metrics(path, 2)
    assert {record["iteration"] for record in read_records(path)} <= {0, 1}


def rated_again(out: Path) -> None:
    read_or_refuse(lambda: read_rating(out / "eval" / "best" / "health.json"))
    rate_teacher(out / "eval" / "training_3", 3, {"probe_cls_rank_me": 2.0}, "cls_rank_me")
    assert (out / "eval" / "best").is_dir()


def read_or_refuse(read: Callable[[], object]) -> None:
    try:
        read()
    except (ValueError, OSError) as error:
        assert str(error)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "metrics": ("training_metrics.json", metrics_again),
    "metrics of a report": ("training_metrics.json", reported),
    "environment": ("environment.json", lambda out: read_or_refuse(lambda: read_environment(out / "environment.json"))),
    "environment of a report": ("environment.json", reported),
    "config": ("config.yaml", lambda out: changed_settings(out / "config.yaml", tiny_config())),
    "config of a report": ("config.yaml", reported),
    "rating": ("eval/training_3/health.json", rated_again),
    "rating of a report": ("eval/training_3/health.json", reported),
    "images": ("health/images.npz", drawn),
    "tokens": ("health/patch_tokens_0000003.npy", drawn),
    "results": ("results_eval_knn.json", reported),
    "log": ("logs/log.txt", lambda out: last_error(out / "logs" / "log.txt")),
    "lock": (".lock", lambda out: folder_lock(out).__enter__()),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_stops_nothing_that_can_do_without_it(kind: str, run: Path) -> None:
    name, read = READERS[kind]
    content = (run / name).read_bytes()
    for number, damage in enumerate(damaged(content, random.Random(kind))):
        (run / name).write_bytes(damage)
        try:
            read(run)
        except Exception as error:
            error.add_note(f"damage {number}: {damage[:300]!r}")
            raise


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("instead", NO_FILES)
def test_what_is_no_file_is_not_waited_for(instead: str, kind: str, run: Path) -> None:
    name, read = READERS[kind]
    (run / name).unlink()
    NO_FILES[instead](run / name)
    read_or_refuse(lambda: read(run))


@pytest.mark.parametrize("instead", ["a pipe", "a folder"])
@pytest.mark.parametrize(
    "name", ["training_metrics.json", "logs/log.txt", ".lock", "checkpoints/model_0000003/.metadata"]
)
def test_a_run_that_needs_a_missing_file_raises_a_clear_error(name: str, instead: str, run: Path) -> None:
    (run / name).unlink()
    NO_FILES[instead](run / name)
    with pytest.raises((ValueError, OSError), match=name):
        run_train(run, "optim.epochs=3")


def test_another_configuration_there_stops_no_run(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")
    run_train(run, "optim.epochs=3")
    assert "cannot compare settings" in caplog.text and (run / "config.yaml").is_file()


@pytest.mark.parametrize("name", ["state.json", ".metadata", "__0_0.distcp", "checksums.json"])
@pytest.mark.parametrize("checksums", [True, False], ids=["", "of an earlier version"])
def test_a_damaged_checkpoint_is_refused(name: str, checksums: bool, tmp_path: Path) -> None:
    expected = {"model.a": torch.arange(12.0).view(3, 4), "model.b": torch.arange(5)}
    setup, meter = Setup(1, 4, 100, "0"), {"window": [9.0, 8.5], "count": 2, "total": 17.5}
    scaler = torch.amp.GradScaler("cpu").state_dict()
    state = {"images_seen": 32, "scaler": scaler, "metrics": {"total_loss": meter}, **setup._asdict()}
    folder = write_checkpoint(tmp_path / "model_0000007", {**expected}, **state)
    write_checksums(folder)
    path = folder / name
    content = path.read_bytes()
    if not checksums:
        (folder / "checksums.json").unlink()
    for damage in damaged(content, random.Random(name)):
        path.write_bytes(damage)
        try:
            found, tensors = read_state(folder), read_tensors(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error)
            continue
        if checksums or name == "__0_0.distcp":
            assert all(tensors[key].equal(value) for key, value in expected.items())
            assert found == {"iteration": 7, **state}
        assert isinstance(setup.changes_since(found), list)
