import errno
import hashlib
import io
import json
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import CorruptError, UserError
from data_prep.manifest import BLOCK_BYTES, FileInfo, Manifest
from data_prep.npy_files import npy_header
from data_prep.shards import Dataset, ShardInfo, ShardReader, ShardWriter

ZEROS = "0" * 64


def write_shard(folder: Path, index: int, documents, split="train", source="corpus") -> ShardInfo:
    with ShardWriter(folder, f"shard-{index:05d}", source, split) as writer:
        for document in documents:
            writer.write(document)
            writer.end_document(text_bytes=10)
        return writer.finish()


def make_manifest(shards, files=()) -> Manifest:
    return Manifest(
        vocab_size=1000,
        tokenizer_fingerprint=ZEROS,
        command="deberta-prep build",
        software={},
        sources=(),
        plan_sha256=ZEROS,
        dropped={},
        notes={},
        files=tuple(files),
        shards=tuple(shards),
    )


def make_dataset(folder: Path, shards: list[tuple[str, list[list[int]]]]) -> Dataset:
    infos = [write_shard(folder, n, docs, split) for n, (split, docs) in enumerate(shards)]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spm.model").write_bytes(b"model")
    file = FileInfo("tokenizer/spm.model", 5, hashlib.sha256(b"model").hexdigest())
    make_manifest(infos, [file]).save(folder)
    return Dataset.open(folder)


def flip(path: Path, position: int, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ bit]))


def read_everything(folder: Path) -> None:
    dataset = Dataset.open(folder)
    for split in ("train", "heldout"):
        dataset.read(split, 0, dataset.split_tokens(split))


@pytest.mark.parametrize(("dtype", "count"), [("<u4", 0), ("<u4", 123), ("<i8", 2**40)])
def test_the_header_is_the_one_that_numpy_writes(dtype, count):
    expected = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        expected, {"descr": dtype, "fortran_order": False, "shape": (count,)}
    )
    assert npy_header(np.dtype(dtype), count) == expected.getvalue()
    assert len(expected.getvalue()) == 128


def test_plain_numpy_opens_the_worked_example(tmp_path):
    write_shard(tmp_path, 0, [[17, 4, 9], [250, 8], [31, 31, 5]])
    tokens = np.load(tmp_path / "shard-00000.tokens.npy", mmap_mode="r")
    doc_ends = np.load(tmp_path / "shard-00000.doc_ends.npy", mmap_mode="r")
    assert (tokens.dtype, doc_ends.dtype) == (np.uint32, np.int64)
    assert tokens.tolist() == [17, 4, 9, 250, 8, 31, 31, 5]
    assert doc_ends.tolist() == [3, 5, 8]


def test_the_hashes_are_those_of_the_files(tmp_path):
    info = write_shard(tmp_path, 0, [np.arange(2_500_000)])
    content = (tmp_path / "shard-00000.tokens.npy").read_bytes()
    blocks = [content[n : n + BLOCK_BYTES] for n in range(0, len(content), BLOCK_BYTES)]
    assert len(blocks) == 3
    assert info.tokens_sha256 == hashlib.sha256(content).hexdigest()
    assert list(info.block_sha256s) == [hashlib.sha256(block).hexdigest() for block in blocks]
    ends = (tmp_path / "shard-00000.doc_ends.npy").read_bytes()
    assert info.doc_ends_sha256 == hashlib.sha256(ends).hexdigest()


def test_a_writer_that_does_not_finish_leaves_nothing(tmp_path):
    with ShardWriter(tmp_path, "shard-00000", "s", "train") as writer:
        writer.write([1, 2])
        assert len(list(tmp_path.glob("*.partial"))) == 2
    assert not list(tmp_path.iterdir())


def test_ids_beyond_uint32_are_refused(tmp_path):
    with (
        ShardWriter(tmp_path, "shard-00000", "s", "train") as writer,
        pytest.raises(OverflowError),
    ):
        writer.write([2**32])


SHARDS = st.lists(
    st.tuples(
        st.sampled_from(["train", "heldout"]),
        st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=5), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(SHARDS, st.data())
def test_a_split_is_its_shards_end_to_end(tmp_path_factory, shards, data):
    dataset = make_dataset(tmp_path_factory.mktemp("d"), shards)
    for split in ("train", "heldout"):
        documents = [doc for name, docs in shards if name == split for doc in docs]
        stream = [token for document in documents for token in document]
        assert dataset.split_tokens(split) == len(stream)
        start = data.draw(st.integers(0, len(stream)))
        end = data.draw(st.integers(start, len(stream)))
        found = dataset.read(split, start, end)
        assert found.dtype == np.uint32
        assert found.tolist() == stream[start:end]
        read = [dataset.document(split, n)[0].tolist() for n in range(len(documents))]
        assert read == documents


def test_a_range_outside_the_split_is_an_error(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [[1, 2, 3]])])
    for start, end in [(-1, 2), (0, 4), (2, 1)]:
        with pytest.raises(IndexError):
            dataset.read("train", start, end)
        with pytest.raises(IndexError):
            dataset.readers("train")[0].tokens(start, end)


def test_a_missing_document_is_a_users_error(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [[1, 2, 3]])])
    with pytest.raises(UserError, match="no document 1 in split train, which has 1 documents"):
        dataset.document("train", 1)


def test_what_is_read_is_a_copy(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [[1, 2, 3]])])
    dataset.read("train", 0, 3)[:] = 9
    assert dataset.read("train", 0, 3).tolist() == [1, 2, 3]


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


@pytest.mark.parametrize("cache_bytes", [1, 2**30])
def test_rows_are_what_is_read_one_by_one(tmp_path, cache_bytes):
    """Across blocks, extents and shards; three shards of the split with another between them."""
    tokens = np.random.default_rng(0).integers(0, 2**32, 2_800_000)
    parts = [("train", tokens[:1_300_000]), ("heldout", tokens[:7]), ("train", tokens[:3])]
    shards = [(split, [part]) for split, part in [*parts, ("train", tokens[1_300_000:])]]
    make_dataset(tmp_path, shards)
    dataset = Dataset.open(tmp_path, cache_bytes)
    ends = np.cumsum([0, 1_300_000, 3, 1_500_000])
    edges = [0, 262_112, 1_048_544, 1_300_000, 1_300_003, 1_562_115, ends[-1]]
    starts = np.array([edge + move for edge in edges for move in range(-600, 600, 17)])
    starts = np.random.default_rng(1).permutation(
        starts[(starts >= 0) & (starts + 510 <= ends[-1])]
    )
    out = np.zeros((len(starts), 512), np.uint32)
    dataset.read_rows("train", starts, out[:, 1:-1])
    assert not out[:, [0, -1]].any()
    expected = [dataset.read("train", start, start + 510) for start in starts.tolist()]
    assert np.array_equal(out[:, 1:-1], expected)
    long = np.zeros((2, 1_400_000), np.uint32)
    dataset.read_rows("train", np.array([5, 1_299_999]), long)
    assert np.array_equal(long[0, :-1], dataset.read("train", 5, 1_400_004))
    assert np.array_equal(long[1], dataset.read("train", 1_299_999, 2_699_999))


def test_rows_outside_the_split_are_an_error(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [[1, 2, 3]])])
    out = np.zeros((1, 2), np.uint32)
    for start in (-1, 2):
        with pytest.raises(IndexError):
            dataset.read_rows("train", np.array([start]), out)
    dataset.read_rows("train", np.array([], np.int64), out[:0])
    dataset.read_rows("train", np.array([1]), out)
    assert out.tolist() == [[2, 3]]


def test_damaged_document_ends_stop_the_reading_of_rows(tmp_path):
    make_dataset(tmp_path, [("train", [[1, 2], [3]]), ("train", [[4]])])
    flip(tmp_path / "shard-00001.doc_ends.npy", 128)
    dataset = Dataset.open(tmp_path)
    out = np.zeros((1, 1), np.uint32)
    dataset.read_rows("train", np.array([0]), out)
    with pytest.raises(CorruptError, match=r"shard-00001\.doc_ends\.npy"):
        dataset.read_rows("train", np.array([3]), out)


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


def test_threads_share_a_dataset(tmp_path):
    tokens = np.arange(3_000_000)
    dataset = make_dataset(
        tmp_path, [("train", [tokens[:1_700_000]]), ("train", [tokens[1_700_000:]])]
    )
    starts = np.random.default_rng(0).integers(0, 2_990_000, 200).tolist()

    def is_right(start: int) -> bool:
        return np.array_equal(
            dataset.read("train", start, start + 10_000), tokens[start : start + 10_000]
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, starts))


def test_thousands_of_shards_open_quickly(tmp_path):
    info = write_shard(tmp_path, 0, [[1, 2, 3]])
    shards = [replace(info, name=f"shard-{n:05d}") for n in range(3000)]
    for shard in shards[1:]:
        os.link(tmp_path / info.tokens_file, tmp_path / shard.tokens_file)
        os.link(tmp_path / info.doc_ends_file, tmp_path / shard.doc_ends_file)
    make_manifest(shards).save(tmp_path)
    began = time.perf_counter()
    dataset = Dataset.open(tmp_path)
    assert time.perf_counter() - began < 5
    assert dataset.read("train", 8998, 9000).tolist() == [2, 3]


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


def test_the_fingerprint_is_what_sha256sum_prints(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [[1]])])
    assert dataset.fingerprint == (tmp_path / "manifest.sha256").read_text().split()[0]
    content = (tmp_path / "manifest.json").read_bytes()
    assert dataset.fingerprint == hashlib.sha256(content).hexdigest()


def test_a_manifest_survives_saving_and_loading(tmp_path):
    info = write_shard(tmp_path, 0, [[1, 2], [3]])
    manifest = replace(make_manifest([info]), dropped={"empty text": 3}, notes={"blank line": 1})
    fingerprint = manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == (manifest, fingerprint)
    assert (manifest.num_tokens(), manifest.num_documents("train")) == (3, 2)
    assert (manifest.text_bytes("train"), manifest.num_tokens("heldout")) == (20, 0)


def test_a_reader_of_no_tokens_touches_nothing(tmp_path):
    info = write_shard(tmp_path, 0, [[1, 2]])
    reader = ShardReader(tmp_path / "elsewhere", info)
    assert reader.tokens(1, 1).size == 0
