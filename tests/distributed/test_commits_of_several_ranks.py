"""Commits that two ranks write together: what one cannot do, neither does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds import ROOT, environment

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 60


def rank_main(rank, folder):
    """One of two ranks, in its own process; prints what it sees, one JSON object."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from data_prep.errors import CorruptError
    from pipeline import checkpoint
    from pipeline.commit import list_commits
    from pipeline.config import CheckpointSection
    from pipeline.train import leave

    folder, rank = Path(folder), int(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    checkpoints = folder / "checkpoints"
    store = checkpoint.CheckpointStore(checkpoints, CheckpointSection(), rank, dist.group.WORLD)
    networks = {"generator": None, "discriminator": None}
    fails = {"step": None}

    def write_state(_engine, rank, file):
        if fails["step"] and rank == 1:
            raise OSError(28, "No space left on device")
        save_file({"weight/w": torch.arange(100.0) + rank}, file, metadata={"starts": "{}"})

    checkpoint.write_state = write_state  # what the ranks write does not matter here, who does
    seen = {}
    store.save(4, networks, {}, "{}")
    fails["step"] = 8
    try:
        store.save(8, networks, {}, "{}")
    except checkpoint.SaveError as error:
        seen["failure"] = str(error)
    dist.barrier()
    seen["after the failure"] = sorted(path.name for path in checkpoints.iterdir())
    dist.barrier()
    fails["step"] = None
    store.save(8, networks, {}, "{}")
    store.save(12, networks, {}, "{}")
    seen["newest"] = store.newest_valid().step
    dist.barrier()
    if rank == 0:  # a file that the other rank will hash
        damaged = checkpoints / "step-00000012" / "discriminator" / "rank-00001.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        (checkpoints / "step-00000008" / "generator" / "rank-00000.safetensors").unlink()
    dist.barrier()
    seen["newest after damage"] = store.newest_valid().step
    seen["left"] = [commit.step for commit in list_commits(checkpoints)]
    dist.barrier()
    if rank == 1:
        (checkpoints / "step-00000004" / "manifest.sha256").write_text("")
    dist.barrier()
    try:
        store.newest_valid()
    except CorruptError as error:
        seen["corrupt"] = str(error)
    seen["mistakes"] = [mistake_of(ranks, rank) for ranks in ((1,), (0, 1), ())]
    print(json.dumps(seen))
    dist.destroy_process_group()
    leave(0)


def mistake_of(ranks, rank):
    """What this rank raises after some ranks could not open their data."""
    import torch.distributed as dist

    from data_prep.errors import CorruptError
    from pipeline.runtime import on_all_ranks

    def open_data():
        if rank in ranks:
            raise CorruptError("no such dataset")
        return f"data of rank {rank}"

    try:
        assert on_all_ranks(dist.group.WORLD, open_data) == f"data of rank {rank}"
    except CorruptError as error:
        return str(error)


def test_two_ranks_agree_about_every_commit(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    code = "import sys; from tests.distributed.test_commits_of_several_ranks import rank_main as r;"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code} r(*sys.argv[1:])", str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    left, right = (json.loads(output) for output, _ in outputs)
    assert left == right
    assert "rank 1 cannot write a checkpoint" in left["failure"]
    assert "No space left on device" in left["failure"]
    assert left["after the failure"] == ["latest", "step-00000004"]
    assert left["newest"] == 12
    assert left["newest after damage"] == 4
    assert left["left"] == [4]
    assert "no checkpoint is whole" in left["corrupt"]
    assert "step-00000004/manifest.json: sha256 is" in left["corrupt"]
    assert left["mistakes"] == ["rank 1: no such dataset", "no such dataset", None]
