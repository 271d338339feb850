"""The sections by themselves: immutability, bounds, contradictions, documentation."""

from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.config import (
    CheckpointSection,
    NetworkSection,
    ObjectiveSection,
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
        "optimizer": {"generator_learning_rate": 1e-3},
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
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from models(part)


def test_every_key_is_documented():
    keys = [
        (model.__name__, name, info.description)
        for model in {*models()}
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
            "generator.embedding_size",
            "32 differs from the discriminator's 64; the networks share the word embeddings: set"
            " embedding_size in both (hidden_size where not given)",
        ),
        (
            "generator.num_hidden_layers",
            "1 is too few: the enhanced mask decoder reads the last layer but one; write 2, or set"
            " objective.enhanced_mask_decoder=false",
        ),
        (
            "data.sequence_length",
            "128 is more than discriminator.max_position_embeddings 64;"
            " raise that in every network",
        ),
        ("objective.mask_prob", "0.001 of data.sequence_length 128 masks no token"),
    ]


def only_contradiction_of(build):
    ((key, words),) = contradictions_of(build)
    return f"{key} {words}"


NETWORK_MISTAKES = {
    "blind": (
        {"relative_attention": False},
        "relative_attention is false and position_biased_input too: nothing would tell positions"
        " apart; set one of them to true",
    ),
    "even kernel": (
        {"conv_kernel_size": 4},
        "conv_kernel_size 4 is even and would shift the tokens; write an odd number",
    ),
    "convolution in one layer": (
        {"conv_kernel_size": 3, "num_hidden_layers": 1},
        "conv_kernel_size needs num_hidden_layers of at least 2: it runs beside the first layer,"
        " and the last is computed where tokens are predicted",
    ),
    "no distance": (
        {"max_relative_positions": 1, "relative_attention": False, "position_biased_input": True},
        "max_relative_positions leaves no distance; write -1 or at least 2",
    ),
    "buckets beyond the distances": (
        {"max_relative_positions": 16},
        "position_buckets 32 gives every distance up to 16 a bucket of its own, but distances end"
        " at 15; write at most 28",
    ),
}


@pytest.mark.parametrize("mistake", NETWORK_MISTAKES)
def test_networks_that_make_no_sense(mistake):
    changes, message = NETWORK_MISTAKES[mistake]
    assert only_contradiction_of(lambda: NetworkSection(**(NETWORK | changes))) == message


def test_where_distances_end():
    """A longer context may keep the buckets of the shorter one."""
    longer = NetworkSection(**(NETWORK | {"max_position_embeddings": 256}))
    assert longer.last_relative_position == 255
    kept = NetworkSection(
        **(NETWORK | {"max_position_embeddings": 256, "max_relative_positions": 128})
    )
    assert kept.last_relative_position == 127


SCHEDULE_MISTAKES = {
    "wsd without a descent": (
        {"decay": "wsd"},
        "decay_steps 0 does not go with schedule.decay wsd: it is the length of wsd's descent, and"
        " 0 with any other decay",
    ),
    "a descent without wsd": (
        {"decay_steps": 5},
        "decay_steps 5 does not go with schedule.decay linear: it is the length of wsd's descent,"
        " and 0 with any other decay",
    ),
    "warm-up and descent overlap": (
        {"decay": "wsd", "decay_steps": 95},
        "decay_steps 95 and schedule.warmup_steps 10 are together more than schedule.max_steps 100",
    ),
    "an end that is not reached": (
        {"final_learning_rate_factor": 0.1},
        "final_learning_rate_factor 0.1 does not go with schedule.decay linear, which ends at zero;"
        " use cosine or wsd",
    ),
    "phases out of order": (
        {"phases": [{"until_step": 50}, {"until_step": 40}]},
        "phases end at steps [50, 40]: each must end after the one before it, and the last before"
        " schedule.max_steps 100",
    ),
    "a phase as long as the run": (
        {"phases": [{"until_step": 100}]},
        "phases end at steps [100]: each must end after the one before it, and the last before"
        " schedule.max_steps 100",
    ),
}


@pytest.mark.parametrize("mistake", SCHEDULE_MISTAKES)
def test_schedules_that_make_no_sense(mistake):
    changes, message = SCHEDULE_MISTAKES[mistake]
    values = {"max_steps": 100, "warmup_steps": 10, **changes}
    assert only_contradiction_of(lambda: ScheduleSection.model_validate(values)) == message


OBJECTIVE_MISTAKES = {
    "shares above one": (
        {"mask_token_prob": 0.8, "random_token_prob": 0.3},
        "random_token_prob 0.3 and mask_token_prob 0.8 are together more than 1",
    ),
    "n-grams of tokens": (
        {"max_ngram": 3},
        "max_ngram 3 counts words: set objective.whole_word_masking=true",
    ),
}


@pytest.mark.parametrize("mistake", OBJECTIVE_MISTAKES)
def test_masks_that_make_no_sense(mistake):
    changes, message = OBJECTIVE_MISTAKES[mistake]
    assert only_contradiction_of(lambda: ObjectiveSection(**changes)) == message


POSITIONS = NETWORK | {"position_biased_input": True}
WITHOUT_DECODER = {"enhanced_mask_decoder": False}
RUN_MISTAKES = {
    "rtd with one network": (
        {"discriminator": None},
        "discriminator is missing: objective.task=rtd trains two networks; add it",
    ),
    "mlm with two networks": (
        {"objective": {"task": "mlm"}},
        "discriminator means nothing with objective.task=mlm, which trains [generator] alone;"
        " remove it",
    ),
    "a rate of a network that is not there": (
        {
            "discriminator": None,
            "objective": {"task": "mlm"},
            "optimizer": {"generator_learning_rate": 1e-3, "discriminator_learning_rate": 1e-3},
        },
        "optimizer.discriminator_learning_rate means nothing with objective.task=mlm, which trains"
        " [generator] alone; remove it",
    ),
    "no positions to share": (
        {"discriminator": POSITIONS, "objective": WITHOUT_DECODER},
        "discriminator.position_biased_input is true, but the generator has no absolute positions"
        " to share: set generator.position_biased_input=true",
    ),
    "positions of two lengths": (
        {"discriminator": POSITIONS | {"max_position_embeddings": 256}},
        "discriminator.max_position_embeddings 256 differs from the generator's 128; the networks"
        " share the positions",
    ),
    "a decoder on a narrow table": (
        {"generator": NETWORK | {"embedding_size": 32}, "discriminator": None,
         "objective": {"task": "mlm"}},
        "generator.embedding_size 32 differs from hidden_size 64: the enhanced mask decoder adds"
        " position rows to hidden states; make them equal, or set"
        " objective.enhanced_mask_decoder=false",
    ),
    "a decoder on positions": (
        {"generator": POSITIONS},
        "generator.position_biased_input is true: the enhanced mask decoder brings in positions"
        " that the input already has; set it to false, or set"
        " objective.enhanced_mask_decoder=false",
    ),
    "a phase too long for the networks": (
        {"schedule": {"max_steps": 10, "warmup_steps": 2,
                      "phases": [{"until_step": 5, "sequence_length": 256}]},
         "discriminator": NETWORK | {"max_position_embeddings": 256}},
        "data.sequence_length 256 is more than generator.max_position_embeddings 128; raise that in"
        " every network",
    ),
    "a generator without its model": (
        {"initialize": {"generator_path": "generator"}},
        "initialize.generator_path is given without initialize.path; give both",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", RUN_MISTAKES)
def test_runs_that_make_no_sense(mistake):
    sections, message = RUN_MISTAKES[mistake]
    assert only_contradiction_of(lambda: a_run(**sections)) == message


def test_lengths_of_a_run():
    phases = [
        {"until_step": 2, "sequence_length": 32},
        {"until_step": 3, "train_batch_size": 8},
        {"until_step": 4, "sequence_length": 64},
        {"until_step": 5, "sequence_length": 32},
    ]
    config = a_run(schedule={"max_steps": 10, "warmup_steps": 2, "phases": phases})
    assert config.sequence_lengths == (32, 64, 128)
    assert a_run().sequence_lengths == (128,)


def test_networks_that_are_trained():
    assert list(a_run().networks) == ["generator", "discriminator"]
    alone = a_run(discriminator=None, objective={"task": "mlm"})
    assert list(alone.networks) == ["generator"]


def test_the_discriminator_s_rate_is_the_generator_s_unless_given():
    one = OptimizerSection(generator_learning_rate=1e-3)
    two = OptimizerSection(generator_learning_rate=1e-3, discriminator_learning_rate=2e-3)
    networks = ("generator", "discriminator", "joint")
    assert [one.learning_rate(network) for network in networks] == [1e-3, 1e-3, 1e-3]
    assert [two.learning_rate(network) for network in networks] == [1e-3, 2e-3, 1e-3]


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
