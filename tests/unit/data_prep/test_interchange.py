import importlib.util
import json
import struct
import warnings
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.interchange import export_datasets, export_megatron, import_megatron
from data_prep.manifest import Manifest
from data_prep.megatron_files import MegatronReader, MegatronWriter
from data_prep.shards import Dataset
from data_prep.verify import verify
from tests.benchmarks.salted_text import build_dataset, train_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interchange")
    train_tokenizer(folder / "tokenizer")
    texts = [" ".join([f"document {n}:"] + ["some more words."] * (n % 7)) for n in range(200)]
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_dataset(source, folder / "tokenizer", folder / "dataset", heldout_fraction=0.2)
    return folder


def documents(dataset: Path, split) -> list[list[int]]:
    found = []
    for reader in Dataset.open(dataset).readers(split):
        bounds = [0, *reader.doc_ends().tolist()]
        found += [reader.tokens(a, b).tolist() for a, b in pairwise(bounds)]
    return found


def megatron_reader():
    """megatron-core's own module, without its package, which imports far more than it needs."""
    spec = importlib.util.find_spec("megatron")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("megatron-core is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional kernels that are not here
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    return IndexedDataset


def test_megatron_core_reads_what_is_exported(made, tmp_path):
    written = export_megatron(made / "dataset", tmp_path / "sub/pair")
    assert written == {
        str(tmp_path / f"sub/pair-{split}"): len(documents(made / "dataset", split))
        for split in ("train", "heldout")
    }
    indexed_dataset = megatron_reader()
    for split in ("train", "heldout"):
        theirs = indexed_dataset(str(tmp_path / f"sub/pair-{split}"))
        ours = documents(made / "dataset", split)
        assert len(theirs) == len(ours)
        assert [theirs[n].tolist() for n in range(len(theirs))] == ours
        assert theirs.document_indices.tolist() == list(range(len(ours) + 1))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "u2"), (65_500, "i4"), (128_100, "i4")])
def test_small_vocabularies_take_two_bytes_a_token(tmp_path, vocab_size, dtype):
    with MegatronWriter(tmp_path / "a", vocab_size) as writer:
        writer.append(np.array([5, 6, vocab_size - 1], np.uint32), np.array([1, 2]))
        size = writer.finish()
    reader = MegatronReader(tmp_path / "a")
    assert reader.dtype == np.dtype(dtype)
    assert [d.tolist() for d in reader.documents()] == [[5], [6, vocab_size - 1]]
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("end", [None, 2])
def test_a_dataset_survives_the_way_there_and_back(made, tmp_path, end):
    export_megatron(made / "dataset", tmp_path / "pair", end)
    manifest = import_megatron(
        [tmp_path / "pair-train", tmp_path / "pair-heldout"],
        made / "tokenizer",
        tmp_path / "back",
        heldout_fraction=0,
        end_of_document=end,
    )
    both = documents(made / "dataset", "train") + documents(made / "dataset", "heldout")
    assert documents(tmp_path / "back", "train") == both
    assert [s.name for s in manifest.sources] == [
        f"{tmp_path}/pair-train",
        f"{tmp_path}/pair-heldout",
    ]
    assert verify(tmp_path / "back").roundtrip.documents_changed == 0
    assert Manifest.load(tmp_path / "back")[0] == manifest
    assert ("--end-of-document 2" in manifest.command) == (end is not None)


def test_splits_of_an_import_go_by_the_text(made, tmp_path):
    export_megatron(made / "dataset", tmp_path / "pair")
    for prefix in ("pair-train", "pair-heldout"):
        import_megatron([tmp_path / prefix], made / "tokenizer", tmp_path / f"{prefix}-back", 0.2)
    # These texts are normalized already, so that the hash is that of the build.
    assert documents(tmp_path / "pair-train-back", "heldout") == []
    assert documents(tmp_path / "pair-heldout-back", "train") == []


def test_datasets_reads_what_is_exported(made, tmp_path):
    counts = export_datasets(made / "dataset", tmp_path / "arrow")
    opened = datasets.load_from_disk(str(tmp_path / "arrow"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrow"]
    for split in ("train", "heldout"):
        ours = documents(made / "dataset", split)
        assert counts[split] == len(ours)
        assert opened[split]["input_ids"][:] == ours
        assert set(opened[split]["source"]) == {str(made / "text.jsonl")}


def test_documents_of_several_sequences_and_of_none_are_read(tmp_path, made):
    tokens = np.arange(10, 16, dtype="<i4")
    tokens.tofile(tmp_path / "a.bin")
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 3, 4)
    index += np.array([2, 1, 3], "<i4").tobytes() + np.array([0, 8, 12], "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(index + np.array([0, 2, 2, 3], "<i8").tobytes())
    reader = MegatronReader(tmp_path / "a")
    assert [d.tolist() for d in reader.documents()] == [[10, 11, 12], [], [13, 14, 15]]
    manifest = import_megatron([tmp_path / "a"], made / "tokenizer", tmp_path / "out", 0)
    assert (manifest.num_documents(), manifest.dropped) == (2, {"empty document": 1})


def break_magic(folder):
    (folder / "a.idx").write_bytes(b"X" + (folder / "a.idx").read_bytes()[1:])


def cut_index(folder):
    (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes()[:-8])


def cut_tokens(folder):
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-2])


def set_version(folder):
    data = bytearray((folder / "a.idx").read_bytes())
    data[9] = 7
    (folder / "a.idx").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_magic, "a.idx is not an index of Megatron's"),
        (cut_index, r"a.idx has \d+ bytes, its header promises \d+"),
        (cut_tokens, "a.idx does not fit a.bin"),
        (set_version, "has version 7 and tokens of type 8; read are version 1"),
        (lambda folder: (folder / "a.bin").unlink(), "a.bin cannot be read .*before .bin and .idx"),
    ],
)
def test_a_pair_that_cannot_be_is_refused(made, tmp_path, damage, message):
    with MegatronWriter(tmp_path / "a", 8100) as writer:
        writer.append(np.array([5, 6, 7], np.uint32), np.array([1, 2]))
        writer.finish()
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        import_megatron([tmp_path / "a"], made / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_never_overwritten(made, tmp_path):
    (tmp_path / "pair-train.idx").touch()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"pair-train.idx exists; choose another prefix"):
        export_megatron(made / "dataset", tmp_path / "pair")
    with pytest.raises(UserError, match="out exists; choose another folder"):
        export_datasets(made / "dataset", tmp_path / "out")
    with pytest.raises(UserError, match="out exists; choose another --output"):
        import_megatron([], made / "tokenizer", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pair-train.idx"]


@pytest.mark.parametrize(
    ("ids", "end", "message"),
    [
        ([5, 2], None, "document 0 holds the id 2; .* add --end-of-document 2"),
        ([5, 8000], None, "document 0 holds the id 8000; text has ids from 3 to 7999"),
        ([5, 6], 2, "document 0 ends with the id 6, not with --end-of-document 2"),
    ],
)
def test_ids_of_another_tokenizer_are_refused(made, tmp_path, ids, end, message):
    with MegatronWriter(tmp_path / "a", 9000) as writer:
        writer.append(np.array(ids, np.uint32), np.array([len(ids)]))
        writer.finish()
    with pytest.raises(UserError, match=message):
        import_megatron([tmp_path / "a"], made / "tokenizer", tmp_path / "out", 0, end)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_impossible_options_are_refused(made, tmp_path):
    with pytest.raises(UserError, match="--end-of-document 9999: not in the vocabulary of 8100"):
        export_megatron(made / "dataset", tmp_path / "pair", 9999)
    with pytest.raises(UserError, match=r"--heldout-fraction 0.9: must lie between 0 and 0.5"):
        import_megatron([tmp_path / "a"], made / "tokenizer", tmp_path / "out", 0.9)


def test_pairs_of_nothing_are_refused(made, tmp_path):
    with MegatronWriter(tmp_path / "a", 9000) as writer:
        writer.finish()
    with pytest.raises(UserError, match="no tokens in them; nothing to import"):
        import_megatron([tmp_path / "a"], made / "tokenizer", tmp_path / "out")
