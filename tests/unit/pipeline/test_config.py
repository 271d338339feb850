"""The sections by themselves: immutability, bounds, contradictions, documentation."""

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.config import (
    CheckpointSection,
    NetworkSection,
    OptimizerSection,
    RunConfig,
    ScheduleSection,
)

NETWORK = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "position_buckets": 32,
}


def a_run(**sections):
    values = {
        "data": {"sequence_length": 128},
        "generator": NETWORK,
        "discriminator": NETWORK,
        "optimizer": {"generator_learning_rate": 1e-3, "discriminator_learning_rate": 1e-3},
        "schedule": {"max_steps": 10, "warmup_steps": 2},
    }
    return RunConfig.model_validate(values | sections)


def contradictions_of(build):
    with pytest.raises(ValidationError) as caught:
        build()
    (error,) = caught.value.errors()
    assert error["type"] == "contradiction"
    return error["ctx"]["all"]


def test_sections_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        a_run().run.seed = 1


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        ScheduleSection.model_validate({"max_steps": 1, "warmup_steps": 0, "warmup_stps": 0})


def models(model=RunConfig):
    yield model
    for info in model.model_fields.values():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from models(info.annotation)


def test_every_key_is_documented():
    keys = [
        (model.__name__, name, info.description)
        for model in models()
        if model is not RunConfig
        for name, info in model.model_fields.items()
    ]
    assert len(keys) > 40
    assert [key for key in keys if not key[2]] == []


def test_heads_must_divide_the_width():
    wrong = NETWORK | {"num_attention_heads": 5}
    assert contradictions_of(lambda: NetworkSection(**wrong)) == [
        ("num_attention_heads", "5 does not divide hidden_size 64")
    ]
    assert NetworkSection(**NETWORK).attention_head_size == 16


def test_buckets_must_leave_distances_for_the_logarithm():
    """Bucket function, DeBERTa/deberta/da_utils.py: ln((max_position - 1) / mid) must be > 0."""
    NetworkSection(**(NETWORK | {"max_position_embeddings": 18}))
    wrong = NETWORK | {"max_position_embeddings": 17}
    assert contradictions_of(lambda: NetworkSection(**wrong)) == [
        (
            "position_buckets",
            "32 gives every distance up to 16 a bucket of its own, but distances end at 16;"
            " write at most 30",
        )
    ]
    NetworkSection(**(NETWORK | {"max_position_embeddings": 17, "position_buckets": 30}))


def test_the_warmup_fits_into_the_run():
    ScheduleSection(max_steps=10, warmup_steps=10)
    assert contradictions_of(lambda: ScheduleSection(max_steps=100, warmup_steps=101)) == [
        (
            "warmup_steps",
            "101 is more than schedule.max_steps 100; add schedule.warmup_steps=10",
        )
    ]


def test_milestones_are_commits():
    CheckpointSection(interval_steps=50, milestone_interval_steps=100)
    wrong = {"interval_steps": 60, "milestone_interval_steps": 100}
    assert contradictions_of(lambda: CheckpointSection(**wrong)) == [
        (
            "milestone_interval_steps",
            "100 is not a multiple of checkpoint.interval_steps 60: most milestones would have no"
            " commit",
        )
    ]


def test_contradictions_between_sections_come_together():
    found = contradictions_of(
        lambda: a_run(
            generator=NETWORK | {"hidden_size": 32, "num_hidden_layers": 1},
            discriminator=NETWORK | {"max_position_embeddings": 64},
            objective={"mask_prob": 0.001},
        )
    )
    assert found == [
        (
            "generator.hidden_size",
            "32 differs from discriminator.hidden_size 64; the networks share the word embeddings",
        ),
        (
            "generator.num_hidden_layers",
            "1 is too few: the enhanced mask decoder reads the last layer but one; write 2",
        ),
        (
            "data.sequence_length",
            "128 is more than discriminator.max_position_embeddings 64;"
            " raise that in both networks",
        ),
        ("objective.mask_prob", "0.001 of data.sequence_length 128 masks no token"),
    ]


def test_a_contradiction_reads_well_without_the_loader():
    with pytest.raises(ValidationError, match=r"warmup_steps 3 is more than schedule\.max_steps 2"):
        ScheduleSection(max_steps=2, warmup_steps=3)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_learning_rates_are_positive_and_finite(rate):
    with pytest.raises(ValidationError):
        OptimizerSection(generator_learning_rate=rate, discriminator_learning_rate=1.0)


def test_dump_and_load_give_the_same_configuration():
    config = a_run()
    assert RunConfig.model_validate_json(config.model_dump_json(), strict=True) == config
