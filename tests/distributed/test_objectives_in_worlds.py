"""One engine for both networks, and one network alone, in worlds of one and two ranks.

`test_worlds_agree.py` does this for the published objective at every ZeRO stage.
"""

import json
import shutil

import pytest

from tests.forked_worlds import train
from tests.worlds import largest_difference, rows

pytestmark = pytest.mark.distributed

SUMMATION_TOLERANCE = 1e-5
PHASES = (
    "schedule.phases=[{until_step=3, sequence_length=24, train_batch_size=4},"
    " {until_step=5, train_batch_size=4}]"
)
JOINT = ("objective.update=joint", "optimizer.discriminator_learning_rate=5e-4")


def without_discriminator(config):
    """The tiny run as a masked language model."""
    text = config.read_text()
    start = text.index("[discriminator]")
    end = text.index("\n[", start)
    path = config.with_name("mlm.toml")
    text = (text[:start] + text[end:]).replace("discriminator_learning_rate = 1e-3\n", "")
    path.write_text(text.replace("[optimizer]", '[objective]\ntask = "mlm"\n[optimizer]'))
    return path


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("es", (*JOINT, "objective.embedding_sharing=es")),
        ("mlm", ("objective.mask_token_prob=0.8", "objective.random_token_prob=0.1", PHASES)),
    ],
)
def test_two_ranks_repeat_one(tiny_run, deepspeed_json, dataset_folder, tmp_path, objective, words):
    config = tiny_run(dropout=0.0)
    if objective == "mlm":
        config = without_discriminator(config)
    alone, both = tmp_path / "alone", tmp_path / "both"
    code, output = train(config, deepspeed_json(1, 4), dataset_folder, alone, *words)
    assert code == 0, output
    arguments = (config, deepspeed_json(3, 2), dataset_folder, both, *words)
    code, output = train(*arguments, ranks=2)
    assert code == 0, output
    assert largest_difference(rows(alone), rows(both)) < SUMMATION_TOLERANCE
    names = set(rows(alone)[-1])
    assert ("eval/rtd_auc" in names) is (objective != "mlm")
    engine = "joint" if "joint" in str(words) else "generator"
    commit = both / "checkpoints" / "step-00000012"
    assert (commit / engine).is_dir()
    state = json.loads((commit / "train_state.json").read_text())
    tokens = 3 * 4 * 24 + 2 * 4 * 32 + 7 * 8 * 32 if PHASES in words else 12 * 8 * 32
    assert state["tokens"] == tokens
    # From an earlier commit, in the other world, to the same end.
    shutil.rmtree(commit)
    code, output = train(*(config, deepspeed_json(1, 4), dataset_folder, both), *words)
    assert code == 0, output
    assert "continues" in output
    assert largest_difference(rows(alone), rows(both)) < SUMMATION_TOLERANCE
