from collections import Counter

import numpy as np
import pytest

from data_prep.shards import Dataset
from data_prep.stats import dataset_stats, nearest_rank


def test_statistics_are_those_of_the_documents(tiny_dataset, tiny_corpus):
    dataset = Dataset.open(tiny_dataset)
    groups = {(group.source, group.split): group for group in dataset_stats(dataset)}
    sources = [str(tiny_corpus / name) for name in ("a.jsonl", "b.jsonl", "letters")]
    assert set(groups) == {
        (source, split) for source in [*sources, "all"] for split in ("train", "heldout")
    }
    for split in ("train", "heldout"):
        count = dataset.manifest.num_documents(split)
        documents = [dataset.document(split, n) for n in range(count)]
        for source in [*sources, "all"]:
            lengths = sorted(ids.size for ids, info in documents if source in ("all", info.source))
            group = groups[source, split]
            assert (group.documents, group.tokens) == (len(lengths), sum(lengths))
            assert group.mean == pytest.approx(np.mean(lengths))
            for share, found in ((50, group.p50), (90, group.p90), (99, group.p99)):
                assert found == np.percentile(lengths, share, method="inverted_cdf")
            assert group.longest == lengths[-1]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.01, 1), (0.25, 1), (0.26, 2), (0.75, 2), (0.76, 9), (1.0, 9)]
)
def test_nearest_rank(share, expected):
    assert nearest_rank(Counter({1: 1, 2: 2, 9: 1}), share) == expected


def test_no_values_have_no_percentile():
    with pytest.raises(ValueError, match="no values"):
        nearest_rank(Counter(), 0.5)
