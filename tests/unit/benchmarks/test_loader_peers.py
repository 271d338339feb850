"""The peers of the loader and of the masking read and mask what ours do."""

import random

import numpy as np
import pytest
import torch

from pipeline.sequences import SequenceStream
from tests.benchmarks import bench_masking, loader_peers
from tests.benchmarks.bench_loader import training


def test_all_store_the_same_sequences(tmp_path):
    dataset = loader_peers.write_dataset(tmp_path / "dataset", 6)
    loader_peers.write_indexed(tmp_path / "megatron", 6)
    expected = loader_peers.framed(loader_peers.random_tokens(6, 0))
    places = np.array([5, 0, 3])
    batch = SequenceStream(dataset, "train", loader_peers.LENGTH).batch(
        places, np.zeros_like(places)
    )
    assert torch.equal(batch.input_ids_BL, torch.from_numpy(expected[places]).long())
    opened, what = loader_peers.open_indexed(tmp_path / "megatron")
    assert what.startswith(("megatron-core ", "re-derived, for megatron-core gives "))
    for indexed in (opened, loader_peers.IndexedTokens(str(tmp_path / "megatron"))):
        for place in places.tolist():
            assert np.array_equal(indexed.get(place), expected[place])
            assert indexed.get(place).dtype == np.int32
    assert [len(each.lengths_B) for each in training(dataset, 4, 2).at_step(0)] == [2, 2]


def test_an_index_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.idx").write_bytes(loader_peers._HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 0, 1))
    with pytest.raises(ValueError, match=r"x\.idx: not an index of int32 tokens"):
        loader_peers.IndexedTokens(str(tmp_path / "x"))


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_the_re_derived_original_masks_a_window_at_a_time(max_ngram):
    names = {f"piece{number}": number for number in range(4, 600)}
    original = bench_masking.Original(bench_masking.SPECIAL | names, max_ngram)
    tokens = ["[CLS]", *list(names)[:510], "[SEP]"]
    for seed in range(20):
        found = original(list(tokens), random.Random(seed))
        chosen = (found["input_ids"] == bench_masking.MASK_ID).nonzero().flatten()
        assert len(chosen) == 77 if max_ngram == 1 else 77 <= len(chosen) < 77 + max_ngram
        assert torch.equal(found["labels"].nonzero().flatten(), chosen)
        assert found["labels"][chosen].tolist() == [names[tokens[place]] for place in chosen]
        if max_ngram == 1:
            assert ((chosen - 1) // 6).tolist() == list(range(77))
