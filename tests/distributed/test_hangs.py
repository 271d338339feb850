"""Worlds of four ranks in which one rank hangs, works slowly, or computes slowly.

All worlds run at once, in processes that one driver forks after its imports: they mostly wait.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds import ROOT, environment

pytestmark = pytest.mark.distributed

RANKS = 4
TIMEOUT_SECONDS = 120
HANG_SECONDS = 3.0
WORLDS = {
    "stopped": "step.begin:2:20:stop",
    "main rank stopped": "step.begin:0:20:stop",
    "asleep in data": "data.read:1:20:hang",
    "lock held": "evaluate.batch:3:20:gil",
    "a device that never answers": "data.read:1:20:hang",
    "a slow write": "",
    "a slow rank": "",
}
POINTS = {"data.read": "data", "step.begin": "step", "evaluate.batch": "evaluate"}


def rank_main(rank, folder, name, hang_seconds=HANG_SECONDS):
    """One rank: all-reduces with marks, until its fault strikes or 40 steps are done."""
    import torch
    import torch.distributed as dist

    from pipeline import faults
    from pipeline.config import SafetySection
    from pipeline.runtime import World, configure_logging
    from pipeline.watchdog import Watchdog

    os.dup2(os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
    configure_logging(rank, folder)
    world = World(rank, rank, RANKS, torch.device("cpu"))
    faults.configure(WORLDS[name], rank)
    section = SafetySection(hang_seconds=hang_seconds, startup_seconds=60.0, straggler_steps=10)
    watchdog = Watchdog(folder, world, section)
    watchdog.start()
    try:
        train(rank, folder, name, world, section, watchdog)
    finally:
        watchdog.stop()
    dist.destroy_process_group()
    os._exit(0)


def train(rank, folder, name, world, section, watchdog):
    """What a rank does while it is watched."""
    import time

    import torch
    import torch.distributed as dist

    from pipeline import faults

    if name == "a device that never answers":
        block_the_recorder()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    watchdog.join(dist.group.WORLD)
    for step in range(40):
        began = time.monotonic()
        for point, phase in POINTS.items():
            watchdog.mark(phase, step)
            faults.reach(point, step)
            dist.all_reduce(torch.ones(1000))
        watchdog.step_ended(time.monotonic() - began)
        if name == "a slow write" and step == 20 and rank == 0:
            for _ in range(int(2 * section.hang_seconds)):
                watchdog.mark("save", step)
                time.sleep(1)
    watchdog.mark("end", 40)
    if name == "a slow rank":
        report_slow_ranks(section, world, dist.group.WORLD)


def block_the_recorder():
    """torch asks the device for what it has done, and keeps the interpreter's lock meanwhile."""
    import ctypes

    import torch

    torch._C._distributed_c10d._dump_fr_trace_json = lambda: ctypes.PyDLL(None).sleep(3600)


def report_slow_ranks(section, world, group):
    """Two comparisons: one rank is twice as slow, then none is."""
    from pipeline.stragglers import Stragglers

    stragglers = Stragglers(section, world, group)
    seconds = [0.1, 0.11, 0.2, 0.09][world.rank]
    ratios = [stragglers.add(99.0 if world.rank == 0 else 0.0, 0)]  # the first step never counts
    ratios += [stragglers.add(seconds if step <= 10 else 0.1, step) for step in range(1, 21)]
    print(json.dumps(ratios), file=sys.stderr, flush=True)


def driver_main(folder):
    """Fork all worlds, wait for their ranks, and print the exit codes; None still runs."""
    import torch.distributed  # noqa: F401  imported once, for all ranks

    import pipeline.watchdog  # noqa: F401

    fork = multiprocessing.get_context("fork")
    worlds = {}
    for name in WORLDS:
        (Path(folder) / name).mkdir()
        arguments = [(rank, Path(folder) / name, name) for rank in range(RANKS)]
        worlds[name] = [fork.Process(target=rank_main, args=each) for each in arguments]
        for process in worlds[name]:
            process.start()
    hanging = {"stopped": 2, "main rank stopped": 0, "lock held": 3}
    for name, processes in worlds.items():
        for rank, process in enumerate(processes):
            if hanging.get(name) != rank:
                process.join()
    codes = {name: [each.exitcode for each in processes] for name, processes in worlds.items()}
    print(json.dumps(codes), flush=True)
    os.killpg(0, signal.SIGKILL)  # the stopped ranks and this driver


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Folder and exit codes of all worlds."""
    folder = tmp_path_factory.mktemp("worlds")
    code = "import sys; from tests.distributed.test_hangs import driver_main as d; d(sys.argv[1])"
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
    )
    try:
        output, errors = driver.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
    assert output, errors
    return folder, json.loads(output)


def state(folder):
    return json.loads((folder / "state.json").read_text())


@pytest.mark.parametrize(
    ("name", "culprit", "phase"),
    [
        ("stopped", 2, "step"),
        ("main rank stopped", 0, "step"),
        ("asleep in data", 1, "data"),
        ("lock held", 3, "evaluate"),
    ],
)
def test_the_others_end_and_name_the_rank_that_hangs(worlds, name, culprit, phase):
    folder, codes = worlds[0] / name, worlds[1][name]
    lives = name == "asleep in data"  # its own watchdog still runs
    assert codes == [86 if lives or rank != culprit else None for rank in range(RANKS)]
    assert state(folder)["status"] == "hang"
    reason = state(folder)["reason"]
    assert reason.startswith(f"hang: rank {culprit} (host ")
    assert f'in phase "{phase}" of step 20' in reason
    assert ("no sign of life" in reason) is not lives
    (report,) = (folder / "logs").glob("hang-*.txt")
    lines = report.read_text().splitlines()
    assert lines[0] == reason
    assert len(lines) == 1 + RANKS
    for rank in range(RANKS):
        waits = ", waits in all_reduce" in lines[1 + rank]
        assert waits == (rank != culprit), lines[1 + rank]


@pytest.mark.parametrize("name", ["stopped", "asleep in data", "lock held"])
def test_stacks_of_all_ranks_that_can_are_written(worlds, name):
    logs = worlds[0] / name / "logs"
    stacks = {path.name: path.read_text() for path in logs.glob("stacks-rank-*.txt")}
    for rank in range(RANKS):
        text = stacks[f"stacks-rank-{rank:05d}.txt"]
        assert ("rank_main" in text) == (name != "stopped" or rank != 2), (rank, text)


def test_collectives_of_all_ranks_that_can_are_written(worlds):
    logs = worlds[0] / "stopped" / "logs"
    files = {path.name: json.loads(path.read_text()) for path in logs.glob("collectives-rank-*")}
    assert sorted(files) == [f"collectives-rank-{rank:05d}.json" for rank in (0, 1, 3)]
    for entries in files.values():
        newest = entries["gloo"][-1]
        assert newest["profiling_name"] == "gloo:all_reduce"
        assert newest["input_sizes"] == [[1000]]


def test_what_blocks_behind_the_verdict_ends_too(worlds):
    folder, codes = worlds[0] / "a device that never answers", worlds[1]
    assert codes["a device that never answers"] == [1] * RANKS  # no thread could say 86
    assert state(folder)["reason"].startswith("hang: rank 1 (host ")


def test_one_rank_reports_for_all(worlds):
    folder = worlds[0] / "stopped"
    texts = [(folder / f"rank-{rank}.txt").read_text() for rank in (0, 1, 3)]
    assert sum(state(folder)["reason"] in text for text in texts) == 1
    for text in texts:
        assert "exit code 86" in text


def test_a_rank_that_works_slowly_is_no_hang(worlds):
    folder, codes = worlds[0] / "a slow write", worlds[1]["a slow write"]
    assert codes == [0] * RANKS
    assert not (folder / "state.json").exists()
    log = (folder / "logs" / "rank-00001.log").read_text()
    assert "rank 1 gets on again after it seemed to hang" in log


def test_a_world_that_ends_leaves_its_last_beats(worlds):
    folder, codes = worlds[0] / "a slow rank", worlds[1]["a slow rank"]
    assert codes == [0] * RANKS
    beats = [json.loads(path.read_text()) for path in (folder / "heartbeats").iterdir()]
    assert sorted(beat["rank"] for beat in beats) == list(range(RANKS))
    assert {(beat["phase"], beat["step"]) for beat in beats} == {("end", 40)}
    assert len({beat["start"] for beat in beats}) == 1
    assert list((folder / "logs").glob("stacks*")) == []


def test_a_slow_rank_is_named_once(worlds):
    folder = worlds[0] / "a slow rank"
    logs = [(folder / "logs" / f"rank-{rank:05d}.log").read_text() for rank in range(RANKS)]
    warnings = [line for log in logs for line in log.splitlines() if "WARNING" in line]
    assert len(warnings) == 1, warnings
    assert "rank 0 WARNING" in warnings[0]
    assert "step 10: rank 2 (host " in warnings[0]
    assert "computes 2.00 times as long as the other ranks" in warnings[0]
    ratios = json.loads((folder / "rank-3.txt").read_text().splitlines()[-1])
    compared = [ratio for ratio in ratios if ratio is not None]
    assert compared == pytest.approx([2.0, 1.0])
    assert ratios.index(compared[0]) == 10
