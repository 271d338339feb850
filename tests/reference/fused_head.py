"""Slots, a word table and targets for the vocabulary head, and what its forms make of them."""

import importlib
import sys
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from pipeline.modeling.vocabulary_head import vocabulary_head
from pipeline.rtd import DrawKey, gumbel_noise

WIDTH = 16
KEY = (0xF1234567, 0x89ABCDEF)
"""Both words above 2^31, where a signed one would show."""


@dataclass
class HeadBatch:
    """Inputs of the head; every fifth slot does not count."""

    weights: list[torch.Tensor]
    """Hidden states [B, K, D], table [V, D], bias [V]."""
    valid: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    draw: DrawKey | None

    @classmethod
    def make(
        cls, rows, ids, dtype=torch.float32, device="cpu", sequences=1, draws=True, temperature=1.0
    ):
        """Random inputs, the same on every device."""
        random = torch.Generator().manual_seed(rows + ids)
        shape = (sequences, rows // sequences)
        weights = [
            torch.randn(s, generator=random).to(device, dtype).requires_grad_()
            for s in ((*shape, WIDTH), (ids, WIDTH), (ids,))
        ]
        targets = torch.randint(ids, shape, generator=random)
        targets[0, 0] = ids - 1  # in the last chunk
        positions = torch.randint(512, shape, generator=random)
        words = torch.randint(2**32, (sequences, 2), generator=random)
        slot = torch.arange(rows).view(shape)
        draw = DrawKey(KEY, words.to(device), temperature) if draws else None
        where = (each.to(device) for each in (slot % 5 != 4, targets, positions))
        return cls(weights, *where, draw)

    def head(self, form, chunk_ids=16_384, **changes):
        """What the head reports."""
        here = replace(self, **changes)
        arguments = (here.valid, here.targets, here.positions, here.draw, chunk_ids)
        return vocabulary_head(*here.weights, *arguments, form)

    def found(self, form, chunk_ids=16_384):
        """What the head reports, and the gradients of three times its loss."""
        out = self.head(form, chunk_ids)
        return out, torch.autograd.grad(3.0 * out.loss_sum, self.weights)

    def expected(self):
        """Loss, draws, correct predictions, gradients by logits held whole, in fp64 at the end."""
        exact = [each.detach().double().requires_grad_() for each in self.weights]
        logits = exact[0] @ exact[1].mT + exact[2]
        losses = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), reduction="none")
        loss = (losses * self.valid.flatten()).sum()
        drawn = None
        if self.draw is not None:
            words, key = self.draw.sample_words_B2, self.draw.key
            noise = gumbel_noise(words, self.positions, 0, len(exact[1]), key)
            drawn = (logits / self.draw.temperature + noise).argmax(-1)
        correct = ((logits.argmax(-1) == self.targets) & self.valid).sum()
        return loss, drawn, correct, torch.autograd.grad(3.0 * loss, exact)


def kernel_noise(positions, words, key, ids, tile=(128, 512)):
    """The noise of one sample for each row, as kernels compute it: fp32 [rows, ids]."""
    sys.modules.pop("tests.reference.gumbel_kernel", None)  # interpreted or compiled, as now asked
    kernel = importlib.import_module("tests.reference.gumbel_kernel").noise_kernel
    rows, columns = tile
    noise = torch.empty(len(positions), ids, device=positions.device)
    key_2 = torch.tensor(key, device=positions.device)
    grid = (-(-len(positions) // rows), -(-ids // columns))
    kernel[grid](noise, positions, words, key_2, len(positions), ids, BLOCK_R=rows, BLOCK_C=columns)
    return noise
