"""Whatever has become of a file in a run's folder: an error that names it, or a warning, and never a traceback."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import run_train, tiny_config

from dinov2.log import read_records, truncate_metrics
from dinov2.train.alarms import AlarmBell
from dinov2.train.best_teacher import rate_teacher, read_rating
from dinov2.train.checkpoint_folder import find_checkpoint, read_tensors
from dinov2.train.checkpoint_state import Setup, read_state
from dinov2.train.environment import read_environment
from dinov2.train.report.pictures import gallery
from dinov2.train.report.run import read_run
from dinov2.train.train import changed_settings

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


def watched_run(out: Path) -> None:
    """What a report reads."""
    found = read_run(out, "run")
    gallery(found)
    assert all(type(value) is float for record in found.records for value in record.values())


def metrics_again(out: Path) -> None:
    """What a run that resumes does with its metrics."""
    path = out / "training_metrics.json"
    AlarmBell(read_records(path)).summary()
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
    "metrics of a report": ("training_metrics.json", watched_run),
    "environment": ("environment.json", lambda out: read_or_refuse(lambda: read_environment(out / "environment.json"))),
    "environment of a report": ("environment.json", watched_run),
    "config": ("config.yaml", lambda out: changed_settings(out / "config.yaml", tiny_config())),
    "config of a report": ("config.yaml", watched_run),
    "rating": ("eval/training_3/health.json", rated_again),
    "rating of a report": ("eval/training_3/health.json", watched_run),
    "images": ("health/images.npz", watched_run),
    "tokens": ("health/patch_tokens_0000003.npy", watched_run),
    "results": ("results_eval_knn.json", watched_run),
    "log": ("logs/log.txt", watched_run),
    "lock": (".lock", watched_run),
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


@pytest.mark.parametrize("name", ["state.json", ".metadata", "__0_0.distcp", "checksums.json"])
@pytest.mark.parametrize("checksums", [True, False], ids=["", "of an earlier version"])
def test_a_damaged_checkpoint_is_refused(name: str, checksums: bool, run: Path) -> None:
    folder = find_checkpoint(run)
    path, setup = folder / name, Setup(1, 4, 100, "0")
    content, expected = path.read_bytes(), read_tensors(folder)
    if not checksums:
        (folder / "checksums.json").unlink()
    for damage in damaged(content, random.Random(name)):
        path.write_bytes(damage)
        try:
            state, tensors = read_state(folder), read_tensors(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error)
            continue
        if checksums and name != "__0_0.distcp":
            assert damage == content or json.loads(damage) == json.loads(content), "else it is no accident"
        if name == "__0_0.distcp":
            assert all(tensors[key].equal(value) for key, value in expected.items())
        setup.changes_since(state)
