"""`deberta extend` and what follows: a finished run goes on, and a branch leaves it as it was."""

import hashlib
import json
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from data_prep.errors import CorruptError, UserError
from data_prep.shards import Dataset
from pipeline.commands_extend import extend_command
from pipeline.extend import ExtendOptions, apply_extension, plan_extension
from pipeline.run_folder import RunFolder
from pipeline.skip_list import FILE_NAME
from tests import forked_worlds
from tests.conftest import TINY_RUN
from tests.forked_worlds import train
from tests.worlds import ROOT, environment, rows

pytestmark = pytest.mark.distributed

EXTENSION = (
    "schedule.max_steps=20",
    "schedule.extensions=[{from_step=12, previous_max_steps=12, peak_factor=0.5, warmup_steps=2}]",
)


@pytest.fixture(scope="module")
def finished(dataset_folder, tmp_path_factory):
    """A finished run of 12 steps with commits at 4, 8 and 12, and how it was started."""
    folder = tmp_path_factory.mktemp("extend")
    config, ds = folder / "tiny.toml", folder / "zero1.json"
    vocab_size = Dataset.open(dataset_folder).manifest.vocab_size
    config.write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=0.1))
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
    rest = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}}
    ds.write_text(json.dumps({**batch, **rest}))
    code, output = train(config, ds, dataset_folder, folder / "run")
    assert code == 0, output
    return SimpleNamespace(start=(config, ds, dataset_folder), folder=folder / "run")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished.folder, tmp_path / "run")


def contents(folder):
    """Hash of every file that a run keeps; locks and logs are not its work."""
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and "logs" not in path.parts
    }


def invoke(*words):
    app = typer.Typer()
    app.command()(extend_command)
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def start(command):
    """Run the command that `deberta extend` printed."""
    done = subprocess.run(
        shlex.split(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        env=environment(),
        cwd=ROOT,
    )
    return done.returncode, done.stdout


def weights(run, step):
    return [
        (run / "checkpoints" / f"step-{step:08d}" / network / "rank-00000.safetensors").read_bytes()
        for network in ("generator", "discriminator")
    ]


def test_a_finished_run_goes_on_with_another_warm_up(finished, run, tmp_path):
    """Bit for bit what a run does that was planned like this from the beginning."""
    planned = tmp_path / "planned"
    code, output = train(*finished.start, planned, *EXTENSION)
    assert code == 0, output
    assert "schedule: extended at step 12, to 20 steps instead of 12" in output

    before = contents(run)
    words = (run, "--max-steps", 20, "--decay", "restart", "--peak-factor", 0.5)
    shown = invoke(*words, "--warmup-steps", 2, "--dry-run")
    assert "dry run: nothing was written" in shown
    assert contents(run) == before
    shown = invoke(*words, "--warmup-steps", 2)
    (command,) = [line.strip() for line in shown.splitlines() if "deberta train" in line]
    assert contents(run).keys() - before.keys() == {
        run.joinpath("config.extended.json").relative_to(run)
    }
    code, output = start(command)
    assert code == 0, output
    assert "learning rates (generator, discriminator) of the commit's schedule" in output
    assert "  step 12: ended -> 0, 0" in output
    assert "  step 14: ended -> 0.001, 0.0005" in output
    assert rows(run) == rows(planned)
    assert weights(run, 20) == weights(planned, 20)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    code, output = forked_worlds.deberta(shlex.split(command)[1:], run)
    assert code == 0, output
    assert "learning rates (" not in output, "the commit of step 16 knows the extension"
    assert (rows(run), weights(run, 20)) == (rows(planned), weights(planned, 20))


def test_a_branch_goes_on_by_itself(finished, tmp_path):
    before, branch = contents(finished.folder), tmp_path / "deep" / "branch"
    words = ("--max-steps", 16, "--from-step", 8, "--output", branch, "--json")
    values = json.loads(invoke(finished.folder, *words))
    assert values["extensions"] == [
        {"from_step": 8, "previous_max_steps": 12, "peak_factor": None, "warmup_steps": 0}
    ]
    by_step = {row["step"]: row for row in values["learning_rates"]}
    assert by_step[8]["old"] == by_step[8]["new"]
    assert by_step[8]["new"]["generator"] == pytest.approx(2e-3 * 4 / 10)
    assert by_step[12]["old"] is None
    assert by_step[12]["new"]["generator"] == pytest.approx(2e-3 * 4 / 10 / 2)
    assert sorted(path.name for path in (branch / "checkpoints").glob("step-*")) == [
        "step-00000008"
    ]
    assert [row["step"] for row in rows(branch)] == [3, 6, 6]
    state = json.loads((branch / "state.json").read_text())
    assert (state["status"], state["step"]) == ("stopped", 8)
    assert "branched from " in (branch / "restarts.jsonl").read_text()
    code, output = forked_worlds.deberta(shlex.split(values["command"])[1:], branch)
    assert code == 0, output
    assert [row["step"] for row in rows(branch)] == [3, 6, 6, 9, 12, 12, 15, 16, 16]
    assert rows(branch)[:3] == rows(finished.folder)[:3]
    assert contents(finished.folder) == before


def test_a_decay_to_zero_cannot_go_on(finished):
    with pytest.raises(UserError) as caught:
        plan_extension(finished.folder, ExtendOptions(20))
    assert "the learning rate has come down to 0 at step 12" in str(caught.value)
    assert "--decay restart, or an older checkpoint with --from-step" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (ExtendOptions(12, "restart"), "has 12 steps already; give more"),
        (ExtendOptions(20, "restart", from_step=7), "no such checkpoint; there are 4, 8, 12"),
        (ExtendOptions(20, from_step=8), "has newer checkpoints, up to step 12"),
        (ExtendOptions(20, "restart", peak_factor=0.0), "peak_factor is 0.0; it must be greater"),
        (ExtendOptions(20, "restart", warmup_steps=9), "with 9 steps of warm-up does not fit"),
        (
            ExtendOptions(20, "continue", warmup_steps=9),
            "--warmup-steps belongs to --decay restart",
        ),
    ],
)
def test_what_cannot_be_asked_for(finished, options, says):
    with pytest.raises(UserError) as caught:
        plan_extension(finished.folder, options)
    assert says in str(caught.value)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no run with a checkpoint; name a run folder"):
        plan_extension(tmp_path, ExtendOptions(20))


def test_a_branch_needs_a_new_folder(finished, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        plan_extension(finished.folder, ExtendOptions(20, from_step=8, output=tmp_path))
    with pytest.raises(UserError, match="is the run itself; leave --output out"):
        plan_extension(finished.folder, ExtendOptions(20, "restart", output=finished.folder))


def test_a_damaged_checkpoint_is_passed_over_or_refused(run, tmp_path):
    file = run / "checkpoints" / "step-00000012" / "generator" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    extension = plan_extension(run, ExtendOptions(20))
    assert extension.commit.step == 8
    assert f"passed over: {file}" in extension.notes[0]
    with pytest.raises(CorruptError, match="step-00000012"):
        plan_extension(run, ExtendOptions(20, from_step=12, output=tmp_path / "new"))
    for commit in (run / "checkpoints").glob("step-*"):
        (commit / "manifest.json").write_text("{}")
    with pytest.raises(CorruptError, match="no checkpoint is whole"):
        plan_extension(run, ExtendOptions(20))


def test_a_run_at_work_is_not_extended_in_place(run):
    extension = plan_extension(run, ExtendOptions(20, "restart"))
    other = RunFolder(run)
    other.acquire()
    try:
        with pytest.raises(UserError, match="in use"):
            apply_extension(extension)
    finally:
        other.release()
    assert not (run / "config.extended.json").exists()


def test_a_branch_is_whole_or_absent(run, tmp_path, monkeypatch):
    """A copy that does not read back, and a disk that is full, leave nothing."""
    extension = plan_extension(run, ExtendOptions(16, from_step=8, output=tmp_path / "branch"))
    file = run / "checkpoints" / "step-00000008" / "generator" / "rank-00000.safetensors"
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(CorruptError, match="sha256"):
        apply_extension(extension)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    file.write_bytes(good)
    no_room = SimpleNamespace(free=7)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.extend.shutil.disk_usage", lambda _: no_room)
        with pytest.raises(UserError, match=r"takes [\d,]+ bytes, and 7 are free there"):
            apply_extension(extension)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    (run / FILE_NAME).write_text("a line\n")
    apply_extension(extension)
    assert (tmp_path / "branch" / FILE_NAME).read_text() == "a line\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branch", "run"]
