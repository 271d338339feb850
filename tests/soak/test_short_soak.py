"""The soak itself, on a handful of kills; `make soak KILLS=200` is the real one."""

import json
import random

import pytest

from tests.faults.fingerprint import KINDS
from tests.soak.__main__ import main
from tests.soak.kills import MAX_STEPS, POINTS, SIGNALS, choose
from tests.soak.results import Results, Run


@pytest.mark.faults
def test_a_handful_of_kills(tmp_path):
    output = tmp_path / "soak.md"
    assert main(["--kills", "5", "--seed", "3", "--output", str(output)]) == 0, output.read_text()
    value = json.loads(output.with_suffix(".json").read_text())
    kills = [kill for run in value["runs"] for kill in run["kills"]]
    assert len(kills) == 5
    assert all(run["differences"] == dict.fromkeys(KINDS, 0) for run in value["runs"])
    assert all(run["starts"] > len(run["kills"]) for run in value["runs"])


def test_kills_are_of_all_kinds():
    choices = random.Random(1)
    kills = [choose(choices, 2, choices.randrange(MAX_STEPS)) for _ in range(2000)]
    assert {(kill.signal, kill.moment) for kill in kills} == {
        (name, moment) for name in SIGNALS for moment in POINTS
    }
    points = {point for points in POINTS.values() for point in points}
    assert {kill.point for kill in kills} == {"", *points}
    assert {kill.everybody for kill in kills} == {True, False}
    assert all(kill.step <= MAX_STEPS for kill in kills)


def test_table_tells_a_difference(tmp_path):
    table = tmp_path / "results" / "soak.md"
    results = Results.load(table.with_suffix(".json"), 1, 2)
    kill = {"signal": "SIGKILL", "moment": "save", "point": "save.share", "everybody": False}
    clean = dict.fromkeys(KINDS, 0)
    results.add(Run(0, 1, "fp32", 2, False, [kill], 2, clean), table)
    assert results.is_clean
    assert "| all runs | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |" in table.read_text()
    assert Results.load(table.with_suffix(".json"), 1, 2).num_kills == 1  # goes on
    assert Results.load(table.with_suffix(".json"), 2, 2).num_kills == 0  # another seed
    results.add(Run(1, 3, "bf16", 1, True, [kill], 2, {**clean, "parameters": 2}), table)
    assert not results.is_clean
    assert "| all runs | 0 | 0 | 0 | 2 | 0 | 0 | 0 | 0 |" in table.read_text()
    assert "| 3 | bf16 | 1 | 1 | 1 | 1 | 1 |" in table.read_text()
    assert "| SIGKILL | 0 | 0 | 0 | 2 | 2 |" in table.read_text()
    results.add(Run(2, 3, "bf16", 1, True, [], 2, problem="Traceback"), table)
    assert "| all runs | 0 | 0 | 0 | 2 | 0 | 0 | 0 | 1 |" in table.read_text()
