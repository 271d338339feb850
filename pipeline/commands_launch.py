"""`deberta launch`: training on several hosts without a batch system."""

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.launch.commands import Launch

_LAUNCHERS = "pdsh, openmpi, torchrun or mpirun"


def launch_command(
    hosts: Annotated[str, typer.Option(help="Hosts and their ranks: n1:8,n2:8; rank 0's first.")],
    words: Annotated[
        list[str], typer.Argument(metavar="-- WORDS...", help="What `deberta train` gets.")
    ],
    launcher: Annotated[
        str, typer.Option(help=f"{_LAUNCHERS}; the first two by the deepspeed launcher.")
    ] = "pdsh",
    port: Annotated[int, typer.Option(min=1024, max=65535, help="Free on the first host.")] = 29500,
    export: Annotated[
        list[str] | None, typer.Option(help="One more variable for all hosts, by name.")
    ] = None,
    patience_seconds: Annotated[
        float, typer.Option(min=1, help="For a launcher to end behind its run.")
    ] = 90.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the files, start nothing.")] = (
        False
    ),
) -> None:
    """Train on several hosts that ssh reaches, and say by state.json how it ended.

    Writes RUN/launch/hostfile and RUN/launch/deepspeed_env, starts the launcher with the options
    that it needs, turns signals into requests that all ranks hear, and ends with the run's code.

    Example: deberta launch --hosts n1:8,n2:8 -- --config deberta_v3_large
    --deepspeed_config ds_configs/zero1_bf16.json data.path=DATASET run.folder=/shared/runs/large
    """
    # Imported here: other commands need none of it.
    from pipeline.launch.commands import PROGRAMS, check_mpi, command_line, launcher_variables
    from pipeline.launch.supervise import Supervisor
    from pipeline.runtime import launcher_environment

    variables = launcher_environment()
    launch, run = _prepare(hosts, launcher, port, words, export or [], variables)
    if not dry_run and shutil.which(PROGRAMS[launcher]) is None:
        raise UserError(
            f"--launcher {launcher} needs {PROGRAMS[launcher]}, which is not installed here: "
            "install it, or choose another launcher"
        )
    if not dry_run:
        check_mpi(launcher)
    _write_files(launch, run)
    line = command_line(launch, launcher)
    if dry_run:
        print(shlex.join(line))
        return
    supervisor = Supervisor(run, launch.ranks, patience_seconds)
    raise typer.Exit(supervisor.run(line, launcher_variables(launch, variables)))


def _prepare(
    hosts: str,
    launcher: str,
    port: int,
    words: list[str],
    export: list[str],
    variables: dict[str, str],
) -> tuple["Launch", Path]:
    """Check all that can be checked before a launcher starts; returns the run folder, too."""
    from pipeline.config_loading import load_run_config, require_data_path
    from pipeline.ds_config import load_deepspeed_config
    from pipeline.launch.commands import LAUNCHERS, Launch, check_words
    from pipeline.launch.forward import forwarded
    from pipeline.launch.hosts import parse_hosts
    from pipeline.train import parse

    if launcher not in LAUNCHERS:
        raise UserError(f"--launcher {launcher}: write {_LAUNCHERS}")
    parsed = parse_hosts(hosts)
    options = parse(words)
    config = load_run_config(options.config, options.overrides)
    require_data_path(config)
    load_deepspeed_config(options.deepspeed_config).batch_plan(sum(each.slots for each in parsed))
    run = Path(config.run.folder)
    files = (run / "launch" / "hostfile", run / "launch" / "deepspeed_env")
    launch = Launch(parsed, port, words, *files, forwarded(variables, export))
    check_words(launch, launcher)
    return launch, run


def _write_files(launch: "Launch", run: Path) -> None:
    """Write what launchers read."""
    from pipeline.launch.forward import deepspeed_env
    from pipeline.launch.hosts import hostfile

    try:
        launch.hostfile.parent.mkdir(parents=True, exist_ok=True)
        launch.hostfile.write_text(hostfile(launch.hosts), encoding="utf-8")
        forward = {**launch.variables, **launch.rendezvous()}
        launch.deepspeed_env.write_text(deepspeed_env(forward), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.folder {run}: cannot be written ({error.strerror})") from error
