from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.mixture import CYCLE, MixtureOrder, MixtureSource, mixture_shares
from pipeline.sample_order import SampleOrder

RUNS = {"web": ((0, 5000), (5700, 6000)), "wiki": ((5000, 5650),), "tiny": ((5650, 5700),)}


def order(shares: dict[str, int], seed: int = 1, length: int = 128) -> MixtureOrder:
    sources = tuple(MixtureSource(name, RUNS[name], share) for name, share in shares.items())
    return MixtureOrder(sources, seed, length, block_sequences=16, window_blocks=4)


def owner_of(sample: int) -> str:
    return next(n for n, runs in RUNS.items() if any(a <= sample < b for a, b in runs))


SHARES = dict(zip(("web", "wiki", "tiny"), mixture_shares([5300, 650, 50], [1, 2, 5]), strict=True))


def test_shares_follow_weights_tokens_and_the_temperature():
    assert mixture_shares([300, 100], [1, 1]) == [CYCLE * 3 // 4, CYCLE // 4]
    assert mixture_shares([300, 100], [1, 3]) == [CYCLE // 2, CYCLE // 2]
    assert mixture_shares([10**12, 7], [1, 1], exponent=0) == [CYCLE // 2, CYCLE // 2]
    assert mixture_shares([10**12, 7, 0], [3, 1, 0], exponent=0) == [CYCLE * 3 // 4, CYCLE // 4, 0]
    tokens = [55_600_000_000, 300_000_000, 10_000_000]
    powers = np.array(tokens, float) ** 0.3
    expected = powers / powers.sum() * CYCLE
    np.testing.assert_allclose(mixture_shares(tokens, [1, 1, 1], 0.3), expected, atol=1.5)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**12), st.floats(1e-6, 1e6) | st.just(0.0)),
        min_size=1,
        max_size=30,
    ).filter(lambda sources: any(weight for _, weight in sources)),
    st.floats(0, 1),
)
def test_shares_fill_a_cycle_and_forget_nobody(sources, exponent):
    tokens, weights = zip(*sources, strict=True)
    shares = mixture_shares(tokens, weights, exponent)
    assert sum(shares) == CYCLE
    assert [share > 0 for share in shares] == [weight > 0 for weight in weights]
    raw = [w * t**exponent for t, w in sources]
    exact = [value / sum(raw) * CYCLE for value in raw]
    # By rounding, and by what sources below one position got too much.
    assert all(abs(a - b) <= 1 + len(shares) for a, b in zip(shares, exact, strict=True))


def test_shares_of_nothing_are_refused():
    with pytest.raises(ValueError, match="0 sources cannot share 65536 positions"):
        mixture_shares([5], [0])
    with pytest.raises(ValueError, match="65537 sources cannot share"):
        mixture_shares([1] * (CYCLE + 1), [1] * (CYCLE + 1))


def test_each_cycle_holds_each_source_in_its_share():
    mixture = order(SHARES)
    for cycle in (0, 1, 5):
        positions = np.arange(cycle * CYCLE, (cycle + 1) * CYCLE)
        _, samples = mixture.samples(positions)
        assert Counter(map(owner_of, samples.tolist())) == SHARES


def test_the_shares_hold_within_a_cycle_too():
    _, samples = order({"web": CYCLE // 2, "wiki": CYCLE // 2}).samples(np.arange(4000))
    counts = Counter(map(owner_of, samples.tolist()))
    # Five standard deviations of draws without replacement.
    assert abs(counts["web"] - 2000) < 160


def test_every_epoch_of_a_source_holds_each_sample_once():
    epochs, samples = order(SHARES).samples(np.arange(2 * CYCLE))
    for name, runs in RUNS.items():
        mine = {sample for first, end in runs for sample in range(first, end)}
        here = np.isin(samples, list(mine))
        seen = Counter(zip(epochs[here].tolist(), samples[here].tolist(), strict=True))
        assert set(seen.values()) == {1}
        complete = int(epochs[here].max())
        assert complete >= 2
        for epoch in range(complete):
            assert {s for e, s in seen if e == epoch} == mine, name


@given(st.lists(st.integers(0, 10 * CYCLE), min_size=1, max_size=50))
@settings(max_examples=20)
def test_a_position_is_the_same_sample_in_any_company(positions):
    mixture = order(SHARES)
    together = mixture.samples(np.array(positions, np.int64))
    for index, position in enumerate(positions):
        alone = mixture.samples(np.array([position], np.int64))
        assert [int(a[0]) for a in alone] == [int(a[index]) for a in together]


def test_seeds_and_lengths_have_orders_of_their_own():
    positions = np.arange(1000)
    first = order(SHARES).samples(positions)[1]
    assert (first != order(SHARES, seed=2).samples(positions)[1]).mean() > 0.9
    assert (first != order(SHARES, length=256).samples(positions)[1]).mean() > 0.9


def test_sources_of_one_size_are_not_shuffled_alike():
    plain = SampleOrder(100, 1, 128, 16, 4)
    named = SampleOrder(100, 1, 128, 16, 4, stream="web")
    positions = np.arange(100)
    assert (plain.samples(positions)[1] != named.samples(positions)[1]).any()
    assert sorted(named.samples(positions)[1].tolist()) == list(range(100))


@pytest.mark.parametrize("position", [0, 1, 777, CYCLE, 3 * CYCLE + 12_345])
def test_passes_count_what_each_source_gave(position):
    mixture = order(SHARES)
    counts = Counter(map(owner_of, mixture.samples(np.arange(position))[1].tolist()))
    sizes = {name: sum(b - a for a, b in runs) for name, runs in RUNS.items()}
    assert mixture.passes_before(position) == {n: counts[n] / sizes[n] for n in SHARES}
