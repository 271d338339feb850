"""Injuries that tests ask for happen where, when and as often as asked; nothing happens unasked."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from pipeline import faults

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def unhurt():
    yield
    faults.configure("", 0)


def test_nothing_happens_unasked():
    faults.configure("", 0)
    tensor = torch.ones(3)
    for point in faults.POINTS:
        faults.reach(point, 1)
        assert faults.poison(point, 1, tensor) is tensor


@pytest.mark.parametrize(
    ("steps", "struck"), [("3", [3]), ("2-4", [2, 3, 4]), ("*", [0, 1, 2, 3, 4, 5])]
)
def test_when(steps, struck):
    faults.configure(f"save.share:1:{steps}:enospc", 1)
    seen = []
    for step in range(6):
        try:
            faults.reach("save.share", step)
        except OSError as error:
            seen += [step] if error.errno == errno.ENOSPC else []
    assert seen == struck


def test_where_and_how_often():
    faults.configure("save.share:0:*:eio::2;save.begin:*:*:erofs", 0)
    for _ in range(2):
        with pytest.raises(OSError, match=r"injected at save\.share"):
            faults.reach("save.share", 7)
    faults.reach("save.share", 7)
    faults.reach("save.manifest", 7)
    with pytest.raises(OSError, match=r"save\.begin") as caught:
        faults.reach("save.begin", 7)
    assert caught.value.errno == errno.EROFS
    faults.configure("save.share:0:*:eio", 1)
    faults.reach("save.share", 7)


def test_tensors():
    faults.configure("replica:0:1:nan;replica:0:2:inf;replica:0:3:scale:100;replica:0:4:flip", 0)
    tensor = torch.ones(2, 2)
    assert faults.poison("replica", 1, tensor).isnan().all()
    assert faults.poison("replica", 2, tensor).isinf().all()
    assert faults.poison("replica", 3, tensor).eq(100).all()
    flipped = faults.poison("replica", 4, tensor)
    assert flipped is tensor
    assert tensor[0, 0] == 1 + 2**-23
    assert tensor.flatten()[1:].eq(1).all()


@pytest.mark.parametrize("action", ["kill", "signal:SIGUSR2", "raise", "sleep:0", "stop", "gil"])
def test_processes(action):
    code = (
        "from pipeline import faults; "
        f"faults.configure('step.begin:0:3:{action}', 0); faults.reach('step.begin', 2); "
        "print('alive', flush=True); faults.reach('step.begin', 3); print('still', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout.readline() == "alive\n"
            if action in ("stop", "gil"):
                time.sleep(1)
                assert process.poll() is None
            else:
                # Not communicate(): the line may already be in this pipe's buffer.
                output, errors = process.stdout.read(), process.stderr.read()
                process.wait(timeout=30)
                assert (output == "still\n") == (action == "sleep:0")
                expected = {"kill": -signal.SIGKILL, "signal:SIGUSR2": -signal.SIGUSR2, "raise": 1}
                assert process.returncode == expected.get(action, 0), errors
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("save.share:0:1", "write POINT:RANK:STEPS:ACTION"),
        ("nowhere:0:1:kill", "save.manifest"),
        ("save.share:0:1:tickle", "enospc"),
        ("save.share:first:1:kill", "RANK, STEPS and TIMES are numbers"),
    ],
)
def test_a_wrong_wish(text, message):
    with pytest.raises(UserError, match=message) as caught:
        faults.configure(text, 0)
    assert f"DEBERTA_FAULT={text}" in str(caught.value)
