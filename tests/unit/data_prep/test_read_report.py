import json

from hypothesis import given
from hypothesis import strategies as st

from data_prep.read_report import EXAMPLES_PER_FILE, FILES_PER_REASON, ReadReport

events = st.lists(
    st.tuples(
        st.sampled_from(["drop", "note"]),
        st.sampled_from(["r1", "r2"]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 9),
    ),
    max_size=30,
)


def report_of(happened) -> ReadReport:
    report = ReadReport()
    for kind, reason, file, line in happened:
        getattr(report, kind)(reason, file, f"line {line}")
        report.documents += line
    return report


@given(events, events, events)
def test_sums_do_not_depend_on_how_work_was_divided(first, second, third):
    parts = [report_of(happened) for happened in (first, second, third)]
    whole = report_of(first + second + third)
    assert parts[0] + parts[1] + parts[2] == whole
    assert parts[0] + (parts[1] + parts[2]) == whole


@given(events)
def test_survives_json(happened):
    report = report_of(happened)
    assert ReadReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_sum_shares_nothing_with_its_terms():
    first, second = report_of([("drop", "r1", "a", 1)]), report_of([("drop", "r1", "a", 2)])
    total = first + second
    assert total.dropped == {"r1": 2}
    assert first.dropped == second.dropped == {"r1": 1}
    assert first.examples == {"r1": {"a": ["line 1: r1"]}}


def test_counts_are_exact_where_examples_are_bounded():
    report = ReadReport()
    for file in range(FILES_PER_REASON + 10):
        for line in range(EXAMPLES_PER_FILE + 3):
            report.drop("broken", f"file{file}", f"line {line}")
    assert report.total_dropped == (FILES_PER_REASON + 10) * (EXAMPLES_PER_FILE + 3)
    assert len(report.examples["broken"]) == FILES_PER_REASON
    assert {len(cases) for cases in report.examples["broken"].values()} == {EXAMPLES_PER_FILE}


def test_a_case_is_told_with_file_place_reason_and_detail():
    report = ReadReport()
    report.drop("missing field", "news.jsonl", "line 17", 'no "text"')
    report.drop("empty file", "none.txt")
    report.note("ignored file", "name\udcff", detail="format")
    assert list(report.lines()) == [
        "none.txt: empty file",
        "name\\udcff: ignored file (format)",
        'news.jsonl: line 17: missing field (no "text")',
    ]
