"""Held-out figures against a plain computation, and the ROC area against scikit-learn's."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pipeline.config import ObjectiveSection
from pipeline.evaluate.heldout import RocHistogram, evaluate_heldout
from pipeline.objective_keys import ObjectiveKeys
from pipeline.rtd import gumbel_noise
from pipeline.runtime import World
from pipeline.sequences import SequenceStream
from tests.engines import VOCABULARY, small_pair
from tests.reference import small_networks
from tests.reference.rtd_plain import discriminator_step, generator_step

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU)
LENGTH = 12


def area(logits, labels, is_token=None):
    roc = RocHistogram(CPU)
    is_token = torch.ones_like(labels) if is_token is None else is_token
    for part in zip(logits.split(3), labels.split(3), is_token.split(3), strict=True):
        roc.add(*part)
    return roc.area()


def scores(shift, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(9, 400, generator=generator) < 0.12
    logits = torch.randn(9, 400, generator=generator) * scale + shift * labels
    return logits, labels


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.5, 4.0])
@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_area_is_scikit_learn_s(shift, scale):
    logits, labels = scores(shift, scale)
    expected = roc_auc_score(labels.flatten().numpy(), logits.flatten().numpy())
    # Two scores within a bin of 1/256 count as a tie.
    assert area(logits, labels) == pytest.approx(expected, abs=2e-3 / scale * 0.05 + 2e-4)


def test_padding_does_not_count():
    logits, labels = scores(1.0)
    is_token = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    expected = roc_auc_score(labels[is_token].numpy(), logits[is_token].numpy())
    assert area(logits, labels, is_token) == pytest.approx(expected, abs=3e-4)


def test_ties_count_half_and_scores_beyond_the_range_are_ties():
    labels = torch.tensor([[True, False]])
    assert area(torch.tensor([[3.0, 3.0]]), labels) == 0.5
    assert area(torch.tensor([[100.0, 50.0]]), labels) == 0.5
    assert area(torch.tensor([[15.9, -100.0]]), labels) == 1.0
    assert area(torch.tensor([[-100.0, 15.9]]), labels) == 0.0


@pytest.mark.parametrize("kind", [True, False])
def test_one_kind_alone_has_no_area(kind):
    assert area(torch.zeros(1, 4), torch.full((1, 4), kind)) is None


class Tokens:
    """A split of arbitrary ids."""

    def __init__(self, count):
        self.ids = np.random.default_rng(0).integers(4, small_networks.MASK_ID, count)

    def split_tokens(self, split):
        return len(self.ids)

    def read(self, split, start, end):
        return self.ids[start:end].astype(np.uint32)

    def read_rows(self, split, starts, count, edges, rows_at_once):
        runs = [self.read(split, start, start + count) for start in starts.tolist()]
        rows = np.array([[edges[0], *run, edges[1]] for run in runs], np.uint32)
        return [rows[n : n + rows_at_once] for n in range(0, len(rows), rows_at_once)]


def evaluate(num_tokens, max_sequences=100, batch_size=3, **options):
    pair = small_pair()
    stream = SequenceStream(Tokens(num_tokens), "heldout", LENGTH)
    keys = ObjectiveKeys(ObjectiveSection(), 3, LENGTH, VOCABULARY, "heldout")
    figures = evaluate_heldout(
        pair.predict,
        stream=stream,
        keys=keys,
        chosen={"": np.arange(min(max_sequences, stream.num_sequences), dtype=np.int64)},
        batch_size=batch_size,
        world=options.pop("world", ALONE),
        **options,
    )
    return figures, stream, keys, pair.generator, pair.discriminator


@pytest.mark.parametrize(("num_tokens", "max_sequences"), [(67, 100), (67, 5), (200, 8)])
def test_figures_are_those_of_a_plain_computation(num_tokens, max_sequences):
    figures, stream, keys, generator, discriminator = evaluate(num_tokens, max_sequences)
    count = min(max_sequences, stream.num_sequences)
    batch = stream.batch(np.arange(count), np.zeros(count, np.int64))
    slots, draw = keys.mask(batch), keys.draw(batch)
    mask = torch.arange(LENGTH) < batch.lengths_B[:, None]
    noise = gumbel_noise(draw.sample_words_B2, slots.positions_BK, 0, 61, draw.key)
    section = small_networks.network_section(layers=2)
    weights = small_networks.leaves(generator)
    mlm = generator_step(
        weights,
        section,
        slots.masked_ids_BL,
        mask,
        slots.positions_BK,
        slots.valid_BK,
        slots.targets_BK,
        noise,
    )
    corrupted = batch.input_ids_BL.clone()
    for row in range(count):
        valid = slots.valid_BK[row]
        corrupted[row, slots.positions_BK[row][valid]] = mlm.drawn[row][valid]
    labels = corrupted != batch.input_ids_BL
    rtd = discriminator_step(
        weights, small_networks.leaves(discriminator), section, corrupted, mask, labels
    )
    says = rtd.logits > 0
    masked, tokens = slots.valid_BK.sum().item(), mask.sum().item()
    expected = {
        "eval/mlm_loss": mlm.loss_sum.item() / masked,
        "eval/mlm_accuracy": mlm.correct / masked,
        "eval/rtd_loss": rtd.loss_sum.item() / tokens,
        "eval/rtd_accuracy_replaced": says[labels].float().mean().item(),
        "eval/rtd_accuracy_original": (~says[mask & ~labels]).float().mean().item(),
        "eval/replaced_fraction": labels.sum().item() / tokens,
        "eval/rtd_auc": roc_auc_score(labels[mask].numpy(), rtd.logits[mask].detach().numpy()),
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 5e-3 if name.endswith("auc") else 1e-5
        assert figures[name] == pytest.approx(value, rel=tolerance, abs=1e-9), name


def test_figures_do_not_depend_on_the_batch_size():
    small, large = (evaluate(200, batch_size=size)[0] for size in (1, 50))
    assert small == pytest.approx(large, rel=1e-5)
    assert evaluate(200)[0] == evaluate(200)[0]


def test_ranks_share_the_sequences(monkeypatch):
    """Three ranks, one after the other, their sums added by hand: the figures of one process."""
    from pipeline.evaluate import heldout

    vectors = []
    monkeypatch.setattr(
        heldout.StepSums, "reduce", lambda sums: vectors.append(sums.vector) or sums.vector
    )
    for rank in range(3):
        evaluate(30, batch_size=2, world=World(rank, rank, 3, CPU))  # the last rank has none
    evaluate(30)
    torch.testing.assert_close(sum(vectors[:3]), vectors[3], rtol=1e-6, atol=0)


def test_without_sequences_there_are_no_figures():
    assert evaluate(0)[0] == {}


def test_a_stop_leaves_no_figures():
    answers = iter([False, True])
    calls = []

    def should_stop():
        calls.append(None)
        return next(answers)

    assert evaluate(200, should_stop=should_stop)[0] is None
    assert len(calls) == 2


def test_nothing_is_learned():
    _, _, _, generator, discriminator = evaluate(67)
    for network in (generator, discriminator):
        assert all(parameter.grad is None for parameter in network.parameters())


def test_the_loss_of_a_network_that_knows_nothing():
    """Zero weights: uniform over the vocabulary, and a coin for every token."""
    original = small_networks.scramble
    try:
        small_networks.scramble = lambda module, seed: module.requires_grad_(False).apply(
            lambda part: [p.zero_() for p in part.parameters(recurse=False)]
        )
        figures = evaluate(67)[0]
    finally:
        small_networks.scramble = original
    assert figures["eval/mlm_loss"] == pytest.approx(math.log(61), rel=1e-6)
    assert figures["eval/rtd_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert figures["eval/rtd_auc"] == 0.5
