"""A run beside the runs that a reference was made of."""

import json
from dataclasses import replace

import pytest

from data_prep.errors import UserError
from pipeline.config_loading import load_run_config
from pipeline.reference_curves import (
    HealthCheck,
    find_reference,
    judge,
    make_reference,
    read_reference,
    reference_keys,
    shipped_references,
    to_json_value,
)

STEPS = range(10, 110, 10)


def rows_of(level, steps=STEPS, rtd=0.4):
    return [
        {"step": step, "train/mlm_loss": level - step / 100, "train/rtd_loss": rtd}
        for step in steps
    ]


def reference_of(*levels, keys=None):
    return make_reference(
        "tiny",
        [rows_of(level) for level in levels],
        where="one core",
        date="2026-11-22",
        data="speeches",
        train_content="text",
        keys=keys or {},
    )


def test_milestones_are_round_steps_within_the_reference():
    assert reference_of(7.0).milestones == (10, 20, 50, 100)


def test_a_run_like_the_others_is_healthy():
    verdict = judge(reference_of(7.0, 7.1), rows_of(7.05), 50, "text")
    assert verdict.is_healthy
    # Rows 30, 40 and 50: 7.05 - 0.4, beside the means of 6.6 and 6.7.
    assert verdict.text == (
        "healthy by step 50: mlm 6.6500, rtd 0.4000; reference mlm 6.6500 +- 0.0707, "
        "rtd 0.4000 +- 0.0000 (tiny, 2 seeds, one core, 2026-11-22)"
    )


@pytest.mark.parametrize(
    ("level", "rtd", "is_healthy", "told"),
    [
        (6.63 + 0.4, 0.4, True, "healthy by step 50"),  # within 4 x 0.0071 and 3 % of 6.605
        (6.82 + 0.4, 0.4, False, "not healthy by step 50: mlm is above 6.8032: mlm 6.8200"),
        (6.605 + 0.4, 0.413, False, "not healthy by step 50: rtd is above 0.4120: mlm 6.6050"),
        (float("nan"), 0.4, False, "mlm is above"),
    ],
)
def test_a_loss_that_is_too_high_is_told(level, rtd, is_healthy, told):
    verdict = judge(reference_of(7.0, 7.01), rows_of(level, rtd=rtd), 50, "text")
    assert verdict.is_healthy is is_healthy
    assert told in verdict.text


def test_four_deviations_are_tolerated():
    # Means of 6.6 and 7.0: deviation 0.283, so that up to 7.931 is like the others.
    reference = reference_of(7.0, 7.4)
    assert judge(reference, rows_of(7.92 + 0.4), 50, "text").is_healthy
    assert not judge(reference, rows_of(7.95 + 0.4), 50, "text").is_healthy


def test_other_text_gets_no_verdict():
    verdict = judge(reference_of(7.0), rows_of(9.0), 50, "another text")
    assert verdict.is_healthy is None
    assert verdict.text.startswith("by step 50: mlm 8.6000")
    assert verdict.text.endswith(", on other text: speeches")


def test_nothing_is_said_elsewhere():
    reference = reference_of(7.0)
    assert judge(reference, rows_of(7.0), 30, "text") is None
    assert judge(reference, [], 50, "text") is None
    assert judge(reference, rows_of(7.0, steps=[10]), 50, "text") is None


def test_rows_without_a_finite_value_are_left_out():
    rows = [*rows_of(7.0), {"step": 45, "train/mlm_loss": None, "train/rtd_loss": None}]
    assert judge(reference_of(7.0), rows, 50, "text").is_healthy


def test_a_file_holds_what_was_made(tmp_path):
    reference = reference_of(7.0, 7.1, keys={"train_batch_size": 8})
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(to_json_value(reference)))
    assert read_reference(path) == reference


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v.pop("steps"), "is no reference curve ('steps')"),
        (lambda v: v.update(format_version=2), "format_version 2 is not 1"),
        (lambda v: v.update(steps=[]), "every figure needs a value for every step"),
        (lambda v: v["figures"]["train/mlm_loss"][0].pop(), "every figure needs a value"),
        (lambda v: v.update(figures={"train/mlm_loss": [["x"] * 10]}), "could not convert"),
        (lambda v: v.update(colour="red"), "unexpected keyword argument 'colour'"),
    ],
)
def test_another_file_is_told(tmp_path, change, told):
    values = json.loads(json.dumps(to_json_value(reference_of(7.0))))
    change(values)
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        read_reference(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)
    assert "deberta report RUN... --write-reference FILE" in str(caught.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"none.json: cannot be read: No such file"):
        read_reference(tmp_path / "none.json")


def test_runs_without_common_rows_make_no_reference():
    with pytest.raises(UserError, match=r"no step with a row in common: .*interval_steps"):
        make_reference(
            "x",
            [rows_of(7.0, steps=[10]), rows_of(7.0, steps=[15])],
            where="",
            date="",
            data="",
            train_content="",
            keys={},
        )


def test_a_run_with_a_loss_that_is_not_finite_makes_no_reference():
    rows = rows_of(7.0)
    rows[3]["train/rtd_loss"] = None
    with pytest.raises(UserError, match="run 2: train/rtd_loss is not finite at step 40"):
        make_reference(
            "x",
            [rows_of(7.0), rows],
            where="",
            date="",
            data="",
            train_content="",
            keys={},
        )


@pytest.mark.parametrize(
    ("word", "is_the_same"),
    [
        ("run.seed=7", True),
        ("run.folder=elsewhere", True),
        ("model.attention_backend=eager", True),
        ("logging.interval_steps=3", True),
        ("checkpoint.interval_steps=3", True),
        ("optimizer.eps=1e-5", False),
        ("objective.mask_prob=0.2", False),
        ("schedule.max_steps=400", False),
        ("discriminator.num_hidden_layers=3", False),
        ("data.sequence_length=64", False),
    ],
)
def test_a_reference_belongs_to_what_is_learned(word, is_the_same):
    mine, others = load_run_config("demo"), load_run_config("demo", [word])
    assert (reference_keys(mine, 32) == reference_keys(others, 32)) is is_the_same
    assert reference_keys(mine, 32) != reference_keys(mine, 64)


def test_the_demo_has_a_reference_that_was_made():
    [reference] = [each for each in shipped_references() if each.name == "demo"]
    demo = load_run_config("demo")
    assert find_reference(demo, 32) == reference
    assert find_reference(demo, 64) is None
    assert reference.num_seeds == 3
    assert reference.steps[-1] == demo.schedule.max_steps
    # It is healthy itself, seed by seed.
    for seed in range(3):
        rows = [
            {"step": step, **{name: each[seed][i] for name, each in reference.figures.items()}}
            for i, step in enumerate(reference.steps)
        ]
        for step in reference.milestones:
            assert judge(reference, rows, step, reference.train_content).is_healthy


def test_a_named_reference_is_used_for_any_configuration(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(to_json_value(reference_of(7.0))))
    config = load_run_config("demo", [f"reference.curve={path}"])
    assert find_reference(config, 1).name == "tiny"


def test_training_reads_its_own_rows(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    check = HealthCheck(reference_of(7.0), metrics, "text")
    assert check(50) == ""  # no file yet
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows_of(7.0, steps=[40, 50])))
    assert check(50).startswith("healthy by step 50: mlm 6.5500")
    assert check(40) == ""
    metrics.write_text("{torn")
    assert check(50) == ""
    assert HealthCheck(None, metrics, "text")(50) == ""


def test_a_reference_of_one_seed_has_no_spread():
    single = replace(reference_of(7.0))
    assert "(tiny, 1 seed, one core" in judge(single, rows_of(7.0), 50, "text").text
