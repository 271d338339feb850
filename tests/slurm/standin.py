"""A trainer without torch that behaves to a job script like `python -m pipeline.train`.

    python standin.py --config .. --deepspeed_config .. data.path=.. run.folder=RUN [key=value ...]

Ranks count steps; rank 0 commits every `commit_every` steps and writes state.json by the real
`RunFolder`. USR1 and TERM stop it after a commit, with exit code 75. `RUN/computed` gets a line for
each step that rank 0 computes, so that a test counts what was computed twice.
`fault=WHAT:RANK:STEP:START[,...]` hurts one rank at a step of one start (`*`: of each).
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from pipeline.run_folder import RunFolder

EXIT_STOPPED, EXIT_HANG, EXIT_DIVERGED, EXIT_CORRUPT = 75, 86, 87, 88
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
SHORTAGES = {
    "disk": "3 MiB are left on the disk of the run folder, what the next commit needs included",
    "memory": "3 MiB of memory are left on the host of rank 0",
}
world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
start = os.environ.get("SLURM_RESTART_COUNT", "0")
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
steps = int(words.get("steps", 40))
step_seconds = float(words.get("step_seconds", 0.1))
commit_every = int(words.get("commit_every", 5))
folder = RunFolder(Path(words["run.folder"]))
received = []


def say(text):
    print(
        f"start {start} rank {rank} ({socket.gethostname()}, pid {os.getpid()}): {text}", flush=True
    )


def status():
    try:
        return json.loads((folder.path / "state.json").read_text())["status"]
    except FileNotFoundError:
        return ""


def agree():
    """Stopping is a collective: where a rank has gone, the others fail instead."""
    (folder.path / f"agrees-{start}-{rank}").touch()
    deadline = time.monotonic() + 3
    while len(list(folder.path.glob(f"agrees-{start}-*"))) < world_size:
        if time.monotonic() > deadline:
            say("another rank has gone")
            os._exit(1)
        time.sleep(0.02)


def end(name, step, reason, code):
    """Rank 0 writes state.json, and nobody leaves before it has: srun kills who remains."""
    agree()
    if rank == 0:
        folder.write_status(name, step, reason)
    while status() != name:
        time.sleep(0.02)
    say(f"{name} at step {step}")
    os._exit(code)


def here(fault, step):
    """Whether a fault is for this rank, step and start."""
    _, its_rank, its_step, its_start = fault.split(":")
    return int(its_rank) == rank and int(its_step) == step and its_start in ("*", start)


def hurt(what, step):
    say(f"{what} at step {step}")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raise":
        raise RuntimeError("a broken GPU")
    elif what == "hang":
        name = f"rank {rank} (host {socket.gethostname()}, pid {os.getpid()})"
        reason = f'hang: {name} made no progress for 60 s, in phase "data" of step {step}'
        folder.write_status("hang", None, reason)
        os._exit(EXIT_HANG)
    elif what in ("diverged", "corrupt"):
        folder.write_status(what, None, f"{what}: for a test")
        os._exit({"diverged": EXIT_DIVERGED, "corrupt": EXIT_CORRUPT}[what])
    elif what in SHORTAGES:
        end("stopped", step, SHORTAGES[what], EXIT_STOPPED)
    elif what in ("deaf", "stuck"):
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(3600 if what == "stuck" else 0)


for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
folder.path.mkdir(parents=True, exist_ok=True)
if "refuse" in words:
    say("error: refused")
    time.sleep(1)
    sys.exit(2)
step = folder.committed_step()
if rank == 0:
    folder.write_status("running", step)
say(f"continues at step {step}")
(folder.path / f"pid-{rank}").write_text(f"{socket.gethostname()} {os.getpid()}")
faults = [fault for fault in words.get("fault", "").split(",") if fault]
while step < steps:
    time.sleep(step_seconds)
    step += 1
    if rank == 0:
        with (folder.path / "computed").open("a") as file:
            file.write(f"{start} {step}\n")
        if step % commit_every == 0:
            folder.write_status("running", step)
    for fault in faults:
        if here(fault, step):
            hurt(fault.partition(":")[0], step)
    if received:
        end("stopped", step, received[0], int(words.get("stopped_code", EXIT_STOPPED)))
end("done", step, "", 0)
