"""A run of the real command, repeated by the plain reference on the same data.

Initial weights, the order of the samples, masks and noise are the pipeline's random functions; the
arithmetic is `PlainTraining`'s, on whole batches in one process.
"""

import numpy as np
import torch

from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from pipeline.masking import MaskingVocabulary
from pipeline.objective_keys import ObjectiveKeys
from pipeline.rtd import gumbel_noise
from pipeline.sample_order import SampleOrder
from pipeline.sequences import SequenceStream
from pipeline.weights import new_pair
from tests.reference.plain_training import PlainBatch, PlainTraining
from tests.reference.small_networks import leaves


class Replay:
    """One run; `config` is its RunConfig."""

    def __init__(self, config, train_batch_size, clipping=1.0, split="train"):
        self.config, self.train_batch_size = config, train_batch_size
        dataset, length = Dataset.open(config.data.path), config.data.sequence_length
        seed = config.run.seed
        vocabulary = MaskingVocabulary.from_tokenizer(Tokenizer.load(dataset.tokenizer_folder))
        self.mask_id = vocabulary.mask_id
        self.stream = SequenceStream(dataset, split, length)
        self.keys = ObjectiveKeys(config.objective, seed, length, vocabulary, split)
        self.order = SampleOrder(
            self.stream.num_sequences,
            seed,
            length,
            config.data.block_sequences,
            config.data.window_blocks,
        )
        pair = new_pair(config)
        weights = {name: leaves(getattr(pair, name)) for name in config.networks}
        self.training = PlainTraining(config, weights, clipping)

    def whole_batch(self, samples, epochs):
        """Some sequences with their masks and noise."""
        data = self.stream.batch(samples, epochs)
        slots, draw = self.keys.mask(data), self.keys.draw(data)
        words, vocab_size = draw.sample_words_B2, self.config.model.vocab_size
        noise = gumbel_noise(words, slots.positions_BK, 0, vocab_size, draw.key)
        mask = torch.arange(data.input_ids_BL.shape[1]) < data.lengths_B[:, None]
        return PlainBatch(data.input_ids_BL, mask, *slots, noise, self.mask_id)

    def steps(self, count):
        """Train; what each step found."""
        found = []
        for number in range(count):
            first = number * self.train_batch_size
            positions = np.arange(first, first + self.train_batch_size, dtype=np.int64)
            epochs, samples = self.order.samples(positions)
            found.append(self.training.step(number, self.whole_batch(samples, epochs)))
        return found

    def heldout(self, pair, count):
        """Mean losses (MLM, RTD) of a trained pair on the first sequences of the split."""
        weights = {name: leaves(getattr(pair, name)) for name in self.config.networks}
        judge = PlainTraining(self.config, weights, 0.0)
        samples = np.arange(min(count, self.stream.num_sequences), dtype=np.int64)
        batch = self.whole_batch(samples, np.zeros_like(samples))
        mlm = judge.predict(batch)
        rtd = judge.detect(batch, mlm.drawn)
        return mlm.loss_sum.item() / batch.masked_count, rtd.loss_sum.item() / batch.token_count
