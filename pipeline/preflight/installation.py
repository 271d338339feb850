"""All looks at an installation, in the order in which one thing needs another.

A look that fails in a way of its own is a finding, too, and hides no other: torch may be what is
broken, so what needs it is imported inside of its look.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pipeline
from pipeline.preflight.finding import Finding


@dataclass(frozen=True)
class Wishes:
    """What the user says about the place."""

    run: Path | None
    """The run folder, or the place where it will be made; the current folder where None."""
    scratch: Path | None
    """A fast disk; None for none."""
    gpus: int | None
    """How many there should be; None where nobody says."""
    builds: bool
    """Whether DeepSpeed's operators are compiled now."""


def look_at_installation(wishes: Wishes) -> Iterator[Finding]:
    """Look at packages, operators, this node, ranks, launchers, file system and limits.

    Args:
        wishes: What the user says about the place.

    Yields:
        Findings, as soon as there are any.
    """
    node, variables = _environment()
    run = wishes.run or Path()

    def packages() -> Iterable[Finding]:
        from pipeline.preflight.packages import look_at_packages

        return look_at_packages(node, Path(pipeline.__file__).parents[1] / "pyproject.toml")

    def deepspeed() -> Iterable[Finding]:
        from pipeline.preflight.deepspeed_ops import look_at_deepspeed

        return look_at_deepspeed(node, variables, wishes.builds)

    def software() -> Iterable[Finding]:
        from pipeline.preflight import gpu_software as look

        yield look.look_at_build(node, variables)
        yield from look.look_at_abilities(node)
        yield from look.look_at_processes(node, variables)
        yield look.look_at_triton(node)

    def this_node() -> Iterable[Finding]:
        from pipeline.preflight.node import look_at_node

        return look_at_node(wishes.run, wishes.scratch, wishes.gpus)

    def worlds() -> Iterable[Finding]:
        import torch

        from pipeline.preflight.small_worlds import look_at_world

        yield look_at_world(node, variables, "gloo", 2)
        if torch.cuda.is_available() and variables.get("DS_ACCELERATOR") != "cpu":
            yield look_at_world(node, variables, "nccl", torch.cuda.device_count())

    def launchers() -> Iterable[Finding]:
        from pipeline.preflight import launchers as look

        yield look.look_at_launchers(node, variables)
        yield look.look_at_mpi(node, variables)
        yield look.look_at_slurm(node, variables)

    def file_system() -> Iterable[Finding]:
        from pipeline.preflight.shared_folder import look_at_behaviour

        return look_at_behaviour(node, run, variables)

    def host() -> Iterable[Finding]:
        from pipeline.preflight import host as look

        yield look.look_at_memory(node)
        yield look.look_at_shared_memory(node)
        yield from look.look_at_limits(node)
        yield look.look_at_temporary_folder(node)
        yield look.look_at_synchronization(node)
        yield look.look_at_text(node)

    looks = (packages, host, launchers, file_system, deepspeed, software, this_node, worlds)
    for look in looks:
        yield from _guarded(node, look)


def _environment() -> tuple[str, dict[str, str]]:
    """This node's name and its variables, also where torch cannot be imported."""
    try:
        from pipeline.runtime import launcher_environment, node_name
    except Exception:
        return socket.gethostname(), dict(os.environ)
    return node_name(), launcher_environment()


def _guarded(node: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What a look finds; that it has failed itself, if it has."""
    try:
        yield from look()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        text = f"the look itself has failed: {type(error).__name__}: {reason}"
        cure = "see the lines above it; if they are well, this is a mistake of the program"
        yield Finding(node, look.__name__.replace("_", " "), False, text, cure)
