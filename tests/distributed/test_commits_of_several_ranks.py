"""Commits that two ranks write together: what one cannot do, neither does."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.checkpoint import CheckpointStore, SaveError
from pipeline.config import CheckpointSection
from tests.worlds import ROOT, environment

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 60


def rank_main(rank, folder):
    """One of two ranks, in its own process; prints what it sees, one JSON object."""
    import torch.distributed as dist

    from pipeline.train import leave

    folder, rank = Path(folder), int(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    seen = waiting(folder / "checkpoints", rank)
    seen["mistakes"] = [mistake_of(ranks, rank) for ranks in ((1,), (0, 1), ())]
    seen["beside"] = beside_training(folder / "beside", folder / "checkpoints2", rank)
    print(json.dumps(seen), flush=True)
    kill_while_writing(folder / "beside", rank)
    leave(0)


def engine_of(rank):
    """A small engine; what the ranks write does not matter here, who does."""
    from tests.commits import plain_engine, take_step

    engine = plain_engine(rank)
    take_step(engine)
    return engine


def waiting(checkpoints, rank):
    """Commits that training waits for; returns what this rank saw."""
    import torch.distributed as dist

    from data_prep.errors import CorruptError
    from pipeline import faults
    from pipeline.commit import list_commits

    section = CheckpointSection(write_attempts=2)
    store = CheckpointStore(checkpoints, section, rank, dist.group.WORLD)
    networks = {"generator": engine_of(rank), "discriminator": engine_of(rank + 2)}
    seen = {}
    store.save(4, networks, {}, "{}")
    faults.configure("save.share:1:8:enospc", rank)
    try:
        store.save(8, networks, {}, "{}")
    except SaveError as error:
        seen["failure"] = re.sub(r"[\d,]+ bytes", "N bytes", str(error))
    dist.barrier()
    seen["after the failure"] = sorted(path.name for path in checkpoints.iterdir())
    dist.barrier()
    faults.configure("save.written:1:8:eio::1", rank)  # only one rank, only once: both try again
    store.save(8, networks, {}, "{}")
    faults.configure("", rank)
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
    return seen


def beside_training(checkpoints, undisturbed, rank):
    """Commits that are written while the ranks go on; returns what this rank saw."""
    import torch
    import torch.distributed as dist

    from pipeline import commit_writer, faults
    from tests.commits import contents, take_step

    published = []
    store = CheckpointStore(
        checkpoints,
        CheckpointSection(asynchronous=True, write_attempts=1),
        rank,
        dist.group.WORLD,
        writer_group=dist.new_group(backend="gloo"),
        on_published=published.append,
    )
    engine, total = engine_of(rank), torch.zeros(())
    plain = CheckpointStore(undisturbed, CheckpointSection(), rank, dist.group.WORLD)
    plain.save(4, {"joint": engine}, {"step": 4}, "{}")
    # One rank writes only after both have trained: their collectives must not meet the writer's.
    trained, write_snapshot = threading.Event(), commit_writer.write_snapshot

    def write_late(*arguments):
        assert rank == 0 or trained.wait(TIMEOUT_SECONDS)
        write_snapshot(*arguments)

    commit_writer.write_snapshot = write_late
    store.save(4, {"joint": engine}, {"step": 4}, "{}")
    for step in range(100):
        take_step(engine)
        value = torch.tensor(float(step))
        dist.all_reduce(value)
        total += value
    seen = {"sum": total.item(), "before the end": store.published_step}
    trained.set()
    store.finish()
    seen["as if training waited"] = contents(checkpoints / "step-00000004") == contents(
        undisturbed / "step-00000004"
    )
    faults.configure("save.written:0:8:eio;save.manifest:0:16:raise", rank)
    store.save(8, {"joint": engine}, {}, "{}")
    try:
        store.save(12, {"joint": engine}, {}, "{}")
    except SaveError as error:
        seen["at the next save"] = re.sub(r"[\d,]+ bytes", "N bytes", str(error))
    store.finish()
    store.save(16, {"joint": engine}, {}, "{}")
    try:
        store.finish()
    except (SaveError, RuntimeError) as error:
        seen["after a mistake"] = str(error)
    seen["published"] = store.published_step
    seen["told"] = [published, [4, 12]][rank]  # on rank 0 alone
    assert not (published and rank)
    dist.barrier()
    return seen


def kill_while_writing(checkpoints, rank):
    """Rank 0 dies with a commit complete but for its name; both were training on."""
    import torch
    import torch.distributed as dist

    from pipeline import faults

    store = CheckpointStore(
        checkpoints,
        CheckpointSection(asynchronous=True),
        rank,
        dist.group.WORLD,
        writer_group=dist.new_group(backend="gloo"),
    )
    faults.configure("save.rename:0:20:kill", rank)
    store.save(20, {"joint": engine_of(rank)}, {}, "{}")
    try:
        while True:
            dist.all_reduce(torch.zeros(1))
    except RuntimeError:
        assert rank == 1  # its peer is gone


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
    for name in ("checkpoints", "beside", "checkpoints2"):
        (tmp_path / name).mkdir()
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
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 0], outputs
    left, right = (json.loads(output) for output, _ in outputs)
    mistakes = [side["beside"].pop("after a mistake") for side in (left, right)]
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
    beside = left["beside"]
    assert beside["sum"] == 2 * sum(range(100))
    assert beside["before the end"] == 0, "the first commit was to be slower than training"
    assert beside["as if training waited"]
    assert "rank 0 cannot write a checkpoint" in beside["at the next save"]
    assert "step-00000008 needs N bytes" in beside["at the next save"]
    assert mistakes == [
        "injected at save.manifest",
        "rank 0: RuntimeError: injected at save.manifest",
    ]
    assert (beside["published"], beside["told"]) == (12, [4, 12])
    folder = tmp_path / "beside"
    assert (folder / "step-00000020.partial" / "manifest.sha256").is_file()
    store = CheckpointStore(folder, CheckpointSection(), 0, None)
    assert store.newest_valid().step == 12
    assert {path.name for path in folder.iterdir()} == {
        "latest",
        "step-00000004",
        "step-00000012",
    }
