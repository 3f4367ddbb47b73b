"""What is launched: a function, named as `module:function`, that every process calls with the parsed arguments."""

import argparse
import copy
import dataclasses
import importlib
import os
from pathlib import Path

from dinov2.run.failures import Failure


@dataclasses.dataclass(frozen=True)
class Task:
    """A function and its arguments; it finds the place of its process by itself (`dinov2.distributed`)."""

    function: str
    args: argparse.Namespace

    def call(self) -> int:
        """Import the function and call it; its result if that is an exit status, else 0."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)(self.args) or 0

    def call_as(self, rank: int, world_size: int, note: Path) -> int:
        """Call the function in one of several processes, which leaves a note when it fails."""
        note.unlink(missing_ok=True)  # of the same process before the job was requeued
        try:
            return self.call()
        except Exception as error:
            Failure.of(error, rank, world_size, self.args.output_dir).leave(note)
            raise

    def with_output_dir(self, job_id: str | None) -> "Task":
        """The same with an absolute output folder, and the job id in the place of `%j` if it is known."""
        args = copy.deepcopy(self.args)
        args.output_dir = os.path.abspath(args.output_dir or default_output_dir())
        if job_id is not None:
            args.output_dir = args.output_dir.replace("%j", job_id)
        return Task(self.function, args)


def default_output_dir() -> str:
    """Where a task without `--output-dir` writes: below DINOV2_OUTPUT_ROOT, or else below ./experiments."""
    return f"{os.environ.get('DINOV2_OUTPUT_ROOT', 'experiments')}/%j"
