"""Compile every shipped tile of every kernel without a GPU: registers, stack and shared memory.

    python -m tests.benchmarks.kernels_compile [--architecture sm_90] [--kernel scores]

The launcher runs as it does in training, on CPU tensors at the shape of a training batch, but each
launch only compiles: Triton specializes on the same strides and alignments, and ptxas of Triton's
wheel makes the same machine code. The exit code is 1 if a kernel spills (uses a stack) or needs
more shared memory than a multiprocessor of its architecture can give one program. A run of
everything writes its table to `results/kernels-triton-VERSION.md`.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported: interpreting is no test

import triton
from triton.backends.compiler import GPUTarget

from pipeline.counter_rng import DropoutKey
from pipeline.modeling.kernels import disentangled_host as host
from pipeline.modeling.kernels import vocabulary_host
from pipeline.modeling.kernels.arguments import Noise
from pipeline.modeling.kernels.serving import HEAD_SIZES
from pipeline.modeling.kernels.tile_table import TABLES, Tile
from pipeline.modeling.vocabulary_head import CHUNK_IDS

SHARED_BYTES = {"sm_80": 160 * 1024, "sm_90": 227 * 1024}
RESULTS = Path(__file__).parent / "results"
HEADS, SEQUENCES, TABLE_ROWS = 2, 2, 512
SLOTS, VOCABULARY = 77, 128_100


@dataclass(frozen=True)
class Variant:
    """A form of the kernels: what is compiled into them beside the head size."""

    name: str
    length: int = 512
    by_row: bool = True
    packed: bool = False


# Each form is the heaviest of its kind: a mask or packing, dropout, both products.
VARIANTS = (
    Variant("table rows"),
    Variant("distances, packed", by_row=False, packed=True),
    Variant("table rows, odd length", length=513),
)
DTYPES = ("bfloat16", "float32")  # tiles go by the bytes of an element
# Rows of a whole chunk of ids begin at multiples of 16 elements, those of the last one do not.
CHUNKS = {"a chunk of ids": CHUNK_IDS, "the last chunk": VOCABULARY % CHUNK_IDS}


@dataclass(frozen=True)
class Compiled:
    """One kernel as ptxas made it."""

    architecture: str
    kernel: str
    head_size: int | None
    """None in the vocabulary head."""
    dtype: str
    variant: str
    tile: Tile
    registers: int
    stack_bytes: int
    shared_bytes: int

    @property
    def fault(self) -> str:
        """What is wrong with it, if anything."""
        if self.stack_bytes:
            return "spills"
        return "too much" if self.shared_bytes > SHARED_BYTES[self.architecture] else ""


class CompilingDriver:
    """What Triton asks of a driver while it compiles for a GPU that is not here."""

    def __init__(self, architecture: str) -> None:
        self.number = int(architecture.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self.number  # Triton keeps one cache a device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack of the one function in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def problem(variant: Variant, head_size: int, dtype_name: str) -> host.Problem:
    """Tensors of a batch, strided as the projections of a layer leave them."""
    num_tokens, length = SEQUENCES * variant.length, variant.length
    dtype = getattr(torch, dtype_name)
    rows = [
        torch.zeros(num_tokens, HEADS, head_size, dtype=dtype).transpose(0, 1) for _ in range(3)
    ]
    tables = [torch.zeros(HEADS, TABLE_ROWS, head_size, dtype=dtype) for _ in range(2)]
    site = DropoutKey.derive(0, "discriminator", 0, 0, 0, torch.device("cpu")).site(0, 0)
    starts = torch.arange(SEQUENCES + 1, dtype=torch.int32) * length
    return host.Problem(
        *rows,
        *tables,
        table_rows_2E=torch.zeros(2, 2 * length, dtype=torch.int16),
        key_mask_T=None if variant.packed else torch.ones(num_tokens, dtype=torch.uint8),
        starts=starts if variant.packed else None,
        words_2=site.words_2,
        max_length=length,
        by_row=variant.by_row,
        scale=0.1,
        dropout_p=0.1,
        layer=1,
        where=0,
    )


class CompileOnly:
    """In the place of `launch`: compiles each kernel once, with the options of its tile.

    Args:
        architecture: What for.
        head_size: Channels of a head; None in the vocabulary head.
        dtype: Of the inputs.
        variant: Its name in the table.
        wanted: The one kernel to compile; None compiles all.
        skips: Kernels that another variant has compiled.
    """

    def __init__(
        self,
        architecture: str,
        head_size: int | None,
        dtype: str,
        variant: str,
        wanted: str | None,
        skips: frozenset[str] = frozenset(),
    ) -> None:
        triton.runtime.driver.set_active(CompilingDriver(architecture))
        self.case = (head_size, dtype, variant)
        self.architecture, self.wanted, self.skips = architecture, wanted, skips
        self.found: dict[str, Compiled] = {}

    def __call__(self, kernel: Any, grid: Any, tile: Tile, *args: Any, **constants: Any) -> None:
        name = kernel.fn.__name__.removesuffix("_kernel")
        if name in self.skips or name in self.found or self.wanted not in (None, name):
            return
        compiled = kernel.warmup(*args, grid=grid, **constants, **tile.launch_options)
        registers, stack_bytes = resources(compiled.asm["cubin"])
        self.found[name] = Compiled(
            self.architecture,
            name,
            *self.case,
            tile,
            registers,
            stack_bytes,
            compiled.metadata.shared,
        )


def compile_all(
    architecture: str, head_size: int, dtype: str, variant: Variant, wanted: str | None
) -> list[Compiled]:
    """Compile what one forward and one backward pass of attention launch."""
    # The forms differ in what only two kernels compute.
    repeated = frozenset({"delta", "side", "table", "row"} if variant is not VARIANTS[0] else ())
    compile_only = CompileOnly(architecture, head_size, dtype, variant.name, wanted, repeated)
    here = problem(variant, head_size, dtype)
    with (
        mock.patch.object(host, "launch", compile_only),
        mock.patch.object(host, "device_architecture", return_value=architecture),
    ):
        context, log_sum_exp = host.forward(here)
        host.backward(here, context, context, log_sum_exp)
    return list(compile_only.found.values())


def compile_head(architecture: str, dtype: str, chunk: str, wanted: str | None) -> list[Compiled]:
    """Compile what a chunk of the vocabulary head launches, with draws among some of the ids."""
    compile_only = CompileOnly(architecture, None, dtype, chunk, wanted)
    rows, size = SEQUENCES * SLOTS, CHUNKS[chunk]
    number = torch.zeros(rows, dtype=torch.int64)
    words = torch.zeros(SEQUENCES, 2, dtype=torch.int64)
    product, bias = torch.zeros(rows, size), torch.zeros(size, dtype=getattr(torch, dtype))
    with (
        mock.patch.object(vocabulary_host, "launch", compile_only),
        mock.patch.object(vocabulary_host, "device_architecture", return_value=architecture),
    ):
        noise = Noise(number[:2], words, number, SLOTS, factor=1.0, start=4, stop=VOCABULARY)
        sums = vocabulary_host.ChunkSums(number, noise)
        sums.add(0, product, bias)
        totals = (sums.max_N, sums.sum_N, sums.sum_N)
        vocabulary_host.chunk_gradient(product, bias, *totals, number, 0, bias.dtype)
    return list(compile_only.found.values())


COLUMNS = (
    *("architecture", "kernel", "head size", "dtype", "form", "tile", "warps", "stages"),
    *("registers", "stack bytes", "shared KiB", "fault"),
)


def cells(row: Compiled) -> list[str]:
    """A row of the table, as `COLUMNS`."""
    tile, shared = row.tile, f"{row.shared_bytes / 1024:.1f}"
    head_size = "" if row.head_size is None else row.head_size
    where = (row.architecture, row.kernel, head_size, row.dtype, row.variant)
    values = (f"{tile.rows} x {tile.columns}", tile.warps, tile.stages, row.registers)
    return [str(each) for each in (*where, *values, row.stack_bytes, shared, row.fault or "none")]


def show(rows: list[Compiled]) -> None:
    """Print the table."""
    table = Table(*COLUMNS, title=f"ptxas, Triton {triton.__version__}")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=160).print(table)


def write(rows: list[Compiled], faults: int, folder: Path = RESULTS) -> Path:
    """Write the table beside the other results; edit nothing there by hand."""
    path = folder / f"kernels-triton-{triton.__version__}.md"
    lines = [
        f"# Every shipped tile as Triton {triton.__version__} and its ptxas compile it",
        "",
        f"Written by `make kernels-compile` on {datetime.now(UTC):%Y-%m-%d}, without a GPU: "
        f"{len(rows)} kernels, {faults} at fault. Shared memory may be "
        + ", ".join(f"{size // 1024} KiB on {name}" for name, size in SHARED_BYTES.items())
        + "; a stack is a spill.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> int:
    """Compile, print; 1 if a kernel is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=sorted(TABLES), help="all")
    parser.add_argument("--head-size", type=int, choices=HEAD_SIZES, help="all")
    parser.add_argument("--dtype", choices=DTYPES, help="all")
    names = "forward, delta, score, side, table, row, sums, gradient"
    parser.add_argument("--kernel", help=f"{names}; all")
    options = parser.parse_args()
    asked = {options.architecture, options.head_size, options.dtype} - {None}
    rows = []
    for case in itertools.product(TABLES, HEAD_SIZES, DTYPES):
        if asked <= set(case):
            print(f"compiling {case[0]}, heads of {case[1]}, {case[2]} ...", flush=True)
            for variant in VARIANTS:
                rows += compile_all(*case, variant, options.kernel)
    for architecture, dtype, chunk in itertools.product(TABLES, DTYPES, CHUNKS):
        if asked <= {architecture, dtype}:
            rows += compile_head(architecture, dtype, chunk, options.kernel)
    show(rows)
    faults = [row for row in rows if row.fault]
    print(f"{len(rows)} kernels compiled, {len(faults)} at fault")
    if not asked and not options.kernel:
        print(f"written to {write(rows, len(faults))}")
    for kind in sorted(TABLES):
        print(f"tiles of {kind}: {TABLES[kind].measurement}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
