"""Collects the wheels that a GPU machine without a package index needs: `make gpu-wheels`.

    python tests/benchmarks/gpu_wheels.py [--output gpu-wheels]

Such a machine has torch with CUDA, Triton, transformers, NumPy and the usual packages (`EXPECTED`);
what training and the peers of the benchmarks need beside them is downloaded here, in the versions
of constraints.txt, for its Python and platform. DeepSpeed has no wheel: its own is built without
compiled operations, which are compiled where they are used. manifest.json names each file with its
version, size and sha256. Nothing is installed anywhere: `gpu.py --wheels FOLDER` unpacks the wheels
into a temporary folder and puts it on the path.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"
GLIBC_MINORS = (17, 24, 26, 27, 28, 31, 34)
MAX_BYTES = 64 * 2**20
MANIFEST = "manifest.json"
EXPECTED = (
    *("torch>=2.11", "triton>=3.6", "transformers>=5.17", "tokenizers", "numpy", "pyarrow"),
    *("einops", "msgpack", "psutil", "py-cpuinfo", "rich", "safetensors", "sentencepiece", "typer"),
    *("pytest>=8.3", "pytest-timeout", "tensorboard", "tqdm"),
)
"""What the machine must have itself; the first two are gigabytes with their CUDA libraries."""
BUILT = ("deepspeed",)
"""Published as source alone; pure Python where nothing is compiled beforehand."""
DOWNLOADED = (
    "annotated-types",
    "filelock",
    "hjson",
    "pydantic",
    "pydantic_core",
    "tenacity",
    "typing-inspection",
    "zstandard",
)
PEERS = ("disentangled-flash==1.1.1", "flashdeberta==0.0.8")
"""Not in constraints.txt: nothing but the benchmarks on a GPU uses them."""


def pinned(names: Sequence[str]) -> list[str]:
    """Requirements with the versions that the suite was run with.

    Args:
        names: Distributions.

    Returns:
        name==version of each.
    """
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    known = {line.split("==")[0].lower(): line for line in lines if "==" in line}
    missing = [name for name in names if name.lower() not in known]
    if missing:
        sys.exit(f"constraints.txt has no version of {', '.join(missing)}")
    return [known[name.lower()] for name in names]


def platforms() -> list[str]:
    """Platform tags of wheels that such a machine can load."""
    old = ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    return [f"manylinux_2_{minor}_x86_64" for minor in reversed(GLIBC_MINORS)] + old


def pip(*words: str) -> None:
    """Run pip of this interpreter; its own message is shown where it fails."""
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    done = subprocess.run([sys.executable, "-m", "pip", *words], env=environment)
    if done.returncode:
        sys.exit(f"pip {' '.join(words[:2])} failed: see above")


def collect(folder: Path) -> None:
    """Download or build every wheel.

    Args:
        folder: Where to; wheels that are there already stay if they are wanted.
    """
    target = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:"]
    for platform in platforms():
        target += ["--platform", platform]
    quiet = ["--quiet", "--no-deps"]
    pip("download", *quiet, *target, "--dest", str(folder), *pinned(DOWNLOADED), *PEERS)
    for requirement in pinned(BUILT):
        pip("wheel", *quiet, "--no-build-isolation", "--wheel-dir", str(folder), requirement)


def manifest(folder: Path) -> dict[str, Any]:
    """Describe the wheels of a folder.

    Args:
        folder: With the wheels.

    Returns:
        The document of manifest.json.
    """
    wheels = {}
    for path in sorted(folder.glob("*.whl")):
        content = path.read_bytes()
        name, version, *_, tag = path.stem.split("-")
        if tag != "any" and not tag.endswith("x86_64"):
            sys.exit(f"{path.name} is of another platform: remove it and run again")
        digest = hashlib.sha256(content).hexdigest()
        wheels[path.name] = {
            "distribution": name,
            "version": version,
            "bytes": len(content),
            "sha256": digest,
        }
    names = [entry["distribution"] for entry in wheels.values()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        sys.exit(f"{folder} has two versions of {', '.join(twice)}: remove one and run again")
    total = sum(entry["bytes"] for entry in wheels.values())
    if total > MAX_BYTES:
        sys.exit(f"{folder} has {total / 2**20:.1f} MiB of wheels, more than 64")
    return {"python": PYTHON, "expects": list(EXPECTED), "bytes": total, "wheels": wheels}


def main(argv: Sequence[str] | None = None) -> int:
    """Collect the wheels and write the manifest.

    Args:
        argv: Words after the program's name; the process's own where None.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-wheels")
    folder = parser.parse_args(argv).output
    folder.mkdir(parents=True, exist_ok=True)
    collect(folder)
    document = manifest(folder)
    text = json.dumps(document, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    count, mib = len(document["wheels"]), document["bytes"] / 2**20
    print(f"{folder}: {count} wheels, {mib:.1f} MiB; the machine itself must have")
    print(f"Python {PYTHON}, {', '.join(EXPECTED)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
