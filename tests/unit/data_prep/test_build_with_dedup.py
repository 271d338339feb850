"""`build --dedup`: what goes, where the rest goes, and what is refused."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import sentencepiece

from data_prep.build import build
from data_prep.build_plan import BuildOptions
from data_prep.cleaning import CleaningOptions
from data_prep.dedup import DedupOptions, deduplicate
from data_prep.dedup_decisions import Decisions
from data_prep.errors import UserError
from data_prep.manifest import Manifest
from data_prep.shards import Dataset


@pytest.fixture
def families(tmp_path, jsonl, texts):
    """400 documents in families: an original, an exact copy, near-copies, in random order."""
    rng = random.Random(3)
    lines = []
    for number in range(100):
        words = " ".join(texts(6, seed=1000 + number)).split()
        for member in range(4):
            near = list(words)
            if member:
                near[rng.randrange(len(words))] = f"ka{member}"
            lines.append((number, " ".join(near if member < 3 else words)))
    rng.shuffle(lines)
    jsonl(tmp_path / "corpus.jsonl", [text for _, text in lines])
    return tmp_path / "corpus.jsonl", lines


def decide(source, folder, executor, **changes):
    options = DedupOptions(build=BuildOptions(**changes))
    return deduplicate([str(source)], folder, options, executor).decisions


def documents_of(folder, tokenizer):
    """split -> texts, by NumPy and sentencepiece alone."""
    model = sentencepiece.SentencePieceProcessor(str(tokenizer / "spm.model"))
    found = {}
    for shard in Manifest.load(folder)[0].shards:
        tokens = np.load(folder / f"{shard.name}.tokens.npy")
        ends = np.load(folder / f"{shard.name}.doc_ends.npy")
        pieces = np.split(tokens, ends[:-1])
        found.setdefault(shard.split, []).extend(model.decode(p.tolist()) for p in pieces)
    return found


def test_dropped_duplicates_leave_the_first_of_each_family(
    families, tiny_tokenizer, tmp_path, inline_executor
):
    source, lines = families
    decisions = decide(source, tmp_path / "d", inline_executor)
    options = BuildOptions(heldout_fraction=0.3, dedup=decisions)
    report = build([str(source)], tiny_tokenizer, tmp_path / "ds", options, inline_executor)
    removed = decisions.values["removed"]
    assert removed["exact duplicate"] >= 100
    assert sum(removed.values()) == 300
    assert report.manifest.num_documents() == 100
    assert report.manifest.dropped == {k: n for k, n in removed.items() if n}
    firsts = {}
    for family, text in lines:
        firsts.setdefault(family, text)
    found = documents_of(tmp_path / "ds", tiny_tokenizer)
    assert sorted(found["train"] + found["heldout"]) == sorted(firsts.values())
    entries = (tmp_path / "ds" / "dropped.jsonl").read_text().splitlines()
    listed = (tmp_path / "d" / "removed.jsonl").read_text().splitlines()
    for entry, one in zip(map(json.loads, entries), map(json.loads, listed), strict=True):
        assert (entry["place"], entry["reason"]) == (one["place"], one["reason"])
        assert entry["detail"] == f"cluster {one['cluster']}"
    assert f"--dedup {decisions.fingerprint} --duplicates drop" in report.manifest.command


def test_kept_duplicates_share_a_split(families, tiny_tokenizer, tmp_path, inline_executor):
    source, lines = families
    decisions = decide(source, tmp_path / "d", inline_executor)
    split_of_family = {}
    for name, dedup in (("with", decisions), ("without", None)):
        options = BuildOptions(heldout_fraction=0.3, dedup=dedup, duplicates="keep")
        report = build([str(source)], tiny_tokenizer, tmp_path / name, options, inline_executor)
        assert report.manifest.num_documents() == 400
        family_of = {text: family for family, text in lines}
        found = documents_of(tmp_path / name, tiny_tokenizer)
        split_of_family[name] = [
            {split for split, some in found.items() for text in some if family_of[text] == family}
            for family in range(100)
        ]
        assert report.manifest.notes.get("near duplicate", 0) == (
            decisions.values["removed"]["near duplicate"] if dedup else 0
        )
    assert all(len(splits) == 1 for splits in split_of_family["with"])
    assert {"train", "heldout"} == set.union(*split_of_family["with"])
    # Without decisions near-copies do leak, which is why there are decisions.
    assert any(len(splits) == 2 for splits in split_of_family["without"])


def test_evaluation_text_goes_even_if_duplicates_stay(
    tiny_tokenizer, tmp_path, inline_executor, texts, jsonl
):
    lines = [" ".join(texts(40, seed=seed)) for seed in range(40, 50)]
    jsonl(tmp_path / "a.jsonl", [*lines, lines[3]])
    jsonl(tmp_path / "eval.jsonl", [" ".join(lines[3].split()[50:70])])
    words = DedupOptions(evaluation_files=(str(tmp_path / "eval.jsonl"),))
    source = [str(tmp_path / "a.jsonl")]
    decisions = deduplicate(source, tmp_path / "d", words, inline_executor).decisions
    options = BuildOptions(dedup=decisions, duplicates="keep")
    report = build(source, tiny_tokenizer, tmp_path / "ds", options, inline_executor)
    assert report.manifest.dropped == {"evaluation overlap": 2}
    assert report.manifest.num_documents() == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit_bytes": 999}, "--unit-bytes 999"),
        ({"cleaning": CleaningOptions(min_characters=9)}, "--min-characters 9"),
    ],
)
def test_decisions_about_another_reading_are_refused(
    changes, message, families, tiny_tokenizer, tmp_path, inline_executor
):
    source, _ = families
    decisions = decide(source, tmp_path / "d", inline_executor)
    options = BuildOptions(dedup=decisions, **changes)
    with pytest.raises(UserError) as caught:
        build([str(source)], tiny_tokenizer, tmp_path / "ds", options, inline_executor)
    assert f"--dedup {tmp_path / 'd'} was decided about another input" in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "ds").exists()


def test_other_splits_and_shards_are_no_other_reading(
    families, tiny_tokenizer, tmp_path, inline_executor
):
    source, _ = families
    decisions = decide(source, tmp_path / "d", inline_executor)
    options = BuildOptions(dedup=decisions, heldout_fraction=0.5, shard_tokens=999)
    report = build([str(source)], tiny_tokenizer, tmp_path / "ds", options, inline_executor)
    assert report.manifest.num_documents() == 100


def test_a_source_that_changed_is_refused(families, tiny_tokenizer, tmp_path, inline_executor):
    source, _ = families
    decisions = decide(source, tmp_path / "d", inline_executor)
    content = source.read_bytes()
    arguments = ([str(source)], tiny_tokenizer, tmp_path / "ds", BuildOptions(dedup=decisions))
    # Longer: other bytes; as long: other text, which only reading shows.
    source.write_bytes(content + b'{"text": "more"}\n')
    with pytest.raises(UserError) as caught:
        build(*arguments, inline_executor)
    assert "was decided about another input" in str(caught.value)
    source.write_bytes(content.replace(b"ka", b"ku", 1))
    with pytest.raises(UserError) as caught:
        build(*arguments, inline_executor)
    assert f"does not hold the documents that {tmp_path / 'd'} decided about" in str(caught.value)
    assert "deduplicate again" in str(caught.value)


def test_decisions_that_are_replaced_during_a_build_are_refused(
    families, tiny_tokenizer, tmp_path, inline_executor
):
    source, _ = families
    decisions = decide(source, tmp_path / "d", inline_executor)

    class Meddling:
        def run(self, task, items):
            shutil.rmtree(tmp_path / "d")
            exact = DedupOptions(minhash=None)
            deduplicate([str(source)], tmp_path / "d", exact, inline_executor)
            yield from map(task, items)

    options = BuildOptions(dedup=decisions)
    with pytest.raises(UserError) as caught:
        build([str(source)], tiny_tokenizer, tmp_path / "ds", options, Meddling())
    assert f"d changed while it was in use: its fingerprint was {decisions.fingerprint}" in str(
        caught.value
    )


def test_a_resumed_build_with_other_decisions_is_refused(
    families, tiny_tokenizer, tmp_path, inline_executor
):
    source, _ = families
    build([str(source)], tiny_tokenizer, tmp_path / "ds", BuildOptions(), inline_executor)
    decisions = decide(source, tmp_path / "d", inline_executor)
    options = BuildOptions(dedup=decisions)
    with pytest.raises(UserError) as caught:
        build([str(source)], tiny_tokenizer, tmp_path / "ds", options, inline_executor)
    assert "was built from something else" in str(caught.value)
    assert decisions.fingerprint in str(caught.value)


def test_the_two_commands(run, families, tiny_tokenizer, tmp_path):
    source, _ = families
    code, out, err = run("dedup", source, "--output", tmp_path / "d")
    assert code == 0, err
    assert "clusters of 4 to 7" in out
    assert f"4 documents: {source} line 1, " in out
    assert "dedup: sketch: 1 of 1" in err
    code, out, _ = run("dedup", source, "--output", tmp_path / "d", "--json")
    values = json.loads(out)
    assert values["already_complete"] is True
    assert values["clusters"]["count"] == 100
    assert values["fingerprint"] == Decisions.open(tmp_path / "d").fingerprint
    words = ["--tokenizer", tiny_tokenizer, "--output", tmp_path / "ds", "--dedup", tmp_path / "d"]
    code, _, err = run("build", source, *words, "--heldout-fraction", 0.3)
    assert code == 0, err
    assert Dataset.open(tmp_path / "ds").manifest.num_documents() == 100


def test_decontamination_from_the_command_line(run, tmp_path, jsonl, texts):
    lines = [" ".join(texts(4, seed=seed)) for seed in range(5)]
    jsonl(tmp_path / "a.jsonl", lines)
    (tmp_path / "e.jsonl").write_text(json.dumps({"q": " ".join(lines[2].split()[3:9])}) + "\n")
    words = ["--decontaminate", tmp_path / "e.jsonl", "--decontaminate-field", "q", "--exact-only"]
    code, out, _ = run(
        *("dedup", tmp_path / "a.jsonl", "--output", tmp_path / "d", *words),
        *("--ngram-words", 6, "--json"),
    )
    assert code == 0
    assert json.loads(out)["removed"]["evaluation overlap"] == 1
    assert "--exact-only --decontaminate " in json.loads(out)["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dedup", "nowhere", "--output", "d"], "source nowhere does not exist"),
        (["dedup", ".", "--output", "d", "--threshold", "2"], "--threshold 2.0: must lie above 0"),
        (["dedup", ".", "--output", "d", "--workers", "0"], "--workers 0"),
        (
            ["build", ".", "--tokenizer", "t", "--output", "o", "--dedup", "d"],
            "d: no dedup.sha256 in it",
        ),
    ],
)
def test_mistakes_are_one_message(words, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err + out


def test_decisions_of_another_version_are_refused(families, tmp_path, inline_executor):
    source, _ = families
    decide(source, tmp_path / "d", inline_executor)
    path = tmp_path / "d" / "dedup.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format_version": 9}))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "d" / "dedup.sha256").write_text(f"{digest}  dedup.json\n")
    with pytest.raises(UserError) as caught:
        Decisions.open(tmp_path / "d")
    assert "format version 9, but this program reads version 1" in str(caught.value)
