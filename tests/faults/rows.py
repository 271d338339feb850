"""The fault matrix: what can go wrong, and what is promised then. Tests say which row they show.

    @pytest.mark.row(4)
    def test_a_rank_is_killed(lab, tmp_path, note):
        ...
        note("SIGKILL to rank 1 in step 7", "rank 0 ended after 0.3 s; resumed bit for bit")

A test of several rows calls `note(..., row=5)`. `pytest tests/faults --faults-table FILE.md` writes
the table, and fails where a row was not shown.
"""

import json
import platform
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of the matrix."""

    number: int
    fault: str
    promise: str


@dataclass
class Showing:
    """What one test saw of a row."""

    row: int
    test: str
    injected: str
    seen: str
    passed: bool
    seconds: float


ROWS = {
    row.number: row
    for row in (
        Row(1, "stop signal to one rank in a step", "all ranks commit, 75; resumes bit for bit"),
        Row(2, "stop signal in start-up, evaluation, save", "the same; a save is finished"),
        Row(3, "a second signal", "exits at once; the commit before is intact"),
        Row(4, "SIGKILL to one rank in a step", "peers end in 30 s; resumes bit for bit"),
        Row(5, "SIGKILL in a save, at every point", "every name is a whole commit; tidied up"),
        Row(6, "the whole world killed", "resumes from the last commit bit for bit"),
        Row(7, "disk full in a save", "path and bytes named; training goes on; commits kept"),
        Row(8, "EIO, read-only in a save", "tried again, then a clean end with the path"),
        Row(9, "a bit of a commit flips", "found at load, file named; the commit before is used"),
        Row(10, "files of a commit cut, missing, swapped", "the same"),
        Row(11, "`latest` empty, garbage, dangling", "the newest valid commit is used"),
        Row(12, "a bit of a dataset flips", "found before use, shard named, 88"),
        Row(13, "a shard cut, missing, replaced", "refused at start in seconds"),
        Row(14, "another dataset on resume", "refused with the difference, or accepted and noted"),
        Row(15, "another configuration on resume", "refused by key, or free by the table"),
        Row(16, "another world size: 4, 2, 3, 1, 4", "same samples; fp32 losses within 1e-5"),
        Row(17, "another stage or precision on resume", "works, or is refused untouched"),
        Row(18, "NaN or inf on one rank", "all skip that step, counted; roll back; 87 with a dump"),
        Row(19, "a spike of the loss", "found by a robust z-score; logged, or rolled back"),
        Row(20, "a replica's bit flips", "found within the interval, rank named"),
        Row(21, "a rank hangs: stop, sleep, interpreter lock", "86, stacks, the culprit named"),
        Row(22, "a slow rank", "reported within the window; no abort"),
        Row(23, "the reading thread raises or dies", "an error with the step, not a hang"),
        Row(24, "hostile text", "never a crash; counted; the same for any chunking"),
        Row(25, "broken records", "counted with file and line; too many stop the build"),
        Row(26, "SIGKILL to preparation", "the same bytes as undisturbed"),
        Row(27, "two runs in one folder; a stale lock", "refused with the holder; taken over"),
        Row(28, "the clock jumps", "nothing but names of times depends on it"),
        Row(29, "port taken, wrong address, a rank missing", "a clear error within 60 s"),
        Row(30, "a payload in a pickle; names that leave", "refused, nothing executed"),
        Row(31, "dashboards and secrets", "localhost only; secrets scrubbed"),
        Row(32, "an export interrupted", "whole or absent; the same numbers as the trainer"),
        Row(
            33, "memory, disk or inodes run out", "told; all ranks commit before, 75, with the cure"
        ),
    )
}


def write_table(path: Path, showings: list[Showing]) -> None:
    """Write the matrix as Markdown, and the same beside it as JSON."""
    of_row = defaultdict(list)
    for showing in showings:
        of_row[showing.row].append(showing)
    lines = [
        "# The fault matrix",
        "",
        "Written by `make faults`.",
        "",
        "| # | fault | promised | injected | seen | tests | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, row in ROWS.items():
        mine = of_row[number]
        passed = sum(showing.passed for showing in mine)
        cells = (
            str(number),
            row.fault,
            row.promise,
            "; ".join(showing.injected for showing in mine if showing.injected) or "**nothing**",
            "; ".join(showing.seen for showing in mine if showing.seen) or "**nothing**",
            f"{passed} of {len(mine)} passed",
            f"{sum(showing.seconds for showing in mine):.0f}",
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    total = sum(showing.seconds for showing in showings)
    lines += ["", f"{total:.0f} s on {platform.machine()}, Python {platform.python_version()}."]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    value = {"rows": [asdict(row) for row in ROWS.values()], "seen": [asdict(s) for s in showings]}
    path.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")


def missing_rows(showings: list[Showing]) -> list[int]:
    """Rows that no test has shown, or that some test has not."""
    good = {showing.row for showing in showings if showing.passed}
    bad = {showing.row for showing in showings if not showing.passed}
    return sorted(({*ROWS} - good) | bad)
