"""Both networks with the released head size on any device, and one micro step of theirs."""

from dataclasses import dataclass

import torch

from pipeline.config import ObjectiveSection
from pipeline.counter_rng import DropoutKey
from pipeline.masking import MaskedBatch, MaskingVocabulary, MaskKeys, choose_masks
from pipeline.modeling.networks import Discriminator, Generator
from pipeline.modeling.pair import shared_rows
from pipeline.rtd import CorruptedBatch, DrawKey, corrupt
from tests.reference.small_networks import model_section, network_section, scramble

BACKENDS = ("eager", "torch", "triton")
"""On a CPU the last one is computed by the one before it."""
VOCABULARY = 1_001
MASK_ID = VOCABULARY - 1
SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "position_buckets": 256,
    "layer_norm_eps": 1e-7,
}


def pair(device, dtype=torch.float32, layers=2, sizes=SIZES, **model):
    """A generator and a discriminator that are the same on every device."""
    section = model_section(vocab_size=VOCABULARY).model_copy(update=model)
    networks = [
        kind(network_section(layers, **sizes), section, ObjectiveSection())
        for kind in (Generator, Discriminator)
    ]
    scrambled = [scramble(n, seed, scale=0.05) for seed, n in enumerate(networks, 1)]
    return [network.to(device, dtype) for network in scrambled]


@dataclass
class MicroBatch:
    """Random sequences, every third short, on a device."""

    ids: torch.Tensor
    lengths: torch.Tensor
    words: torch.Tensor

    @classmethod
    def make(cls, device, sequences=3, length=512):
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(4, MASK_ID, (sequences, length), generator=draws)
        lengths = torch.full((sequences,), length)
        lengths[1::3] -= length // 3
        ids[torch.arange(length) >= lengths[:, None]] = 0
        words = torch.arange(2 * sequences).view(sequences, 2) * 1_000_003
        return cls(ids.to(device), lengths.to(device), words.to(device))

    @property
    def mask(self):
        """bool [B, L], False at padding."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return positions < self.lengths[:, None]

    @property
    def draw(self):
        return DrawKey((5, 6), self.words)

    def choose(self, law="uniform") -> MaskedBatch:
        return choose_masks(
            self.ids,
            self.lengths,
            self.words,
            ObjectiveSection(masking_law=law),
            MaskKeys.derive(7, "train", self.ids.shape[1]),
            MaskingVocabulary(MASK_ID),
        )


def dropout_keys(device):
    return [DropoutKey.derive(1, name, 2, 3, 4, device) for name in ("generator", "discriminator")]


def generator_loss(network, batch, slots, dropout=None):
    return network(
        slots.masked_ids_BL,
        batch.mask,
        slots.positions_BK,
        slots.valid_BK,
        slots.targets_BK,
        batch.draw,
        dropout,
    )


def discriminator_loss(network, base, batch, corrupted: CorruptedBatch, dropout=None):
    rows = shared_rows(base, network, corrupted.input_ids_BL)
    labels = corrupted.is_replaced_BL.float()
    return network(corrupted.input_ids_BL, rows, batch.mask, labels, dropout)


def micro_step(networks, batch, dropout=(None, None)):
    """Masks, forward and backward of both networks; losses and draws, gradients in the modules."""
    generator, discriminator = networks
    slots = batch.choose()
    mlm = generator_loss(generator, batch, slots, dropout[0])
    mlm.loss_sum.backward()
    corrupted = corrupt(batch.ids, slots.positions_BK, slots.valid_BK, mlm.drawn_BK)
    rtd = discriminator_loss(discriminator, generator, batch, corrupted, dropout[1])
    rtd.loss_sum.backward()
    return mlm, rtd


def gradients(networks):
    """(network, name) -> gradient, on the CPU in fp64."""
    return {
        (network.name, name): parameter.grad.cpu().double()
        for network in networks
        for name, parameter in network.named_parameters()
    }
