"""GPU tests and benchmarks within a budget of time; installs nothing.

    python tests/benchmarks/gpu.py --part step --size large --budget-seconds 480
    make gpu PART=tests|attention|layer|step SIZE=large|base|xsmall BUDGET_SECONDS=480

    tests      the GPU tests, a file each
    attention  the attention alone, forward and backward, at four lengths
    layer      an encoder layer
    step       the training step of both networks, without and with the optimizer

Without a part, all follow one another. Cells run in the order of their value in a process of their
own (`gpu_cells`), which writes results/gpu-PART-SIZE-DEVICE.json after each of them; the process is
killed at the end of the budget and started again behind a cell that crashed. With --wheels FOLDER,
packages that the machine lacks come from the wheels that `make gpu-wheels` collected: they are
checked and unpacked into a temporary folder, which is put on the path.

    python tests/benchmarks/gpu.py --device cpu --size tiny --results FOLDER

tries all of it in some minutes where there is no GPU; its files begin with smoke-, not gpu-.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = ("tests", "attention", "layer", "step")
SIZES = ("large", "base", "xsmall", "tiny")
PART_BUDGET_SECONDS = 480.0
RESERVED_SECONDS = 5.0
"""Kept for the last write and for leaving."""
MAX_STARTS = 5
MANIFEST = "manifest.json"


def unpack(wheels: Path, folder: Path) -> None:
    """Check the hashes of a folder of wheels and unpack them.

    Args:
        wheels: Folder of `make gpu-wheels`.
        folder: Where to; it goes on the path.
    """
    document = json.loads((wheels / MANIFEST).read_text(encoding="utf-8"))
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if document["python"] != here:
        sys.exit(f"{wheels} is for Python {document['python']}, and this is {here}: no --wheels")
    for name, entry in document["wheels"].items():
        content = (wheels / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            sys.exit(f"{wheels / name} is not the file of {MANIFEST}: run `make gpu-wheels` again")
        with zipfile.ZipFile(wheels / name) as wheel:
            wheel.extractall(folder)


def environment(device: str, packages: Path | None) -> dict[str, str]:
    """The environment of the children: ours and the unpacked packages importable, no network."""
    added = {
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": device,
        "DS_BUILD_OPS": "0",
        "PYTHONUNBUFFERED": "1",
        # cuBLAS reads it once; training sets the same.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if device == "cpu":
        # Kernels in C++ would take longer to compile than all else, and are not those of a GPU.
        added |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    places = [str(ROOT), str(packages or ""), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **added, "PYTHONPATH": os.pathsep.join(filter(None, places))}


def supervise(command: Sequence[str], deadline_seconds: float, env: dict[str, str]) -> int | None:
    """Run a process and all that it starts, not beyond a time.

    Args:
        command: The process.
        deadline_seconds: On the monotonic clock.
        env: Its environment.

    Returns:
        Its exit code; None where it was killed.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        return process.wait(max(0.1, deadline_seconds - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_part(part: str, options: argparse.Namespace, deadline: float, env: dict[str, str]) -> int:
    """Run one part; starts again behind what crashed. 0 if the process ended by itself."""
    run_id = uuid.uuid4().hex[:8]
    for _ in range(MAX_STARTS):
        command = [sys.executable, "-m", "tests.benchmarks.gpu_cells"]
        command += ["--part", part, "--size", options.size, "--device", options.device]
        command += ["--run-id", run_id, "--results", str(options.results)]
        left_seconds = deadline - RESERVED_SECONDS - time.monotonic()
        if left_seconds <= 0:
            print(f"{part}: no time is left", flush=True)
            return 1
        command += ["--seconds", f"{left_seconds:.1f}"]
        code = supervise(command, deadline - RESERVED_SECONDS / 2, env)
        if code == 0:
            return 0
        if code is None:
            print(f"{part}: stopped at the end of its budget; what was done is kept", flush=True)
            return 0
        print(f"{part}: ended with {code}; goes on behind the cell", flush=True)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for.

    Args:
        argv: Words after the program's name; the process's own where None.

    Returns:
        Exit code: 1 if a part kept crashing.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="all, one after another")
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--budget-seconds", type=float, help="for all parts together; 480 each")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheels", type=Path, help="folder of `make gpu-wheels`")
    parser.add_argument("--results", type=Path, help="folder; tests/benchmarks/results for a GPU")
    options = parser.parse_args(argv)
    if options.results is None and options.device == "cpu":
        parser.error("--device cpu tries the programs and measures no GPU: give it its --results")
    options.results = options.results or HERE / "results"
    parts = [options.part] if options.part else list(PARTS)
    budget_seconds = options.budget_seconds or PART_BUDGET_SECONDS * len(parts)
    begun_seconds = time.monotonic()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        packages = None
        if options.wheels:
            packages = Path(folder)
            unpack(options.wheels, packages)
        env = environment(options.device, packages)
        for number, part in enumerate(parts):
            left_seconds = begun_seconds + budget_seconds - time.monotonic()
            # A part that ends early leaves its time to those behind it.
            share_seconds = left_seconds / (len(parts) - number)
            failed |= run_part(part, options, time.monotonic() + share_seconds, env)
    return failed


if __name__ == "__main__":
    sys.exit(main())
