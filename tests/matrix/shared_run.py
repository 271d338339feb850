"""The run that every cell and every reference trains: networks, data, rates, poison.

run_config        two small networks, 20 steps
initial_pair      their weights
samples_of        who reads which sequences
objective_keys    masks and draws
"""

import functools

from pipeline.config import ObjectiveSection, OptimizerSection, ScheduleSection
from pipeline.objective_keys import ObjectiveKeys
from tests.engines import LENGTH, small_config, small_pair
from tests.engines import VOCABULARY as MASKING_VOCABULARY
from tests.matrix.cells import TRAIN_BATCH_SIZE
from tests.reference import small_networks

STEPS = 20
WARMUP_STEPS = 2
UNCHANGED_STEPS = 2
"""The warm-up's first rate is 0: two steps see the initial weights."""
SEED = 3
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPTIMIZER = OptimizerSection(generator_learning_rate=1e-3, discriminator_learning_rate=2e-3)
POISONED_STEPS = (8, 9)
"""Steps in which the generator's first loss is infinite, with fp16: its loss scaler must react."""


def run_config(update, recomputation="none"):
    """The run: small networks, the generator half as deep as its peer, no dropout, a warm-up."""
    config = small_config(ObjectiveSection(update=update), layers=2, **NO_DROPOUT)
    return config.model_copy(
        update={
            "generator": small_networks.network_section(1, **NO_DROPOUT),
            "model": small_networks.model_section(activation_checkpointing=recomputation),
            "optimizer": OPTIMIZER,
            "schedule": ScheduleSection(max_steps=STEPS, warmup_steps=WARMUP_STEPS),
        }
    )


def objective_keys(config):
    """Masks and draws of the run."""
    return ObjectiveKeys(config.objective, SEED, LENGTH, MASKING_VOCABULARY, "train")


def samples_of(step, micro_step, rank, micro_batch, ranks):
    """Numbers of the sequences that a rank reads in a micro step."""
    first = step * TRAIN_BATCH_SIZE + (micro_step * ranks + rank) * micro_batch
    return range(first, first + micro_batch)


@functools.cache
def initial_pair(update):
    """The networks that every cell and every reference starts from; fp32, never trained."""
    return small_pair(config=run_config(update))


def start_weights(pair):
    """By "engine/parameter": copies of the weights that a run starts from."""
    return {
        f"{engine}/{name}": p.detach().clone()
        for engine, module in pair.trained_modules().items()
        for name, p in module.named_parameters()
    }
