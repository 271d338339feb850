"""A launcher ends who remains when a rank has left: nobody leaves before state.json is written."""

import multiprocessing
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from pipeline.run_folder import RunFolder
from pipeline.train import _stopped

RANKS = 2


class SlowFolder(RunFolder):
    """On a file system that takes its time."""

    def write_status(self, status, step, reason=""):
        time.sleep(1)
        super().write_status(status, step, reason)


def leave_as(rank, folder, seen):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    session = SimpleNamespace(
        world=SimpleNamespace(is_main=rank == 0),
        folder=SlowFolder(folder),
        stop=SimpleNamespace(name="SIGUSR1", shortage=None),
        control_group=dist.group.WORLD,
    )
    code = _stopped(session, 5)
    seen.put((code, (folder / "state.json").exists()))


@pytest.mark.distributed
def test_no_rank_leaves_before_the_state_is_written(tmp_path):
    # Not forked: other tests have left threads in this process.
    spawn = multiprocessing.get_context("spawn")
    seen = spawn.Queue()
    ranks = [spawn.Process(target=leave_as, args=(rank, tmp_path, seen)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    answers = [seen.get(timeout=100) for _ in ranks]
    for process in ranks:
        process.join(60)
    assert answers == [(75, True)] * RANKS
