"""Every row of the fault matrix has a test, and the table tells a row that nobody has shown."""

import re
from pathlib import Path

from tests.faults.rows import ROWS, Showing, missing_rows, write_table


def rows_in_source(folder):
    """Numbers in `pytest.mark.row(...)` of all test files."""
    texts = (path.read_text() for path in folder.rglob("test_*.py"))
    marks = (mark for text in texts for mark in re.findall(r"mark\.row\(([\d, ]+)\)", text))
    return {int(number) for mark in marks for number in mark.split(",")}


def test_every_row_has_a_test():
    assert [*ROWS] == [*range(1, 34)]
    assert rows_in_source(Path(__file__).parent) == {*ROWS}


def test_table_of_what_was_seen(tmp_path):
    showings = [Showing(n, "t", f"injected {n}", "a | b", True, 1.0) for n in ROWS if n != 7]
    assert missing_rows(showings) == [7]
    showings.append(Showing(7, "t", "disk full", "went on", False, 2.0))
    assert missing_rows(showings) == [7]
    write_table(tmp_path / "results" / "faults.md", showings)
    lines = (tmp_path / "results" / "faults.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(ROWS)
    assert "| disk full | went on | 0 of 1 passed | 2 |" in "\n".join(lines)
    assert "a \\| b" in lines[6]
    assert (tmp_path / "results" / "faults.json").exists()
