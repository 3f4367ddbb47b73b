"""The environment of a run: command, versions, hardware. `environment.json` has an entry for each start or resume.

    {"sessions": [{"first_step": 0, "date": "2026-11-23T14:18:21+00:00", "command": "python dinov2/train/train.py ...",
                   "data": "ImageFolder:root=/images", "processes": 1, "device": "...", "commit": "...", ...}, ...]}

Unknown values are null. The file does not name the machine; it contains no paths but those of the command and of the
dataset.
"""

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dinov2
from dinov2 import distributed
from dinov2.files import atomic_write, read_json

logger = logging.getLogger(__name__)

ENVIRONMENT_FILE = "environment.json"

_CLONE = Path(__file__).resolve().parents[2]
_COMMANDS = ("dinov2-train",)  # installed scripts


def record_environment(
    output_dir: Path, first_step: int = 0, data: str | None = None, changes: str | None = None
) -> None:
    """Append this session to `output_dir/environment.json` on rank 0; `first_step` 0 removes earlier sessions.

    `changes` are its settings that differ from those of the session before.
    """
    path = output_dir / ENVIRONMENT_FILE
    try:
        former = read_environment(path) if first_step > 0 else []
    except ValueError as error:
        damaged = path.with_suffix(".damaged.json")
        logger.warning("%s; it was renamed to %s, and earlier sessions are lost", error, damaged)
        path.replace(damaged)
        former = []
    with atomic_write(path) as file:
        file.write(json.dumps({"sessions": [*former, session(first_step, data, changes)]}, indent=2).encode() + b"\n")


def read_environment(path: Path) -> list[dict[str, Any]]:
    """Read the sessions of an environment file, oldest first; empty if the file is missing, a ValueError if damaged."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        return []
    sessions = content.get("sessions") if isinstance(content, dict) else None
    if not isinstance(sessions, list) or not all(map(_is_session, sessions)):
        raise ValueError(f"{path} is damaged: it is not a list of sessions with first_step and processes")
    return sessions


def _is_session(value: object) -> bool:
    """Whether a value has the form of `session`; earlier versions had fewer entries."""
    match value:
        case {"first_step": int(first_step), **others}:
            processes = others.get("processes", 1)
            kinds = all(entry is None or isinstance(entry, str | int) for entry in others.values())
            return 0 <= first_step < 2**63 and type(processes) is int and 0 < processes < 2**63 and kinds
    return False


def session(first_step: int, data: str | None = None, changes: str | None = None) -> dict[str, Any]:
    """Describe this process, its dataset and its machine."""
    on_gpu = distributed.device().type == "cuda"
    return {
        "first_step": first_step,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": reproducing_command(sys.argv),
        "data": data,
        "changed_settings": changes,
        "processes": distributed.world_size(),
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "dinov2": dinov2.__version__,
        **{name: _version(name) for name in ("torch", "torchvision", "numpy", "xformers")},
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        **_commit(),
    }


def reproducing_command(argv: Sequence[str]) -> str | None:
    """The command, relative to the top folder of the clone; None if a scheduler started another program."""
    program = Path(argv[0])
    if program.name in _COMMANDS:
        return shlex.join([program.name, *argv[1:]])
    if not program.resolve().is_relative_to(_CLONE / "dinov2"):
        return None
    return shlex.join(["python", str(program.resolve().relative_to(_CLONE)), *argv[1:]])


def cpu_name() -> str:
    """Model of the processor, or its architecture if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """Commit of the clone and number of changed tracked files; None without a clone or git."""
    top = _output("git", "-C", str(_CLONE), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != _CLONE:  # an installation may be inside of another repository
        return {"commit": None, "changed_files": None}
    changes = _output("git", "-C", str(_CLONE), "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _output("git", "-C", str(_CLONE), "rev-parse", "HEAD"),
        "changed_files": None if changes is None else len(changes.splitlines()),
    }


def _output(*command: str) -> str | None:
    """Standard output of a program; None if it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
