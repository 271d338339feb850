"""Learning rates by network; `tests/distributed/test_micro_steps_vary.py` takes real steps."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.config import OptimizerSection
from pipeline.engine_stepping import set_learning_rates


@pytest.mark.parametrize(("rate", "expected"), [(5e-4, 5e-4), (None, 1e-3)])
def test_each_group_follows_the_rate_of_its_network(rate, expected):
    section = OptimizerSection(generator_learning_rate=1e-3, discriminator_learning_rate=rate)
    groups = [
        {"params": [torch.zeros(1)], "network": network, "lr": 9.0}
        for network in ("generator", "generator", "discriminator")
    ]
    engine = SimpleNamespace(optimizer=torch.optim.AdamW(groups))
    set_learning_rates(engine, section, 0.25)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    assert rates == [0.25 * 1e-3, 0.25 * 1e-3, 0.25 * expected]
