"""Random numbers as functions: a counter-based generator that gives the same integers everywhere.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011, section 4.2) maps a 128-bit counter and a 64-bit key to four 32-bit words. Sample order,
masks, replacement draws and dropout are functions of (seed, purpose, where), never histories, so
that a resumed run, another world size and another backend see the same numbers.

The arithmetic uses int64 words that hold values in [0, 2^32). Products wrap modulo 2^64 in NumPy
arrays and in torch alike, so that one body serves both, and each word is the same on every device.

    stream_key      (seed, purpose, parts) -> key, on the host
    philox4x32      (counter, key) -> four words
    philox_bits     the same words, in torch, with half the memory traffic
    uniform_words   a run of words for a run of positions
    DropoutKey      one micro step of one network -> sites -> keep masks
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Key = tuple[Any, Any]
"""Two words: ints on the host, or 0-dimensional int64 tensors on a device."""


def stream_key(seed: int, purpose: str, *parts: int) -> tuple[int, int]:
    """Derive the key of an independent stream.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for; streams with different tags share nothing.
        *parts: Integers that separate streams further, such as the step or the rank.

    Returns:
        Two words in [0, 2^32).
    """
    text = "\x1f".join([str(seed), purpose, *map(str, parts)])
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"deberta-rng").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox4x32(counter: tuple[Any, Any, Any, Any], key: Key) -> tuple[Any, Any, Any, Any]:
    """Evaluate Philox4x32-10.

    Args:
        counter: Four broadcastable int64 arrays (NumPy or torch) with values in [0, 2^32);
            at least the first must be an array, the others may be ints.
        key: Two words, ints or int64 tensors.

    Returns:
        Four int64 arrays of the broadcast shape with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIERS[0]
        product_1 = c2 * _MULTIPLIERS[1]
        # The arithmetic shift copies the sign into the upper half; the mask takes it away again.
        high_0, low_0 = (product_0 >> 32) & WORD, product_0 & WORD
        high_1, low_1 = (product_1 >> 32) & WORD, product_1 & WORD
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return c0, c1, c2, c3


def _low(words: Any) -> Any:
    """Take the lower halves of int64 words, without a copy; an int as a signed one."""
    if isinstance(words, int):
        return words - (words >> 31 << 32)
    return words.unsqueeze(-1).view(torch.int32)[..., 0]


def _high(words: torch.Tensor) -> torch.Tensor:
    """Take the upper halves of int64 words, without a copy."""
    return words.unsqueeze(-1).view(torch.int32)[..., 1]


def _round_keys(word: Any, increment: int) -> list[Any]:
    """Lay out one word of the key for each round, as int32."""
    if isinstance(word, int):
        return [_low((word + number * increment) & WORD) for number in range(_ROUNDS)]
    rounds = torch.arange(_ROUNDS, device=word.device) * increment
    return list(_low(word + rounds).unbind())


def philox_bits(counter: tuple[Any, Any, Any, Any], key: Key) -> tuple[torch.Tensor, ...]:
    """Evaluate Philox4x32-10 with few passes over memory.

    Without a compiler each operation is a pass. Halves of products are views here, and what is not
    multiplied has 32 bits: 96 bytes a round and counter instead of 208.

    Args:
        counter: Four broadcastable int64 tensors with values in [0, 2^32); the second and the
            fourth may be ints.
        key: Two words, ints or 0-dimensional int64 tensors.

    Returns:
        Four int32 tensors of the broadcast shape: the bits of the words of `philox4x32`.
    """
    c0, c1, c2, c3 = counter
    bits_1, bits_3 = _low(c1), _low(c3)
    bits_0 = bits_2 = None
    for k0, k1 in zip(_round_keys(key[0], _WEYL[0]), _round_keys(key[1], _WEYL[1]), strict=True):
        if bits_0 is not None and bits_2 is not None:
            c0, c2 = (bits.view(torch.uint32).to(torch.int64) for bits in (bits_0, bits_2))
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        bits_0 = (_high(product_1) ^ bits_1).bitwise_xor_(k0)
        bits_2 = (_high(product_0) ^ bits_3).bitwise_xor_(k1)
        bits_1, bits_3 = _low(product_1), _low(product_0)
    assert bits_0 is not None
    assert bits_2 is not None
    return bits_0, bits_1, bits_2, bits_3


def sample_words(epoch: int, sample: int) -> tuple[int, int]:
    """Pack the identity of a sample into two counter words.

    Args:
        epoch: Pass over the data, below 2^24.
        sample: Index of the sequence in its split, below 2^40.

    Returns:
        Two words in [0, 2^32).
    """
    return sample & WORD, (epoch << 8) | (sample >> 32)


def position_words(num_positions: int, sample_words_B2: torch.Tensor, key: Key) -> torch.Tensor:
    """Give every position of every sample one word.

    Args:
        num_positions: Sequence length L.
        sample_words_B2: int64 [B, 2], the identities of the samples.
        key: The stream.

    Returns:
        int64 [B, L] with values in [0, 2^32).
    """
    quads = torch.arange((num_positions + 3) // 4, device=sample_words_B2.device)[None, :]
    first, second = sample_words_B2[:, :1], sample_words_B2[:, 1:]
    words = philox4x32((quads, torch.zeros_like(quads), first, second), key)
    return torch.stack(words, dim=-1).flatten(1)[:, :num_positions]


@dataclass(frozen=True)
class DropoutSite:
    """One place in a network where dropout is applied: the key and what the counter must add."""

    words_2: torch.Tensor
    layer: int
    where: int

    def keep_mask(self, shape: torch.Size | tuple[int, ...], p: float) -> torch.Tensor:
        """Draw which elements stay.

        One Philox evaluation serves eight elements, 16 bits each; `p` is rounded to 1/65536.

        Args:
            shape: Shape of the activations.
            p: Probability of dropping an element.

        Returns:
            bool tensor of `shape`, True where the element is kept.
        """
        elements, threshold = torch.Size(shape).numel(), round(p * 65536)
        octets = torch.arange((elements + 7) // 8, device=self.words_2.device)
        layer = torch.full_like(octets[:1], self.layer)
        bits = philox_bits(
            (octets & WORD, octets >> 32, layer, self.where), (self.words_2[0], self.words_2[1])
        )
        # The lower half of a word comes before the upper one. With their first bits flipped, halves
        # compare as int16 like 16 bits without a sign.
        halves = torch.stack(bits, -1).bitwise_xor_(_low(0x80008000)).view(torch.int16)
        kept = halves.flatten()[:elements].view(shape)
        return kept > threshold - 32769 if threshold else torch.ones_like(kept, dtype=torch.bool)


@dataclass(frozen=True)
class DropoutKey:
    """Dropout of one network in one micro step on one rank, as a function of these alone."""

    words_2: torch.Tensor
    """int64 [2] on the network's device."""

    @classmethod
    def derive(
        cls, seed: int, network: str, step: int, micro_step: int, rank: int, device: torch.device
    ) -> "DropoutKey":
        """Derive the key of (seed, network, step, micro step, rank).

        Args:
            seed: The run's seed.
            network: "generator" or "discriminator".
            step: Optimizer step.
            micro_step: Forward pass within the step.
            rank: Data-parallel rank.
            device: Where the activations live.

        Returns:
            The key.
        """
        words = stream_key(seed, f"dropout/{network}", step, micro_step, rank)
        return cls(torch.tensor(words, dtype=torch.int64).to(device, non_blocking=True))

    def site(self, layer: int, where: int) -> DropoutSite:
        """Name one place in the network.

        Args:
            layer: Layer number; the embeddings and the head use numbers that no layer has.
            where: Which dropout of the layer.

        Returns:
            The site, whose masks differ from those of every other site.
        """
        return DropoutSite(self.words_2, layer, where)


def dropout(x: torch.Tensor, p: float, site: DropoutSite | None) -> torch.Tensor:
    """Zero elements with probability p and scale the rest by 1 / (1 - p).

    Args:
        x: Activations of any shape.
        p: Probability of dropping an element.
        site: Where in the network; None outside training.

    Returns:
        A tensor like `x`; `x` itself where there is nothing to drop.
    """
    if site is None or p == 0.0:
        return x
    return x * site.keep_mask(x.shape, p).to(x.dtype) * (1.0 / (1.0 - p))
