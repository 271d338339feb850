"""Deduplication from text to decisions: what is found, and that nothing else decides the bytes."""

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import dedup_matching, dedup_sketch
from data_prep.build_plan import BuildOptions
from data_prep.dedup import DedupOptions, deduplicate
from data_prep.documents import ReadOptions, embedded_corpus
from data_prep.errors import CorruptError, UserError
from data_prep.executors import ProcessExecutor
from data_prep.minhash import MinHashOptions

LINES = DedupOptions(build=BuildOptions(read=ReadOptions(txt_document="line")))


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[n : n + 5]) for n in range(len(words) - 4)}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b) if a | b else 0.0


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def removed_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]


def numbers_of(folder: Path) -> dict[int, tuple[str, int]]:
    """Line that goes -> why, and the line that is kept; for one .jsonl file."""
    return {
        int(entry["place"].split()[1]): (entry["reason"], int(entry["kept_place"].split()[1]))
        for entry in removed_of(folder)
    }


def paragraphs(count: int) -> list[str]:
    """Paragraphs of real text of 60 to 400 words that do not resemble each other."""
    files = sorted(embedded_corpus().glob("*.txt"))
    lines = [line for file in files for line in file.read_text().split("\n")]
    sized = [line for line in lines if 60 <= len(line.split()) <= 400]
    assert len(sized) >= count
    return sized[:count]


def vary(text: str, target: float, rng: random.Random) -> str:
    """Replace words until the Jaccard index has come down to the target."""
    words = text.split()
    while (found := " ".join(words)) == text or jaccard(text, found) > target:
        words[rng.randrange(len(words))] = f"word{rng.randrange(10**6)}"
    return found


def test_planted_near_duplicates_are_found(tmp_path, inline_executor, jsonl):
    rng = random.Random(0)
    originals = paragraphs(400)
    copies = [vary(text, rng.uniform(0.70, 0.95), rng) for text in originals[:150]]
    exact = [jaccard(*pair) for pair in zip(originals, copies, strict=False)]
    jsonl(tmp_path / "a.jsonl", [*originals, *copies])
    deduplicate([str(tmp_path / "a.jsonl")], tmp_path / "d", DedupOptions(), inline_executor)
    found = numbers_of(tmp_path / "d")
    expected = {401 + n: n + 1 for n, value in enumerate(exact) if value >= 0.8}
    assert 40 < len(expected) < 120
    right = [line for line, (_, kept) in found.items() if expected.get(line) == kept]
    assert len(right) >= 0.98 * len(expected)
    assert len(right) >= 0.99 * len(found)


def test_exact_duplicates_differ_in_case_and_white_space_alone(tmp_path, inline_executor, jsonl):
    texts = ["One two.", "one  TWO.\n", "one two", "x + y", "x - y", "a b c d e f.", "A b c d e f!"]
    jsonl(tmp_path / "a.jsonl", texts)
    report = deduplicate(
        [str(tmp_path / "a.jsonl")], tmp_path / "d", DedupOptions(), inline_executor
    )
    # Six words make shingles; fewer are compared exactly only.
    assert numbers_of(tmp_path / "d") == {2: ("exact duplicate", 1), 7: ("near duplicate", 6)}
    assert report.decisions.values["removed"] == {
        "exact duplicate": 1,
        "near duplicate": 1,
        "evaluation overlap": 0,
    }
    only = replace(DedupOptions(), minhash=None)
    deduplicate([str(tmp_path / "a.jsonl")], tmp_path / "e", only, inline_executor)
    assert numbers_of(tmp_path / "e") == {2: ("exact duplicate", 1)}


def test_a_cluster_keeps_its_first_document_across_units_and_sources(
    tmp_path, inline_executor, jsonl
):
    text, *others = paragraphs(5)
    rng = random.Random(1)
    jsonl(tmp_path / "b.jsonl", [others[0], text, vary(text, 0.9, rng)])
    jsonl(tmp_path / "a.jsonl", [vary(text, 0.9, rng), others[1], text])
    names = [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]
    deduplicate(names, tmp_path / "d", DedupOptions(), inline_executor)
    places = [
        (Path(entry["file"]).name, entry["place"], entry["reason"], entry["kept_place"])
        for entry in removed_of(tmp_path / "d")
    ]
    assert places == [
        ("b.jsonl", "line 3", "near duplicate", "line 2"),
        ("a.jsonl", "line 1", "near duplicate", "line 2"),
        ("a.jsonl", "line 3", "exact duplicate", "line 2"),
    ]
    assert {Path(entry["kept_file"]).name for entry in removed_of(tmp_path / "d")} == {"b.jsonl"}


@pytest.fixture
def varied_corpus(tmp_path, jsonl):
    """Three files with duplicates within and between them, cut into several units."""
    rng = random.Random(2)
    originals = paragraphs(90)
    texts = [*originals, *(vary(text, 0.88, rng) for text in originals[::2]), *originals[::5]]
    texts += [f"boilerplate of a page that everybody has, number {n % 9}" for n in range(60)]
    rng.shuffle(texts)
    for number in range(3):
        jsonl(tmp_path / "corpus" / f"{number}.jsonl", texts[number::3])
    return tmp_path / "corpus"


def small_steps(monkeypatch):
    """Many parts, ranges and batches, as a corpus of terabytes has them."""
    monkeypatch.setattr(dedup_sketch, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(dedup_sketch, "PART_DOCUMENTS", 20)
    monkeypatch.setattr(dedup_matching, "RANGE_RECORDS", 500)
    monkeypatch.setattr(dedup_matching, "_BATCH_SHINGLES", 300)


def test_parts_ranges_and_workers_do_not_matter(
    varied_corpus, tmp_path, inline_executor, monkeypatch
):
    options = DedupOptions(build=BuildOptions(unit_bytes=20_000))
    words = ([str(varied_corpus)], tmp_path / "one", options)
    one = deduplicate(*words, inline_executor)
    assert len(one.decisions.values["units"]) > 3
    assert min(one.decisions.values["removed"].values(), default=0) == 0
    assert sum(one.decisions.values["removed"].values()) > 60
    deduplicate([str(varied_corpus)], tmp_path / "three", options, ProcessExecutor(3))
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")
    small_steps(monkeypatch)
    deduplicate([str(varied_corpus)], tmp_path / "small", options, inline_executor)
    assert hashes(tmp_path / "small") == hashes(tmp_path / "one")


class Interrupted(Exception):
    pass


class StoppingExecutor:
    """Stops after some tasks, in the middle of one if that is asked for."""

    def __init__(self, tasks: int):
        self.tasks = tasks

    def run(self, task, items):
        for item in items:
            if not self.tasks:
                raise Interrupted
            self.tasks -= 1
            yield task(item)


def test_interruptions_do_not_matter(varied_corpus, tmp_path, inline_executor, monkeypatch):
    small_steps(monkeypatch)
    options = DedupOptions(build=BuildOptions(unit_bytes=20_000))
    arguments = ([str(varied_corpus)], tmp_path / "d", options)
    deduplicate(arguments[0], tmp_path / "undisturbed", options, inline_executor)
    stops = 0
    for tasks in range(1, 400, 5):
        try:
            deduplicate(*arguments, StoppingExecutor(tasks))
            break
        except Interrupted:
            stops += 1
            # What a killed process leaves behind.
            (tmp_path / "d" / ".work" / "pairs-00001.elsewhere.1.partial").mkdir(exist_ok=True)
    assert stops > 5
    assert hashes(tmp_path / "d") == hashes(tmp_path / "undisturbed")


def test_complete_decisions_are_left_as_they_are(tmp_path, inline_executor, jsonl):
    jsonl(tmp_path / "a.jsonl", paragraphs(5))
    arguments = ([str(tmp_path / "a.jsonl")], tmp_path / "d", DedupOptions(), inline_executor)
    first = deduplicate(*arguments)
    before = hashes(tmp_path / "d")
    again = deduplicate(*arguments)
    assert again.reading is None
    assert again.decisions == first.decisions
    assert hashes(tmp_path / "d") == before
    jsonl(tmp_path / "a.jsonl", paragraphs(6))
    with pytest.raises(UserError) as caught:
        deduplicate(*arguments)
    assert f"{tmp_path / 'd'} was made from something else" in str(caught.value)
    assert "bytes of the sources" in str(caught.value)


def test_an_unfinished_folder_of_other_options_is_refused(tmp_path, jsonl):
    jsonl(tmp_path / "a.jsonl", paragraphs(5))
    jsonl(tmp_path / "b.jsonl", ["one more"])
    source, output = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tmp_path / "d"
    with pytest.raises(Interrupted):
        deduplicate(source, output, DedupOptions(), StoppingExecutor(0))
    other = DedupOptions(minhash=MinHashOptions(threshold=0.7))
    with pytest.raises(UserError) as caught:
        deduplicate(source, output, other, StoppingExecutor(0))
    assert "is being made from something else" in str(caught.value)
    assert "--threshold 0.7" in str(caught.value)


@pytest.mark.parametrize("what", ["a file", "another folder"])
def test_an_output_that_is_something_else_is_refused(what, tmp_path, inline_executor, jsonl):
    jsonl(tmp_path / "a.jsonl", paragraphs(2))
    output = tmp_path / "d"
    if what == "a file":
        output.write_text("")
        message = "d is a file; choose another --output"
    else:
        output.mkdir()
        (output / "letter.txt").write_text("")
        message = "d is neither empty nor a folder of unfinished decisions"
    with pytest.raises(UserError) as caught:
        deduplicate([str(tmp_path / "a.jsonl")], output, DedupOptions(), inline_executor)
    assert message in str(caught.value)


def test_a_corpus_without_documents_is_refused(tmp_path, inline_executor):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError) as caught:
        deduplicate([str(tmp_path / "a.txt")], tmp_path / "d", DedupOptions(), inline_executor)
    assert "no document is left of 1 files" in str(caught.value)


def test_two_at_once_are_kept_apart(tmp_path, inline_executor, jsonl):
    for name in ("a", "b"):
        jsonl(tmp_path / f"{name}.jsonl", [name, *paragraphs(3)])
    sources = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    arguments = (sources, tmp_path / "d", DedupOptions())
    messages = []

    class Meeting:
        def run(self, task, items):
            with pytest.raises(UserError) as caught:
                deduplicate(*arguments, inline_executor)
            messages.append(str(caught.value))
            yield from map(task, items)

    deduplicate(*arguments, Meeting())
    assert "d is being built by process " in messages[0]


def test_damaged_decisions_are_refused_by_name(tmp_path, inline_executor, jsonl):
    jsonl(tmp_path / "a.jsonl", [*paragraphs(3), *paragraphs(3)])
    arguments = ([str(tmp_path / "a.jsonl")], tmp_path / "d", DedupOptions(), inline_executor)
    deduplicate(*arguments)
    for path in sorted((tmp_path / "d").iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CorruptError) as caught:
            deduplicate(*arguments)
        path.write_bytes(content)
        name = path.name.replace("sha256", "json")
        assert name in str(caught.value)
        assert "deduplicate again" in str(caught.value)


ODD = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", "word", "\x00", "a\x00b", "\ud800", "\n", "\u200b", "a b c d e", "\ufeff"]
    ),
)


@given(odd=st.lists(ODD, min_size=1, max_size=12))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_odd_texts_are_decided_about(odd, tmp_path_factory, inline_executor):
    folder = tmp_path_factory.mktemp("odd")
    odd = [*odd, "the end"]  # one document at least, or the input would be refused
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in odd))
    arguments = ([str(folder / "a.jsonl")], folder / "d", DedupOptions(), inline_executor)
    report = deduplicate(*arguments)
    values = report.decisions.values
    assert values["documents"] + report.reading.total_dropped == len(odd)
    removed = removed_of(folder / "d")
    assert len(removed) == sum(values["removed"].values())
    for entry in removed:
        mine, kept = (odd[int(entry[key].split()[1]) - 1] for key in ("place", "kept_place"))
        if mine.isascii() and kept.isascii() and "\x00" not in mine + kept:
            assert re.findall(r"[a-z0-9]+", mine.lower()) == re.findall(r"[a-z0-9]+", kept.lower())


def test_a_report_shows_the_largest_clusters_and_some_of_each(tmp_path, inline_executor, jsonl):
    texts = [f"text of the family {family}" for family in range(25) for _ in range(family + 2)]
    jsonl(tmp_path / "a.jsonl", texts)
    report = deduplicate(
        [str(tmp_path / "a.jsonl")], tmp_path / "d", DedupOptions(), inline_executor
    )
    clusters = report.decisions.values["clusters"]
    assert (clusters["count"], clusters["largest"]) == (25, 26)
    assert [sample["documents"] for sample in clusters["samples"]] == list(range(26, 6, -1))
    assert {len(sample["members"]) for sample in clusters["samples"]} == {5}
    first = texts.index("text of the family 24") + 1
    places = [member["place"] for member in clusters["samples"][0]["members"]]
    assert places == [f"line {first + n}" for n in range(5)]
