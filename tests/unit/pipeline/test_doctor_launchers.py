"""What `deberta doctor` says of launchers, MPI and SLURM: real ones, and scripts in their place."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.preflight.launchers import look_at_launchers, look_at_mpi, look_at_slurm
from tests.worlds import environment

SLURM = ("sinfo", "sbatch", "srun", "scontrol", "squeue", "scancel")


@pytest.fixture
def programs(tmp_path):
    """Writes scripts; returns the variables of a process whose PATH has them, and little else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "env", "cat", "sleep", "echo"):
        (folder / name).symlink_to(shutil.which(name))

    def write(**scripts):
        for name, script in scripts.items():
            program = folder / name
            program.unlink(missing_ok=True)
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        return {"PATH": str(folder)}

    return write


def test_launchers(programs):
    variables = {"PATH": f"{Path(sys.executable).parent}:{programs(pdsh='', ssh='')['PATH']}"}
    finding = look_at_launchers("n", variables)
    assert finding.line == "n launchers: ok, torchrun, deepspeed, pdsh, ssh found"
    finding = look_at_launchers("n", {"PATH": str(Path(sys.executable).parent)})
    assert finding.line == (
        "n launchers: ok, torchrun, deepspeed found; not pdsh, ssh (deberta launch needs ssh for "
        "several hosts, and pdsh with --launcher pdsh)"
    )


def test_an_environment_that_is_not_active(programs):
    finding = look_at_launchers("n", programs(ssh=""))
    assert finding.line.startswith(
        "n launchers: warning, ssh found; not torchrun, deepspeed, pdsh; activate the virtual "
    )
    assert finding.cure.endswith("/activate): torchrun, deepspeed is there")


def test_two_ranks_by_mpi():
    finding = look_at_mpi("n", environment())
    assert finding.line.startswith(
        f"n mpi: ok, two ranks by {Path(sys.executable).parent}/mpirun, "
    )
    assert "MPICH" in finding.text


def test_no_mpi(programs, monkeypatch):
    finding = look_at_mpi("n", programs())
    assert finding.line == (
        "n mpi: warning, mpi4py is there, and no mpirun in PATH; put "
        f"{Path(sys.executable).parent} into PATH"
    )
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mpi4py" else honest(name)
    )
    assert (
        look_at_mpi("n", programs()).line == "n mpi: ok, not here (deberta-pretrain[mpi] brings it)"
    )
    line = look_at_mpi("n", variables := programs(mpirun="")).line
    assert line.startswith(
        f"n mpi: warning, {variables['PATH']}/mpirun is there, and mpi4py is not; "
    )
    assert "pip install 'deberta-pretrain[mpi]'" in line


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('[ "$1" = --version ] && echo "Broken MPI 7" && exit; echo "error: no slots" >&2; exit 3',
         "(Broken MPI 7): error: no slots; mpi4py has MPICH"),
        ("exit 9", "(of no version): exit code 9; mpi4py has MPICH"),
        # An mpirun of another MPI starts the ranks, and none of them knows.
        ('[ "$1" = --version ] && echo Other && exit; shift 2; "$@"; "$@"',
         "(Other): each sees itself alone; mpi4py has MPICH"),
    ],
)  # fmt: skip
def test_a_broken_mpirun(script, words, programs):
    finding = look_at_mpi("n", variables := programs(mpirun=script))
    assert not finding.ok
    assert finding.text.startswith(f"two ranks by {variables['PATH']}/mpirun {words}")
    assert finding.cure.startswith("have both of one MPI: the folder of its mpirun first in PATH")


def test_an_mpirun_that_hangs(programs, monkeypatch):
    monkeypatch.setattr("pipeline.preflight.launchers._MPI_SECONDS", 1.0)
    script = '[ "$1" = --version ] && echo Slow && exit; sleep 60 & wait'
    finding = look_at_mpi("n", programs(mpirun=script))
    assert "(Slow): no end within 1 s; mpi4py has" in finding.text


def slurm(programs, sinfo):
    version = '[ "$1" = --version ] && echo "slurm 24.05.1" && exit'
    scripts = {**dict.fromkeys(SLURM, ""), "sinfo": f"{version}\n{sinfo}"}
    return look_at_slurm("n", programs(**scripts)).line


def test_no_slurm(programs):
    line = look_at_slurm("n", programs()).line
    assert line == "n slurm: ok, not here: no sinfo, sbatch or srun in PATH"
    said = "echo 'sinfo: fatal: Could not establish a configuration source' >&2; exit 1"
    line = slurm(programs, said)
    assert line == "n slurm: ok, not here: its programs know no cluster (slurm.conf)"


def test_half_a_slurm(programs):
    line = look_at_slurm("n", programs(sbatch="", srun="", scontrol="")).line
    assert line == (
        "n slurm: FAIL, sinfo, squeue, scancel is missing in PATH, and its other programs are "
        "there; install the client's package of your SLURM, or load its module"
    )


def test_a_slurm_that_answers(programs):
    rows = "printf 'gpu up 2-00:00:00 8\\ncpu up infinite 30\\nold down 1:00 2\\n'"
    line = slurm(programs, rows)
    assert line == "n slurm: ok, slurm 24.05.1: gpu (8 nodes, 2-00:00:00), cpu (30 nodes, infinite)"
    variables = {**programs(), "SBATCH_PARTITION": "gpu,cpu"}
    assert look_at_slurm("n", variables).ok
    finding = look_at_slurm("n", {**variables, "SBATCH_PARTITION": "gpu,gpus"})
    assert finding.line.startswith(
        "n slurm: FAIL, slurm 24.05.1 has no partition gpus: gpu (8 nodes"
    )
    assert finding.cure == "correct SBATCH_PARTITION in slurm/site.env"


def test_a_slurm_that_does_not(programs, monkeypatch):
    said = "echo 'slurm_load_partitions: Unable to contact slurm controller (connect failure)' >&2"
    line = slurm(programs, f"{said}; exit 1")
    assert line.startswith("n slurm: FAIL, sinfo does not answer: slurm_load_partitions: Unable to")
    assert line.endswith("; ask whether slurmctld runs (scontrol ping)")
    monkeypatch.setattr("pipeline.preflight.launchers._SLURM_SECONDS", 1.0)
    assert "sinfo does not answer: no end within 1 s" in slurm(programs, "exec sleep 60")
    line = slurm(programs, "echo 'gpu down 1:00 2'")
    assert line.startswith("n slurm: warning, slurm 24.05.1, and no partition is up; ask your")
