"""Candidate pairs, exact Jaccard indices and clusters against their plain definitions."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dedup_clusters import join_pairs
from data_prep.dedup_files import Parts
from data_prep.dedup_matching import (
    MAX_DOCUMENTS,
    MatchJob,
    bucket_pairs,
    distinct,
    exact_jaccard,
    num_ranges,
)
from data_prep.errors import UserError

SETS = st.lists(st.tuples(*[st.frozensets(st.integers(0, 2**32 - 1), min_size=1)] * 2), max_size=6)


def pairs_of(hashes: list[int], documents: list[int]) -> set[tuple[int, int]]:
    order = sorted(range(len(hashes)), key=lambda n: (hashes[n], documents[n]))
    keys = bucket_pairs(
        np.array([hashes[n] for n in order], np.uint64),
        np.array([documents[n] for n in order], np.int64),
        1000,
    )
    assert (np.diff(keys) > 0).all()
    return {divmod(key, 1000) for key in keys.tolist()}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=60, unique=True))
def test_small_buckets_give_all_their_pairs(records):
    by_hash: dict[int, list[int]] = {}
    for value, document in records:
        by_hash.setdefault(value, []).append(document)
    small = [pair for pair in by_hash.items() if len(pair[1]) <= 16]
    kept = [(value, document) for value, documents in small for document in documents]
    expected = {(min(a, b), max(a, b)) for _, some in small for a in some for b in some if a != b}
    assert pairs_of([value for value, _ in kept], [document for _, document in kept]) == expected


def test_large_buckets_give_pairs_with_the_first_and_with_neighbours():
    documents = list(range(100, 140))
    expected = {(a, b) for a in documents for b in documents if 1 <= b - a <= 7}
    expected |= {(100, b) for b in documents[1:]}
    assert pairs_of([9] * 40, documents) == expected


def test_buckets_of_one_give_nothing():
    assert pairs_of([1, 2, 3], [5, 6, 7]) == set()
    assert pairs_of([], []) == set()


@given(SETS)
def test_jaccard_indices_are_exact(pairs):
    def keys(sets):
        found = [(n << 32) | value for n, values in enumerate(sets) for value in values]
        return np.array(sorted(found), np.uint64)

    found = exact_jaccard(keys([a for a, _ in pairs]), keys([b for _, b in pairs]), len(pairs))
    assert found.tolist() == [len(a & b) / len(a | b) for a, b in pairs]


@given(st.lists(st.integers(-5, 5), max_size=30))
def test_distinct_numbers(values):
    assert distinct(np.array(values, np.int64)).tolist() == sorted(set(values))


def plain_components(total: int, pairs: list[tuple[int, int]]) -> list[int]:
    firsts = list(range(total))
    for _ in range(total):
        for a, b in pairs:
            firsts[a] = firsts[b] = min(firsts[a], firsts[b])
    return firsts


@given(st.integers(1, 30), st.data())
def test_components_are_named_by_their_first_document(total, data):
    numbers = st.integers(0, total - 1)
    pairs = data.draw(st.lists(st.tuples(numbers, numbers), max_size=40))
    keys = np.array([a * total + b for a, b in pairs], np.int64)
    firsts = np.arange(total)
    join_pairs(firsts, total, lambda: np.array_split(keys, 3))
    assert firsts.tolist() == plain_components(total, pairs)


def test_a_long_chain_is_one_component():
    total = 20_000
    order = list(range(total))
    random.Random(0).shuffle(order)
    keys = np.array([a * total + b for a, b in pairwise(order)], np.int64)
    firsts = np.arange(total)
    join_pairs(firsts, total, lambda: [keys])
    assert not firsts.any()


def test_ranges_depend_on_the_number_of_hashes():
    assert [num_ranges(count) for count in (0, 1, 2**21, 2**21 + 1, 10**8)] == [1, 1, 1, 2, 48]


def test_too_many_documents_are_refused(tmp_path):
    rows = np.array([(0, 0, 0), (1, 0, MAX_DOCUMENTS + 1)], np.int64)
    with pytest.raises(UserError) as caught:
        MatchJob(Parts(tmp_path, rows), 1, 1, 0.8)
    assert "3,000,000,001 documents, and 3,000,000,000 can be compared at once" in str(caught.value)
