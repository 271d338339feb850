"""MinHash: documents whose sets of shingles resemble each other share one of a few hashes.

A shingle is a run of words. For random functions h, min h(A) = min h(B) with the probability
J(A, B) = |A and B| / |A or B| (Broder 1997). `signatures` takes these minima for all documents at
once; `band_hashes` joins each `rows` of them, so that two documents share at least one of `bands`
hashes with the probability 1 - (1 - J^rows)^bands (Leskovec et al., Mining of Massive Datasets
3.4). With the default of 20 bands of 6 rows:

    J             0.3    0.5    0.7    0.8    0.9
    shared       .015    .27    .92   .998   1.00

- `MinHashOptions`: shingle length, bands, rows, and the Jaccard index that makes a duplicate.

Letters in names: S shingles, D documents, P functions ("permutations"), B bands.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.word_hashes import Ends, Hashes, mix

Shingles = NDArray[np.uint32]

# So many that their 256 KiB stay in the second-level cache while all functions pass over them.
_BLOCK_SHINGLES = 1 << 16
_SEED = 0x5EED


@dataclass(frozen=True)
class MinHashOptions:
    """What makes two documents near-duplicates, and how hard they are looked for.

    Args:
        threshold: Jaccard index from which two documents count as near-duplicates, in (0, 1].
        shingle_words: words of a shingle; documents of fewer are compared exactly only.
        bands: hashes of a document by which candidates are found.
        rows: minima that each of them joins.
    """

    threshold: float = 0.8
    shingle_words: int = 5
    bands: int = 20
    rows: int = 6

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: must lie above 0 and not above 1")
        for option, value, most in (
            ("shingle-words", self.shingle_words, 100),
            ("bands", self.bands, 1000),
            ("rows", self.rows, 100),
        ):
            if not 1 <= value <= most:
                raise UserError(f"--{option} {value}: must lie between 1 and {most}")

    def chance(self, jaccard: float) -> float:
        """Probability that two documents of a Jaccard index are compared at all."""
        return 1 - (1 - jaccard**self.rows) ** self.bands


def shingles_of(ngrams_S: Hashes) -> Shingles:
    """The upper 32 bits of hashes: enough for sets of some million shingles."""
    return (ngrams_S >> np.uint64(32)).astype(np.uint32)


def signatures(shingles_S: Shingles, ends_D: Ends, num_functions: int) -> NDArray[np.uint32]:
    """Minima of random functions over the shingles of each document.

    The functions are x -> a x mod 2^32 with random odd a: bijections of values that are random
    already.

    Args:
        shingles_S: shingles, document after document; repetitions do not matter.
        ends_D: where those of each document end; every document has at least one.
        num_functions: how many minima.

    Returns:
        uint32 [P, D].
    """
    factors_P = _factors(num_functions)
    minima_PD = np.full((num_functions, ends_D.size), 2**32 - 1, np.uint32)
    starts_D = np.append(0, ends_D[:-1])
    products = np.empty(min(_BLOCK_SHINGLES, shingles_S.size), np.uint32)
    for low in range(0, shingles_S.size, _BLOCK_SHINGLES):
        block = shingles_S[low : low + _BLOCK_SHINGLES]
        first = int(np.searchsorted(ends_D, low, side="right"))
        end = int(np.searchsorted(starts_D, low + block.size, side="left"))
        starts = np.maximum(starts_D[first:end] - low, 0)
        found = np.empty(end - first, np.uint32)
        for factor, minima_D in zip(factors_P, minima_PD, strict=True):
            np.multiply(block, factor, out=products[: block.size])
            np.minimum.reduceat(products[: block.size], starts, out=found)
            # A document may have begun in an earlier block.
            np.minimum(minima_D[first:end], found, out=minima_D[first:end])
    return minima_PD


def _factors(num_functions: int) -> NDArray[np.uint32]:
    # Spelled out, not drawn: NumPy's generators may change their streams between releases.
    numbers_P = mix(np.arange(1, num_functions + 1, dtype=np.uint64) + np.uint64(_SEED << 32))
    return (numbers_P >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def band_hashes(minima_PD: NDArray[np.uint32], options: MinHashOptions) -> Hashes:
    """Join the minima of each band into one hash.

    Args:
        minima_PD: of `signatures`, with P = bands x rows.
        options: the bands and rows.

    Returns:
        uint64 [B, D]; the number of the band is part of each hash, so that bands never meet.
    """
    shape = (options.bands, options.rows, minima_PD.shape[1])
    rows_BRD = minima_PD.reshape(shape).astype(np.uint64)
    hashes_BD = np.repeat(np.arange(options.bands, dtype=np.uint64)[:, None], shape[2], axis=1)
    for row in range(options.rows):
        hashes_BD = mix((hashes_BD << np.uint64(1)) + rows_BRD[:, row] + np.uint64(1))
    return hashes_BD
