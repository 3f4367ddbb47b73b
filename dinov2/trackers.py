"""Experiment trackers: TensorBoard and Weights & Biases. Both are off by default.

A tracker receives every record of the metrics file: {"iteration": 20, "lr": 0.1, "total_loss": 5.2, ...}.
A tracker never stops a training: its first error is logged, and the run continues without it.
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
from typing import Any, Literal

from dinov2.files import atomic_write, read_regular_file
from dinov2.metric_names import tracker_name

logger = logging.getLogger(__name__)

Record = Mapping[str, float]
Tracker = Callable[[Record], None]

PATIENCE = 30.0
"""Timeout in seconds of Weights & Biases at the start and for the final upload; `wandb sync` uploads what is left."""


def check_trackers(*, tensorboard: bool, wandb_project: str) -> None:
    """Check that the packages of the requested trackers are installed; a missing one is a ValueError that names it."""
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
    """Open the requested trackers, each a function of a record; they are flushed and closed when the context ends.

    Args:
        tensorboard: Whether to write event files to `output_dir/tensorboard`.
        wandb_project: Project of Weights & Biases; empty for no such tracker.
        wandb_name: Name of the run in the project; empty for the name of the output folder.
        wandb_mode: "offline" needs neither a network nor an account; `wandb sync` uploads the run later.
        output_dir: Existing output folder of the run. Another call with the same folder continues the same curves.
        start: First iteration of this session; records of an earlier session from this iteration on are hidden.
        config: Configuration of the run, shown beside the curves.
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
    """A tracker whose first error is logged and disables it; a ValueError while it opens is raised to the user."""

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

    def __exit__(self, *raised: Any) -> None:
        was_tracking = self._track is not None
        try:
            self._opening.__exit__(*raised)
        except Exception as failure:
            if was_tracking:
                self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        self._track = None
        logger.warning("%s failed, the run continues without it: %s: %s", self._name, type(error).__name__, error)


@contextmanager
def _tensorboard(folder: Path, start: int, config: Mapping[str, Any]) -> Iterator[Tracker]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=start)  # hides earlier events from `start` on

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
            wandb.setup(wandb.Settings(silent=True))  # neither prints nor prompts for a password
            run = wandb.init(
                project=project,
                name=name or output_dir.name,
                id=_run_id(output_dir / "wandb_run_id"),
                resume="allow",  # continues the run if it exists
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
        wandb.teardown(exit_code=int(failed))  # uploads, and ends the upload process


@contextmanager
def _exit_hooks_kept() -> Iterator[None]:
    """Undo what wandb does to `sys.excepthook` and `sys.exit`, so that a traceback is printed once."""
    hooks = sys.excepthook, sys.exit
    try:
        yield
    finally:
        sys.excepthook, sys.exit = hooks


def _run_id(path: Path) -> str:
    """The run id in a file, which is created if it does not exist, so that a resumed run keeps its id."""
    if not path.exists():
        with atomic_write(path) as file:
            file.write(secrets.token_hex(4).encode())
    text = read_regular_file(path).decode(errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,128}", text, re.ASCII):
        raise OSError(f"{path} is damaged, it contains no run id: {text[:40]!r}; delete it to start new curves")
    return text


def by_group(record: Record) -> dict[str, float]:
    """The values of a record, without its step, under the names that trackers sort into panels."""
    return {tracker_name(name): value for name, value in record.items() if name != "iteration"}
