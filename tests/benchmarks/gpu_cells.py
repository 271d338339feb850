"""The cells of `gpu.py`: one process for a part and a size, which may be killed at any time.

Each cell of `attention`, `layer` and `step` measures a peer and ours in interleaved rounds, so that
its ratio is taken in one run; before that, without dropout, it compares their results. Figures:

    tokens_per_second, ratio  the peer's rate, and how many times it ours reaches (median of rounds)
    forward_*                 the same for the forward pass alone, with what a backward pass needs
    mfu                       by `pipeline.flops`, whatever the peer wastes
    peak_gib                  with weights, gradients and optimizer state of the one network pair
    beyond_state_gib          without them
    differences               relative, of outputs, losses and gradients
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from tests.benchmarks import gpu_steps
from tests.benchmarks.attention_variants import (
    Builder,
    Forward,
    Shape,
    attention_variants,
    layer_variants,
)
from tests.benchmarks.gpu_bench import Bench
from tests.benchmarks.gpu_results import Cell, ResultFile, run_cells
from tests.benchmarks.rounds import RESULTS
from tests.benchmarks.run import write_readme
from tests.benchmarks.step_variants import relative_difference

ROOT = Path(__file__).resolve().parents[2]
HEADS = {"large": 16, "base": 12, "xsmall": 6, "tiny": 2}
NO_TESTS = 5
"""pytest's exit code where a file has none for this device."""
LENGTHS = (512, 128, 1024, 2048)
TOKENS = {"attention": 32 * 512, "layer": 16 * 512}


def shape_of(part: str, size: str, length: int) -> Shape:
    """As many tokens at every length."""
    if size == "tiny":
        return Shape(2, length // 16, HEADS[size], head_size=32, position_buckets=16)
    return Shape(max(1, TOKENS[part] // length), length, HEADS[size])


def without_dropout(shape: Shape) -> Shape:
    """For comparing numbers."""
    return Shape(
        shape.sequences, shape.length, shape.heads, shape.head_size, shape.position_buckets, 0.0
    )


def gradients(forward: Forward, inputs: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Output, and the gradients of both inputs under the same gradient of the output."""
    output = forward(*inputs)
    draws = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=draws).to(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def pair_cell(
    name: str,
    builders: Callable[[Shape], dict[str, Builder]],
    shape: Shape,
    bench: Bench,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Measure one variant of an attention or a layer against the first one."""
    bench.clean()
    inputs = shape.inputs(bench.device, dtype)
    exact = builders(without_dropout(shape))
    first = next(iter(exact))
    names = ("output", "gradient of x", "gradient of the table")
    expected, found = (gradients(exact[each](), inputs) for each in (first, name))
    differences = [relative_difference(*each) for each in zip(found, expected, strict=True)]
    del exact, expected, found
    bench.clean()
    both = builders(shape)
    ours, peer = both[first](), both[name]()
    output_gradient = torch.randn_like(ours(*inputs).detach())

    def train(forward: Forward) -> Callable[[], object]:
        weights = list(forward.module.parameters()) if hasattr(forward, "module") else []
        return lambda: torch.autograd.grad(
            forward(*inputs), [*inputs, *weights], output_gradient, allow_unused=True
        )

    alone = bench.compare(lambda: ours(*inputs), lambda: peer(*inputs))
    both_passes = bench.compare(train(ours), train(peer))
    peaks = {"ours": bench.peak_bytes(train(ours)), "peer": bench.peak_bytes(train(peer))}
    return {
        "against": first,
        "ratio": both_passes["ratio"],
        "tokens_per_second": shape.tokens / both_passes["peer"],
        "ours_tokens_per_second": shape.tokens / both_passes["ours"],
        "forward_ratio": alone["ratio"],
        "forward_seconds": alone["peer"],
        "seconds": both_passes["peer"],
        "ours_forward_seconds": alone["ours"],
        "ours_seconds": both_passes["ours"],
        **{
            f"{who}peak_gib": peak / 2**30
            for who, peak in (("", peaks["peer"]), ("ours_", peaks["ours"]))
            if peak is not None
        },
        "differences": dict(zip(names, differences, strict=True)),
    }


def pair_cells(part: str, size: str, bench: Bench, dtype: torch.dtype) -> list[Cell]:
    """All peers of all lengths; the length of pre-training first."""
    cells = []
    for length in LENGTHS if part == "attention" else LENGTHS[:1]:
        shape = shape_of(part, size, length)

        def builders(of: Shape) -> dict[str, Builder]:
            if part == "attention":
                return attention_variants(of, bench.device)
            return layer_variants(of, bench.device, dtype)

        for name in list(builders(shape))[1:]:
            cells.append(
                Cell(
                    f"{shape.sequences} x {shape.length}: {name}",
                    lambda n=name, s=shape, b=builders: pair_cell(n, b, s, bench, dtype),
                )
            )
    return cells


def junit_figures(path: Path) -> dict[str, Any]:
    """Counts of a pytest run, and the names of what failed."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "failed_tests": len(bad),
        "skipped": skipped,
        "failures": [case.get("name", "") for case in bad],
    }


def run_tests(path: Path, device: str) -> dict[str, Any]:
    """Run one file of tests; what the CPU can run of it where there is no GPU."""
    marker = "gpu" if device == "cuda" else "not gpu"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marker, str(path)]
        # The tests record properties, which the newer form of the report does not have.
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode not in (0, 1, NO_TESTS):
            raise RuntimeError(f"pytest ended with {done.returncode}")
        return junit_figures(report)


def make_cells(part: str, size: str, bench: Bench, results: ResultFile) -> list[Cell]:
    """The cells of a part, the most valuable first."""
    dtype = torch.float32 if size == "tiny" else torch.bfloat16
    results.document["shape"] = {"dtype": str(dtype).removeprefix("torch.")}
    if part == "tests":
        files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
        return [Cell(f.stem, lambda f=f: run_tests(f, bench.device.type)) for f in files]
    results.document["shape"] |= {"dropout": 0.1}
    if part == "step":
        return gpu_steps.cells(size, bench, dtype, results)
    results.document["shape"] |= {"heads": HEADS[size], "head_size": 64 if size != "tiny" else 32}
    return pair_cells(part, size, bench, dtype)


def main() -> int:
    """Run the cells of a part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    deadline_seconds = time.monotonic() + options.seconds
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found; --device cpu --size tiny tries the program itself")
        return 0
    bench = Bench(torch.device(options.device))
    size = "all" if options.part == "tests" else options.size
    results = ResultFile(options.results, options.part, size, options.device, options.run_id)
    cells = make_cells(options.part, options.size, bench, results)
    run_cells(cells, results, deadline_seconds, say=lambda line: print(line, flush=True))
    print(results.path, flush=True)
    if options.results.resolve() == RESULTS.resolve():
        write_readme(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
