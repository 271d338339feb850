"""What the planner counts of DeepSpeed, against real engines of two ranks: bytes sent and kept.

    python -m tests.distributed.test_plan_communication FOLDER HALF

trains two steps of each point of a half in one world of two processes, forked here, and writes
what each rank sent in the second one and what its engines keep. Points of one rank are in
`tests/unit/pipeline/test_plan_memory.py`.
"""

import functools
import gc
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from pipeline.plan.communication import step_collectives
from pipeline.plan.parameters import engine_parameters
from pipeline.plan.sharding import Sharding
from tests.faults.forks import free_port
from tests.planned_engines import POINTS, RANKS, assert_kept, point, train_point
from tests.worlds import ROOT, TIMEOUT_SECONDS, environment

HALVES = ([*POINTS][:10], [*POINTS][10:])
"""Points of one world each: on a busy machine all of them would take minutes."""


def train_rank(rank: int, port: int, folder: Path, names: list[str]) -> None:
    """One process of the world."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from pipeline.runtime import World, start_world

    world, linear = World.from_environment(), torch.nn.functional.linear
    start_world(world)
    found = {}
    for name in names:
        torch.nn.functional.linear = linear  # stage 3 replaces it for good
        found[name] = train_point(name, world)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def main(folder: Path, names: list[str]) -> None:
    """Fork the ranks, which share all that is imported; their exit codes are this process's."""
    import deepspeed  # noqa: F401
    import torch._dynamo  # noqa: F401

    import pipeline.engine
    import pipeline.runtime
    import pipeline.step  # noqa: F401

    gc.collect()
    gc.freeze()  # DeepSpeed collects a dozen times for every engine
    port, pids = free_port(), []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                train_rank(rank, port, folder, names)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))


@functools.cache
def measured(half: int, folder: Path) -> list[dict]:
    """What both ranks found at the points of a half."""
    command = [sys.executable, "-m", "tests.distributed.test_plan_communication", str(folder)]
    done = subprocess.run(
        [*command, str(half)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One for each half."""
    return [tmp_path_factory.mktemp("planned") for _ in HALVES]


@pytest.fixture
def found_by_rank(request, folders):
    """What each rank found at the test's point."""
    name = request.node.callspec.params["name"]
    (half,) = (number for number, names in enumerate(HALVES) if name in names)
    return [found[name] for found in measured(half, folders[half])]


SENT_AS = {
    "all_reduce": ("allreduce_",),
    "all_gather": ("_allgather_base_",),
    "reduce_scatter": ("_reduce_scatter_base_",),
    "reduce": ("reduce_",),
}


@pytest.mark.parametrize("name", POINTS)
def test_bytes_sent_in_a_step(found_by_rank, name):
    config, deepspeed = point(name)
    plan = deepspeed.batch_plan(RANKS)
    planned = Counter()
    for each in step_collectives(
        config,
        Sharding(deepspeed, RANKS),
        engine_parameters(config),
        plan.gradient_accumulation_steps,
    ):
        planned[each.operation] += each.payload_bytes
    for found in found_by_rank:
        sent = found["sent"]
        for operation, kinds in SENT_AS.items():
            really = sum(sent.get(kind, 0) for kind in kinds)
            # Counts and norms are a few numbers, which the plan leaves out.
            assert planned[operation] == pytest.approx(really, rel=0.02, abs=400), operation
        others = sent.keys() - {kind for kinds in SENT_AS.values() for kind in kinds}
        assert sum(sent[kind] for kind in others) <= 0.02 * sum(sent.values())


@pytest.mark.parametrize("name", POINTS)
def test_bytes_kept_by_each_rank(found_by_rank, name):
    assert_kept(name, RANKS, found_by_rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]), HALVES[int(sys.argv[2])])
