"""Which rank is behind: what every rank writes about itself, and the verdict that follows from it.

    Beat          one rank's word on where it is; a small file in RUN/heartbeats/
    PeerWatch     reads all beats again and again: who still writes, who is still working
    judge         which ranks are behind, and why we think so
    place_of      where the threads of a process are, and whether one waits for other ranks

Only changes of a file count as signs of life. Neither clocks of other hosts nor files that an
earlier start left behind can mislead a verdict. No torch here: it is read while the process hangs.
"""

import json
import linecache
import re
import time
import types
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

_SHOWN_RANKS = 4
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/rendezvous.py")
_COLLECTIVES += ("torch/distributed/_functional_collectives.py", "/deepspeed/comm/")
_DEVICE_WAITS = ("torch/cuda/__init__.py", "torch/cuda/streams.py")
_DEVICE_WAIT_NAMES = ("synchronize", "wait")
_WAITING_CALLS = re.compile(r"\.(wait|synchronize|item|tolist|cpu)\(")
"""Calls that wait for a device or a request inside C++, where no frame of Python shows it."""
_OWN_CODE = re.compile(r"/(pipeline|data_prep)/")


@dataclass(frozen=True)
class Place:
    """Where the main thread of a process is."""

    at: str
    """Innermost line of our own code: file:line and function."""
    waits_in: str
    """The function in which some thread waits for other ranks; empty where none does."""


@dataclass(frozen=True)
class Beat:
    """One rank's word on where it is."""

    rank: int
    host: str
    pid: int
    start: str
    """Equal on all ranks of one start of the run; before the world exists, of the rank alone."""
    number: int
    unix_seconds: float
    """For people only."""
    phase: str
    step: int
    marks: int
    """Signs of progress since this step began."""
    stalled_seconds: float
    """Time without progress, while the process was running."""
    limit_seconds: float
    at: str = ""
    waits_in: str = ""

    @property
    def has_expired(self) -> bool:
        """Whether the rank itself says that it hangs."""
        return self.stalled_seconds > self.limit_seconds

    @property
    def name(self) -> str:
        """Rank, host and pid, for messages."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def write(self, folder: Path) -> None:
        """Replace this rank's file; not synced, nobody needs it after a power cut.

        Args:
            folder: RUN/heartbeats.

        Raises:
            OSError: The disk is full or does not answer.
        """
        path = beat_file(folder, self.rank)
        partial = path.with_name(f".{path.name}.{self.host}-{self.pid}.partial")
        try:
            partial.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, folder: Path, rank: int) -> "Beat | None":
        """Read a rank's file.

        Args:
            folder: RUN/heartbeats.
            rank: Whose.

        Returns:
            Its last word; None where there is none or it cannot be read.
        """
        try:
            return cls(**json.loads(beat_file(folder, rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def beat_file(folder: Path, rank: int) -> Path:
    """Name a rank's file.

    Args:
        folder: RUN/heartbeats.
        rank: Whose.

    Returns:
        The path.
    """
    return folder / f"rank-{rank:05d}.json"


@dataclass(frozen=True)
class Sighting:
    """What is known of a rank after its beats were watched for a while."""

    rank: int
    beat: Beat | None
    """Its newest word of this start."""
    lives: bool
    """Whether its word changed lately."""


class PeerWatch:
    """Looks at the beats of all ranks until it is clear who lives."""

    def __init__(self, folder: Path, world_size: int, start: str, lately_seconds: float) -> None:
        """Begin to watch.

        Args:
            folder: RUN/heartbeats.
            world_size: Ranks to look at.
            start: Of this start of the run.
            lately_seconds: A rank that wrote nothing new for so long gives no sign of life.
        """
        self._folder = folder
        self._start = start
        self._lately_seconds = lately_seconds
        self._began_seconds = time.monotonic()
        self._seen: list[Beat | None] = [Beat.read(folder, rank) for rank in range(world_size)]
        self._changed_seconds: list[float | None] = [None] * world_size

    def look(self) -> list[Sighting]:
        """Read all beats once more.

        Returns:
            One sighting a rank.
        """
        now = time.monotonic()
        for rank, before in enumerate(self._seen):
            beat = Beat.read(self._folder, rank)
            if beat is not None and beat != before:
                self._seen[rank], self._changed_seconds[rank] = beat, now
        return [self._sighting(rank, now) for rank in range(len(self._seen))]

    def _sighting(self, rank: int, now: float) -> Sighting:
        beat, changed = self._seen[rank], self._changed_seconds[rank]
        lives = changed is not None and now - changed < self._lately_seconds
        # A file that never changed may be of an earlier start, whose ranks are long gone.
        is_known = beat is not None and (changed is not None or beat.start == self._start)
        return Sighting(rank, beat if is_known else None, lives)

    @property
    def is_long_enough(self) -> bool:
        """Whether a living rank must have written by now."""
        return time.monotonic() - self._began_seconds >= self._lately_seconds


def somebody_works(sightings: Iterable[Sighting]) -> bool:
    """Tell a slow rank from a hang: it lives, and its own time is not over.

    Args:
        sightings: Of all ranks.

    Returns:
        Whether there is such a rank, for which the others must go on waiting.
    """
    return any(each.lives and each.beat and not each.beat.has_expired for each in sightings)


@dataclass(frozen=True)
class Verdict:
    """Who is behind."""

    behind: tuple[int, ...]
    """Ranks; empty where nothing tells them apart."""
    reason: str
    """One sentence."""


def judge(sightings: Sequence[Sighting], stalled_seconds: float) -> Verdict:
    """Decide which ranks the others wait for.

    Silence counts most; then not waiting in a collective while others do; then the fewest signs of
    progress. A rank that waits for others cannot be what they wait for.

    Args:
        sightings: Of all ranks, in order.
        stalled_seconds: How long the judging rank has made no progress.

    Returns:
        The verdict.
    """
    silent = [each for each in sightings if not each.lives]
    if silent:
        living = [each.beat for each in sightings if each.lives and each.beat]
        return _judge_silent(silent, living, stalled_seconds)
    beats = [each.beat for each in sightings if each.beat is not None]
    idle = [beat for beat in beats if not beat.waits_in]
    suspects = idle if 0 < len(idle) < len(beats) else beats
    least = min((beat.step, beat.marks) for beat in suspects)
    behind = [beat for beat in suspects if (beat.step, beat.marks) == least]
    if len(behind) == len(beats) > 1:
        waiting = "wait for each other in collectives" if behind[0].waits_in else "stand still"
        return Verdict(
            (),
            f"hang: no rank is behind; all {len(beats)} {waiting}, {_where(behind[0])}: the "
            "network or a device does not answer",
        )
    names = _names([beat.name for beat in behind])
    seconds = max(beat.stalled_seconds for beat in behind)
    reason = f"hang: {names} made no progress for {seconds:.0f} s, {_where(behind[0])}"
    if behind[0].at:
        reason += f", at {behind[0].at}"
    if suspects is idle:
        reason += f", while {len(beats) - len(idle)} other ranks wait in collectives"
    elif len(beats) > 1:
        reason += ", with the fewest signs of progress"
    return Verdict(tuple(beat.rank for beat in behind), reason)


def _judge_silent(silent: list[Sighting], living: list[Beat], stalled_seconds: float) -> Verdict:
    names = _names([each.beat.name if each.beat else f"rank {each.rank}" for each in silent])
    reason = f"hang: {names} gave no sign of life while the others waited {stalled_seconds:.0f} s"
    if living:
        reason += f" {_where(max(living, key=lambda beat: (beat.step, beat.marks)))}"
    known = [each.beat for each in silent if each.beat]
    if known:
        reason += (
            f"; last seen {_where(known[0])}: its process has ended or was stopped, its host is "
            "down, or it holds the interpreter's lock"
        )
    else:
        reason += "; it did not come up in this start"
    return Verdict(tuple(each.rank for each in silent), reason)


def _where(beat: Beat) -> str:
    return f'in phase "{beat.phase}" of step {beat.step:,}'


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_RANKS} more" if len(names) > _SHOWN_RANKS else ""
    return ", ".join(names[:_SHOWN_RANKS]) + more


def table(sightings: Sequence[Sighting]) -> list[str]:
    """Describe all ranks, one line each.

    Args:
        sightings: Of all ranks.

    Returns:
        Lines for the log.
    """
    lines = []
    for each in sightings:
        beat = each.beat
        if beat is None:
            lines.append(f"  rank {each.rank}: never seen in this start")
            continue
        place = f"{_where(beat)}, mark {beat.marks}, at {beat.at}"
        if not each.lives:
            lines.append(f"  {beat.name}: NO SIGN OF LIFE, last seen {place}")
            continue
        waits = f", waits in {beat.waits_in}" if beat.waits_in else ""
        lines.append(f"  {beat.name}: no progress for {beat.stalled_seconds:.0f} s, {place}{waits}")
    return lines


def place_of(frames: dict[int, types.FrameType], main_thread: int, own: Iterable[int]) -> Place:
    """Say where a process is, from the frames of its threads.

    Args:
        frames: Thread -> innermost frame, from `sys._current_frames()`.
        main_thread: Identity of the main thread.
        own: Threads that are left out: the watchdog's.

    Returns:
        The place.
    """
    left_out = set(own)
    stacks = {key: _stack(frame) for key, frame in frames.items() if key not in left_out}
    main = stacks.get(main_thread, [])
    ours = next((frame for frame in main if _OWN_CODE.search(frame.f_code.co_filename)), None)
    at = _describe(ours or main[0]) if main else ""
    # The main thread first; backward passes call collectives from threads of their own.
    others = [stack for key, stack in stacks.items() if key != main_thread]
    for stack in [main, *others]:
        for frame in reversed(stack):
            if _waits_for_others(frame.f_code):
                return Place(at, frame.f_code.co_name)
    if main and (call := _WAITING_CALLS.search(_source_line(main[0]))):
        return Place(at, call[1])
    return Place(at, "")


def _waits_for_others(code: types.CodeType) -> bool:
    if code.co_name in _DEVICE_WAIT_NAMES and any(x in code.co_filename for x in _DEVICE_WAITS):
        return True
    return any(part in code.co_filename for part in _COLLECTIVES)


def _stack(frame: types.FrameType | None) -> list[types.FrameType]:
    """A thread's frames, the innermost first."""
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def _describe(frame: types.FrameType) -> str:
    path = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"


def _source_line(frame: types.FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno)


def publish(path: Path, verdict: Verdict, sightings: Sequence[Sighting]) -> bool:
    """Write the report of this hang, unless another rank has.

    Args:
        path: RUN/logs/hang-START.txt.
        verdict: Who is behind.
        sightings: Of all ranks.

    Returns:
        Whether this rank was the first.

    Raises:
        OSError: The disk is full or does not answer.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join([verdict.reason, *table(sightings)]) + "\n")
    except FileExistsError:
        return False
    return True


def seen_by(sightings: Sequence[Sighting], own: Beat) -> list[Sighting]:
    """Put a rank's own word, which it knows without reading it, into what it has seen.

    Args:
        sightings: Of all ranks.
        own: The judging rank's newest word.

    Returns:
        New sightings.
    """
    return [
        replace(each, beat=own, lives=True) if each.rank == own.rank else each for each in sightings
    ]
