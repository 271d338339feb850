"""The pure functions of a layer, compiled: what lies between two matrix products is one pass.

Torch runs dropout by a counter (`counter_rng`), the residual sum and LayerNorm as some two hundred
kernels, each of which reads and writes memory. With model.compile = "layer" each of the functions
below is one graph, which torch.compile fuses.

    draw_bits        a site's dropout mask, eight elements a byte: the bits of `DropoutSite`
    KeptBits         such a mask in the place of a site, for functions that ask a site
    drop             dropout
    normalized_sum   LayerNorm(residual + dropout(x))
    compiled         what makes a graph of a function

Weights are arguments. Whoever owns them calls these functions from its own forward, so that what
DeepSpeed hooks to a module (ZeRO-3 gathers weights there) stays outside of the graph; nothing in a
graph looks at a module, a rank or a step. Shapes are static, and every choice of a kernel is made
without measuring, so that the rounding of a run depends on its shapes and versions alone.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.counter_rng import WORD, DropoutSite, dropout, philox4x32

BACKEND = "inductor"
"""Compiler of the graphs; tests take one that needs no C++ compiler."""
MAX_GRAPHS = 64
"""Graphs of one function: shapes of sequences and slots, with and without gradients or dropout."""


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a graph of a pure function at its first call with each shape.

    Args:
        function: Of tensors, and of numbers that are parts of the graph. What changes from step to
            step must be a tensor.

    Returns:
        The compiled function. A function that would need two graphs raises.
    """
    # Imported here: they take seconds, which a run without graphs need not wait for.
    import torch._dynamo.config as dynamo_config
    import torch._inductor.config as inductor_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MAX_GRAPHS)
    options = {}
    if BACKEND == "inductor" and hasattr(inductor_config, "deterministic"):
        # Otherwise reductions try several block sizes on the device and keep the fastest one.
        options["deterministic"] = True
    return torch.compile(
        function, fullgraph=True, dynamic=False, backend=BACKEND, options=options or None
    )


def _draw(
    words_2: torch.Tensor, place_2: torch.Tensor, octets: int, threshold: int
) -> torch.Tensor:
    """Evaluate `DropoutSite.keep_mask`, eight elements a byte: uint8 [octets]."""
    octet = torch.arange(octets, device=words_2.device)
    words = philox4x32(
        (octet & WORD, octet >> 32, place_2[0], place_2[1]), (words_2[0], words_2[1])
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.zeros_like(octet)
    for lane, half in enumerate(halves):
        bits = bits | ((half >= threshold).long() << lane)
    return bits.to(torch.uint8)


@functools.lru_cache(maxsize=1024)
def _place(layer: int, where: int, device: torch.device) -> torch.Tensor:
    """A site's numbers on the device: as numbers, each site would be a graph of its own."""
    with torch.inference_mode(False):
        return torch.tensor([layer, where]).to(device)


def draw_bits(
    site: DropoutSite | None, shape: torch.Size | Sequence[int], p: float
) -> torch.Tensor | None:
    """Draw which elements stay.

    A graph of its own: in the graph of its user each element would repeat what its octet shares.

    Args:
        site: Where in the network; None outside training.
        shape: Shape of the activations.
        p: Probability of dropping an element; rounded to 1/65536.

    Returns:
        uint8 [ceil(elements / 8)], the lowest bit first; None where nothing is dropped.
    """
    if site is None or p == 0.0:
        return None
    octets = (torch.Size(shape).numel() + 7) // 8
    place_2 = _place(site.layer, site.where, site.words_2.device)
    return compiled(_draw)(site.words_2, place_2, octets, round(p * 65536))


@dataclass(frozen=True)
class KeptBits:
    """A mask that is drawn already, asked like a `DropoutSite`."""

    bits: torch.Tensor

    def keep_mask(self, shape: torch.Size | Sequence[int], p: float) -> torch.Tensor:
        """Unpack the mask.

        Args:
            shape: Shape of the activations that it was drawn for.
            p: Not needed: it was needed for drawing.

        Returns:
            bool tensor of `shape`, True where the element is kept.
        """
        elements = torch.Size(shape).numel()
        lane_8 = torch.arange(8, device=self.bits.device, dtype=torch.uint8)
        kept = (self.bits[:, None] >> lane_8) & 1
        return kept.flatten()[:elements].view(tuple(shape)).bool()


def _dropped(x: torch.Tensor, bits: torch.Tensor | None, p: float) -> torch.Tensor:
    if bits is None:
        return x
    return x * KeptBits(bits).keep_mask(x.shape, p).to(x.dtype) * (1.0 / (1.0 - p))


def drop(x: torch.Tensor, p: float, site: DropoutSite | None, compiles: bool) -> torch.Tensor:
    """Zero elements with probability p and scale the rest by 1 / (1 - p).

    Args:
        x: Activations of any shape.
        p: Probability of dropping an element.
        site: Where in the network; None outside training.
        compiles: Whether model.compile asks for graphs; the same elements stay either way.

    Returns:
        A tensor like `x`; `x` itself where there is nothing to drop.
    """
    if not compiles:
        return dropout(x, p, site)
    bits = draw_bits(site, x.shape, p)
    return x if bits is None else compiled(_dropped)(x, bits, p)


def _normalized_sum(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    bits: torch.Tensor | None,
    p: float,
) -> torch.Tensor:
    summed = residual + _dropped(x, bits, p)
    wide = torch.promote_types(summed.dtype, weight_D.dtype)
    weight_D, bias_D = weight_D.to(wide), bias_D.to(wide)
    return F.layer_norm(summed.to(wide), weight_D.shape, weight_D, bias_D, eps)


def normalized_sum(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    bits: torch.Tensor | None,
    p: float,
) -> torch.Tensor:
    """Compute LayerNorm(residual + dropout(x)) in one graph.

    Args:
        x: [.., D].
        residual: [.., D], what is added to it.
        weight_D: [D] of the LayerNorm.
        bias_D: [D] of the LayerNorm.
        eps: Of the LayerNorm.
        bits: From `draw_bits` for the shape of `x`; None drops nothing.
        p: Probability of dropping an element.

    Returns:
        [.., D] in the wider dtype of the sum and the weights.
    """
    return compiled(_normalized_sum)(x, residual, weight_D, bias_D, eps, bits, p)
