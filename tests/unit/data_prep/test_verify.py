import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import verify as verify_module
from data_prep.assembly import describe_file
from data_prep.errors import CorruptError, UserError
from data_prep.manifest import Manifest
from data_prep.roundtrip import RoundtripReport, measure_roundtrip
from data_prep.shard_writer import ShardWriter
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from tests.small_datasets import bare_manifest


@pytest.fixture
def dataset(tiny_dataset, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def handmade(folder: Path, tokenizer: Path, documents, num_tokens_lie: int = 0) -> Path:
    """A dataset whose hashes are right, whatever its content."""
    folder.mkdir()
    with ShardWriter(folder, "shard-00000", "hand", "train") as writer:
        for document in documents:
            writer.write(document)
            writer.end_document(1)
        info = writer.finish()
    shutil.copytree(tokenizer, folder / "tokenizer")
    files = [
        describe_file(path, f"tokenizer/{path.name}")
        for path in sorted((folder / "tokenizer").iterdir())
    ]
    model = Tokenizer.load(tokenizer)
    manifest = bare_manifest(
        [info],
        vocab_size=model.vocab_size + num_tokens_lie,
        tokenizer_fingerprint=model.fingerprint,
        files=tuple(files),
    )
    manifest.save(folder)
    return folder


def test_a_sound_dataset_passes_with_its_figures(tiny_dataset):
    report = verify(tiny_dataset, sample_documents=None, num_threads=3)
    manifest, fingerprint = Manifest.load(tiny_dataset)
    files = [path for path in tiny_dataset.rglob("*") if path.is_file()]
    assert report.fingerprint == fingerprint
    assert report.files == len(files)
    assert report.num_bytes == sum(path.stat().st_size for path in files)
    assert (report.documents, report.tokens) == (220, manifest.num_tokens())
    assert report.unlisted == ()
    assert report.roundtrip.documents == 220
    assert report.roundtrip.tokens == manifest.num_tokens()
    # Words of plain letters come back as they were.
    assert report.roundtrip.documents_changed == 0
    assert report.parity.texts >= 220
    assert report.parity.other == 0


def test_every_damaged_file_is_named_in_one_message(dataset):
    damaged = ["shard-00000.tokens.npy", "shard-00003.doc_ends.npy", "tokenizer/tokenizer.json"]
    for name in damaged:
        flip(dataset / name, -1)
    (dataset / "shard-00005.tokens.npy").unlink()
    with pytest.raises(CorruptError, match="4 of its files are damaged") as caught:
        verify(dataset)
    for name in [*damaged, "shard-00005.tokens.npy: cannot be read"]:
        assert name in str(caught.value)
    assert "in 4 MiB blocks [0]" in str(caught.value)
    assert "shard-00001" not in str(caught.value)


def test_a_file_that_the_disk_refuses_is_named_beside_the_others(dataset, monkeypatch):
    flip(dataset / "shard-00001.tokens.npy", -1)
    really_hash = verify_module.hash_blocks

    def refuse(file):
        if file.name.endswith("shard-00000.tokens.npy"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really_hash(file)

    monkeypatch.setattr(verify_module, "hash_blocks", refuse)
    with pytest.raises(CorruptError, match="2 of its files are damaged") as caught:
        verify(dataset)
    assert f"{dataset}/shard-00000.tokens.npy: cannot be read (Input/output error)" in str(
        caught.value
    )


def test_the_list_of_drops_is_checked_too(dataset):
    (dataset / "dropped.jsonl").write_text("{}")
    with pytest.raises(CorruptError, match=r"dropped\.jsonl: 2 bytes, but the manifest says 0"):
        verify(dataset)


def test_the_manifest_is_checked_first(dataset):
    flip(dataset / "manifest.json", 100)
    with pytest.raises(CorruptError, match=r"manifest\.json: does not match"):
        verify(dataset)


def test_no_dataset_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no such dataset folder"):
        verify(tmp_path / "nothing")


def test_foreign_files_are_told(dataset):
    (dataset / "notes.txt").write_text("mine")
    assert verify(dataset).unlisted == ("notes.txt",)


@pytest.mark.parametrize("wrong_id", [0, 1, 2, 400, 499, 500, 2**32 - 1])
def test_ids_that_text_never_gets_are_refused(tmp_path, tiny_tokenizer, wrong_id):
    folder = handmade(tmp_path / "d", tiny_tokenizer, [[5, 6], [7, wrong_id, 8]])
    with pytest.raises(CorruptError, match=rf"tokens\.npy: token 3 has the id {wrong_id}, which"):
        verify(folder)


def test_unknown_tokens_are_counted(tmp_path, tiny_tokenizer):
    folder = handmade(tmp_path / "d", tiny_tokenizer, [[5, 3, 6], [3, 7]])
    assert verify(folder).unknown_tokens == 2


def test_document_ends_that_do_not_increase_are_refused(tmp_path, tiny_tokenizer):
    folder = handmade(tmp_path / "d", tiny_tokenizer, [[5, 6], [7, 8]])
    path = folder / "shard-00000.doc_ends.npy"
    np.save(path, np.array([4, 4], "<i8"))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["shards"][0]["doc_ends_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    seal = f"{hashlib.sha256(content).hexdigest()}  manifest.json\n"
    (folder / "manifest.sha256").write_text(seal)
    with pytest.raises(CorruptError, match=r"doc_ends\.npy: the document ends do not increase"):
        verify(folder)


def test_another_tokenizer_than_promised_is_refused(tmp_path, tiny_tokenizer):
    folder = handmade(tmp_path / "d", tiny_tokenizer, [[5]], num_tokens_lie=100)
    with pytest.raises(CorruptError, match=r"promises a tokenizer with .*600\).* holds .*500\)"):
        verify(folder)


def test_the_roundtrip_counts_what_changes(tmp_path, tiny_tokenizer):
    model = Tokenizer.load(tiny_tokenizer)
    text = "kato mire suno lavi kato mire"
    ids = model.encode(text)
    word = model.pieces(ids)[1]
    # The same text in a longer segmentation: one piece of it spelled by smaller ones.
    spelled = [i for c in word for i in range(400) if model.pieces([i]) == [c]]
    assert len(spelled) == len(word) > 1
    odd = [ids[0], *spelled, *ids[2:]]
    assert model.decode(odd) == text
    folder = handmade(tmp_path / "d", tiny_tokenizer, [ids, odd, ids])
    report = measure_roundtrip(Dataset.open(folder), model, None)
    assert (report.documents, report.documents_changed) == (3, 1)
    assert report.tokens == 2 * len(ids) + len(odd)
    assert report.tokens_changed == len(spelled)
    assert report.document_rate == pytest.approx(1 / 3)


def test_a_sample_is_spread_over_the_documents(tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    model = Tokenizer.load(dataset.tokenizer_folder)
    counts = {s: dataset.manifest.num_documents(s) for s in ("train", "heldout")}
    sampled = measure_roundtrip(dataset, model, 10).documents
    assert sampled == sum(len(range(0, n, -(-n // 10))) for n in counts.values())


def test_rates_of_nothing_are_zero():
    report = RoundtripReport(0, 0, 0, 0)
    assert (report.document_rate, report.token_rate) == (0, 0)
