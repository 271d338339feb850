"""What torch's flight recorder knows about the newest collectives, beside the report of a hang.

    RUN/logs/collectives-rank-00002.json   a rank's collectives: group, shapes, when it came to
                                           each, and how far each of NCCL's has come
    RUN/logs/nccl_trace_rank_2             the same of NCCL, for `torchfrtrace RUN/logs -p
                                           nccl_trace_rank_`, which compares all ranks

The recorder keeps the newest TORCH_FR_BUFFER_SIZE collectives of every process group (2,000 unless
`slurm/network.env` or the user says otherwise; older releases of torch keep none unless told).
"""

import contextlib
import json
import logging
from pathlib import Path
from types import ModuleType

import torch

_RECORDERS = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}
"""Both are private to torch 2.11 to 2.13; a release without them writes no file."""

logger = logging.getLogger(__name__)


def collectives_file(logs: Path, rank: int) -> Path:
    """Name the file of a rank.

    Args:
        logs: RUN/logs.
        rank: Whose.

    Returns:
        The path.
    """
    return logs / f"collectives-rank-{rank:05d}.json"


def write_collectives(logs: Path, rank: int) -> None:
    """Write what the flight recorder holds; whatever fails is left out.

    Args:
        logs: RUN/logs.
        rank: This process's rank.
    """
    c10d = getattr(torch._C, "_distributed_c10d", None)
    if c10d is None:
        return
    records = {name: _records(c10d, function) for name, function in _RECORDERS.items()}
    records = {name: found for name, found in records.items() if found}
    with contextlib.suppress(OSError):
        if records:
            text = json.dumps(records, indent=1)
            collectives_file(logs, rank).write_text(text + "\n", encoding="utf-8")
        if dump := getattr(c10d, "_dump_nccl_trace", None):
            (logs / f"nccl_trace_rank_{rank}").write_bytes(dump())


def _records(c10d: ModuleType, function: str) -> list[dict[str, object]]:
    """Read one recorder's entries, the newest last."""
    dump = getattr(c10d, function, None)
    if dump is None:
        return []
    try:
        return json.loads(dump())["entries"]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        logger.warning("torch's flight recorder: %s", error)
        return []
