"""How far a cell may be from its reference, and why that far.

fp32. A rounding is 6e-8 of a number. Losses are means over some thirty slots, so they differ by a
few roundings: 1e-6. So do weights, whose twenty steps of 1e-3 each add one rounding of a weight of
about 1. A gradient is the difference of numbers that are larger than itself, hence 1e-5 for its
norm. What the steps have moved is a hundredth of a weight, and its difference a hundred roundings
of what was moved: 1e-4.

Low precision. A rounding is u = 2^-9 = 2e-3 of a number in bf16 and 2^-12 = 2.4e-4 in fp16. In the
first two steps a cell sees the weights of its reference, and does the same operations:

    first losses    equal, but where a kernel adds in another order because its operands lie
                    elsewhere in memory; such flips have reached the mean as u / 8: u / 5
    first norms     the same flips behind a backward pass, which cancels and so magnifies; and
                    DeepSpeed rounds gradients once more where it sends them in bf16 or fp16: 4 u

Later, a master's last bit flips the rounding of a weight, that flips roundings of states, and two
right runs drift as far apart as roundings allow:

    losses          a token's by some sqrt(20) u after twenty roundings in a row; the largest of 40
                    means over thirty slots by twice to five times u as measured: 8 u
    norms           of gradients, which pass a network twice, with cancellation: 64 u
    weights         the largest of ten thousand, in units of its parameter's largest: 4 u
    updates         a 2-norm over all weights, where the noise of single gradients, tens of u, is
                    averaged over steps; measured 4 u to 9 u: 16 u

Two runs of the reference that differ in the number of micro batches alone are the same training
with other roundings; `run.py` writes their distance into the table as `noise`. `test_matrix.py`
holds the bounds against it, and against mistakes that they have to see.
"""

from dataclasses import asdict, dataclass

BF16_ROUNDING, FP16_ROUNDING = 2.0**-9, 2.0**-12


@dataclass(frozen=True)
class Bounds:
    """The largest relative differences that pass; the names are those of `Distance`."""

    loss: float
    norm: float
    weight: float
    update: float
    first_loss: float
    first_norm: float

    def exceeded(self, figures: dict[str, float]) -> list[str]:
        """Which figures of a `Distance`, by name, are too large, in words."""
        return [
            f"{name} {figures[name]:.1e} > {limit:.1e}"
            for name, limit in asdict(self).items()
            if not figures[name] <= limit
        ]


def _low(rounding):
    return Bounds(
        loss=8 * rounding,
        norm=64 * rounding,
        weight=4 * rounding,
        update=16 * rounding,
        first_loss=rounding / 5,
        first_norm=4 * rounding,
    )


BOUNDS = {
    "fp32": Bounds(
        loss=1e-6, norm=1e-5, weight=1e-6, update=1e-4, first_loss=1e-6, first_norm=1e-6
    ),
    "bf16": _low(BF16_ROUNDING),
    "autocast": _low(BF16_ROUNDING),
    "fp16": _low(FP16_ROUNDING),
}
