"""Where tests hurt a run on purpose: every place and every injury, by name.

    DEBERTA_FAULT="POINT:RANK:STEPS:ACTION[:ARGUMENT[:TIMES]]"     several are separated by ";"
    DEBERTA_FAULT="save.manifest:0:8:kill"                         SIGKILL rank 0 in step 8's commit
    DEBERTA_FAULT="step.generator_loss:1:4-6:nan"                  three losses of rank 1 are NaN
    DEBERTA_FAULT="save.share:*:*:enospc::2"                       the first two writes find no room

RANK is a number or *; STEPS a number, a range or *; ARGUMENT belongs to the action; TIMES is how
often it happens in one process, without an end where it is not given. Nothing happens in a process
that was not started with the variable: `reach` and `poison` then return at once.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass, field

import torch

from data_prep.errors import UserError

VARIABLE = "DEBERTA_FAULT"
POINTS = {
    "start.world": "before the process group",
    "start.data": "before the dataset is opened",
    "start.engines": "before DeepSpeed is given the networks",
    "data.read": "in the reading thread, before a step's sequences are read",
    "step.begin": "before a step's masks",
    "step.forward": "before a network's forward pass of a micro batch",
    "step.generator_loss": "the generator's loss of a micro batch, before its backward pass",
    "step.discriminator_loss": "the discriminator's loss of a micro batch, likewise",
    "step.generator_update": "before the generator's optimizer step",
    "step.discriminator_update": "before the discriminator's optimizer step",
    "step.end": "after both optimizer steps",
    "evaluate.batch": "before a held-out batch",
    "save.begin": "before a commit's folder is made",
    "save.share": "before a rank's file is written",
    "save.written": "after a rank's file was written, before it is synced and hashed",
    "save.manifest": "before the manifest is written",
    "save.rename": "before the complete folder gets its name",
    "save.latest": "after that, before `latest` is written",
    "save.prune": "before old commits are removed",
    "metrics.write": "before a row is written",
    "replica": "before replicated parameters are compared",
}
ACTIONS = {
    "kill": "SIGKILL to this process",
    "stop": "SIGSTOP to this process: it hangs with all its threads",
    "hang": "sleep for ever, other threads live",
    "gil": "sleep for ever without letting another thread run Python",
    "sleep": "ARGUMENT seconds of sleep",
    "leak": "ARGUMENT MiB of host memory are taken and kept",
    "signal": "the signal named ARGUMENT, such as SIGTERM, to this process",
    "raise": "an exception that nobody expects",
    "enospc": "no space left on device",
    "eio": "input/output error",
    "erofs": "read-only file system",
    "nan": "the tensor becomes NaN",
    "inf": "the tensor becomes infinite",
    "scale": "the tensor is multiplied by ARGUMENT",
    "flip": "one bit of the tensor's first number changes",
}
_ERRNO = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS}
_ON_TENSORS = ("nan", "inf", "scale", "flip")


@dataclass
class Fault:
    """One injury that somebody asked for."""

    point: str
    rank: int | None
    """None is any."""
    first_step: int
    last_step: int
    action: str
    argument: str = ""
    times_left: float = field(default=float("inf"))

    def strikes(self, point: str, rank: int, step: int) -> bool:
        """Whether it happens here and now; counts it if so.

        Args:
            point: Where the program is.
            rank: This process's rank.
            step: Completed optimizer steps.

        Returns:
            Whether to hurt.
        """
        here = point == self.point and self.rank in (None, rank) and self.times_left > 0
        if here and self.first_step <= step <= self.last_step:
            self.times_left -= 1
            return True
        return False


_faults: list[Fault] = []
_leaked: list[torch.Tensor] = []
_rank = 0


def configure(text: str, rank: int) -> None:
    """Prepare the injuries of this process; called once, at its start.

    Args:
        text: Value of DEBERTA_FAULT; empty for none.
        rank: This process's rank.

    Raises:
        UserError: The text names no point or action, or is not of the form above.
    """
    global _rank
    _rank = rank
    _faults[:] = [_parse(part) for part in text.split(";") if part]


def _parse(part: str) -> Fault:
    words = [*part.split(":"), "", ""][:6]
    if not 4 <= len(part.split(":")) <= 6 or words[0] not in POINTS or words[3] not in ACTIONS:
        raise UserError(
            f"{VARIABLE}={part}: write POINT:RANK:STEPS:ACTION[:ARGUMENT[:TIMES]] with a point of "
            f"{', '.join(POINTS)} and an action of {', '.join(ACTIONS)}; or unset it"
        )
    point, rank, steps, action, argument, times = words
    first, _, last = steps.partition("-")
    try:
        return Fault(
            point,
            None if rank == "*" else int(rank),
            0 if steps == "*" else int(first),
            10**9 if steps == "*" else int(last or first),
            action,
            argument,
            float(times or "inf"),
        )
    except ValueError as error:
        raise UserError(f"{VARIABLE}={part}: {error}; RANK, STEPS and TIMES are numbers") from error


def reach(point: str, step: int) -> None:
    """Say that the program is at a point; hurts this process if that was asked for.

    Args:
        point: One of POINTS.
        step: Completed optimizer steps.

    Raises:
        OSError: Asked for: a full, broken or read-only disk.
        RuntimeError: Asked for: something that nobody expects.
    """
    for fault in _faults:
        if fault.action not in _ON_TENSORS and fault.strikes(point, _rank, step):
            _hurt(fault)


def _hurt(fault: Fault) -> None:
    if fault.action in _ERRNO:
        number = _ERRNO[fault.action]
        raise OSError(number, os.strerror(number), f"(injected at {fault.point})")
    if fault.action == "raise":
        raise RuntimeError(f"injected at {fault.point}")
    if fault.action == "sleep":
        time.sleep(float(fault.argument))
    elif fault.action == "leak":
        _leaked.append(torch.ones(int(fault.argument) << 20, dtype=torch.uint8))
    elif fault.action == "hang":
        while True:
            time.sleep(3600)
    elif fault.action == "gil":
        import ctypes

        ctypes.PyDLL(None).sleep(3600)  # PyDLL calls keep the interpreter's lock
    else:
        names = {"kill": "SIGKILL", "stop": "SIGSTOP", "signal": fault.argument}
        os.kill(os.getpid(), signal.Signals[names[fault.action]])


def poison(point: str, step: int, tensor: torch.Tensor) -> torch.Tensor:
    """Pass a tensor on; a damaged one if that was asked for.

    Args:
        point: One of POINTS.
        step: Completed optimizer steps.
        tensor: Of any shape and type.

    Returns:
        The tensor itself, or a damaged result; "flip" changes it in place.
    """
    for fault in _faults:
        if fault.action in _ON_TENSORS and fault.strikes(point, _rank, step):
            if fault.action == "flip":
                tensor.view(-1).view(torch.uint8)[0] ^= 1
            else:
                tensor = tensor * float(fault.argument or fault.action)
    return tensor
