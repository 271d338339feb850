"""How benchmarks measure and report: turns, ratios within a round, and tables made from files."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import rounds, run
from tests.benchmarks.rounds import Case, Outcome, measure, slug

RESULTS = Path(run.__file__).parent / "results"


class Bench:
    """A clock that only work moves; each case takes a time that grows with the round."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def case(self, name, *durations, **options):
        left = iter(durations)

        def work():
            self.log.append(name)
            self.now += next(left)

        def prepare():
            self.now += 100.0

        return Case(name, work, prepare, **options)


def outcome(seconds, pairs):
    return Outcome("name", "tokens", 12.0, "seconds", seconds, pairs, {})


def test_cases_take_turns_and_neither_warm_up_nor_preparation_counts():
    bench = Bench()
    cases = [bench.case("a", 9.0, 1.0, 2.0), bench.case("b", 9.0, 3.0, 4.0)]
    seconds, notes = measure(cases, 2, lambda: bench.now)
    assert bench.log == ["a", "b", "a", "b", "b", "a"]
    assert seconds == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert notes == []


def test_ratios_are_taken_within_rounds():
    found = outcome({"ours": [1.0, 4.0, 2.0], "peer": [2.0, 8.0, 8.0]}, [("ours", "peer")])
    (row,) = found.ratios()
    assert (row["case"], row["peer"]) == ("ours", "peer")
    assert (row["median"], row["low"], row["high"]) == (2.0, 2.0, 4.0)
    assert found.rate("ours") == 6.0


def test_an_optional_case_that_fails_is_named_and_left_out():
    def broken():
        raise RuntimeError("no compiler")

    bench = Bench()
    cases = [bench.case("ours", 1.0, 1.0), Case("compiled", broken, optional=True)]
    seconds, notes = measure(cases, 1, lambda: bench.now)
    assert list(seconds) == ["ours"]
    assert notes == ["compiled does not run: RuntimeError: no compiler"]
    assert outcome(seconds, [("ours", "compiled")]).ratios() == []
    with pytest.raises(RuntimeError):
        measure([Case("compiled", broken)], 1, lambda: bench.now)


def test_cpu_seconds_count_work_and_not_waiting():
    start = rounds.cpu_seconds()
    sum(range(3_000_000))
    assert rounds.cpu_seconds() > start


def test_device_names_become_file_names():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("AMD EPYC (TM) 7B13") == "amd-epyc-tm-7b13"


def test_both_halves_agree_on_the_exit_code_of_a_skipped_benchmark():
    assert run.EXIT_SKIPPED == rounds.EXIT_SKIPPED


@pytest.mark.parametrize(
    ("value", "text"),
    [(7_170_000.4, "7,170,000"), (562.3, "562"), (9.2449, "9.24"), (0.2134, "0.213")],
)
def test_figures_have_three_digits_and_no_exponent(value, text):
    assert run.figure(value) == text


def test_the_table_of_results_is_made_from_the_files(tmp_path):
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    run.write_readme(tmp_path)
    assert (tmp_path / "README.md").read_text() == (RESULTS / "README.md").read_text()
    assert {json.loads(p.read_text())["benchmark"] for p in RESULTS.glob("*.json")} == set(
        run.NAMES
    )
