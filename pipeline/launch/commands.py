"""What each launcher is started with. Names of options were read in DeepSpeed 0.19.8."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from pipeline.launch.forward import PLAIN
from pipeline.launch.hosts import Host

LAUNCHERS = ("pdsh", "openmpi", "torchrun", "mpirun")
PROGRAMS = {"pdsh": "pdsh", "openmpi": "ompi_info", "torchrun": "pdsh", "mpirun": "ompi_info"}
"""What must be installed; DeepSpeed asks for the same."""
SSH_OPTIONS = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o BatchMode=yes"
"""pdsh waits for ever for an ssh whose host is gone, unless ssh asks now and then."""
_MODULE = "pipeline.train"


@dataclass(frozen=True)
class Launch:
    """A training on several hosts."""

    hosts: list[Host]
    port: int
    words: list[str]
    """Of `deberta train`."""
    hostfile: Path
    deepspeed_env: Path
    variables: Mapping[str, str]
    """For all ranks."""

    @property
    def ranks(self) -> int:
        """Of all hosts."""
        return sum(host.slots for host in self.hosts)

    def rendezvous(self) -> dict[str, str]:
        """Where rank 0 waits; Open MPI's ranks learn it in no other way."""
        return {"MASTER_ADDR": self.hosts[0].name, "MASTER_PORT": str(self.port)}


def check_words(launch: Launch, launcher: str) -> None:
    """Refuse what would not arrive as it is.

    Args:
        launch: The training.
        launcher: One of LAUNCHERS.

    Raises:
        UserError: A word has characters of a shell, or torchrun gets unequal hosts.
    """
    for word in launch.words:
        if not PLAIN.fullmatch(word):
            raise UserError(
                f"{word!r} would not reach the other hosts as it is: launchers write it into their "
                "shells' command lines; put the key into the TOML of --config"
            )
    if launcher == "torchrun" and len({host.slots for host in launch.hosts}) > 1:
        raise UserError("--launcher torchrun starts as many ranks on every host; use pdsh for this")


def check_mpi(launcher: str) -> None:
    """Refuse an mpirun that takes other options: mpi4py brings MPICH's into a virtual environment.

    Args:
        launcher: One of LAUNCHERS.

    Raises:
        UserError: The first mpirun of PATH is not Open MPI's.
    """
    if launcher not in ("openmpi", "mpirun"):
        return
    try:
        words = ["mpirun", "--version"]
        said = subprocess.run(words, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = str(error)
    if "Open MPI" not in said:
        first = said.strip().partition("\n")[0] or "nothing"
        raise UserError(
            f"--launcher {launcher} needs Open MPI's mpirun, and the first one in PATH says "
            f"{first!r}: put the folder of Open MPI's first"
        )


def command_line(launch: Launch, launcher: str) -> list[str]:
    """Say what to start.

    Args:
        launch: The training.
        launcher: One of LAUNCHERS.

    Returns:
        Words.
    """
    if launcher == "torchrun":
        return _torchrun(launch)
    if launcher == "mpirun":
        variables = {**launch.variables, **launch.rendezvous()}
        exports = [word for item in variables.items() for word in ("-x", "=".join(item))]
        start = ["mpirun", "-n", str(launch.ranks), "--hostfile", str(launch.hostfile)]
        return [*start, "--bind-to", "none", *exports, sys.executable, "-m", _MODULE, *launch.words]
    start = [sys.executable, "-m", "deepspeed.launcher.runner"]
    options = ["--hostfile", str(launch.hostfile), "--launcher", launcher, "--force_multi"]
    where = ["--master_addr", launch.hosts[0].name, "--master_port", str(launch.port)]
    if launcher == "openmpi":
        where.append("--launcher_args=--bind-to none")
    return [*start, *options, *where, "--module", _MODULE, *launch.words]


def _torchrun(launch: Launch) -> list[str]:
    """torchrun on every host, by pdsh, which puts the host's number in the place of %n."""
    exports = "".join(f"export {n}={shlex.quote(v)}; " for n, v in launch.variables.items())
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(launch.hosts))]
    words += ["--nproc_per_node", str(launch.hosts[0].slots), "--node_rank", "%n"]
    words += ["--master_addr", launch.hosts[0].name, "--master_port", str(launch.port)]
    remote = shlex.join([*words, "-m", _MODULE, *launch.words])
    names = ",".join(host.name for host in launch.hosts)
    return [
        "pdsh",
        "-S",
        "-f",
        "1024",
        "-w",
        names,
        f"{exports}cd {shlex.quote(str(Path.cwd()))}; {remote}",
    ]


def launcher_variables(launch: Launch, inherited: Mapping[str, str]) -> dict[str, str]:
    """Say what the launcher itself needs.

    Args:
        launch: The training.
        inherited: Variables of this process.

    Returns:
        The launcher's whole environment.
    """
    ssh = f"{inherited.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    return {
        **inherited,
        "PDSH_RCMD_TYPE": "ssh",
        "PDSH_SSH_ARGS_APPEND": ssh,  # ssh takes the first of two: what the user says counts
        "DS_ENV_FILE": str(launch.deepspeed_env.absolute()),
    }
