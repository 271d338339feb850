"""Requests from outside that all ranks act on together: stop, or commit now.

    SIGTERM, SIGUSR1, SIGINT      to any rank: stop; so does SIGHUP, unless `nohup` has it ignored
    a file `stop` in the folder   the same, for people without a way to send signals
    a file `save-now`             commit at the next step boundary and go on
    [checkpoint] interval_seconds the same, by the clock
    something runs out            stop, as long as it can be done cleanly (`pipeline.resources`)

Files are seen by rank 0 and removed when they are seen. Ranks agree on a CPU group: between the
generator's micro steps, between held-out batches, and at every step boundary.
"""

import os
import signal
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.errors import UserError
from pipeline.resources import Shortage

SECOND_SIGNAL_SECONDS = 3.0
STOP_FILE, SAVE_FILE = "stop", "save-now"
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Requests:
    """What was asked for, the same on all ranks."""

    stop: bool
    """End the run after a commit."""
    save: bool
    """Commit and go on."""


class StopSignal:
    """Requests that reach one rank and that all ranks act on in the same step.

    The signal handler only sets a flag: a rank inside a collective could not do more. A second
    signal at least three seconds after the first ends the process at once (launchers often send
    two).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, control_group: dist.ProcessGroup | None = None) -> None:
        """Start without a request; signals can come before there is a world.

        Args:
            control_group: A gloo group of all ranks; None for a single process, or before `join`.
        """
        self._group = control_group
        self._folder: Path | None = None
        self._lost: Callable[[], str] = lambda: ""
        self._save_interval_seconds = 0.0
        self._saved_seconds = self._looked_seconds = time.monotonic()
        self._first_seconds: float | None = None
        self._wants_save = False
        self._shortage_number = 0
        self.name = ""
        self.shortage: Shortage | None = None
        """What runs out on some rank; known on all ranks once they have agreed to stop for it."""

    def install(self) -> None:
        """Take over the signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                signal.signal(number, self._handle)
            if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
                signal.signal(signal.SIGHUP, self._handle)

    def join(self, control_group: dist.ProcessGroup) -> None:
        """Agree with the other ranks from now on.

        Args:
            control_group: A gloo group of all ranks.
        """
        self._group = control_group

    def watch(
        self, folder: Path, save_interval_seconds: float, lost: Callable[[], str] = lambda: ""
    ) -> None:
        """Look for request files, at the clock and at the run folder's lock; for rank 0.

        Args:
            folder: The run folder.
            save_interval_seconds: Time between commits; 0 asks for none.
            lost: Says who has taken the run folder over; nothing while it is ours.
        """
        self._folder = folder
        self._lost = lost
        self._save_interval_seconds = save_interval_seconds
        self.saved()

    def saved(self) -> None:
        """Start the time to the next commit over."""
        self._saved_seconds = time.monotonic()
        self._wants_save = False

    def run_short(self, shortage: Shortage) -> None:
        """Ask all ranks to stop because of what runs out on this one.

        Args:
            shortage: What it is.
        """
        self._shortage_number = shortage.encode()

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if self._first_seconds is None:
            self._first_seconds = now
            self.name = signal.Signals(number).name
        elif now - self._first_seconds >= SECOND_SIGNAL_SECONDS:
            os._exit(128 + number)

    @property
    def received(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self._first_seconds is not None

    def agreed(self) -> bool:
        """Ask all ranks whether any of them has been asked to stop; a collective.

        Returns:
            The same answer on every rank.
        """
        return self.agreed_requests().stop

    def agreed_requests(self) -> Requests:
        """Ask all ranks for any request; a collective.

        Returns:
            The same answer on every rank.

        Raises:
            UserError: Somebody else has taken the run folder over; on all ranks.
        """
        self._look()
        lost = self._lost()
        wishes = [int(self.received), int(self._wants_save), int(bool(lost)), self._shortage_number]
        flags = torch.tensor(wishes)
        if self._group is not None and self._group.size() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        stop, save, is_lost, shortage_number = flags.tolist()
        if is_lost:
            raise UserError(lost or "rank 0 has lost the run folder; its message says to whom")
        if shortage_number and self.shortage is None:
            self.shortage = Shortage.decode(shortage_number)
            self.name = self.name or self.shortage.reason
        return Requests(bool(stop or shortage_number), bool(save))

    def _look(self) -> None:
        """See what files ask for, and whether it is time for a commit; now and then."""
        now = time.monotonic()
        if self._folder is None or now - self._looked_seconds < _LOOK_SECONDS:
            return
        self._looked_seconds = now
        if self._save_interval_seconds and now - self._saved_seconds >= self._save_interval_seconds:
            self._wants_save = True
        if self._take(SAVE_FILE):
            self._wants_save = True
        if self._take(STOP_FILE) and not self.received:
            self._first_seconds, self.name = now, f"the file {self._folder / STOP_FILE}"

    def _take(self, name: str) -> bool:
        """Remove a request file; False where there is none."""
        assert self._folder is not None
        try:
            (self._folder / name).unlink()
        except OSError:  # none, or a file system that does not answer: asked again in a second
            return False
        return True
