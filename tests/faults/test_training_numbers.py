"""Numbers that are not finite, losses that jump, bits that flip in a replica."""

import json

import pytest
from safetensors.torch import load_file

from pipeline.commit import list_commits
from pipeline.counter_rng import sample_words
from tests.faults.fingerprint import consumed_samples, fingerprint
from tests.faults.harness import Setup

pytestmark = pytest.mark.distributed


def rows_of(run, key):
    """By step: one figure of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


def assert_finite(run):
    """No tensor of the last commit has a number that is not finite."""
    commit = list_commits(run / "checkpoints")[-1].path
    for path in commit.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{path}: {name}"


def modified(path):
    """When a file was written, in nanoseconds."""
    return path.stat().st_mtime_ns


def skip_lines(run):
    """What the run never trains on again."""
    path = run / "skipped_data.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


ALL_MODES = [Setup(2, 1, "bf16"), Setup(2, 2), Setup(2, 2, "bf16"), Setup(2, 3), Setup(2, 1)]


@pytest.mark.row(18)
@pytest.mark.parametrize(
    "setup",
    [
        Setup(2, 0),
        Setup(2, 3, "bf16"),
        *(pytest.param(setup, marks=pytest.mark.faults) for setup in ALL_MODES),
    ],
    ids=lambda setup: f"{setup.stage}-{setup.precision}",
)
def test_not_finite_on_one_rank(setup, lab, tmp_path, note):
    run = tmp_path / "run"
    fault = "step.generator_loss:1:5:nan::1;step.discriminator_loss:0:7:inf::1"
    outcome = lab.run(run, setup, fault=fault)
    assert outcome.codes == [0, 0], outcome.output
    for engine, step in (("generator", 5), ("discriminator", 7)):
        skipped = rows_of(run, f"optim/{engine}_skipped_steps")
        assert skipped == {row: int(row > step) for row in range(1, 13)}, engine
    assert_finite(run)
    # Data and schedule go on: every sample is seen once, as if nothing had happened.
    reference = lab.reference(setup)
    assert consumed_samples(run) == reference.samples
    before = [row for row in fingerprint(run).rows if int(row["step"]) <= 5]
    assert before == [row for row in reference.rows if int(row["step"]) <= 5]
    last = [rows_of(folder, "eval/mlm_loss")[12] for folder in (run, lab.reference_folder(setup))]
    assert abs(last[0] - last[1]) < 0.1
    note(
        f"NaN on rank 1 in step 5, inf on rank 0 in step 7, stage {setup.stage} {setup.precision}",
        "each network skipped its step on both ranks, counted; all finite",
    )


STREAK = ("schedule.max_consecutive_skipped_steps=3", "schedule.max_steps=16")


@pytest.mark.row(18)
@pytest.mark.parametrize(
    "setup",
    [
        Setup(2, 1, words=STREAK),
        pytest.param(Setup(2, 3, "bf16", words=STREAK), marks=pytest.mark.faults),
        pytest.param(Setup(2, 0, words=STREAK), marks=pytest.mark.faults),
    ],
    ids=lambda setup: f"{setup.stage}-{setup.precision}",
)
def test_streak_rolls_back_and_leaves_the_data_out(setup, lab, tmp_path, note):
    run = tmp_path / "run"
    # Three steps of two micro batches; the roll-back to step 4 leaves out the data of 4 to 7.
    fault = "step.generator_loss:1:5-7:nan::6"
    outcome = lab.run(run, setup, fault=fault)
    assert outcome.codes == [0, 0], outcome.output
    (line,) = skip_lines(run)
    assert (line["commit_step"], line["at_step"]) == (4, 8)
    samples, reference = consumed_samples(run), lab.reference(setup).samples
    shift = line["at_step"] - line["commit_step"]
    for rank in range(2):
        for step in range(4):
            assert samples[f"rank {rank}, step {step}"] == reference[f"rank {rank}, step {step}"]
        for step in range(4, 16 - shift):
            here, there = f"rank {rank}, step {step}", f"rank {rank}, step {step + shift}"
            assert samples[here] == reference[there], "the window was not left out"
    assert [int(row["step"]) for row in fingerprint(run).rows if "train/mlm_loss" in row] == [
        *range(1, 17)
    ]
    assert_finite(run)
    # The skip list outlives kills, one of them before the first commit behind the roll-back.
    again = tmp_path / "again"
    outcome = lab.run(again, setup, fault=f"{fault};save.begin:0:8:kill")
    assert list_commits(again / "checkpoints")[-1].step == 4
    lab.run(again, setup, fault="step.generator_update:1:11:kill")
    outcome = lab.run(again, setup)
    assert outcome.codes == [0, 0], outcome.output
    assert skip_lines(again) == skip_lines(run)
    assert not (found := fingerprint(again).differences(fingerprint(run))), found[:5]
    note(
        f"three steps of NaN in a row on rank 1, stage {setup.stage} {setup.precision}; two kills",
        f"back to step {line['commit_step']}, data of {shift} steps left out; bit for bit again",
    )


@pytest.mark.row(18)
def test_streak_without_end(lab, tmp_path, note):
    setup, run = Setup(2, words=(*STREAK, "safety.max_rollbacks=1")), tmp_path / "run"
    outcome = lab.run(run, setup, fault="step.generator_loss:1:5-99:nan")
    assert outcome.codes == [87, 87], outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.status["status"] == "diverged"
    assert outcome.status["step"] == 4
    assert len(skip_lines(run)) == 1
    rolled_back, dump = sorted(run.glob("divergence-*.json"), key=modified)
    value = json.loads(dump.read_text())
    assert (json.loads(rolled_back.read_text())["action"], value["action"]) == ("roll back", "stop")
    assert dump.name in outcome.logs
    # It names what the steps were really given.
    taken = consumed_samples(run)
    assert value["samples"]
    for part in value["samples"]:
        given = taken[f"rank {part['rank']}, step {part['completed_steps_before']}"]
        named = zip(part["epochs"], part["samples"], strict=True)
        assert [list(sample_words(*each)) for each in named] == [w for m in given for w in m]
    # With the cause gone, the same command goes on.
    outcome = lab.run(run, setup)
    assert outcome.codes == [0, 0], outcome.output
    assert_finite(run)
    note("NaN in every step from 5 on", f"one roll-back, then 87; {dump.name}")


SPIKES = ("schedule.max_steps=28", "safety.spike_window_steps=16", "evaluation.interval_steps=0")


@pytest.mark.row(19)
@pytest.mark.parametrize("policy", ["log", "rollback"])
def test_spike_of_the_loss(policy, lab, tmp_path, note):
    words = (*SPIKES, f"safety.spike_policy={policy}")
    setup, run = Setup(words=words), tmp_path / "run"
    outcome = lab.run(run, setup, fault="step.generator_loss:0:22:scale:10:2")
    assert outcome.codes == [0], outcome.output
    told = [line for line in outcome.logs.splitlines() if "is a spike" in line]
    assert told, outcome.logs
    assert "train/mlm_loss" in told[0]
    lines = skip_lines(run)
    if policy == "log":
        assert not lines
        assert consumed_samples(run) == lab.reference(setup).samples
    else:
        assert [(line["commit_step"], line["at_step"]) for line in lines] == [(20, 23)]
    assert_finite(run)
    note(f"step 22's loss times ten, policy {policy}", told[0].partition(": ")[2][:160])


@pytest.mark.row(20)
@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), pytest.param(0, 4, marks=pytest.mark.faults)])
def test_replica_flips(stage, ranks, lab, tmp_path, note):
    setup = Setup(ranks, stage, words=("safety.replica_interval_steps=4",))
    run = tmp_path / "run"
    outcome = lab.run(run, setup, fault="replica:1:8:flip::1")
    told = [line for line in outcome.logs.splitlines() if "flipped bit" in line]
    assert told, outcome.logs
    assert "should hold alike" in told[0]
    if ranks > 2:
        assert f"rank 1 of {ranks} differs" in told[0]
    lab.finish(run, setup)
    note(f"a bit of a weight of rank 1 of {ranks}, stage {stage}", told[0].partition(": ")[2][:200])
