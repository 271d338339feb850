"""`deberta doctor`: whether a node can train, before a job begins on it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from data_prep.errors import UserError


def doctor_command(
    node: Annotated[
        bool, typer.Option("--node", help="Look at this node: GPUs, disks, clock, network.")
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Look for what would end a job: a line each, ok or what helps; exit code 1 if a look fails.

    Started by srun with several tasks, one on each node, it also measures the network between them
    and compares their clocks and versions; 1 is then the code of the nodes that fail.

    Example: srun --ntasks-per-node=1 deberta doctor --node --run runs/large
    """
    if not node:
        raise UserError("say what to look at: deberta doctor --node looks at this node")
    from pipeline.preflight.node import look_at_node
    from pipeline.runtime import node_name

    findings = look_at_node(run, scratch, gpus)
    for finding in findings:
        print(json.dumps(asdict(finding)) if as_json else finding.line, flush=True)
    # srun names the nodes of tasks that fail: rank 0 must not be one because another node is.
    mine = [finding for finding in findings if finding.node == node_name()]
    raise typer.Exit(0 if all(finding.ok for finding in mine) else 1)
