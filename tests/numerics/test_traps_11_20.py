"""Traps 11 to 20 of debertav3-facts.md, section 9: head, labels, draws, masks, optimizer, clipping.

One named test each, in their order. The judges are `tests/reference/`, torch's own losses and
hand counts.
"""

import tomllib
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import pipeline
from pipeline.config import ObjectiveSection
from pipeline.counter_rng import sample_words
from pipeline.masking import MaskingVocabulary
from pipeline.modeling.networks import Generator
from pipeline.modeling.pair import NetworkPair
from pipeline.modeling.vocabulary_head import vocabulary_head
from pipeline.objective_keys import ObjectiveKeys
from pipeline.sequences import CLS_ID, SEP_ID, SequenceBatch
from tests.engines import rig, sequence_batch, sequence_batches, small_config
from tests.reference import rtd_plain
from tests.reference.plain_judges import (
    corruption_gap,
    discriminator_gap,
    draw_law_gap,
    generator_gap,
    worst,
)
from tests.reference.small_networks import (
    MASK_ID,
    VOCABULARY,
    batch,
    discriminator,
    generator,
    leaves,
    model_section,
    network_section,
    scramble,
)

FP64_ROUNDING = 1e-9
PRESETS = Path(pipeline.__file__).parent / "presets"


def random_hidden(seed=0):
    return torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(seed))


def test_trap_11_state_of_cls_in_the_head():
    """Another state of [CLS] alone moves every token's logit; ELECTRA's head has no such term."""
    assert worst(discriminator_gap()) < FP64_ROUNDING
    head, hidden = discriminator().mask_predictions, random_hidden()
    before = head(hidden)
    hidden[0, 0] += random_hidden(1)[0, 0]
    after = head(hidden)
    assert ((before - after)[0].abs() > 1e-4).all()
    assert torch.equal(before[1], after[1])
    electra = discriminator(objective=ObjectiveSection(rtd_head="electra")).mask_predictions
    before = electra(hidden)
    hidden[0, 0] += random_hidden(2)[0, 0]
    moved = (electra(hidden) - before).abs() > 1e-4
    assert moved.nonzero().tolist() == [[0, 0]]


def test_trap_12_labels(world):
    """A draw that hits is original; [CLS] and [SEP] count, padding never; the expected rate."""
    assert worst(corruption_gap()) == 0.0
    data, ours = batch(length=12), discriminator(torch.float64)
    labels = torch.zeros(3, 12, dtype=torch.float64)
    rows = torch.zeros(3, 12, 24, dtype=torch.float64)
    out = ours(data.ids, rows, data.mask, labels, None)
    (share,) = torch.autograd.grad(out.loss_sum, out.logits_BL, retain_graph=True)
    torch.testing.assert_close(share, torch.sigmoid(out.logits_BL) * data.mask)
    assert (share[:, 0] > 0).all(), "[CLS] counts, as an original token"
    labels[~data.mask] = 1.0
    assert torch.equal(ours(data.ids, rows, data.mask, labels, None).loss_sum, out.loss_sum)

    one, seen = rig(world), []
    handle = one.engines.by_name["generator"].module.register_forward_hook(
        lambda module, arguments, output: seen.append((arguments, output.drawn_BK))
    )
    result = one.run(0)
    handle.remove()
    masked = lucky = 0
    for (_, _, _, valid, targets, *_), drawn in seen:
        masked += int(valid.sum())
        lucky += int((valid & (drawn == targets)).sum())
    sums = dict(
        zip(("masked_tokens", "replaced_tokens"), result.sums[[2, 5]].tolist(), strict=True)
    )
    assert sums == {"masked_tokens": masked, "replaced_tokens": masked - lucky}


def test_trap_13_draws_not_argmax():
    """Draws follow the softmax; they belong to the sample, not to its rank or its batch."""
    findings = draw_law_gap()
    assert worst(findings) < 5.0, findings
    assert worst(generator_gap()) < FP64_ROUNDING

    keys = ObjectiveKeys(ObjectiveSection(), 3, 12, MaskingVocabulary(MASK_ID), "train")
    logits = torch.linspace(-1.0, 1.0, VOCABULARY)

    def draws(samples):
        data = sequence_batch(samples)
        slots = keys.mask(data)
        zeros = torch.zeros(*slots.valid_BK.shape, 4)
        table = torch.zeros(VOCABULARY, 4)
        drawn = vocabulary_head(
            zeros,
            table,
            logits,
            slots.valid_BK,
            slots.targets_BK,
            slots.positions_BK,
            keys.draw(data),
        ).drawn_BK
        return [row[valid] for row, valid in zip(drawn, slots.valid_BK, strict=True)]

    whole = draws(range(64))
    halves = draws(range(32)) + draws(range(32, 64))  # two data-parallel ranks
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    assert torch.cat(draws(range(32))).tolist() != torch.cat(draws(range(64, 96))).tolist()
    assert len(torch.cat(whole).unique()) > VOCABULARY / 2, "equal logits, other noise"


@pytest.mark.parametrize("law", ["uniform", "windowed"])
def test_trap_14_masking_law(law):
    """77 masks at length 512; where each law reaches, and how often."""
    count, length = 3_000, 512
    keys = ObjectiveKeys(
        ObjectiveSection(masking_law=law), 3, length, MaskingVocabulary(MASK_ID), "train"
    )
    ids = torch.randint(4, MASK_ID, (count, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = CLS_ID, SEP_ID
    words = torch.tensor([sample_words(0, sample) for sample in range(count)])
    slots = keys.mask(SequenceBatch(ids, torch.full((count,), length), words, True))
    assert slots.valid_BK.shape == (count, 77)
    assert slots.valid_BK.all()
    times = (slots.masked_ids_BL == MASK_ID).sum(0)
    assert times.sum() == 77 * count
    assert times[[0, -1]].tolist() == [0, 0]
    share, reached = (77 / 510, slice(1, 511)) if law == "uniform" else (1 / 6, slice(1, 463))
    deviation = (count * share * (1 - share)) ** 0.5
    assert ((times[reached] - count * share).abs() < 5 * deviation).all()
    if law == "windowed":
        assert not times[463:].any(), "the bare tail of the released law"


def test_trap_15_label_sentinel():
    """The loss is torch's cross entropy over the sequence with -100 at every other position."""
    data, ours = batch(length=12), generator(torch.float64)
    weights = leaves(ours)
    encoder, states = rtd_plain.generator_states(
        weights, network_section(), data.masked_ids, data.mask
    )
    x = F.gelu(encoder.linear(encoder.decode(states, data.mask), "lm_predictions.lm_head.dense"))
    x = encoder.layer_norm(x, "lm_predictions.lm_head.LayerNorm")
    logits = x @ weights["deberta.embeddings.word_embeddings.weight"].T
    logits = logits + weights["lm_predictions.lm_head.bias"]
    labels = torch.full_like(data.ids, -100)
    for row in range(3):
        where = data.positions[row][data.valid[row]]
        labels[row, where] = data.ids[row, where]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    out = ours(*data.generator_arguments())
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-12, atol=0)
    data.targets[~data.valid] = 17
    assert torch.equal(ours(*data.generator_arguments()).loss_sum, out.loss_sum)

    keys = ObjectiveKeys(ObjectiveSection(), 3, 12, MaskingVocabulary(MASK_ID), "train")
    slots = keys.mask(sequence_batch(range(200)))
    assert slots.targets_BK[slots.valid_BK].min() >= 4, "no id-0 label, and no other special id"
    assert not slots.valid_BK.all(), "short sequences have fewer slots"


def test_trap_16_dead_and_special_ids():
    """Ids without a piece are in the softmax; they are drawn, or not, as the option says."""
    mask_id, count = 50, 8_000  # ids 51 to 60 have no piece
    logits = torch.linspace(-1.0, 1.0, VOCABULARY)
    samples = torch.tensor([sample_words(0, sample) for sample in range(count)])
    ids = torch.full((count, 8), 17)
    data = SequenceBatch(ids, torch.full((count,), 8), samples, True)
    slot = torch.zeros(count, 1, dtype=torch.int64)
    outputs = {}
    for allowed in (True, False):
        objective = ObjectiveSection(draw_special_ids=allowed)
        keys = ObjectiveKeys(objective, 3, 8, MaskingVocabulary(mask_id), "train")
        outputs[allowed] = vocabulary_head(
            torch.zeros(count, 1, 4),
            torch.zeros(VOCABULARY, 4),
            logits,
            slot == 0,
            slot + 20,
            slot,
            keys.draw(data),
        )
    text = torch.arange(4, mask_id)
    for allowed, out in outputs.items():
        times = torch.bincount(out.drawn_BK.flatten(), minlength=VOCABULARY)
        expected = torch.zeros(VOCABULARY, dtype=torch.float64)
        possible = torch.arange(VOCABULARY) if allowed else text
        expected[possible] = count * torch.softmax(logits[possible].double(), 0)
        assert ((times - expected).abs() <= 5 * expected.sqrt()).all()
    loss = -count * torch.log_softmax(logits.double(), 0)[20]
    for out in outputs.values():
        assert out.loss_sum.item() == pytest.approx(loss.item(), rel=1e-4)

    for preset in PRESETS.glob("deberta_v3_*.toml"):
        sizes = tomllib.loads(preset.read_text())["generator"]
        network = network_section(2, hidden_size=sizes["hidden_size"], num_attention_heads=2)
        with torch.device("meta"):
            table = Generator(network, model_section(vocab_size=128_100), ObjectiveSection())
        assert table.deberta.embeddings.word_embeddings.num_embeddings == 128_100


def test_trap_17_no_decay_list(world):
    """With gradients of zero only decay moves a weight: matrices, tables and Delta."""
    one = rig(world, optimizer={"weight_decay": 0.5})
    handles = [
        engine.module.register_forward_hook(
            lambda module, arguments, output: output._replace(loss_sum=output.loss_sum * 0.0)
        )
        for engine in one.engines.by_name.values()
    ]
    before = {name: one.weights(name) for name in one.engines.by_name}
    one.run(0)
    for handle in handles:
        handle.remove()
    decayed = set()
    for network, weights in before.items():
        for name, after in one.weights(network).items():
            exempt = name.endswith(("bias", "LayerNorm.weight"))
            factor = 1.0 if exempt else 1.0 - 1e-3 * 0.5
            torch.testing.assert_close(after, weights[name] * factor, rtol=1e-6, atol=0)
            decayed |= set() if exempt else {name}
    assert {
        "deberta.embeddings.word_embeddings.weight",
        "deberta.embeddings.word_embeddings._weight",
        "deberta.embeddings.position_embeddings.weight",
        "deberta.encoder.rel_embeddings.weight",
    } < decayed


@pytest.mark.parametrize(
    "network",
    [
        {},
        {"conv_kernel_size": 3},
        {"position_biased_input": True},
        {"relative_attention": False, "position_biased_input": True, "embedding_size": 16},
    ],
    ids=["debertav3", "conv", "positions", "electra"],
)
@pytest.mark.parametrize("sharing", ["gdes", "es", "nes"])
def test_trap_18_dead_parameters(network, sharing):
    """Every parameter that exists gets a gradient; a Delta of positions exists where it is read."""
    objective = ObjectiveSection(
        embedding_sharing=sharing,
        update="joint",
        enhanced_mask_decoder=not network.get("position_biased_input", False),
    )
    config = small_config(objective, **network)
    pair = scramble(NetworkPair(config), seed=1)
    keys = ObjectiveKeys(config.objective, 3, 12, MaskingVocabulary(MASK_ID), "train")
    data = sequence_batch(range(8))
    slots = keys.mask(data)
    out = pair(data.input_ids_BL, data.attention_mask(), slots, keys.draw(data))
    (out.mlm.loss_sum + 50.0 * out.rtd.loss_sum).backward()
    dead = [n for n, p in pair.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    positions = {n for n, _ in pair.discriminator.named_parameters() if "position_embed" in n}
    assert bool(positions) == (config.discriminator.position_biased_input and sharing != "es")


def test_trap_19_separate_clipping(world):
    """A discriminator loss 10,000 times as large leaves the generator's steps bit for bit."""
    weights, norms = [], []
    for rtd_loss_weight in (50.0, 5e5):
        one = rig(world, objective=ObjectiveSection(rtd_loss_weight=rtd_loss_weight))
        norms.append([one.run(step).outcomes["discriminator"].grad_norm for step in range(3)])
        weights.append(one.weights("generator"))
    assert norms[1][0] == pytest.approx(1e4 * norms[0][0], rel=1e-4)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_trap_20_lambda_under_clipping(world):
    """The norm before clipping grows with lambda; where both are clipped, the steps coincide."""
    weights, norms = [], []
    for rtd_loss_weight in (10.0, 50.0):
        one = rig(world, objective=ObjectiveSection(rtd_loss_weight=rtd_loss_weight))
        start = one.weights("discriminator")
        norms.append(one.run(0).outcomes["discriminator"].grad_norm)
        weights.append(one.weights("discriminator"))
    assert norms[1] == pytest.approx(5 * norms[0], rel=1e-5)
    assert min(norms) > 1.0
    for name, left in weights[0].items():
        torch.testing.assert_close(left, weights[1][name], rtol=0, atol=2e-6)
        assert not torch.equal(left, start[name])
    assert sequence_batches(0, one.plan)[0].lengths_B.unique().numel() == 2
