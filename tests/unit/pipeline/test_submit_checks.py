"""What is told before anything waits in a queue, and the command around it, without SLURM."""

import json
import shutil

import pytest

from data_prep.errors import UserError
from pipeline import commands_submit
from pipeline.cli import main
from pipeline.config_loading import load_run_config
from pipeline.ds_config import load_deepspeed_config
from pipeline.submit import checks
from pipeline.submit.checks import findings, frozen_files, load_training, slurm_findings
from pipeline.submit.client import Slurm
from pipeline.submit.recipe import load_recipe
from pipeline.submit.site_file import read_site
from pipeline.submit.stages import Layout, plan_jobs
from tests.submitting import RECIPE, copy_scripts, write_recipe
from tests.task_files import write_table
from tests.worlds import ROOT

OVERRIDES = 'overrides = ["model.vocab_size=%d"]\n'


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Findings of a recipe's text."""
    monkeypatch.chdir(tmp_path)
    environment = {"PATH": "/usr/bin:/bin", "DEBERTA_HOME": str(copy_scripts(tmp_path / "home"))}

    def told(text):
        recipe = load_recipe(write_recipe(tmp_path, text))
        layout = Layout.of(recipe, tmp_path)
        training, problems = None, []
        if recipe.pretrain is not None:
            training, problems = load_training(recipe.pretrain, recipe.pretrain.nodes or 1)
        site = read_site(recipe.site, environment)
        return [*problems, *findings(recipe, layout, site, training)]

    return told


@pytest.fixture
def without_slurm(tmp_path, monkeypatch):
    """A machine with a shell and no SLURM, and a recipe that is right."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("DEBERTA_HOME", str(copy_scripts(tmp_path / "home")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    return write_recipe(
        tmp_path,
        """
        [run]
        folder = "runs/mine"
        [tokenizer]
        sources = ["corpus"]
        vocab_size = 4_000
        [prep]
        sources = ["corpus"]
        [pretrain]
        config = "demo"
        deepspeed_config = "ds.json"
        nodes = 2
        gpus_per_node = 4
        [export]
        [evaluate]
        """,
    )


def test_a_right_recipe_has_no_findings(told, tmp_path, dataset_folder, vocab_size):
    (tmp_path / "dataset").symlink_to(dataset_folder)
    assert told(RECIPE + OVERRIDES % vocab_size) == []


def test_all_that_is_missing_is_told_at_once(told, tmp_path):
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/no-restart").touch()
    lines = told(
        """
        [run]
        folder = "runs/mine"
        [site]
        setup = "setup.sh"
        [tokenizer]
        sources = ["corpus", "s3://elsewhere/x.txt"]
        [prep]
        sources = ["*.jsonl"]
        dedup = "decisions"
        [pretrain]
        config = "deberta_v3_larg"
        deepspeed_config = "zero.json"
        dataset = "other"
        gpus_per_node = 8
        [evaluate]
        [[evaluate.tasks]]
        name = "a"
        train = "a.csv"
        test = "b.csv"
        """
    )
    text = "\n".join(lines)
    for expected in (
        "pretrain.config: --config deberta_v3_larg: no such preset or file, did you mean",
        "pretrain.deepspeed_config: zero.json: no such file",
        f"DEBERTA_SETUP {tmp_path}/setup.sh: no such file",
        "tokenizer.sources 'corpus': nothing is there",
        "prep.sources '*.jsonl': nothing is there",
        "prep.dedup 'decisions': no such file or folder",
        "no-restart is there, so training would not start",
        "evaluate.tasks a.train 'a.csv': no such file",
        "evaluate.tasks a.test 'b.csv': no such file",
    ):
        assert expected in text
    assert len(lines) == 9


def test_data_of_published_tasks_are_looked_for(told, tmp_path, dataset_folder, vocab_size):
    (tmp_path / "dataset").symlink_to(dataset_folder)
    write_table(tmp_path / "glue/CoLA/train.tsv", [], [["a", 1, "", "A sentence."]])
    tasks = "".join(
        f'[[evaluate.tasks]]\nname="{name}"\ntask="cola,rte"\ndata="{data}"\n'
        for name, data in (("a", "glue"), ("b", "away"), ("c", "hub"), ("d", "org/name"))
    )
    lines = told(RECIPE + OVERRIDES % vocab_size + "[evaluate]\n" + tasks)
    assert lines == [
        "evaluate.tasks a.data 'glue': no validation split of cola is there",
        "evaluate.tasks a.data 'glue': no train split of rte is there",
        "evaluate.tasks a.data 'glue': no validation split of rte is there",
        "evaluate.tasks b.data 'away': no such folder; give one, `hub` or a repository as "
        "`org/name`",
    ]


def test_the_batch_must_fit_the_nodes_that_are_asked_for(
    told, tmp_path, dataset_folder, vocab_size
):
    (tmp_path / "dataset").symlink_to(dataset_folder)
    text = RECIPE.replace("ntasks_per_node = 2", "ntasks_per_node = 3") + OVERRIDES % vocab_size
    (line,) = told(text)
    assert "train_batch_size 32 is not a multiple of 4 per rank x 6 ranks = 24" in line


def test_vocabularies_must_be_one(told, tmp_path, dataset_folder, tokenizer_folder, vocab_size):
    (tmp_path / "dataset").symlink_to(dataset_folder)
    (line,) = told(RECIPE)
    assert f'add "model.vocab_size={vocab_size}" to pretrain.overrides' in line
    (tmp_path / "corpus").mkdir()
    chain = RECIPE.replace('dataset = "dataset"\n', "") + '[prep]\nsources = ["corpus"]\n'
    (line,) = told(chain + '[tokenizer]\nsources = ["corpus"]\nvocab_size = 5000\n')
    assert "tokenizer.vocab_size 5000 gives a vocabulary of 5100, model.vocab_size is 4100" in line
    assert told(chain + '[tokenizer]\nsources = ["corpus"]\nvocab_size = 4000\n') == []
    (line,) = told(chain + f'tokenizer = "{tokenizer_folder}"\n')
    assert f"{tokenizer_folder} gives a vocabulary of {vocab_size}" in line


def test_a_dataset_and_a_tokenizer_must_be_there(told):
    (line,) = told(RECIPE)
    assert "dataset: no finished dataset is there" in line
    lines = told("[run]\nfolder='r'\n[prep]\nrecipe='c.toml'\ntokenizer='t'\n[export]")
    assert [line.rpartition(": ")[2] for line in lines] == [
        "no such file or folder",
        "no such tokenizer",
        next(line for line in lines if line.startswith("export")).rpartition(": ")[2],
    ]
    assert "has no checkpoints; name export.run, or add [pretrain]" in lines[2]


def test_what_a_cpu_cannot_compute_is_told(told, tmp_path):
    recipe = write_recipe(tmp_path)
    values = json.loads((tmp_path / "ds.json").read_text())
    values = {key: value for key, value in values.items() if key != "bf16"}
    values |= {"fp16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    (tmp_path / "fp16.json").write_text(json.dumps(values))
    lines = told(recipe.read_text().replace("ds.json", "fp16.json"))
    assert any("fp16 needs a GPU" in line for line in lines), lines


def test_room_for_checkpoints_is_counted(told, tmp_path, dataset_folder, vocab_size, monkeypatch):
    (tmp_path / "dataset").symlink_to(dataset_folder)
    monkeypatch.setattr(checks, "_free_bytes", lambda path: 100 << 20)
    (line,) = told(RECIPE + OVERRIDES % vocab_size)
    assert "checkpoints of 0.0 GiB need 0.1 GiB" in line
    assert "has 0.1 GiB: choose another run.folder, or keep fewer (checkpoint.keep_last" in line


def test_what_was_checked_is_what_will_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path, RECIPE + OVERRIDES % 600))
    training, problems = load_training(recipe.pretrain, 2)
    assert not problems
    assert training is not None
    assert training.world_size == 4
    files = frozen_files(recipe, Layout.of(recipe, tmp_path), training)
    for name, text in files["pretrain"].items():
        (tmp_path / name).write_text(text)
    assert load_run_config(str(tmp_path / "config.json")) == training.config
    assert load_deepspeed_config(tmp_path / "deepspeed.json").raw == training.deepspeed.raw


def test_a_dry_run_needs_no_slurm_and_writes_nothing(without_slurm, tmp_path, capsys):
    before = sorted(path for path in tmp_path.rglob("*"))
    commands_submit.submit_command(without_slurm, dry_run=True)
    said = capsys.readouterr().out
    for stage in ("tokenizer", "prep", "assemble", "pretrain", "export", "evaluate"):
        assert f"==> {tmp_path}/runs/mine/slurm/{stage}.sbatch" in said
    assert said.count("#!/bin/bash") == 6
    assert "\x1b" not in said  # piped
    assert "#SBATCH --gpus-per-node=4" in said
    assert "SLURM was not asked: sbatch is not on this machine" in said
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_without_slurm_nothing_is_submitted(without_slurm):
    with pytest.raises(UserError, match="sbatch is not on this machine: submit from a login node"):
        commands_submit.submit_command(without_slurm)


def test_findings_end_a_dry_run_with_2_after_the_scripts(without_slurm, capsys):
    text = without_slurm.read_text().replace("4_000", "5_000")
    without_slurm.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["submit", str(without_slurm), "--dry-run"])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out.count("#!/bin/bash") == 6
    assert "model.vocab_size=5100" in said.err


def test_the_command_wants_a_recipe():
    with pytest.raises(UserError, match="name a RECIPE; slurm/recipes/ has examples"):
        commands_submit.submit_command()


def test_scripts_are_copied_for_those_who_installed_a_wheel(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands_submit.submit_command(copy_scripts=tmp_path / "mine")
    copied = {path.name for path in (tmp_path / "mine/slurm").rglob("*") if path.is_file()}
    assert {"site.env", "prep.sbatch", "job.sh", "README.md", "base-1-node.toml"} <= copied
    assert f"export DEBERTA_HOME={tmp_path}/mine" in capsys.readouterr().out
    with pytest.raises(UserError, match="slurm is there already; name another folder"):
        commands_submit.submit_command(copy_scripts=tmp_path / "mine")


def test_what_slurm_refuses_is_told_by_stage(without_slurm, tmp_path):
    recipe = load_recipe(without_slurm)
    environment = {"PATH": str(tmp_path / "slurm-bin"), "DEBERTA_HOME": str(tmp_path / "home")}
    answers = {
        "sbatch": "cat > /dev/null; echo 'sbatch: error: submission failed: No' >&2; exit 1",
        "scontrol": 'echo "MaxArraySize            = 4"',
        "sinfo": "printf 'batch\\nurgent\\n'",
    }
    (tmp_path / "slurm-bin").mkdir()
    for name, answer in answers.items():
        program = tmp_path / "slurm-bin" / name
        program.write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{answer}\n")
        program.chmod(0o755)
    site = read_site(recipe.site, {"PATH": "/bin", "DEBERTA_HOME": str(tmp_path / "home")})
    jobs = plan_jobs(recipe, site, Layout.of(recipe, tmp_path))
    jobs[0].options["partition"] = "batsh"  # type: ignore[index]
    texts = {job.stage: "" for job in jobs}
    lines = list(slurm_findings(jobs, texts, Slurm(environment)))
    assert lines[:3] == [
        "tokenizer: partition 'batsh' does not exist, did you mean 'batch'?",
        "prep: an array of 8 tasks; SLURM here takes 4 (MaxArraySize)",
        "assemble: sbatch --test-only: submission failed: No",
    ]


def test_the_scripts_of_the_project_are_the_ones_that_are_installed():
    assert (ROOT / "pipeline/slurm_scripts").resolve() == ROOT / "slurm"
