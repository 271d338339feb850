"""Norms that come to the host once: the same bits as DeepSpeed's own, and the same refusals."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline import engine_stepping
from pipeline.engine_reads import HostRead, replaced, step_replicated
from pipeline.engine_state import inner_optimizer
from pipeline.optimizer import FiniteGuardAdamW
from tests.engines import rig, small_pair

SETTINGS = [(1, "fp32"), (1, "bf16"), (2, "bf16"), (2, "fp16"), (3, "fp32"), (3, "fp16")]
FACTORS = [1.0, float("inf"), 1.0, float("nan"), 1.0]
"""Of the generator's loss, step by step."""


def test_passengers_come_along():
    passengers = torch.tensor([1 / 3, float("nan")], dtype=torch.float64)
    read = HostRead(passengers)
    values = torch.tensor([0.1, float("inf")])
    brought = read.bring(values)
    assert brought.dtype == torch.float32
    assert torch.equal(brought, values)
    passengers.zero_()
    assert read.passengers[0] == torch.tensor(1 / 3, dtype=torch.float64)
    assert read.passengers[1].isnan()


def test_passengers_whom_no_step_brought_are_read_at_last():
    read = HostRead(torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert read.passengers.tolist() == [2.0, 3.0]


def test_attributes_are_replaced_for_a_while_alone():
    class Owner:
        own = "of the class"

    one = Owner()
    with contextlib.suppress(ZeroDivisionError), replaced(one, own=1, other=2):
        assert (one.own, one.other) == (1, 2)
        raise ZeroDivisionError
    assert one.own == "of the class"
    assert vars(one) == {}


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """DeepSpeed refuses fp16 on CPUs, which compute it slowly."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def train(world, stage, precision):
    """Norms, refusals and sums of some steps, and the weights behind the last one."""
    one = rig(world, pair=small_pair(), stage=stage, precision=precision, clipping=0.01)
    seen = []
    for step, factor in enumerate(FACTORS):
        handle = one.module("generator").register_forward_hook(
            lambda _m, _a, out, factor=factor: out._replace(loss_sum=out.loss_sum * factor)
        )
        result = one.run(step)
        handle.remove()
        assert result.outcomes["generator"].applied == (factor == 1.0)
        assert result.outcomes["discriminator"].applied
        seen += [torch.tensor([each.grad_norm for each in result.outcomes.values()]), result.sums]
    for engine in one.engines.by_name.values():
        seen.append(torch.tensor(getattr(engine.optimizer, "loss_scale", 1.0)))
        seen += [flat.detach().clone() for flat in inner_optimizer(engine).state]
    return seen


@pytest.mark.usefixtures("fp16_on_a_cpu")
@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_steps_are_those_of_deepspeed_alone(world, monkeypatch, stage, precision):
    ours = train(world, stage, precision)
    monkeypatch.setattr(
        engine_stepping, "reading_once", lambda _engine, _read: contextlib.nullcontext()
    )
    theirs = train(world, stage, precision)
    assert len(ours) == len(theirs)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_the_replicated_step_clips_as_deepspeed_does(world, monkeypatch):
    ours = train(world, 0, "fp32")

    def their_step(engine, _read):
        norms = torch.stack([p.grad.norm() for p in engine.module.parameters()])
        engine.step()
        applied = not engine.optimizer.last_step_skipped
        return applied, float(norms.square().sum().sqrt())

    monkeypatch.setattr(engine_stepping, "step_replicated", their_step)
    theirs = train(world, 0, "fp32")
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_a_norm_that_overflows_is_no_reason_to_refuse():
    """At stage 0, where gradients that are finite and longer than fp32 are clipped to nothing."""
    module = nn.Linear(3, 1, bias=False)
    guard = FiniteGuardAdamW(module.parameters(), lr=0.1, weight_decay=0.0)
    engine = SimpleNamespace(module=module, optimizer=guard, gradient_clipping=lambda: 1.0)
    engine.step = lambda: (engine.clip_fp32_gradients(), guard.step())
    before = module.weight.detach().clone()
    module.weight.grad = torch.full_like(module.weight, 3e38)
    assert step_replicated(engine, HostRead()) == (True, float("inf"))
    assert torch.equal(module.weight, before)
    module.weight.grad = torch.full_like(module.weight, float("inf"))
    assert step_replicated(engine, HostRead()) == (False, float("inf"))
