"""Stopping in time: a signal lets the current step end and its checkpoint be written before the process leaves."""

import logging
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch

from dinov2 import distributed

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""USR2: the scheduler's warning of a time limit or a preemption; TERM: an end within seconds; INT: Ctrl-C."""

REPEATS = 1.0
"""Seconds in which a signal may come several times and means once: from the terminal and from torchrun."""


class Interruption:
    """Catches the signals while the context is open; a second Ctrl-C acts at once.

    with Interruption() as interruption:
        for step in ...:
            ...
            if interruption.requested():  # on all processes alike
                save(step)
                interruption.leave()
    """

    def __init__(self) -> None:
        self.signum = 0
        self._noted = 0.0  # seconds, of time.monotonic
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._former = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._noted = signum, time.monotonic()
            name = signal.Signals(signum).name
            again = " (once more: at once)" if signum == signal.SIGINT else ""
            logger.warning("%s: the run stops after this step with a checkpoint%s", name, again)
        elif signum == signal.SIGINT == self.signum and time.monotonic() > self._noted + REPEATS:
            signal.signal(signum, self._former[signum])
            signal.raise_signal(signum)

    def requested(self) -> bool:
        """Whether any process was told to stop; to be asked by all of them after every step."""
        agreed = int(distributed.all_reduce_max(torch.tensor(self.signum)))
        if agreed:  # else leave it alone: a signal may have come while this process waited for the others
            self.signum, self._noted = agreed, self._noted or time.monotonic()
        return agreed != 0

    def leave(self) -> None:
        """End this process, now that everything is saved.

        Whoever handled the signal before gets it on rank 0: submitit requeues the job. The other processes wait for
        that, as the first one to leave takes the job down.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: with the usual status 128 + signal, or that of the former handler.
        """
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        former = self._former[self.signum]
        try:
            if callable(former) and distributed.is_main():
                former(self.signum, None)
        finally:
            distributed.barrier()
        raise SystemExit(128 + self.signum)
