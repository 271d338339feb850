"""Presets, files and words: what they give, and where an error says it came from."""

import json
from pathlib import Path

import pytest

from data_prep.errors import EXIT_USAGE, UserError
from pipeline.config import PhaseSection
from pipeline.config_loading import (
    load_run_config,
    preset_names,
    require_data_path,
    resolved_config_dict,
)
from pipeline.ds_config import load_deepspeed_config

SCHEDULE_KEYS = (
    "max_steps, warmup_steps, decay, decay_steps, final_learning_rate_factor, phases, extensions,"
    " max_consecutive_skipped_steps"
)
DS_CONFIGS = Path(__file__).parents[3] / "ds_configs"
MINIMAL = """
[generator]
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 128
[discriminator]
hidden_size = 64
num_hidden_layers = 4
num_attention_heads = 4
intermediate_size = 128
[optimizer]
generator_learning_rate = 1e-3
discriminator_learning_rate = 1e-3
[schedule]
max_steps = 100
warmup_steps = 10
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    return path


def message_of(*args):
    with pytest.raises(UserError) as caught:
        load_run_config(*args)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


def finding_of(*args):
    message = message_of(*args)
    assert message.startswith("the run configuration: "), message
    return message.removeprefix("the run configuration: ")


def findings_of(*args):
    """All findings of a message, whether one or a list."""
    first, *rest = message_of(*args).split("\n  - ")
    return rest or [first.removeprefix("the run configuration: ")]


def test_the_demo_fits_the_cpu_json_and_the_sample():
    config = load_run_config("demo")
    assert config.model.vocab_size == 4_100
    assert config.reference.train_batch_size == (
        load_deepspeed_config(DS_CONFIGS / "cpu_debug.json").train_batch_size
    )


def test_presets_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_run_config("demo").run.folder == "runs/demo"


def test_a_file(minimal):
    assert load_run_config(str(minimal)).schedule.max_steps == 100


@pytest.mark.parametrize(
    ("word", "section", "key", "value"),
    [
        ("schedule.max_steps=500_000", "schedule", "max_steps", 500_000),
        ("optimizer.eps=1e-4", "optimizer", "eps", 1e-4),
        ("optimizer.weight_decay=0", "optimizer", "weight_decay", 0.0),
        ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", (0.8, 0.9)),
        ("run.deterministic=false", "run", "deterministic", False),
        ("run.folder=runs/a=b c", "run", "folder", "runs/a=b c"),
        ('run.folder="runs/quoted"', "run", "folder", "runs/quoted"),
        ("data.path=2024", "data", "path", "2024"),
        ("data.path=true", "data", "path", "true"),
        ("data.path=", "data", "path", ""),
        ("data.path=1\n[run]", "data", "path", "1\n[run]"),
        ("model.attention_backend=eager", "model", "attention_backend", "eager"),
        ("reference.train_batch_size=64", "reference", "train_batch_size", 64),
        (
            "schedule.phases=[{until_step=100, sequence_length=64}]",
            "schedule",
            "phases",
            (PhaseSection(until_step=100, sequence_length=64),),
        ),
        ("schedule.phases=[]", "schedule", "phases", ()),
    ],
)
def test_words(word, section, key, value):
    found = getattr(getattr(load_run_config("demo", [word]), section), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("word", "finding"),
    [
        ("schedule.max_stps=3", "unknown key 'schedule.max_stps', did you mean 'max_steps'?"),
        (
            "optimizer.learning_rate=1e-3",
            "unknown key 'optimizer.learning_rate', did you mean 'generator_learning_rate'?",
        ),
        ("schedul.max_steps=3", "unknown key 'schedul.max_steps', did you mean"
         " 'schedule.max_steps'?"),
        ("optimizer.max_steps=3", "unknown key 'optimizer.max_steps', did you mean"
         " 'schedule.max_steps'?"),
        ("max_steps=3", "unknown key 'max_steps', did you mean 'schedule.max_steps'?"),
        ("hidden_size=3", "unknown key 'hidden_size', did you mean 'generator.hidden_size' or"
         " 'discriminator.hidden_size'?"),
        ("optimiser.x=3", "unknown section 'optimiser', did you mean 'optimizer'?"),
        ("steps=3", "unknown key 'steps'; valid: recipe, run, data, model, generator,"
         " discriminator, objective, optimizer, schedule, initialize, checkpoint, safety,"
         " evaluation, logging, reference"),
        ("schedule=3", f"'schedule' is a section; name one of its keys: {SCHEDULE_KEYS}"),
        ("schedule.max_steps.x=3", f"unknown key 'schedule.max_steps.x'; valid: {SCHEDULE_KEYS}"),
        ("recip=paper", "unknown key 'recip', did you mean 'recipe'?"),
        ("run.recipe=paper", "unknown key 'run.recipe', did you mean 'recipe'? A file has it above"
         " all sections"),
        ("recipe.name=paper", "recipe is no section; write recipe=VALUE"),
        ("recipe=code", "recipe is \"code\"; it must be 'paper' or 'released_code'"),
        ("schedule.phases.until_step=3", "schedule.phases is a list; write it whole:"
         " schedule.phases='[{until_step=..., sequence_length=..., train_batch_size=...}]'"),
        ("schedule.phases=[{until_stp=3}]", "schedule.phases[0].until_step is missing: Optimizer"
         " step before which the phase ends; the next phase, or the rest, begins there.|"
         "unknown key 'schedule.phases[0].until_stp', did you mean 'until_step'?"),
        ("schedule.phases=[{until_step=3, sequence_length=4}]", "schedule.phases[0].sequence_length"
         " is 4; it must be at least 8"),
        ("schedule.phases=[{until_step=300}]", "schedule.phases end at steps [300]: each must end"
         " after the one before it, and the last before schedule.max_steps 300"),
        ("schedule.phases=100", "schedule.phases is 100; it must be a list"),
        ("schedule.phases=[100]", "schedule.phases[0] is 100; it must be a block of keys"),
        ("schedule.max_steps", "'schedule.max_steps' is not of the form section.key=value"),
        ("--schedule.max_steps=3", "'--schedule.max_steps=3' is not an option; write"
         " schedule.max_steps=3 without dashes"),
        ("train_batch_size=3", "train_batch_size belongs in the DeepSpeed JSON"
         " (--deepspeed_config)"),
        ("bf16.enabled=true", "bf16.enabled belongs in the DeepSpeed JSON (--deepspeed_config)"),
        ("schedule.max_steps=many", 'schedule.max_steps is "many"; it must be a whole number'),
        ("run.seed=1\n[run]", 'run.seed is "1\\n[run]"; it must be a whole number'),
        ("schedule.max_steps=true", "schedule.max_steps is true; it must be a whole number"),
        ("schedule.max_steps=0", "schedule.max_steps is 0; it must be greater than 0"),
        ("optimizer.eps=nan", "optimizer.eps is NaN; it must be a finite number"),
        ("optimizer.betas=[0.9]", "optimizer.betas[1] is missing: the list is too short"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1] is 1.0; it must be less than 1.0"),
        ("run.deterministic=yes", 'run.deterministic is "yes"; it must be true or false'),
        ("model.attention_backend=flash", "model.attention_backend is \"flash\"; it must be"
         " 'eager', 'torch', 'triton' or 'disentangled_flash'"),
        ("generator.num_attention_heads=5", "generator.num_attention_heads 5 does not divide"
         " hidden_size 192"),
    ],
)  # fmt: skip
def test_a_wrong_word(word, finding):
    findings = [f"command line: {part}" for part in finding.split("|")]
    assert findings_of("demo", [word]) == findings


def test_a_word_given_twice():
    words = ["run.seed=1", "run.seed=2"]
    assert finding_of("demo", words) == "command line: run.seed is given twice; keep one"


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("warmup_steps = 10", "warmup_steps = 101", "schedule.warmup_steps 101 is more than"
         " schedule.max_steps 100; add schedule.warmup_steps=10"),
        ("max_steps = 100", 'max_steps = "100"', 'schedule.max_steps is "100"; it must be a whole'
         " number"),
        ("[generator]", "seed = 1\n[generator]", "unknown key 'seed', did you mean 'run.seed'?"),
        ("[generator]", "train_batch_size = 1\n[generator]", "train_batch_size belongs in the"
         " DeepSpeed JSON (--deepspeed_config)"),
        ("[generator]", "run = 3\n[generator]", "run is 3; it must be a block of keys"),
        ("max_steps = 100", "max_steps = 2024-01-01", 'schedule.max_steps is "2024-01-01"; it must'
         " be a whole number"),
        ("warmup_steps = 10\n", "", "schedule.warmup_steps is missing: Steps of linear warm-up"
         " from zero."),
    ],
)  # fmt: skip
def test_a_wrong_file(minimal, old, new, finding):
    assert old in MINIMAL
    minimal.write_text(MINIMAL.replace(old, new))
    assert finding_of(str(minimal)) == f"{minimal}: {finding}"


def test_a_misspelt_key_of_a_file_is_also_missing(minimal):
    minimal.write_text(MINIMAL.replace("max_steps", "max_stps"))
    assert message_of(str(minimal)) == (
        "the run configuration has 2 problems:\n"
        f"  - {minimal}: schedule.max_steps is missing: Optimizer steps of the whole run.\n"
        f"  - {minimal}: unknown key 'schedule.max_stps', did you mean 'max_steps'?"
    )


def test_a_missing_section(minimal):
    minimal.write_text(MINIMAL[: MINIMAL.index("[schedule]")])
    assert finding_of(str(minimal)) == (
        f"{minimal}: schedule is missing: it has the keys {SCHEDULE_KEYS}"
    )


def test_all_problems_of_all_sources_at_once(minimal):
    minimal.write_text(
        MINIMAL.replace("max_steps = 100", "max_steps = -1").replace("1e-3", '"x"', 1)
    )
    words = ["run.sed=1", "data.sequence_length=4", "generator.num_attention_heads=5"]
    assert message_of(str(minimal), words) == (
        "the run configuration has 5 problems:\n"
        "  - command line: unknown key 'run.sed', did you mean 'seed'?\n"
        "  - command line: data.sequence_length is 4; it must be at least 8\n"
        "  - command line: generator.num_attention_heads 5 does not divide hidden_size 64\n"
        f'  - {minimal}: optimizer.generator_learning_rate is "x"; it must be a number\n'
        f"  - {minimal}: schedule.max_steps is -1; it must be greater than 0"
    )


def test_no_such_preset(tmp_path):
    assert message_of("deberta_v3_larg") == (
        "--config deberta_v3_larg: no such preset or file, did you mean 'deberta_v3_large'?"
    )
    assert message_of("zzz").endswith(f"valid: {', '.join(preset_names())}")
    assert "is a folder; name a TOML file" in message_of(str(tmp_path))


def test_the_resolved_file_repeats_the_run(tmp_path):
    words = ["run.seed=7", "optimizer.eps=3e-7", "data.path=shards", "schedule.warmup_steps=0"]
    config = load_run_config("demo", words)
    deepspeed = load_deepspeed_config(DS_CONFIGS / "zero2_bf16.json")
    text = json.dumps(resolved_config_dict(config, deepspeed, deepspeed.batch_plan(8)))
    path = tmp_path / "config.resolved.json"
    path.write_text(text)

    again = load_run_config(str(path))
    deepspeed_again = load_deepspeed_config(path)
    assert again == config
    assert deepspeed_again.raw == deepspeed.raw
    assert deepspeed_again.settings == deepspeed.settings
    assert load_run_config(str(path), ["run.seed=8"]).run.seed == 8
    assert json.loads(text)["batch"] == {
        "world_size": 8,
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 32,
        "train_batch_size": 8192,
        "tokens_per_step": 8192 * 128,
    }


def test_two_phases_in_a_file(minimal):
    phases = """
    [[schedule.phases]]
    until_step = 50
    sequence_length = 128
    [[schedule.phases]]
    until_step = 90
    train_batch_size = 64
    """
    minimal.write_text(MINIMAL + phases)
    assert load_run_config(str(minimal)).schedule.phases == (
        PhaseSection(until_step=50, sequence_length=128),
        PhaseSection(until_step=90, train_batch_size=64),
    )
    # A word replaces the list whole: there is no telling which phase it would change.
    words = ["schedule.phases=[{until_step=9, sequence_length=64}]"]
    assert load_run_config(str(minimal), words).schedule.phases == (
        PhaseSection(until_step=9, sequence_length=64),
    )


def test_a_deepspeed_json_is_recognised():
    path = DS_CONFIGS / "zero1_bf16.json"
    assert message_of(str(path)) == (
        f"{path} is no config.resolved.json of format 1; pass it as --deepspeed_config"
    )


def test_a_foreign_json_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"format": 2, "run_config": {}}')
    assert message_of(str(path)) == (
        f"{path} is no config.resolved.json of format 1; write the configuration as TOML"
    )


def test_require_data_path():
    require_data_path(load_run_config("demo", ["data.path=shards"]))
    with pytest.raises(UserError, match=r"data\.path is not set; add data\.path=FOLDER"):
        require_data_path(load_run_config("demo"))
