"""The judges of single forward and backward passes: how far the pipeline is from the reference.

A judge returns its findings as {what: discrepancy}; `worst` is the verdict. Tests hold a verdict
against rounding, and `tests/numerics/test_mutations.py` shows that each wrong choice moves one.

    generator_gap       losses, draws and gradients of the generator, in fp64
    discriminator_gap   loss, logits and gradients of the discriminator, in fp64
    corruption_gap      corrupted ids and labels of chosen draws
    small_delta_gap     what is left of a small Delta in half precision
    draw_law_gap        distance of draws from their softmax, in standard deviations
"""

import math

import torch

from pipeline import rtd
from pipeline.config import ObjectiveSection
from pipeline.modeling import pair
from pipeline.modeling.vocabulary_head import vocabulary_head
from pipeline.rtd import DrawKey, gumbel_noise
from tests.reference import rtd_plain
from tests.reference.plain_encoder import logits_by_pairs
from tests.reference.small_networks import (
    MASK_ID,
    VOCABULARY,
    batch,
    discriminator,
    generator,
    leaves,
    model_section,
    network_section,
)

LAYERS = 2
LABELS = (torch.arange(36).view(3, 12) % 5 == 0).double()
SMALL_DELTA = 1e-4
NEARLY_ZERO = 1e-4
"""Some gradients are sums that cancel, such as a key bias's without relative attention."""


def worst(findings):
    """The largest discrepancy; infinite where one is not a number."""
    return max(math.inf if math.isnan(found) else found for found in findings.values())


def relative(ours, expected):
    """Largest difference relative to the largest expected value, where that is not zero."""
    scale = max(expected.abs().max().item(), NEARLY_ZERO)
    return (ours - expected).abs().max().item() / scale


def draw_noise(data):
    """The Gumbel noise of a small batch, as both sides see it."""
    return gumbel_noise(data.draw.sample_words_B2, data.positions, 0, VOCABULARY, data.draw.key)


def gradient_findings(named_parameters, weights, prefix=""):
    """Discrepancy of every gradient."""
    findings = {}
    for name, parameter in named_parameters:
        expected, ours = weights[name].grad, parameter.grad
        if expected is None or ours is None:
            findings[f"{prefix}{name} has a gradient"] = float((expected is None) != (ours is None))
        else:
            findings[f"{prefix}gradient of {name}"] = relative(ours, expected)
    return findings


def generator_gap(objective=None, backend="eager", logits=logits_by_pairs, **network):
    """The generator's loss, draws, hits and gradients on a padded batch."""
    objective = objective or ObjectiveSection()
    data, model = batch(length=12), model_section(attention_backend=backend)
    ours = generator(torch.float64, LAYERS, model=model, objective=objective, **network)
    weights = leaves(ours)
    out = ours(*data.generator_arguments())
    expected = rtd_plain.generator_step(
        weights,
        network_section(LAYERS, **network),
        data.masked_ids,
        data.mask,
        data.positions,
        data.valid,
        data.targets,
        draw_noise(data),
        data.draw.temperature,
        enhanced_mask_decoder=objective.enhanced_mask_decoder,
        logits=logits,
    )
    out.loss_sum.backward()
    expected.loss_sum.backward()
    return {
        "loss": relative(out.loss_sum.detach(), expected.loss_sum.detach()),
        "draws": float((out.drawn_BK != expected.drawn)[data.valid].sum()),
        "hits": abs(out.correct_sum.item() - expected.correct),
        **gradient_findings(ours.named_parameters(), weights),
    }


def discriminator_gap(objective=None, backend="eager", logits=logits_by_pairs, **network):
    """The discriminator's loss, logits and gradients, those that reach the generator included."""
    objective = objective or ObjectiveSection()
    data, model = batch(length=12), model_section(attention_backend=backend)
    data.ids[0, 4] = 0  # [PAD] drawn as a replacement: a token like any other
    options = {"model": model, "objective": objective, **network}
    base = generator(torch.float64, LAYERS, **options)
    ours = discriminator(torch.float64, LAYERS, **options)
    base_weights, weights = leaves(base), leaves(ours)
    out = ours(data.ids, pair.shared_rows(base, ours, data.ids), data.mask, LABELS, None)
    expected = rtd_plain.discriminator_step(
        base_weights,
        weights,
        network_section(LAYERS, **network),
        data.ids,
        data.mask,
        LABELS,
        sharing=objective.embedding_sharing,
        rtd_head=objective.rtd_head,
        logits=logits,
    )
    out.loss_sum.backward()
    expected.loss_sum.backward()
    return {
        "loss": relative(out.loss_sum.detach(), expected.loss_sum.detach()),
        "logits": relative(out.logits_BL[data.mask], expected.logits[data.mask].detach()),
        **gradient_findings(ours.named_parameters(), weights),
        **gradient_findings(base.named_parameters(), base_weights, "generator's "),
    }


def corruption_gap():
    """Labels and ids where a draw hits the original token, misses it, or has no slot."""
    ids = batch(length=12).ids
    positions = torch.tensor([[1, 5, 10], [2, 3, 0], [3, 4, 0]])
    valid = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    drawn = ids.gather(1, positions).where(torch.arange(3) % 2 == 0, torch.tensor(MASK_ID - 1))
    ours = rtd.corrupt(ids, positions, valid, drawn)
    expected_ids, expected_labels = rtd_plain.corrupt(ids, positions, valid, drawn)
    return {
        "ids": float((ours.input_ids_BL != expected_ids).sum()),
        "labels": float((ours.is_replaced_BL.float() != expected_labels).sum()),
    }


def small_delta_gap():
    """Half precision: 1 - correlation of E_D - E_G with a Delta of 1e-4, and its relative error."""
    data, base, ours = batch(), generator(), discriminator()
    delta = ours.deberta.embeddings.word_embeddings._weight
    delta.data.normal_(std=SMALL_DELTA, generator=torch.Generator().manual_seed(0))
    base.bfloat16(), ours.bfloat16()
    rows = base.token_embeddings(data.ids, False).detach()
    seen = []
    handle = ours.deberta.embeddings.LayerNorm.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].detach().float())
    )
    ours.encode(data.ids, rows, data.mask)
    handle.remove()
    moved = (seen[0] - rows.float())[data.mask]
    expected = delta.detach().float()[data.ids[data.mask]]
    both = torch.stack([moved.flatten(), expected.flatten()])
    return {
        "correlation": 1.0 - torch.corrcoef(both)[0, 1].nan_to_num().item(),
        "relative error": ((moved - expected).norm() / expected.norm()).item(),
    }


def draw_law_gap(temperature=0.7, count=20_000):
    """Draws of one row of logits against softmax(logits / temperature)."""
    logits = torch.linspace(-2.0, 2.0, 12)
    samples = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.int64)], 1)
    slots = torch.zeros(count, 1, dtype=torch.int64)
    hidden = torch.zeros(count, 1, 4)
    draw = DrawKey((5, 6), samples, temperature=temperature)
    out = vocabulary_head(hidden, torch.zeros(12, 4), logits, slots == 0, slots, slots, draw)
    expected = count * torch.softmax(logits.double() / temperature, 0)
    times = torch.bincount(out.drawn_BK.flatten(), minlength=12)
    return {"deviations": ((times - expected).abs() / expected.sqrt()).max().item()}
