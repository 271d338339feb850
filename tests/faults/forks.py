"""Worlds that start within a second: ranks forked from a process that has imported everything.

    server     one process for a session of tests (`shared_server`); imports once, then forks a
               launcher a world
    launcher   forks the ranks, writes their process ids, waits for all of them, writes how each
               ended; it helps nobody: a rank whose peer died has to end by itself
    rank       `pipeline.train.main` with the variables that a launcher sets

The ranks are real processes with real sockets and signals; only the imports are shared. When a
launcher dies its ranks are killed, as a cluster does, so that nothing outlives a test. The one
addition: a rank notes which samples every step was given, in a file beside the run folder.
"""

import ctypes
import functools
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.worlds import ROOT, environment, free_port

PR_SET_PDEATHSIG = 1
START_SECONDS = 120


class ForkServer:
    """The server as the tests see it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_surroundings(),
            cwd=ROOT,
        )
        self._lock = threading.Lock()
        assert self._answer() == "ready"

    def launch(self, request: dict[str, Any]) -> int:
        """Start a world in the environment of this moment; returns its launcher's process id."""
        request = {**request, "environment": _surroundings()}
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        timer = threading.Timer(START_SECONDS, self._process.kill)
        timer.start()
        try:
            return self._process.stdout.readline().strip()
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the server; launchers and ranks that are left die with it."""
        self._process.kill()
        self._process.communicate()


def _surroundings() -> dict[str, str]:
    return {**environment(), "DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "PASSIVE"}


@functools.cache
def shared_server() -> ForkServer:
    """The one server of this process, started when it is first asked for."""
    return ForkServer()


def close_shared_server() -> None:
    """End the server of this process, if there is one."""
    if shared_server.cache_info().currsize:
        shared_server().close()
        shared_server.cache_clear()


def serve() -> None:
    """Fork a launcher for every request until nobody asks any more."""
    _import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are not waited for
    _say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if request["program"] == "deberta":
            import pipeline.cli
            import pipeline.commands_export
            import pipeline.export_reload  # noqa: F401

            _freeze()
        pid = os.fork()
        if pid == 0:
            _guarded(_launch, request)
        _say(pid)


def _say(value: object) -> None:
    print(value, flush=True)


def _import_everything() -> None:
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401  deterministic kernels need it
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import pipeline.assemble
    import pipeline.banner
    import pipeline.train  # noqa: F401

    _freeze()


def _freeze() -> None:
    # A fork takes one thread along: another one could hold a lock for ever in the child.
    assert len([*Path("/proc/self/task").iterdir()]) == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # the children's collections need not copy what they share


def _guarded(action: Any, *arguments: Any) -> None:
    """Do something in a forked child that must never go on as its parent."""
    try:
        action(*arguments)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _launch(request: dict[str, Any]) -> None:
    """Fork the ranks of one world and write down how they end."""
    _die_with_parent()
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    request["variables"] = {**address, **request["variables"]}
    started = time.monotonic()
    pids = []
    for rank in request["present"]:
        pid = os.fork()
        if pid == 0:
            _guarded(_train, request, rank)
        pids.append(pid)
    notes = Path(request["notes"])
    _replace(notes, {"pids": pids, "codes": {}})
    codes: dict[int, int] = {}
    seconds: dict[int, float] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        rank = pids.index(pid)
        codes[rank] = os.waitstatus_to_exitcode(status)
        seconds[rank] = time.monotonic() - started
        _replace(notes, {"pids": pids, "codes": codes, "seconds": seconds})


def _replace(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def _train(request: dict[str, Any], rank: int) -> None:
    _die_with_parent()
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]))
        os.environ.update(request["variables"])
    else:
        launcher = ("MASTER_ADDR", "MASTER_PORT")
        os.environ.update({k: v for k, v in request["variables"].items() if k not in launcher})
    if request["clock_jump_seconds"]:
        _jump_the_clock(request["clock_jump_seconds"])
    _record_samples(f"{request['samples']}-{rank}")
    if request["program"] == "deberta":
        from pipeline.cli import main as deberta

        deberta(request["words"])
    else:
        from pipeline.train import main as train

        train(request["words"])


def _jump_the_clock(seconds: float) -> None:
    """Make the clock of the day go forth and back by so much from one look to the next."""
    of_day, jumps = time.time, itertools.cycle((0.0, seconds, -seconds))
    time.time = lambda: of_day() + next(jumps)


def _record_samples(path: str) -> None:
    """Write a line for every step that is begun: what it was given to train on."""
    from pipeline.step import TrainingStep

    take_step = TrainingStep.__call__

    def recorded(self: Any, step: int, micro_batches: Any, *arguments: Any) -> Any:
        samples = [batch.sample_words_B2.tolist() for batch in micro_batches]
        with open(path, "ab", buffering=0) as file:  # noqa: PTH123  one write: whole or absent
            file.write(f"{json.dumps([step, samples])}\n".encode())
        return take_step(self, step, micro_batches, *arguments)

    TrainingStep.__call__ = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
