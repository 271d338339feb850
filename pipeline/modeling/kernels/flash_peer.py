"""The attention of the package disentangled-flash (PyPI), as a backend to compare with.

Its function computes the same scores with the same lookup (query - key + L - 1 -> table row), so
that without dropout its context and all five gradients are those of the other backends. Three
differences remain, and are its own: it runs on CUDA alone; its dropout masks come from its own
counters, seeded here from the site, so that a repeated forward pass repeats them but no other
backend draws the same; and its block sizes come from the heuristic that its own benchmark uses. The
function is private to the package: version 1.1.1 is the one that was read.

Letters: B sequences, L sequence length, H heads, d head size, R relative rows, E = 2 L distances.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch

from pipeline.counter_rng import DropoutSite
from pipeline.modeling.kernels.serving import (
    COMPILED_DTYPES,
    HEAD_SIZES,
    refused_dtype,
    refused_head_size,
)


def refusal(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Say why the package does not serve a call.

    Args:
        device: Where the tensors are.
        dtype: Their dtype.
        head_size: Channels of a head.

    Returns:
        The reason, in a few words, or None where it does.
    """
    if importlib.util.find_spec("disentangled_flash") is None:
        return "the package disentangled-flash is not installed"
    if device.type != "cuda":
        return f"disentangled-flash runs on CUDA devices, and the tensors are on {device.type}"
    if head_size not in HEAD_SIZES:
        return refused_head_size(head_size, "the kernels of disentangled-flash")
    return refused_dtype(dtype, COMPILED_DTYPES, "disentangled-flash")


@functools.lru_cache(maxsize=32)
def _lookup(key_rows_E: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Make the package's lookup and its plan for gradients without atomics, once a geometry."""
    position = importlib.import_module("disentangled_flash.position")
    delta_to_row = key_rows_E[:-1].to(torch.int32)
    return delta_to_row, position.gradient_band(delta_to_row, key_rows_E.device)


def _blocks(phase: str, query_HBLd: torch.Tensor) -> Any:
    """Ask the package's heuristic, so that nothing is timed during a run."""
    tuning = importlib.import_module("disentangled_flash.tuning")
    num_heads, batch, length, head_size = query_HBLd.shape
    return tuning.heuristic_config(
        phase=phase,
        sequence_length=length,
        head_dim=head_size,
        dtype=str(query_HBLd.dtype).removeprefix("torch."),
        batch_heads=num_heads * batch,
        resources=tuning.DeviceResources.current(query_HBLd.device.index),
    )


def attention(
    query_HBLd: torch.Tensor,
    key_HBLd: torch.Tensor,
    value_HBLd: torch.Tensor,
    rel_key_HRd: torch.Tensor | None,
    rel_query_HRd: torch.Tensor | None,
    key_rows_E: torch.Tensor | None,
    attention_mask_BL: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    site: DropoutSite | None,
) -> torch.Tensor:
    """Attend by the package.

    Args:
        query_HBLd: Queries, not scaled.
        key_HBLd: Keys.
        value_HBLd: Values.
        rel_key_HRd: Key projection of the relative table; None, like the next two, without one.
        rel_query_HRd: Query projection of the relative table.
        key_rows_E: int64 [2 L], the row where query - key = e - (L - 1).
        attention_mask_BL: bool, False at padding keys; None where every token counts.
        scale: Factor of the scores.
        dropout_p: Probability of dropping an attention probability.
        site: Dropout site, from which the package's seed is made; None outside training.

    Returns:
        Context [H, B, L, d].
    """
    kernels = importlib.import_module("disentangled_flash.training._kernels")
    batch, length = query_HBLd.shape[1:3]
    device = query_HBLd.device
    if key_rows_E is None:
        delta_to_row, band = torch.zeros(2 * length - 1, dtype=torch.int32, device=device), None
    else:
        delta_to_row, band = _lookup(key_rows_E)
    mask_BL = attention_mask_BL
    if mask_BL is None:
        mask_BL = torch.ones(batch, length, dtype=torch.bool, device=device)
    drops = site is not None and dropout_p > 0.0
    seed_1 = None
    if site is not None and drops:
        place = (site.layer << 8) | site.where
        seed_1 = ((site.words_2[:1] << 30) ^ site.words_2[1:]) + place
    context_BLHd = kernels.training_attention(
        query_HBLd.transpose(0, 1),
        key_HBLd.transpose(0, 1),
        value_HBLd.transpose(0, 1),
        rel_key_HRd,
        rel_query_HRd,
        delta_to_row,
        mask_BL.contiguous(),
        score_scale=scale,
        has_padding=attention_mask_BL is not None,
        strict_fp32=True,
        dropout_p=dropout_p if drops else 0.0,
        dropout_seed=seed_1,
        gradient_band=band,
        forward_config=_blocks("training_forward", query_HBLd),
        dq_config=_blocks("backward_dq", query_HBLd),
        dkv_config=_blocks("backward_dkv", query_HBLd),
    )
    return context_BLHd.unflatten(2, (query_HBLd.shape[0], -1)).permute(2, 0, 1, 3)
