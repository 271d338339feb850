"""The files of a commit that hold tensors: slices of parameters, one safetensors file a rank.

    KIND/PARAMETER                fp32 [count], KIND is weight, exp_avg or exp_avg_sq
    metadata "starts"             PARAMETER -> its first element in this file, as JSON

    write_tensors   streams a file, tensor by tensor, so that it says that it gets on
    StateReader     reads any run of elements of any parameter, whatever world wrote it

They hold nothing that executes. A file is byte for byte what safetensors itself would write.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_prep.errors import CorruptError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
STARTS = "starts"
_ITEM_BYTES = 4
_WRITE_BYTES = 8 << 20
_SYNC_BYTES = 256 << 20


def slice_metadata(starts: dict[str, int]) -> dict[str, str]:
    """Make the metadata of a rank file.

    Args:
        starts: Parameter -> its first element in the file.

    Returns:
        What `write_tensors` takes.
    """
    return {STARTS: json.dumps(starts)}


def write_tensors(
    path: Path,
    metadata: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Write a safetensors file of fp32 tensors that need not be in memory together.

    The library's own writer wants all tensors at once and is silent until it has synced nothing:
    whoever watches for hangs could not tell a slow disk from one that is gone.

    Args:
        path: Where to; its folder exists.
        metadata: Text beside the tensors; of one key, as the order of several is nobody's.
        shapes: Name -> shape.
        read: Name -> fp32 tensor of that shape on the CPU; called once a name, in order.
        progress: Called after every few megabytes.

    Raises:
        OSError: It cannot be written.
        ValueError: A tensor is not what was announced.

    Source:
        https://github.com/huggingface/safetensors#format
    """
    names, offset = sorted(shapes), 0
    header: dict[str, Any] = {"__metadata__": metadata}
    for name in names:
        end = offset + torch.Size(shapes[name]).numel() * _ITEM_BYTES
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    since_sync = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = read(name)
            if values.dtype != torch.float32 or tuple(values.shape) != shapes[name]:
                raise ValueError(f"{name}: {values.dtype} {tuple(values.shape)}")
            content = values.contiguous().view(-1).view(torch.uint8).numpy().data
            for first in range(0, len(content), _WRITE_BYTES):
                file.write(content[first : first + _WRITE_BYTES])
                since_sync += _WRITE_BYTES
                if since_sync >= _SYNC_BYTES:  # or the last fsync would have to do it all
                    file.flush()
                    os.fsync(file.fileno())
                    since_sync = 0
                progress()


class StateReader:
    """Reads any run of elements of any parameter from one network's folder of a commit."""

    def __init__(self, folder: Path) -> None:
        """Index the headers of the rank files.

        Args:
            folder: `.../step-00010000/generator` or `discriminator`.

        Raises:
            CorruptError: A rank file is not what `write_snapshot` writes; the message names it.
        """
        self._folder = folder
        self._parts: dict[str, list[tuple[int, int, Path]]] = {}
        self._open: dict[Path, Any] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            self._open[path], counts = open_rank_file(path)
            for name, (start, count) in counts.items():
                self._parts.setdefault(name, []).append((start, count, path))

    @property
    def names(self) -> list[str]:
        """Names of all parameters, sorted."""
        return sorted(self._parts)

    def count(self, name: str) -> int:
        """Count a parameter's elements.

        Args:
            name: Parameter.

        Returns:
            Elements up to the last one that is stored; `read` refuses gaps before it.
        """
        return max(start + count for start, count, _ in self._parts[name])

    def read(self, name: str, kind: str, start: int, count: int) -> torch.Tensor:
        """Read consecutive elements.

        Args:
            name: Parameter.
            kind: "weight", "exp_avg" or "exp_avg_sq".
            start: First element.
            count: How many.

        Returns:
            fp32 [count] on the CPU.

        Raises:
            CorruptError: The files do not hold all of these elements.
        """
        end = start + count
        runs = [
            (max(start, part_start), min(end, part_start + part_count), part_start, path)
            for part_start, part_count, path in sorted(self._parts.get(name, []))
            if part_start < end and start < part_start + part_count
        ]
        # Each run must begin where the one before it ends, or elements are missing or there twice.
        if [start, *(last for _, last, *_ in runs)] != [*(first for first, *_ in runs), end]:
            raise CorruptError(
                f"{self._folder}: elements {start} to {end} of {name} are not there exactly once; "
                "use another commit"
            )
        result = torch.empty(count)
        for first, last, part_start, path in runs:
            values = self._open[path].get_slice(f"{kind}/{name}")
            result[first - start : last - start] = values[first - part_start : last - part_start]
        return result

    def require_names(self, names: set[str]) -> None:
        """Insist that the files are of a model.

        Args:
            names: The model's parameters.

        Raises:
            CorruptError: Other parameters are stored.
        """
        if names != set(self._parts):
            odd = sorted(names ^ set(self._parts))
            raise CorruptError(
                f"{self._folder}: parameters differ from the model's: {', '.join(odd[:5])}; "
                "the checkpoint belongs to another configuration"
            )

    def weights(self, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
        """Read whole weights.

        Args:
            shapes: Parameter name -> shape.

        Returns:
            name -> fp32 tensor of that shape.

        Raises:
            CorruptError: Names or sizes differ from what is stored.
        """
        self.require_names(set(shapes))
        return {
            name: self.read(name, WEIGHT, 0, shape.numel()).view(shape)
            for name, shape in shapes.items()
        }


def open_rank_file(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Open a rank file and insist that its header is one that `write_tensors` wrote.

    Args:
        path: The file.

    Returns:
        safetensors' handle, and parameter -> first element and count.

    Raises:
        CorruptError: It is something else; nothing in it was executed.
    """
    try:
        handle = safe_open(path, framework="pt")
        return handle, _slice_counts(handle)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: no file of a checkpoint ({error})") from error


def _slice_counts(handle: Any) -> dict[str, tuple[int, int]]:
    """Read what one rank file holds: parameter -> first element and count.

    A hash proves only that a file is the one in the manifest, not that this program wrote it.
    """
    starts = json.loads((handle.metadata() or {}).get(STARTS, "null"))
    if not isinstance(starts, dict) or any(type(s) is not int or s < 0 for s in starts.values()):
        raise ValueError(f"its metadata has no {STARTS!r} of slices")
    wanted = {f"{kind}/{name}" for kind in KINDS for name in starts}
    if odd := wanted ^ set(handle.keys()):
        raise ValueError(f"its tensors are not those of its metadata: {', '.join(sorted(odd)[:3])}")
    counts = {}
    for name, start in starts.items():
        forms = {_form(handle, f"{kind}/{name}") for kind in KINDS}
        dtype, shape = next(iter(forms))
        if len(forms) != 1 or dtype != "F32" or len(shape) != 1:
            raise ValueError(f"{name} is not fp32 of one dimension and one size: {sorted(forms)}")
        counts[name] = start, shape[0]
    return counts


def _form(handle: Any, key: str) -> tuple[str, tuple[int, ...]]:
    """Read a stored tensor's type and shape."""
    part = handle.get_slice(key)
    return part.get_dtype(), tuple(part.get_shape())
