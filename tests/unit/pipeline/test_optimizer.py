"""Parameter groups, the choice of AdamW, steps without bias correction, and non-finite steps."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from pipeline.config import OptimizerSection
from pipeline.optimizer import (
    FiniteGuardAdamW,
    UncorrectedAdamW,
    build_optimizer,
    parameter_groups,
)
from tests.gpu.host_reads import HostReads
from tests.reference.plain_adamw import PlainAdamW

SECTION = OptimizerSection(
    generator_learning_rate=1e-3,
    discriminator_learning_rate=1e-3,
    betas=(0.8, 0.95),
    eps=1e-5,
    weight_decay=0.01,
)
RELEASED = OptimizerSection(  # the released code's constants
    generator_learning_rate=1e-3, betas=(0.9, 0.999), weight_decay=0.01, bias_correction=False
)
DECAYS = [
    "deberta.embeddings.word_embeddings.weight",
    "deberta.embeddings.word_embeddings._weight",  # Delta
    "deberta.embeddings.position_embeddings.weight",
    "deberta.encoder.rel_embeddings.weight",
    "deberta.encoder.layer.0.attention.self.query_proj.weight",
    "mask_predictions.classifier.weight",
]
DOES_NOT = [
    "deberta.embeddings.LayerNorm.weight",
    "deberta.embeddings.LayerNorm.bias",
    "deberta.encoder.LayerNorm.weight",
    "deberta.encoder.layer.0.attention.self.query_proj.bias",
    "lm_predictions.lm_head.LayerNorm.weight",
    "lm_predictions.lm_head.bias",
]


def weights(*values):
    return [nn.Parameter(torch.tensor([value])) for value in values]


def test_names_decide_what_decays():
    named = {name: nn.Parameter(torch.zeros(1)) for name in (*DOES_NOT, *DECAYS)}
    decay, no_decay = parameter_groups(named.items(), weight_decay=0.25)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.25)
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)
    assert [id(p) for p in decay["params"]] == [id(named[name]) for name in DECAYS]
    assert [id(p) for p in no_decay["params"]] == [id(named[name]) for name in DOES_NOT]


def test_frozen_parameters_and_empty_groups_are_left_out():
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    (group,) = parameter_groups([("a.weight", nn.Parameter(torch.zeros(1))), ("b", frozen)], 0.1)
    assert group["name"] == "decay"
    assert len(group["params"]) == 1


def build(parameters, section=SECTION, **options):
    groups = parameter_groups([(f"w{i}", p) for i, p in enumerate(parameters)], 0.01)
    defaults = {"learning_rate": 0.1, "device_type": "cpu", "zero_stage": 1}
    return build_optimizer(groups, section, **(defaults | options))


def test_the_runs_constants_reach_adam():
    (group,) = build(weights(1.0)).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.95), 1e-5)
    assert group["weight_decay"] == 0.01


def test_the_class_follows_stage_device_and_offload():
    class CpuAdam(Optimizer):
        def __init__(self, params, **defaults):
            super().__init__(params, defaults)

    assert type(build(weights(1.0))) is AdamW
    assert type(build(weights(1.0), zero_stage=0)) is FiniteGuardAdamW
    assert build(weights(1.0), device_type="cuda").defaults["fused"] is True
    assert build(weights(1.0)).defaults["fused"] is False
    offloaded = build(weights(1.0), zero_stage=2, cpu_offload_class=CpuAdam)
    assert type(offloaded) is CpuAdam
    assert offloaded.defaults["adamw_mode"] is True
    assert offloaded.defaults["betas"] == (0.8, 0.95)
    assert offloaded.defaults["bias_correction"] is True
    offloaded = build(weights(1.0), RELEASED, zero_stage=2, cpu_offload_class=CpuAdam)
    assert offloaded.defaults["bias_correction"] is False


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_without_bias_correction_there_are_classes_of_their_own(device_type):
    plain, guarded = (
        build(weights(1.0), RELEASED, zero_stage=stage, device_type=device_type) for stage in (1, 0)
    )
    assert type(plain) is UncorrectedAdamW
    assert isinstance(guarded, FiniteGuardAdamW)
    assert isinstance(guarded, UncorrectedAdamW)
    assert guarded.defaults["fused"] is (device_type == "cuda")


def test_an_uncorrected_first_step_by_hand():
    """m = 0.1 g, v = 0.001 g^2, so w - r (0.1 / sqrt(0.001) sign(g) + d w): 3.16 rates long."""
    (weight,) = weights(2.0)
    optimizer = build([weight], RELEASED)
    weight.grad = torch.tensor([-0.5])
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.1 * (-(10**0.5) + 0.01 * 2.0), rel=1e-5)


RATES = [0.0, 1e-3, 2e-3, *[3e-3] * 20]


def steps_of(optimizer, parameters, rates, *, infinite_at=()):
    """Take steps with random gradients; some of them with one that is not finite."""
    generator = torch.Generator().manual_seed(3)
    for number, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter in parameters.values():
            scale = torch.rand((), generator=generator).item() ** 4  # from tiny to ordinary
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
        if number in infinite_at:
            parameter.grad[0] = float("inf")
        yield {name: p.grad.clone() for name, p in parameters.items()}, rate


@pytest.mark.parametrize("section", [RELEASED, SECTION], ids=["uncorrected", "corrected"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stage", [0, 1])
def test_many_steps_equal_the_plain_formula(section, fused, stage):
    """Both kernels, both classes; at stage 0 with steps in between that count for nothing."""
    skipped = {4, 5, 9} if stage == 0 else set()
    torch.manual_seed(1)
    parameters = {name: nn.Parameter(torch.randn(7)) for name in ("a.weight", "a.bias")}
    expected = {name: p.detach().double() for name, p in parameters.items()}
    reference = PlainAdamW(expected, section)
    optimizer = build_optimizer(
        parameter_groups(parameters.items(), section.weight_decay),
        section,
        learning_rate=1.0,
        device_type="cuda" if fused else "cpu",
        zero_stage=stage,
    )
    walk = steps_of(optimizer, parameters, RATES, infinite_at=skipped)
    for number, (gradients, rate) in enumerate(walk):
        optimizer.step()
        if number not in skipped:
            gradients = {name: gradient.double() for name, gradient in gradients.items()}
            reference.step(gradients, dict.fromkeys(expected, rate))
        for name, weight in expected.items():
            torch.testing.assert_close(
                parameters[name].detach().double(), weight, rtol=0, atol=1e-6
            )
    assert reference.steps == len(RATES) - len(skipped)
    assert optimizer.state[parameters["a.bias"]]["step"] == reference.steps


def test_an_uncorrected_step_leaves_the_written_constants():
    parameters = {"a.weight": nn.Parameter(torch.ones(3))}
    optimizer = build(parameters.values(), RELEASED)
    for _, rate in steps_of(optimizer, parameters, RATES[:3]):
        optimizer.step()
        (group,) = optimizer.param_groups
        assert (group["lr"], group["eps"], group["weight_decay"]) == (rate, 1e-6, 0.01)


def test_a_restored_counter_is_the_uncorrected_one_s():
    """As `pipeline.engine_state` restores it: t comes from the state, not from the object."""
    first, second = ({"w": nn.Parameter(torch.ones(5))} for _ in range(2))
    optimizer, resumed = (build(p.values(), RELEASED) for p in (first, second))
    walk = list(steps_of(optimizer, first, RATES[:6]))
    for number, (gradients, rate) in enumerate(walk):
        if number == 3:
            second["w"].data.copy_(first["w"])
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one, parameters in ((optimizer, first), (resumed, second)):
            if one is optimizer or number >= 3:
                one.param_groups[0]["lr"] = rate
                parameters["w"].grad = gradients["w"]
                one.step()
    assert torch.equal(first["w"], second["w"])


@pytest.mark.parametrize("stage", [0, 1])
def test_uncorrected_steps_of_the_fused_kernel_read_nothing(stage):
    """A GPU keeps the counter where the host would wait for it, in every step and group."""
    parameters = {"a.weight": nn.Parameter(torch.ones(3)), "a.bias": nn.Parameter(torch.ones(3))}
    optimizer = build_optimizer(
        parameter_groups(parameters.items(), 0.01),
        RELEASED,
        learning_rate=0.1,
        device_type="cuda",
        zero_stage=stage,
    )
    with HostReads() as reads:
        for number, _ in enumerate(steps_of(optimizer, parameters, RATES[:6])):
            if number == 4:  # as a roll-back writes it
                for state in optimizer.state.values():
                    state["step"].fill_(1)
            reads.mark("written" if number == 4 else "known", number)
            if stage == 0:
                optimizer.gradients_are_finite = True
            optimizer.step()
            reads.mark("next gradients", number)
    assert [state["step"].item() for state in optimizer.state.values()] == [3, 3]
    assert not reads.of("known")
    assert sum(reads.of("written").values()) == 2


def test_the_guard_believes_whoever_has_looked_for_one_step():
    (weight,) = weights(1.0)
    guard = build([weight], zero_stage=0)
    weight.grad = torch.tensor([0.5])
    guard.gradients_are_finite = False
    guard.step()
    assert guard.last_step_skipped
    assert weight.item() == 1.0
    guard.step()
    assert not guard.last_step_skipped, "the next step looks for itself"
    assert guard.skipped_steps == 1
    weight.grad = torch.tensor([float("nan")])
    guard.step()
    assert guard.last_step_skipped


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed compiles its CPU Adam on first use")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", [RELEASED, SECTION], ids=["uncorrected", "corrected"])
def test_deepspeed_s_cpu_adam_equals_the_plain_formula(section):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameters = {name: nn.Parameter(torch.ones(70)) for name in ("a.weight", "a.bias")}
    expected = {name: p.detach().double() for name, p in parameters.items()}
    reference = PlainAdamW(expected, section)
    optimizer = build_optimizer(
        parameter_groups(parameters.items(), section.weight_decay),
        section,
        learning_rate=1.0,
        device_type="cuda",
        zero_stage=2,
        cpu_offload_class=DeepSpeedCPUAdam,
    )
    for gradients, rate in steps_of(optimizer, parameters, RATES):
        optimizer.step()
        gradients = {name: gradient.double() for name, gradient in gradients.items()}
        reference.step(gradients, dict.fromkeys(expected, rate))
    for name, weight in expected.items():
        # 23 roundings of about 1; with the other correction the weights differ by 1e-2.
        torch.testing.assert_close(parameters[name].detach().double(), weight, rtol=0, atol=3e-6)


def test_a_step_by_hand():
    """Loshchilov & Hutter, arXiv:1711.05101: decoupled decay, bias-corrected averages."""
    (weight,) = weights(2.0)
    optimizer = build([weight])
    mean = square = 0.0
    expected = 2.0
    for step, gradient in enumerate((0.5, -1.5, 0.25), start=1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        corrected = (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)) ** 0.5 + 1e-5)
        expected = expected - 0.1 * 0.01 * expected - 0.1 * corrected
    assert weight.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_guard_leaves_everything_as_it_was(bad):
    first, second = parameters = weights(1.0, 1.0)
    optimizer = build(parameters, zero_stage=0)
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]

    second.grad = torch.tensor([bad])
    optimizer.step()
    assert optimizer.last_step_skipped
    assert optimizer.skipped_steps == 1
    for parameter, weight, averages in zip(parameters, before, state, strict=True):
        assert torch.equal(parameter, weight)
        assert all(torch.equal(optimizer.state[parameter][k], v) for k, v in averages.items())

    second.grad = torch.ones(1)
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert optimizer.skipped_steps == 1
    assert optimizer.state[first]["step"].item() == 2


def test_the_guard_steps_as_adamw_does():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    guarded = build(ours.parameters(), zero_stage=0)
    plain = build(theirs.parameters())
    for _ in range(5):
        x = torch.randn(4, 3)
        for module, optimizer in ((ours, guarded), (theirs, plain)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_the_guard_does_not_mistake_large_gradients_for_infinite_ones():
    parameters = weights(1.0, 1.0)
    optimizer = build(parameters, zero_stage=0)
    for parameter in parameters:
        parameter.grad = torch.tensor([3e38])  # their 2-norm overflows in fp32
    optimizer.step()
    assert not optimizer.last_step_skipped


def test_the_guard_bears_parameters_without_gradient():
    optimizer = build(weights(1.0), zero_stage=0)
    optimizer.step()
    assert not optimizer.last_step_skipped
