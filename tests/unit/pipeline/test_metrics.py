"""Sums, ratios and rows: against counting by hand, and TensorBoard against metrics.jsonl."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import faults
from pipeline.metrics import FIELDS, IntervalSums, StepSums, ratios
from pipeline.metrics_writer import MetricsWriter
from pipeline.modeling.networks import RtdOutput
from pipeline.modeling.vocabulary_head import MlmOutput

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def vector(**sums):
    return torch.tensor([float(sums.get(name, 0)) for name in FIELDS], dtype=torch.float64)


def test_ratios():
    figures = ratios(
        vector(
            mlm_loss_sum=30,
            mlm_correct=3,
            masked_tokens=12,
            rtd_loss_sum=8,
            rtd_correct_replaced=1,
            replaced_tokens=4,
            rtd_correct_original=15,
            original_tokens=20,
            tokens=24,
        ),
        "eval",
    )
    assert figures == {
        "eval/mlm_loss": 2.5,
        "eval/mlm_accuracy": 0.25,
        "eval/rtd_loss": 8 / 24,
        "eval/rtd_accuracy_replaced": 0.25,
        "eval/rtd_accuracy_original": 0.75,
        "eval/replaced_fraction": 4 / 24,
    }


def test_a_ratio_over_nothing_is_left_out():
    assert ratios(vector(), "train") == {}
    assert ratios(vector(tokens=4, rtd_loss_sum=2), "train") == {
        "train/rtd_loss": 0.5,
        "train/replaced_fraction": 0.0,
    }


def test_hits_of_the_discriminator_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, generator=generator)
    logits[0, 0] = 0.0  # undecided means "original"
    is_token = torch.arange(7) < torch.tensor([[7], [4], [1]])
    is_replaced = (torch.rand(3, 7, generator=generator) < 0.5) & is_token
    is_replaced[0, 0] = False
    sums = StepSums(CPU)
    output = RtdOutput(torch.tensor(2.5), logits)
    sums.add_discriminator(output, is_replaced, is_token)
    counted = {**dict.fromkeys(FIELDS, 0), "rtd_loss_sum": 2.5}
    for row in range(3):
        for column in range(7):
            if not is_token[row, column]:
                continue
            kind = "replaced" if is_replaced[row, column] else "original"
            says = "replaced" if logits[row, column] > 0 else "original"
            counted["tokens"] += 1
            counted[f"{kind}_tokens"] += 1
            counted[f"rtd_correct_{kind}"] += says == kind
    assert dict(zip(FIELDS, sums.vector.tolist(), strict=True)) == counted
    assert counted["rtd_correct_replaced"] not in (0, counted["replaced_tokens"])


def test_hits_of_the_generator():
    sums = StepSums(CPU)
    valid = torch.tensor([[True, True], [True, False]])
    sums.add_generator(MlmOutput(torch.tensor(7.5), None, torch.tensor(2.0)), valid)
    named = dict(zip(FIELDS, sums.vector.tolist(), strict=True))
    assert {k: v for k, v in named.items() if v} == {
        "mlm_loss_sum": 7.5,
        "mlm_correct": 2,
        "masked_tokens": 3,
    }


def test_without_padding_every_token_counts():
    sums = StepSums(CPU)
    output = RtdOutput(torch.tensor(1.0), torch.ones(2, 3))
    sums.add_discriminator(output, torch.zeros(2, 3, dtype=torch.bool), None)
    assert sums.vector[FIELDS.index("tokens")] == 6


def test_sums_add_up_in_double_precision():
    """2^24 + 1 is not an fp32 number; a step at paper scale counts four million tokens."""
    sums = StepSums(CPU)
    sums.add(tokens=torch.tensor(2**24), rtd_loss_sum=torch.tensor(0.1))
    sums.add(tokens=torch.tensor(1), rtd_loss_sum=torch.tensor(0.1))
    assert sums.reduce()[FIELDS.index("tokens")] == 2**24 + 1
    expected = 2 * torch.tensor(0.1).double()
    assert sums.vector[FIELDS.index("rtd_loss_sum")] == expected


def test_sums_keep_no_graph():
    weight = torch.ones((), requires_grad=True)
    sums = StepSums(CPU)
    sums.add(mlm_loss_sum=weight * 2)
    assert not sums.vector.requires_grad


def test_an_interval_is_the_sum_of_its_steps_and_starts_anew():
    interval = IntervalSums()
    interval.add(vector(mlm_loss_sum=10, masked_tokens=2))
    interval.add(vector(mlm_loss_sum=1, masked_tokens=9))
    assert interval.take() == {"train/mlm_loss": 1.0, "train/mlm_accuracy": 0.0}
    assert interval.take() == {}


def test_an_interrupted_interval_goes_on_bit_for_bit():
    random.seed(0)
    awkward = [0.1, 1 / 3, 1e-300, 5e-324, 2**53 + 1.0, -0.0, math.inf, random.random(), 1e22]
    first = IntervalSums()
    first.add(torch.tensor(awkward, dtype=torch.float64))
    state = json.loads(json.dumps(first.state()))
    second = IntervalSums()
    second.load_state(state)
    before, after = first.vector.tolist(), second.vector.tolist()
    assert [value.hex() for value in after] == [value.hex() for value in before] == state


def test_an_interval_with_nan_survives_a_commit():
    first, second = IntervalSums(), IntervalSums()
    first.add(vector(mlm_loss_sum=math.nan, masked_tokens=3))
    second.load_state(json.loads(json.dumps(first.state())))
    assert math.isnan(second.take()["train/mlm_loss"])


ROWS = {
    3: {"train/mlm_loss": 1 / 3, "optim/generator_skipped_steps": 0, "train/delta_norm": 1e-30},
    6: {"train/mlm_loss": 0.1 + 0.2, "optim/generator_skipped_steps": 2, "train/delta_norm": 7.0},
}


def read_events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        name: {event.step: event.value for event in accumulator.Scalars(name)}
        for name in accumulator.Tags()["scalars"]
    }


def write(tmp_path, rows, purge_step=1):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", purge_step)
    for step, figures in rows.items():
        writer.write(step, figures)
    return writer


def test_rows_are_json_and_tensorboard_has_the_same_numbers(tmp_path):
    write(tmp_path, ROWS).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": s, **f} for s, f in ROWS.items()]
    events = read_events(tmp_path / "tensorboard")
    assert events == {
        name: {step: torch.tensor(row[name]).float().item() for step, row in ROWS.items()}
        for name in ROWS[3]
    }


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    writer = write(tmp_path, {3: ROWS[3]})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    writer.close()


KILLED = """
import os, sys
from pathlib import Path
from pipeline.metrics_writer import MetricsWriter
folder = Path(sys.argv[1])
writer = MetricsWriter(folder / "metrics.jsonl", folder / "tensorboard", 1)
for step in range(1, 501):
    writer.write(step, {"a": step})
writer.sync()
os.kill(os.getpid(), 9)
"""


def test_synced_rows_survive_a_kill(tmp_path):
    """A commit must not outlive the rows before it, also those that TensorBoard's thread holds."""
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    assert read_events(tmp_path / "tensorboard")["a"].keys() == set(range(1, 501))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 500


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    write(tmp_path, {3: {"a": math.nan, "b": math.inf, "c": 1.0}}).close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {"step": 3, "a": None, "b": None, "c": 1.0}


def test_a_resumed_run_appends_and_tensorboard_forgets_what_comes_again(tmp_path):
    write(tmp_path, {4: {"a": 1.0}, 6: {"a": 2.0}, 8: {"a": 3.0}}).close()
    write(tmp_path, {9: {"a": 5.0}}, purge_step=5).close()  # rows at other steps than before
    assert read_events(tmp_path / "tensorboard") == {"a": {4: 1.0, 9: 5.0}}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ["mlm_loss", "unknown"])
def test_unknown_sums_are_refused(name):
    with pytest.raises(KeyError):
        StepSums(CPU).add(**{name: torch.tensor(1.0)})


def test_a_full_disk_delays_rows(tmp_path, caplog):
    faults.configure("metrics.write:0:2-3:enospc", 0)
    try:
        writer = write(tmp_path, {1: {"a": 1.0}, 2: {"a": 2.0}, 3: {"a": 3.0}})
    finally:
        faults.configure("", 0)
    assert "No space left" in caplog.text
    assert "wait in memory" in caplog.text
    file = tmp_path / "metrics.jsonl"
    assert len(file.read_text().splitlines()) == 1
    writer.sync()
    writer.write(4, {"a": 4.0})
    writer.close()
    assert [json.loads(line)["a"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from pipeline.metrics_writer import MetricsWriter
folder = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = MetricsWriter(folder / "metrics.jsonl", folder / "tensorboard", 1)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
for step in range(1, 101):
    writer.write(step, {"a": step})
try:
    writer.sync()
except OSError as error:
    print("refused", error)
size = (folder / "metrics.jsonl").stat().st_size
print(size, (folder / "metrics.jsonl").read_bytes().endswith(b"}\\n"))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
writer.write(101, {"a": 101})
writer.sync()
writer.close()
"""


def test_a_file_that_may_not_grow(tmp_path):
    """Rows are whole or absent, none is lost, and TensorBoard's dead thread ends nothing."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path],
        cwd=ROOT,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    refused, state = done.stdout.splitlines()
    assert "File too large" in refused
    size, is_whole = state.split()
    assert (int(size) <= 2000, is_whole) == (True, "True")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 102))
    assert 101 in read_events(tmp_path / "tensorboard")["a"]


def test_rows_go_on_behind_a_cut(tmp_path):
    writer = write(tmp_path, {step: {"a": float(step)} for step in (1, 2, 3)})
    writer.close()
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    writer.reopen(purge_step=2)
    writer.write(2, {"a": 20.0})
    writer.close()
    assert [json.loads(line)["a"] for line in file.read_text().splitlines()] == [1, 20]
    assert read_events(tmp_path / "tensorboard")["a"] == {1: 1.0, 2: 20.0}
