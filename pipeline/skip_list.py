"""The data that a run never trains on again, in its folder: one line for every roll-back.

    runs/NAME/skipped_data.jsonl
    {"at_step": 120, "commit_step": 100, "number": 1, "reason": "...", "sha256": "5d0c...",
     "windows": [{"end_position": 960, "first_position": 800, "sequence_length": 512}]}

The file outlives roll-backs and only grows: the order of the samples is a function of the step and
of this file. A line's sha256 is of the line before and of its own fields, so that a line which is
changed, missing or torn is found; a commit remembers the newest one that it was made with.

Only rank 0 touches the file, and the other ranks get what it read: on a shared file system they
might see an older one.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.errors import CorruptError, UserError
from pipeline.run_folder import write_durably
from pipeline.runtime import on_all_ranks
from pipeline.sample_order import SkipList, SkippedWindow

FILE_NAME = "skipped_data.jsonl"
_CURE = "restore it from a copy: without it nobody knows which data the run has left out"


@dataclass(frozen=True)
class RollBack:
    """A return to a commit, and the data since then, which is left out from there on."""

    number: int
    """1 for the run's first."""
    at_step: int
    """Completed optimizer steps when it was decided."""
    commit_step: int
    """Step of the commit that the run went back to."""
    reason: str
    """One sentence for people."""
    windows: tuple[SkippedWindow, ...]
    """One for each sequence length that was trained on between the two steps."""
    sha256: str = ""
    """Of its line, once it has one."""


class RollBackLog:
    """The run's roll-backs, the same on every rank and in the file.

    Attributes:
        roll_backs: In their order.
    """

    def __init__(
        self,
        folder: Path,
        roll_backs: list[RollBack],
        *,
        is_main: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Keep what `open` has read.

        Args:
            folder: The run folder.
            roll_backs: What its file holds.
            is_main: Whether this is rank 0.
            group: Control group of all ranks; None for a single process.
        """
        self.roll_backs = roll_backs
        self._folder = folder
        self._is_main = is_main
        self._group = group

    @classmethod
    def open(
        cls,
        folder: Path,
        remembered_sha256: str,
        *,
        is_main: bool,
        group: dist.ProcessGroup | None,
    ) -> "RollBackLog":
        """Read the file on rank 0 and tell all ranks; a collective.

        Args:
            folder: The run folder.
            remembered_sha256: `newest_sha256` when the commit that is continued was made; empty for
                a new run.
            is_main: Whether this is rank 0.
            group: Control group of all ranks; None for a single process.

        Returns:
            The log.

        Raises:
            CorruptError: The file is damaged, or is not the one that the commit was made with.
        """
        box = [on_all_ranks(group, lambda: _read(folder, remembered_sha256) if is_main else [])]
        if group is not None:
            dist.broadcast_object_list(box, src=0, group=group)
        return cls(folder, box[0], is_main=is_main, group=group)

    @property
    def skip_list(self) -> SkipList:
        """What all of them leave out: maps trained samples to positions."""
        return SkipList(tuple(window for each in self.roll_backs for window in each.windows))

    @property
    def newest_sha256(self) -> str:
        """The newest line's, for a commit to remember; empty where there is none."""
        return _newest_sha256(self.roll_backs)

    def append(
        self, at_step: int, commit_step: int, reason: str, windows: tuple[SkippedWindow, ...]
    ) -> None:
        """Put a roll-back on the disk before it is done, so that no kill can undo it; a collective.

        Args:
            at_step: Completed optimizer steps now.
            commit_step: Step of the commit to go back to.
            reason: One sentence for people.
            windows: What is left out from there on.

        Raises:
            UserError: The file cannot be written; it is as it was.
        """
        new = RollBack(len(self.roll_backs) + 1, at_step, commit_step, reason, windows)
        new = replace(new, sha256=_sha256(new, self.newest_sha256))
        extended = [*self.roll_backs, new]
        on_all_ranks(self._group, lambda: _write(self._folder, extended) if self._is_main else None)
        self.roll_backs = extended


def _newest_sha256(roll_backs: list[RollBack]) -> str:
    return roll_backs[-1].sha256 if roll_backs else ""


def _read(folder: Path, remembered_sha256: str) -> list[RollBack]:
    path, roll_backs = folder / FILE_NAME, []
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path}: cannot be read ({error}); {_CURE}") from error
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            roll_back = _parse(line)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptError(f"{path}, line {number}: is torn or damaged; {_CURE}") from error
        expected = _sha256(roll_back, _newest_sha256(roll_backs))
        if (roll_back.number, roll_back.sha256) != (number, expected):
            raise CorruptError(
                f"{path}, line {number}: its sha256 is not that of its text and of the line before;"
                f" it, or a line before it, was changed or is missing; {_CURE}"
            )
        roll_backs.append(roll_back)
    if remembered_sha256 and remembered_sha256 not in (each.sha256 for each in roll_backs):
        raise CorruptError(
            f"{path}: the commit was made with a line of sha256 {remembered_sha256[:12]}, which is "
            f"not there; {_CURE}"
        )
    return roll_backs


def _write(folder: Path, roll_backs: list[RollBack]) -> None:
    path = folder / FILE_NAME
    lines = [json.dumps(asdict(each), sort_keys=True) + "\n" for each in roll_backs]
    try:
        # Replaced as a whole, a few hundred bytes: no kill and no full disk leaves half a line.
        write_durably(path, "".join(lines))
    except OSError as error:
        newest = roll_backs[-1]
        raise UserError(
            f"{path}: the roll-back from step {newest.at_step} to step {newest.commit_step} cannot "
            f"be recorded ({error}); make room or repair the disk, then the same command goes on "
            "from there"
        ) from error


def _parse(line: str) -> RollBack:
    """Read a line back; anything but exactly its fields is refused."""
    if not line.endswith("\n"):
        raise ValueError("torn")
    value = json.loads(line)
    windows = tuple(SkippedWindow(**window) for window in value.pop("windows"))
    roll_back = RollBack(**value, windows=windows)
    numbers = [roll_back.number, roll_back.at_step, roll_back.commit_step]
    numbers += [number for window in windows for number in vars(window).values()]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("not numbers")
    if len(value) + 1 != len(fields(RollBack)) or not roll_back.sha256:
        raise ValueError("not a whole line")
    return roll_back


def _sha256(roll_back: RollBack, previous: str) -> str:
    """Hash of a line's fields and of the line before."""
    value: dict[str, Any] = asdict(roll_back)
    del value["sha256"]
    text = previous + json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
