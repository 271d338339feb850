"""A small set of cells that has every pair of values that any cell has.

pairs_of(cells)     (axis, value, axis, value) that occur
spanning(cells)     cells that have them all, cheap ones first
"""

from itertools import combinations

from tests.matrix.cells import Cell


def pairs(cell: Cell):
    """Pairs of (axis, value) of a cell."""
    return set(combinations(cell.to_json().items(), 2))


def pairs_of(cells):
    """All pairs of some cells."""
    return set().union(*(pairs(cell) for cell in cells))


def spanning(cells: list[Cell]) -> list[Cell]:
    """Choose greedily: always the cell with the most pairs that are missing, for its cost."""
    missing, chosen = pairs_of(cells), []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing) / cost(cell))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def cost(cell: Cell) -> float:
    """Seconds of a core that a cell takes, roughly: what is done 20 times, in the worst place."""
    per_micro_step = 3.0 if cell.stage == 3 else 1.0
    return cell.ranks * (2.0 + per_micro_step * cell.accumulation)
