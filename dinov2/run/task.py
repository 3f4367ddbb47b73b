"""The task of a launch: a function, named `module:function`, that each process calls with the parsed arguments."""

import argparse
import copy
import dataclasses
import importlib
import os
from pathlib import Path

from dinov2.run.failures import Failure


@dataclasses.dataclass(frozen=True)
class Task:
    """A function and its arguments; the function determines the rank of its process (`dinov2.distributed`)."""

    function: str
    args: argparse.Namespace

    def call(self) -> int:
        """Import and call the function; returns its exit status, 0 for None."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)(self.args) or 0

    def call_as(self, rank: int, world_size: int, failure_file: Path) -> int:
        """Call the function in one of several processes, which writes a record if it fails."""
        failure_file.unlink(missing_ok=True)  # from before the job was requeued
        try:
            return self.call()
        except Exception as error:
            Failure.of(error, rank, world_size, self.args.output_dir).write(failure_file)
            raise

    def with_output_dir(self, job_id: str | None) -> "Task":
        """Returns the task with an absolute output folder, in which a known job id replaces `%j`."""
        args = copy.deepcopy(self.args)
        args.output_dir = os.path.abspath(args.output_dir or default_output_dir())
        if job_id is not None:
            args.output_dir = args.output_dir.replace("%j", job_id)
        return Task(self.function, args)


def default_output_dir() -> str:
    """Default output folder: below DINOV2_OUTPUT_ROOT if set, else below ./experiments."""
    return f"{os.environ.get('DINOV2_OUTPUT_ROOT', 'experiments')}/%j"
