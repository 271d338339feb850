"""How benchmarks measure and report: turns, ratios within a round, and tables made from files."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from tests.benchmarks import readme_table, rounds, run
from tests.benchmarks.readme_table import BEGIN, END, ROWS, table
from tests.benchmarks.rounds import Case, Outcome, measure, slug
from tests.worlds import ROOT

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
    found = run.load(RESULTS, "*.json", without=run.GPU_FILES)
    # A gigabyte is built by a command of its own, which `make bench` does not start.
    assert {result["benchmark"] for result in found} - {"prep-large"} == set(run.NAMES)


GPU_CELLS = {
    "transformers": {
        "status": "measured",
        "date": "2030-01-02",
        "against": "ours, triton, compiled layer",
        "ratio": 3.111,
        "tokens_per_second": 30_000.0,
        "ours_tokens_per_second": 111_000.0,
        "ours_mfu": 0.364,
        "mfu": 0.12,
        "peak_gib": 50.0,
        "beyond_state_gib": 40.0,
        "ours_peak_gib": 20.0,
        "ours_beyond_state_gib": 12.0,
    },
    "flash": {"status": "failed", "date": "2030-01-02", "reason": "no such module"},
}


def gpu_result(folder, date="2030-01-02", name="h100", **cells):
    document = {
        "benchmark": "gpu-step",
        "size": "large",
        "device": f"NVIDIA {name}",
        "cells": {**GPU_CELLS, **cells},
    }
    document["cells"] = {key: {**cell, "date": date} for key, cell in document["cells"].items()}
    (folder / f"gpu-step-large-{name}.json").write_text(json.dumps(document))


def test_cells_of_a_gpu_have_a_table_of_their_own(tmp_path):
    gpu_result(tmp_path)
    run.write_readme(tmp_path)
    rows = (tmp_path / "README.md").read_text().splitlines()
    measured = "| 3.11 | 30,000 | 111,000 | 0.12 | 50 | 40 | 2030-01-02 |"
    assert any(row.startswith("| step | large | NVIDIA h100 | tr") for row in rows)
    assert any(row.endswith(f"| ours, triton, compiled layer {measured}") for row in rows)
    assert any("| flash |  | failed: no such module |" in row for row in rows)
    assert all(row.count("|") == len(run.GPU_COLUMNS) + 1 for row in rows if "h100" in row)


def test_the_readmes_table_says_where_each_figure_is_from(tmp_path):
    assert table(tmp_path).count("| not measured |") == len(ROWS) - 1
    row = next(line for line in table(tmp_path).splitlines() if line.startswith("| large, tok"))
    found = re.fullmatch(
        r".* \| (\d+)k \((\d+)%\) \| modelled by `deberta plan` \(.*: (.*) \|", row
    )
    assert found, row
    result = CliRunner().invoke(app, ["plan", "deberta_v3_large", "--gpus", "1", "--json"])
    proposal = json.loads(result.stdout)["proposal"]
    assert int(found[1]) == round(proposal["tokens_per_second"] / 1000)
    figures = {each["name"]: each["value"] for each in proposal["figures"]}
    assert int(found[2]) == round(100 * figures["MFU"])
    for words in (f"micro batch {proposal['micro_batch']},", "backend triton, compile layer"):
        assert words in found[3]
    gpu_result(tmp_path)
    lines = table(tmp_path).splitlines()
    where = "measured, NVIDIA h100, 2030-01-02"
    assert f"| step of large against transformers eager | 2.5x | 3.3x | 3.11x | {where} |" in lines
    assert any(line.endswith(f"| 111,000 (36%) | {where} |") for line in lines)
    assert any(line.endswith(f"| 30% (total 20.0 of 50.0 GiB) | {where} |") for line in lines)
    gpu_result(
        tmp_path, "2031-05-06", "h200", transformers={**GPU_CELLS["transformers"], "ratio": 4}
    )
    assert "| 4.00x | measured, NVIDIA h200, 2031-05-06 |" in table(tmp_path)


def test_the_projects_readme_has_the_table_as_it_is_now():
    """`python tests/benchmarks/readme_table.py --write README.md` has been run."""
    page = (ROOT / "README.md").read_text()
    assert page == readme_table.replaced(page, table(RESULTS))


def test_the_table_goes_between_the_marks_of_a_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert readme_table.main(["--results", str(tmp_path), "--write", str(page)]) == 0
    assert page.read_text() == f"before\n{BEGIN}\n{table(tmp_path)}{END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match=r"page\.md lacks the lines"):
        readme_table.main(["--results", str(tmp_path), "--write", str(page)])
