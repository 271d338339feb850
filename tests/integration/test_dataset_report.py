"""`deberta-prep report`: its figures against a plain count, and its page in a real browser."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.report import collect
from data_prep.report_page import render
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from tests.benchmarks.salted_text import build_dataset, documents, train_tokenizer
from tests.browsing import look

NASTY = '<script>document.title = "owned"</script>'


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    train_tokenizer(folder / "tokenizer")
    source = folder / f"text {NASTY[:8]}.jsonl"
    lines = [{"text": text} for text in documents(300_000)]
    broken = ['{"text": 1}', json.dumps({NASTY: ""}), "{"]
    source.write_text("\n".join([*map(json.dumps, lines), *broken]) + "\n")
    build_dataset(source, folder / "tokenizer", folder / "dataset", heldout_fraction=0.2)
    return folder / "dataset"


def test_a_reason_has_five_samples_at_most(dataset, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one two"}\n' * 100 + "{\n" * 7 + '{"text": 1}\n')
    build_dataset(source, dataset.parent / "tokenizer", tmp_path / "d")
    dropped = [(sample.reason, sample.place) for sample in collect(tmp_path / "d").dropped]
    broken = [("invalid JSON", f"line {n}") for n in range(101, 106)]
    assert dropped == [*broken, ("text is not a string", "line 108")]


def test_the_figures_are_those_of_a_plain_count(dataset):
    report = collect(dataset)
    opened = Dataset.open(dataset)
    tokenizer = Tokenizer.load(opened.tokenizer_folder)
    found: Counter[int] = Counter()
    lengths: dict[str, list[int]] = {}
    ratios = []
    for split in ("train", "heldout"):
        for reader in opened.readers(split):
            for start, end in pairwise([0, *reader.doc_ends().tolist()]):
                ids = reader.tokens(start, end).tolist()
                found.update(ids)
                lengths.setdefault(split, []).append(len(ids))
                words = sum(piece.startswith("\u2581") for piece in tokenizer.pieces(ids))
                ratios.append((len(ids), words))
    for split, values in lengths.items():
        histogram = report.lengths[split]
        assert histogram.counts == np.histogram(values, histogram.edges)[0].tolist()
        assert sum(histogram.counts) == len(values)
    [(source, fertility)] = report.fertility.items()
    shares = [tokens / words for tokens, words in ratios]
    assert fertility.counts == np.histogram(shares, fertility.edges)[0].tolist()
    tokens, words = map(sum, zip(*ratios, strict=True))
    assert report.mean_fertility[source] == tokens / words
    pieces = report.pieces
    assert pieces.tokens == found.total() == opened.manifest.num_tokens()
    plain = {n: c for n, c in found.items() if n > tokenizer.unk_id and n not in tokenizer.byte_ids}
    assert [count for _, count in pieces.top] == sorted(plain.values(), reverse=True)[:40]
    assert pieces.top[0] == (
        tokenizer.pieces([max(plain, key=plain.__getitem__)])[0],
        max(plain.values()),
    )
    assert [count for _, count in pieces.rare] == sorted(plain.values())[:40]
    assert pieces.seen_below_ten == sum(count < 10 for count in plain.values())
    text_pieces = tokenizer.num_pieces - 4 - len(tokenizer.byte_ids)
    assert pieces.unused == text_pieces - len(plain)
    assert pieces.unknown == found[tokenizer.unk_id]
    assert pieces.bytes == sum(found[n] for n in tokenizer.byte_ids)


def test_a_sample_is_a_share_of_the_blocks(dataset, monkeypatch):
    monkeypatch.setattr("data_prep.report._BLOCK_TOKENS", 1000)
    whole = collect(dataset).pieces.tokens
    part = collect(dataset, sample_tokens=whole // 4).pieces.tokens
    assert 0.1 * whole < part < 0.5 * whole


def test_equal_datasets_have_equal_pages(dataset):
    assert render(collect(dataset)) == render(collect(dataset))


class _Outside(HTMLParser):
    """Collects what a page would fetch, and its scripts."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.found += [values[key] for key in ("src", "href") if key in values]
        self.found += ["script"] * (tag == "script")


def test_the_page_needs_and_runs_nothing(dataset, tmp_path):
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(dataset), "--output", str(page)])
    assert result.exit_code == 0, result.output
    parser = _Outside()
    parser.feed(page.read_text())
    assert len(parser.found) == 2
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parser.found)
    text = page.read_text()
    assert "&lt;script&gt;document.title" in text
    for expected in ("missing field", "invalid JSON", "text is not a string", "line"):
        assert expected in text


def test_the_figures_are_printed_as_json(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", str(dataset), "--json"])
    assert json.loads(result.output)["fingerprint"] == Dataset.open(dataset).fingerprint
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_told(dataset, tmp_path):
    for output in (tmp_path, tmp_path / "none/page.html"):
        result = CliRunner().invoke(app, ["report", str(dataset), "--output", str(output)])
        assert f"--output {output}: not a file in an existing folder" in str(result.exception)


def test_a_browser_shows_the_page(dataset, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(render(collect(dataset)))
    seen = look(page, tmp_path, "1200,2400")
    assert re.search(r"<title>Dataset .*/dataset</title>", seen.dom)
    # The blue of the first plot's bars, drawn over white at 0.6.
    bars = np.array([0x3B, 0x6F, 0xB6]) * 0.6 + 255 * 0.4
    assert len(np.unique(seen.pixels_N3, axis=0)) > 50
    assert seen.count(bars) > 0
