"""What a step of real engines may and may not do: separate networks, separate failures, one sum.

One world of one process; `test_worlds_agree.py` compares worlds of several.
"""

import pytest
import torch

from pipeline.config import ObjectiveSection
from pipeline.engine import parameter_norm
from pipeline.engine_state import MOMENTS, WEIGHT, local_slices, scalar_state
from pipeline.metrics import StepSums, ratios
from pipeline.rtd import gumbel_noise
from tests.engines import LENGTH, RATE, rig, sequence_batch, sequence_batches, small_pair
from tests.reference import small_networks
from tests.reference.rtd_plain import discriminator_step, generator_step

NETWORKS = ("generator", "discriminator")
STAGES = [0, 1, 2, 3]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SECTION = small_networks.network_section(layers=2, **NO_DROPOUT)


def state(one_rig, network):
    """Everything that a commit would hold of a network, copied."""
    engine = one_rig.engines.by_name[network]
    slices = {
        (part.name, kind): values.clone()
        for part in local_slices(engine, 0)
        for kind, values in part.tensors.items()
    }
    return {**slices, ("", "step"): torch.tensor(scalar_state(engine)["adam_step"])}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def assert_all_moved(before, after):
    """Every parameter took a step; only Adam's averages show it where a gradient is tiny."""
    assert [key for key in before if torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_huge_discriminator_loss_does_not_touch_the_generator(world, stage):
    """Clipping norms are separate (trap 19)."""
    states = []
    for weight in (50.0, 5e5):
        one = rig(world, stage=stage, objective=ObjectiveSection(rtd_loss_weight=weight))
        results = [one.run(step) for step in range(3)]
        states.append(state(one, "generator"))
        assert all(result.outcomes["generator"].applied for result in results)
    assert_equal(*states)


def test_lambda_is_scaled_away_where_both_are_clipped(world):
    """Trap 20: the norm before clipping grows with lambda, the clipped gradient does not."""
    norms, averages = [], []
    for weight in (10.0, 50.0):
        one = rig(world, objective=ObjectiveSection(rtd_loss_weight=weight))
        norms.append(one.run(0).outcomes["discriminator"].grad_norm)
        averages.append(state(one, "discriminator"))
    assert norms[1] == pytest.approx(5 * norms[0], rel=1e-5)
    assert min(norms) > 1.0
    for name, kind in averages[0]:
        if kind == "exp_avg":
            left, right = (each[name, kind] for each in averages)
            torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * left.abs().max().item())


def phases(one, between=lambda: None):
    """A step in two halves; (the generator before, between, and after the second half)."""
    batches = sequence_batches(0, one.plan)
    masked = [one.keys.mask(batch) for batch in batches]
    scale, sums = torch.tensor(0.01), StepSums(torch.device("cpu"))
    before = one.weights("generator")
    draws = [one.keys.draw(batch) for batch in batches]
    corrupted = one.step.generator_phase(0, batches, masked, draws, scale, sums)
    one.step.update("generator", 0, one.prepare(generator=1e-2))
    middle, middle_state = one.weights("generator"), state(one, "generator")
    between()
    one.step.discriminator_phase(0, batches, corrupted, scale, sums)
    one.step.update("discriminator", 0, one.prepare())
    assert_equal(state(one, "generator"), middle_state)
    return batches, masked, corrupted, before, middle


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32")]
)
def test_the_discriminator_reads_the_updated_embeddings(world, stage, precision):
    """Trap 7, and trap 6: no gradient of the discriminator reaches the generator."""
    one = rig(world, stage=stage, precision=precision)
    seen = []
    handle = one.module("discriminator").register_forward_pre_hook(
        lambda module, arguments: seen.append((arguments[0], arguments[1].clone()))
    )
    _, _, corrupted, before, middle = phases(one)
    handle.remove()
    name = "deberta.embeddings.word_embeddings.weight"
    assert not torch.equal(before[name], middle[name])
    assert len(seen) == 2
    for (ids, base), (corrupted_ids, _) in zip(seen, corrupted, strict=True):
        assert torch.equal(ids, corrupted_ids)
        assert not base.requires_grad
        assert torch.equal(base, middle[name][ids].to(base.dtype))
        assert not torch.equal(base, before[name][ids].to(base.dtype))


def test_draws_come_from_the_forward_pass_before_the_update(world):
    one = rig(world, pair=small_pair(**NO_DROPOUT))
    batches, masked, corrupted, before, middle = phases(one)
    from_old, from_new = (
        [draws(one, batch, slots, weights) for batch, slots in zip(batches, masked, strict=True)]
        for weights in (before, middle)
    )
    ours = [
        ids.gather(1, slots.positions_BK) for (ids, _), slots in zip(corrupted, masked, strict=True)
    ]
    valid = torch.cat([slots.valid_BK for slots in masked])
    assert torch.equal(torch.cat(ours)[valid], torch.cat(from_old)[valid])
    assert not torch.equal(torch.cat(ours)[valid], torch.cat(from_new)[valid])


def draws(one, batch, slots, weights):
    """What the plain reference draws with these weights and the step's noise."""
    draw = one.keys.draw(batch)
    noise = gumbel_noise(
        draw.sample_words_B2, slots.positions_BK, 0, small_networks.VOCABULARY, draw.key
    )
    mask = torch.arange(LENGTH) < batch.lengths_B[:, None]
    return generator_step(
        weights,
        SECTION,
        slots.masked_ids_BL,
        mask,
        slots.positions_BK,
        slots.valid_BK,
        slots.targets_BK,
        noise,
    ).drawn


def gradients(one, network):
    """The gradient of the first step: Adam's first average is a tenth of it."""
    return {
        name: values * 10
        for (name, kind), values in state(one, network).items()
        if kind == "exp_avg"
    }


@pytest.mark.parametrize("stage", STAGES)
def test_any_accumulation_has_the_same_gradient(world, stage):
    """Trap 22: sequences of different lengths, so that means of means would differ."""
    reference = None
    for micro in (8, 4, 2, 1):
        one = rig(world, stage=stage, micro=micro, clipping=0.0, pair=small_pair(**NO_DROPOUT))
        result = one.run(0)
        assert one.plan.gradient_accumulation_steps == 8 // micro
        here = {network: gradients(one, network) for network in NETWORKS}
        reference = reference or (here, result)
        torch.testing.assert_close(result.sums, reference[1].sums, rtol=1e-6, atol=0)
        for network in NETWORKS:
            for name, gradient in here[network].items():
                expected = reference[0][network][name]
                torch.testing.assert_close(
                    gradient, expected, rtol=0, atol=1e-5 * expected.abs().max().item() + 1e-9
                )


def test_the_gradient_is_that_of_the_global_means(world):
    """Against autograd on the plain reference: sum of losses / global count, lambda on D alone."""
    pair = small_pair(**NO_DROPOUT)
    generator_weights = small_networks.leaves(pair.generator)
    discriminator_weights = small_networks.leaves(pair.discriminator)
    one = rig(world, micro=2, clipping=0.0, pair=pair)
    one.run(
        0, generator=0.0, discriminator=0.0
    )  # the discriminator sees the same E_G as the reference
    batch = sequence_batch(range(8))
    slots, draw = one.keys.mask(batch), one.keys.draw(batch)
    mask = batch.attention_mask()
    noise = gumbel_noise(draw.sample_words_B2, slots.positions_BK, 0, 61, draw.key)
    mlm = generator_step(
        generator_weights,
        SECTION,
        slots.masked_ids_BL,
        mask,
        slots.positions_BK,
        slots.valid_BK,
        slots.targets_BK,
        noise,
    )
    (mlm.loss_sum / slots.valid_BK.sum()).backward()
    corrupted = batch.input_ids_BL.clone()
    for row in range(8):
        where = slots.positions_BK[row][slots.valid_BK[row]]
        corrupted[row, where] = mlm.drawn[row][slots.valid_BK[row]]
    labels = (corrupted != batch.input_ids_BL).float()
    rtd = discriminator_step(
        generator_weights, discriminator_weights, SECTION, corrupted, mask, labels
    )
    (50.0 * rtd.loss_sum / mask.sum()).backward()
    padding_row = {
        "generator": None,
        "discriminator": "deberta.embeddings.word_embeddings._weight",
    }
    for network, weights in zip(NETWORKS, (generator_weights, discriminator_weights), strict=True):
        ours = gradients(one, network)
        assert ours.keys() == weights.keys()
        for name, gradient in ours.items():
            expected = weights[name].grad
            if name == padding_row[network]:
                expected[0] = 0
            torch.testing.assert_close(
                gradient.view(expected.shape),
                expected,
                rtol=0,
                atol=2e-5 * expected.abs().max().item() + 1e-8,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def poison(module, value):
    """Multiply the module's loss by `value` until the handle is removed."""
    return module.register_forward_hook(
        lambda _module, _arguments, output: output._replace(loss_sum=output.loss_sum * value)
    )


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_loss_that_is_not_finite_skips_one_network(world, network, stage, precision):
    one = rig(world, stage=stage, precision=precision)
    other = NETWORKS[1 - NETWORKS.index(network)]
    one.run(0)
    for value in (float("nan"), float("inf")):
        mine, theirs = state(one, network), state(one, other)
        handle = poison(one.module(network), value)
        result = one.run(1)
        handle.remove()
        assert not result.outcomes[network].applied
        assert result.outcomes[other].applied
        assert_equal(state(one, network), mine)
        assert_all_moved(theirs, state(one, other))
    mine = state(one, network)
    result = one.run(2)
    assert result.outcomes["generator"].applied
    assert result.outcomes["discriminator"].applied
    assert_all_moved(mine, state(one, network))
    for norm in (
        result.outcomes["generator"].grad_norm,
        result.outcomes["discriminator"].grad_norm,
    ):
        assert 0 < norm < float("inf")


@pytest.mark.parametrize("stage", [0, 1])
def test_poison_in_one_micro_batch_of_several_skips_the_step(world, stage):
    one = rig(world, stage=stage, micro=2)
    one.run(0)
    mine, calls = state(one, "generator"), []

    def hook(_module, _arguments, output):
        calls.append(None)
        factor = float("nan") if len(calls) == 2 else 1.0
        return output._replace(loss_sum=output.loss_sum * factor)

    handle = one.module("generator").register_forward_hook(hook)
    result = one.run(1)
    handle.remove()
    assert len(calls) == 4
    assert not result.outcomes["generator"].applied
    assert_equal(state(one, "generator"), mine)
    assert one.run(2).outcomes["generator"].applied, (
        "the bad gradient is not carried into the next step"
    )


def test_reading_the_embeddings_leaves_the_trace_of_the_generator_whole(world, monkeypatch):
    """ZeRO-3 gathers weights ahead along it; begun anew, the ranks compare it on the host."""
    one, invalidated = rig(world, stage=3, micro=2), []
    modules = [
        engine.optimizer.parameter_offload.get_param_coordinator()
        for engine in one.engines.by_name.values()
    ]
    for name, coordinator in zip(NETWORKS, modules, strict=True):
        invalidate = coordinator._invalidate_trace
        monkeypatch.setattr(
            coordinator,
            "_invalidate_trace",
            lambda name=name, invalidate=invalidate: (invalidated.append(name), invalidate()),
        )
    for step in range(3):
        one.run(step)
        assert [each.is_complete_trace() for each in modules] == [True, True], step
    assert invalidated == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_gets_a_gradient(world, stage):
    """Trap 18: none is dead, at any stage."""
    one = rig(world, stage=stage, clipping=0.0)
    one.run(0)
    for network in NETWORKS:
        dead = [name for name, gradient in gradients(one, network).items() if not gradient.any()]
        assert dead == []


@pytest.mark.parametrize("stage", STAGES)
def test_learning_rates_are_the_step_s(world, stage):
    one = rig(world, stage=stage)
    before = {network: state(one, network) for network in NETWORKS}
    one.run(0, generator=0.0, discriminator=RATE)
    after = {network: state(one, network) for network in NETWORKS}
    for (name, kind), values in before["generator"].items():
        if kind == WEIGHT:
            assert torch.equal(values, after["generator"][name, kind])
        elif kind in MOMENTS:
            assert not torch.equal(values, after["generator"][name, kind])
    weights = [key for key in before["discriminator"] if key[1] == WEIGHT]
    for key in weights:
        change = (after["discriminator"][key] - before["discriminator"][key]).abs().max()
        assert 1e-4 < change < 1.3e-3  # Adam's first step is the rate, plus decay


@pytest.mark.parametrize("stage", STAGES)
def test_norm_of_a_parameter(world, stage):
    one = rig(world, stage=stage)
    one.run(0)
    name = "deberta.embeddings.word_embeddings._weight"
    expected = state(one, "discriminator")[name, WEIGHT].double().norm().item()
    assert parameter_norm(one.engines.by_name["discriminator"], name, world) == pytest.approx(
        expected
    )


def test_sums_are_those_of_the_step(world):
    """Counts of the metrics against counting by hand."""
    one = rig(world, micro=2)
    result = one.run(0)
    batch = sequence_batch(range(8))
    slots = one.keys.mask(batch)
    figures = ratios(result.sums, "train")
    tokens, masked = int(batch.lengths_B.sum()), int(slots.valid_BK.sum())
    assert figures["train/replaced_fraction"] * tokens <= masked
    assert result.sums[2] == masked
    assert result.sums[-1] == tokens
    assert result.sums[5] + result.sums[7] == tokens


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_repeats_bit_for_bit(world, stage):
    states = []
    for _ in range(2):
        one = rig(world, stage=stage)
        for step in range(3):
            one.run(step)
        states.append({network: state(one, network) for network in NETWORKS})
    for network in NETWORKS:
        assert_equal(states[0][network], states[1][network])
