"""Mistakes that people make, each with the one message that they get (exit code 2).

Every case is a command line of `deberta train` and the files it names. The command is run in this
process, and what it may not do is build a model: each message comes before that, is the only one,
and names the file, key or number, and the cure.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_prep.errors import EXIT_USAGE
from pipeline.modeling.networks import Discriminator, Generator
from pipeline.run_folder import RunFolder
from pipeline.train import run

DS_CONFIGS = Path(__file__).parents[3] / "ds_configs"
GOOD_JSON = (DS_CONFIGS / "zero1_bf16.json").read_text()
DEFAULTS = {"--config": "demo", "--deepspeed_config": str(DS_CONFIGS / "cpu_debug.json")}


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """A message that comes after a model was built comes too late."""

    def refuse(*_arguments):
        raise AssertionError("a model was built before the message")

    for network in (Generator, Discriminator):
        monkeypatch.setattr(network, "__init__", refuse)


def check(argv: list[str], capsys) -> str:
    """Run a command line that must fail as a usage error; return its only message."""
    defaults = [word for pair in DEFAULTS.items() if pair[0] not in argv for word in pair]
    assert run([*defaults, *argv]) == EXIT_USAGE
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 24, "one screen"
    return errors


@dataclass
class Mistake:
    """One mistake.

    Attributes:
        argv: Words behind `deberta train`; "mine.json" and "mine.toml" are the files below.
        says: Parts of the message, all of which must be there.
        json: Text of mine.json, if the case has one.
        toml: Text of mine.toml, if the case has one.
    """

    argv: list[str]
    says: list[str]
    json: str | None = None
    toml: str | None = None
    files: dict[str, str] = field(init=False)

    def __post_init__(self):
        files = {"mine.json": self.json, "mine.toml": self.toml}
        self.files = {name: text for name, text in files.items() if text is not None}


def words(*argv, says):
    return Mistake([*argv], says)


def deepspeed(changes, says, argv=()):
    """A DeepSpeed JSON that would be good without these changes; None removes a key."""
    merged = json.loads(GOOD_JSON) | changes
    text = json.dumps({key: value for key, value in merged.items() if value is not None})
    return Mistake(["--deepspeed_config", "mine.json", "data.path=x", *argv], says, json=text)


def deepspeed_text(text, says):
    return Mistake(["--deepspeed_config", "mine.json"], says, json=text)


def toml(text, says):
    return Mistake(["--config", "mine.toml"], says, toml=text)


MISTAKES = {
    "config forgotten": Mistake(
        ["--config"], ["argument --config: expected one argument", "example:", "deberta train"]
    ),
    "unknown option": words("--epochs", "3", says=["'--epochs' is not of the form section.key"]),
    "option abbreviated": words("--deepspeed", "x.json", says=["'--deepspeed' is not of the form"]),
    "world size of a real run": words("--world-size", "8", says=["goes with --dry-run"]),
    "world of nobody": words(
        "--dry-run", "--world-size", "0", says=["--world-size 0", "1 or more"]
    ),
    "world size in words": words(
        "--dry-run", "--world-size", "two", says=["--world-size", "'two'"]
    ),
    "profile of a dry run": words(
        "--dry-run", "--profile", "2-3", says=["--profile 2-3", "--dry-run takes none", "leave out"]
    ),
    "snapshot of a dry run": words(
        "--dry-run", "--memory-snapshot", "4", says=["--memory-snapshot 4", "--dry-run takes none"]
    ),
    "dataset missing": words(
        "data.path=nowhere", "--dry-run", says=["nowhere: no such dataset", "deberta-prep build"]
    ),
    "text as a dataset": words(
        "data.path=texts", "--dry-run", says=["texts", "deberta-prep build"]
    ),
    "run folder is a file": words(
        "data.path=x", "run.folder=mine.txt", says=["run.folder mine.txt: cannot be written"]
    ),
    "preset misspelt": words(
        "--config", "deberta_v3_lage", says=["deberta_v3_lage", "did you mean 'deberta_v3_large'"]
    ),
    "preset file missing": words(
        "--config", "my/large.toml", says=["my/large.toml: no such preset or file", "demo"]
    ),
    "folder as preset": words("--config", ".", says=["is a folder", "TOML"]),
    "files swapped": words(
        "--config", str(DS_CONFIGS / "zero1_bf16.json"), says=["pass it as --deepspeed_config"]
    ),
    "deepspeed file missing": words(
        "--deepspeed_config", "ds_configs/zero9.json", says=["ds_configs/zero9.json: no such file"]
    ),
    "key misspelt": words(
        "schedule.max_step=10", says=["command line", "schedule.max_step", "'max_steps'"]
    ),
    "section misspelt": words("sched.foo=10", says=["'sched'", "'schedule'"]),
    "section forgotten": words("max_steps=10", says=["did you mean 'schedule.max_steps'"]),
    "key in the wrong section": words(
        "data.max_steps=10", says=["data.max_steps", "did you mean 'schedule.max_steps'"]
    ),
    "dashes": words("--run.seed=1", says=["write run.seed=1 without dashes"]),
    "space for equals": words("run.seed", "1", says=["'run.seed' is not of the form", "'1'"]),
    "text for a number": words("schedule.max_steps=100k", says=['"100k"', "whole number"]),
    "fraction of a step": words("schedule.warmup_steps=0.1", says=["0.1", "whole number"]),
    "negative rate": words(
        "optimizer.generator_learning_rate=-1e-4", says=["-0.0001", "greater than 0"]
    ),
    "percentage for a share": words("objective.mask_prob=15", says=["15", "at most 0.5"]),
    "dropout of one": words(
        "generator.hidden_dropout_prob=1.0", says=["generator.hidden_dropout_prob", "less than 1"]
    ),
    "unknown choice": words(
        "model.attention_backend=sdpa", says=["'eager', 'torch', 'triton' or 'disentangled_flash'"]
    ),
    "heads do not divide": words(
        "generator.num_attention_heads=7", says=["7 does not divide hidden_size 192"]
    ),
    "widths differ": words(
        "discriminator.hidden_size=384",
        says=["generator.embedding_size 192 differs", "384", "set embedding_size in both"],
    ),
    "generator of one layer": words(
        "generator.num_hidden_layers=1", says=["generator.num_hidden_layers 1", "write 2"]
    ),
    "sequence too long": words(
        "data.sequence_length=1024", says=["1024 is more than", "max_position_embeddings 128"]
    ),
    "warm-up longer than the run": words(
        "schedule.max_steps=20",
        "schedule.warmup_steps=21",
        says=["warmup_steps 21 is more than schedule.max_steps 20", "schedule.warmup_steps=2"],
    ),
    "milestones without commits": words(
        "checkpoint.milestone_interval_steps=150",
        "checkpoint.interval_steps=100",
        says=["150 is not a multiple of", "100"],
    ),
    "recipe misspelt": words(
        "recipe=relased_code", says=["command line: recipe", "'paper' or 'released_code'"]
    ),
    "recipe that the preset has not": words(
        "recipe=released_code", says=["[released_code.SECTION]", "demo.toml has not"]
    ),
    "recipe in a section": words("objective.recipe=paper", says=["did you mean 'recipe'?"]),
    "shared embeddings without joint updates": words(
        "objective.embedding_sharing=es", says=['"es" needs objective.update=joint', "be lost"]
    ),
    "one network with two sections": words(
        "objective.task=mlm",
        "objective.sampling_temperature=1.0",
        says=["demo.toml: discriminator means nothing with objective.task=mlm", "remove it"],
    ),
    "two networks with one section": Mistake(
        ["--config", "mlm_base", "objective.task=rtd"],
        ["mlm_base.toml: discriminator is missing", "add it"],
    ),
    "weight of a discriminator that is none": Mistake(
        ["--config", "mlm_base", "objective.rtd_loss_weight=10.0"],
        ["command line: objective.rtd_loss_weight 10.0 means nothing", "leave it out"],
    ),
    "mask decoder on positions in the input": words(
        "generator.position_biased_input=true",
        says=["the input already has", "objective.enhanced_mask_decoder=false"],
    ),
    "phase misspelt": words(
        "schedule.phases=[{until_step=100, sequence_lenght=64}]",
        says=["schedule.phases[0].sequence_lenght", "did you mean 'sequence_length'?"],
    ),
    "phase without a list": words(
        "schedule.phases.until_step=100", says=["schedule.phases is a list", "[{until_step=..."]
    ),
    "phase beyond the run": words(
        "schedule.phases=[{until_step=300}]",
        says=["schedule.phases end at steps [300]", "before schedule.max_steps 300"],
    ),
    "phase that the ranks cannot split": words(
        "schedule.phases=[{until_step=100, train_batch_size=20}]",
        "--dry-run",
        says=["phases[0].train_batch_size 20 is not a multiple of", "16, 32"],
    ),
    "phase larger than the batch": words(
        "schedule.phases=[{until_step=100, train_batch_size=64}]",
        "--dry-run",
        says=["phases[0].train_batch_size 64 is more than", "train_batch_size 32"],
    ),
    "released table misspelt": toml(
        "[released_code.optimizer]\nlerning_rate = 1",
        says=["mine.toml, [released_code]: unknown key 'optimizer.lerning_rate'"],
    ),
    "batch on the command line": words(
        "train_batch_size=64", says=["train_batch_size belongs in the DeepSpeed JSON"]
    ),
    "given twice": words("run.seed=1", "run.seed=2", says=["run.seed is given twice"]),
    "no dataset": words(says=["data.path is not set", "deberta-prep build"]),
    "toml syntax": toml("[run\nseed = 1", says=["mine.toml: not TOML", "line 1"]),
    "toml without networks": toml(
        "[run]\nseed = 1", says=["generator is missing", "schedule is missing", "mine.toml"]
    ),
    "toml key misspelt": toml(
        "[run]\nsed = 1", says=["mine.toml: unknown key 'run.sed'", "'seed'"]
    ),
    "json with a comment": deepspeed_text(
        '{\n  // batch\n  "train_batch_size": 8\n}', says=["mine.json, line 2, column 3: not JSON"]
    ),
    "json with a trailing comma": deepspeed_text(
        '{"train_batch_size": 8,}', says=["mine.json, line 1", "trailing commas"]
    ),
    "json list": deepspeed_text("[]", says=["mine.json: the top level must be an object"]),
    "json key twice": deepspeed_text(
        GOOD_JSON.replace('"bf16"', '"gradient_clipping": 0.5, "bf16"'),
        says=["gradient_clipping is written twice"],
    ),
    "precision misspelt": deepspeed(
        {"bf16": None, "bf_16": {"enabled": True}},
        says=["'bf_16', did you mean 'bf16'?", "train in fp32", "no precision is chosen"],
    ),
    "auto": deepspeed({"gradient_clipping": "auto"}, says=['gradient_clipping is "auto"']),
    "optimizer block": deepspeed(
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, says=["section [optimizer]"]
    ),
    "scheduler block": deepspeed({"scheduler": {}}, says=["section [schedule]"]),
    "accumulation stated": deepspeed(
        {"gradient_accumulation_steps": 1}, says=["gradient_accumulation_steps is derived"]
    ),
    "two precisions": deepspeed({"fp16": {"enabled": True}}, says=["bf16 and fp16; keep one"]),
    "clipping forgotten": deepspeed(
        {"gradient_clipping": None}, says=['write "gradient_clipping": 1.0']
    ),
    "bf16 at stage 0": deepspeed(
        {"zero_optimization": {"stage": 0}}, says=["bf16 at ZeRO stage 0", "stage 1"]
    ),
    "bf16 accumulation": deepspeed(
        {"data_types": None}, says=['write "data_types": {"grad_accum_dtype": "fp32"}']
    ),
    "fp16 on a CPU": deepspeed(
        {"bf16": None, "fp16": {"enabled": True}}, says=["fp16 needs a GPU", "cpu_debug.json"]
    ),
    "batch and micro batch": deepspeed(
        {"train_batch_size": 1000}, says=["1000 is not a multiple of", "992, 1024"]
    ),
    "batch and world": deepspeed(
        {},
        argv=["--dry-run", "--world-size", "6"],
        says=["8192", "32 per rank x 6 ranks = 192", "use 4 ranks"],
    ),
    "micro batch too large for the world": deepspeed(
        {},
        argv=["--dry-run", "--world-size", "512"],
        says=["32 per rank x 512 ranks = 16384", "1, 2, 4, 8, 16."],
    ),
    "zero as a switch": deepspeed(
        {"zero_optimization": True}, says=["zero_optimization is true; it must be a block of keys"]
    ),
    "tensorboard block": deepspeed({"tensorboard": {"enabled": True}}, says=["section [logging]"]),
    "elasticity": deepspeed({"elasticity": {"enabled": True}}, says=["was removed from DeepSpeed"]),
}


def test_the_list_is_long_enough():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mistake = MISTAKES[name]
    for file, text in mistake.files.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "mine.txt").write_text("not a folder")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "speech.txt").write_text("text, not shards")
    message = check(mistake.argv, capsys)
    assert [part for part in mistake.says if part not in message] == [], message


def test_a_dataset_of_another_vocabulary(dataset_folder, vocab_size, capsys):
    message = check([f"data.path={dataset_folder}", "--dry-run"], capsys)
    assert f"vocabulary of {vocab_size}, model.vocab_size is 4100" in message
    assert f"set model.vocab_size={vocab_size}" in message


def test_a_dataset_that_was_never_finished(dataset_folder, tmp_path, capsys):
    shutil.copytree(dataset_folder, tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    (tmp_path / "half" / "manifest.sha256").unlink()
    message = check([f"data.path={tmp_path / 'half'}", "--dry-run"], capsys)
    assert str(tmp_path / "half") in message
    assert "deberta-prep build" in message


def test_a_run_folder_in_use(tmp_path, capsys):
    holder = RunFolder(tmp_path / "run")
    holder.acquire()
    try:
        message = check(["data.path=x", f"run.folder={tmp_path / 'run'}"], capsys)
    finally:
        holder.release()
    assert f"run.folder {tmp_path / 'run'} is in use by" in message
    assert "choose another run.folder" in message


def test_a_launcher_that_forgot_its_address(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = check(["data.path=x"], capsys)
    assert "RANK is set but" in message
    assert "MASTER_ADDR, MASTER_PORT is not" in message


def test_without_a_mistake_there_is_no_message(monkeypatch, capsys):
    monkeypatch.undo()  # a dry run counts the parameters of networks without memory
    words = [word for pair in DEFAULTS.items() for word in pair]
    assert run([*words, "schedule.max_steps=100", "--dry-run"]) == 0
    assert capsys.readouterr().err == ""
