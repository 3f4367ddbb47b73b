"""Log lines on the console and in files, and the end of a command: its exit status and last words."""

import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable
from copy import copy
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger(__name__)

# I20230417 17:55:51 1234 dinov2.train.train train.py:233] message
_FORMAT = "%(levelname).1s%(asctime)s %(process)d %(name)s %(filename)s:%(lineno)s] %(message)s"
_DATE_FORMAT = "%Y%m%d %H:%M:%S"
_LINE = re.compile(r"([A-Z])\d{8} [\d:]+ \d+ \S+ \S+\] (.*)")  # level and message of such a line
_LAST_BYTES = 1 << 16  # of a log file, in which `last_error` searches
_INTERRUPTED = "interrupted"
_UNPRINTABLE = "backslashreplace"  # for file names, which may contain any bytes


USER_ERRORS = (ValueError, OSError, FloatingPointError)
"""Errors caused by the user: a config, a file, a value, a full disk. They need no traceback; others are bugs.

So are those with a true attribute `caused_by_user`, which code must not catch like the others.
"""


class _ShortLine(logging.Formatter):
    """`17:55:51 message`, with the level if it is above INFO, and the name of the run if there are several."""

    def __init__(self, name: str = "") -> None:
        super().__init__("%(asctime)s " + (f"{name}: " if name else "").replace("%", "%%") + "%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        shown = copy(record)
        if hasattr(record, "in_short"):
            shown.msg, shown.args = record.in_short, ()
        if record.levelno > logging.INFO:
            shown.msg, shown.args = f"{record.levelname} {shown.getMessage()}", ()
        return super().format(shown)


class _Console(logging.Handler):
    """Lines on standard output, above the progress bar, in the form `in_short` of their record if it has one.

    The `last_words` of a record, which end a command, go to standard error; records with `only_in_file` are omitted.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # In one piece, as several processes may share the console.
            if hasattr(record, "last_words"):
                tqdm.write(f"{record.last_words}\n", file=sys.stderr, end="")
            elif not hasattr(record, "only_in_file"):
                tqdm.write(f"{self.format(record)}\n", file=sys.stdout, end="")
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A log file that never stops a run: if it cannot be written (a full disk), this is reported once."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - name of logging
        if not self.failed:
            self.failed = True
            logger.warning("cannot write the log file %s: %s; lines are lost", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # buffered lines do not fit on the disk
            sys.stderr.write(f"cannot write the end of the log file {self.baseFilename}: {error}\n")


def log_path(output_dir: str | Path, rank: int = 0) -> Path:
    """Log file of a process: `output_dir/logs/log.txt`, or `output_dir` itself if it ends in `.txt` or `.log`."""
    path = Path(output_dir)
    if path.suffix not in (".txt", ".log"):
        path = path / "logs" / "log.txt"
    return path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")


def log_of_job(output_dir: str | Path, rank: int) -> Path:
    """Where to look for the log of a process of a job; with several students they are in the folders of these."""
    path = log_path(output_dir, rank)
    of_students = Path(output_dir) / "*" / "logs"
    return of_students if not path.exists() and any(Path(output_dir).glob("*/logs/log.txt")) else path


def current_log() -> Path | None:
    """The log file of this process, if it has one."""
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, _LogFile)]
    return Path(files[0].baseFilename) if files else None


def setup_logging(
    output_dir: str | Path | None = None, rank: int = 0, level: int = logging.INFO, *, name: str = ""
) -> None:
    """Send all log lines and warnings to the console and, if an output folder is given, to a file in it.

    The console shows rank 0, and errors of the other ranks, with the name of the run, if any. Lines are appended to
    `log_path(output_dir, rank)`. Another call replaces the former one.
    """
    handlers: list[logging.Handler] = [_Console(level if rank == 0 else max(level, logging.ERROR))]
    if output_dir is not None:
        path = log_path(output_dir, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_fifo():  # opening it would wait for a reader
            raise OSError(errno.EINVAL, "a pipe cannot be the log file", str(path))
        handlers.append(_LogFile(path, encoding="utf-8", errors=_UNPRINTABLE))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, (_Console, _LogFile))]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        in_file = isinstance(handler, _LogFile)
        handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT) if in_file else _ShortLine(name))
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)


def run_command(command: Callable[[], int | None], *, after_interrupt: str = "") -> int:
    """Run a command of the user and return its exit status, 0 for None.

    `USER_ERRORS` are reported in one line, with the traceback in the log file only, and status 1. Other errors are bugs
    and raised. Ctrl-C is reported in one line too, with the hint `after_interrupt`, and status 130.
    """
    setup_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_UNPRINTABLE, line_buffering=True)  # a pipe or file gets each line at once
    try:
        return command() or 0
    except KeyboardInterrupt:
        text = _INTERRUPTED + (f"; {after_interrupt}" if after_interrupt else "")
        logger.error("%s", text, extra={"last_words": f"error: {text}"})
        return 130
    except Exception as error:
        if not isinstance(error, USER_ERRORS) and not getattr(error, "caused_by_user", False):
            raise
        logger.error("%s", error, exc_info=True, extra={"last_words": f"error: {error}"})
        return 1


def last_error(log: Path) -> str:
    """The error that the last line of a log file (`log_path`, need not exist) reports; "" if it reports none.

    A critical line has the exception that ends its traceback. An interruption by the user is not an error.
    """
    if not log.is_file():
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for index in reversed(range(len(lines))):
        if (match := _LINE.match(lines[index])) is None:
            continue
        level, message = match.groups()
        if level not in "EC" or message.startswith(_INTERRUPTED):
            return ""
        traceback = [line for line in lines[index + 1 :] if line.strip()]
        return traceback[-1] if level == "C" and traceback else message
    return ""
