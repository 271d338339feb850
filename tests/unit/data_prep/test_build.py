import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece

from data_prep.assembly import group_shards, link_or_copy
from data_prep.build import build
from data_prep.build_plan import BuildOptions
from data_prep.cleaning import CleaningOptions
from data_prep.documents import ReadOptions
from data_prep.manifest import Manifest, ShardInfo
from data_prep.shards import Dataset
from data_prep.splits import split_digest, split_of

OPTIONS = BuildOptions(heldout_fraction=0.2, unit_bytes=8000)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_with_numpy(folder: Path) -> dict[tuple[str, str], list[list[int]]]:
    """(source, split) -> documents, by the README's recipe and without our reader."""
    documents: dict[tuple[str, str], list[list[int]]] = {}
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        tokens = np.load(folder / f"{shard['name']}.tokens.npy", mmap_mode="r")
        ends = np.load(folder / f"{shard['name']}.doc_ends.npy", mmap_mode="r")
        pieces = np.split(tokens, ends[:-1])
        key = (shard["source"], shard["split"])
        documents.setdefault(key, []).extend(piece.tolist() for piece in pieces)
    return documents


def test_every_document_is_there_in_order_and_in_its_split(
    tiny_dataset, tiny_corpus, tiny_tokenizer
):
    model = sentencepiece.SentencePieceProcessor(str(tiny_tokenizer / "spm.model"))
    found = read_with_numpy(tiny_dataset)
    for name in ("a.jsonl", "b.jsonl"):
        source = str(tiny_corpus / name)
        texts = [record["text"] for record in read_jsonl(tiny_corpus / name)]
        for split in ("train", "heldout"):
            expected = []
            for text in texts:
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                is_heldout = int.from_bytes(digest, "big") / 2**64 < 0.2
                if is_heldout == (split == "heldout"):
                    expected.append(model.encode(text))
            assert found[source, split] == expected


def test_the_report_and_the_manifest_agree_with_the_input(
    tiny_corpus, tiny_tokenizer, tmp_path, inline_executor
):
    source = tiny_corpus / "a.jsonl"
    output = tmp_path / "dataset"
    report = build([str(source)], tiny_tokenizer, output, OPTIONS, inline_executor)
    texts = [record["text"] for record in read_jsonl(source)]
    manifest = report.manifest
    assert Manifest.load(output) == (manifest, report.fingerprint)
    assert manifest.num_documents() == len(texts)
    assert manifest.text_bytes() == sum(len(text.encode()) for text in texts)
    assert manifest.sources[0].input_bytes == source.stat().st_size
    assert manifest.vocab_size == 500
    assert manifest.tokenizer_fingerprint == hashes(tiny_tokenizer)["spm.model"]
    assert not (output / ".work").exists()
    assert not list(output.rglob("*.partial"))


def test_shards_hold_one_source_and_one_split(tiny_dataset, tiny_corpus):
    manifest, _ = Manifest.load(tiny_dataset)
    names = [shard.name for shard in manifest.shards]
    assert names == [f"shard-{n:05d}" for n in range(len(names))]
    # Small shards are joined, so there is one for each source and split.
    keys = [(shard.source, shard.split) for shard in manifest.shards]
    assert len(keys) == len(set(keys)) == 6
    assert {source for source, _ in keys} == {
        str(tiny_corpus / name) for name in ("a.jsonl", "b.jsonl", "letters")
    }


def test_a_full_shard_takes_no_further_document(
    tiny_corpus, tiny_tokenizer, tmp_path, inline_executor, monkeypatch
):
    monkeypatch.setattr("data_prep.build_steps.JOIN_BELOW_TOKENS", 1)
    options = replace(OPTIONS, shard_tokens=500, unit_bytes=10**6)
    source = [str(tiny_corpus / "a.jsonl")]
    build(source, tiny_tokenizer, tmp_path / "small", options, inline_executor)
    build(source, tiny_tokenizer, tmp_path / "large", OPTIONS, inline_executor)
    manifest, _ = Manifest.load(tmp_path / "small")
    train = [shard for shard in manifest.shards if shard.split == "train"]
    assert len(train) > 3
    dataset = Dataset.open(tmp_path / "small")
    for reader, shard in zip(dataset.readers("train"), train, strict=True):
        begins_last_document = int(np.append(0, reader.doc_ends())[-2])
        assert begins_last_document < 500
        assert shard is train[-1] or shard.num_tokens >= 500
    assert read_with_numpy(tmp_path / "small") == read_with_numpy(tmp_path / "large")


def make_shards(sizes: list[tuple[str, int]]) -> tuple[ShardInfo, ...]:
    zeros = "0" * 64
    return tuple(
        ShardInfo(f"shard-{n:05d}", "s", split, tokens, 1, 1, zeros, zeros, (zeros,))
        for n, (split, tokens) in enumerate(sizes)
    )


def test_small_shards_are_joined_and_big_ones_are_not():
    shards = [
        make_shards([("train", 90), ("heldout", 3)]),
        make_shards([("train", 4), ("heldout", 3)]),
        make_shards([("train", 80), ("heldout", 5)]),
        make_shards([("train", 7), ("heldout", 1)]),
    ]
    units = [(Path(str(n)), infos) for n, infos in enumerate(shards)]
    groups = [
        (parts[0][1].split, [(folder.name, info.num_tokens) for folder, info in parts])
        for parts in group_shards(units, join_below=10)
    ]
    assert groups == [
        ("train", [("0", 90)]),
        ("heldout", [("0", 3), ("1", 3), ("2", 5)]),
        ("train", [("1", 4), ("3", 7)]),
        ("train", [("2", 80)]),
        ("heldout", [("3", 1)]),
    ]


def test_every_drop_is_written_down(
    tiny_tokenizer, tmp_path, inline_executor, texts, jsonl, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    lines = texts(20, seed=5)
    jsonl(tmp_path / "good.jsonl", lines)
    (tmp_path / "bad.jsonl").write_text("nonsense\n" * 300 + '{"text": "\\u0007"}\n')
    sources = ["good.jsonl", "bad.jsonl"]
    arguments = (sources, tiny_tokenizer, tmp_path / "d", OPTIONS, inline_executor)
    report = build(*arguments, max_malformed=1)
    entries = read_jsonl(tmp_path / "d" / "dropped.jsonl")
    assert len(entries) == 301
    assert {entry["file"] for entry in entries} == {"bad.jsonl"}
    assert [entry["place"] for entry in entries[:3]] == ["line 1", "line 2", "line 3"]
    assert entries[0]["reason"] == "invalid JSON"
    assert (entries[300]["place"], entries[300]["reason"]) == ("line 301", "too short")
    assert report.manifest.dropped == {"invalid JSON": 300, "too short": 1}


def test_a_text_without_tokens_is_dropped(tiny_tokenizer, tmp_path, inline_executor, texts, jsonl):
    # A zero-width space is text to the reader, but nmt_nfkc turns it into white space.
    jsonl(tmp_path / "a.jsonl", [*texts(3, seed=6), "\u200b", *texts(3, seed=7)])
    report = build(
        [str(tmp_path / "a.jsonl")], tiny_tokenizer, tmp_path / "d", OPTIONS, inline_executor
    )
    assert report.manifest.dropped == {"no tokens": 1}
    assert report.manifest.num_documents() == 6


def test_long_documents_are_encoded_in_chunks(tiny_tokenizer, tmp_path, inline_executor, texts):
    text = " ".join(texts(4000, seed=8))
    assert len(text) > 2 * 262_144
    (tmp_path / "long.txt").write_text(text)
    options = replace(OPTIONS, heldout_fraction=0.0)
    build([str(tmp_path / "long.txt")], tiny_tokenizer, tmp_path / "d", options, inline_executor)
    model = sentencepiece.SentencePieceProcessor(str(tiny_tokenizer / "spm.model"))
    expected, rest = [], text
    while rest:
        cut = len(rest) if len(rest) <= 262_144 else rest.rfind(" ", 0, 262_144) + 1
        expected += model.encode(rest[:cut])
        rest = rest[cut:]
    (documents,) = read_with_numpy(tmp_path / "d").values()
    assert documents == [expected]


def test_copies_of_a_document_share_a_split():
    digests = [split_digest(f"document {n}".encode()) for n in range(4000)]
    splits = [split_of(digest, 0.25) for digest in digests]
    assert digests == [split_digest(f"document {n}".encode()) for n in range(4000)]
    # Four standard deviations of a binomial law.
    assert abs(splits.count("heldout") - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert {split_of(digest, 0.0) for digest in digests} == {"train"}


def test_options_reach_the_reader(tiny_tokenizer, tmp_path, inline_executor, texts):
    lines = texts(9, seed=9)
    (tmp_path / "a.txt").write_text("\n".join([*lines, "ka"]))
    options = BuildOptions(
        read=ReadOptions(txt_document="line"),
        cleaning=CleaningOptions(min_characters=3),
        heldout_fraction=0.0,
    )
    report = build(
        [str(tmp_path / "a.txt")], tiny_tokenizer, tmp_path / "d", options, inline_executor
    )
    assert report.manifest.num_documents() == 9
    assert "--txt-document line" in report.manifest.command
    assert "--min-characters 3" in report.manifest.command


def test_the_tokenizer_of_the_dataset_depends_on_the_model_alone(
    tiny_tokenizer, tiny_corpus, tmp_path, inline_executor
):
    shutil.copy(tiny_tokenizer / "spm.model", tmp_path / "other.model")
    source = [str(tiny_corpus / "letters")]
    build(source, tmp_path / "other.model", tmp_path / "d", OPTIONS, inline_executor)
    assert hashes(tmp_path / "d" / "tokenizer") == hashes(tiny_tokenizer)


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"content")
    link_or_copy(tmp_path / "a", tmp_path / "linked")
    assert (tmp_path / "linked").stat().st_ino == (tmp_path / "a").stat().st_ino

    def no_links(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    link_or_copy(tmp_path / "a", tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == b"content"
    assert (tmp_path / "copied").stat().st_ino != (tmp_path / "a").stat().st_ino
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "copied", "linked"]
