"""Ends a run in which nothing happens any more, and says which rank the others wait for.

    1. mark        the training thread says that it got on, and where it is
    2. beat        a thread writes RUN/heartbeats/rank-00002.json every few seconds
    3. expire      no mark for max(hang_seconds, hang_step_factor x slowest recent step): the stacks
                   of all threads go to RUN/logs/stacks-rank-00002.txt
    4. watch       the ranks read each other's beats, as long as one of them still works
    5. conclude    the first rank writes RUN/logs/hang-START.txt and state.json; every rank what it
                   knows of its collectives (`pipeline.flight_record`); all exit with 86

Two threads: one only counts time and never touches a file, so that a file server that does not
answer is a hang like any other; the other does all that can block. A rank whose interpreter lock is
held can run neither: a thread of C then writes its stacks, and its peers miss its beats.
"""

import atexit
import contextlib
import faulthandler
import io
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from data_prep.errors import EXIT_HANG
from pipeline.config import SafetySection
from pipeline.flight_record import write_collectives
from pipeline.hang_report import (
    Beat,
    PeerWatch,
    Sighting,
    Verdict,
    judge,
    place_of,
    publish,
    seen_by,
    somebody_works,
    table,
)
from pipeline.run_folder import RunFolder
from pipeline.runtime import World

RECENT_STEPS = 50
FILE_SYSTEM_SECONDS = 15.0
"""A run folder that has not answered for so long, while nothing happens, is a part of the hang."""
_MAX_BEAT_SECONDS = 5.0
_MAX_TICK_SECONDS = 1.0
_MIN_WATCH_SECONDS = 2.0
_TOGETHER_SECONDS = 1.0
_SAYING_SECONDS = 2.0
_RECORDING_SECONDS = 5.0
_LOOKS_A_BEAT = 4
_MAX_COUNTED_TICKS = 5
"""Of a tick that took longer the rest is not counted: the process itself stood still."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Watches the training thread of one rank; `mark` is all that training calls often."""

    def __init__(self, run_folder: Path, world: World, section: SafetySection) -> None:
        """Prepare; nothing is watched before `start`.

        Args:
            run_folder: The run's folder.
            world: This process's place.
            section: [safety], for the limits.
        """
        self._folder = RunFolder(run_folder)
        self._beats = run_folder / "heartbeats"
        self._logs = run_folder / "logs"
        self._world = world
        self._section = section
        self._tick_seconds = min(_MAX_TICK_SECONDS, section.hang_seconds / 60)
        self._beat_seconds = min(_MAX_BEAT_SECONDS, section.hang_seconds / 12)
        self._watch_seconds = max(_MIN_WATCH_SECONDS, 2.5 * self._beat_seconds)
        self._start = f"{socket.gethostname()}-{os.getpid()}"
        self._marks = self._marks_before_step = 0
        self._phase, self._step = "start", 0
        self._recent_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._slowest_seconds: float | None = None
        self._stalled_seconds = 0.0
        self._marks_at_expiry: int | None = None
        self._beat_number = 0
        self._beat_problem = ""
        self._answered_seconds = time.monotonic()
        self._watch: PeerWatch | None = None
        self._ended = threading.Event()
        self._look_now = threading.Event()
        self._stacks: TextIO | None = None
        self._is_recording = False
        self._main_thread = threading.get_ident()
        self._threads: list[threading.Thread] = []
        self._listeners: list[Callable[[str, int], None]] = []

    def start(self) -> None:
        """Begin to watch the calling thread."""
        self._main_thread = threading.get_ident()
        self._stacks = self._open_stacks()
        self._threads = [
            threading.Thread(target=self._keep_time, name="watchdog", daemon=True),
            threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._await_verdict)

    def join(self, group: dist.ProcessGroup | None) -> None:
        """Agree on a name of this start, by which ranks know each other's beats; a collective.

        Args:
            group: The control group of all ranks; None for a single process.
        """
        number = torch.tensor([secrets.randbits(48)])
        if group is not None and group.size() > 1:
            dist.broadcast(number, 0, group=group)
        self._start = f"{int(number):012x}"
        self._look_now.set()  # under the new name from now on

    def mark(self, phase: str, step: int) -> None:
        """Say that training got on; cheap enough for every micro step.

        Args:
            phase: What comes now, such as "data", "step", "evaluate" or "save".
            step: Completed optimizer steps.
        """
        if step != self._step:
            self._step, self._marks_before_step = step, self._marks
        self._phase = phase
        self._marks += 1
        for listener in self._listeners:
            listener(phase, step)

    def listen(self, listener: Callable[[str, int], None]) -> None:
        """Pass on every mark from now on, to what measures the parts of a step.

        Args:
            listener: Called with what `mark` gets, in the thread that marks.
        """
        self._listeners.append(listener)

    @property
    def step(self) -> int:
        """Completed optimizer steps, as the newest mark says."""
        return self._step

    def step_ended(self, seconds: float) -> None:
        """Learn how long a step takes.

        Args:
            seconds: Of the step that just ended, without evaluation and commit.
        """
        if self._slowest_seconds is not None:  # the first one compiles and warms up
            self._recent_seconds.append(seconds)
        self._slowest_seconds = max(self._recent_seconds, default=0.0)

    @property
    def limit_seconds(self) -> float:
        """How long this rank may be without progress now."""
        if self._slowest_seconds is None:
            return self._section.startup_seconds
        slow_steps = self._section.hang_step_factor * self._slowest_seconds
        return max(self._section.hang_seconds, slow_steps)

    def stop(self) -> None:
        """End watching; waits for the verdict where training ends because its peers are hanging."""
        self._await_verdict()
        atexit.unregister(self._await_verdict)
        self._ended.set()
        self._look_now.set()
        for thread in self._threads:
            thread.join(timeout=self._beat_seconds)
        self._threads = []
        faulthandler.cancel_dump_traceback_later()
        self._close_stacks()

    def _await_verdict(self) -> None:
        """Keep an expired rank from ending with another code when its peers' exits break it."""
        if self._threads and self._marks_at_expiry == self._marks:
            self._ended.wait(self._watch_seconds + 2 * FILE_SYSTEM_SECONDS)

    # The thread that counts time: nothing here may block.

    def _keep_time(self) -> None:
        before, marks = time.monotonic(), self._marks
        expired_seconds = 0.0
        while not self._ended.wait(self._tick_seconds):
            now = time.monotonic()
            # Time in which this thread did not run either, such as a suspended job's, is no hang.
            passed = min(now - before, _MAX_COUNTED_TICKS * self._tick_seconds)
            before = now
            self._stalled_seconds = 0.0 if marks != self._marks else self._stalled_seconds + passed
            marks = self._marks
            self._arm_stack_dump()
            if self._stalled_seconds <= self.limit_seconds:
                self._marks_at_expiry = None
            elif self._marks_at_expiry is None:
                self._marks_at_expiry, expired_seconds = marks, now
                self._look_now.set()
            elif now - max(expired_seconds, self._answered_seconds) > FILE_SYSTEM_SECONDS:
                self._exit(f"the run folder {self._folder.path} does not answer either")

    def _arm_stack_dump(self) -> None:
        """Let a thread of C write the stacks, unless this one comes back before the limit."""
        if self._stacks is not None and not self._is_recording:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                faulthandler.dump_traceback_later(self.limit_seconds, file=self._stacks)

    # The thread that reads and writes: everything here may block or fail.

    def _keep_beating(self) -> None:
        while not self._ended.is_set():
            self._look_now.clear()
            try:
                self._write_beat()
                if self._marks_at_expiry is None:
                    self._forget()
                else:
                    self._examine()
                self._answered_seconds = time.monotonic()
            except Exception:  # nobody expects it; the other thread still ends a rank that hangs
                logger.exception("rank %d: no heartbeat", self._world.rank)
            has_expired = self._marks_at_expiry is not None
            self._look_now.wait(self._beat_seconds / (_LOOKS_A_BEAT if has_expired else 1))
        self._write_beat()  # where peers that still wait for this rank find its name

    def _write_beat(self) -> None:
        try:
            if self._beat_number == 0:  # and never again: a folder that is gone stays gone
                self._beats.mkdir(parents=True, exist_ok=True)
            self._own_beat().write(self._beats)
            self._beat_problem = ""
        except OSError as error:
            self._beat_problem = str(error)

    def _own_beat(self) -> Beat:
        own = [thread.ident for thread in self._threads if thread.ident is not None]
        place = place_of(sys._current_frames(), self._main_thread, own)
        self._beat_number += 1
        return Beat(
            self._world.rank,
            socket.gethostname(),
            os.getpid(),
            self._start,
            self._beat_number,
            unix_seconds=time.time(),
            phase=self._phase,
            step=self._step,
            marks=self._marks - self._marks_before_step,
            stalled_seconds=self._stalled_seconds,
            limit_seconds=self.limit_seconds,
            at=place.at,
            waits_in=place.waits_in,
        )

    def _forget(self) -> None:
        if self._watch is not None:
            logger.warning("rank %d gets on again after it seemed to hang", self._world.rank)
            self._watch = None

    def _examine(self) -> None:
        """Look at the others once; concludes as soon as nobody works any more."""
        if self._watch is None:
            self._dump_stacks()
            self._watch = PeerWatch(
                self._beats, self._world.world_size, self._start, self._watch_seconds
            )
        sightings = seen_by(self._watch.look(), self._own_beat())
        is_concluded = self._report_file.exists()
        if is_concluded or (self._watch.is_long_enough and not somebody_works(sightings)):
            self._conclude(sightings)

    @property
    def _report_file(self) -> Path:
        return self._logs / f"hang-{self._start}.txt"

    def _conclude(self, sightings: list[Sighting]) -> None:
        """Write the verdict, or wait until another rank has; then end this process."""
        verdict = judge(sightings, self._stalled_seconds)
        if self._beat_problem:
            reason = f"hang: which rank is behind is not known, no beats ({self._beat_problem})"
            verdict = Verdict((), reason)
        is_first = True
        with contextlib.suppress(OSError):  # without room for it, every rank says what it knows
            is_first = publish(self._report_file, verdict, sightings)
        if is_first or not self._another_has_concluded():
            with contextlib.suppress(OSError):
                self._folder.write_status("hang", None, verdict.reason)
            text = "\n".join([verdict.reason, *table(sightings)])
            _say(f"{text}\nstacks of all threads: {self._logs}/stacks-rank-*.txt")
            logger.error("%s", text)
        self._record_collectives()
        # Together: the first exit breaks the collectives that the others are waiting in.
        time.sleep(max(_TOGETHER_SECONDS, self._beat_seconds / 2))
        self._exit(f"{self._report_file} says which rank is behind")

    def _record_collectives(self) -> None:
        """Write what torch knows of the collectives.

        It asks the device, which may never answer, while it holds the interpreter's lock: the
        thread of C then ends the process. The verdict is on the disk already.
        """
        self._is_recording = True
        if self._stacks is not None:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                faulthandler.dump_traceback_later(_RECORDING_SECONDS, file=self._stacks, exit=True)
        write_collectives(self._logs, self._world.rank)
        faulthandler.cancel_dump_traceback_later()

    def _another_has_concluded(self) -> bool:
        """Wait for the first rank's state.json: a launcher may kill it when this process exits."""
        deadline = time.monotonic() + self._watch_seconds
        state = self._folder.path / "state.json"
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                reason = self._report_file.read_text(encoding="utf-8").partition("\n")[0]
                self._answered_seconds = time.monotonic()
                if reason and json.loads(state.read_text(encoding="utf-8"))["reason"] == reason:
                    return True
            time.sleep(self._tick_seconds)
        return False

    def _situation(self) -> str:
        return (
            f"rank {self._world.rank}: no progress for {self._stalled_seconds:.0f} s in phase "
            f'"{self._phase}" of step {self._step:,}'
        )

    def _exit(self, why: str) -> None:
        text = f"{self._situation()}; exit code {EXIT_HANG}; {why}"
        # A terminal that takes no more text is no reason to stay.
        saying = threading.Thread(target=_say, args=(text,), daemon=True)
        saying.start()
        saying.join(timeout=_SAYING_SECONDS)
        os._exit(EXIT_HANG)

    def _open_stacks(self) -> TextIO | None:
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            return self._stacks_file.open("a", encoding="utf-8")
        except OSError:
            return sys.__stderr__

    @property
    def _stacks_file(self) -> Path:
        return self._logs / f"stacks-rank-{self._world.rank:05d}.txt"

    def _dump_stacks(self) -> None:
        stacks = self._stacks or sys.stderr
        with contextlib.suppress(OSError, ValueError):
            print(f"\n{time.strftime('%F %T')} {self._situation()}", file=stacks, flush=True)
            faulthandler.dump_traceback(file=stacks)

    def _close_stacks(self) -> None:
        """Leave no empty file behind."""
        if self._stacks is None or self._stacks is sys.__stderr__:
            return
        with contextlib.suppress(OSError):
            is_empty = self._stacks.seek(0, io.SEEK_END) == 0
            self._stacks.close()
            if is_empty:
                self._stacks_file.unlink(missing_ok=True)
        self._stacks = None


def _say(text: str) -> None:
    """Write to the terminal without Python's buffers, whose locks a hanging thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
