"""SIGKILL to a rank, in a step and at every point of a save, and to a whole world."""

import random
import shutil
import signal

import pytest

from pipeline.commit import list_commits, verify_commit
from tests.faults.harness import Setup

pytestmark = pytest.mark.distributed

SAVE_POINTS = ("begin", "share", "written", "manifest", "rename", "latest", "prune")
OF_RANK_0 = SAVE_POINTS[3:]


def commits_after_a_kill(run):
    """Steps of the commits, all of which must be whole."""
    commits = list_commits(run / "checkpoints")
    for commit in commits:
        verify_commit(commit)
    latest = run / "checkpoints" / "latest"
    if latest.exists():
        assert latest.read_text().strip() in {commit.path.name for commit in commits}
    return [commit.step for commit in commits]


@pytest.mark.row(4)
@pytest.mark.parametrize(
    ("setup", "point", "rank"),
    [
        (Setup(2), "step.generator_update", 1),
        pytest.param(Setup(2, 3, "bf16"), "step.discriminator_update", 0, marks=pytest.mark.faults),
        pytest.param(Setup(2, 0), "step.end", 0, marks=pytest.mark.faults),
        pytest.param(Setup(2, 2, "bf16"), "step.begin", 1, marks=pytest.mark.faults),
    ],
)
def test_rank_is_killed_in_a_step(setup, point, rank, lab, tmp_path, note):
    outcome = lab.run(tmp_path / "run", setup, fault=f"{point}:{rank}:7:kill")
    assert outcome.codes[rank] == -signal.SIGKILL
    assert outcome.codes[1 - rank] not in (0, 75, -signal.SIGKILL), outcome.output
    after = outcome.seconds[1 - rank] - outcome.seconds[rank]
    assert after < 30
    assert commits_after_a_kill(tmp_path / "run") == [4]
    assert outcome.status["status"] == "running"
    lab.finish(tmp_path / "run", setup)
    note(f"SIGKILL to rank {rank} at {point}, stage {setup.stage}", f"peer gone in {after:.1f} s")


@pytest.mark.row(5)
@pytest.mark.parametrize(
    ("ranks", "points"),
    [
        (1, [("written", 0), ("rename", 0), ("latest", 0)]),
        pytest.param(2, [(p, 0) for p in SAVE_POINTS], marks=pytest.mark.faults),
        pytest.param(
            2, [(p, 1) for p in SAVE_POINTS if p not in OF_RANK_0], marks=pytest.mark.faults
        ),
    ],
)
def test_killed_in_a_save(ranks, points, lab, tmp_path, note):
    words = ("schedule.max_steps=18", "checkpoint.interval_steps=2", "evaluation.interval_steps=0")
    setup, run = Setup(ranks, words=words), tmp_path / "run"
    seen = []
    for number, (point, rank) in enumerate(points):
        step = 2 * (number + 2)
        outcome = lab.run(run, setup, fault=f"save.{point}:{rank}:{step}:kill")
        assert outcome.codes[rank] == -signal.SIGKILL, outcome.output
        steps = commits_after_a_kill(run)
        assert steps[-1] == (step if point in ("latest", "prune") else step - 2)
        seen.append(f"{point}: {steps[-1]}")
    # A save that was asked for and killed is of a step that no later start saves again.
    for kind in ("partial", "removing"):
        shutil.copytree(
            run / "checkpoints" / f"step-{steps[-1]:08d}", run / f"checkpoints/step-00000001.{kind}"
        )
    outcome = lab.finish(run, setup)
    assert not [name for name in outcome.commits if "." in name], outcome.commits
    note(
        f"SIGKILL to rank {points[0][1]} of {ranks} at save.{{{', '.join(p for p, _ in points)}}}",
        "every name a whole commit; left-overs removed; bit for bit",
    )


@pytest.mark.row(6)
@pytest.mark.faults
def test_whole_world_is_killed(lab, tmp_path, note):
    words = ("schedule.max_steps=24", "checkpoint.interval_steps=2")
    setup, run = Setup(2, words=words), tmp_path / "run"
    step = random.Random(6).randrange(4, 16)
    with lab.start(run, setup, launcher="torchrun") as running:
        running.until_step(step)
        running.kill()
        outcome = running.wait(30)
    assert outcome.codes == [-signal.SIGKILL]
    steps = commits_after_a_kill(run)
    assert steps
    lab.finish(run, setup)
    note(f"SIGKILL to torchrun and both ranks after step {step}", f"went on from step {steps[-1]}")


@pytest.mark.row(6)
@pytest.mark.faults
def test_the_launcher_is_killed_alone(lab, tmp_path, note):
    words = ("schedule.max_steps=24", "checkpoint.interval_steps=2")
    setup, run = Setup(2, words=words), tmp_path / "run"
    with lab.start(run, setup, launcher="torchrun", fault="step.begin:*:9:sleep:4") as running:
        running.until_step(9)
        orphans = running.everybody()[1:]
        running.everybody()[0].kill()
        refused = lab.run(run, setup, grace_seconds=2)
        still_there = [process for process in orphans if process.is_running()]
        try:
            # Ranks that live on keep their folder; a second run must not write into it.
            assert not still_there or refused.codes[0] == 2, refused.output
        finally:
            for process in orphans:
                if process.is_running():
                    process.wait(60)
    lab.finish(run, setup)
    note("SIGKILL to torchrun alone", "its ranks keep the folder until they end")
