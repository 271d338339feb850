"""A pair of networks that goes back to a commit in place, in the test's own process.

`tests/distributed/test_reload_in_place.py` does it on three ranks, for every kind of optimizer.
"""

import pytest
import torch

from pipeline import faults
from pipeline.engine_reload import reload_state
from pipeline.engine_state import local_slices, scalar_state, snapshot, write_snapshot
from pipeline.rank_files import StateReader
from tests.engines import rig

NOT_FINITE = ";".join(f"step.{network}_loss:*:5:nan" for network in ("generator", "discriminator"))
SETTINGS = [
    (0, "fp32"),
    (1, "fp32"),
    (1, "bf16"),
    (2, "fp32"),
    (2, "bf16"),
    (3, "fp32"),
    (3, "bf16"),
]


def held(one):
    """Copies of all weights and averages, and of the module's own weights."""
    copies = {}
    for network, engine in one.engines.by_name.items():
        for part in local_slices(engine, 0):
            for kind, values in part.tensors.items():
                copies[network, part.name, kind] = values.detach().clone()
        for name, parameter in engine.module.named_parameters():
            mine = getattr(parameter, "ds_tensor", parameter)
            count = getattr(parameter, "ds_numel", parameter.numel())
            copies[network, name, "module"] = mine.detach().flatten()[:count].clone()
    return copies


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_training_goes_on_as_if_the_lost_steps_had_never_been(world, stage, precision, tmp_path):
    undisturbed = rig(world, stage=stage, precision=precision)
    one = rig(world, stage=stage, precision=precision)
    for step in (0, 1):
        undisturbed.run(step)
        one.run(step)
    committed, scalars = held(one), {}
    for network, engine in one.engines.by_name.items():
        scalars[network] = scalar_state(engine)
        (tmp_path / network).mkdir()
        write_snapshot(snapshot(engine, 0), tmp_path / network / "rank-00000.safetensors")
    faults.configure(NOT_FINITE, rank=0)
    try:
        applied = [one.run(step).outcomes["generator"].applied for step in (2, 3, 4, 5)]
    finally:
        faults.configure("", rank=0)
    assert applied == [True, True, True, False]
    assert not equal(held(one), committed)
    for network, engine in one.engines.by_name.items():
        reload_state(engine, 0, StateReader(tmp_path / network), scalars[network])
        assert scalar_state(engine) == scalars[network]
    assert equal(held(one), committed)
    for step in (2, 3):
        left, right = undisturbed.run(step), one.run(step)
        assert torch.equal(left.sums, right.sums)
        assert left.outcomes == right.outcomes
    assert equal(held(one), held(undisturbed))
