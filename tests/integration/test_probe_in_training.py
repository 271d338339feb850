"""Minimal pairs during pre-training: the figures of the row are those of the commit."""

import json
from pathlib import Path

import pytest
import torch

from data_prep.tokenizer import Tokenizer
from pipeline.config_loading import load_run_config
from pipeline.dry_run import describe_run
from pipeline.ds_config import load_deepspeed_config
from pipeline.evaluate.load import load_pretrained
from pipeline.evaluate.minimal_pairs import evaluate_minimal_pairs, read_minimal_pairs
from pipeline.rtd import DrawKey
from pipeline.run_services import probe_pairs
from pipeline.runtime import World
from tests.forked_worlds import train
from tests.worlds import rows

pytestmark = pytest.mark.distributed

FRACTION = 0.2  # the run is tiny: its default would allow no pair


@pytest.fixture
def pairs_file(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    words = ("nation", "people", "year", "world", "law", "war", "peace")
    records = [
        {"sentence_good": f"the {a} of the {b}", "sentence_bad": f"of the {a} {b} the", "UID": a}
        for a in words
        for b in words
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_training_probes_with_what_its_budget_allows(
    tiny_run, deepspeed_json, dataset_folder, pairs_file, tmp_path
):
    config, ds = tiny_run(dropout=0.0), deepspeed_json(3, 2)
    words = (
        f"evaluation.minimal_pairs={pairs_file}",
        f"evaluation.minimal_pairs_compute_fraction={FRACTION}",
        "schedule.max_steps=6",
    )
    run = tmp_path / "run"
    code, output = train(config, ds, dataset_folder, run, *words, ranks=2)
    assert code == 0, output
    written = [row for row in rows(run) if "eval/minimal_pairs_generator" in row]
    assert written
    pretrained = load_pretrained(run)
    assert written[-1]["step"] == pretrained.step == 6
    tokenizer = Tokenizer.load(dataset_folder / "tokenizer")
    every = read_minimal_pairs(pairs_file, tokenizer, pretrained.config.data.sequence_length)
    plan = load_deepspeed_config(str(ds)).batch_plan(2)
    chosen = probe_pairs(pretrained.config, plan, every)
    spent = sum(pair.forward_tokens for pair in chosen)
    steps = min(6, pretrained.config.evaluation.interval_steps or 6)
    trained = 3 * steps * plan.train_batch_size * pretrained.config.data.sequence_length
    assert 0 < len(chosen) < len(every.pairs)
    assert spent <= FRACTION * trained < spent + max(p.forward_tokens for p in every.pairs)
    again = evaluate_minimal_pairs(
        pretrained.pair.eval().predict,
        chosen,
        mask_id=tokenizer.mask_id,
        draw=lambda batch: DrawKey((1, 2), batch.sample_words_B2),
        max_forward_tokens=500,
        world=World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")),
    )
    assert {name: written[-1][name] for name in again} == again
    told = describe_run(
        load_run_config(str(config), [f"data.path={dataset_folder}", *words]),
        load_deepspeed_config(str(ds)),
        2,
    )
    line = f"minimal pairs: {len(chosen)} of 49 for {FRACTION:.2%} of the training's operations; 0 "
    assert any(each.startswith(line) for each in told)
