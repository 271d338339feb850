"""Which source every sample comes from: shares by weight and temperature, a function of position.

    runs = source_runs(shards, content)                    shards -> sequences of each source
    shares = mixture_shares(tokens, weights, exponent)     sources -> parts of a cycle
    MixtureOrder(...).samples(positions)                   position -> epoch and sample

A dataset's sources are drawn from in fixed shares instead of in proportion to their sizes. The
endless order is cut into cycles of 65,536 positions; in each cycle every source has exactly its
share of the positions, at places that a keyed permutation spreads over the cycle. The k-th of a
source's positions takes the k-th sample of that source's own endless order (`SampleOrder`), so that
each source goes through epochs of its own, and nothing but the position is needed to know a sample:
any number of ranks, any step, no state. Example with shares 3 and 1 and a cycle of 4: the positions
0 1 2 3 may belong to A A B A, the next four to B A A A.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.manifest import ShardInfo
from pipeline.counter_rng import stream_key
from pipeline.sample_order import Int64Array, SampleOrder, permute

CYCLE = 1 << 16
"""Positions in which every source has its share; a share is a multiple of 1 in so many."""


def source_runs(
    shards: Sequence[ShardInfo], content: int
) -> dict[str, tuple[tuple[int, int], ...]]:
    """Tell which sequences of a split belong to which source: that of their first token.

    Args:
        shards: Those of the split, in their order.
        content: Tokens of a sequence, without [CLS] and [SEP].

    Returns:
        Source, in the order of its first shard -> (first, behind the last) of its sequences, run
        by run; none for a source that lies within a sequence that another one begins.
    """
    runs: dict[str, list[tuple[int, int]]] = {}
    start = 0
    for shard in shards:
        own = runs.setdefault(shard.source, [])
        first, end = -(-start // content), -(-(start + shard.num_tokens) // content)
        if own and own[-1][1] == first:
            own[-1] = (own[-1][0], end)
        elif first < end:
            own.append((first, end))
        start += shard.num_tokens
    return {source: tuple(own) for source, own in runs.items()}


def mixture_shares(
    tokens: Sequence[int], weights: Sequence[float], exponent: float = 1.0
) -> list[int]:
    """Divide a cycle among sources: share ~ weight x tokens ^ exponent.

    With the exponent 1 a weight says how often a source is read while one of weight 1 is read once;
    with 0 the weights are the shares themselves; in between small sources are read more often than
    large ones (1 / exponent is the temperature of sampling over languages).

    Args:
        tokens: Tokens of each source; at least 1 where the weight is not 0.
        weights: Weight of each source, 0 to leave it out; at least one is positive.
        exponent: In [0, 1].

    Returns:
        The positions of each in a cycle; their sum is `CYCLE`, and a source that is not left out
        has at least one.

    Raises:
        ValueError: Nothing has a weight, or there are more sources than positions.

    Source:
        Conneau et al., arXiv:1911.02116, section 3.1 (exponent 0.3).
    """
    # By logarithms: 10^12 tokens to any power are as good as any other number.
    raw = np.array(
        [
            weight * np.exp(exponent * np.log(count)) if weight > 0 else 0.0
            for count, weight in zip(tokens, weights, strict=True)
        ]
    )
    used = raw > 0
    if not used.any() or used.sum() > CYCLE:
        raise ValueError(f"{int(used.sum())} sources cannot share {CYCLE} positions")
    exact = raw / raw.sum() * CYCLE
    shares = np.where(used, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    missing = CYCLE - int(shares.sum())
    if missing >= 0:
        # The largest remainders round up; of equal ones the first, so that the result is one.
        shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    for _ in range(-missing):
        shares[np.argmax(shares)] -= 1  # what sources below one position got too much
    return shares.tolist()


@dataclass(frozen=True)
class MixtureSource:
    """A source of a split, as sequences of one length."""

    name: str
    """As in the dataset's manifest."""
    runs: tuple[tuple[int, int], ...]
    """Its sequences: (first, behind the last) of each run of neighbours."""
    share: int
    """Its positions in a cycle; 0 leaves it out."""

    @cached_property
    def num_samples(self) -> int:
        """Its sequences."""
        return sum(end - first for first, end in self.runs)

    def sample(self, index: Int64Array) -> Int64Array:
        """Look up sequences of the split.

        Args:
            index: int64 [n], counted within the source.

        Returns:
            int64 [n], counted within the split.
        """
        firsts = np.array([first for first, _ in self.runs], np.int64)
        lengths = np.array([end - first for first, end in self.runs], np.int64)
        before = np.cumsum(lengths) - lengths
        run = np.searchsorted(before, index, side="right") - 1
        return firsts[run] + index - before[run]


@dataclass(frozen=True)
class MixtureOrder:
    """The order of the samples of a mixture, as a function of position."""

    sources: tuple[MixtureSource, ...]
    """Those with a share; their shares add up to `CYCLE`."""
    seed: int
    sequence_length: int
    block_sequences: int
    window_blocks: int

    def samples(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Look up positions of the endless order.

        Args:
            positions: int64 [n].

        Returns:
            (epochs, samples), int64 [n] each; the epoch is that of the sample's source, and every
            epoch of a source holds each of its samples exactly once.
        """
        owners, turns = self._turns(positions)
        epochs, samples = np.empty_like(positions), np.empty_like(positions)
        for owner in np.unique(owners).tolist():
            here = np.flatnonzero(owners == owner)
            source = self.sources[owner]
            epochs[here], local = self._order(owner).samples(turns[here])
            samples[here] = source.sample(local)
        return epochs, samples

    def passes_before(self, position: int) -> dict[str, float]:
        """Give the epochs of each source after so many positions.

        Args:
            position: Positions used up.

        Returns:
            Name of the source -> epochs, with fraction.
        """
        cycles, rest = divmod(position, CYCLE)
        owners, _ = self._turns(cycles * CYCLE + np.arange(rest, dtype=np.int64))
        counts = np.bincount(owners, minlength=len(self.sources))
        return {
            source.name: (cycles * source.share + int(count)) / source.num_samples
            for source, count in zip(self.sources, counts, strict=True)
        }

    @cached_property
    def _ends(self) -> Int64Array:
        return np.cumsum([source.share for source in self.sources])

    def _turns(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """For each position the source whose turn it is, and how many turns that had before."""
        cycles, within = np.divmod(positions, CYCLE)
        places = np.empty_like(positions)
        for cycle in np.unique(cycles).tolist():
            here = np.flatnonzero(cycles == cycle)
            key = stream_key(self.seed, "order/mixture", self.sequence_length, cycle)
            places[here] = permute(within[here], CYCLE, key)
        owners = np.searchsorted(self._ends, places, side="right")
        shares = np.diff(self._ends, prepend=0)[owners]
        return owners, cycles * shares + places - (self._ends[owners] - shares)

    def _order(self, owner: int) -> SampleOrder:
        return SampleOrder(
            self.sources[owner].num_samples,
            self.seed,
            self.sequence_length,
            self.block_sequences,
            self.window_blocks,
            stream=self.sources[owner].name,
        )
