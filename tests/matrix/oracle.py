"""What each cell is compared with: the same training in plain torch, in one process.

    fp32       the re-derivation of `tests.reference`, whole batches, computed in fp64: its own
               rounding is no part of any difference
    the rest   `low_precision.py`; a test holds its runs near the fp64 one

All runs read the draws of the fp64 one: two candidates that tie would otherwise part two runs that
are equal but for rounding.
"""

import os
from pathlib import Path

import torch

from pipeline.rtd import gumbel_noise
from tests.engines import LENGTH, sequence_batch
from tests.matrix.cells import CLIPPING, TRAIN_BATCH_SIZE
from tests.matrix.low_precision import LowPrecision
from tests.matrix.shared_run import STEPS, initial_pair, objective_keys, run_config, samples_of
from tests.matrix.truth import Truth, TruthKey
from tests.reference import small_networks
from tests.reference.plain_training import PlainBatch, PlainTraining


def load_or_train(key: TruthKey, folder: Path) -> Truth:
    """The run of a key, from the folder if it is there."""
    path = folder / f"{key}.safetensors"
    if not path.exists():
        if key.precision == "fp32":
            trained = exact_truth(key.update)
        else:
            exact = load_or_train(TruthKey("fp32", key.update, 1), folder)
            trained = LowPrecision(key, exact.drawn).train()
        partial = path.with_suffix(f".{os.getpid()}.partial")  # two ranks may need the same
        trained.save(partial)
        partial.rename(path)
    return Truth.load(path)


def exact_truth(update) -> Truth:
    """The fp64 run of the re-derivation in `tests.reference`."""
    config, pair = run_config(update), initial_pair(update)
    keys = objective_keys(config)
    weights = {
        name: {
            key: w.double().detach().clone().requires_grad_()
            for key, w in getattr(pair, name).state_dict().items()
        }
        for name in config.networks
    }
    training = PlainTraining(config, weights, CLIPPING)
    found = []
    for number in range(STEPS):
        data = sequence_batch(samples_of(number, 0, 0, TRAIN_BATCH_SIZE, 1))
        slots, draw = keys.mask(data), keys.draw(data)
        assert draw is not None
        words = draw.sample_words_B2
        noise = gumbel_noise(words, slots.positions_BK, 0, small_networks.VOCABULARY, draw.key)
        mask = torch.arange(LENGTH) < data.lengths_B[:, None]
        batch = PlainBatch(data.input_ids_BL, mask, *slots, noise, small_networks.MASK_ID)
        found.append(training.step(number, batch))
    return Truth(
        torch.tensor([[step.mlm_loss, step.rtd_loss] for step in found], dtype=torch.float64),
        torch.stack([step.drawn for step in found]),
        {
            name: torch.tensor([step.norms[name] for step in found], dtype=torch.float64)
            for name in training.adam
        },
        {
            f"{engine}/{name}": w
            for engine, adam in training.adam.items()
            for name, w in adam.weights.items()
        },
    )
