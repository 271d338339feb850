import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.delimited import BadRow, Row, iter_delimited_rows

# Carriage returns are line ends to both readers and cannot be told apart afterwards.
FIELDS = st.text(st.characters(exclude_characters="\r", exclude_categories=("Cs",)), max_size=20)


def rows_of(data: bytes, kind: str = "csv", limit: int = 1 << 16) -> list[Row | BadRow]:
    stream = io.BufferedReader(io.BytesIO(data))  # pyright: ignore[reportArgumentType]
    return list(iter_delimited_rows(stream, kind, limit))


@given(st.lists(st.lists(FIELDS, min_size=2, max_size=3), min_size=1))
def test_a_csv_gives_back_what_was_written(rows):
    written = io.StringIO()
    csv.writer(written, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    assert [row.fields for row in rows_of(written.getvalue().encode())] == rows  # pyright: ignore


def test_rows_know_the_line_on_which_they_begin():
    data = b'id,text\r\n1,"two\r\nlines"\r\n\r\n2,"a ""word"""\r\n'
    assert rows_of(data) == [
        Row("line 1", ["id", "text"]),
        Row("line 2", ["1", "two\nlines"]),
        Row("line 5", ["2", 'a "word"']),
    ]


def test_only_line_feeds_end_a_line():
    assert rows_of("a\u2028b,c\x85d\n".encode()) == [Row("line 1", ["a\u2028b", "c\x85d"])]


def test_a_tsv_has_no_quotes():
    assert rows_of(b'a\tb\n"x\ty"\n\n', "tsv") == [
        Row("line 1", ["a", "b"]),
        Row("line 2", ['"x', 'y"']),
    ]


@pytest.mark.parametrize(
    ("data", "bad"),
    [
        (b'a\n"x"y\nb\n', BadRow("line 2", False, "',' expected after '\"'")),
        (b'a\n"x', BadRow("line 2", False, "unexpected end of data")),
        (
            b"a\n" + b"x" * 200 + b"\nb\n",
            BadRow("line 2", True, "a line of 201 bytes, the limit is 100"),
        ),
    ],
)
def test_a_bad_row_is_told_and_the_next_one_read(data, bad):
    rows = rows_of(data, limit=100)
    assert rows[0] == Row("line 1", ["a"])
    assert rows[1] == bad
    assert rows[2:] in ([Row("line 3", ["b"])], [])
    assert bool(rows[2:]) == data.endswith(b"b\n")


def test_a_quote_that_never_closes_costs_a_limit_of_rows_and_no_memory():
    data = b'a,b\n"open,1\n' + b"x,2\n" * 1000
    rows = rows_of(data, limit=100)
    bad = rows[1]
    assert isinstance(bad, BadRow)
    assert (bad.place, bad.is_too_long) == ("line 2", True)
    assert bad.detail == "the quotes do not close within 104 bytes, the limit is 100"
    assert len(rows) == 2 + 1001 - 25
    assert rows[-1] == Row("line 1002", ["x", "2"])


def test_behind_a_long_line_between_quotes_the_next_line_is_a_row():
    data = b'a\n"x\n' + b"y" * 200 + b'\nz",1\nb\n'
    rows = rows_of(data, limit=100)
    assert [row.place for row in rows if isinstance(row, BadRow)] == ["line 2"]
    assert rows[2:] == [Row("line 4", ['z"', "1"]), Row("line 5", ["b"])]


def test_bytes_that_are_not_utf8_are_kept_apart():
    [row] = rows_of(b"a,\xff\n")
    assert isinstance(row, Row)
    assert row.fields[1].encode("utf-8", "surrogateescape") == b"\xff"


@given(st.binary(max_size=200), st.sampled_from(["csv", "tsv"]))
def test_any_bytes_are_rows_or_bad_rows(data, kind):
    rows_of(data, kind, limit=50)
