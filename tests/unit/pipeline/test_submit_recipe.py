"""Recipes: what is accepted, and one message for all that is not."""

import pytest

from data_prep.errors import UserError
from pipeline.submit.recipe import load_recipe
from tests.submitting import RECIPE, write_recipe
from tests.worlds import ROOT


def refusal(tmp_path, text):
    path = write_recipe(tmp_path, text)
    with pytest.raises(UserError) as raised:
        load_recipe(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    return message


def test_a_recipe_has_the_stages_that_it_names(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path))
    assert recipe.stages == ("pretrain",)
    assert recipe.name == "mine"
    assert recipe.pretrain is not None
    assert recipe.pretrain.launcher == "srun"


@pytest.mark.parametrize("path", sorted((ROOT / "slurm/recipes").glob("*.toml")), ids=str)
def test_the_examples_are_recipes_of_the_whole_chain(path):
    assert load_recipe(path).stages == ("tokenizer", "prep", "pretrain", "export", "evaluate")


def test_all_problems_are_told_at_once_with_the_nearest_name(tmp_path):
    message = refusal(
        tmp_path,
        """
        [run]
        folder = "runs/mine"
        [pretran]
        [pretrain]
        config = 3
        deepspeed_config = "ds.json"
        node = 2
        gpus_per_node = 2.5
        time = "soon"
        [[evaluate.tasks]]
        name = "a/b"
        train = "train.jsonl"
        tests = "test.jsonl"
        """,
    )
    assert set(message.splitlines()[1:]) == {
        "  - 'pretran' is no table, did you mean 'pretrain'?",
        "  - pretrain.gpus_per_node is 2.5; it must be a whole number",
        '  - pretrain.time is "soon"; write minutes, HOURS:MINUTES:SECONDS or '
        "DAYS-HOURS:MINUTES:SECONDS",
        "  - pretrain.config is 3; it must be text",
        "  - 'node' is no key in [pretrain], did you mean 'nodes'?",
        '  - evaluate.tasks[0].name is "a/b"; use letters, digits and . _ - alone',
        "  - 'tests' is no key in [evaluate.tasks[0]], did you mean 'test'?",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('folder = "runs/a\\nb"', "line breaks are not allowed"),
        ('folder = ""', "give a text, or leave the key out"),
        ('folder = "r"\nname = "a b"', "use letters, digits and . _ - alone"),
    ],
)
def test_a_folder_that_a_script_cannot_hold_is_refused(tmp_path, change, message):
    assert message in refusal(tmp_path, RECIPE.replace('folder = "runs/mine"', change))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('sbatch_options = ["--dependency=afterok:1"]', "--dependency is set by `deberta submit`"),
        ('sbatch_options = ["exclusive"]', "write --option or --option=value"),
        ('sbatch_options = ["--comment=x\\n#SBATCH --wrap=y"]', "write --option"),
        ('mem = "lots"', "write a number with K, M, G or T"),
        ('overrides = ["data.path=elsewhere"]', "has a key of its own, pretrain.dataset"),
        ('overrides = ["run.folder=elsewhere"]', "has a key of its own, run.folder"),
        ('[site.environment]\n"A B" = "c"', "it is no name of an environment variable"),
        ('[prep]\nsources = ["a"]', "prep.tokenizer is missing"),
        ('[prep]\ntokenizer = "t"', "give one of prep.sources and prep.recipe"),
        ('[prep]\nsources=["a"]\ntokenizer="t"\nexecutor="mpi"', "prep.ntasks is missing"),
        ('[prep]\nsources=["a"]\ntokenizer="t"\nntasks=4', "belongs to executor 'mpi'"),
        (
            '[[evaluate.tasks]]\nname="heldout"\ntrain="a"\ntest="b"',
            "the name 'heldout' is taken",
        ),
        (
            '[[evaluate.tasks]]\nname="a"\ntrain="x"',
            "evaluate.tasks a: test missing: give train and",
        ),
        (
            '[[evaluate.tasks]]\nname="a"',
            "train and test missing: give train and test, files of your",
        ),
        ('[[evaluate.tasks]]\nname="a"\ntask="cola"', "a: task and data go together"),
        ('[[evaluate.tasks]]\nname="a"\ndata="d"\ntask="cula"', "no such task; did you mean cola?"),
        (
            '[[evaluate.tasks]]\nname="a"\ndata="d"\ntask="cola"\nkind="span"',
            "evaluate.tasks a: kind belong to files of your own",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, lines, message):
    assert message in refusal(tmp_path, RECIPE + lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nfolder='r'", "no stage is named; add one of [tokenizer], [prep]"),
        ("[run]\nfolder='r'\n[evaluate]", "evaluate has nothing to do"),
        ("[export]", "run is missing"),
        (
            "[run]\nfolder='r'\n[pretrain]\nconfig='demo'\ndeepspeed_config='d'",
            "pretrain.dataset is missing",
        ),
        (
            "[run]\nfolder='r'\n[pretrain]\nconfig='demo'\ndeepspeed_config='d'",
            "pretrain.gpus_per_node is missing",
        ),
        ("[run\n", "not TOML"),
    ],
)
def test_an_incomplete_recipe_says_what_is_missing(tmp_path, text, message):
    assert message in refusal(tmp_path, text)
