"""The table of what the tests have seen: of each case the job's states, restarts and lost steps."""

from dataclasses import asdict, dataclass

import pytest

PROPERTY = "slurm outcome"
"""Name under which a test's report carries its outcomes, across processes too."""
HEAD = ("case", "states seen", "restarts", "lost steps", "end", "seconds")


@dataclass(frozen=True)
class Outcome:
    """One case."""

    case: str
    states: tuple = ()
    """Of the job, in their order."""
    restarts: int = 0
    lost_steps: int = 0
    """Steps that were computed and had to be computed again."""
    end: str = ""
    """How the run stands at the end."""

    def as_dict(self):
        """For the report."""
        return {**asdict(self), "states": list(self.states)}


def sorted_outcomes(reports):
    """(outcome, seconds of its test) of all passed tests, by name."""
    found = []
    for report in reports:
        if isinstance(report, pytest.TestReport) and report.when == "call" and report.passed:
            mine = [value for name, value in report.user_properties if name == PROPERTY]
            found += [(value, report.duration) for value in mine]
    return sorted(found, key=lambda each: each[0]["case"])


def markdown(outcomes):
    """A table for the terminal and for a file."""
    lines = [HEAD, tuple("-" * len(name) for name in HEAD)]
    for value, seconds in outcomes:
        lines.append(
            (
                value["case"],
                " ".join(value["states"]),
                str(value["restarts"]),
                str(value["lost_steps"]),
                value["end"],
                f"{seconds:.0f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
