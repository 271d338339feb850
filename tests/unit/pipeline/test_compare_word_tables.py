"""Average cosines of word tables, against a loop over all pairs."""

import math

import pytest
import torch
from torch.nn import functional as F

from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from pipeline.compare.word_tables import average_cosine, table_cosines
from tests.commits import random_pair, run_config, write_commit


def by_loop(rows):
    total = 0.0
    for i, left in enumerate(rows):
        others = torch.cat([rows[:i], rows[i + 1 :]])
        total += F.cosine_similarity(left[None], others).sum().item()
    return total / (len(rows) * (len(rows) - 1))


def test_average_cosine_is_exact():
    table = torch.randn(60, 7, generator=torch.Generator().manual_seed(1)) + 0.3
    assert average_cosine(table) == pytest.approx(by_loop(table.double()), abs=1e-12)
    assert average_cosine(3 * torch.ones(4, 2)) == pytest.approx(1.0)
    assert average_cosine(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-1.0)


def test_rows_without_a_direction_are_left_out():
    table = torch.randn(20, 5, generator=torch.Generator().manual_seed(2))
    padded = torch.cat([table, torch.zeros(9, 5)])
    assert average_cosine(padded) == pytest.approx(average_cosine(table), abs=1e-12)
    assert math.isnan(average_cosine(torch.zeros(9, 5)))
    assert math.isnan(average_cosine(table[:1]))


@pytest.mark.parametrize("sharing", ["gdes", "es", "nes", "mlm"])
def test_tables_of_a_run(sharing, dataset_folder, tmp_path):
    """Over the pieces alone: neither special ids nor those behind the last piece."""
    sections = {}
    if sharing == "mlm":
        optimizer = {"generator_learning_rate": 1e-3}
        sections = {"discriminator": None, "objective": {"task": "mlm"}, "optimizer": optimizer}
    elif sharing != "gdes":
        update = "joint" if sharing == "es" else "decoupled"
        sections = {"objective": {"embedding_sharing": sharing, "update": update}}
    config = run_config(dataset_folder, tmp_path / "run", **sections)
    pair = random_pair(config, 3)
    write_commit(config, 3, pair)
    pieces = slice(4, Tokenizer.load(dataset_folder / "tokenizer").mask_id)
    generator = dict(pair.generator.named_parameters())
    word = generator["deberta.embeddings.word_embeddings.weight"].detach().double()
    expected = {"E_G": by_loop(word[pieces])}
    if pair.discriminator is not None:
        own = {name: p.detach().double() for name, p in pair.discriminator.named_parameters()}
        delta = own.get("deberta.embeddings.word_embeddings._weight")
        mine = own.get("deberta.embeddings.word_embeddings.weight")
        if delta is not None:
            expected |= {"E_D": by_loop((word + delta)[pieces]), "Delta": by_loop(delta[pieces])}
        else:
            expected["E_D"] = by_loop((word if mine is None else mine)[pieces])
    assert ("Delta" in expected) == (sharing == "gdes")
    found = table_cosines(tmp_path / "run", Dataset.open(dataset_folder))
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(set(found.values())) == {"gdes": 3, "es": 1, "nes": 2, "mlm": 1}[sharing]
