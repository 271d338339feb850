"""What engines of every ZeRO stage own, written and read back through one form."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from data_prep.errors import CorruptError
from pipeline.engine_state import (
    MOMENTS,
    WEIGHT,
    StateReader,
    inner_optimizer,
    local_slices,
    restore_state,
    scalar_state,
    snapshot,
    state_bytes,
    write_snapshot,
)
from tests.engines import rig, small_pair

NETWORKS = ("generator", "discriminator")
KINDS = (WEIGHT, *MOMENTS)
SETTINGS = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


def run_two_steps(one):
    for step in range(2):
        result = one.run(step)
        assert result.outcomes["generator"].applied
        assert result.outcomes["discriminator"].applied


def write(engine, folder):
    folder.mkdir(parents=True)
    taken = snapshot(engine, 0)
    assert state_bytes(engine, 0) == sum(values.nbytes for values in taken.tensors.values())
    write_snapshot(taken, folder / "rank-00000.safetensors")
    return StateReader(folder)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """(stage, precision) -> engines after two steps, and readers of what they wrote; read-only."""
    rigs = {}

    def get(stage, precision):
        if (stage, precision) not in rigs:
            one = rig(world, stage=stage, precision=precision)
            run_two_steps(one)
            folder = tmp_path_factory.mktemp("state")
            written = {n: write(e, folder / n) for n, e in one.engines.by_name.items()}
            rigs[stage, precision] = one, written
        return rigs[stage, precision]

    return get


@pytest.fixture(scope="module")
def plain(trained):
    """The state after two steps from torch's own objects, which stage 0 leaves as they are."""
    one, _ = trained(0, "fp32")
    result = {}
    for network, engine in one.engines.by_name.items():
        adam = engine.optimizer.state
        for name, p in engine.module.named_parameters():
            kinds = {WEIGHT: p.detach().clone(), **{k: adam[p][k].clone() for k in MOMENTS}}
            result[network, name] = kinds
    return result


@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_fp32_weights_begin_with_all_their_digits(world, stage, precision):
    """Else a model that is continued in bf16 would lose digits before its first step."""
    pair = small_pair()
    exact = {
        (network, name): p.detach().clone().view(-1)
        for network, module in pair.trained_modules().items()
        for name, p in module.named_parameters()
    }
    assert any(not torch.equal(w.bfloat16().float(), w) for w in exact.values())
    one = rig(world, pair=pair, stage=stage, precision=precision)
    for _ in range(2):
        found = {
            (network, part.name): part.tensors[WEIGHT].clone()
            for network, engine in one.engines.by_name.items()
            for part in local_slices(engine, 0)
        }
        assert found.keys() == exact.keys()
        assert all(torch.equal(found[key], exact[key]) for key in exact)
        one.run(0, generator=0.0, discriminator=0.0)  # a step at rate 0 changes nothing


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_only_weights_that_deepspeed_rounds_are_copied(world, monkeypatch, stage, precision):
    """A copy of fp32 weights would be as large as the network, and hold nothing new."""
    copied = []

    def count(_engine, _rank, exact):
        copied.append(sum(w.numel() for w in exact.values()))

    monkeypatch.setattr("pipeline.engine.write_weights", count)
    one = rig(world, stage=stage, precision=precision)
    expected = []
    if precision == "bf16":
        modules = small_pair().trained_modules().values()
        expected = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert copied == expected
    held = [inner_optimizer(engine).state for engine in one.engines.by_name.values()]
    assert not any("exp_avg" in state for each in held for state in each.values())


@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_every_stage_writes_the_same_state(trained, plain, stage, precision):
    one, written = trained(stage, precision)
    for network, reader in written.items():
        assert reader.names == sorted(name for n, name in plain if n == network)
        assert scalar_state(one.engines.by_name[network]) == {"adam_step": 2, "loss_scaler": {}}
    for (network, name), kinds in plain.items():
        shape = kinds[WEIGHT].shape
        for kind, expected in kinds.items():
            ours = written[network].read(name, kind, 0, shape.numel()).view(shape)
            if precision == "fp32":
                tolerance = 1e-4 * expected.abs().max().item() + 1e-12
            else:  # bf16 gradients: a weight can differ by whole steps of Adam, two of 1e-3
                tolerance = 5e-3 if kind == WEIGHT else float("inf")
            assert (ours - expected).abs().max() <= tolerance, (name, kind)


@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_weights_are_the_module_s(trained, stage, precision):
    one, written = trained(stage, precision)
    for network, reader in written.items():
        parameters = dict(one.engines.by_name[network].module.named_parameters())
        shapes = {
            name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()
        }
        for name, weight in reader.weights(shapes).items():
            here = getattr(parameters[name], "ds_tensor", parameters[name]).detach().flatten()
            here = here[: weight.numel()]  # stage 3 pads
            assert weight.dtype == torch.float32
            assert torch.equal(weight.flatten().to(here.dtype), here), name


@pytest.mark.parametrize("target", [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
@pytest.mark.parametrize("source", [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_state_moves_between_stages_without_a_rounding(world, trained, source, target, tmp_path):
    _, written = trained(*source)
    second = rig(world, stage=target[0], precision=target[1])
    for network, engine in second.engines.by_name.items():
        reader = written[network]
        restore_state(engine, 0, reader, {"adam_step": 2, "loss_scaler": {}})
        assert scalar_state(engine)["adam_step"] == 2
        again = write(engine, tmp_path / network)
        assert again.names == reader.names
        for name, parameter in engine.module.named_parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())
            for kind in KINDS:
                left, right = (each.read(name, kind, 0, count) for each in (reader, again))
                assert torch.equal(left, right), (name, kind)


@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_state_can_be_written_before_the_first_step(world, stage, precision, tmp_path):
    one = rig(world, stage=stage, precision=precision)
    reader = write(one.engines.by_name["generator"], tmp_path / "generator")
    assert scalar_state(one.engines.by_name["generator"])["adam_step"] == 0
    for name, parameter in one.module("generator").named_parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        assert not any(reader.read(name, kind, 0, count).any() for kind in MOMENTS)
    run_two_steps(one)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_a_restored_engine_goes_on_bit_for_bit(world, trained, stage, precision):
    _, written = trained(stage, precision)
    undisturbed = rig(world, stage=stage, precision=precision)
    run_two_steps(undisturbed)
    pair = small_pair()
    for network, module in pair.trained_modules().items():
        shapes = {name: p.shape for name, p in module.named_parameters()}
        for name, weight in written[network].weights(shapes).items():
            module.get_parameter(name).data.copy_(weight)
    resumed = rig(world, stage=stage, precision=precision, pair=pair)
    for network, engine in resumed.engines.by_name.items():
        restore_state(engine, 0, written[network], {"adam_step": 2, "loss_scaler": {}})
    left, right = undisturbed.run(2), resumed.run(2)
    assert torch.equal(left.sums, right.sums)
    assert left.outcomes == right.outcomes
    for network in NETWORKS:
        engines = (one.engines.by_name[network] for one in (undisturbed, resumed))
        for one, two in zip(*(local_slices(engine, 0) for engine in engines), strict=True):
            assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in KINDS), one.name


def write_parts(folder, *parts):
    """Rank files with slices of one parameter `w` of ten elements: (start, values) each."""
    for rank, (start, values) in enumerate(parts):
        tensors = {f"{kind}/w": values + index for index, kind in enumerate(KINDS)}
        path = folder / f"rank-{rank:05d}.safetensors"
        save_file(tensors, path, metadata={"starts": f'{{"w": {start}}}'})
    return StateReader(folder)


TEN = torch.arange(10.0)


@pytest.mark.parametrize("cuts", [[0, 10], [0, 5, 10], [0, 1, 4, 9, 10]])
def test_any_run_of_elements_is_read_across_files(tmp_path, cuts):
    reader = write_parts(tmp_path, *((a, TEN[a:b].clone()) for a, b in pairwise(cuts)))
    for start in range(10):
        for count in range(1, 11 - start):
            expected = TEN[start : start + count]
            assert torch.equal(reader.read("w", WEIGHT, start, count), expected)
            assert torch.equal(reader.read("w", "exp_avg_sq", start, count), expected + 2)
    assert torch.equal(reader.weights({"w": torch.Size([2, 5])})["w"], TEN.view(2, 5))


def test_missing_elements_are_refused(tmp_path):
    reader = write_parts(tmp_path, (0, TEN[:4].clone()), (5, TEN[5:].clone()))
    assert torch.equal(reader.read("w", WEIGHT, 5, 5), TEN[5:])
    with pytest.raises(CorruptError, match="elements 0 to 10 of w are not there exactly once"):
        reader.read("w", WEIGHT, 0, 10)


def test_elements_that_are_there_twice_are_refused(tmp_path):
    reader = write_parts(tmp_path, (0, TEN.clone()), (0, TEN.clone()))
    with pytest.raises(CorruptError, match="not there exactly once"):
        reader.read("w", WEIGHT, 0, 10)


def test_a_gap_that_an_overlap_fills_up_is_refused(tmp_path):
    """Five elements twice and five not at all make ten."""
    reader = write_parts(tmp_path, (0, TEN[:5].clone()), (0, TEN[:5].clone()))
    with pytest.raises(CorruptError, match="not there exactly once"):
        reader.read("w", WEIGHT, 0, 10)


def test_another_model_s_state_is_refused(tmp_path):
    reader = write_parts(tmp_path, (0, TEN.clone()))
    with pytest.raises(CorruptError, match=r"parameters differ from the model's: v, w"):
        reader.weights({"v": torch.Size([10])})
    with pytest.raises(CorruptError, match="not there exactly once"):
        reader.weights({"w": torch.Size([11])})
    with pytest.raises(CorruptError, match="not there exactly once"):
        reader.read("v", WEIGHT, 0, 1)
