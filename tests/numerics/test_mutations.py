"""Every wrong choice is noticed: each mutation of the pipeline, and the judge that it turns red.

The judges are those that the other tests of this folder hold against rounding; a judge returns its
findings, and its verdict is the worst of them. Without a mutation all of them are green. A mutation
that made the pipeline fail with an error would prove nothing about a judge, and fails its test.
`pytest -rP` prints what each judge found.
"""

import pytest

from pipeline.config import ObjectiveSection
from tests.reference import plain_mutations as wrong
from tests.reference.plain_judges import (
    corruption_gap,
    discriminator_gap,
    draw_law_gap,
    generator_gap,
    small_delta_gap,
    worst,
)
from tests.reference.plain_runs import training_gap

# So many that some of them hit the original token, and some are special ids.
MANY_DRAWS = ObjectiveSection(mask_prob=0.5, sampling_temperature=0.7)
ES = ObjectiveSection(embedding_sharing="es", update="joint")
CLAMPED = {"max_relative_positions": 6, "position_buckets": 4}
CONVOLUTION = {"conv_kernel_size": 3}

# name -> (judge, green below, red above); fp64 rounding, fp32 rounding, counts, deviations.
JUDGES = {
    "generator": (lambda world: generator_gap(backend="torch"), 1e-9, 1e-6),
    "generator, clamped": (lambda world: generator_gap(backend="torch", **CLAMPED), 1e-9, 1e-6),
    "generator, conv": (lambda world: generator_gap(backend="torch", **CONVOLUTION), 1e-9, 1e-6),
    "discriminator": (lambda world: discriminator_gap(backend="torch"), 1e-9, 1e-6),
    "discriminator, es": (lambda world: discriminator_gap(ES, "torch"), 1e-9, 1e-6),
    "corruption": (lambda world: corruption_gap(), 0.5, 0.5),
    "small delta": (lambda world: small_delta_gap(), 0.01, 0.1),
    "law of the draws": (lambda world: draw_law_gap(), 5.0, 10.0),
    "training": (lambda world: training_gap(world, MANY_DRAWS), 1e-3, 0.02),
    "training, joint": (
        lambda world: training_gap(world, ObjectiveSection(update="joint")),
        1e-3,
        0.02,
    ),
    "training, decay": (
        lambda world: training_gap(world, optimizer={"weight_decay": 2.0}),
        1e-3,
        0.02,
    ),
}
MUTATIONS = [
    # The list.
    (wrong.argmax_for_sampling, "generator"),
    (wrong.argmax_for_sampling, "law of the draws"),
    (wrong.position_to_content_of_key_minus_query, "generator"),
    (wrong.position_to_content_of_key_minus_query, "discriminator"),
    (wrong.rtd_head_normalizes_last, "discriminator"),
    (wrong.mlm_head_normalizes_first, "generator"),
    (wrong.no_addition_of_cls, "discriminator"),
    (wrong.labels_are_the_masked_positions, "corruption"),
    (wrong.labels_are_the_masked_positions, "training"),
    (wrong.no_lambda, "training"),
    (wrong.no_lambda, "training, joint"),
    (wrong.embeddings_before_their_update, "training"),
    (wrong.decoder_input_with_layer_norm, "generator"),
    (wrong.half_precision_sum_of_tables, "small delta"),
    # Attention and layers.
    (wrong.scale_of_one_term, "generator"),
    (wrong.position_projections_without_bias, "generator"),
    (wrong.relative_table_without_layer_norm, "discriminator"),
    (wrong.far_distances_not_clamped, "generator, clamped"),
    (wrong.gelu_by_tanh, "discriminator"),
    (wrong.embeddings_not_masked, "generator, conv"),
    # The decoder.
    (wrong.decoder_applied_once, "generator"),
    (wrong.no_decoder, "generator"),
    # Draws and labels.
    (wrong.temperature_ignored, "training"),
    (wrong.special_ids_never_drawn, "training"),
    (wrong.draws_after_the_update, "training"),
    (wrong.labels_of_the_other_polarity, "corruption"),
    (wrong.discriminator_reads_masks, "training"),
    # Losses.
    (wrong.padding_in_the_discriminators_loss, "discriminator"),
    (wrong.cls_not_in_the_discriminators_loss, "discriminator"),
    (wrong.empty_slots_in_the_denominator, "training"),
    (wrong.padding_in_the_denominator, "training"),
    # Sharing.
    (wrong.gradient_of_d_reaches_the_generator, "discriminator"),
    (wrong.shared_embeddings_without_gradient, "discriminator, es"),
    (wrong.no_delta, "discriminator"),
    (wrong.padding_row_learns, "discriminator"),
    # The optimizer.
    (wrong.delta_does_not_decay, "training, decay"),
    (wrong.biases_decay, "training, decay"),
    (wrong.no_bias_correction, "training"),
]


@pytest.mark.parametrize("name", JUDGES)
def test_the_judge_is_green(name, world):
    judge, green, _ = JUDGES[name]
    findings = judge(world)
    assert worst(findings) < green, findings


@pytest.mark.parametrize(
    ("mutation", "name"), MUTATIONS, ids=[f"{m.__name__}-{name}" for m, name in MUTATIONS]
)
def test_the_mutation_turns_its_judge_red(mutation, name, world, monkeypatch):
    judge, _, red = JUDGES[name]
    mutation(monkeypatch)
    findings = judge(world)
    loudest = max(findings, key=findings.get)
    print(f"{mutation.__name__}: {name}: {loudest} {findings[loudest]:.2g} (red above {red:g})")
    assert worst(findings) > red


def test_every_mutation_is_listed():
    names = {
        name
        for name, value in vars(wrong).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", "") == wrong.__name__
    }
    assert names == {mutation.__name__ for mutation, _ in MUTATIONS}
