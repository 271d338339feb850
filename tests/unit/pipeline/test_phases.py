"""Phases: which samples of which length a step takes, and the batches that a world can split."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import EXIT_USAGE, UserError
from pipeline.config_loading import load_run_config
from pipeline.ds_config import BatchPlan
from pipeline.phases import Phase, TrainSchedule, train_schedule

# Example of the module: 10 steps of 4 x 128, 5 steps of 2 x 512, then 8 x 512.
EXAMPLE = TrainSchedule((Phase(0, 10, 128, 4), Phase(10, 15, 512, 2), Phase(15, 40, 512, 8)))
RETURNING = TrainSchedule((Phase(0, 2, 16, 4), Phase(2, 5, 32, 6), Phase(5, 9, 16, 2)))


def config(*phases, max_steps=40, length=64):
    demo = load_run_config(
        "demo", [f"schedule.max_steps={max_steps}", "schedule.warmup_steps=0"]
    ).model_dump()
    demo["schedule"]["phases"] = phases
    demo["data"]["sequence_length"] = length
    return type(load_run_config("demo")).model_validate(demo)


def plan(train_batch_size=96, micro=8, ranks=2):
    return BatchPlan(ranks, micro, train_batch_size // (micro * ranks), train_batch_size)


@pytest.mark.parametrize(
    ("step", "length", "batch", "first_sample", "tokens"),
    [
        (0, 128, 4, 0, 0),
        (1, 128, 4, 4, 512),
        (9, 128, 4, 36, 9 * 512),
        (10, 512, 2, 0, 10 * 512),
        (14, 512, 2, 8, 10 * 512 + 4 * 1024),
        (15, 512, 8, 10, 10 * 512 + 5 * 1024),
        (16, 512, 8, 18, 10 * 512 + 5 * 1024 + 4096),
        (40, 512, 8, 210, 10 * 512 + 5 * 1024 + 25 * 4096),
    ],
)
def test_the_example(step, length, batch, first_sample, tokens):
    phase = EXAMPLE.phase_at(step)
    assert (phase.sequence_length, phase.train_batch_size) == (length, batch)
    assert EXAMPLE.first_sample(step) == first_sample
    assert EXAMPLE.tokens_before(step) == tokens


def test_a_length_that_returns_goes_on_where_it_stopped():
    assert [RETURNING.first_sample(step) for step in range(10)] == [
        0,
        4,
        0,
        6,
        12,
        8,
        10,
        12,
        14,
        16,
    ]
    assert RETURNING.samples_before(9, 32) == 18
    assert RETURNING.samples_before(9, 64) == 0


lengths = st.sampled_from([16, 32, 64])
steps_lengths_sizes = st.lists(
    st.tuples(st.integers(1, 6), lengths, st.integers(1, 9)), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(steps_lengths_sizes)
def test_steps_of_a_length_join_without_a_gap(parts):
    """Against a walk through the steps, one by one."""
    phases, start = [], 0
    for steps, length, size in parts:
        phases.append(Phase(start, start + steps, length, size))
        start += steps
    schedule = TrainSchedule(tuple(phases))
    taken, tokens = {16: 0, 32: 0, 64: 0}, 0
    for phase in phases:
        for step in range(phase.first_step, phase.end_step):
            assert schedule.phase_at(step) == phase
            assert schedule.first_sample(step) == taken[phase.sequence_length]
            assert schedule.tokens_before(step) == tokens
            taken[phase.sequence_length] += phase.train_batch_size
            tokens += phase.train_batch_size * phase.sequence_length
    assert {length: schedule.samples_before(start, length) for length in taken} == taken
    assert schedule.tokens_before(start) == tokens


def test_a_run_without_phases_is_one_phase():
    schedule = train_schedule(config(), plan())
    assert schedule == TrainSchedule((Phase(0, 40, 64, 96),))
    assert schedule.explain() == []


def test_what_a_phase_leaves_out_is_the_run_s():
    schedule = train_schedule(
        config(
            {"until_step": 10, "sequence_length": 16, "train_batch_size": 32},
            {"until_step": 20, "sequence_length": 16},
            {"until_step": 30, "train_batch_size": 48},
        ),
        plan(),
    )
    assert schedule.phases == (
        Phase(0, 10, 16, 32),
        Phase(10, 20, 16, 96),
        Phase(20, 30, 64, 48),
        Phase(30, 40, 64, 96),
    )
    assert schedule.explain()[0] == "steps 0 to 9: 32 sequences of 16 = 512 tokens a step"
    assert schedule.explain()[-1] == "steps 30 to 39: 96 sequences of 64 = 6,144 tokens a step"


def test_a_batch_that_a_world_cannot_split_is_refused_with_the_nearest_that_it_can():
    phases = (
        {"until_step": 10, "train_batch_size": 40},
        {"until_step": 15, "train_batch_size": 8},
        {"until_step": 20, "train_batch_size": 128},
        {"until_step": 25, "train_batch_size": 48},
    )
    with pytest.raises(UserError) as caught:
        train_schedule(config(*phases), plan())
    assert caught.value.exit_code == EXIT_USAGE
    assert str(caught.value) == (
        "the run configuration has 3 problems:\n"
        "  - schedule.phases[0].train_batch_size 40 is not a multiple of 8 per rank x 2 ranks = 16;"
        " the nearest that are: 32, 48\n"
        "  - schedule.phases[1].train_batch_size 8 is not a multiple of 8 per rank x 2 ranks = 16;"
        " the nearest that are: 16\n"
        "  - schedule.phases[2].train_batch_size 128 is more than the DeepSpeed JSON's"
        " train_batch_size 96, which the run ends with: phases are for smaller batches"
    )
    assert train_schedule(config(*phases[1:2]), plan(ranks=1)).phases[0].train_batch_size == 8


def test_a_phase_that_has_ended_may_have_been_another_world_s():
    run = config(
        {"until_step": 10, "train_batch_size": 8}, {"until_step": 20, "train_batch_size": 64}
    )
    assert train_schedule(run, plan(), first_step=10).phases[0] == Phase(0, 10, 64, 8)
    with pytest.raises(UserError, match=r"phases\[0\]\.train_batch_size 8 is not a multiple"):
        train_schedule(run, plan(), first_step=9)
