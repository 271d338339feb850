"""`deberta train` up to the first step: help, and what a resumed run is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from data_prep.errors import EXIT_USAGE, UserError
from data_prep.manifest import Manifest
from data_prep.shards import Dataset
from pipeline.commit import Commit, list_commits
from pipeline.config_loading import load_run_config
from pipeline.ds_config import load_deepspeed_config
from pipeline.resume import (
    ACCEPTS_NOTHING,
    Accepted,
    Accepts,
    Comparison,
    compare_with_commit,
    restored_state,
)
from pipeline.run_data import open_run_data
from pipeline.run_folder import RunFolder
from pipeline.session import Session
from pipeline.train import main, parse, run
from tests import worlds
from tests.forked_worlds import train
from tests.worlds import ROOT, environment

DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
CPU_DEBUG = str(ROOT / "ds_configs" / "cpu_debug.json")
DRY = ["--config", "demo", "--deepspeed_config", CPU_DEBUG, "--dry-run"]


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("--config", "--deepspeed_config", "--dry-run", "example:", "schedule.max_steps="):
        assert part in text


def test_main_exits_with_the_code(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--config", "demo"])
    assert caught.value.code == EXIT_USAGE
    assert "--deepspeed_config" in capsys.readouterr().err


def test_words_may_stand_anywhere():
    options = parse(
        ["run.seed=1", "--config", "c", "data.path=d", "--deepspeed_config", "j", "x.y=2"]
    )
    assert options.overrides == ["run.seed=1", "data.path=d", "x.y=2"]


def test_the_deepspeed_launcher_s_flag_is_accepted():
    words = ["--local_rank=3", "--config", "c", "--deepspeed_config", "j"]
    assert parse(words).overrides == []


def test_other_ranks_are_silent(capsys, monkeypatch):
    """What is wrong with the command line is wrong on every rank; one of them says it."""
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert run(["--config", "nowhere", "--deepspeed_config", CPU_DEBUG]) == EXIT_USAGE
    assert capsys.readouterr() == ("", "")


def test_a_mistake_costs_no_heavy_import():
    code = (
        "import sys; from pipeline.train import run; assert run(sys.argv[1:]) == 2;"
        "print(*sorted({'torch', 'deepspeed', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    words = ["--config", "demo", "--deepspeed_config", CPU_DEBUG, "schedule.max_step=3"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "\n"


@pytest.fixture(scope="module")
def finished(dataset_folder, tmp_path_factory):
    """A run of two steps, really trained: its folder and what started it."""
    folder = tmp_path_factory.mktemp("finished")
    from tests.conftest import TINY_RUN

    config = folder / "tiny.toml"
    vocab_size = Dataset.open(dataset_folder).manifest.vocab_size
    config.write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=0.1))
    words = ["schedule.max_steps=2", "schedule.warmup_steps=1", "checkpoint.interval_steps=1"]
    arguments = (config, CPU_DEBUG, dataset_folder, folder / "run", *words)
    code, output = worlds.train(*arguments)
    assert code == 0, output
    return SimpleNamespace(arguments=arguments, folder=folder / "run", output=output)


def test_what_a_run_leaves(finished):
    folder = finished.folder
    assert json.loads((folder / "state.json").read_text()) == {
        "status": "done",
        "step": 2,
        "reason": "",
    }
    assert [commit.step for commit in list_commits(folder / "checkpoints")] == [1, 2]
    resolved = load_run_config(str(folder / "config.resolved.json"))
    assert resolved.schedule.max_steps == 2
    assert load_deepspeed_config(folder / "config.resolved.json").train_batch_size == 32
    assert json.loads((folder / "environment.json").read_text())["torch"]
    assert "run: " in finished.output
    assert "MA 0." not in finished.output, "DeepSpeed's chatter"
    assert "Traceback" not in finished.output
    assert "Warning" not in finished.output


def test_a_finished_run_has_nothing_left_to_do(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    config, ds, data, _, *words = finished.arguments
    before = (folder / "metrics.jsonl").read_text()
    code, output = train(config, ds, data, folder, *words)
    assert code == 0, output
    assert "nothing left to do: 2 steps are done" in output
    assert (folder / "metrics.jsonl").read_text() == before
    assert json.loads((folder / "state.json").read_text())["status"] == "done"


def test_a_run_folder_of_another_configuration_is_refused(finished):
    state = (finished.folder / "state.json").read_text()
    code, output = train(*finished.arguments, "run.seed=7", "checkpoint.keep_last=9")
    assert code == EXIT_USAGE, output
    assert output.count("error:") == 1
    assert "run.seed was 42 and is now 7" in output
    assert "start a new run with another run.folder" in output
    assert "keep_last" not in output
    assert "Traceback" not in output
    assert (finished.folder / "state.json").read_text() == state


def test_what_was_accepted_is_told_and_recorded(finished, dataset_folder, tmp_path):
    """Other data and another seed, said by flags: on record, in the commits, in every banner."""
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    other = shutil.copytree(dataset_folder, tmp_path / "other")
    manifest, _ = Manifest.load(other)
    dataclasses.replace(manifest, command="deberta-prep build elsewhere").save(other)
    config, ds, _, _, *words = finished.arguments
    words = ["run.seed=7", "optimizer.betas=[0.9, 0.99]", "schedule.max_steps=4", *words[1:]]
    code, output = train(config, ds, other, folder, *words, "--accept-config-change")
    assert code == EXIT_USAGE, output
    assert 'command was "' in output
    assert 'and is now "deberta-prep build elsewhere"' in output
    flags = ("--accept-config-change", "--accept-data-change")
    code, output = train(config, ds, other, folder, *words, *flags)
    assert code == 0, output
    assert "accepted at step 2: run.seed was 42, then 7" in output
    assert "accepted at step 2: dataset_fingerprint was" in output
    assert "  step 2: ended -> 0.001333, 0.0006667" in output
    lines = [json.loads(line) for line in (folder / "restarts.jsonl").read_text().splitlines()]
    (recorded,) = [line["accepted"] for line in lines if "accepted" in line]
    by_key = {each["key"]: (each["old"], each["new"], each["step"]) for each in recorded}
    assert by_key["run.seed"] == (42, 7, 2)
    assert by_key["optimizer.betas"] == ([0.9, 0.98], [0.9, 0.99], 2)
    old, new, _ = by_key["dataset_fingerprint"]
    assert (old, new) == (Dataset.open(dataset_folder).fingerprint, Dataset.open(other).fingerprint)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    code, output = train(config, ds, other, folder, *words)
    assert code == 0, output
    assert "accepted at step 2: run.seed was 42, then 7" in output
    assert "learning rates (" not in output


def test_a_resume_without_its_commits_is_refused(finished, tmp_path):
    """It would begin at step 0 and cut all metrics: somebody has lost a disk, not made a wish."""
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    config, ds, data, _, *words = finished.arguments
    code, output = train(config, ds, data, folder, *words)
    assert code == 88, output
    assert "step 2 was committed" in output
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2, "a row and an evaluation"


def session(finished, dataset_folder, *words, ranks=1):
    config, ds, _, folder, *more = finished.arguments
    keys = {word.partition("=")[0] for word in words}
    more = [word for word in more if word.partition("=")[0] not in keys]
    arguments = [f"data.path={dataset_folder}", f"run.folder={folder}", *more, *words]
    deepspeed = load_deepspeed_config(ds)
    world = SimpleNamespace(world_size=ranks)
    return Session(
        load_run_config(str(config), arguments),
        deepspeed,
        deepspeed.batch_plan(1),
        world,
        None,
        RunFolder(folder),
        None,
        None,
    )


def compare(finished, dataset_folder, *words, ranks=1, accepts=ACCEPTS_NOTHING, **changes):
    (*_, commit) = list_commits(finished.folder / "checkpoints")
    here = session(finished, dataset_folder, *words, ranks=ranks)
    before = commit.read_json("train_state.json")["identity"]
    now = here.identity(open_run_data(here.config))
    for name, value in changes.items():
        now = {**now, name: value(now[name])}
    return compare_with_commit(
        commit, here.config, here.ds, before=before, now=now, accepts=accepts
    )


def test_the_same_start_has_nothing_to_note(finished, dataset_folder):
    threads = {"environment": lambda e: {**e, "threads": "1", "device": "cpu"}}
    assert compare(finished, dataset_folder, **threads) == Comparison()


def test_another_host_or_job_is_nothing_to_note(finished, dataset_folder):
    changed = {"environment": lambda e: {**e, "threads": "1", "host": "n7", "slurm_job_id": "9"}}
    assert compare(finished, dataset_folder, **changed) == Comparison()


def test_what_keeps_a_resume_from_being_exact_is_noted(finished, dataset_folder):
    changed = {"environment": lambda e: {**e, "threads": "1", "torch": "9.9", "deepspeed": "0.1"}}
    words = ["model.attention_backend=eager"]
    comparison = compare(finished, dataset_folder, *words, ranks=2, **changed)
    assert len(comparison.notes) == 4
    text = "\n".join(comparison.notes)
    assert 'model.attention_backend was "torch" and is now "eager"' in text
    assert "2 ranks instead of 1: the same samples, masks and draws" in text
    assert "is now 9.9: not bit for bit the same from here" in text
    assert "deepspeed was " in text
    assert comparison.accepted == []


def another_fingerprint(value):
    return "0123456789ab" + value[12:]


def test_other_data_is_refused_with_the_difference(finished, dataset_folder):
    def grown(summary):
        train = {**summary["train"], "tokens": 7, "content": "f" * 64}
        return {**summary, "train": train, "command": "deberta-prep build other"}

    changes = {"dataset_fingerprint": another_fingerprint, "dataset": grown}
    with pytest.raises(UserError) as caught:
        compare(finished, dataset_folder, **changes)
    tokens = Dataset.open(dataset_folder).split_tokens("train")
    for part in (
        "(dataset_fingerprint 0123456789ab, then ",
        f"\n  - train tokens was {tokens:,} and is now 7\n",
        'is now "deberta-prep build other"',
        "give the same dataset, or start a new run with another run.folder, or go on with the new"
        " data by --accept-data-change",
    ):
        assert part in str(caught.value)
    comparison = compare(finished, dataset_folder, accepts=Accepts(data_change=True), **changes)
    (accepted,) = comparison.accepted
    assert (accepted.key, accepted.step) == ("dataset_fingerprint", 2)
    assert accepted.new.startswith("0123456789ab")
    assert f"train tokens was {tokens:,} and is now 7" in accepted.details


def test_the_same_tokens_under_another_manifest_are_told_so(finished, dataset_folder):
    with pytest.raises(UserError, match="the tokens to train on are the same, byte for byte"):
        compare(finished, dataset_folder, dataset_fingerprint=another_fingerprint)


def test_a_commit_of_an_older_version_still_resumes(finished, dataset_folder):
    """It keeps only the fingerprint of its data."""
    (*_, commit) = list_commits(finished.folder / "checkpoints")
    here = session(finished, dataset_folder)
    now = here.identity(open_run_data(here.config))
    before = {key: now[key] for key in now if key not in ("dataset", "accepted")}
    arguments = (commit, here.config, here.ds)
    options = {"now": now, "accepts": ACCEPTS_NOTHING}
    assert compare_with_commit(*arguments, before=before, **options) == Comparison()
    before["dataset_fingerprint"] = another_fingerprint(now["dataset_fingerprint"])
    with pytest.raises(UserError, match="keeps nothing but the fingerprint of its data"):
        compare_with_commit(*arguments, before=before, **options)


def test_another_tokenizer_cannot_be_accepted(finished, dataset_folder):
    with pytest.raises(UserError) as caught:
        compare(
            finished,
            dataset_folder,
            tokenizer_fingerprint=another_fingerprint,
            accepts=Accepts(config_change=True, data_change=True),
        )
    assert "(tokenizer_fingerprint 0123456789ab, then " in str(caught.value)
    assert "ids mean other pieces, which no flag can accept" in str(caught.value)
    assert "initialize.new_vocabulary=resize" in str(caught.value)


def test_accepted_keys_are_listed_with_both_values(finished, dataset_folder):
    words = ["run.seed=7", "optimizer.weight_decay=0.1", "logging.interval_steps=1"]
    comparison = compare(finished, dataset_folder, *words, accepts=Accepts(config_change=True))
    assert comparison.accepted == [
        Accepted("run.seed", 42, 7, 2),
        Accepted("optimizer.weight_decay", 0.01, 0.1, 2),
    ]
    assert str(comparison.accepted[0]) == "accepted at step 2: run.seed was 42, then 7"


def test_one_flag_does_not_accept_the_other_difference(finished, dataset_folder):
    with pytest.raises(UserError, match=r"run\.seed was 42 and is now 7"):
        compare(finished, dataset_folder, "run.seed=7", accepts=Accepts(data_change=True))
    changes = {"dataset_fingerprint": another_fingerprint}
    with pytest.raises(UserError, match="--accept-data-change"):
        compare(finished, dataset_folder, accepts=Accepts(config_change=True), **changes)


def test_other_rates_are_shown(finished, dataset_folder):
    words = ["optimizer.generator_learning_rate=1e-3", "schedule.max_steps=4"]
    comparison = compare(finished, dataset_folder, *words, accepts=Accepts(config_change=True))
    assert comparison.rates[0].startswith("learning rates (generator, discriminator)")
    assert "  step 1: 0.002, 0.001 -> 0.001, 0.001 (done)" in comparison.rates
    assert "  step 2: ended -> 0.0006667, 0.0006667" in comparison.rates


@pytest.mark.parametrize("word", ["data.sequence_length=16", "objective.mask_prob=0.2"])
def test_another_objective_is_refused(finished, dataset_folder, word):
    key, _, value = word.partition("=")
    with pytest.raises(UserError, match=rf"{key} was .* and is now {value}"):
        compare(finished, dataset_folder, word)


def test_the_vocabulary_is_compared_before_anything_is_built(finished, dataset_folder, tmp_path):
    """The only mistake about data that a rank finds after it joined its world."""
    command = [sys.executable, "-m", "pipeline.train", *DRY[:4]]
    done = subprocess.run(
        [*command, f"data.path={dataset_folder}", f"run.folder={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == EXIT_USAGE
    assert done.stderr.count("\n") == 1
    assert "was tokenized with a vocabulary of" in done.stderr
    assert done.stdout == ""


def test_nonsense_in_the_launcher_s_variables_is_named(tmp_path):
    """One message, although no process knows itself to be the first."""
    command = [sys.executable, "-m", "pipeline.train", *DRY[:4], "data.path=x"]
    launcher = {"RANK": "abc", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [*command, f"run.folder={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment(), **launcher, "MASTER_PORT": "1"},
        timeout=120,
    )
    assert done.returncode == EXIT_USAGE
    assert "RANK=abc is not a number" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_newer_commit_is_named_and_refused(finished, dataset_folder, tmp_path):
    """Not a traceback, and not a resume that forgets what the newer program had stored."""
    (*_, commit) = list_commits(finished.folder / "checkpoints")
    now = session(finished, dataset_folder).identity(
        open_run_data(load_run_config(str(finished.arguments[0]), [f"data.path={dataset_folder}"]))
    )
    saved = commit.read_json("train_state.json")
    assert restored_state(commit, saved, now).step == 2
    del saved["state"]["starting_figures"]
    assert restored_state(commit, saved, now).starting_figures == {}
    saved["state"]["mood"] = "good"
    saved["identity"]["environment"]["deberta-pretrain"] = "99.0"
    with pytest.raises(UserError, match="holds mood, which this version does not know") as caught:
        restored_state(commit, saved, now)
    assert "was written by deberta-pretrain 99.0, this is" in str(caught.value)
    copy = shutil.copytree(commit.path, tmp_path / commit.path.name)
    resolved = json.loads((copy / "config.resolved.json").read_text())
    resolved["run_config"]["schedule"]["moods"] = 3
    (copy / "config.resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(UserError, match=r"unknown key 'schedule\.moods'") as caught:
        compare_with_commit(
            Commit(copy, 2),
            load_run_config(str(finished.arguments[0])),
            load_deepspeed_config(CPU_DEBUG),
            before=saved["identity"],
            now=now,
            accepts=ACCEPTS_NOTHING,
        )
    assert "was written by deberta-pretrain 99.0, this is" in str(caught.value)
