"""Plans of comparisons, and the mistakes that must be told before anything is trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.errors import UserError
from data_prep.shards import Dataset
from pipeline.cli import main
from pipeline.compare.plan import MARKER, CompareOptions, marker_text
from pipeline.compare.planning import make_plan
from pipeline.compare.systems import system_name
from pipeline.config_loading import load_run_config
from pipeline.flops import training_flops
from pipeline.modeling.networks import Generator


@pytest.fixture
def files(tmp_path, tiny_run, deepspeed_json, dataset_folder):
    """Two systems, tiny and deeper, and what else a comparison takes."""
    tiny = tmp_path / "tiny.toml"
    tiny.write_text(tiny_run().read_text())
    deep = tmp_path / "deep.toml"
    deep.write_text(tiny.read_text().replace("num_hidden_layers = 2", "num_hidden_layers = 4"))
    return SimpleNamespace(
        tiny=str(tiny),
        deep=str(deep),
        deepspeed=deepspeed_json(1, 4),
        dataset=dataset_folder,
        output=tmp_path / "comparison",
        folder=tmp_path,
    )


def options(files, *systems, words=(), **others):
    return CompareOptions(
        systems or (files.tiny, files.deep),
        **{
            "deepspeed_config": files.deepspeed,
            "dataset": files.dataset,
            "output": files.output,
            "words": tuple(words),
            **others,
        },
    )


def refused(files, *systems, words=(), **others):
    """The message of a comparison that must not begin; nothing may be written."""
    with pytest.raises(UserError) as caught:
        make_plan(options(files, *systems, words=words, **others))
    assert not files.output.exists()
    return str(caught.value)


def test_the_first_system_sets_the_budget(files):
    plan = make_plan(options(files))
    tiny, deep = plan.systems
    assert (tiny.name, deep.name) == ("tiny", "deep")
    assert tiny.config.schedule.max_steps == 12
    assert plan.budget == plan.costs[0].flops == training_flops(load_run_config(files.tiny), 8)
    one = training_flops(load_run_config(files.deep), 8) / 12
    assert abs(plan.costs[1].flops - plan.budget) <= one / 2
    assert deep.config.schedule.max_steps == round(plan.budget / one) < 12
    assert plan.total_flops == pytest.approx(3 * sum(cost.flops for cost in plan.costs))


def test_runs_share_the_data_order_seed_by_seed(files):
    plan = make_plan(options(files, seeds=2, words=["run.seed=7", "evaluation.interval_steps=4"]))
    assert [run.name for run in plan.runs] == [
        "tiny-seed-7",
        "deep-seed-7",
        "tiny-seed-8",
        "deep-seed-8",
    ]
    for run in plan.runs:
        command = plan.command(run)
        config = load_run_config(command[command.index("--config") + 1], command[7:])
        assert config.run.seed == run.seed
        assert Path(config.run.folder) == run.folder == files.output / "runs" / run.name
        assert Path(config.data.path) == files.dataset
        steps = config.schedule.max_steps
        assert config.evaluation.interval_steps == -(-steps // 3), "three of them, for all"
        for section in ("data", "model", "generator", "discriminator", "objective", "optimizer"):
            ours = getattr(run.system.config, section)
            assert getattr(config, section).model_dump(exclude={"path"}) == ours.model_dump(
                exclude={"path"}
            )
    assert plan.runs_of(plan.systems[1]) == plan.runs[1::2]


def test_matched_by_steps_and_tokens(files):
    for match, budget, steps in (("steps", 20, 20), ("tokens", 20 * 8 * 32, 20)):
        plan = make_plan(options(files, match=match, budget=budget))
        assert [cost.steps for cost in plan.costs] == [steps, steps]
        assert plan.costs[0].flops < plan.costs[1].flops


def test_names():
    assert system_name("demo_es") == "demo_es"
    assert system_name("runs/old/mine.toml") == "mine"
    assert system_name("runs/old/config.resolved.json") == "old"


def test_notes_say_what_cannot_be_compared(files):
    text = Path(files.deep).read_text()
    Path(files.deep).write_text(text + "[objective]\nmask_prob = 0.25\n")
    notes = make_plan(options(files)).notes
    assert notes == (
        "objective.mask_prob is 0.15 in tiny, 0.25 in deep: the masks differ, held-out ones too,"
        " and the MLM figures are those of different tasks.",
        "Each discriminator is measured on the replacements of its own generator: a better"
        " generator makes its task harder.",
    )
    words = ["schedule.phases=[{until_step=4, sequence_length=16}]", "reference.train_batch_size=9"]
    notes = make_plan(options(files, words=words)).notes
    assert notes[2].startswith("Sequence lengths: (16, 32) in tiny, (16, 32) in deep. A phase of")
    assert "tiny, deep: " in notes[3]
    assert "train_batch_size is 8, the preset's source used 9" in notes[3]


def test_systems_that_are_wrong(files):
    message = refused(files, files.tiny)
    assert "takes two systems or more, here are 1" in message
    assert "demo, demo_electra, demo_es" in message
    message = refused(files, "demo", "demo", "demo_es", words=["data.path=x", "run.folder=y"])
    assert "demo is the name of 2 systems (demo, demo): names are those of presets" in message
    assert "data.path=x: --dataset names it; leave the word out" in message
    assert "run.folder=y: every run has a folder of its own in --output" in message
    assert "demo_ess: --config demo_ess: no such preset or file, did you mean 'demo_es'?" in (
        refused(files, "demo", "demo_ess")
    )
    assert "tiny: the run configuration: command line: unknown key 'data.pth'" in refused(
        files, words=["data.pth=1"]
    )


def test_systems_that_disagree(files):
    message = refused(files, files.tiny, "demo")
    assert "deberta compare has 4 problems" in message
    for key, theirs, ours in (
        ("model.vocab_size", 4100, 700),
        ("data.sequence_length", 128, 32),
        ("data.block_sequences", 64, 16),
        ("data.window_blocks", 64, 4),
    ):
        assert f"{key} is {theirs} in demo and {ours} in tiny: systems are trained" in message
    assert "add data.sequence_length=32, or another value for all" in message


def test_budgets_that_are_wrong(files):
    message = refused(files, budget=1e3)
    assert message.count("--budget 1000 flops is less than one step, which is ") == 2
    assert message.startswith("deberta compare has 2 problems")
    assert "--budget -1: give a number above 0" in refused(files, budget=-1)
    assert "--budget nan: give a number above 0" in refused(files, budget=float("nan"))
    assert "--seeds 0: give 1 or more" in refused(files, seeds=0)
    phases = ["schedule.phases=[{until_step=4, sequence_length=16}, {until_step=8}]"]
    message = refused(files, match="steps", budget=1, words=phases)
    assert "tiny in 1 steps: the run configuration: " in message
    assert "end at steps [1, 1]: each must end after the one before it" in message


def test_data_that_does_not_fit(files, dataset_folder, monkeypatch):
    assert "no manifest.json" in refused(files, dataset=files.folder)
    message = refused(files, words=["model.vocab_size=900"])
    assert "was tokenized with a vocabulary of 700, model.vocab_size is 900" in message
    assert "add model.vocab_size=700" in message
    real = Dataset.split_tokens
    monkeypatch.setattr(
        Dataset, "split_tokens", lambda data, split: split == "train" and real(data, split)
    )
    message = refused(files)
    assert "has nothing held out, to measure on: build it with" in message


def test_output_that_holds_something_else(files):
    (files.folder / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--output .*file is a file; name a folder"):
        make_plan(options(files, output=files.folder / "file"))
    with pytest.raises(UserError, match=r"is not empty and holds no comparison: choose another"):
        make_plan(options(files, output=files.folder))
    plan = make_plan(options(files))
    files.output.mkdir()
    (files.output / MARKER).write_text(marker_text(plan))
    make_plan(options(files))
    (files.output / MARKER).write_text(
        marker_text(plan).replace(plan.dataset.fingerprint, "0" * 64)
    )
    with pytest.raises(
        UserError, match=r"holds a comparison on another dataset \(fingerprint 0000"
    ):
        make_plan(options(files))


def test_runs_that_were_begun_otherwise(files):
    plan = make_plan(options(files))
    files.output.mkdir()
    (files.output / MARKER).write_text(marker_text(plan))
    run = plan.runs[0]
    run.folder.mkdir(parents=True)
    config = load_run_config(run.system.source, run.words).model_dump(mode="json")
    resolved = {"format": 1, "run_config": config, "deepspeed_config": plan.deepspeed.raw}
    (run.folder / "config.resolved.json").write_text(json.dumps(resolved))
    (run.folder / "state.json").write_text('{"status": "running", "step": 5, "reason": ""}')
    make_plan(options(files, seeds=5))
    with pytest.raises(UserError) as caught:
        make_plan(options(files, match="steps", budget=24))
    message = str(caught.value)
    assert f"--output {files.output}" in message
    assert "schedule.max_steps was 12 and is now 24" in message
    assert "or choose another --output" in message


def test_by_the_command(files, capsys, monkeypatch):
    """No model is built, no file written: the plan as a table and as JSON, and mistakes."""
    monkeypatch.setattr(Generator, "__init__", lambda *_: pytest.fail("a model was built"))
    words = [
        *("compare", files.tiny, files.deep, "--deepspeed_config", str(files.deepspeed)),
        *("--dataset", str(files.dataset), "--output", str(files.output), "--dry-run"),
    ]
    with pytest.raises(SystemExit) as end:
        main([*words, "--json", "run.seed=3", "--seeds", "2"])
    assert end.value.code == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert [(each["name"], each["steps"]) for each in values["systems"]] == [
        ("tiny", 12),
        ("deep", 6),
    ]
    assert (values["runs"], values["seeds"], values["match"]) == (4, [3, 4], "flops")
    assert "to be trained, matched by flops" in captured.err
    for extra, message in (
        (["--train", "a.jsonl"], "--train is given 1 times and --test 0 times: give a test file"),
        (["--max-length", "65", *task(files)], "--max-length 65: tiny takes at most 64 tokens"),
        ([*task(files), *task(files)], "--train: two tasks have the name 'peace'"),
        (["--train", "a.jsonl", "--test", "b.jsonl"], "a.jsonl: cannot be read: No such file"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*words, *extra])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    assert not files.output.exists()


def task(files):
    folder = files.folder / "peace"
    folder.mkdir(exist_ok=True)
    for name in ("train", "test"):
        (folder / f"{name}.tsv").write_text("text\tlabel\nall war\t0\nall peace\t1\n")
    return ["--train", str(folder / "train.tsv"), "--test", str(folder / "test.tsv")]
