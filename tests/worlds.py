"""Starting real training processes from tests, by the launchers that users have."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

TIMEOUT_SECONDS = 240
ROOT = Path(__file__).parents[1]


def environment():
    """The parent's environment without a launcher's variables, one thread a process."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {
        **{key: value for key, value in os.environ.items() if key not in drop},
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(config, deepspeed_json, dataset, folder, *words, ranks=1, launcher="torchrun"):
    """The command line of a training world."""
    module = ["pipeline.train"]
    start = {
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            "-m",
            *module,
        ],
        "deepspeed": [
            *("deepspeed", "--num_accelerators", str(ranks)),
            *("--master_port", str(free_port())),  # its own is the same for everybody
            *("--module", *module),
        ],
        "mpirun": ["mpirun", "-n", str(ranks), sys.executable, "-m", *module],
        "python": [sys.executable, "-m", *module],
    }["python" if ranks == 1 and launcher == "torchrun" else launcher]
    return [
        *start,
        *("--config", str(config), "--deepspeed_config", str(deepspeed_json)),
        f"data.path={dataset}",
        f"run.folder={folder}",
        *words,
    ]


def train(*arguments, **options):
    """Run a world to its end; (exit code, everything it printed)."""
    done = subprocess.run(
        command(*arguments, **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(),
        cwd=ROOT,
    )
    return done.returncode, done.stdout


def train_and_kill(when, signal_number, *arguments, only=None, **options):
    """Start a world and signal all of it, or the process `only()`, once `when()` holds."""
    process = subprocess.Popen(
        command(*arguments, **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while process.poll() is None and not when():
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.02)
    if process.poll() is None:
        # By descent and not by process group: torchrun puts its workers into sessions of their own.
        parent = psutil.Process(process.pid)
        everybody = [parent, *parent.children(recursive=True)]
        for each in everybody if only is None else [psutil.Process(only())]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal_number)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def rows(folder):
    """The rows of metrics.jsonl without what depends on time."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("perf/")}
        for line in lines
    ]


def largest_difference(left, right):
    """Largest relative difference between two runs' rows, which must have the same keys."""
    assert [row.keys() for row in left] == [row.keys() for row in right]
    return max(
        abs(a[key] - b[key]) / max(1e-12, abs(a[key]))
        for a, b in zip(left, right, strict=True)
        for key in a
    )
