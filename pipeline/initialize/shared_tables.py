"""E_G and E_D of a model that exists, expressed by the law of embedding sharing of a new run.

    gdes   E_G, Delta := E_D - E_G
    nes    E_G, E_D
    es     E_G, which E_D must equal

A discriminator can say what E_D is in three ways: by the table, by Delta, or, in files of the
released code, by both. Of both, the table is a buffer that was last computed before the last update
of Delta and E_G, and Delta counts.
"""

import torch

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.hf_layout import DELTA, POSITION_DELTA, POSITION_TABLE, WORD_TABLE, Tensors

STALE_RMS = 5e-3
"""Root mean square by which a stored table may miss E_G + Delta: one update at a high learning rate
and rounding to fp16 stay below; tables of two models differ by ten times as much."""


def join_tables(config: RunConfig, weights: dict[str, Tensors], source: str) -> list[str]:
    """Express the discriminator's tables by the run's law; the generator's stay as they are.

    Args:
        config: The run.
        weights: By network and by our names, in the dtype of the networks. A discriminator
            without a table and without a Delta has the generator's table, and a generator without
            one gets the discriminator's. Changed in place.
        source: What the weights are of, for messages.

    Returns:
        Notes.

    Raises:
        UserError: E_D is nowhere, or "es" is asked for and E_D is not E_G.
    """
    if config.discriminator is None:
        return []
    notes: list[str] = []
    theirs, base = weights["discriminator"], weights["generator"]
    for table, delta in {WORD_TABLE: DELTA, POSITION_TABLE: POSITION_DELTA}.items():
        if table == POSITION_TABLE and not config.discriminator.position_biased_input:
            continue
        if table not in base:
            continue  # the caller names what the generator lacks
        _join(config, theirs, base[table], table, delta, source, notes)
    return notes


def _join(
    config: RunConfig,
    theirs: Tensors,
    base: torch.Tensor,
    table: str,
    delta: str,
    source: str,
    notes: list[str],
) -> None:
    """Replace what a discriminator says of one table by what the run's law says."""
    stored, given = theirs.pop(table, None), theirs.pop(delta, None)
    for tensor in (stored, given):
        if tensor is not None and tensor.shape != base.shape:
            raise UserError(
                f"initialize.path {source}: {table} is {list(tensor.shape)} in the discriminator "
                f"and {list(base.shape)} in the generator, which cannot share it"
            )
    if stored is not None and given is not None:
        stored, given = _newer(base, stored, given, table, notes)
    sharing = config.objective.embedding_sharing
    if sharing == "gdes":
        theirs[delta] = _delta(base, stored, given)
        notes.append(_delta_note(table, base, theirs[delta]))
        return
    whole = stored if stored is not None else base.clone() if given is None else base + given
    if sharing == "nes":
        theirs[table] = whole
    elif not torch.equal(whole, base):
        raise UserError(
            f"objective.embedding_sharing=es has one table for both networks, but E_D and E_G of "
            f"{source} differ by up to {(whole - base).abs().max().item():.3g} in {table}: set "
            "objective.embedding_sharing=gdes (Delta := E_D - E_G) or nes"
        )


def _delta(
    base: torch.Tensor, stored: torch.Tensor | None, given: torch.Tensor | None
) -> torch.Tensor:
    if given is not None:
        return given
    return torch.zeros_like(base) if stored is None else stored - base


def _newer(
    base: torch.Tensor, stored: torch.Tensor, given: torch.Tensor, table: str, notes: list[str]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Choose between a stored table and a Delta that should agree with it but for one update."""
    miss = _rms(stored - base - given)
    if miss <= STALE_RMS:
        notes.append(
            f"{table} of the discriminator is stored both merged and as its Delta; Delta counts, "
            f"the merged one is older by an update (root mean square {miss:.2g})"
        )
        return None, given
    notes.append(
        f"{table} of the discriminator misses E_G + Delta by {miss:.2g} (root mean square): this "
        "generator is not the one that it was trained with; its merged table counts"
    )
    return stored, None


def _delta_note(table: str, base: torch.Tensor, delta: torch.Tensor) -> str:
    if not delta.any():
        return f"{table}: E_D equals E_G, Delta is zero"
    return (
        f"{table}: Delta := E_D - E_G, root mean square {_rms(delta):.3g} beside {_rms(base):.3g} "
        "of E_G"
    )


def _rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()
