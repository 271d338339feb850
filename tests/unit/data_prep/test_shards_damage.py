"""Datasets that are not what was written: what is found, when, and what the message says."""

import errno
import hashlib
import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import CorruptError, UserError
from data_prep.manifest import BLOCK_BYTES
from data_prep.shards import Dataset
from tests.small_datasets import flip, make_dataset


def read_everything(folder: Path) -> None:
    dataset = Dataset.open(folder)
    for split in ("train", "heldout"):
        dataset.read(split, 0, dataset.split_tokens(split))


def test_every_flipped_byte_is_found_and_its_file_named(tmp_path):
    rng = random.Random(0)
    original = tmp_path / "original"
    original.mkdir()
    documents = [rng.choices(range(1000), k=rng.randint(1, 50)) for _ in range(40)]
    make_dataset(original, [("train", documents[:30]), ("heldout", documents[30:])])
    files = sorted(p.relative_to(original) for p in original.rglob("*") if p.is_file())
    assert len(files) == 7
    for file in files:
        for _ in range(12):
            damaged = tmp_path / "damaged"
            shutil.copytree(original, damaged)
            flip(
                damaged / file,
                rng.randrange((damaged / file).stat().st_size),
                1 << rng.randrange(8),
            )
            with pytest.raises(CorruptError) as caught:
                read_everything(damaged)
            assert caught.value.exit_code == 88
            assert file.name in str(caught.value)
            shutil.rmtree(damaged)
    read_everything(original)


def test_opening_is_lazy_and_a_block_is_checked_at_its_first_read(tmp_path):
    make_dataset(tmp_path, [("train", [np.arange(2_500_000)])])
    first_of_block_1 = (BLOCK_BYTES - 128) // 4
    flip(tmp_path / "shard-00000.tokens.npy", BLOCK_BYTES + 17)
    dataset = Dataset.open(tmp_path)
    assert dataset.read("train", 0, first_of_block_1).size == first_of_block_1
    assert dataset.read("train", 2_200_000, 2_200_010).tolist() == list(range(2_200_000, 2_200_010))
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"shard-00000\.tokens\.npy: block 1 "):
            dataset.read("train", first_of_block_1, first_of_block_1 + 1)


def test_a_checked_block_is_not_hashed_again(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [[1, 2, 3]])])
    dataset.read("train", 0, 1)
    path = tmp_path / "shard-00000.tokens.npy"
    path.unlink()
    assert dataset.read("train", 0, 3).tolist() == [1, 2, 3]


def test_a_checked_block_that_somebody_writes_to_is_not_used(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [np.arange(100_000)])])
    dataset.read("train", 0, 100_000)
    path = tmp_path / "shard-00000.tokens.npy"
    flip(path, 128 + 4 * 70_000)
    os.utime(path, ns=(0, 1))
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"shard-00000\.tokens\.npy: block 0 \(bytes"):
            dataset.read("train", 0, 10)
    flip(path, 128 + 4 * 70_000)
    os.utime(path, ns=(0, 2))
    assert dataset.read("train", 69_999, 70_001).tolist() == [69_999, 70_000]


def test_a_checked_block_that_rots_on_the_disk_is_not_used(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [np.arange(2_500_000)])])
    dataset = Dataset.open(tmp_path, cache_bytes=1)  # one extent
    dataset.read("train", 0, 10)
    path = tmp_path / "shard-00000.tokens.npy"
    before = path.stat().st_mtime_ns
    flip(path, 128 + 4 * 70_000)
    os.utime(path, ns=(before, before))
    assert dataset.read("train", 69_999, 70_001).tolist() == [69_999, 70_000]  # as was checked
    dataset.read("train", 2_400_000, 2_400_010)
    with pytest.raises(CorruptError, match=r"shard-00000\.tokens\.npy: bytes from \d+ \(block 0\)"):
        dataset.read("train", 69_000, 71_000)
    assert dataset.read("train", 0, 10).tolist() == list(range(10))


def test_damaged_document_ends_stop_the_reading_of_rows(tmp_path):
    make_dataset(tmp_path, [("train", [[1, 2], [3]]), ("train", [[4]])])
    flip(tmp_path / "shard-00001.doc_ends.npy", 128)
    dataset = Dataset.open(tmp_path)
    dataset.read_rows("train", np.array([0]), 1, (0, 0), 1)
    with pytest.raises(CorruptError, match=r"shard-00001\.doc_ends\.npy"):
        dataset.read_rows("train", np.array([3]), 1, (0, 0), 1)


def test_damaged_document_ends_stop_the_reading_of_tokens(tmp_path):
    make_dataset(tmp_path, [("train", [[1, 2], [3]])])
    flip(tmp_path / "shard-00000.doc_ends.npy", 128)
    dataset = Dataset.open(tmp_path)
    with pytest.raises(CorruptError, match=r"shard-00000\.doc_ends\.npy"):
        dataset.read("train", 0, 1)


@pytest.mark.parametrize("file", ["shard-00001.tokens.npy", "tokenizer/spm.model"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "pipe"])
def test_missing_and_resized_files_are_refused_on_opening(tmp_path, file, damage):
    make_dataset(tmp_path, [("train", [[1, 2, 3]]), ("heldout", [[4, 5]])])
    path = tmp_path / file
    if damage == "missing":
        path.unlink()
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        os.truncate(path, path.stat().st_size + (1 if damage == "longer" else -1))
    message = {"missing": "cannot be read", "pipe": "not an ordinary file"}
    with pytest.raises(
        CorruptError, match=rf"{file}: .*{message.get(damage, 'but the manifest says')}"
    ):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "shard-00000.tokens.npy"])
def test_a_disk_that_refuses_on_opening_is_named(tmp_path, name, monkeypatch):
    make_dataset(tmp_path, [("train", [[1, 2, 3]])])
    really_open = io.open

    def refuse(path, *arguments, **options):
        if Path(path).name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(CorruptError, match=rf"{name}: cannot be read \(Input/output error\)"):
        Dataset.open(tmp_path)


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [np.arange(100_000)])])
    os.truncate(tmp_path / "shard-00000.tokens.npy", 1000)
    with pytest.raises(CorruptError, match="block 0"):
        dataset.read("train", 99_000, 100_000)


def test_another_header_is_refused_on_opening(tmp_path):
    make_dataset(tmp_path, [("train", [[1, 2, 3]])])
    path = tmp_path / "shard-00000.tokens.npy"
    np.save(path, np.array([1, 2, 3], "<i4"))
    with pytest.raises(CorruptError, match="header is not that of 3 uint32"):
        Dataset.open(tmp_path)


def reseal(folder: Path, change) -> None:
    """Change a manifest as somebody would who also writes a fitting seal."""
    values = json.loads((folder / "manifest.json").read_bytes())
    change(values)
    content = json.dumps(values).encode()
    (folder / "manifest.json").write_bytes(content)
    seal = f"{hashlib.sha256(content).hexdigest()}  manifest.json\n"
    (folder / "manifest.sha256").write_text(seal)


BAD_VALUES = {
    "shard name": (lambda v: v["shards"][0].update(name="../shard-00000"), "shard name"),
    "file name": (lambda v: v["files"][0].update(name="../../etc/passwd"), "leaves the folder"),
    "absolute": (lambda v: v["files"][0].update(name="/etc/passwd"), "leaves the folder"),
    "split": (lambda v: v["shards"][0].update(split="test"), "split 'test'"),
    "count": (lambda v: v["shards"][0].update(num_tokens=-1), "num_tokens -1 is not a count"),
    "bool": (lambda v: v["shards"][0].update(num_documents=True), "is not a count"),
    "hash": (lambda v: v["shards"][0].update(tokens_sha256="xyz"), "is not a sha256"),
    "vocabulary": (lambda v: v.update(vocab_size=2**33), "beyond uint32"),
    "twice": (lambda v: v["shards"].append(v["shards"][0]), "listed twice"),
    "unknown key": (lambda v: v.update(extra=1), "extra"),
    "missing key": (lambda v: v.pop("shards"), "shards"),
    "blocks": (lambda v: v["shards"][0].update(block_sha256s=[]), "lists 0 block hashes"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_impossible_manifests_are_refused(tmp_path, case):
    change, message = BAD_VALUES[case]
    make_dataset(tmp_path, [("train", [[1, 2, 3]])])
    reseal(tmp_path, change)
    with pytest.raises(CorruptError, match=message):
        Dataset.open(tmp_path)


def test_another_format_version_is_refused_with_the_cure(tmp_path):
    make_dataset(tmp_path, [("train", [[1]])])
    reseal(tmp_path, lambda values: values.update(format_version=2))
    with pytest.raises(
        UserError, match=r"format version 2, but this program reads version 1; build"
    ):
        Dataset.open(tmp_path)


def test_a_folder_that_is_no_dataset_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no such dataset folder"):
        Dataset.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="its build has not finished; run `deberta-prep build"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_half_a_manifest_is_corrupt(tmp_path, name):
    make_dataset(tmp_path, [("train", [[1]])])
    (tmp_path / name).unlink()
    with pytest.raises(CorruptError, match=rf"{name}: missing"):
        Dataset.open(tmp_path)
