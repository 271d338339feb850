"""Ranks from SLURM: what a task that `srun` has started says about itself, as launchers say it.

    launcher_variables   RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_WORLD_SIZE
    expand_node_list     `gpu[01-03],big7` -> gpu01 gpu02 gpu03 big7
    rank_in_step         which rank this process will be, before anything else is known
    speaks_for_its_host  whether it says what rank 0 may not live to say

Only tasks of a step count. The shell of a batch script has SLURM_PROCID=0 too, and so has what it
starts without srun. Nothing here calls scontrol, which containers and images do not have.
"""

import itertools
import re
from collections.abc import Iterator, Mapping

from data_prep.errors import UserError

FIRST_PORT, NUM_PORTS = 15_000, 17_000
"""Below 32768, where Linux begins to hand out ports of its own accord."""
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""SLURM's ids of the batch shell, of `salloc`'s interactive shell and of others that are no steps
(slurm.h: SLURM_BATCH_SCRIPT, SLURM_INTERACTIVE_STEP, SLURM_EXTERN_CONT, SLURM_PENDING_STEP)."""
_LOOPBACK = ("localhost", "127.")


def is_task_of_a_step(environment: Mapping[str, str]) -> bool:
    """Tell tasks that srun has started from everything else inside and outside of jobs.

    Args:
        environment: Variables of the process.

    Returns:
        Whether SLURM's variables of the step describe this process and its peers.
    """
    step, tasks = environment.get("SLURM_STEP_ID", ""), environment.get("SLURM_STEP_NUM_TASKS", "")
    if not (step.isdigit() and tasks.isdigit() and environment.get("SLURM_PROCID", "").isdigit()):
        return False
    # mpirun uses srun to start one helper a node; only its own variables describe its ranks.
    if int(step) >= _FIRST_SPECIAL_STEP or "OMPI_COMM_WORLD_RANK" in environment:
        return False
    return environment.get("PMI_SIZE", tasks) == tasks


def rank_in_step(environment: Mapping[str, str]) -> int:
    """Find out early which rank this is, for what only one rank should say.

    Args:
        environment: Variables of the process.

    Returns:
        The launcher's rank, or SLURM's; 0 where neither says one.
    """
    rank = environment.get("RANK", "")
    if not rank and is_task_of_a_step(environment):
        rank = environment["SLURM_PROCID"]
    return int(rank) if rank.isdigit() else 0


def speaks_for_its_host(environment: Mapping[str, str]) -> bool:
    """Choose the few ranks that say what all of them may know, should rank 0 not do so.

    Args:
        environment: Variables of the process.

    Returns:
        True for the first rank of each host, whose files and devices may differ, and for rank 1,
        which may be the only one beside rank 0.
    """
    local_rank = environment.get("LOCAL_RANK", "")
    if not local_rank and is_task_of_a_step(environment):
        local_rank = environment.get("SLURM_LOCALID", "")
    return local_rank == "0" or rank_in_step(environment) == 1


def launcher_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Say in a launcher's words what SLURM says about a task.

    Args:
        environment: Variables of the process.

    Returns:
        All that must be set, none missing; empty where another launcher speaks or the process is
        alone. MASTER_ADDR and MASTER_PORT that are set already are kept.

    Raises:
        UserError: Rank 0's node cannot be known, or the address given for it is each node's own.
    """
    if "RANK" in environment or not is_task_of_a_step(environment):
        return {}
    if int(environment["SLURM_STEP_NUM_TASKS"]) == 1:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(_tasks_on_this_node(environment)),
        "MASTER_ADDR": _master_address(environment),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_master_port(environment)),
    }


def _master_address(environment: Mapping[str, str]) -> str:
    """Name the node of rank 0: the first of the step, unless tasks were placed by hand."""
    nodes = expand_node_list(environment["SLURM_STEP_NODELIST"])
    given = environment.get("MASTER_ADDR", "")
    if given and len(nodes) > 1 and given.startswith(_LOOPBACK):
        raise UserError(
            f"MASTER_ADDR={given} is another machine on each of this step's {len(nodes)} nodes "
            f"({environment['SLURM_STEP_NODELIST']}): unset it, or give an address of rank 0's node"
        )
    if given:
        return given
    if len(nodes) == 1:
        return "127.0.0.1"
    if environment.get("SLURM_DISTRIBUTION", "").startswith("arbitrary"):
        raise UserError(
            "srun --distribution=arbitrary places tasks by hand, so that the node of rank 0 is not "
            "known: export MASTER_ADDR with its name before srun"
        )
    return nodes[0]


def _master_port(environment: Mapping[str, str]) -> int:
    """Choose a port that two jobs on a node, or two steps of a job, do not share."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return FIRST_PORT + (job + 101 * step) % NUM_PORTS


def _tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """Read this node's share of `2(x3),1`: tasks of each node, in the order of the node list."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(
                f"SLURM_STEP_TASKS_PER_NODE={environment['SLURM_STEP_TASKS_PER_NODE']} is not what "
                "srun sets; start training with srun, and do not set it yourself"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    node = int(environment["SLURM_NODEID"])
    if node >= len(counts):
        raise UserError(
            f"SLURM_NODEID={node} is not one of the {len(counts)} nodes of "
            f"SLURM_STEP_TASKS_PER_NODE={environment['SLURM_STEP_TASKS_PER_NODE']}; start training "
            "with srun, and do not set these variables yourself"
        )
    return counts[node]


def expand_node_list(text: str) -> list[str]:
    """Write out SLURM's short form of node names.

    Args:
        text: Such as `n[1-3,7],gpu-[001-004]-x`.

    Returns:
        The names, in SLURM's order.

    Raises:
        UserError: The text is no node list.
    """
    names = [name for part in _split_outside_brackets(text) for name in _expand(part, text)]
    if not names:
        raise UserError(f"SLURM names no nodes ({text!r}); start training with srun")
    return names


def _split_outside_brackets(text: str) -> list[str]:
    """`n[1-3,7],m` -> `n[1-3,7]`, `m`."""
    return re.findall(r"(?:[^,\[]|\[[^\]]*\]?)+", text)


def _expand(part: str, text: str) -> Iterator[str]:
    """Write out one name, which may have several brackets: `rack[1-2]n[01-16]`."""
    pieces: list[list[str]] = []
    for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
        choices = [literal] if literal else _numbers(ranges, text)
        pieces.append(choices)
    if "".join(re.findall(r"[^\[\]]+|\[[^\]]*\]", part)) != part:
        raise _not_a_list(text)
    for names in itertools.product(*pieces):
        yield "".join(names)


def _numbers(ranges: str, text: str) -> list[str]:
    """`001-003,7` -> 001 002 003 7."""
    numbers = []
    for each in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", each)
        if match is None:
            raise _not_a_list(text)
        first, last = match[1], match[2] or match[1]
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return numbers


def _not_a_list(text: str) -> UserError:
    return UserError(
        f"{text!r} is no list of nodes as SLURM writes it; start training with srun, or export "
        "MASTER_ADDR, MASTER_PORT, RANK, LOCAL_RANK and WORLD_SIZE for every task"
    )
