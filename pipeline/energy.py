"""How long a run computed, on what, and what energy that may have taken.

    cost_of    rows of metrics.jsonl -> device-hours, and an estimate of the energy

Only steps that the run has kept are counted: what a kill or a roll-back lost, start-up, evaluation
and commits are not in `perf/step_seconds`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BOARD_WATTS = {
    "H100 NVL": 400,
    "H100 PCIe": 350,
    "H100": 700,
    "H200 NVL": 600,
    "H200": 700,
    "B200": 1000,
    "A100-PCIE": 300,
    "A100 80GB PCIe": 300,
    "A100": 400,
    "L40S": 350,
    "A10": 150,
    "L4": 72,
    "RTX A6000": 300,
    "RTX 3090": 350,
    "RTX 4090": 450,
    "V100-PCIE": 250,
    "V100": 300,
    "T4": 70,
}
"""Board power at full load by words of the device's name, more specific names first, in watts.

Source:
    NVIDIA's data sheets of the types.
"""


@dataclass(frozen=True)
class RunCost:
    """What the steps of a run took."""

    devices: int
    device: str
    """Name of one."""
    hours: float
    """Wall-clock time of the steps."""

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.devices * self.hours

    @property
    def kilowatt_hours(self) -> float | None:
        """Energy of the devices at full load; None for one whose power is not known."""
        watts = board_watts(self.device)
        return None if watts is None else self.device_hours * watts / 1000


def board_watts(device: str) -> int | None:
    """Look up the power of a device.

    Args:
        device: As the driver reports it.

    Returns:
        Watts; None where the table does not have it.
    """
    names = (name for name in BOARD_WATTS if re.search(rf"\b{re.escape(name)}\b", device))
    return next((BOARD_WATTS[name] for name in names), None)


def cost_of(rows: Sequence[Any], last_step: int, devices: int, device: str) -> RunCost | None:
    """Add up the time of the steps.

    Args:
        rows: Of metrics.jsonl, in order of their steps.
        last_step: Up to this one.
        devices: Ranks of the world; of the last start, where they changed.
        device: Name of one.

    Returns:
        The cost; None where no row says how long its steps took.
    """
    seconds, before = 0.0, 0
    for row in rows:
        if row["step"] > last_step or row.get("perf/step_seconds") is None:
            continue
        seconds += row["perf/step_seconds"] * (row["step"] - before)
        before = row["step"]
    return RunCost(devices, device, seconds / 3600) if before else None
