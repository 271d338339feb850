"""`deberta doctor`: what it prints and how it ends, whatever its looks find."""

import json
import socket
import sys

import pytest

from pipeline import cli
from pipeline.preflight import installation
from pipeline.preflight.finding import Finding
from pipeline.preflight.installation import Wishes, look_at_installation

GOOD = Finding("n", "one", True, "well")
BETTER = Finding("n", "two", True, "works", "do more")
BAD = Finding("n", "three", False, "broken", "mend it")


@pytest.fixture
def doctor(monkeypatch, capsys):
    """(exit code, lines, what was wished) where looks find what is given."""

    def run(found, *words):
        wished = []

        def look(wishes):
            wished.append(wishes)
            return iter(found)

        for name in ("RUN", "DEBERTA_SCRATCH", "SLURM_GPUS_ON_NODE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(installation, "look_at_installation", look)
        with pytest.raises(SystemExit) as caught:
            cli.main(["doctor", *words])
        return caught.value.code, capsys.readouterr().out.splitlines(), wished[0]

    return run


def test_all_is_well(doctor):
    code, lines, wishes = doctor([GOOD, BETTER])
    assert code == 0, "a warning is no failure"
    assert lines == [
        "n one: ok, well",
        "n two: warning, works; do more",
        "2 looks: 0 failed, 1 with a warning",
    ]
    assert wishes == Wishes(None, None, None, False)


def test_something_is_not(doctor):
    code, lines, wishes = doctor([GOOD, BAD, BETTER], "--build", "--gpus", "8")
    assert code == 1
    assert lines[1] == "n three: FAIL, broken; mend it"
    assert lines[-1] == "3 looks: 1 failed, 1 with a warning"
    assert (wishes.builds, wishes.gpus) == (True, 8)


def test_lines_of_json(doctor):
    code, lines, _ = doctor([BAD], "--json")
    assert code == 1
    assert [json.loads(line) for line in lines] == [
        {"node": "n", "check": "three", "ok": False, "text": "broken", "cure": "mend it"}
    ]


def test_a_look_that_fails_itself_hides_no_other(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by nothing\nmore")

    def nothing(*_):
        return []

    monkeypatch.setattr("pipeline.preflight.packages.look_at_packages", broken)
    monkeypatch.setattr("pipeline.preflight.shared_folder.look_at_behaviour", nothing)
    monkeypatch.setattr("pipeline.preflight.deepspeed_ops.look_at_deepspeed", nothing)
    monkeypatch.setattr("pipeline.preflight.launchers.look_at_mpi", lambda *_: BETTER)
    monkeypatch.setattr("pipeline.preflight.node.look_at_node", nothing)
    monkeypatch.setattr("pipeline.preflight.small_worlds.look_at_world", lambda *_: GOOD)
    findings = list(look_at_installation(Wishes(None, None, None, False)))
    assert findings[0].check == "packages"
    assert findings[0].line.partition(": ")[2] == (
        "FAIL, the look itself has failed: ZeroDivisionError: by nothing; see the lines above it; "
        "if they are well, this is a mistake of the program"
    )
    assert {"memory", "launchers", "slurm", "triton"} <= {each.check for each in findings}
    assert findings[-1] == GOOD


def test_a_torch_that_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "pipeline.runtime", None)
    node, variables = installation._environment()
    assert node == socket.gethostname()
    assert "PATH" in variables
