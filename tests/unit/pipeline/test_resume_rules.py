"""What may change on resume: the table, its coverage, and the messages."""

from typing import get_args

import pytest
import torch

from data_prep.errors import EXIT_USAGE, UserError
from pipeline.config import RunConfig
from pipeline.config_keys import SECTIONS
from pipeline.config_loading import load_run_config
from pipeline.ds_config import check_deepspeed_config
from pipeline.ds_schema import DeepSpeedJson
from pipeline.modeling.pair import NetworkPair
from pipeline.resume_rules import (
    ACCEPT_CONFIG,
    DEEPSPEED_RESUME_RULES,
    RESUME_RULES,
    Verdict,
    changed_deepspeed_keys,
    changed_keys,
    refuse_changes,
)

DEMO = load_run_config("demo")
STEPS = 200
WSD = ["schedule.decay=wsd", "schedule.decay_steps=100", "schedule.warmup_steps=20"]


def a_deepspeed_config(**changes):
    return check_deepspeed_config(
        {
            "train_batch_size": 96,
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 1},
        }
        | changes,
        "a.json",
    )


def only_change(*words):
    (change,) = changed_keys(DEMO, load_run_config("demo", list(words)), STEPS)
    return change


@pytest.mark.parametrize(
    ("word", "verdict"),
    [
        ("run.folder=elsewhere", Verdict.FREE),
        ("data.path=elsewhere", Verdict.FREE),
        ("model.activation_checkpointing=full", Verdict.FREE),
        ("schedule.max_consecutive_skipped_steps=5", Verdict.FREE),
        ("checkpoint.interval_steps=7", Verdict.FREE),
        ("checkpoint.keep_last=7", Verdict.FREE),
        ("evaluation.max_sequences=7", Verdict.FREE),
        ("logging.interval_steps=7", Verdict.FREE),
        ("reference.train_batch_size=7", Verdict.FREE),
        ("run.deterministic=false", Verdict.ROUNDING),
        ("model.attention_backend=eager", Verdict.ROUNDING),
        ("run.seed=7", Verdict.REFUSED),
        ("data.sequence_length=64", Verdict.REFUSED),
        ("data.block_sequences=7", Verdict.REFUSED),
        ("data.window_blocks=7", Verdict.REFUSED),
        ("model.vocab_size=7", Verdict.IMPOSSIBLE),
        ("generator.num_hidden_layers=7", Verdict.IMPOSSIBLE),
        ("discriminator.num_attention_heads=1", Verdict.IMPOSSIBLE),
        ("objective.rtd_head=electra", Verdict.IMPOSSIBLE),
        ("objective.update=joint", Verdict.IMPOSSIBLE),
        ("discriminator.hidden_dropout_prob=0.5", Verdict.REFUSED),
        ("objective.mask_prob=0.2", Verdict.REFUSED),
        ("optimizer.betas=[0.9, 0.999]", Verdict.REFUSED),
        ("optimizer.generator_learning_rate=1e-5", Verdict.REFUSED),
        ("schedule.max_steps=1000", Verdict.REFUSED),
        ("schedule.warmup_steps=7", Verdict.REFUSED),
        ("schedule.decay=cosine", Verdict.REFUSED),
        ("initialize.path=elsewhere", Verdict.FREE),
        ("initialize.new_vocabulary=resize", Verdict.FREE),
        ("initialize.guard_margin=0.5", Verdict.FREE),
        ("optimizer.bias_correction=false", Verdict.REFUSED),
        ("objective.draw_special_ids=false", Verdict.REFUSED),
        ("generator.relative_position_rule=transformers", Verdict.REFUSED),
    ],
)
def test_the_table(word, verdict):
    change = only_change(word)
    assert change.verdict is verdict
    assert change.path == word.partition("=")[0]


def test_the_name_of_a_recipe_is_none_of_its_values():
    other = DEMO.model_copy(update={"recipe": "released_code"})
    (change,) = changed_keys(DEMO, other, STEPS)
    assert (change.path, change.verdict) == ("recipe", Verdict.FREE)


@pytest.mark.parametrize(
    ("changes", "path", "verdict"),
    [
        ({"train_batch_size": 192}, "train_batch_size", Verdict.REFUSED),
        ({"gradient_clipping": 0.5}, "gradient_clipping", Verdict.REFUSED),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu", Verdict.ROUNDING),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage", Verdict.ROUNDING),
        ({"steps_per_print": 10}, "steps_per_print", Verdict.FREE),
    ],
)
def test_the_table_of_the_deepspeed_json(changes, path, verdict):
    (change,) = changed_deepspeed_keys(a_deepspeed_config(), a_deepspeed_config(**changes))
    assert (change.path, change.verdict) == (f"deepspeed.{path}", verdict)


def test_blocks_that_appear_are_compared_key_by_key():
    new = a_deepspeed_config(
        bf16={"enabled": True},
        data_types={"grad_accum_dtype": "fp32"},
        flops_profiler={"enabled": True},
    )
    verdicts = {
        change.path: change.verdict for change in changed_deepspeed_keys(a_deepspeed_config(), new)
    }
    assert verdicts["deepspeed.bf16.enabled"] is Verdict.ROUNDING
    assert verdicts["deepspeed.data_types.grad_accum_dtype"] is Verdict.ROUNDING
    assert verdicts["deepspeed.flops_profiler.enabled"] is Verdict.FREE


def test_writing_a_default_out_is_no_change():
    spelled = a_deepspeed_config(zero_optimization={"stage": 1, "reduce_bucket_size": 5e8})
    assert changed_deepspeed_keys(a_deepspeed_config(), spelled) == []
    assert changed_keys(DEMO, load_run_config("demo", ["optimizer.eps=1e-6"]), STEPS) == []


def test_every_pattern_names_something_real():
    paths = set(RunConfig.model_fields) | {
        f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields
    }
    for pattern, _, _ in RESUME_RULES[:-1]:
        assert any(path == pattern or pattern == f"{path.split('.')[0]}.*" for path in paths)
    for pattern, _, _ in DEEPSPEED_RESUME_RULES[:-1]:
        assert pattern.rstrip("*") in DeepSpeedJson.model_fields
    assert RESUME_RULES[-1][:2] == ("*", Verdict.REFUSED)


def test_refused_changes_come_in_one_message_with_the_cure():
    words = ["run.seed=7", "schedule.max_steps=1000", "checkpoint.keep_last=9"]
    with pytest.raises(UserError) as caught:
        refuse_changes("runs/x", changed_keys(DEMO, load_run_config("demo", words), STEPS))
    cure = "set it back, or start a new run with another run.folder"
    assert str(caught.value) == (
        "resuming runs/x has 2 problems:\n"
        f"  - run.seed was 42 and is now 7: what was learned so far depends on it; {cure}\n"
        "  - schedule.max_steps was 300 and is now 1000: completed steps would have had other"
        f" learning rates (`deberta extend` adds steps); {cure}"
    )
    assert caught.value.exit_code == EXIT_USAGE


def test_the_flag_that_accepts_is_named_and_accepts():
    words = ["run.seed=7", "model.attention_backend=eager"]
    changes = changed_keys(DEMO, load_run_config("demo", words), STEPS)
    with pytest.raises(UserError, match="or accept it with --accept-config-change"):
        refuse_changes("runs/x", changes, flag=ACCEPT_CONFIG)
    notes = refuse_changes("runs/x", changes, is_accepted=True, flag=ACCEPT_CONFIG)
    assert [note.split()[0] for note in notes] == ["model.attention_backend"]


def test_no_flag_accepts_what_cannot_work():
    words = ["run.seed=7", "generator.intermediate_size=64"]
    changes = changed_keys(DEMO, load_run_config("demo", words), STEPS)
    with pytest.raises(UserError) as caught:
        refuse_changes("runs/x", changes, is_accepted=True, flag=ACCEPT_CONFIG)
    assert "is now 64: the weights of the commit have another shape" in str(caught.value)
    assert "no flag can accept this" in str(caught.value)
    assert "run.seed" not in str(caught.value)


def stored(config):
    """Folders and parameters of a commit, with their shapes."""
    with torch.device("meta"):
        pair = NetworkPair(config)
    return {
        f"{folder}/{name}": tuple(parameter.shape)
        for folder, module in pair.trained_modules().items()
        for name, parameter in module.named_parameters()
    }


def other_values(section, name, info):
    """Values of a key that it does not have now, as far as its type tells them."""
    value = getattr(section, name)
    choices = [choice for choice in get_args(info.annotation) if isinstance(choice, str)]
    if choices:
        return [choice for choice in choices if choice != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value + 2, value * 2]
    return [value / 2] if isinstance(value, float) and value else [0.25, 64]


def test_what_changes_a_weight_is_impossible():
    """Every key of the networks, tried: the table must know each one that the weights depend on."""
    before, found = stored(DEMO), set()
    for section_name in ("model", "generator", "discriminator", "objective", "optimizer", "data"):
        section = getattr(DEMO, section_name)
        for name, info in type(section).model_fields.items():
            for value in other_values(section, name, info):
                word = f"{section_name}.{name}={str(value).lower()}"
                extra = ["objective.update=joint"] if value == "es" else []
                if section_name in ("generator", "discriminator"):
                    twin = {"generator": "discriminator", "discriminator": "generator"}
                    extra = [f"{twin[section_name]}.{name}={str(value).lower()}"]
                try:
                    other = load_run_config("demo", [word, *extra])
                except UserError:
                    continue  # no such run, whatever the commit
                path = f"{section_name}.{name}"
                if stored(other) != before:
                    (change,) = [c for c in changed_keys(DEMO, other, STEPS) if c.path == path]
                    found.add(path)
                    assert change.verdict is Verdict.IMPOSSIBLE, word
    assert {
        "model.vocab_size",
        "generator.num_hidden_layers",
        "discriminator.conv_kernel_size",
        "generator.position_buckets",
        "objective.embedding_sharing",
        "objective.update",
        "objective.rtd_head",
    } <= found


def test_rounding_changes_are_returned_as_warnings():
    words = ["model.attention_backend=eager", "logging.interval_steps=1"]
    changes = changed_keys(DEMO, load_run_config("demo", words), STEPS)
    assert refuse_changes("runs/x", changes) == [
        'model.attention_backend was "torch" and is now "eager": the same formula in another order'
    ]


def verdicts(old, new, completed_steps):
    """Path -> verdict of what changes between two lists of words."""
    before, after = (load_run_config("demo", words) for words in (old, new))
    return {change.path: change.verdict for change in changed_keys(before, after, completed_steps)}


@pytest.mark.parametrize(
    ("old_steps", "new_steps", "completed_steps", "verdict"),
    [
        # Descents begin at 200, 900 and 150: a step at the peak is the same under both.
        (300, 1000, 200, Verdict.FREE),
        (300, 1000, 201, Verdict.FREE),
        (300, 1000, 202, Verdict.REFUSED),
        (300, 1000, 300, Verdict.REFUSED),
        (300, 250, 151, Verdict.FREE),
        (300, 250, 152, Verdict.REFUSED),
        (1000, 300, 0, Verdict.FREE),
    ],
)
def test_wsd_may_be_prolonged_until_a_descent_begins(
    old_steps, new_steps, completed_steps, verdict
):
    old, new = ([*WSD, f"schedule.max_steps={steps}"] for steps in (old_steps, new_steps))
    assert verdicts(old, new, completed_steps) == {"schedule.max_steps": verdict}


def test_the_end_of_wsd_may_be_chosen_late():
    new = ["schedule.decay_steps=50" if "decay_steps" in word else word for word in WSD]
    new.append("schedule.final_learning_rate_factor=0.1")
    assert set(verdicts(WSD, new, 201).values()) == {Verdict.FREE}
    assert set(verdicts(WSD, new, 202).values()) == {Verdict.REFUSED}


def test_another_decay_is_the_same_run_while_both_warm_up():
    new = ["schedule.decay=cosine", "schedule.max_steps=1000"]
    assert DEMO.schedule.warmup_steps > 5
    assert set(verdicts([], new, 5).values()) == {Verdict.FREE}
    assert set(verdicts([], new, 150).values()) == {Verdict.REFUSED}


def phases(*until_steps, train_batch_size=8):
    """The words of phases that end at these steps."""
    text = ", ".join(
        f"{{until_step = {step}, train_batch_size = {train_batch_size + index}}}"
        for index, step in enumerate(until_steps)
    )
    return [f"schedule.phases=[{text}]"]


@pytest.mark.parametrize(
    ("old", "new", "completed_steps", "verdict"),
    [
        (phases(10), phases(20), 10, Verdict.FREE),
        (phases(10), phases(20), 11, Verdict.REFUSED),
        (phases(10), phases(10, 50), 10, Verdict.FREE),
        (phases(10), phases(10, 50), 11, Verdict.REFUSED),
        (phases(10, 50), phases(10), 10, Verdict.FREE),
        (phases(10, 50), phases(10), 11, Verdict.REFUSED),
        (phases(10, 50), phases(10, 60), 50, Verdict.FREE),
        (phases(10), phases(10, train_batch_size=16), 1, Verdict.REFUSED),
        ([], phases(10), 0, Verdict.FREE),
        ([], phases(10), 1, Verdict.REFUSED),
    ],
)
def test_phases_may_change_that_have_not_begun(old, new, completed_steps, verdict):
    assert verdicts(old, new, completed_steps) == {"schedule.phases": verdict}
