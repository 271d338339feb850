"""A run's mixture: what its configuration makes of the sources of a dataset.

- `is_mixture`: whether there is one.
- `mixture_sources`: the sources that training draws from, with their shares.
- `heldout_samples`: which held-out sequences are evaluated, source by source.
- `describe_mixture`: shares and epochs of a run in words.
"""

from collections.abc import Mapping
from difflib import get_close_matches

import numpy as np

from data_prep.errors import UserError
from pipeline.config import DataSection
from pipeline.mixture import CYCLE, MixtureSource, mixture_shares
from pipeline.sample_order import Int64Array
from pipeline.sequences import SequenceStream

_SHOWN = 20


def is_mixture(stream: SequenceStream, data: DataSection) -> bool:
    """Tell whether sources are drawn in other proportions than those of their sizes.

    Args:
        stream: A split.
        data: Weights and exponent.

    Returns:
        Whether the configuration or the dataset's recipe gives weights, or an exponent below 1.
    """
    return bool(data.source_weights or stream.source_weights()) or data.sampling_exponent != 1.0


def mixture_sources(stream: SequenceStream, data: DataSection) -> tuple[MixtureSource, ...]:
    """Divide a split among its sources as the configuration asks.

    Args:
        stream: The split, as sequences of one length.
        data: Weights and exponent.

    Returns:
        The sources that are drawn from, in the order of the dataset.

    Raises:
        UserError: A weight names no source of the split, or none is left to draw from.
    """
    runs, tokens = stream.source_runs(), stream.source_tokens()
    given = {**stream.source_weights(), **dict(data.source_weights)}
    for name, _ in data.source_weights:
        if name not in runs:
            near = get_close_matches(name, runs, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else "."
            raise UserError(
                f'data.source_weights names "{name}", which is no source of the dataset{hint} It '
                f"has {', '.join(list(runs)[:_SHOWN])}"
            )
    # A source without a sequence of its own is read as a part of another's.
    weights = [given.get(name, 1.0) if runs[name] else 0.0 for name in runs]
    if not any(weights):
        raise UserError(
            "data.source_weights leaves no source with text to train on; give one of them a weight "
            "above 0"
        )
    shares = mixture_shares([tokens[name] for name in runs], weights, data.sampling_exponent)
    return tuple(
        MixtureSource(name, own, share)
        for (name, own), share in zip(runs.items(), shares, strict=True)
        if share
    )


def heldout_samples(
    stream: SequenceStream, data: DataSection, max_sequences: int
) -> dict[str, Int64Array]:
    """Choose the held-out sequences that are evaluated, the same ones every time.

    Args:
        stream: The held-out split.
        data: Whether training draws from sources in shares.
        max_sequences: How many are chosen at most.

    Returns:
        Source -> int64 [n], its first sequences, equally many of each as far as they reach; in a
        run that draws by size the first ones of the split, under the name "".
    """
    if not is_mixture(stream, data):
        count = min(max_sequences, stream.num_sequences)
        return {"": np.arange(count, dtype=np.int64)}
    runs = {name: own for name, own in stream.source_runs().items() if own}
    of_each = max(1, max_sequences // max(1, len(runs)))
    return {
        name: np.concatenate([np.arange(first, end, dtype=np.int64) for first, end in own])[
            :of_each
        ]
        for name, own in runs.items()
    }


def describe_mixture(
    streams: Mapping[int, SequenceStream], data: DataSection, samples: Mapping[int, int]
) -> list[str]:
    """Say how often each source is read.

    Args:
        streams: The training split, by sequence length.
        data: Weights and exponent.
        samples: Sequences of each length that the whole run takes.

    Returns:
        A line; none where sources are drawn by their sizes.

    Raises:
        UserError: As for `mixture_sources`.
    """
    if not any(is_mixture(stream, data) for stream in streams.values()):
        return []
    shares: dict[str, float] = {}
    epochs: dict[str, float] = {}
    for length, stream in streams.items():
        for source in mixture_sources(stream, data):
            shares[source.name] = source.share / CYCLE
            passes = samples[length] * source.share / CYCLE / source.num_samples
            epochs[source.name] = epochs.get(source.name, 0.0) + passes
    parts = [
        f"{name} {share:.3g} of the samples, {epochs[name]:.3g} epochs"
        for name, share in sorted(shares.items(), key=lambda each: -each[1])[:_SHOWN]
    ]
    more = [f"and {len(shares) - _SHOWN} more"] if len(shares) > _SHOWN else []
    return ["mixture: " + "; ".join([*parts, *more])]
