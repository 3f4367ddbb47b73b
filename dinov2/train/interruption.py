"""Stopping in time: a signal lets the current step end and its checkpoint be written before the process leaves."""

import logging
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch

from dinov2 import distributed
from dinov2.data.workers import LoadingError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""USR2: the scheduler's warning of a time limit or a preemption; TERM: an end within seconds; INT: Ctrl-C."""

REPEATS = 1.0
"""Seconds in which a signal may come several times and means once: from the terminal and from torchrun."""

GRACE = 20.0
"""Seconds after a signal that the images of the current step may still take; schedulers kill after 30 or more."""


class NoImages(LoadingError):
    """A signal came, and no images have come since."""


class Interruption:
    """Catches the signals while the context is open; a second Ctrl-C acts at once.

    with Interruption(save) as interruption:
        for step, images in ...:  # asks `interruption.check_wait` while it waits for images
            ...
            if interruption.requested():  # on all processes alike
                save()
                interruption.leave()

    Args:
        save: Completes the checkpoint of the last finished step; for a stop while images do not come.
    """

    def __init__(self, save: Callable[[], object] = lambda: None) -> None:
        self.save = save
        self.signum = 0
        self._noted = 0.0  # seconds, of time.monotonic
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._former = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, NoImages) and not distributed.is_enabled():
                logger.warning("%s: the run stops, with a checkpoint if a step was finished since the last one", error)
                self.save()
                self.leave()
        finally:
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

    def check_wait(self) -> None:
        """To be called now and then while images are waited for.

        Raises:
            NoImages: A signal came more than `GRACE` seconds ago. One process then stops with a checkpoint. Several
                cannot agree on that: the others may be in the middle of the step, waiting for this one.
        """
        if self.signum and time.monotonic() > self._noted + GRACE:
            name = signal.Signals(self.signum).name
            end = "; the last complete checkpoint counts" if distributed.is_enabled() else ""
            raise NoImages(f"no batch of images arrived within {GRACE:g} seconds of {name}{end}")

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
            KeyboardInterrupt: For SIGINT.
            SystemExit: With the usual status 128 + signal, or that of the former handler.
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
