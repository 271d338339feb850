"""Programs that a look of `deberta doctor` starts: none of them outlives it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.preflight.children import ask, child_environment

# It starts a program of its own, as compilers and launchers do, and tells its number.
PARENT = """\
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
pathlib.Path(sys.argv[1]).write_text(f"{child.pid} ")
child.wait()
"""


def words(told: Path) -> list[str]:
    return [sys.executable, "-S", "-c", PARENT, str(told)]


def is_running(told: Path) -> bool:
    number = int(told.read_text())
    for _ in range(100):
        if not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie":
            return False
        time.sleep(0.05)
    return True


def test_what_takes_too_long_is_ended_with_its_own_children(tmp_path):
    told = tmp_path / "number"
    answer = ask(words(told), child_environment({}), 3.0)
    assert answer.code is None
    assert answer.reason == "no end within 3 s"
    assert not is_running(told)


def test_an_interrupt_ends_what_was_started(tmp_path):
    told = tmp_path / "number"

    def interrupt(_number, _frame):
        raise KeyboardInterrupt

    # Not SIGINT, which some ways to start a test run ignore.
    before = signal.signal(signal.SIGUSR2, interrupt)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(words(told), child_environment({}), 60.0)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, before)
    assert not is_running(told)
