"""Looks at the GPUs of a node: there, free, right, as fast as each other, without memory errors.

Shapes: N is the side of the square matrices.
"""

import shutil
import statistics
import subprocess
import time

import torch

from pipeline.preflight.finding import Finding

SIDE_N = 4096
_SMALL_N = 512
_ROUNDS = 20
_TOLERANCE = 1e-4
"""Of a product in fp32, relative to its greatest number: thousands of roundings of 6e-8."""
_OCCUPIED = 0.1
_SLOW = 0.7
_SMI_SECONDS = 20
_SMI_FIELDS = ("index", "driver_version", "ecc.errors.uncorrected.volatile.total")


def look_at_gpus(node: str, expected: int | None) -> list[Finding]:
    """Look at all visible GPUs.

    Args:
        node: This node's name.
        expected: How many there should be; None where nobody says.

    Returns:
        One finding a GPU, and one of all of them.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if expected is not None and count != expected:
        return [
            Finding(
                *(node, "gpu", False, f"{count} are visible and {expected} were given to the job"),
                "compare nvidia-smi with CUDA_VISIBLE_DEVICES, and the driver with torch's CUDA",
            )
        ]
    if count == 0:
        return [Finding(node, "gpu", True, "there is none; training uses the CPU")]
    findings, speeds = [], []
    for index in range(count):
        finding, tflops = _look_at(node, torch.device("cuda", index))
        findings.append(finding)
        speeds.append(tflops)
    return [*findings, *slow_ones(node, speeds), *look_at_driver(node)]


def _look_at(node: str, device: torch.device) -> tuple[Finding, float]:
    """Look at one GPU; returns its speed, too."""
    check, name = f"gpu {device.index}", torch.cuda.get_device_name(device)
    try:
        free, total = torch.cuda.mem_get_info(device)
        error = arithmetic_error(device)
        tflops = speed_tflops(device)
    except RuntimeError as problem:
        reason = str(problem).splitlines()[0]
        cure = "see dmesg for Xid, reset or drain the node"
        return Finding(node, check, False, f"{name} does not work ({reason})", cure), 0.0
    seen = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {tflops:.0f} TFLOP/s"
    if error > _TOLERANCE:
        wrong = f"{name} multiplies wrongly: {error:.1e} off the CPU's answer"
        return Finding(node, check, False, wrong, "drain the node and test its memory"), tflops
    if free < (1 - _OCCUPIED) * total:
        return Finding(node, check, False, seen, "end who else uses it, see nvidia-smi"), tflops
    return Finding(node, check, True, seen), tflops


def arithmetic_error(device: torch.device) -> float:
    """Multiply two matrices on a device and on the CPU.

    Args:
        device: Which.

    Returns:
        The greatest difference, relative to the greatest number; in fp32 without TF32.
    """
    generator = torch.Generator().manual_seed(1)
    left_NN, right_NN = (torch.randn(_SMALL_N, _SMALL_N, generator=generator) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        found_NN = (left_NN.to(device) @ right_NN.to(device)).cpu()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    expected_NN = left_NN.double() @ right_NN.double()
    return float((found_NN - expected_NN).abs().max() / expected_NN.abs().max())


def speed_tflops(device: torch.device, side_N: int = SIDE_N, rounds: int = _ROUNDS) -> float:
    """Time products in bf16.

    Args:
        device: Which.
        side_N: Side of the square matrices.
        rounds: How many products are timed, behind some that warm up.

    Returns:
        TFLOP/s.
    """
    matrix_NN = torch.ones(side_N, side_N, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        torch.mm(matrix_NN, matrix_NN)
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(rounds):
        torch.mm(matrix_NN, matrix_NN)
    _synchronize(device)
    return rounds * 2 * side_N**3 / (time.perf_counter() - began) / 1e12


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slow_ones(node: str, tflops: list[float]) -> list[Finding]:
    """Find GPUs that are much slower than their neighbours.

    Args:
        node: This node's name.
        tflops: By GPU; 0 for one that does not work.

    Returns:
        One finding for each; none where all are alike.
    """
    usual = statistics.median_high([speed for speed in tflops if speed] or [0.0])
    return [
        Finding(
            *(node, f"gpu {index}", False),
            f"{speed:.0f} TFLOP/s where the GPUs of this node usually have {usual:.0f}",
            "look for heat, power limits and other users (nvidia-smi -q -d PERFORMANCE)",
        )
        for index, speed in enumerate(tflops)
        if 0 < speed < _SLOW * usual
    ]


def look_at_driver(node: str) -> list[Finding]:
    """Ask nvidia-smi for the driver and for memory errors; nothing where there is none.

    Args:
        node: This node's name.

    Returns:
        One finding, or one for each GPU with errors.
    """
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    words = [program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        ).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
        errors = {index: count for index, _, count in rows if count.isdigit() and int(count)}
        drivers = sorted({driver for _, driver, _ in rows})
    except (OSError, subprocess.SubprocessError, ValueError) as problem:
        cure = "see dmesg, reload the driver or drain the node"
        return [Finding(node, "driver", False, f"nvidia-smi does not answer: {problem}", cure)]
    if errors:
        return [
            Finding(
                *(node, f"gpu {index}", False, f"{count} uncorrected memory errors (ECC)"),
                "reset the GPU; drain the node if they come again",
            )
            for index, count in errors.items()
        ]
    return [Finding(node, "driver", True, f"{', '.join(drivers)}, no uncorrected memory errors")]
