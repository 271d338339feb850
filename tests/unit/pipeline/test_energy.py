"""Time and energy of a run, from its rows."""

import pytest

from pipeline.energy import BOARD_WATTS, board_watts, cost_of
from pipeline.flops import PEAK_DENSE_FLOPS


def row(step, seconds):
    return {"step": step, "perf/step_seconds": seconds}


def test_each_row_stands_for_the_steps_since_the_one_before():
    rows = [row(10, 3.0), {"step": 10, "eval/mlm_loss": 1.0}, row(30, 6.0), row(40, 99.0)]
    cost = cost_of(rows, 30, 8, "NVIDIA H100 80GB HBM3")
    assert cost.hours == pytest.approx((10 * 3.0 + 20 * 6.0) / 3600)
    assert cost.device_hours == pytest.approx(8 * 150 / 3600)
    assert cost.kilowatt_hours == pytest.approx(8 * 150 / 3600 * 0.7)


def test_nothing_is_said_without_rows():
    assert cost_of([], 30, 8, "NVIDIA H100") is None
    assert cost_of([row(40, 1.0)], 30, 8, "NVIDIA H100") is None


def test_a_processor_has_no_power_that_is_known():
    cost = cost_of([row(10, 3.0)], 10, 1, "AMD EPYC 9R14")
    assert cost.hours > 0
    assert cost.kilowatt_hours is None


@pytest.mark.parametrize(
    ("device", "watts"),
    [
        ("NVIDIA H100 80GB HBM3", 700),
        ("NVIDIA H100 PCIe", 350),
        ("NVIDIA H100 NVL", 400),
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA A100 80GB PCIe", 300),
        ("NVIDIA A100-PCIE-40GB", 300),
        ("NVIDIA L40S", 350),
        ("NVIDIA L4", 72),
        ("Tesla V100-PCIE-16GB", 250),
        ("Tesla T4", 70),
        ("NVIDIA H1000", None),
    ],
)
def test_the_more_specific_name_counts(device, watts):
    assert board_watts(device) == watts


def test_every_device_with_a_known_rate_has_a_power():
    assert all(board_watts(f"NVIDIA {name}") for name in PEAK_DENSE_FLOPS)
    assert all(board_watts(f"NVIDIA {name}") == watts for name, watts in BOARD_WATTS.items())
