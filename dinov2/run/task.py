"""The task of a launch: a function, named `module:function`, that each process calls with the parsed arguments."""

import argparse
import copy
import dataclasses
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path

from dinov2.run.failures import Failure


@dataclasses.dataclass(frozen=True)
class Task:
    """A function and its arguments; the function determines the rank of its process (`dinov2.distributed`)."""

    function: str
    args: argparse.Namespace

    def load(self) -> Callable[[argparse.Namespace], int | None]:
        """Import the function, which returns its exit status, None for 0."""
        return pkgutil.resolve_name(self.function)

    def call_as(self, rank: int, world_size: int, failure_file: Path) -> int:
        """Call the function in one of several processes, which writes a record if it fails."""
        failure_file.unlink(missing_ok=True)  # from before the job was requeued
        try:
            return self.load()(self.args) or 0
        except Exception as error:
            Failure.of(error, rank, world_size, self.args.output_dir).write(failure_file)
            raise

    def with_output_dir(self, job_id: str | None) -> "Task":
        """Returns the task with an absolute output folder, in which a known job id replaces `%j`."""
        args = copy.deepcopy(self.args)
        default = f"{os.environ.get('DINOV2_OUTPUT_ROOT', 'experiments')}/%j"
        args.output_dir = os.path.abspath(args.output_dir or default)
        if job_id is not None:
            args.output_dir = args.output_dir.replace("%j", job_id)
        return Task(self.function, args)
