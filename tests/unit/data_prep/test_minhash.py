"""Signatures against their definition, and their law against the Jaccard index."""

import random

import numpy as np
import pytest

from data_prep import minhash
from data_prep.errors import UserError
from data_prep.minhash import MinHashOptions, band_hashes, shingles_of, signatures
from data_prep.word_hashes import hash_texts, ngram_hashes


def sign(texts: list[str], num_functions: int = 120):
    hashed = hash_texts(texts)
    ngrams, ends = ngram_hashes(hashed.words_W, hashed.ends_D, 5)
    return signatures(shingles_of(ngrams), ends, num_functions)


def similar_texts(count: int, words: int) -> tuple[list[str], np.ndarray]:
    """Pairs of texts, one after the other, and the exact Jaccard index of each pair."""
    rng = random.Random(words)
    texts, indices = [], []
    for _ in range(count):
        one = [f"w{rng.randrange(9999)}" for _ in range(words)]
        other = list(one)
        for _ in range(rng.randint(1, words // 20)):
            other[rng.randrange(words)] = f"w{rng.randrange(9999)}"
        sets = [{tuple(t[n : n + 5]) for n in range(words - 4)} for t in (one, other)]
        indices.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        texts += [" ".join(one), " ".join(other)]
    return texts, np.array(indices)


def test_signatures_are_minima_of_products(monkeypatch):
    monkeypatch.setattr(minhash, "_BLOCK_SHINGLES", 7)
    rng = np.random.default_rng(0)
    shingles = rng.integers(0, 2**32, 60, dtype=np.uint32)
    ends = np.array([1, 6, 7, 30, 44, 60])
    found = signatures(shingles, ends, 5)
    factors = signatures(np.array([1], np.uint32), np.array([1]), 5)[:, 0]
    assert (factors % 2 == 1).all()
    for part, minima in zip(np.split(shingles, ends[:-1]), found.T, strict=True):
        products = part.astype(object)[:, None] * factors.astype(object)[None, :] % 2**32
        assert (products.min(axis=0) == minima).all()


@pytest.mark.parametrize("words", [40, 300])
def test_minima_agree_as_often_as_the_jaccard_index_says(words):
    texts, exact = similar_texts(400, words)
    minima = sign(texts)
    found = (minima[:, 0::2] == minima[:, 1::2]).mean(axis=0)
    deviations = (found - exact) / np.sqrt(exact * (1 - exact) / 120 + 1e-9)
    deviations = deviations[exact < 1]
    # Four standard errors of a mean, and of a standard deviation, of 400 draws.
    assert abs(deviations.mean()) < 4 / 20
    assert abs(deviations.std() - 1) < 4 / 20 / 2**0.5


def test_bands_are_shared_as_often_as_the_formula_says():
    texts, exact = similar_texts(500, 60)
    options = MinHashOptions(bands=4, rows=6)
    bands = band_hashes(sign(texts, 24), options)
    shared = (bands[:, 0::2] == bands[:, 1::2]).any(axis=0)
    chances = np.array([options.chance(value) for value in exact])
    error = np.sqrt((chances * (1 - chances)).sum())
    assert abs(shared.sum() - chances.sum()) < 4 * error


def test_bands_of_other_rows_never_meet():
    minima = np.full((120, 3), 7, np.uint32)
    bands = band_hashes(minima, MinHashOptions())
    assert len(np.unique(bands)) == 20
    assert (bands[:, :1] == bands).all()
    minima[119, 1] += 1
    minima[0, 2] += 1
    changed = band_hashes(minima, MinHashOptions()) != bands
    assert changed[:, 1].tolist() == [False] * 19 + [True]
    assert changed[:, 2].tolist() == [True] + [False] * 19


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0.0}, "--threshold 0.0: must lie above 0 and not above 1"),
        ({"threshold": 1.1}, "--threshold 1.1"),
        ({"shingle_words": 0}, "--shingle-words 0: must lie between 1 and 100"),
        ({"bands": 0}, "--bands 0: must lie between 1 and 1000"),
        ({"rows": 101}, "--rows 101: must lie between 1 and 100"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(UserError) as caught:
        MinHashOptions(**values)
    assert message in str(caught.value)
