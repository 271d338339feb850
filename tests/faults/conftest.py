"""What tests of faults share: the worlds that they hurt, and the table of what they saw."""

import re
from pathlib import Path

import pytest

from tests.conftest import TINY_RUN
from tests.faults.harness import Lab
from tests.faults.rows import ROWS, Showing, missing_rows, write_table

_SHOWINGS = pytest.StashKey[list[Showing]]()
_NOTES = pytest.StashKey[list[tuple[int, str, str]]]()


def pytest_addoption(parser):
    parser.addoption("--faults-table", help="write the fault matrix to this .md file and a .json")
    parser.addoption(
        "--seeds", type=int, default=1, help="random kills of preparation under each executor"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "row(*numbers): rows of the fault matrix that a test shows")
    config.stash[_SHOWINGS] = []


def row_numbers(item):
    """Rows of the matrix that a test belongs to."""
    numbers = [number for mark in item.iter_markers("row") for number in mark.args]
    assert all(number in ROWS for number in numbers), item.nodeid
    return numbers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    numbers = row_numbers(item)
    if not numbers or not (call.when == "call" or (call.when == "setup" and not report.passed)):
        return report
    notes = item.stash.get(_NOTES, [])
    shown = {*numbers, *(row for row, _, _ in notes)}
    for number in sorted(shown):
        mine = [(injected, seen) for row, injected, seen in notes if row == number]
        item.config.stash[_SHOWINGS].append(
            Showing(
                number,
                re.sub(r"^.*tests/faults/", "", item.nodeid),
                "; ".join(injected for injected, _ in mine),
                "; ".join(seen for _, seen in mine),
                report.passed,
                round(call.duration / len(shown), 1),
            )
        )
    return report


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("faults_table", default=None)
    if path is None:
        return
    showings = session.config.stash[_SHOWINGS]
    write_table(Path(path), showings)
    if exitstatus == 0 and missing_rows(showings):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("faults_table", default=None) is None:
        return
    missing = missing_rows(config.stash[_SHOWINGS])
    text = (
        f"rows of the fault matrix that are not shown: {missing}" if missing else "all rows shown"
    )
    terminalreporter.write_line(text)


@pytest.fixture
def note(request):
    """Say what was injected and what was seen; `row` where a test shows several."""
    notes = request.node.stash.setdefault(_NOTES, [])

    def write(injected, seen, row=None):
        notes.append((row or row_numbers(request.node)[0], injected, str(seen)))

    return write


@pytest.fixture(scope="session")
def lab(dataset_folder, vocab_size, tmp_path_factory):
    """Worlds on the small corpus."""

    def write_toml(path):
        path.write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=0.1))

    lab = Lab(tmp_path_factory.mktemp("lab"), dataset_folder, write_toml)
    yield lab
    lab.close()
