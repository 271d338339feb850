import math
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children

import psutil
import pytest

from data_prep.errors import UserError
from data_prep.executors import ProcessExecutor, WorkerDiedError
from data_prep.tokenizer import Tokenizer

# Tasks come from modules that a spawned process can import; this test module is not one of them.


def test_every_item_gives_one_result():
    items = list(range(50))
    results = list(ProcessExecutor(2).run(math.sqrt, items))
    assert sorted(results) == [math.sqrt(item) for item in items]


def test_no_items_give_no_results():
    assert list(ProcessExecutor(2).run(math.sqrt, [])) == []


def test_items_are_drawn_only_as_workers_need_them():
    drawn = []

    def items():
        for item in range(1000):
            drawn.append(item)
            yield item

    results = ProcessExecutor(2).run(math.sqrt, items())
    next(results)
    assert len(drawn) <= 10
    results.close()


def test_without_workers_nothing_can_run():
    with pytest.raises(UserError, match="--workers 0: at least 1 worker is needed"):
        ProcessExecutor(0)


def test_a_message_for_people_crosses_the_process_border():
    with pytest.raises(UserError, match="no-such-folder cannot be read"):
        list(ProcessExecutor(1).run(Tokenizer.load, ["no-such-folder"]))


def test_a_killed_worker_is_told_with_the_cure():
    with pytest.raises(WorkerDiedError, match=r"lower --workers.*run the same command again") as e:
        list(ProcessExecutor(2).run(os._exit, [9]))
    assert e.value.exit_code == 1


def test_closing_early_kills_the_workers():
    before = set(active_children())
    results = ProcessExecutor(2).run(time.sleep, [0.0, 600.0, 600.0, 600.0])
    next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 10
    assert not set(active_children()) - before


ORPHANS = """
import sys, time
from data_prep.executors import ProcessExecutor
if __name__ == "__main__":
    list(ProcessExecutor(2).run(time.sleep, [600.0] * 4))
"""


def is_running(process: psutil.Process) -> bool:
    # Nobody may be there to bury an orphan.
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, script], start_new_session=True)
    # Two workers and the resource tracker.
    assert wait_until(lambda: len(psutil.Process(parent.pid).children()) == 3, 20)
    workers = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: not any(is_running(worker) for worker in workers), 20)
