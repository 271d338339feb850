"""Attention and encoder layers of ours and of others, as functions of the same tensors.

    attention_variants   (x [B, L, D], table [R, D]) -> context [B, L, D], without projections:
                         queries, keys and values are x, both relative tables are the table
    layer_variants       (x, table) -> output of a whole encoder layer, all with the same weights

A variant is built when it is asked for, and may be missing: an import that fails, or a kernel that
refuses the shape, is the result of its cell (`gpu_cells`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Layer,
    DisentangledSelfAttention,
)

from pipeline.config import ModelSection, NetworkSection
from pipeline.counter_rng import DropoutKey
from pipeline.modeling.attention import AttentionBackend, KeySide, disentangled_attention
from pipeline.modeling.compiled_attention import compiled_attention
from pipeline.modeling.layer import EncoderLayer, LayerContext
from pipeline.modeling.relative_positions import RelativePositions, relative_positions
from tests.reference.transformers_encoder import transformers_config

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Builder = Callable[[], Forward]
DISENTANGLED_FLASH = "disentangled-flash"
FLASHDEBERTA = "flashdeberta, no attention dropout"
EAGER, COMPILED = "transformers", "transformers, compiled"


@dataclass(frozen=True)
class Shape:
    """What all variants of a comparison compute."""

    sequences: int
    length: int
    heads: int
    head_size: int = 64
    position_buckets: int = 256
    dropout: float = 0.1

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_size

    @property
    def tokens(self) -> int:
        """B L."""
        return self.sequences * self.length

    def section(self) -> NetworkSection:
        """One layer of it."""
        return NetworkSection(
            hidden_size=self.width,
            num_hidden_layers=1,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            position_buckets=self.position_buckets,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )

    def relative(self, device: torch.device) -> RelativePositions:
        """Positions by the rule of transformers, which every peer has."""
        last = self.section().last_relative_position
        buckets = self.position_buckets
        return relative_positions(self.length, buckets, last + 1, device, "transformers")

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """x and the table, the same every time."""
        draws = torch.Generator().manual_seed(0)
        sizes = ((self.sequences, self.length, self.width), (2 * self.position_buckets, self.width))
        x, table = (
            torch.randn(size, generator=draws).to(device, dtype).requires_grad_() for size in sizes
        )
        return x, table


def our_backends(device: torch.device) -> list[AttentionBackend]:
    """Our backends that can run on a device, the one that should be fastest first."""
    known = get_args(AttentionBackend)
    wanted = ("triton", "torch", "eager") if device.type == "cuda" else ("torch", "eager")
    return [backend for backend in wanted if backend in known]


def dropout_key(device: torch.device, dropout: float) -> DropoutKey | None:
    """A key of our dropout, or none."""
    return DropoutKey.derive(0, "generator", 0, 0, 0, device) if dropout else None


def our_attention(
    backend: AttentionBackend, compiles: bool, shape: Shape, device: torch.device
) -> Forward:
    """One of our backends."""
    relative, key = shape.relative(device), dropout_key(device, shape.dropout)
    attend = compiled_attention if compiles else disentangled_attention

    def heads(x_BLD: torch.Tensor) -> torch.Tensor:
        return x_BLD.unflatten(-1, (-1, shape.head_size)).permute(2, 0, 1, 3)

    def forward(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        side, rows_HRd = heads(x), heads(table[None])[:, 0]
        keys = KeySide(side, side, rows_HRd, rows_HRd)
        site = None if key is None else key.site(0, 0)
        context = attend(backend, side, keys, relative, None, shape.dropout, site)
        return context.permute(1, 2, 0, 3).flatten(2)

    return forward


def _their_attention(kind: type[nn.Module], shape: Shape, device: torch.device) -> Any:
    """A self-attention of transformers' interface whose projections do nothing."""
    config = transformers_config(shape.section(), vocab_size=100, hidden_dropout_prob=0.0)
    module = kind(config).to(device)
    module.query_proj = module.key_proj = module.value_proj = nn.Identity()
    return module.train()


def transformers_attention(shape: Shape, device: torch.device, compiles: bool = False) -> Forward:
    """transformers' eager attention, with its mask and positions made beforehand."""
    module = _their_attention(DisentangledSelfAttention, shape, device)
    mask = torch.ones(shape.sequences, 1, shape.length, shape.length, device=device).bool()
    pairs = shape.relative(device).index() - shape.position_buckets
    if compiles:
        module.compile()
    return lambda x, table: module(x, mask, relative_pos=pairs, rel_embeddings=table)[0]


def disentangled_flash_class(device: torch.device) -> type[nn.Module]:
    """What disentangled-flash trains with: Triton on a GPU, torch elsewhere."""
    if device.type == "cuda":
        from disentangled_flash import TritonTrainingDisentangledSelfAttention

        return TritonTrainingDisentangledSelfAttention
    from disentangled_flash._torch import TorchTrainingDisentangledSelfAttention

    return TorchTrainingDisentangledSelfAttention


def disentangled_flash_attention(shape: Shape, device: torch.device) -> Forward:
    """The attention of disentangled-flash."""
    module = _their_attention(disentangled_flash_class(device), shape, device)
    module._project_qkv = lambda x: (x, x, x)
    module.assume_unpadded = True
    mask = torch.ones(shape.sequences, shape.length, dtype=torch.bool, device=device)
    return lambda x, table: module(x, mask, rel_embeddings=table)[0]


def flashdeberta_attention(shape: Shape, device: torch.device) -> Forward:
    """The attention of flashdeberta, which has no dropout of probabilities."""
    from flashdeberta import FlashDisentangledSelfAttention

    module = _their_attention(FlashDisentangledSelfAttention, shape, device)
    return lambda x, table: module(x, None, rel_embeddings=table)[0]


def attention_variants(shape: Shape, device: torch.device) -> dict[str, Builder]:
    """All variants of the attention, ours first, then in the order of their value."""
    ours: dict[str, Builder] = {}
    for backend in our_backends(device):
        ours[f"ours, {backend}"] = lambda b=backend: our_attention(b, False, shape, device)
    ours["ours, torch compiled"] = lambda: our_attention("torch", True, shape, device)
    first, *others = ours
    return {
        first: ours[first],
        EAGER: lambda: transformers_attention(shape, device),
        DISENTANGLED_FLASH: lambda: disentangled_flash_attention(shape, device),
        COMPILED: lambda: transformers_attention(shape, device, compiles=True),
        **{name: ours[name] for name in others},
        FLASHDEBERTA: lambda: flashdeberta_attention(shape, device),
    }


def compiled_model(backend: AttentionBackend, compiles: bool) -> ModelSection:
    """[model] of a variant of ours."""
    words = {"attention_backend": backend, "compile": "layer" if compiles else "none"}
    return ModelSection().model_copy(update=words)


def our_layer(
    backend: AttentionBackend,
    compiles: bool,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
) -> Forward:
    """Our encoder layer."""
    torch.manual_seed(0)
    layer = EncoderLayer(shape.section(), compiled_model(backend, compiles)).to(device, dtype)
    relative, key = shape.relative(device), dropout_key(device, shape.dropout)

    def forward(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return layer(x, LayerContext(relative, table, None, key), 0)

    forward.module = layer
    return forward


def their_layer(kind: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Forward:
    """transformers' layer, with another attention inside where the kind says so."""
    torch.manual_seed(0)
    section = shape.section()
    weights = EncoderLayer(section, ModelSection()).state_dict()
    config = transformers_config(section, vocab_size=100)
    layer = DebertaV2Layer(config)
    layer.load_state_dict(weights)
    layer = layer.to(device, dtype).train()
    mask = torch.ones(shape.sequences, 1, shape.length, shape.length, device=device).bool()
    pairs = shape.relative(device).index() - shape.position_buckets
    if kind == DISENTANGLED_FLASH:
        attention = disentangled_flash_class(device)(config, assume_unpadded=True)
        attention.load_state_dict(layer.attention.self.state_dict())
        layer.attention.self = attention.to(device, dtype).train()
        mask, pairs = mask[:, 0, 0].contiguous(), None
    elif kind == FLASHDEBERTA:
        from flashdeberta import FlashDisentangledSelfAttention

        layer.attention.self.__class__ = FlashDisentangledSelfAttention
        mask, pairs = None, None
    elif kind == COMPILED:
        layer.compile()

    def forward(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return layer(x, mask, relative_pos=pairs, rel_embeddings=table)[0]

    forward.module = layer
    return forward


def layer_variants(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Builder]:
    """All variants of a layer, ours first, then in the order of their value."""
    where = (shape, device, dtype)
    ours: dict[str, Builder] = {}
    for backend in our_backends(device):
        for compiles in (True, False):
            name = f"ours, {backend}{', compiled layer' if compiles else ''}"
            ours[name] = lambda b=backend, c=compiles: our_layer(b, c, *where)
    first, *others = ours

    def peer(kind: str) -> Builder:
        return lambda: their_layer(kind, *where)

    return {
        first: ours[first],
        EAGER: peer(EAGER),
        COMPILED: peer(COMPILED),
        DISENTANGLED_FLASH: peer(DISENTANGLED_FLASH),
        **{name: ours[name] for name in others},
        FLASHDEBERTA: peer(FLASHDEBERTA),
    }
