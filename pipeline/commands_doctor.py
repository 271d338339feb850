"""`deberta doctor`: whether an installation or a node can train, before a job begins on it."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.preflight.finding import Finding


def doctor_command(
    node: Annotated[
        bool, typer.Option("--node", help="This node alone: GPUs, disks, clock, network.")
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(envvar="RUN", help="Run folder, or where it will be; here without it."),
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(envvar="DEBERTA_SCRATCH", help="A fast disk to look at.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, envvar="SLURM_GPUS_ON_NODE", help="GPUs that must be visible."),
    ] = None,
    build: Annotated[
        bool, typer.Option("--build", help="Also compile DeepSpeed's operators: a minute or two.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Look for what would end a run: a line each, ok or what helps; exit code 1 if a look fails.

    Without --node it looks at the whole installation, too: packages, DeepSpeed's operators, CUDA
    and Triton, ranks over gloo and NCCL, launchers, MPI, SLURM, the run folder's file system, the
    limits of the system.
    A warning is what training can do without; only failures count for the exit code.

    With --node, started by srun with several tasks, one on each node, it measures the network
    between them and compares their clocks and versions; 1 is then the code of the nodes that fail.

    Example: deberta doctor --run runs/large
    """
    if node:
        if build:
            raise UserError("--build belongs to the installation: leave --node out")
        raise typer.Exit(_node(run, scratch, gpus, as_json))
    from pipeline.preflight.installation import Wishes, look_at_installation

    found = _tell(look_at_installation(Wishes(run, scratch, gpus, build)), as_json)
    wrong = [finding for finding in found if not finding.ok]
    if not as_json:
        warnings = sum(finding.is_warning for finding in found)
        print(f"{len(found)} looks: {len(wrong)} failed, {warnings} with a warning")
    raise typer.Exit(1 if wrong else 0)


def _node(run: Path | None, scratch: Path | None, gpus: int | None, as_json: bool) -> int:
    """Look at this node alone; returns the exit code."""
    from pipeline.preflight.node import look_at_node
    from pipeline.runtime import node_name

    found = _tell(look_at_node(run, scratch, gpus), as_json)
    # srun names the nodes of tasks that fail: rank 0 must not be one because another node is.
    return 0 if all(finding.ok for finding in found if finding.node == node_name()) else 1


def _tell(findings: Iterable["Finding"], as_json: bool) -> list["Finding"]:
    """Print findings as they come."""
    told = []
    for finding in findings:
        print(json.dumps(asdict(finding)) if as_json else finding.line, flush=True)
        told.append(finding)
    return told
