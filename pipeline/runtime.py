"""The process in its world: ranks, device, process group, threads, signals and logging.

    World.from_environment   ranks from torchrun, the deepspeed launcher, srun, MPI, or none of them
    start_world              the process group, a CPU group for control, pinned threads
    on_all_ranks             what fails on one rank fails on all, with the same message
    fault_text               the injuries that a test asks for (`pipeline.faults`)
    environment              versions and hardware, compared when a run resumes
    configure_logging        rank 0 to the terminal, every rank to logs/rank-NNNNN.log

`os.environ` is read here and nowhere else in the pipeline, but by `deberta doctor`
where torch cannot be imported.
"""

import importlib.metadata
import logging
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

import pipeline
from data_prep.errors import UserError
from pipeline.faults import VARIABLE
from pipeline.slurm_ranks import is_task_of_a_step, launcher_variables

_MPI_RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """Where this process stands among its peers."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> "World":
        """Read the launcher's variables, or SLURM's, or ask MPI where only MPI knows.

        Returns:
            The world; of one process where nothing launched us.

        Raises:
            UserError: The launcher's variables are incomplete, mpi4py is missing under mpirun, or
                there are more ranks on this host than GPUs.
        """
        # DeepSpeed asks MPI unless it finds all of them in the environment.
        os.environ.update(launcher_variables(os.environ))
        os.environ.update(_open_mpi_ranks(os.environ))
        is_by_mpi = any(name in os.environ for name in _MPI_RANK_VARIABLES)
        if "RANK" not in os.environ and is_by_mpi and not is_task_of_a_step(os.environ):
            _export_mpi_ranks()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if len(missing) == len(names) or "RANK" not in os.environ:
            rank, local_rank, world_size = 0, 0, 1
        elif missing:
            raise UserError(
                f"RANK is set but {', '.join(missing)} is not: start training with `srun`, "
                "`deepspeed`, `torchrun` or `mpirun`, or unset RANK to train in one process"
            )
        else:
            rank, local_rank, world_size = map(_number, ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
            if not 0 <= rank < world_size:
                raise UserError(
                    f"RANK={rank} is not one of WORLD_SIZE={world_size} ranks, counted from 0: "
                    "check the launcher, or unset RANK to train in one process"
                )
        return cls(rank, local_rank, world_size, _device(local_rank))


def _number(name: str) -> int:
    """Read a launcher's variable that must be a whole number."""
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(
            f"{name}={os.environ[name]} is not a number: launchers set it; unset it to train in "
            "one process"
        ) from None


def _device(local_rank: int) -> torch.device:
    """Choose the GPU of this rank, or the CPU where there is none or the user asks for it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:
        # With one visible GPU a task (srun --gpus-per-task=1) the only index is 0.
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(
            f"rank {local_rank} of this host has no GPU of its own: {count} are visible; start as "
            "many ranks on a host as it has GPUs (srun --ntasks-per-node, --nproc_per_node)"
        )
    return torch.device("cuda", local_rank)


def _open_mpi_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Take ranks from Open MPI's variables where it is known where rank 0 waits: without mpi4py."""
    names = {name: f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK")}
    sizes = {"WORLD_SIZE": "OMPI_COMM_WORLD_SIZE", "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE"}
    needed = {**names, **sizes}
    known = {*needed.values(), "MASTER_ADDR", "MASTER_PORT"} <= {*environment}
    if "RANK" in environment or not known:
        return {}
    return {name: environment[theirs] for name, theirs in needed.items()}


def _export_mpi_ranks() -> None:
    """Agree over MPI on ranks and on a rendezvous that rank 0 proposes."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            "started by mpirun, but mpi4py is not installed: pip install 'deberta-pretrain[mpi]'"
        ) from error
    comm = MPI.COMM_WORLD
    started = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or ""
    if started.isdigit() and int(started) != comm.Get_size():
        raise UserError(
            f"mpirun has started {started} ranks, and mpi4py sees {comm.Get_size()}: they belong "
            "to different MPIs; use the mpirun of mpi4py's MPI, or export MASTER_ADDR and "
            "MASTER_PORT (mpirun -x) with Open MPI's"
        )
    proposal = None
    if comm.Get_rank() == 0:
        host = socket.gethostname() if _spans_hosts(comm) else "127.0.0.1"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            proposal = (host, probe.getsockname()[1])
    else:
        _spans_hosts(comm)
    address, port = comm.bcast(proposal, root=0)
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    os.environ.update(
        RANK=str(comm.Get_rank()),
        WORLD_SIZE=str(comm.Get_size()),
        LOCAL_RANK=str(here.Get_rank()),
        LOCAL_WORLD_SIZE=str(here.Get_size()),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )


def _spans_hosts(comm: object) -> bool:
    """Ask all MPI ranks whether they run on several hosts; a collective."""
    return len(set(comm.allgather(socket.gethostname()))) > 1  # type: ignore[attr-defined]


def start_world(
    world: World, num_threads: int | None = None, *, collective_timeout_seconds: float = 1800.0
) -> dist.ProcessGroup:
    """Join the process group and pin what must not vary between restarts.

    Args:
        world: This process's place.
        num_threads: CPU threads of torch; as torch finds them where None.
        collective_timeout_seconds: For the others to come, and for one collective.

    Returns:
        The control group: gloo on every device, so that agreeing never waits for a GPU.

    Raises:
        RendezvousError: The address or the port of the launcher does not work.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    # Children of DeepSpeed (its C++ builds, its accelerator probe) must agree about the device.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    if world.device.type == "cpu":
        # ZeRO-3 asks for it in every bucket; without it DeepSpeed runs `numactl` each time.
        os.environ.setdefault("LOCAL_SIZE", str(ranks_on_this_host(world)))
    backend, timeout = "gloo", timedelta(seconds=collective_timeout_seconds)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        backend = "nccl"
    if world.world_size == 1 and "RANK" not in os.environ:
        # A store in memory needs no port; DeepSpeed still looks for the launcher's variables.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        if "lo" in (name for _, name in socket.if_nameindex()):
            # gloo would listen where the host's name resolves to, for nobody.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        _meet(backend, world, timeout)
    group = dist.group.WORLD
    if backend != "gloo":
        group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


class RendezvousError(UserError):
    """This rank cannot meet the others; each rank knows only its own reason."""


def _meet(backend: str, world: World, timeout: timedelta) -> None:
    """Join the process group at the address that the launcher gave."""
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistError as error:  # pyright: ignore[reportPrivateImportUsage]
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        reason = str(error).splitlines()[0]
        raise RendezvousError(
            f"rank {world.rank} of {world.world_size} cannot meet the others at MASTER_ADDR="
            f"{address}, MASTER_PORT={port}: {reason}; give an address of rank 0's host that all "
            "hosts reach, and a port that is free there"
        ) from error


def on_all_ranks(group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """Do what may fail on some ranks alone, such as opening a file; a collective.

    Args:
        group: Control group of all ranks; None for a single process.
        action: Called on every rank.

    Returns:
        What it returned on this rank.

    Raises:
        UserError: The error of the first rank that failed, of its type, on all ranks.
    """
    value, problem = None, None
    try:
        value = action()
    except UserError as error:
        problem = error
    problems = [problem]
    if group is not None:
        problems *= group.size()
        dist.all_gather_object(problems, problem, group=group)
    for rank, first in enumerate(problems):
        if first is not None:
            # Rank 0 speaks for all; what only another rank has seen needs its name.
            raise type(first)(f"rank {rank}: {first}" if rank else str(first))
    return cast(T, value)


def fault_text() -> str:
    """Read what a test wants to be hurt.

    Returns:
        Value of DEBERTA_FAULT for `pipeline.faults.configure`; empty for none.
    """
    return os.environ.get(VARIABLE, "")


def launcher_environment() -> dict[str, str]:
    """Copy the environment, for what looks at the settings of others.

    Returns:
        Name -> value.
    """
    return dict(os.environ)


def node_name() -> str:
    """Name this host as the batch system does.

    Returns:
        SLURM's name of the node; the host's own outside of a job.
    """
    return os.environ.get("SLURMD_NODENAME", "") or socket.gethostname()


def job_id() -> str:
    """Read which job of the cluster this is.

    Returns:
        SLURM's job id; empty outside of a job.
    """
    return os.environ.get("SLURM_JOB_ID", "")


def ranks_on_this_host(world: World) -> int:
    """Read how many ranks share this host.

    Args:
        world: This process's place.

    Returns:
        What torchrun, srun and MPI, or the deepspeed launcher, say; all ranks where nobody does.
    """
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    said = (os.environ.get(name, "") for name in names)
    return next((int(text) for text in said if text.isdigit()), world.world_size)


def use_deterministic_kernels() -> None:
    """Make torch refuse operations whose result depends on scheduling."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling every new buffer with NaN would write DeepSpeed's 2 GB buckets in every micro step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def _processor() -> str:
    """Name the kind of processor, on which the rounding of a CPU's kernels depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def environment() -> dict[str, str]:
    """Collect what a bit-exact resume depends on, and where this start runs.

    Returns:
        package -> version, then machine, threads and job.
    """
    packages = ("torch", "deepspeed", "numpy", "safetensors")
    return {
        "deberta-pretrain": pipeline.__version__,  # which need not be installed to be run
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "host": socket.gethostname(),
        "slurm_job_id": job_id(),
    }


class _RankFormatter(logging.Formatter):
    """Adds the rank to every line of a log file."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")


def configure_logging(rank: int, folder: Path | None) -> None:
    """Send messages to the terminal on rank 0 and to a file on every rank.

    Args:
        rank: This process's rank.
        folder: Run folder; None logs to the terminal alone.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    terminal.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    root.addHandler(terminal)
    if folder is not None:
        path = folder / "logs" / f"rank-{rank:05d}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path)
        file.setFormatter(_RankFormatter(rank))
        root.addHandler(file)
