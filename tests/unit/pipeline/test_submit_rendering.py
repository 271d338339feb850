"""Scripts: plain header and body, a person's values as data, and no way for them to be more."""

import subprocess
from importlib import import_module

import pytest
from typer import Context
from typer.main import get_command

from data_prep.errors import UserError
from pipeline.submit import site_file, tables
from pipeline.submit.recipe import load_recipe
from pipeline.submit.rendering import PlainScript, render
from pipeline.submit.site_file import read_site, scripts_folder
from pipeline.submit.stages import Layout, evaluations, plan_jobs
from pipeline.submit.tables import SiteSection
from tests.submitting import PLAIN_PRETRAIN, RECIPE, copy_scripts, write_recipe
from tests.worlds import ROOT

NASTY = [
    "a b",
    "it's",
    'say "x"',
    "$(touch HIT)",
    "`touch HIT`",
    "; touch HIT",
    "*",
    "-n",
    "#x",
    "~",
]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "pretrain.sbatch"
    path.write_text(PLAIN_PRETRAIN)
    return PlainScript.read(path)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Jobs of a recipe's text, by their stages; the plain scripts are the project's."""
    monkeypatch.chdir(tmp_path)
    home = str(copy_scripts(tmp_path / "home"))

    def plan(text, environment=None):
        recipe = load_recipe(write_recipe(tmp_path, text))
        outside = {"PATH": "/usr/bin:/bin", "DEBERTA_HOME": home, **(environment or {})}
        site = read_site(recipe.site, outside)
        jobs = plan_jobs(recipe, site, Layout.of(recipe, tmp_path))
        return {job.stage: job for job in jobs}

    return plan


def test_header_lines_and_their_reasons_are_read(script):
    assert script.options == {
        "job-name": "deberta-pretrain",
        "nodes": "1",
        "signal": "B:USR1@180",
        "requeue": None,
    }
    assert script.reasons == {"nodes": "of the run", "signal": "time to commit"}
    assert script.body == 'set -euo pipefail\nprintf "%s\\n" "$CONFIG"'


def test_a_header_that_cannot_be_read_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.sbatch"
    path.write_text("#!/bin/bash\n#SBATCH -N 2\n")
    with pytest.raises(UserError, match=r"x\.sbatch, line 2: '#SBATCH -N 2': write one option"):
        PlainScript.read(path)
    with pytest.raises(UserError, match=r"no such script; DEBERTA_HOME or ./slurm is not complete"):
        PlainScript.read(tmp_path / "y.sbatch")


@pytest.mark.parametrize("value", NASTY)
def test_values_of_people_are_data(tmp_path, script, value):
    text = render("t", script, {"nodes": "1"}, {"CONFIG": value, "WORDS": [value, "b"]})
    text += '\nprintf "%s\\0" "${WORDS[@]}"'
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == f"{value}\n{value}\0b\0"
    assert not (tmp_path / "HIT").exists()


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x00b", "\x1b[31m"])
@pytest.mark.parametrize("place", ["title", "option", "parameter", "word"])
def test_line_breaks_are_refused_wherever_they_are(script, value, place):
    title = value if place == "title" else "t"
    options = {"partition": value if place == "option" else "p"}
    parameters = {"A": value if place == "parameter" else "a", "B": [value]}
    if place != "word":
        parameters["B"] = ["b"]
    with pytest.raises(UserError, match="cannot be in a job script"):
        render(title, script, options, parameters)


def test_backslashes_in_the_header_are_refused(script):
    with pytest.raises(UserError, match=r"--output .*: sbatch reads backslashes in its own way"):
        render("t", script, {"output": "a\\b"}, {})


def test_stages_become_jobs_with_what_they_ask_of_slurm(plan):
    jobs = plan(
        """
        [run]
        folder = "runs/my run"
        [tokenizer]
        sources = ["corpus/*.txt"]
        vocab_size = 4000
        [prep]
        sources = ["corpus/*.txt"]
        clean = ["c4", "email"]
        array_tasks = 6
        array_at_once = 2
        mem = "9G"
        partition = "cpu"
        [export]
        [evaluate]
        seeds = 2
        gpus_per_node = 1
        [[evaluate.tasks]]
        name = "a"
        train = "a.csv"
        test = "b.csv"
        """
    )
    assert list(jobs) == ["tokenizer", "prep", "assemble", "export", "evaluate"]
    prep = jobs["prep"]
    assert (prep.options["array"], prep.array_tasks) == ("0-5%2", 6)
    assert (prep.options["mem"], prep.options["partition"]) == ("9G", "cpu")
    assert "mem-per-cpu" not in prep.options  # sbatch takes one of the two
    assert prep.parameters["PREP_WORDS"] == ["--clean", "c4", "--clean", "email"]
    assert prep.parameters["TOKENIZER"] == jobs["tokenizer"].parameters["OUTPUT"]
    assert "array" not in jobs["assemble"].options
    assert jobs["assemble"].parameters["EXECUTOR"] == "processes"
    assert jobs["evaluate"].options["array"] == "0-2"  # held out, and two seeds
    assert jobs["evaluate"].options["gpus-per-node"] == "1"


def test_an_evaluation_is_an_array_task_for_each_task_and_seed(tmp_path):
    text = RECIPE + '[evaluate]\nseeds=2\n[[evaluate.tasks]]\nname="a"\ntrain="x"\ntest="y"\n'
    recipe = load_recipe(write_recipe(tmp_path, text))
    layout = Layout.of(recipe, tmp_path)
    rows = evaluations(recipe, layout)
    shared = ["--results", str(layout.evaluation / "a")]
    assert rows == [
        ["heldout", "--dataset", str(tmp_path / "dataset")],
        ["a-0", "--train", "x", "--test", "y", "--seeds", "2", "--shard", "0/2", *shared],
        ["a-1", "--train", "x", "--test", "y", "--seeds", "2", "--shard", "1/2", *shared],
    ]


def test_published_tasks_are_an_array_task_for_each_model(tmp_path):
    text = """[evaluate]
        dataset = "text"
        seeds = 2
        output = "scores"
        [[evaluate.tasks]]
        name = "both"
        task = "cola,rte"
        data = "glue"
        random_start = true
        bf16 = true
        [[evaluate.tasks]]
        name = "quiet"
        train = "x"
        test = "y"
        random_start = false
        """
    recipe = load_recipe(write_recipe(tmp_path, RECIPE + text))
    _, *rows = evaluations(recipe, Layout.of(recipe, tmp_path))
    words = ["--task", "cola,rte", "--data", "glue", "--random-start", "--bf16", "--seeds", "2"]
    results = ["--results", str(tmp_path / "scores/both")]
    assert rows[:8] == [  # two tasks, two starts, two seeds
        [f"both-{model}", *words, "--shard", f"{model}/8", *results] for model in range(8)
    ]
    assert rows[8][:6] == ["quiet-0", "--train", "x", "--test", "y", "--no-random-start"]
    assert len(rows) == 10


def test_an_evaluation_is_done_when_the_report_of_its_models_is_there(plan, tmp_path):
    jobs = plan(
        """
        [run]
        folder = "runs/mine"
        [evaluate]
        model = "model"
        seeds = 1
        [[evaluate.tasks]]
        name = "a"
        task = "wnli"
        data = "glue"
        """
    )
    made = tmp_path / "runs/mine/evaluation"
    assert set(jobs["evaluate"].results) == {made / "a-0.json", made / "a/results.json"}


@pytest.mark.parametrize(
    ("section", "app", "command"),
    [
        (tables.TokenizerSection, "data_prep", "train-tokenizer"),
        (tables.PrepSection, "data_prep", "build"),
        (tables.ExportSection, "pipeline", "export"),
        (tables.TaskSection, "pipeline", "evaluate"),
    ],
)
def test_words_of_a_stage_are_options_of_its_command(section, app, command):
    cli = get_command(import_module(f"{app}.cli").app)
    with Context(cli) as context:
        found = cli.get_command(context, command)
    known = {word for parameter in found.params for word in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in section.WORDS} <= known
    assert set(section.WORDS) <= set(section.model_fields)


def test_the_recipe_goes_over_site_env_and_that_over_the_environment(plan, tmp_path):
    site = tmp_path / "site.env"
    site.write_text(
        "SBATCH_PARTITION=gpu\nSBATCH_ACCOUNT=ours\nSBATCH_GRES=x\nDEBERTA_SETUP=\n"
        'DEBERTA_SCRATCH="/scratch/$WHO"\n'
    )
    text = RECIPE + '[site]\nfile="site.env"\naccount="theirs"\n[site.environment]\nA="b c"\n'
    outside = {"SBATCH_QOS": "long", "SBATCH_PARTITION": "debug", "WHO": "me"}
    job = plan(text, outside)["pretrain"]
    options = {name: job.options[name] for name in ("partition", "account", "qos")}
    assert options == {"partition": "gpu", "account": "theirs", "qos": "long"}
    assert (job.parameters["A"], job.parameters["DEBERTA_SCRATCH"]) == ("b c", "/scratch/me")
    passed = read_site(SiteSection(file=str(site)), outside | {"PATH": "/bin", "TRAIN_WORDS": "x"})
    names = {name for name in passed.environment if name.startswith(("SBATCH_", "TRAIN_"))}
    assert names == {"SBATCH_GRES"}  # the others would go over the header


def test_a_stage_may_say_where_it_runs(plan):
    text = RECIPE + 'partition="big"\nmem="3G"\nsbatch_options=["--exclusive", "--licenses=a:1"]\n'
    text += '[site]\npartition="gpu"\n'
    options = plan(text)["pretrain"].options
    assert (options["partition"], options["mem"]) == ("big", "3G")
    assert (options["exclusive"], options["licenses"]) == (None, "a:1")
    assert (options["nodes"], options["ntasks-per-node"]) == ("2", "2")
    assert "gpus-per-node" not in options


@pytest.mark.parametrize("name", ["runs/%j", "a\\b"])
def test_a_path_that_slurm_would_change_is_refused(tmp_path, name):
    text = RECIPE.replace('"runs/mine"', f"'{name}'")
    with pytest.raises(UserError, match=r"run\.folder .*: SLURM reads .* in names of logs"):
        Layout.of(load_recipe(write_recipe(tmp_path, text)), tmp_path)


def test_a_site_file_that_never_ends_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(site_file, "_TIMEOUT_SECONDS", 0.2)
    (tmp_path / "slow.env").write_text("sleep 60\n")
    with pytest.raises(UserError, match=r"slow\.env: bash has not read it within 0\.2 s"):
        read_site(SiteSection(file=str(tmp_path / "slow.env")), {"PATH": "/usr/bin:/bin"})


def test_a_site_file_that_bash_cannot_read_is_told(tmp_path):
    with pytest.raises(UserError, match=r"site\.file .*nowhere\.env: no such file"):
        read_site(SiteSection(file=str(tmp_path / "nowhere.env")), {"PATH": "/bin"})
    (tmp_path / "bad.env").write_text("false || (exit 3)\nif\n")
    with pytest.raises(UserError, match=r"bad\.env: bash cannot read it: .*syntax error"):
        read_site(SiteSection(file=str(tmp_path / "bad.env")), {"PATH": "/bin"})


def test_scripts_are_found_in_home_then_here_then_where_they_were_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert scripts_folder({}) == ROOT / "slurm"
    mine = tmp_path / "slurm"
    mine.mkdir()
    (mine / "site.env").touch()
    (mine / "pretrain.sbatch").touch()
    assert scripts_folder({}) == mine
    assert scripts_folder({"DEBERTA_HOME": str(ROOT)}) == ROOT / "slurm"
    with pytest.raises(UserError, match=r"DEBERTA_HOME=/nowhere: /nowhere/slurm has no site\.env"):
        scripts_folder({"DEBERTA_HOME": "/nowhere"})
