"""`recipe = "released_code"`: what it lays over a file, and what it refuses."""

import json

import pytest

from data_prep.errors import UserError
from pipeline.config_loading import load_run_config, resolved_config_dict
from pipeline.ds_config import load_deepspeed_config
from tests.unit.pipeline.test_config_loading import MINIMAL
from tests.worlds import ROOT

CPU_DEBUG = ROOT / "ds_configs" / "cpu_debug.json"
WITH_BOTH = f"""{MINIMAL}
[released_code.objective]
rtd_loss_weight = 10.0
[released_code.optimizer]
generator_learning_rate = 5e-4
betas = [0.9, 0.999]
"""


@pytest.fixture
def both(tmp_path):
    path = tmp_path / "both.toml"
    path.write_text(WITH_BOTH)
    return path


def findings_of(path, *words):
    with pytest.raises(UserError) as caught:
        load_run_config(str(path), words)
    first, *rest = str(caught.value).split("\n  - ")
    return rest or [first.removeprefix("the run configuration: ")]


def values(config):
    optimizer = config.optimizer
    return config.objective.rtd_loss_weight, optimizer.generator_learning_rate, optimizer.betas


PAPER = (50.0, 1e-3, (0.9, 0.98))
RELEASED = (10.0, 5e-4, (0.9, 0.999))


def test_the_paper_is_the_default(both):
    config = load_run_config(str(both))
    assert (config.recipe, values(config)) == ("paper", PAPER)
    assert load_run_config(str(both), ["recipe=paper"]) == config


@pytest.mark.parametrize("word", ["recipe=released_code", 'recipe="released_code"'])
def test_a_word_takes_the_released_values(both, word):
    config = load_run_config(str(both), [word])
    assert (config.recipe, values(config)) == ("released_code", RELEASED)
    assert config.schedule.max_steps == 100, "what the table does not name stays"


def test_the_file_s_first_key_takes_them_and_a_word_overrules_it(both):
    both.write_text('recipe = "released_code"\n' + WITH_BOTH)
    assert values(load_run_config(str(both))) == RELEASED
    assert values(load_run_config(str(both), ["recipe=paper"])) == PAPER


@pytest.mark.parametrize("first", [0, 1])
def test_words_go_above_the_table_wherever_they_stand(both, first):
    words = ["recipe=released_code", "objective.rtd_loss_weight=20.0"]
    config = load_run_config(str(both), words[first:] + words[:first])
    assert values(config) == (20.0, *RELEASED[1:])


@pytest.mark.parametrize("source", ["demo", "file"])
def test_a_file_without_the_table_refuses_the_recipe(both, source):
    if source == "file":
        both.write_text(WITH_BOTH[: WITH_BOTH.index("[released_code")])
    path = "demo" if source == "demo" else both
    name = "demo.toml" if source == "demo" else both
    assert findings_of(path, "recipe=released_code") == [
        "command line: recipe=released_code needs tables [released_code.SECTION], which"
        f" {name} has not; leave it out"
    ]
    assert load_run_config(str(path), ["recipe=paper"]).recipe == "paper"


def test_a_file_that_asks_for_a_table_it_lacks(both):
    text = WITH_BOTH[: WITH_BOTH.index("[released_code")]
    both.write_text('recipe = "released_code"\n' + text)
    (finding,) = findings_of(both)
    assert finding.startswith(f"{both}: recipe=released_code needs tables")


@pytest.mark.parametrize("words", [[], ["recipe=released_code"]])
@pytest.mark.parametrize(
    ("wrong", "finding"),
    [
        ("betas", "unknown key 'optimizer.betos', did you mean 'betas'?"),
        ("optimizer", "unknown section 'optimiser', did you mean 'optimizer'?"),
        ("deepspeed", "bf16.enabled belongs in the DeepSpeed JSON (--deepspeed_config)"),
        ("empty", "unknown key 'optimisers', did you mean 'optimizer'?"),
    ],
)
def test_a_wrong_name_in_the_table_is_found_even_unused(both, words, wrong, finding):
    text = {
        "betas": WITH_BOTH.replace("betas", "betos"),
        "optimizer": WITH_BOTH.replace("[released_code.optimizer]", "[released_code.optimiser]")
        .replace("generator_learning_rate = 5e-4\n", "")
        .replace("betas", "max_stepz"),
        "deepspeed": WITH_BOTH + "[released_code.bf16]\nenabled = true\n",
        "empty": WITH_BOTH + "[released_code.optimisers]\n",
    }[wrong]
    both.write_text(text)
    assert findings_of(both, *words) == [f"{both}, [released_code]: {finding}"]


@pytest.mark.parametrize("name", ["released_code", "released_code.optimizer"])
def test_a_table_that_is_none(both, name):
    both.write_text(f"{name} = 3\n" + WITH_BOTH[: WITH_BOTH.index("[released_code")])
    assert findings_of(both) == [f"{both}: {name} is 3; it must be a block of keys"]


def test_a_wrong_value_in_the_table_names_it_when_used(both):
    both.write_text(WITH_BOTH.replace("10.0", '"ten"').replace("0.999]", "1.999]"))
    assert values(load_run_config(str(both))) == PAPER
    assert findings_of(both, "recipe=released_code") == [
        f'{both}, [released_code]: objective.rtd_loss_weight is "ten"; it must be a number',
        f"{both}, [released_code]: optimizer.betas[1] is 1.999; it must be less than 1.0",
    ]


def test_contradictions_name_the_table_too(both):
    both.write_text(WITH_BOTH + "[released_code.schedule]\nwarmup_steps = 101\n")
    (finding,) = findings_of(both, "recipe=released_code")
    assert finding.startswith(
        f"{both}, [released_code]: schedule.warmup_steps 101 is more than schedule.max_steps 100"
    )


def resolve(config, folder):
    deepspeed = load_deepspeed_config(CPU_DEBUG)
    path = folder / "config.resolved.json"
    document = resolved_config_dict(config, deepspeed, deepspeed.batch_plan(1))
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("preset", ["deberta_v3_xsmall", "electra_small", "bert_base"])
@pytest.mark.parametrize("recipe", ["paper", "released_code"])
def test_the_resolved_file_repeats_the_recipe_s_values(tmp_path, preset, recipe):
    """Once applied, the table is not applied again: a word that overruled it stays."""
    words = [f"recipe={recipe}", "optimizer.weight_decay=0.5", "objective.mask_token_prob=0.5"]
    config = load_run_config(preset, words)
    path = resolve(config, tmp_path)
    again = load_run_config(str(path))
    assert again == config
    assert again.recipe == recipe
    assert "released_code" not in json.loads(path.read_text())["run_config"]
    assert load_run_config(str(path), [f"recipe={recipe}"]) == config


def test_the_recipe_of_a_resolved_run_is_settled(tmp_path):
    path = resolve(load_run_config("deberta_v3_xsmall"), tmp_path)
    assert findings_of(path, "recipe=released_code") == [
        f"command line: recipe=released_code comes too late: {path} holds the values of"
        " recipe=paper; start from the preset"
    ]
