"""No part of a micro step needs a value on the host; what the optimizer's boundary reads is listed.

On a CPU and on meta tensors these tests look at the structure; `test_device_habits` counts what a
GPU makes the host wait for.
"""

import gc
import weakref

import pytest
import torch

from pipeline.config import ObjectiveSection
from pipeline.masking import MaskingVocabulary, MaskKeys, choose_masks
from pipeline.training_step import StepHooks
from tests.engines import rig, sequence_batches, small_config, small_pair
from tests.gpu.host_reads import HostReads
from tests.gpu.networks_on_device import MASK_ID, VOCABULARY, MicroBatch, dropout_keys, micro_step
from tests.gpu.networks_on_device import pair as network_pair

META = torch.device("meta")
MASKS_OF_A_CPU = "masking.py:choose_on_host"
"""Masks of tokens that are on the host are chosen there; on a device that is another path."""
MICRO_STEP = ("masks", "forward", "backward", "sums")


def test_reads_are_seen():
    x = torch.ones(3)
    with HostReads() as reads:
        reads.mark("generator forward 2", 0)
        float(x.sum())
        bool((x > 0).all())
        x[x > 0]
        x.nonzero()
        x[torch.tensor([0])]
    assert sum(reads.found.values()) == 4
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


OURS = "pipeline/engine_stepping.py:step_engine"
"""The gradient norm, for metrics.jsonl."""
ADAM_OF_A_CPU = {"zero/stage_1_and_2.py:_optimizer_step", "runtime/bf16_optimizer.py:step"}
"""Its counter of steps, which the fused kernel of a GPU keeps there."""
GUARD = "pipeline/optimizer.py:step"
IS_FINITE = "runtime/utils.py:is_invalid_grad_norm"
# All that the host waits for at the boundary of an optimizer step, DeepSpeed 0.19.8.
BOUNDARY = {
    (0, "fp32"): {OURS, GUARD},
    (1, "fp32"): {OURS, IS_FINITE},
    (1, "bf16"): {OURS, IS_FINITE, "runtime/utils.py:clip_tensors_by_global_norm"},
    (2, "bf16"): {OURS, IS_FINITE, "zero/stage_1_and_2.py:has_overflow"},
}


@pytest.mark.parametrize(("stage", "precision"), BOUNDARY)
@pytest.mark.parametrize("update", ["decoupled", "joint"])
def test_the_host_reads_nothing_in_the_micro_steps_of_a_training_step(
    world, stage, precision, update
):
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
        one.step(1, batches, one.keys, one.prepare())
    found = [where for where in reads.of(*MICRO_STEP) if not where.endswith(MASKS_OF_A_CPU)]
    assert found == []
    places = {where.partition(": ")[2] for where in reads.of("update")}
    assert places - ADAM_OF_A_CPU <= BOUNDARY[stage, precision]
    assert places, "the boundary decides about gradients that are not finite"


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
