"""Where the host reads a value of a tensor: on a GPU it waits there for everything before."""

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What gives Python a number, or a shape that depends on numbers.
READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "unique_consecutive", "_unique2", "_unique", "unique_dim"),
    *("repeat_interleave", "bincount", "histc"),
}


class HostReads(TorchDispatchMode):
    """Records every read under the name of the phase that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "start"
        self.found: Counter[tuple[str, str]] = Counter()

    def mark(self, phase: str, _step: int) -> None:
        """Begin a phase, as a step announces it."""
        self.phase = phase.rstrip("0123456789 ")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # A mask as an index is looked through for its true elements.
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args[1]
        )
        if name in READS or by_mask:
            self.found[self.phase, _where()] += 1
        return function(*args, **(kwargs or {}))

    def of(self, *parts: str) -> dict[str, int]:
        """Places and counts of the phases whose names contain one of the parts."""
        return {
            f"{phase}: {where}": count
            for (phase, where), count in self.found.items()
            if any(part in phase for part in parts)
        }


def _where() -> str:
    """The innermost line outside of torch and of this file, as package file:function."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "torch" not in path.parts and path.name != Path(__file__).name:
            return f"{'/'.join(path.parts[-2:])}:{frame.name}"
    return "?"
