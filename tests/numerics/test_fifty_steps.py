"""Fifty fp32 steps of the pipeline and of the plain reference, for every allowed objective.

Real steps and DeepSpeed engines on one side (ZeRO-1, two micro batches a step), whole batches and
plain AdamW on the other, from equal weights and with equal noise. Both compute in fp32, with the
run's own epsilon of 1e-6: the reference's rounding is as large as the pipeline's. Adam divides by
the root of a gradient's average, so an element whose gradient is rounding alone would move by a
whole learning rate in a random direction; in these networks, random in every bias and LayerNorm,
no element is like that. The largest differences are printed by `pytest -rP`.

A draw that differs is no failure by itself if the reference's two candidates tie; it is reported
as a warning, and the reference goes on with the pipeline's draw.
"""

import warnings
from itertools import product

import pytest

from pipeline.config import ObjectiveSection
from tests.reference.plain_runs import SideBySide

STEPS = 50
LOSS_TOLERANCE = 1e-6  # relative; measured 4e-7
WEIGHT_TOLERANCE = 1e-5  # absolute, of weights of about 0.3; measured 2e-6
TIE = 1e-4  # logits of about 1 with a rounding of 1e-6
SCHEDULE = {"max_steps": STEPS, "warmup_steps": 5}
WAYS = [
    ("gdes", "decoupled"),
    ("gdes", "joint"),
    ("es", "joint"),
    ("nes", "decoupled"),
    ("nes", "joint"),
]


class FlippedDraw(UserWarning):
    """A draw of the pipeline is not the reference's."""


def train_both(world, objective, **options):
    """Fifty steps of both; no loss, no weight and no draw may differ by more than rounding."""
    both = SideBySide(world, objective, **{"schedule": SCHEDULE, **options})
    start = both.state()
    for step in range(STEPS):
        both.step(step)
    losses, weights = both.findings.worst_loss(), both.differences()
    print(f"loss {losses:.1e}, weight {max(weights.values()):.1e}, flips {both.findings.flips}")
    for flip in both.findings.flips:
        assert flip.preference < TIE, flip
        warnings.warn(FlippedDraw(str(flip)), stacklevel=2)
    assert losses < LOSS_TOLERANCE
    too_far = {name: d for name, d in weights.items() if not d < WEIGHT_TOLERANCE}
    assert too_far == {}
    after = both.state()
    moved = [(after[key] - start[key]).abs().max() for key in start if key[2] == "weight"]
    assert min(moved) > 100 * WEIGHT_TOLERANCE, "every parameter has learned something"
    return both


@pytest.mark.filterwarnings("default::tests.numerics.test_fifty_steps.FlippedDraw")
@pytest.mark.parametrize("rtd_head", ["debertav3", "electra"])
@pytest.mark.parametrize("decoder", [True, False], ids=["emd", "no_emd"])
@pytest.mark.parametrize(("sharing", "update"), WAYS)
def test_replaced_token_detection(world, sharing, update, decoder, rtd_head):
    objective = ObjectiveSection(
        embedding_sharing=sharing,
        update=update,
        enhanced_mask_decoder=decoder,
        rtd_head=rtd_head,
    )
    both = train_both(world, objective)
    assert len(both.findings.losses) == 2 * STEPS


@pytest.mark.filterwarnings("default::tests.numerics.test_fifty_steps.FlippedDraw")
@pytest.mark.parametrize("decoder", [True, False], ids=["emd", "no_emd"])
def test_masked_language_modelling(world, decoder):
    objective = ObjectiveSection(
        task="mlm",
        enhanced_mask_decoder=decoder,
        mask_prob=0.3,
        mask_token_prob=0.8,
        random_token_prob=0.1,
    )
    both = train_both(world, objective)
    assert len(both.findings.losses) == STEPS


def test_every_allowed_way_is_here():
    """Combinations that the configuration accepts, found by trying all of them."""
    allowed = []
    for sharing, update in product(["gdes", "es", "nes"], ["decoupled", "joint"]):
        try:
            ObjectiveSection(embedding_sharing=sharing, update=update)
        except ValueError:
            continue
        allowed.append((sharing, update))
    assert sorted(allowed) == sorted(WAYS)


@pytest.mark.filterwarnings("default::tests.numerics.test_fifty_steps.FlippedDraw")
@pytest.mark.parametrize(
    ("objective", "network", "optimizer"),
    [
        # The released code: lambda 10, beta2 0.999, its schedule, windows.
        (
            {"rtd_loss_weight": 10.0, "masking_law": "windowed"},
            {},
            {"betas": (0.9, 0.999), "bias_correction": False},
        ),
        # ELECTRA: a narrow table, absolute positions in the input, every draw a piece of text.
        (
            {
                "embedding_sharing": "es",
                "update": "joint",
                "enhanced_mask_decoder": False,
                "rtd_head": "electra",
                "draw_special_ids": False,
                "sampling_temperature": 0.7,
                "mask_token_prob": 0.85,
            },
            {"embedding_size": 16, "position_biased_input": True},
            {},
        ),
        # DeBERTa-v2-xlarge: the convolution.
        ({"task": "mlm"}, {"conv_kernel_size": 3, "conv_act": "gelu"}, {}),
        # Delta of positions.
        ({"enhanced_mask_decoder": False}, {"position_biased_input": True}, {}),
    ],
    ids=["released_code", "electra", "xlarge", "positions"],
)
def test_systems_of_the_papers(world, objective, network, optimizer):
    options = {"network": network, "optimizer": optimizer}
    if "betas" in optimizer:
        options["schedule"] = {**SCHEDULE, "decay": "linear_released"}
    train_both(world, ObjectiveSection(**objective), **options)


def test_the_comparison_has_power(world):
    """A learning rate that is wrong by a hundredth is found."""
    both = SideBySide(world, schedule=SCHEDULE)
    both.prepare = lambda factor, prepare=both.prepare: prepare(1.01 * factor)
    for step in range(STEPS):
        both.step(step)
    assert both.findings.worst_loss() > LOSS_TOLERANCE
    assert max(both.differences().values()) > WEIGHT_TOLERANCE


def test_the_state_of_adam_is_the_reference_s(world):
    both = SideBySide(world, schedule=SCHEDULE)
    for step in range(5):
        both.step(step)
    for kind, scale in (("exp_avg", 1e-5), ("exp_avg_sq", 1e-6)):
        largest = max(v.abs().max().item() for k, v in both.state().items() if k[2] == kind)
        assert max(both.differences(kind).values()) < scale * max(1.0, largest)
