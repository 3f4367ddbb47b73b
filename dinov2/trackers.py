"""Curves elsewhere than in the metrics file: TensorBoard, Weights & Biases. Off unless the configuration asks.

A tracker is given every record that goes to the metrics file: {"iteration": 20, "lr": 0.1, "total_loss": 5.2, ...}.
None of them can stop a training: what goes wrong on the way is said once, and the run goes on without the tracker.
"""

import importlib
import json
import logging
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from dinov2.files import atomic_write, read_regular_file

logger = logging.getLogger(__name__)

Record = Mapping[str, float]
Tracker = Callable[[Record], None]

PATIENCE = 30.0
"""Seconds that Weights & Biases may take to begin, and at the end to upload; the rest is on disk for `wandb sync`."""


def check_trackers(*, tensorboard: bool, wandb_project: str) -> None:
    """See whether the packages of the trackers that are wanted are there.

    Raises:
        ValueError: naming the package to install.
    """
    if tensorboard:
        _check_package("torch.utils.tensorboard", "tensorboard", "tracking.tensorboard")
    if wandb_project:
        _check_package("wandb.errors", "wandb", "tracking.wandb_project")


def _check_package(module: str, package: str, key: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{key} needs a package that is missing: pip install {package}") from error


@contextmanager
def open_trackers(
    *,
    tensorboard: bool,
    wandb_project: str,
    wandb_name: str,
    wandb_mode: Literal["online", "offline"],
    output_dir: Path,
    start: int,
    config: Mapping[str, Any],
) -> Iterator[list[Tracker]]:
    """The trackers that are wanted; what they hold back is written when the context ends.

    Args:
        tensorboard: whether to write event files to `output_dir/tensorboard`.
        wandb_project: of Weights & Biases; empty: no tracker there.
        wandb_name: of the run there; empty: that of the output folder.
        wandb_mode: offline needs neither a network nor an account; `wandb sync` uploads what it leaves.
        output_dir: of the run, an existing folder. Another call with the same one continues the same curves.
        start: iteration that the run begins with now; what an earlier call was given from there on does not count.
        config: of the run, shown beside the curves.

    Raises:
        ValueError: a package is missing, or nobody is logged in to Weights & Biases.
    """
    check_trackers(tensorboard=tensorboard, wandb_project=wandb_project)
    wanted = {}
    if tensorboard:
        wanted["TensorBoard"] = _tensorboard(output_dir / "tensorboard", start, config)
    if wandb_project:
        wanted["Weights & Biases"] = _wandb(wandb_project, wandb_name, wandb_mode, output_dir, config)
    with ExitStack() as stack:
        yield [stack.enter_context(_Harmless(name, tracker)) for name, tracker in wanted.items()]


class _Harmless:
    """A tracker whose first failure is told and ends it; the ValueErrors of its opening are for the user."""

    def __init__(self, name: str, opening: AbstractContextManager[Tracker]) -> None:
        self._name, self._opening = name, opening
        self._track: Tracker | None = None

    def __enter__(self) -> Tracker:
        try:
            self._track = self._opening.__enter__()
        except ValueError:
            raise
        except Exception as error:
            self._give_up(error)
        return self

    def __call__(self, record: Record) -> None:
        if self._track is None:
            return
        try:
            self._track(record)
        except Exception as error:
            self._give_up(error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        was_tracking = self._track is not None
        try:
            self._opening.__exit__(kind, error, trace)
        except Exception as failure:
            if was_tracking:
                self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        self._track = None
        logger.warning("%s fails, the run goes on without it: %s: %s", self._name, type(error).__name__, error)


@contextmanager
def _tensorboard(folder: Path, start: int, config: Mapping[str, Any]) -> Iterator[Tracker]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=start)  # which hides former events from `start` on

    def track(record: Record) -> None:
        for name, value in by_group(record).items():
            writer.add_scalar(name, value, int(record["iteration"]))

    try:
        text = json.dumps(config, indent=2, default=str)
        writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), start)  # indented: verbatim
        yield track
    finally:
        writer.close()


@contextmanager
def _wandb(
    project: str, name: str, mode: Literal["online", "offline"], output_dir: Path, config: Mapping[str, Any]
) -> Iterator[Tracker]:
    import wandb

    failed = True
    try:
        with _exit_hooks_kept():
            wandb.setup(wandb.Settings(silent=True))  # it neither prints nor asks for a password
            run = wandb.init(
                project=project,
                name=name or output_dir.name,
                id=_run_id(output_dir / "wandb_run_id"),
                resume="allow",  # go on with that id if there is such a run
                mode=mode,
                dir=str(output_dir),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off", init_timeout=PATIENCE, finish_timeout=PATIENCE),
            )
        logger.info("Weights & Biases: %s", run.dir if mode == "offline" else run.url)
        yield lambda record: run.log(by_group(record), step=int(record["iteration"]))
        failed = False
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise ValueError(f"Weights & Biases: {error} (or set tracking.wandb_mode=offline)") from error
    finally:
        wandb.teardown(exit_code=int(failed))  # uploads, and ends the process that does it


@contextmanager
def _exit_hooks_kept() -> Iterator[None]:
    """Undo what wandb does to them: tracebacks show once, and `wandb.teardown` is told how the run ended."""
    hooks = sys.excepthook, sys.exit
    try:
        yield
    finally:
        sys.excepthook, sys.exit = hooks


def _run_id(path: Path) -> str:
    """The id in a file, which is made if there is none: the same run for all who resume in its folder.

    Raises:
        OSError: naming the file, if it cannot be read or written, or is damaged.
        ValueError: naming the file, if it is not a regular one.
    """
    if not path.exists():
        with atomic_write(path) as file:
            file.write(secrets.token_hex(4).encode())
    text = read_regular_file(path).decode(errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,128}", text, re.ASCII):
        raise OSError(f"{path} is damaged, it holds no id of a run: {text[:40]!r}; delete it to begin new curves")
    return text


_SCHEDULES = {"lr", "wd", "mom", "last_layer_lr", "teacher_temp", "current_batch_size"}


def by_group(record: Record) -> dict[str, float]:
    """The numbers of a record under the names that trackers sort into panels: loss/, schedule/, time/, health/."""

    def group(name: str) -> str:
        if name.endswith("_loss"):
            return "loss"
        if name in _SCHEDULES:
            return "schedule"
        return "time" if name.endswith("_time") or name == "data_wait" else "health"

    return {f"{group(name)}/{name}": value for name, value in record.items() if name != "iteration"}
