"""A trained model goes on as it was, and a start that lost its Delta does not pass unnoticed."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from pipeline.config_loading import load_run_config
from pipeline.evaluate.heldout import evaluate_heldout
from pipeline.guard import losses_above_start
from pipeline.hf_layout import repository_config, repository_tensors
from pipeline.initialize.pair import initialize_pair
from pipeline.mixture_sources import heldout_samples
from pipeline.run_data import open_run_data
from pipeline.runtime import World
from tests.forked_worlds import train
from tests.reference.released_repositories import TABLE, save
from tests.worlds import rows

pytestmark = pytest.mark.timeout(600)

WORDS = (
    # Hot draws: a discriminator this small learns to tell them within seconds.
    "objective.sampling_temperature=2.0",
    "evaluation.max_sequences=128",
    "evaluation.interval_steps=0",
)
STEPS = 100


def rates(value):
    return tuple(
        f"optimizer.{name}_learning_rate={value}" for name in ("generator", "discriminator")
    )


@pytest.fixture
def trained(tiny_run, deepspeed_json, dataset_folder, tmp_path):
    """toml, deepspeed, folder and dataset of a run that has learned something."""
    toml, deepspeed = tiny_run(), deepspeed_json(1, 16, train_batch_size=16)
    folder = tmp_path / "trained"
    words = (*WORDS, *rates(1e-2), f"schedule.max_steps={STEPS}", "checkpoint.interval_steps=1000")
    code, output = train(toml, deepspeed, dataset_folder, folder, *words)
    assert code == 0, output
    return SimpleNamespace(toml=toml, deepspeed=deepspeed, folder=folder, dataset=dataset_folder)


def heldout_rows(folder):
    return [
        {key: value for key, value in row.items() if key == "step" or key.startswith("eval/")}
        for row in rows(folder)
        if "eval/mlm_loss" in row
    ]


def config_of(trained, path):
    config = load_run_config(str(trained.folder / "config.resolved.json"))
    initialize = config.initialize.model_copy(update={"path": str(path)})
    return config.model_copy(update={"initialize": initialize})


def publish(trained, folder, *, merged):
    """Write a released-layout repository of the trained networks; `merged=False` forgets Delta."""
    config = config_of(trained, trained.folder)
    pair = initialize_pair(config, open_run_data(config).tokenizer).pair
    tensors = repository_tensors(pair, config, "fp32")
    if not merged:
        tensors["discriminator"][TABLE] = tensors["generator"][TABLE]
    files = {"discriminator": "pytorch_model.bin", "generator": "generator.bin"}
    for name, network in config.networks.items():
        save(tensors[name], folder / files[name])
        values = repository_config(network, config.model.vocab_size, "DebertaV2Model", "fp32")
        place = "config.json" if name == "discriminator" else "generator_config.json"
        (folder / place).write_text(json.dumps(values))
    return folder


def figures_of(trained, path):
    """Held-out figures of the networks that `initialize.path` gives, before any step."""
    config = config_of(trained, path)
    data = open_run_data(config)
    pair = initialize_pair(config, data.tokenizer).pair.eval()

    def predict(batch, slots, draw):
        return pair(batch.input_ids_BL, batch.attention_mask(), slots, draw)

    return evaluate_heldout(
        predict,
        stream=data.heldout,
        keys=data.heldout_keys,
        chosen=heldout_samples(data.heldout, config.data, config.evaluation.max_sequences),
        batch_size=16,
        world=World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")),
    )


def test_a_trained_model_goes_on(trained, tmp_path):
    without_delta_it_is_worse_and_the_guard_says_so(trained, tmp_path)
    a_continued_run_is_measured_first_and_watched(trained, tmp_path)


def without_delta_it_is_worse_and_the_guard_says_so(trained, tmp_path):
    last = heldout_rows(trained.folder)[-1]
    right = figures_of(trained, publish(trained, tmp_path / "right", merged=True))
    wrong = figures_of(trained, publish(trained, tmp_path / "wrong", merged=False))
    for name, value in right.items():
        assert value == pytest.approx(last[name], abs=1e-4), name
    assert wrong["eval/mlm_loss"] == right["eval/mlm_loss"], "the generator has no Delta"
    assert wrong["eval/rtd_loss"] > 1.1 * right["eval/rtd_loss"]
    assert losses_above_start(right, right, 0.05) == []
    (line,) = losses_above_start(right, wrong, 0.05)
    assert line.startswith("eval/rtd_loss is ")


def a_continued_run_is_measured_first_and_watched(trained, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "run"
    shutil.copytree(trained.folder, source)
    words = (
        *WORDS,
        f"initialize.path={source}",
        "schedule.max_steps=6",
        "schedule.warmup_steps=0",
        *rates(0.3),  # harm, on purpose
    )
    arguments = (trained.toml, trained.deepspeed, trained.dataset, folder, *words)
    code, output = train(*arguments)
    assert code == 0, output
    assert "note: deberta.embeddings.word_embeddings.weight: Delta := E_D - E_G" in output
    before, after = heldout_rows(folder)
    expected = heldout_rows(trained.folder)[-1]
    assert (before["step"], after["step"]) == (0, 6)
    for name in expected.keys() - {"step"}:
        assert before[name] == pytest.approx(expected[name], abs=1e-6), name
    for name in ("eval/mlm_loss", "eval/rtd_loss"):
        assert after[name] > 1.05 * before[name], "the test must do harm"
        assert f"step 6: {name} is {after[name]:.4f}, above the starting point's" in output
    state = json.loads((folder / "checkpoints/step-00000006/train_state.json").read_text())
    start = state["state"]["starting_figures"]
    assert start == {name: value for name, value in before.items() if name != "step"}

    shutil.rmtree(source)
    code, output = train(*arguments)
    assert code == 0, output
    assert "nothing left to do" in output, "a run of its own no longer needs its source"


def test_a_model_that_is_not_there_is_told_once(tiny_run, deepspeed_json, dataset_folder, tmp_path):
    nowhere = f"initialize.path={tmp_path / 'nowhere'}"
    code, output = train(
        tiny_run(), deepspeed_json(1, 4), dataset_folder, tmp_path / "run", nowhere, ranks=2
    )
    assert code != 0
    assert output.count("nowhere is not there") == 1
