"""Parameter groups, the choice of AdamW, and the guard against non-finite steps."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from pipeline.config import OptimizerSection
from pipeline.optimizer import FiniteGuardAdamW, build_optimizer, parameter_groups

SECTION = OptimizerSection(
    generator_learning_rate=1e-3,
    discriminator_learning_rate=1e-3,
    betas=(0.8, 0.95),
    eps=1e-5,
    weight_decay=0.01,
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


def build(parameters, **options):
    groups = parameter_groups([(f"w{i}", p) for i, p in enumerate(parameters)], 0.01)
    defaults = {"learning_rate": 0.1, "device_type": "cpu", "zero_stage": 1}
    return build_optimizer(groups, SECTION, **(defaults | options))


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
