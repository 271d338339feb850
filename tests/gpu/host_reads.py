"""Where the host reads a value of a tensor: on a GPU it waits there for everything before.

On a CPU all tensors lie in the same memory. What would lie on the host of a GPU too, numbers that
Python made a tensor of without a device, and what is computed from these alone, is no read.
"""

import contextlib
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What gives Python a number, or a shape that depends on numbers.
READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "unique_consecutive", "_unique2", "_unique", "unique_dim"),
    *("repeat_interleave", "bincount", "histc"),
}
# What copies to the host without an operation of its own.
COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
# What takes a number for its last argument; from a tensor it reads it.
BY_VALUE = {"masked_fill", "masked_fill_"}


class HostReads(TorchDispatchMode):
    """Records every read under the name of the phase that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "start"
        self.found: Counter[tuple[str, str]] = Counter()
        # By address; the tensors stay alive, so that nothing else gets their addresses.
        self._on_host: dict[int, torch.Tensor] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self._stack.enter_context(_Calls(self))
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._stack.close()

    def mark(self, phase: str, _step: int) -> None:
        """Begin a phase, as a step announces it."""
        self.phase = phase.rstrip("0123456789 ")

    def read(self) -> None:
        """Record that the host reads here."""
        self.found[self.phase, _where()] += 1

    def keep_on_host(self, tensors) -> None:
        """Remember what lies on the host of a GPU too."""
        for tensor in tensors:
            if tensor.device.type == "cpu":
                self._on_host[tensor.untyped_storage().data_ptr()] = tensor

    def is_on_host(self, tensors) -> bool:
        """Whether all of these do; there must be one."""
        return bool(tensors) and all(
            each.device.type == "cpu" and each.untyped_storage().data_ptr() in self._on_host
            for each in tensors
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = _tensors((args, kwargs))
        # A mask as an index is looked through for its true elements.
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args[1]
        )
        by_value = name in BY_VALUE and isinstance(args[2], torch.Tensor)
        on_host = self.is_on_host(tensors)
        if (name in READS or by_mask or by_value) and not on_host:
            self.read()
        result = function(*args, **(kwargs or {}))
        if on_host:
            self.keep_on_host(_tensors(result))
        return result

    def of(self, *parts: str) -> dict[str, int]:
        """Places and counts of the phases whose names contain one of the parts."""
        return {
            f"{phase}: {where}": count
            for (phase, where), count in self.found.items()
            if any(part in phase for part in parts)
        }


class _Calls(TorchFunctionMode):
    """Sees calls that are no operations: copies to the host, and Python's numbers as tensors."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in COPIES and not self._reads.is_on_host(list(args[:1])):
            self._reads.read()
        elif function is torch.tensor and (kwargs or {}).get("device") is None:
            self._reads.keep_on_host([result])
        elif function is torch.tensor:  # the host waits until the device has taken the copy
            self._reads.read()
        return result


def _tensors(tree) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def _where() -> str:
    """The innermost line outside of torch and of this file, as package file:function."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "torch" not in path.parts and path.name != Path(__file__).name:
            return f"{'/'.join(path.parts[-2:])}:{frame.name}"
    return "?"
