"""No part of a micro step needs a value on the host; an optimizer's boundary reads once.

On a CPU and on meta tensors these tests look at the structure; `test_device_habits` counts what a
GPU makes the host wait for.
"""

import gc
import weakref

import pytest
import torch

from pipeline.config import ObjectiveSection
from pipeline.masking import MaskingVocabulary, MaskKeys, choose_masks
from pipeline.metrics import ratios
from pipeline.training_step import StepHooks
from tests.engines import rig, sequence_batches, small_config, small_pair
from tests.gpu.host_reads import HostReads
from tests.gpu.networks_on_device import MASK_ID, VOCABULARY, MicroBatch, dropout_keys, micro_step
from tests.gpu.networks_on_device import pair as network_pair

META = torch.device("meta")
MASKS_OF_A_CPU = "masking.py:choose_on_host"
"""Masks of tokens that are on the host are chosen there; on a device that is another path."""


def test_reads_are_seen():
    x = torch.ones(3)
    with HostReads() as reads:
        reads.mark("generator forward 2", 0)
        float(x.sum())
        bool((x > 0).all())
        x[x > 0]
        x.nonzero()
        x[torch.tensor([0])]
        x.tolist()
        torch.tensor(2.0, device="cpu")
        x.masked_fill_(x > 0, x[0])
        host = torch.tensor([1.0, 2.0])
        bool(host[0].clamp(min=1) / 3 > 0)
        float(host.sum() * x[0])
    assert sum(reads.found.values()) == 8
    assert set(reads.of("forward")) == {
        "generator forward: gpu/test_host_reads.py:test_reads_are_seen"
    }


@pytest.mark.parametrize("law", ["uniform", "windowed"])
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_a_micro_step_of_tensors_without_values(backend, law):
    """On meta tensors whatever asks for a value raises."""
    networks = network_pair(META, attention_backend=backend)
    batch = MicroBatch.make(META, length=64)
    batch.choose(law)
    mlm, rtd = micro_step(networks, batch, dropout_keys(META))
    assert mlm.loss_sum.device == rtd.loss_sum.device == META


@pytest.mark.parametrize("law", ["uniform", "windowed"])
def test_whole_words_are_masked_without_values(law):
    batch = MicroBatch.make(META, length=64)
    objective = ObjectiveSection(masking_law=law, whole_word_masking=True, max_ngram=3)
    starts = torch.ones(VOCABULARY, dtype=torch.bool, device=META)
    masked = choose_masks(
        batch.ids,
        batch.lengths,
        batch.words,
        objective,
        MaskKeys.derive(7, "train", 64),
        MaskingVocabulary(MASK_ID, starts),
    )
    assert masked.positions_BK.device == META


THE_READ = "pipeline/engine_reads.py:bring"
"""The gradient's norm; with the last one come the sums of the step."""
ADAM_OF_A_CPU = {"zero/stage_1_and_2.py:_optimizer_step", "runtime/bf16_optimizer.py:step"}
ADAM_OF_A_CPU |= {"zero/stage3.py:step_with_gradscaler", "pipeline/optimizer.py:step"}
"""Its counter of steps, which the fused kernel of a GPU keeps there."""
DECOUPLED = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (1, "autocast"), (2, "bf16"), (2, "fp16")]
DECOUPLED += [(3, "fp32"), (3, "bf16"), (3, "fp16")]
CELLS = [(*cell, "decoupled") for cell in DECOUPLED] + [
    (0, "autocast", "joint"),
    (3, "bf16", "joint"),
]


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """DeepSpeed refuses fp16 on CPUs, which compute it slowly."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


@pytest.mark.usefixtures("fp16_on_a_cpu")
@pytest.mark.parametrize(("stage", "precision", "update"), CELLS)
def test_the_host_reads_once_at_each_boundary_and_never_in_a_micro_step(
    world, stage, precision, update
):
    """All that the host waits for in an optimizer step: decoupled two reads, joint one."""
    reads = HostReads()
    one = rig(
        world,
        objective=ObjectiveSection(update=update),
        hooks=StepHooks(mark=reads.mark),
        stage=stage,
        precision=precision,
    )
    one.run(0)  # tables of positions are built, and buffers of the engine
    batches = sequence_batches(1, one.plan)
    with reads:
        result = one.step(1, batches, one.keys, one.prepare())
        reads.mark("behind the step", 1)
        losses = ratios(result.sums, "train")
        assert all(outcome.grad_norm > 0 for outcome in result.outcomes.values())
    assert losses["train/mlm_loss"] > 0
    found = {
        place: count
        for place, count in reads.of("").items()
        if not place.endswith(MASKS_OF_A_CPU) and place.partition(": ")[2] not in ADAM_OF_A_CPU
    }
    engines = ("joint",) if update == "joint" else ("generator", "discriminator")
    assert found == {f"{name} update: {THE_READ}": 1 for name in engines}


def test_the_generators_graph_is_gone_before_the_discriminator_begins(world):
    """What autograd keeps of the generator would lie beside the discriminator's activations."""
    alive: weakref.WeakSet = weakref.WeakSet()
    seen: dict[str, int] = {}

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    def mark(phase, _step):
        gc.collect()
        seen[phase] = len(alive)

    config = small_config(layers=3)
    one = rig(world, pair=small_pair(config=config), hooks=StepHooks(mark=mark))
    assert len(sequence_batches(0, one.plan)) == 2
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        one.run(0)
    assert seen["generator backward 0"] > 50
    assert seen["generator forward 1"] == 0
    assert seen["discriminator forward 0"] == 0
    assert seen["discriminator backward 0"] > 50
    assert seen["discriminator forward 1"] == 0
