"""The matrix in short: every pair of values in some cell, and no cell without an answer.

`make matrix` trains all cells; its table is in `results/`. Here CPU offload runs with torch's AdamW
in the place of DeepSpeed's CPU Adam, which takes a minute to compile.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from tests.matrix import table
from tests.matrix.bounds import BOUNDS
from tests.matrix.cells import AXES, Cell, every_cell
from tests.matrix.low_precision import LowPrecision
from tests.matrix.oracle import load_or_train
from tests.matrix.run import RESULTS
from tests.matrix.spanning import pairs_of, spanning
from tests.matrix.truth import TruthKey, distance
from tests.matrix.worlds import Request, train_cells

RANKS_HERE = (1, 2)
REFUSALS = {
    "offload_optimizer needs stage 1, 2 or 3, not 0",
    "offload_param needs stage 3, not 0",
    "offload_param needs stage 3, not 1",
    "offload_param needs stage 3, not 2",
    "bf16 at ZeRO stage 0: DeepSpeed 0.19.8 counts Adam's steps wrong there",
    "fp16 at ZeRO stage 0: DeepSpeed 0.19.8 counts Adam's steps wrong there",
    "fp16 needs a GPU; on a CPU use ds_configs/cpu_debug.json, or bf16",
}
# Found by the full matrix, on two ranks: under `round_robin_gradients` names and values parted;
# under autocast ZeRO-3 rounded biases in a process's first step and not behind it.
FOUND_WRONG = [
    Cell(2, "fp32", 1, "none", "optimizer", 2, "decoupled"),
    Cell(3, "autocast", 1, "none", "none", 2, "decoupled"),
]
LEGAL = [cell for cell in every_cell() if cell.trains() and cell.ranks in RANKS_HERE]
SPAN = list(dict.fromkeys(FOUND_WRONG + spanning(LEGAL)))


def test_every_cell_trains_or_is_refused_by_name():
    cells = every_cell()
    assert len(set(cells)) == math.prod(len(values) for values in AXES.values()) == 1152
    reasons = [cell.refusal() for cell in cells]
    met = {name for name in REFUSALS for reason in reasons if reason and name in reason}
    assert met == REFUSALS
    for cell, reason in zip(cells, reasons, strict=True):
        if reason is None:
            assert cell.trains()
            assert cell.offload == "none" or cell.stage > 0
        else:
            assert any(name in reason for name in REFUSALS), reason
            assert cell.is_patched() == (cell.trains() and cell.precision == "fp16")
    assert sum(cell.trains() for cell in cells) == 720
    assert sum(reason is None for reason in reasons) == 552


def test_the_short_matrix_has_every_pair_that_a_cell_can_have():
    assert pairs_of(SPAN) == pairs_of(LEGAL)
    assert len(SPAN) < 40
    seen = pairs_of(SPAN)
    for stage, precision in product((1, 2, 3), ("fp32", "bf16", "autocast", "fp16")):
        assert (("stage", stage), ("precision", precision)) in seen


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """A folder of reference runs."""
    return tmp_path_factory.mktemp("references")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Cell -> its line, from a world of one rank and one of two, side by side."""
    found, folder = {}, tmp_path_factory.mktemp("matrix")

    def listener(cell, line):
        found[cell] = table.judged(cell, line)

    request = Request(folder, listener, cpu_adam_stands_in=True)
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(
                train_cells, [c for c in SPAN if c.ranks == ranks], ranks, request, str(ranks)
            )
            for ranks in RANKS_HERE
        ]
    for one in started:
        one.result()
    return found


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", SPAN, ids=str)
def test_a_cell_trains_as_its_reference(lines, cell):
    line = lines[cell]
    assert "failure" not in line, line["failure"]
    skips = 2 if cell.precision == "fp16" else 0
    assert line["measured"]["skipped_steps"] == skips
    if cell.precision == "fp32":
        assert line["measured"]["flipped_draws"] == 0


LOW = [("bf16", "decoupled"), ("autocast", "joint"), ("fp16", "joint")]


@pytest.mark.parametrize(("precision", "update"), LOW)
def test_bounds_let_other_roundings_pass(references, precision, update):
    one, two = (load_or_train(TruthKey(precision, update, n), references) for n in (1, 2))
    assert BOUNDS[precision].exceeded(distance(two, one, update).to_json()) == []


class Mistaken(LowPrecision):
    """A reference run with a mistake that an engine could make."""

    def __init__(self, mistake, *arguments):
        super().__init__(*arguments)
        self.mistake = mistake
        for adam in self.adam.values():
            if mistake == "Adam's counter is one ahead":
                adam.steps = 1
            if mistake == "nothing is clipped":
                adam.clipping = 0.0
            if mistake == "everything decays":
                adam.weight_decay = 0.5

    def differentiate(self, engine, loss):
        if self.mistake == "twice the gradient":
            loss = loss * 2
        super().differentiate(engine, loss)

    def update(self, engine, number):
        if self.mistake == "a step is lost" and number == 12:
            return super().update(engine, 0)  # where the rate is 0
        return super().update(engine, number)


@pytest.mark.parametrize(("precision", "update"), LOW)
@pytest.mark.parametrize(
    "mistake",
    [
        "Adam's counter is one ahead",
        "nothing is clipped",
        "everything decays",
        "twice the gradient",
        "a step is lost",
    ],
)
def test_bounds_see_mistakes(references, precision, update, mistake):
    key = TruthKey(precision, update, 1)
    truth = load_or_train(key, references)
    mistaken = Mistaken(mistake, key, truth.drawn).train()
    assert BOUNDS[precision].exceeded(distance(mistaken, truth, update).to_json())


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.1), ("autocast", 0.02)])
@pytest.mark.parametrize("update", ["decoupled", "joint"])
def test_low_precision_references_follow_the_exact_one(references, precision, limit, update):
    low = load_or_train(TruthKey(precision, update, 1), references)
    exact = load_or_train(TruthKey("fp32", update, 1), references)
    apart = distance(low, exact, update)
    assert apart.loss < limit
    assert apart.first_loss < 4 * 2.0**-9


def test_the_committed_table_has_an_answer_in_every_cell():
    found = json.loads(RESULTS.read_text())
    answers = {Cell(**table.axes(row)): row for row in found["cells"]}
    assert set(answers) == set(every_cell())
    assert table.failures(found) == []
    for cell, row in answers.items():
        assert ("measured" in row) == cell.trains(), cell
        assert row.get("refused") == cell.refusal(), cell
        if "measured" in row:
            assert BOUNDS[cell.precision].exceeded(row["measured"]) == [], cell
    assert RESULTS.with_suffix(".md").read_text() == table.markdown(found)
    assert "not run" not in table.markdown(found)
