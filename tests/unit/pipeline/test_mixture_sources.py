from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.config import DataSection
from pipeline.mixture import CYCLE, source_runs
from pipeline.mixture_sources import (
    describe_mixture,
    heldout_samples,
    is_mixture,
    mixture_sources,
)
from pipeline.sequences import SequenceStream

LENGTH = 12  # 10 tokens of text


def stream(*shards: tuple[str, int], **weights: float) -> SequenceStream:
    infos = [SimpleNamespace(source=source, num_tokens=count) for source, count in shards]
    dataset = SimpleNamespace(
        split_tokens=lambda split: sum(count for _, count in shards),
        manifest=SimpleNamespace(
            sources=[SimpleNamespace(name=n, weight=w) for n, w in weights.items()]
        ),
        readers=lambda split: [SimpleNamespace(info=info) for info in infos],
    )
    return SequenceStream(dataset, "train", LENGTH)  # pyright: ignore[reportArgumentType]


THREE = stream(("web", 1000), ("web", 995), ("wiki", 500), ("tiny", 3), ("last", 200))


def test_a_sequence_belongs_to_the_source_of_its_first_token():
    assert THREE.source_runs() == {
        "web": ((0, 200),),  # the last of them holds five tokens of wiki
        "wiki": ((200, 250),),
        "tiny": (),  # it lies in the last sequence of wiki
        "last": ((250, 270),),
    }
    assert THREE.source_tokens() == {"web": 1995, "wiki": 500, "tiny": 3, "last": 200}


def test_shards_of_a_source_need_not_be_neighbours():
    runs = source_runs(
        [SimpleNamespace(source=s, num_tokens=n) for s, n in (("a", 20), ("b", 15), ("a", 30))],  # pyright: ignore
        10,
    )
    assert runs == {"a": ((0, 2), (4, 7)), "b": ((2, 4),)}


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_belongs_to_one_source(seed):
    rng = np.random.default_rng(seed)
    shards = [(f"s{rng.integers(3)}", int(rng.integers(1, 60))) for _ in range(12)]
    some = stream(*shards)
    owned = [n for runs in some.source_runs().values() for a, b in runs for n in range(a, b)]
    assert sorted(owned) == list(range(some.num_sequences))


def shares(**data) -> dict[str, float]:
    sources = mixture_sources(THREE, DataSection.model_validate(data))
    return {source.name: source.share / CYCLE for source in sources}


def test_weights_multiply_sizes():
    found = shares(source_weights={"wiki": 2.0})
    total = 1995 + 1000 + 200
    assert found == pytest.approx(
        {"web": 1995 / total, "wiki": 1000 / total, "last": 200 / total}, abs=1e-4
    )


def test_an_exponent_lifts_small_sources():
    assert shares(sampling_exponent=0) == pytest.approx(
        dict.fromkeys(("web", "wiki", "last"), 1 / 3), abs=1e-4
    )
    assert shares(sampling_exponent=0.3)["last"] > 3 * 200 / 2698


def test_a_weight_of_zero_leaves_a_source_out():
    assert set(shares(source_weights={"web": 0})) == {"wiki", "last"}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"wikki": 1},
            r'names "wikki", which is no source of the dataset; did you mean "wiki"\? It has web',
        ),
        ({"x" * 9: 1}, r"is no source of the dataset. It has web, wiki, tiny, last"),
        ({"web": 0, "wiki": 0, "last": 0}, "leaves no source with text to train on; give one"),
    ],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        mixture_sources(THREE, DataSection.model_validate({"source_weights": weights}))


def test_heldout_sequences_are_those_of_all_sources():
    plain = heldout_samples(THREE, DataSection(), 30)
    assert {name: chosen.tolist() for name, chosen in plain.items()} == {"": list(range(30))}
    mixed = heldout_samples(THREE, DataSection(sampling_exponent=0.5), 63)
    assert {name: chosen.tolist() for name, chosen in mixed.items()} == {
        "web": list(range(21)),
        "wiki": list(range(200, 221)),
        "last": list(range(250, 270)),
    }


def test_a_mixture_is_told_in_words():
    assert describe_mixture({LENGTH: THREE}, DataSection(), {LENGTH: 100}) == []
    [line] = describe_mixture({LENGTH: THREE}, DataSection(sampling_exponent=0), {LENGTH: 600})
    assert line == (
        "mixture: web 0.333 of the samples, 1 epochs; wiki 0.333 of the samples, 4 epochs; "
        "last 0.333 of the samples, 10 epochs"
    )


def test_weights_of_the_recipe_hold_where_the_configuration_says_nothing():
    some = stream(("a", 100), ("b", 100), ("c", 100), a=3.0, b=0.0, c=1.0)
    assert is_mixture(some, DataSection())
    sources = mixture_sources(some, DataSection())
    assert [(source.name, source.share) for source in sources] == [("a", 49152), ("c", 16384)]
    config = DataSection.model_validate({"source_weights": {"b": 1, "a": 1}})
    assert [source.name for source in mixture_sources(some, config)] == ["a", "b", "c"]
    assert set(heldout_samples(some, DataSection(), 6)) == {"a", "b", "c"}
    assert not is_mixture(stream(("a", 100), a=1.0), DataSection())
