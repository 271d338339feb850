"""Training as launchers start it: a flat command, one process a rank.

    deberta train --config PRESET --deepspeed_config JSON [section.key=value ...]
    deepspeed --module pipeline.train --config PRESET --deepspeed_config JSON [...]
    torchrun --nproc_per_node 8 -m pipeline.train --config PRESET --deepspeed_config JSON [...]
    mpirun -n 8 python -m pipeline.train --config PRESET --deepspeed_config JSON [...]
    srun --ntasks-per-node 8 python -m pipeline.train --config PRESET --deepspeed_config JSON [...]

Everything that can be wrong in the configuration, the data and the run folder is said before a
model is built. Exit codes: 0 done, 2 usage or configuration, 75 stopped on request after a commit
or before the first step, 86 hang, 87 diverged, 88 corrupt data or checkpoint; `state.json` in the
run folder says the same.
"""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data_prep.errors import (
    EXIT_CORRUPT,
    EXIT_DIVERGED,
    EXIT_STOPPED,
    EXIT_USAGE,
    UserError,
)
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config, require_data_path
from pipeline.ds_config import DeepSpeedConfig, check_device, load_deepspeed_config
from pipeline.refusals import refuse, refuse_before_meeting
from pipeline.terminal import tell

if TYPE_CHECKING:
    from pipeline.resume import Accepts
    from pipeline.run_folder import RunFolder
    from pipeline.session import Session
    from pipeline.stop_signal import StopSignal

EXAMPLE = """example:
  deberta train --config deberta_v3_base --deepspeed_config ds_configs/zero1_bf16.json \\
      data.path=DATASET run.folder=runs/base schedule.max_steps=500_000
"""
_STATUS = {EXIT_DIVERGED: "diverged", EXIT_CORRUPT: "corrupt"}


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ours: one message, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{EXAMPLE}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a rank.

    Args:
        argv: Words after the program's name.

    Returns:
        config, deepspeed_config, overrides, dry_run, world_size, accept_config_change,
        accept_data_change, profile, memory_snapshot.

    Raises:
        UserError: Unknown flags, or a required one is missing.
    """
    parser = _Parser(
        prog="deberta train",
        description="Pre-train DeBERTa, ELECTRA or BERT; the same command resumes a run.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, help="preset name, TOML, or config.resolved.json"
    )
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument(
        "--local_rank", type=int, help="given by the deepspeed launcher; not needed"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument("--world-size", type=int, help="with --dry-run: ranks to plan for")
    parser.add_argument(
        "--accept-config-change",
        action="store_true",
        help="resume although keys have changed that the run depends on; recorded",
    )
    parser.add_argument(
        "--accept-data-change",
        action="store_true",
        help="resume although the dataset is another one; recorded",
    )
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="write a trace and a table of the parts of some steps, as in 10-12, to RUN/profile",
    )
    parser.add_argument(
        "--memory-snapshot",
        metavar="STEP",
        help="write what lies in each GPU's memory during a step to RUN/profile",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="single keys; recipe=released_code takes the values of the authors' code",
    )
    # Words may stand between options; one with dashes is explained where the keys are known.
    options, unknown = parser.parse_known_args(argv)
    options.overrides += unknown
    if options.world_size is not None and not options.dry_run:
        raise UserError("--world-size goes with --dry-run; a launcher sets the number of ranks")
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world-size {options.world_size}: give a number of ranks, 1 or more")
    for flag, value in (
        ("--profile", options.profile),
        ("--memory-snapshot", options.memory_snapshot),
    ):
        if value is not None and options.dry_run:
            raise UserError(
                f"{flag} {value} measures steps, and --dry-run takes none: leave out one of the two"
            )
    return options


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code.

    Args:
        argv: Words after the program's name; the process's own where None.
    """
    leave(run(sys.argv[1:] if argv is None else argv))


def leave(code: int) -> NoReturn:
    """End the process of a rank, whose files are all on disk.

    Args:
        code: Exit code.
    """
    if code == EXIT_USAGE:
        sys.exit(code)  # nothing native has been started yet
    # Without the interpreter's clean-up: there, threads of the native libraries were seen to end
    # ranks that had finished with SIGABRT ("terminate called without an active exception").
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a terminal that has gone away
            stream.flush()
    os._exit(code)


def run(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: Words after the program's name.

    Returns:
        The exit code.
    """
    try:
        options = parse(argv)
        config = load_run_config(options.config, options.overrides)
        ds = load_deepspeed_config(options.deepspeed_config)
        if options.dry_run:
            return _dry_run(config, ds, options.world_size or 1)
        require_data_path(config)
    except UserError as error:
        return refuse_before_meeting(error)
    return _train(config, ds, options)


def _dry_run(config: RunConfig, ds: DeepSpeedConfig, world_size: int) -> int:
    """Print what a run would be."""
    # Imported after the configuration has been checked: a typo costs no ten seconds.
    from pipeline.dry_run import describe_run

    print("\n".join(describe_run(config, ds, world_size)))
    return 0


def _train(config: RunConfig, ds: DeepSpeedConfig, options: argparse.Namespace) -> int:
    """Train as one rank of whatever world launched this process."""
    _prepare_process()
    from pipeline.stop_signal import StopSignal

    stop = StopSignal()
    stop.install()  # before the imports that take long, so that start-up can be stopped cleanly
    import torch.distributed as dist

    from pipeline.resume import Accepts
    from pipeline.run_folder import RunFolder
    from pipeline.runtime import RendezvousError

    accepts = Accepts(options.accept_config_change, options.accept_data_change)
    folder = RunFolder(Path(config.run.folder))
    with ExitStack() as cleanup:
        try:
            measured = _what_to_measure(options)
            return _fit(_join_world(config, ds, folder, stop, accepts, cleanup), measured)
        except UserError as error:
            # Any rank may be the one that finds damage; the status must not wait for rank 0.
            if error.exit_code in _STATUS and folder.path.is_dir():
                _write_status(folder, _STATUS[error.exit_code], None, str(error).splitlines()[0])
            is_own = error.exit_code == EXIT_CORRUPT or isinstance(error, RendezvousError)
            if not is_own and not dist.is_initialized():
                return refuse_before_meeting(error, lambda: stop.received)
            return refuse(error, everywhere=is_own)


def _prepare_process() -> None:
    """Settle what must be settled before torch is imported, and silence start-up chatter."""
    # Threads that spin while they wait halve, or worse, the speed of a CPU that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _join_world(
    config: RunConfig,
    ds: DeepSpeedConfig,
    folder: "RunFolder",
    stop: "StopSignal",
    accepts: "Accepts",
    cleanup: ExitStack,
) -> "Session":
    """Take the run folder and meet the other ranks."""
    import torch.distributed as dist

    from pipeline import faults
    from pipeline.compilation import require_compiler
    from pipeline.rendezvous import meet_other_ranks
    from pipeline.runtime import (
        World,
        configure_logging,
        fault_text,
        job_id,
        use_deterministic_kernels,
    )
    from pipeline.session import Session
    from pipeline.watchdog import Watchdog

    world = World.from_environment()
    faults.configure(fault_text(), world.rank)
    plan = ds.batch_plan(world.world_size)
    check_device(ds, world.device.type)
    if config.model.compile == "layer":
        require_compiler(world.device)
    if world.is_main:
        if taken_over := folder.acquire(job_id()):
            tell(f"note: {taken_over}")
        cleanup.callback(folder.release)
    watchdog = Watchdog(folder.path, world, config.safety)
    watchdog.start()
    cleanup.callback(watchdog.stop)
    if config.run.deterministic:
        use_deterministic_kernels()
    faults.reach("start.world", folder.committed_step())

    def leave_alone() -> None:
        if world.is_main:
            _write_status(folder, "stopped", None, "a signal, before all ranks were there")
        leave(EXIT_STOPPED)

    timeout_seconds = config.safety.collective_timeout_seconds
    control_group = meet_other_ranks(
        world,
        is_asked_to_stop=stop.received,
        leave=leave_alone,
        collective_timeout_seconds=timeout_seconds,
    )
    cleanup.callback(dist.destroy_process_group)
    stop.join(control_group)
    watchdog.join(control_group)
    if world.is_main:
        interval_seconds = config.checkpoint.interval_seconds
        stop.watch(folder.path, interval_seconds, lost=lambda: folder.lock.lost)
    configure_logging(world.rank, folder.path)
    # Its collectives run in another thread and must never meet those of the loop.
    in_background = config.checkpoint.asynchronous and world.world_size > 1
    timeout = timedelta(seconds=timeout_seconds)
    writer_group = dist.new_group(backend="gloo", timeout=timeout) if in_background else None
    assert not isinstance(writer_group, int), "this rank belongs to every group"
    return Session(
        config, ds, plan, world, control_group, folder, stop, watchdog, accepts, writer_group
    )


def _what_to_measure(options: argparse.Namespace) -> tuple[range | None, int | None]:
    """Read the steps to profile and the step whose memory is recorded."""
    from pipeline.memory_snapshot import parse_step
    from pipeline.profiling import parse_steps

    steps = None if options.profile is None else parse_steps(options.profile)
    snapshot = options.memory_snapshot
    return steps, None if snapshot is None else parse_step(snapshot)


@contextlib.contextmanager
def _measuring(session: "Session", steps: range | None, snapshot: int | None) -> Iterator[None]:
    """Profile some steps of rank 0, and record the memory of one step on every rank."""
    from pipeline.memory_snapshot import MemorySnapshot
    from pipeline.profiling import StepProfiler

    where = (session.folder.path, session.world.device, session.world.rank)
    listeners: list[StepProfiler | MemorySnapshot] = []
    if steps is not None and session.world.is_main:
        listeners.append(StepProfiler(*where, steps))
    if snapshot is not None:
        listeners.append(MemorySnapshot(*where, snapshot))
    for each in listeners:
        session.watchdog.listen(each.mark)
    try:
        yield
    finally:
        for each in listeners:
            each.close()


def _fit(session: "Session", measured: tuple[range | None, int | None]) -> int:
    """Assemble the run, print its banner, train, and leave the final status."""
    from pipeline.assemble import assemble
    from pipeline.banner import banner_lines
    from pipeline.session import StopRequested

    try:
        assembled = assemble(session)
    except StopRequested:
        return _stopped(session, None)
    trainer, folder = assembled.trainer, session.folder
    step = trainer.state.step
    if session.world.is_main:
        tell("\n".join(banner_lines(session, assembled)))
    try:
        with _measuring(session, *measured):
            outcome = trainer.fit()
    finally:
        trainer.close()
    if outcome == "stopped":
        return _stopped(session, trainer.state.step or None)
    if session.world.is_main:
        _write_status(folder, "done", trainer.state.step, "")
        if step == trainer.state.step:
            tell(f"nothing left to do: {step:,} steps are done")
    return 0


def _stopped(session: "Session", step: int | None) -> int:
    """Say that and why the run has stopped; before the first step there is nothing to commit."""
    if session.world.is_main:
        _write_status(session.folder, "stopped", step, session.stop.name or "request")
        done = "before the first step" if step is None else f"committed step {step}"
        why = "stopped on request"
        if session.stop.shortage is not None:
            why = f"stopped: {session.stop.shortage.reason}"
        message = f"{why}; {done}; the same command resumes"
        tell(message)
    # A launcher ends the other ranks when one has left with a code that is not 0, and would end
    # rank 0 before it has said how the run stands.
    with contextlib.suppress(RuntimeError):  # a rank has died since
        session.control_group.barrier().wait()
    return EXIT_STOPPED


def _write_status(folder: "RunFolder", status: str, step: int | None, reason: str) -> None:
    """Replace state.json; a disk that refuses must not change how the run ends."""
    try:
        folder.write_status(status, step, reason)
    except (OSError, ValueError) as error:
        tell(f"warning: state.json does not say {status!r}: {error}")


if __name__ == "__main__":
    main()
