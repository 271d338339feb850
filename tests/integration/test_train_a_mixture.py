"""Two sources in other shares than their sizes: from the command line to the rows of metrics."""

import json
from collections import Counter

import pytest

from data_prep.build import build
from data_prep.build_plan import BuildOptions
from data_prep.documents import embedded_corpus
from pipeline.config_loading import load_run_config
from pipeline.data import train_batches
from pipeline.ds_config import BatchPlan
from pipeline.run_data import open_run_data
from pipeline.train import run
from tests.benchmarks.salted_text import InProcess
from tests.forked_worlds import train
from tests.worlds import ROOT

CPU_DEBUG = str(ROOT / "ds_configs" / "cpu_debug.json")


@pytest.fixture(scope="module")
def two_sources(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    speeches = [path.read_text() for path in sorted(embedded_corpus().glob("*.txt"))[:6]]
    lines = [line for text in speeches for line in text.splitlines() if line.strip()]
    for name, part in (("big", lines[60:]), ("small", lines[:60])):
        rows = (json.dumps({"text": line}) + "\n" for line in part)
        (folder / f"{name}.jsonl").write_text("".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = BuildOptions(heldout_fraction=0.3)
        build(
            ["big.jsonl", "small.jsonl"], tokenizer_folder, folder / "dataset", options, InProcess()
        )
    return folder / "dataset"


def words(dataset, vocab_size, folder):
    return [
        f"data.path={dataset}",
        f"model.vocab_size={vocab_size}",
        f"run.folder={folder}",
        'data.source_weights={"small.jsonl"=4.0}',
        "data.sampling_exponent=0.5",
        "data.sequence_length=32",
        "schedule.max_steps=4",
        "schedule.warmup_steps=0",
        "evaluation.interval_steps=2",
        "evaluation.max_sequences=16",
        "logging.interval_steps=2",
    ]


def test_a_mixture_is_trained_and_told(two_sources, vocab_size, tmp_path, capsys):
    given = words(two_sources, vocab_size, tmp_path / "run")
    start = ["--config", "demo", "--deepspeed_config", CPU_DEBUG]
    assert run([*start, *given, "--dry-run"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "mixture:" in line]
    assert "small.jsonl 0." in line
    assert "big.jsonl 0." in line
    code, printed = train("demo", CPU_DEBUG, two_sources, tmp_path / "run", *given[1:2], *given[3:])
    assert code == 0, printed
    rows = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = {name: value for row in rows for name, value in row.items() if row["step"] == 4}
    config = load_run_config("demo", given)
    data = open_run_data(config)
    batches = train_batches(config, BatchPlan(1, 4, 8, 32), data.train, rank=0)
    order = batches.orders[32]
    taken = batches.schedule.samples_before(4, 32)
    assert last["train/epochs/small.jsonl"] == order.passes_before(taken)["small.jsonl"]
    assert last["train/epochs/small.jsonl"] > 2 * last["train/epochs/big.jsonl"]
    # The figure over both sources is the mean of theirs, weighted by their masked tokens.
    both = sorted(last[f"eval/mlm_loss/{name}.jsonl"] for name in ("big", "small"))
    assert both[0] <= last["eval/mlm_loss"] <= both[1]
    assert both[0] < both[1]


def test_any_number_of_ranks_takes_the_same_samples(two_sources, vocab_size, tmp_path):
    given = words(two_sources, vocab_size, tmp_path / "run")
    config = load_run_config("demo", given)
    data = open_run_data(config)
    taken = []
    for world_size, micro in ((1, 8), (2, 4), (4, 2)):
        plan = BatchPlan(world_size, micro, 32 // micro // world_size, 32)
        found: Counter[tuple[int, int]] = Counter()
        for rank in range(world_size):
            batches = train_batches(config, plan, data.train, rank)
            for step in range(3):
                found.update(
                    zip(*(a.tolist() for a in batches.samples_at(step, rank)), strict=True)
                )
        taken.append(found)
    assert taken[0] == taken[1] == taken[2]
    assert set(taken[0].values()) == {1}
