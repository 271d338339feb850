"""Looks at what starts ranks: launchers, MPI, SLURM; what is not here is told, and no failure."""

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.preflight.children import ask, child_environment
from pipeline.preflight.finding import Finding

_MPI_SECONDS, _SLURM_SECONDS, _VERSION_SECONDS = 40.0, 15.0, 15.0
_HELLO = """\
from mpi4py import MPI
world = MPI.COMM_WORLD
ranks = world.allgather(world.Get_rank())
if world.Get_rank() == 0:
    library = MPI.Get_library_version().splitlines()[0].strip("\\0 ")
    print("ranks", *ranks, "by", " ".join(library.split()), flush=True)
"""
_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
_NEWLINE = "\n"
# Two ranks on a machine of one core, by the names of Open MPI 4 and 5.
_CROWDED = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def look_at_launchers(node: str, variables: Mapping[str, str]) -> Finding:
    """See which launchers PATH has.

    Args:
        node: This node's name.
        variables: Of the process.

    Returns:
        The finding.
    """
    path = variables.get("PATH", "")
    names = ("torchrun", "deepspeed", "pdsh", "ssh")
    there = [name for name in names if shutil.which(name, path=path)]
    absent = [name for name in names if name not in there]
    text = f"{', '.join(there) or 'none'} found" + (f"; not {', '.join(absent)}" if absent else "")
    own = Path(sys.executable).parent
    if hidden := [name for name in absent if (own / name).exists()]:
        cure = f"activate the virtual environment (. {own}/activate): {', '.join(hidden)} is there"
        return Finding(node, "launchers", True, text, cure)
    if absent:
        text += " (deberta launch needs ssh for several hosts, and pdsh with --launcher pdsh)"
    return Finding(node, "launchers", True, text)


def look_at_mpi(node: str, variables: Mapping[str, str]) -> Finding:
    """Let two ranks say hello by the first mpirun in PATH.

    Args:
        node: This node's name.
        variables: Of the process.

    Returns:
        The finding.
    """
    program = shutil.which("mpirun", path=variables.get("PATH", ""))
    has_mpi4py = importlib.util.find_spec("mpi4py") is not None
    install = "pip install 'deberta-pretrain[mpi]', which brings mpi4py and an mpirun"
    if program is None and not has_mpi4py:
        return Finding(node, "mpi", True, "not here (deberta-pretrain[mpi] brings it)")
    if program is None:
        own = Path(sys.executable).parent / "mpirun"
        cure = f"put {own.parent} into PATH" if own.exists() else install
        return Finding(node, "mpi", True, "mpi4py is there, and no mpirun in PATH", cure)
    if not has_mpi4py:
        return Finding(node, "mpi", True, f"{program} is there, and mpi4py is not", install)
    environment = child_environment(variables, **_ROOT, **_CROWDED)
    words = [program, "-n", "2", sys.executable, "-c", _HELLO]
    answer = ask(words, environment, _MPI_SECONDS)
    said = [line for line in answer.output.splitlines() if line.startswith("ranks ")]
    if answer.code == 0 and len(said) == 1 and said[0].startswith("ranks 0 1 by "):
        library = said[0].removeprefix("ranks 0 1 by ")
        return Finding(node, "mpi", True, f"two ranks by {program}, {library}")
    started = ask([program, "--version"], environment, _VERSION_SECONDS).output
    alone = ask([sys.executable, "-c", _HELLO], environment, _MPI_SECONDS)
    what = "each sees itself alone" if len(said) == 2 else answer.reason
    text = (
        f"two ranks by {program} ({started.strip().partition(_NEWLINE)[0] or 'of no version'}): "
        f"{what}; mpi4py has {alone.output.strip().rpartition(' by ')[2] or alone.reason}"
    )
    cure = f"have both of one MPI: the folder of its mpirun first in PATH, or {install}"
    return Finding(node, "mpi", False, text, cure)


def look_at_slurm(node: str, variables: Mapping[str, str]) -> Finding:
    """Ask SLURM for its version and its partitions.

    Args:
        node: This node's name.
        variables: Of the process.

    Returns:
        The finding; ok where there is none.
    """
    path = variables.get("PATH", "")
    programs = ("sinfo", "sbatch", "srun", "scontrol", "squeue", "scancel")
    found = {name: shutil.which(name, path=path) for name in programs}
    if not any(found.values()):
        return Finding(node, "slurm", True, "not here: no sinfo, sbatch or srun in PATH")
    if absent := [name for name, place in found.items() if place is None]:
        cure = "install the client's package of your SLURM, or load its module"
        text = f"{', '.join(absent)} is missing in PATH, and its other programs are there"
        return Finding(node, "slurm", False, text, cure)
    sinfo = str(found["sinfo"])
    answer = ask([sinfo, "--noheader", "--format=%R %a %l %D"], variables, _SLURM_SECONDS)
    if answer.code != 0 and "configuration source" in answer.errors:
        return Finding(node, "slurm", True, "not here: its programs know no cluster (slurm.conf)")
    if answer.code != 0:
        text = f"sinfo does not answer: {answer.reason}"
        cure = "ask whether slurmctld runs (scontrol ping)"
        return Finding(node, "slurm", False, text, cure)
    version = ask([sinfo, "--version"], variables, _VERSION_SECONDS).output.strip()
    rows = [line.split() for line in answer.output.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    listed = ", ".join(
        f"{name} ({num} nodes, {limit})" for name, up, limit, num in rows if up == "up"
    )
    wanted = variables.get("SBATCH_PARTITION", "")
    names = [row[0] for row in rows]
    missing = [each for each in wanted.split(",") if each and each not in names]
    if missing:
        cure = "correct SBATCH_PARTITION in slurm/site.env"
        text = f"{version} has no partition {', '.join(missing)}: {listed}"
        return Finding(node, "slurm", False, text, cure)
    if not listed:
        cure = "ask your administrators, or scontrol show partition"
        return Finding(node, "slurm", True, f"{version}, and no partition is up", cure)
    return Finding(node, "slurm", True, f"{version}: {listed}")
