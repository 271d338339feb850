"""What else could be chosen, for people: the proposal, and the choices that were tried."""

import json
from collections.abc import Sequence

from pipeline.plan.measurements import Deviation
from pipeline.plan.planning import Plan
from pipeline.plan.report import gib
from pipeline.plan.search import CHOSEN_KEYS, WORTH_SHARDING, Alternative, fastest

_WAYS = "   attention backend   compile  ZeRO  checkpointing  micro batch        peak"
_STAGES = "   ZeRO  checkpointing  micro batch        peak"
_RATES = "  tokens/s a GPU    MFU       days"


def proposal_lines(plan: Plan, proposal: Plan | None) -> list[str]:
    """Say how to get the fastest settings that fit.

    Args:
        plan: What is planned.
        proposal: The fastest; None where nothing fits.

    Returns:
        Lines: what to write where, and how much faster it is where that is not the plan.
    """
    if proposal is None:
        return ["nothing fits: take GPUs with more memory, a smaller network or length"]
    model, raw = proposal.config.model, proposal.sharding.config.raw
    words = " ".join(f"model.{key}={getattr(model, key)}" for key in CHOSEN_KEYS)
    lines = ["this is the proposal: the fastest choice that fits, by the tables below"]
    if plan is not proposal:
        ratio = plan.run_seconds / proposal.run_seconds
        lines = [f"proposed: {proposal.settings}", f"  {ratio:.2f} times as fast as this plan"]
    return [*lines, f"  words of deberta train: {words}", f"  DeepSpeed JSON: {json.dumps(raw)}"]


def way_lines(alternatives: Sequence[Alternative], chosen: Plan | None) -> list[str]:
    """Compare the ways to compute: of each attention backend and compilation the best.

    Args:
        alternatives: From `propose`.
        chosen: The proposal, which gets an arrow.

    Returns:
        Lines.
    """
    lines = ["", "ways to compute, each with the settings that suit it best", _WAYS + _RATES]
    for way in dict.fromkeys(each.way for each in alternatives):
        best = fastest([each for each in alternatives if each.way == way])
        if best is None:
            lines.append(f"   {way[0]:<18}  {way[1]:<7}  does not fit")
            continue
        choice = f"{way[0]:<18}  {way[1]:<7}  {best.sharding.stage:<4}  {_cells(best)}"
        lines.append(_mark(best, chosen) + choice)
    return lines


def stage_lines(
    alternatives: Sequence[Alternative], chosen: Plan, named: Sequence[str]
) -> list[str]:
    """Compare stages and checkpointing at the way to compute of one plan.

    Args:
        alternatives: From `propose`.
        chosen: The plan, which gets an arrow where it is one of them.
        named: Keys of [model] that the configuration names.

    Returns:
        Lines: for each the fastest micro batch that fits, and why the next one does not.
    """
    model = chosen.config.model
    way = (model.attention_backend, model.compile)
    lines = [
        "",
        f"with {way[0]}, compile {way[1]}: the least memory within 1 % of the fastest micro batch",
        f"{_STAGES}{_RATES}  does not fit",
    ]
    for each in alternatives:
        if each.way != way:
            continue
        kind = each.config.model.activation_checkpointing
        cells = f"{kind:<13}  {'none':>11}{'':>{len(_RATES) + 12}}"
        if each.best is not None:
            cells = _cells(each.best)
        lines.append(
            f"{_mark(each.best, chosen)}{each.stage:<4}  {cells}  {_beyond(each.too_large)}"
        )
    note = f"a higher stage is proposed where it is {WORTH_SHARDING - 1:.0%} faster"
    if named:
        note += f"; kept as named: {', '.join(f'model.{key}' for key in named)}"
    return [*lines, note]


def deviation_lines(found: Sequence[Deviation]) -> list[str]:
    """Say how far the model is from what GPUs have measured.

    Args:
        found: All measured points.

    Returns:
        Lines.
    """
    if not found:
        return [
            "",
            "No GPU has measured a step of this code yet: all speeds are modelled, by a roofline,",
            "which real runs stay below. Measure before you rent: make gpu PART=step.",
        ]
    lines = ["", "the model against measured points: measured / modelled"]
    for each in found:
        row, memory = each.row, each.memory_ratio
        kept = "" if memory is None else f", memory {memory:.2f}"
        lines.append(
            f"  {row.device}, {row.preset}, {row.attention_backend}, compile {row.compile},"
            f" {row.sequences} x {row.sequence_length}: speed {each.speed_ratio:.2f}{kept}"
        )
    return lines


def _mark(plan: Plan | None, chosen: Plan | None) -> str:
    return "-> " if plan is not None and plan is chosen else "   "


def _cells(plan: Plan) -> str:
    """Checkpointing, micro batch, memory and speed of a plan."""
    micro = plan.batch.train_micro_batch_size_per_gpu
    return (
        f"{plan.config.model.activation_checkpointing:<13}  {micro:>11}"
        f"  {gib(plan.peak.total):>10}  {plan.tokens_per_gpu_second:>14,.0f}  {plan.mfu:>5.1%}"
        f"  {plan.run_seconds / 86_400:>9,.2f}"
    )


def _beyond(plan: Plan | None) -> str:
    """Why the next micro batch does not fit."""
    if plan is None:
        return "-"
    part = max(plan.peak.parts, key=plan.peak.parts.__getitem__)
    micro, count = plan.batch.train_micro_batch_size_per_gpu, plan.peak.parts[part]
    return f"{micro}: {gib(plan.peak.total)}, {part} {gib(count)}"
