"""The decision after a bad step, and what is written for the people who look for its cause."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import EXIT_DIVERGED
from pipeline import divergence
from pipeline.config import SafetySection
from pipeline.data import TrainBatches
from pipeline.divergence import (
    Decision,
    DivergedStep,
    DivergencePolicy,
    diverged_error,
    roll_backs_around,
    write_dump,
)
from pipeline.engine_stepping import StepOutcome
from pipeline.phases import Phase, TrainSchedule
from pipeline.replicas import ReplicaFinding
from pipeline.sample_order import SampleOrder, SkippedWindow
from pipeline.skip_list import RollBack
from pipeline.spikes import Spike

SPIKE = Spike("train/mlm_loss", 9.0, 5.0, 20.0, 1)
FLIPPED = ReplicaFinding("generator", ("w",), (1,), 4)


def decide(*, skipped=0, spike=None, replicas=(), newest_commit=100, roll_backs=(), **safety):
    policy = DivergencePolicy(SafetySection(**safety), 10)
    return policy.decide(
        consecutive_skipped=skipped,
        spike=spike,
        replicas=replicas,
        newest_commit=newest_commit,
        roll_backs=roll_backs,
    )


def rolled_back(commit_step, at_step, number=1):
    return RollBack(number, at_step, commit_step, "", ())


def test_a_good_step_and_a_few_refused_ones_go_on():
    assert decide() == Decision("go on")
    assert decide(skipped=9) == Decision("go on")
    assert decide(skipped=9, newest_commit=None) == Decision("go on")


def test_a_streak_goes_back_and_leaves_the_data_out():
    decision = decide(skipped=10)
    assert (decision.action, decision.leaves_out_data) == ("roll back", True)
    assert "10 steps in a row had a non-finite gradient" in decision.reason
    assert "schedule.max_consecutive_skipped_steps is 10" in decision.reason


def test_a_spike_is_told_once_or_goes_back():
    assert decide(spike=SPIKE) == Decision("go on", SPIKE.explain())
    later = Spike("train/mlm_loss", 9.0, 5.0, 20.0, 2)
    assert decide(spike=later) == Decision("go on")
    for spike in (SPIKE, later):
        decision = decide(spike=spike, spike_policy="rollback")
        assert decision == Decision("roll back", spike.explain())


def test_ranks_that_differ_go_back_to_the_same_data():
    decision = decide(replicas=[FLIPPED])
    assert decision == Decision("roll back", FLIPPED.explain(), leaves_out_data=False)
    # What differs is worse than a spike: no data is to blame.
    both = decide(replicas=[FLIPPED], spike=SPIKE, skipped=10, spike_policy="rollback")
    assert both == decision


@pytest.mark.parametrize(
    "cause",
    [{"skipped": 10}, {"replicas": [FLIPPED]}, {"spike": SPIKE, "spike_policy": "rollback"}],
)
def test_without_a_commit_the_run_ends(cause):
    decision = decide(**cause, newest_commit=None)
    assert (decision.action, decision.leaves_out_data) == ("stop", "replicas" not in cause)
    assert decision.reason.endswith(", and there is no commit to go back to")
    assert decide(**cause, newest_commit=0).action == "roll back"


def test_after_as_many_roll_backs_as_are_allowed_the_run_ends():
    before = []
    for number in (1, 2):
        assert decide(skipped=10, roll_backs=before, max_rollbacks=2).action == "roll back"
        before.append(rolled_back(100, 110 + number, number))
    decision = decide(skipped=10, roll_backs=before, max_rollbacks=2)
    assert decision.action == "stop"
    assert "after 2 roll-backs to about here (safety.max_rollbacks is 2)" in decision.reason
    assert decide(skipped=10, roll_backs=before, max_rollbacks=3).action == "roll back"
    assert decide(skipped=10, max_rollbacks=0).action == "stop"
    # A commit behind the steps that diverged begins a new count; one before them does not.
    assert decide(skipped=10, roll_backs=before, newest_commit=113).action == "roll back"
    assert decide(skipped=10, roll_backs=before, newest_commit=111).action == "stop"


def test_roll_backs_that_count():
    history = [rolled_back(100, 120), rolled_back(104, 120), rolled_back(40, 50)]
    assert [roll_backs_around(step, history) for step in (99, 100, 103, 104, 120, 121, 45)] == [
        *(0, 1, 1, 2, 2, 0, 1)
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 4), st.integers(1, 5))
def test_a_run_that_never_gets_past_a_step_ends(wishes, max_rollbacks, interval):
    """However commits fall, a step that always diverges ends the run after max_rollbacks."""
    policy = DivergencePolicy(SafetySection(max_rollbacks=max_rollbacks), 1)
    roll_backs, commit, bad_step = [], 0, 17
    for number in range(max_rollbacks + 1):
        commit = min(bad_step - 1, commit + interval * (wishes[number] if wishes[number:] else 0))
        decision = policy.decide(
            consecutive_skipped=1,
            spike=None,
            replicas=(),
            newest_commit=commit,
            roll_backs=roll_backs,
        )
        if decision.action == "stop":
            assert len(roll_backs) == max_rollbacks
            return
        roll_backs.append(rolled_back(commit, bad_step, number + 1))
    raise AssertionError("it went on for ever")


def batches():
    class Stream:
        def __init__(self, length):
            self.sequence_length, self.num_sequences = length, 40

        def token_range(self, sample):
            return sample * (self.sequence_length - 2), (sample + 1) * (self.sequence_length - 2)

    phases = (Phase(0, 3, 6, 4), Phase(3, 9, 10, 8))
    orders = {length: SampleOrder(40, 5, length, 4, 3) for length in (6, 10)}
    streams = {length: Stream(length) for length in (6, 10)}
    return TrainBatches(streams, orders, TrainSchedule(phases), 2, 2, 0)


BAD = DivergedStep(
    step=4,
    bad_steps=2,
    losses={"train/mlm_loss": float("nan"), "train/rtd_loss": 0.25},
    outcomes={"generator": StepOutcome(False, float("inf")), "discriminator": StepOutcome(True, 2)},
    learning_rates={"generator": 1e-3},
)


def dump(folder, diverged=BAD, roll_backs=(), group=None, is_main=True):
    decision = Decision("stop", "it is bad", False)
    return write_dump(
        folder, diverged, decision, batches(), roll_backs, is_main=is_main, group=group
    )


def test_the_dump_holds_what_people_need(tmp_path):
    rows = [{"step": step, "train/mlm_loss": step / 3} for step in range(60)]
    torn = '{"step": 60, "train/ml'
    text = "".join(json.dumps(row) + "\n" for row in rows) + torn
    (tmp_path / "metrics.jsonl").write_text(text)
    before = RollBack(1, 3, 2, "once before", (SkippedWindow(6, 1, 2),), "abc")
    path = dump(tmp_path, roll_backs=[before])
    assert path == str(tmp_path / "divergence-step-00000004.json")

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    content = json.loads(
        (tmp_path / "divergence-step-00000004.json").read_text(), parse_constant=refuse
    )
    assert content["step"] == 4
    assert (content["reason"], content["action"]) == ("it is bad", "stop")
    assert content["losses"] == {"train/mlm_loss": "nan", "train/rtd_loss": 0.25}
    assert content["grad_norms"] == {"generator": "inf", "discriminator": 2}
    assert content["applied"] == {"generator": False, "discriminator": True}
    assert content["learning_rates"] == {"generator": 1e-3}
    assert content["rows"] == [*rows[-49:], torn]
    assert content["roll_backs"][0]["windows"] == [
        {"sequence_length": 6, "first_position": 1, "end_position": 2}
    ]


def test_the_dump_names_every_rank_s_samples_of_every_bad_step(tmp_path):
    dump(tmp_path)
    content = json.loads((tmp_path / "divergence-step-00000004.json").read_text())
    ours, samples = batches(), content["samples"]
    places = [(each["completed_steps_before"], each["rank"]) for each in samples]
    assert places == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert [each["sequence_length"] for each in samples] == [6, 6, 10, 10]
    for each, (step, rank) in zip(samples, places, strict=True):
        epochs, expected = map(np.ndarray.tolist, ours.samples_at(step, rank))
        assert (each["epochs"], each["samples"]) == (epochs, expected)
        content_tokens = each["sequence_length"] - 2
        assert each["first_tokens"] == [content_tokens * sample for sample in expected]


def test_a_long_streak_names_its_last_steps_alone(tmp_path):
    dump(tmp_path, DivergedStep(9, 500, {}, {}, {}))
    content = json.loads((tmp_path / "divergence-step-00000009.json").read_text())
    assert {each["completed_steps_before"] for each in content["samples"]} == set(range(9))
    assert "metrics.jsonl" in content["rows"][0]  # which is not there


def test_no_dump_takes_the_place_of_another(tmp_path):
    paths = [dump(tmp_path) for _ in range(3)]
    names = [path.rsplit("/", 1)[1] for path in paths]
    stem = "divergence-step-00000004"
    assert names == [f"{stem}.json", f"{stem}-2.json", f"{stem}-3.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_only_rank_0_writes(tmp_path):
    assert dump(tmp_path, is_main=False) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_hides_no_divergence(tmp_path, monkeypatch, caplog):
    def full(_path, _text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(divergence, "write_durably", full)
    told = dump(tmp_path)
    assert told.endswith("(which could not be written: No space left on device)")
    assert "No space left on device" in caplog.text


def test_the_end_names_the_step_the_commit_and_the_dump():
    decision = Decision("stop", "ten steps were bad (limit 10)")
    error = diverged_error(decision, 123, 100, "runs/a/divergence-step-00000123.json")
    assert error.exit_code == EXIT_DIVERGED
    assert str(error) == (
        "step 123: ten steps were bad (limit 10); the newest commit is step 100. Losses, gradient "
        "norms and sample ids: runs/a/divergence-step-00000123.json. Lower "
        "optimizer.*_learning_rate, use bf16 instead of fp16, raise schedule.warmup_steps, or "
        "raise the limit that is named; then the same command goes on from there"
    )
    device = str(diverged_error(Decision("stop", "rank 2 differs", False), 123, 100, "dump"))
    assert device == (
        "step 123: rank 2 differs; the newest commit is step 100. Losses, gradient norms and "
        "sample ids: dump. Take the node of that rank out of service; then the same command goes "
        "on from there"
    )
    nothing = str(diverged_error(decision, 3, None, ""))
    assert nothing.startswith("step 3: ten steps were bad (limit 10). Losses")
    assert nothing.endswith("then the same command begins anew")
