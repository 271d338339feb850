"""What a reference run did, and how far two runs are apart.

TruthKey    what a reference run depends on, and the one of a cell
Truth       losses, norms, draws and final weights; a safetensors file
Distance    the largest relative differences; `distance` is that of two references
"""

from dataclasses import asdict, dataclass
from math import isnan, sqrt

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.matrix.cells import Cell
from tests.matrix.shared_run import STEPS, UNCHANGED_STEPS, initial_pair, start_weights


@dataclass
class Distance:
    """How far two runs are apart: the largest relative differences."""

    loss: float
    """Of both losses of every step."""
    norm: float
    """Of the gradient norms of every step."""
    weight: float
    """Of the final weights: the largest of a parameter, against the parameter's largest."""
    update: float
    """Of what the 20 steps have changed in all weights of an optimizer, as a 2-norm."""
    first_loss: float
    """Of the losses before any weight has changed."""
    first_norm: float
    """Of the gradient norms before any weight has changed."""

    def to_json(self):
        """All figures by name."""
        return asdict(self)


def relative(ours, theirs):
    """Relative difference; infinite where one of both is not finite."""
    if ours == theirs:
        return 0.0
    difference = abs(ours - theirs) / abs(theirs)
    return difference if difference == difference else float("inf")


@dataclass(frozen=True)
class TruthKey:
    """What a reference run depends on."""

    precision: str
    update: str
    micro_batches: int
    """Of one step; fp32 has one, since the sum does not depend on it."""
    linear: str = "fused"
    """How a Linear adds its bias: "split" is ZeRO-3's way (`low_precision.split`)."""

    @classmethod
    def of(cls, cell: Cell) -> "TruthKey":
        """The run that a cell is compared with."""
        if cell.precision == "fp32":
            return cls("fp32", cell.update, 1)
        linear = "split" if cell.stage == 3 else "fused"
        return cls(cell.precision, cell.update, cell.ranks * cell.accumulation, linear)

    def __str__(self):
        return f"{self.precision}-{self.update}-{self.micro_batches}-{self.linear}"


@dataclass
class Truth:
    """What a run of the reference did, step by step."""

    losses: torch.Tensor
    """fp64 [steps, 2]: L_MLM and L_RTD."""
    drawn: torch.Tensor
    """int64 [steps, sequences, slots]."""
    norms: dict[str, torch.Tensor]
    """By engine: fp64 [steps], global norms before clipping; NaN where the step was left out."""
    weights: dict[str, torch.Tensor]
    """By "engine/parameter": after the last step."""

    def save(self, path):
        """Write to a safetensors file."""
        tensors = {"losses": self.losses, "drawn": self.drawn}
        tensors |= {f"norm/{name}": values for name, values in self.norms.items()}
        tensors |= {f"weight/{name}": w.detach() for name, w in self.weights.items()}
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)

    @classmethod
    def load(cls, path):
        """Read it back."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

        def part(kind):
            start = f"{kind}/"
            return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

        return cls(tensors["losses"], tensors["drawn"], part("norm"), part("weight"))


def weight_distances(truth: Truth, starts, largest, squares):
    """`Distance.weight` and `.update` from each weight's largest and squared differences."""
    weight, difference, moved = 0.0, {}, {}
    for name, expected in truth.weights.items():
        engine = name.split("/")[0]
        weight = max(weight, largest[name] / float(expected.abs().max()))
        change = (expected.double() - starts[name].double()).square().sum()
        difference[engine] = difference.get(engine, 0.0) + squares[name]
        moved[engine] = moved.get(engine, 0.0) + float(change)
    return weight, max(sqrt(difference[engine] / moved[engine]) for engine in moved)


def distance(ours: Truth, theirs: Truth, update) -> Distance:
    """How far one run of the reference is from another."""
    starts = start_weights(initial_pair(update))
    losses = [
        max(map(relative, *pair))
        for pair in zip(ours.losses.tolist(), theirs.losses.tolist(), strict=True)
    ]
    norms = [
        max(
            0.0 if isnan(a) and isnan(b) else relative(a, b)
            for a, b in (
                (float(ours.norms[name][step]), float(norm[step]))
                for name, norm in theirs.norms.items()
            )
        )
        for step in range(STEPS)
    ]
    largest, squares = {}, {}
    for name, weight in theirs.weights.items():
        difference = ours.weights[name].double() - weight.double()
        largest[name] = float(difference.abs().max())
        squares[name] = float(difference.square().sum())
    return Distance(
        max(losses),
        max(norms),
        *weight_distances(theirs, starts, largest, squares),
        max(losses[:UNCHANGED_STEPS]),
        max(norms[:UNCHANGED_STEPS]),
    )
