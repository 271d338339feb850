"""How the tests of preparation start builds: by the commands that users type, in real processes."""

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
MPIRUN = Path(sys.executable).with_name("mpirun")
RANKS = 4
UNIT_BYTES = 30_000


def environment():
    """Of a process that no launcher has started."""
    launchers = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "HYDI_", "MPI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def array_environments(count):
    """What SLURM tells each task of an array."""
    return [
        {
            "SLURM_ARRAY_JOB_ID": "17",
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": str(count - 1),
            "SLURM_ARRAY_TASK_STEP": "1",
            "SLURM_ARRAY_TASK_COUNT": str(count),
        }
        for number in range(count)
    ]


def build_command(executor, output, *words):
    """Build `corpus` with `tokenizer`, which lie where it is started."""
    launcher = [str(MPIRUN), "-n", str(RANKS)] if executor == "mpi" else []
    command = [sys.executable, "-m", "data_prep", "build", "corpus", "--tokenizer", "tokenizer"]
    options = ["--executor", executor, "--output", str(output), "--unit-bytes", str(UNIT_BYTES)]
    return [*launcher, *command, *options, *words]


def write_lines(speeches, folder, copies):
    """Make a corpus of .jsonl files, a paragraph a document, all copies different."""
    folder.mkdir()
    texts = [
        text
        for path in sorted(speeches.glob("*.txt"))
        for text in path.read_text().split("\n")
        if text
    ]
    for copy in range(copies):
        lines = [json.dumps({"text": f"{copy}: {text}"}) + "\n" for text in texts]
        (folder / f"{copy}.jsonl").write_text("".join(lines))


def contents(folder):
    """Name -> sha256 of every file in a folder; a dataset that is finished has nothing else."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }
