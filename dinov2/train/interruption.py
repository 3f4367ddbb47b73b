"""Handling of stop signals: the current step ends and a checkpoint is written before the process exits."""

import logging
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from dinov2 import distributed
from dinov2.data.workers import LoadingError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""USR2: the scheduler warns of a time limit or preemption; TERM: the process will be killed; INT: Ctrl-C."""

REPEATS = 1.0  # seconds in which repeated signals count once, such as those from the terminal and from torchrun

GRACE = 20.0  # seconds after a signal to wait for the images of the current step; schedulers kill after 30 or more


class NoImages(LoadingError):
    """No images arrived after a signal."""


class Interruption:
    """Context that handles stop signals; a second Ctrl-C takes effect immediately.

    with Interruption(save) as interruption:
        for step, images in ...:  # calls `interruption.check_wait` while waiting for images
            ...
            if interruption.requested():  # on all processes alike
                save()
                interruption.leave()

    `save` writes the checkpoint of the last finished step, if images do not arrive.
    """

    def __init__(self, save: Callable[[], object] = lambda: None) -> None:
        self.save = save
        self.signum = 0
        self._noted = 0.0  # seconds, of time.monotonic
        self._former: dict[int, Any] = {}
        with distributed.whole_job():
            self._alone = not distributed.is_enabled()

    def __enter__(self) -> "Interruption":
        self._former = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, NoImages) and self._alone:
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
            again = " (repeat it to stop immediately)" if signum == signal.SIGINT else ""
            logger.warning("%s: the run stops after this step with a checkpoint%s", name, again)
        elif signum == signal.SIGINT == self.signum and time.monotonic() > self._noted + REPEATS:
            signal.signal(signum, self._former[signum])
            signal.raise_signal(signum)

    def check_wait(self) -> None:
        """Raise NoImages more than `GRACE` seconds after a signal; to be called periodically while waiting for images.

        A single process then stops with a checkpoint. Several cannot agree on that: the others may be within the step,
        waiting for this one.
        """
        if self.signum and time.monotonic() > self._noted + GRACE:
            name = signal.Signals(self.signum).name
            end = "" if self._alone else "; resume from the last complete checkpoint"
            raise NoImages(f"no batch of images arrived within {GRACE:g} seconds of {name}{end}")

    def requested(self) -> bool:
        """Whether any process of the job received a signal; all processes must call this after every step."""
        with distributed.whole_job():
            agreed = int(distributed.all_reduce_max(torch.tensor(self.signum)))
        if agreed:  # otherwise unchanged: a signal may have come during the reduction
            self.signum, self._noted = agreed, self._noted or time.monotonic()
        return agreed != 0

    def leave(self) -> None:
        """End this process after everything is saved: a KeyboardInterrupt after SIGINT, else status 128 + signal.

        On rank 0 the former handler of the signal is called, by which submitit requeues the job and which may set
        another status. The other processes wait for it, because the first exit ends the job.
        """
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        former = self._former[self.signum]
        with distributed.whole_job():
            try:
                if callable(former) and distributed.is_main():
                    former(self.signum, None)
            finally:
                distributed.barrier()
        raise SystemExit(128 + self.signum)
