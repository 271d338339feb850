"""Minimal pairs: scores against a plain derivation, any split into passes and ranks, the file."""

import json

import pytest
import torch
from torch.nn import functional as F

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.minimal_pairs import (
    MinimalPair,
    MinimalPairs,
    evaluate_minimal_pairs,
    minimal_pair_scores,
    read_minimal_pairs,
    within_budget,
)
from pipeline.rtd import DrawKey
from pipeline.runtime import World
from tests.commits import random_pair, run_config

PAIRS = (
    MinimalPair((1, 5, 9, 6, 2), (1, 5, 9, 7, 2), "number"),
    MinimalPair((1, 11, 3, 2), (1, 11, 12, 4, 13, 2), "order"),
    MinimalPair((1, 8, 2), (1, 10, 2), "number"),
)


@pytest.fixture(scope="module")
def pair(dataset_folder, tmp_path_factory):
    return random_pair(run_config(dataset_folder, tmp_path_factory.mktemp("run")), 3)


def options(pair, tokens=1000, rank=0, ranks=1):
    world = World(rank=rank, local_rank=0, world_size=ranks, device=torch.device("cpu"))

    def draw(batch):
        return DrawKey((1, 2), batch.sample_words_B2)

    mask_id = pair.generator.deberta.embeddings.word_embeddings.num_embeddings - 1
    return {"mask_id": mask_id, "draw": draw, "max_forward_tokens": tokens, "world": world}


@torch.no_grad()
def plain_scores(pair, ids, mask_id):
    """Token by token, one sentence at a time."""
    generator, length = pair.generator, len(ids)
    pseudo = 0.0
    for position in range(1, length - 1):
        masked = torch.tensor([ids])
        masked[0, position] = mask_id
        where, target = torch.tensor([[position]]), torch.tensor([[ids[position]]])
        valid = torch.ones(1, 1, dtype=torch.bool)
        pseudo -= float(generator(masked, None, where, valid, target, None, None).loss_sum)
    whole = torch.tensor([ids])
    rows = generator.token_embeddings(whole)
    logits = pair.discriminator(whole, rows, None, torch.zeros(1, length), None).logits_BL[0]
    original = float(F.logsigmoid(-logits[1:-1].double()).sum())
    return pseudo, original


def test_scores_are_those_of_a_plain_loop(pair):
    chosen = options(pair)
    scores = minimal_pair_scores(pair.predict, PAIRS, **chosen)
    for number, each in enumerate(PAIRS):
        for is_good, ids in enumerate((each.bad, each.good)):
            pseudo, original = plain_scores(pair, ids, chosen["mask_id"])
            assert float(scores["generator"][is_good][number]) == pytest.approx(pseudo, rel=1e-5)
            assert float(scores["discriminator"][is_good][number]) == pytest.approx(
                original, rel=1e-5
            )


@pytest.mark.parametrize("tokens", [1, 6, 12, 19])
def test_any_cut_into_passes_scores_the_same(pair, tokens):
    whole = minimal_pair_scores(pair.predict, PAIRS, **options(pair))
    cut = minimal_pair_scores(pair.predict, PAIRS, **options(pair, tokens))
    for network, scores in whole.items():
        for mine, theirs in zip(scores, cut[network], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_pairs_and_call_equally_often(pair, ranks):
    whole = minimal_pair_scores(pair.predict, PAIRS, **options(pair))
    parts, calls = [], []
    for rank in range(ranks):
        calls.append(0)

        def counted(*arguments):
            calls[-1] += 1
            return pair.predict(*arguments)

        parts.append(minimal_pair_scores(counted, PAIRS, **options(pair, 12, rank, ranks)))
    assert len(set(calls)) == 1
    for network, scores in whole.items():
        for kind, mine in enumerate(scores):
            together = sum(part[network][kind] for part in parts)
            torch.testing.assert_close(mine, together, rtol=1e-5, atol=1e-5)
            assert sum(int((part[network][kind] != 0).sum()) for part in parts) == len(PAIRS)


def test_shares_by_group(pair, monkeypatch):
    bad, good = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0])
    monkeypatch.setattr(
        "pipeline.evaluate.minimal_pairs.minimal_pair_scores",
        lambda *_: {"generator": (bad, good), "discriminator": (good, bad)},
    )
    assert evaluate_minimal_pairs(pair.predict, PAIRS, **options(pair)) == {
        "eval/minimal_pairs_generator": 0.5,
        "eval/minimal_pairs_generator/number": 0.75,
        "eval/minimal_pairs_generator/order": 0.0,
        "eval/minimal_pairs_discriminator": 0.5,
        "eval/minimal_pairs_discriminator/number": 0.25,
        "eval/minimal_pairs_discriminator/order": 1.0,
    }


def test_a_request_to_stop_ends_it(pair):
    answers = iter([False, True])
    chosen = {**options(pair), "should_stop": lambda: next(answers)}
    assert evaluate_minimal_pairs(pair.predict, PAIRS, **chosen) is None


def test_a_budget_takes_the_first_pairs_that_fit():
    costs = [pair.forward_tokens for pair in PAIRS]
    assert costs == [4 * 5 + 4 * 5, 3 * 4 + 5 * 6, 2 * 3 + 2 * 3]
    pairs = MinimalPairs(PAIRS, 99, 0)
    assert within_budget(pairs, 39.9) == ()
    assert within_budget(pairs, 40) == PAIRS[:1]
    assert within_budget(pairs, 81.9) == PAIRS[:1]
    assert within_budget(pairs, 94) == PAIRS


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_is_tokenized_and_mixed(dataset_folder, tmp_path):
    tokenizer = Tokenizer.load(dataset_folder / "tokenizer")
    records = [
        {"sentence_good": f"the {n}", "sentence_bad": f"a {n}", "UID": f"g{n // 10}"}
        for n in range(40)
    ]
    records += [
        {"sentence_good": "the same", "sentence_bad": "the same"},
        {"sentence_good": "long " * 40, "sentence_bad": "a"},
        {"sentence_good": "", "sentence_bad": "a"},
    ]
    found = read_minimal_pairs(write(tmp_path / "p.jsonl", *records), tokenizer, 20)
    assert found.num_left_out == 3
    assert found.mask_id == tokenizer.mask_id
    expected = {
        (
            (1, *tokenizer.encode(r["sentence_good"]), 2),
            (1, *tokenizer.encode(r["sentence_bad"]), 2),
        )
        for r in records[:40]
    }
    assert {(pair.good, pair.bad) for pair in found.pairs} == expected
    assert len({pair.group for pair in found.pairs[:8]}) > 2
    assert read_minimal_pairs(tmp_path / "p.jsonl", tokenizer, 20) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"sentence_good": "a", "sentence_bad": "b"}\n{', "p.jsonl, line 2: not JSON"),
        ('{"sentence_good": "a"}', "line 1: needs the texts sentence_good and sentence_bad"),
        ('{"sentence_good": "a", "sentence_bad": 3}', "line 1: needs the texts"),
        ("[1]", "line 1: needs the texts"),
        ('{"sentence_good": "a", "sentence_bad": "\\ud800"}', "line 1: needs the texts"),
        ('{"sentence_good": "a", "sentence_bad": "a"}', "none of its 1 pairs can be used"),
        ("", "none of its 0 pairs can be used"),
    ],
)
def test_a_wrong_file_is_told(dataset_folder, tmp_path, text, told):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_minimal_pairs(path, Tokenizer.load(dataset_folder / "tokenizer"), 20)
    assert told in str(caught.value)


def test_a_missing_file_is_told(dataset_folder, tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: cannot be read as UTF-8 text"):
        read_minimal_pairs(
            tmp_path / "none.jsonl", Tokenizer.load(dataset_folder / "tokenizer"), 20
        )
