"""What a soak has seen so far: runs with their kills and differences, as a table and as JSON."""

import json
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.run_folder import write_durably
from tests.faults.fingerprint import KINDS
from tests.soak.kills import POINTS, SIGNALS, Kill


@dataclass
class Run:
    """One run through its kills."""

    number: int
    stage: int
    precision: str
    ranks: int
    in_background: bool
    """Whether its commits were asynchronous."""
    kills: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 1
    differences: dict[str, int] = field(default_factory=dict)
    """By kind, against the reference; empty where the run did not end."""
    examples: list[str] = field(default_factory=list)
    problem: str = ""
    """Output of a start that ended in a way that no kill explains."""
    seconds: float = 0.0

    def add_kill(self, kill: Kill, codes: list[int]) -> None:
        """Remember what was done and how the ranks ended."""
        self.kills.append({**asdict(kill), "codes": codes})

    @property
    def is_clean(self) -> bool:
        """Whether it ended with the numbers of its reference."""
        return not self.problem and not any(self.differences.values())

    def describe(self) -> str:
        """One line for the terminal."""
        verdict = "same" if self.is_clean else f"DIFFERS: {self.examples[:3]} {self.problem[-500:]}"
        return (
            f"run {self.number}: stage {self.stage} {self.precision}, {self.ranks} ranks, "
            f"{len(self.kills)} kills, {self.starts} starts, {self.seconds:.0f} s: {verdict};"
        )


@dataclass
class Results:
    """All runs of a soak."""

    path: Path
    seed: int
    kills: int
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, seed: int, kills: int) -> "Results":
        """Go on with an unfinished soak of the same seed, or begin."""
        results = cls(path, seed, kills)
        if path.exists():
            value = json.loads(path.read_text())
            if (value["seed"], value["kills"]) == (seed, kills):
                results.runs = [Run(**run) for run in value["runs"]]
        if results.num_kills >= kills:  # it was finished: this is another one
            results.runs = []
        return results

    @property
    def num_kills(self) -> int:
        """Kills that found their world alive."""
        return sum(len(run.kills) for run in self.runs)

    @property
    def is_clean(self) -> bool:
        """Whether no run differs."""
        return all(run.is_clean for run in self.runs)

    def add(self, run: Run, table: Path) -> None:
        """Remember a run and write table and JSON."""
        self.runs.append(run)
        table.parent.mkdir(parents=True, exist_ok=True)
        value = {"seed": self.seed, "kills": self.kills, "runs": [asdict(r) for r in self.runs]}
        write_durably(self.path, json.dumps(value, indent=1) + "\n")
        write_durably(table, "\n".join(self.lines()) + "\n")

    def lines(self) -> list[str]:
        """The tables, in Markdown."""
        differences = {
            kind: sum(run.differences.get(kind, 0) for run in self.runs) for kind in KINDS
        }
        unfinished = sum(bool(run.problem) for run in self.runs)
        return [
            "# Random kills",
            "",
            f"Written by `make soak KILLS={self.kills}` (seed {self.seed}): {len(self.runs)} runs, "
            f"{sum(run.starts for run in self.runs)} starts, {self.num_kills} kills, "
            f"{sum(run.seconds for run in self.runs) / 60:.0f} minutes on {platform.machine()}, "
            f"Python {platform.python_version()}. Every run was compared with one that nobody "
            "disturbed: each figure of each row, weights and moments of the last commit, the "
            "trainer's state, the samples of each step.",
            "",
            "| differences in | " + " | ".join([*KINDS, "runs that did not end"]) + " |",
            "|---" * (len(KINDS) + 2) + "|",
            "| all runs | "
            + " | ".join(str(count) for count in [*differences.values(), unfinished])
            + " |",
            "",
            *self._kills(),
            "",
            *self._cells(),
        ]

    def _kills(self) -> list[str]:
        """Kills by signal and moment, by point and by time, to one rank and to all."""
        kills = [kill for run in self.runs for kill in run.kills]
        count = Counter((kill["signal"], kill["moment"]) for kill in kills)
        lines = [
            "| kills | " + " | ".join([*POINTS, "all"]) + " |",
            "|---" * (len(POINTS) + 2) + "|",
        ]
        for name in SIGNALS:
            cells = [count[name, moment] for moment in POINTS]
            lines.append(f"| {name} | {' | '.join(map(str, [*cells, sum(cells)]))} |")
        at_points = sum(bool(kill["point"]) for kill in kills)
        to_all = sum(kill["everybody"] for kill in kills)
        lines += [
            "",
            f"{at_points} at a named point, {len(kills) - at_points} at a random time; {to_all} to "
            f"all ranks, {len(kills) - to_all} to one.",
        ]
        return lines

    def _cells(self) -> list[str]:
        """Runs by ZeRO stage, precision and ranks."""
        lines = [
            "| ZeRO | precision | ranks | runs | with asynchronous commits | kills | that differ |",
            "|---|---|---|---|---|---|---|",
        ]
        for cell in sorted({(run.stage, run.precision, run.ranks) for run in self.runs}):
            mine = [run for run in self.runs if (run.stage, run.precision, run.ranks) == cell]
            figures = [
                len(mine),
                sum(run.in_background for run in mine),
                sum(len(run.kills) for run in mine),
                sum(not run.is_clean for run in mine),
            ]
            lines.append(f"| {' | '.join(map(str, [*cell, *figures]))} |")
        return lines
