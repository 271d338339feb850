"""How shards are written, and how tokens, rows and documents of them are read."""

import hashlib
import io
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.manifest import BLOCK_BYTES, Manifest
from data_prep.npy_files import npy_header
from data_prep.shard_writer import ShardWriter
from data_prep.shards import Dataset, ShardReader
from tests.small_datasets import bare_manifest, make_dataset, write_shard


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


@settings(max_examples=25)
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
    parts = dataset.read_rows("train", starts, 510, (1, 2), 64)
    assert [len(part) for part in parts[:-1]] == [64] * (len(starts) // 64)
    expected = [[1, *dataset.read("train", start, start + 510), 2] for start in starts.tolist()]
    assert np.array_equal(np.concatenate(parts), expected)
    (long,) = dataset.read_rows("train", np.array([5, 1_299_999]), 1_400_000, (1, 2), 2)
    assert np.array_equal(long[0, 1:-2], dataset.read("train", 5, 1_400_004))
    assert np.array_equal(long[1, 1:-1], dataset.read("train", 1_299_999, 2_699_999))
    assert long[:, [0, -1]].tolist() == [[1, 2]] * 2


def test_rows_outside_the_split_are_an_error(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [[1, 2, 3]])])
    for start in (-1, 2):
        with pytest.raises(IndexError):
            dataset.read_rows("train", np.array([start]), 2, (8, 9), 1)
    assert dataset.read_rows("train", np.array([], np.int64), 2, (8, 9), 1) == []
    (rows,) = dataset.read_rows("train", np.array([1]), 2, (8, 9), 1)
    assert rows.tolist() == [[8, 2, 3, 9]]


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


def counted(method, counts):
    def call(self, *words, **options):
        counts[method.__name__] += 1
        return method(self, *words, **options)

    return call


def test_thousands_of_shards_open_with_a_look_at_each_file(tmp_path, monkeypatch):
    info = write_shard(tmp_path, 0, [[1, 2, 3]])
    shards = [replace(info, name=f"shard-{n:05d}") for n in range(3000)]
    for shard in shards[1:]:
        os.link(tmp_path / info.tokens_file, tmp_path / shard.tokens_file)
        os.link(tmp_path / info.doc_ends_file, tmp_path / shard.doc_ends_file)
    bare_manifest(shards).save(tmp_path)
    looks = Counter()
    for name in ("stat", "open"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name), looks))
    dataset = Dataset.open(tmp_path)
    monkeypatch.undo()
    assert looks["stat"] < 2 * len(shards) + 10
    assert looks["open"] < 2 * len(shards) + 10
    assert dataset.read("train", 8998, 9000).tolist() == [2, 3]


def test_the_fingerprint_is_what_sha256sum_prints(tmp_path):
    dataset = make_dataset(tmp_path, [("train", [[1]])])
    assert dataset.fingerprint == (tmp_path / "manifest.sha256").read_text().split()[0]
    content = (tmp_path / "manifest.json").read_bytes()
    assert dataset.fingerprint == hashlib.sha256(content).hexdigest()


def test_a_manifest_survives_saving_and_loading(tmp_path):
    info = write_shard(tmp_path, 0, [[1, 2], [3]])
    changes = {"dropped": {"empty text": 3}, "notes": {"blank line": 1}}
    manifest = bare_manifest([info], command="deberta-prep build", **changes)
    fingerprint = manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == (manifest, fingerprint)
    assert (manifest.num_tokens(), manifest.num_documents("train")) == (3, 2)
    assert (manifest.text_bytes("train"), manifest.num_tokens("heldout")) == (20, 0)


def test_a_reader_of_no_tokens_touches_nothing(tmp_path):
    info = write_shard(tmp_path, 0, [[1, 2]])
    reader = ShardReader(tmp_path / "elsewhere", info)
    assert reader.tokens(1, 1).size == 0
