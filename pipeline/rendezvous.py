"""Meeting the other ranks without becoming deaf to requests to stop.

Joining the process group waits inside torch for ranks that may come late or never, and Python runs
no signal handler meanwhile. A thread that the signal itself wakes leaves in its place.
"""

import os
import signal
import threading
from collections.abc import Callable

import torch.distributed as dist

from pipeline.runtime import World, start_world

PATIENCE_SECONDS = 5.0
"""For the other ranks to come, so that all can agree to stop; nothing is lost by leaving."""


def meet_other_ranks(
    world: World,
    *,
    is_asked_to_stop: bool,
    leave: Callable[[], None],
    collective_timeout_seconds: float = 1800.0,
) -> dist.ProcessGroup:
    """Join the process group, or leave if a signal comes while the others do not.

    Args:
        world: This process's place.
        is_asked_to_stop: A signal came before.
        leave: Ends the process; called in another thread.
        collective_timeout_seconds: For the others to come, and for one collective later.

    Returns:
        The control group of all ranks.
    """
    if threading.current_thread() is not threading.main_thread():
        return start_world(world, collective_timeout_seconds=collective_timeout_seconds)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    met = threading.Event()

    def leave_when_woken() -> None:
        os.read(read_end, 1)
        if not met.wait(PATIENCE_SECONDS):
            leave()

    thread = threading.Thread(target=leave_when_woken, name="rendezvous", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    if is_asked_to_stop:
        os.write(write_end, b"!")
    try:
        return start_world(world, collective_timeout_seconds=collective_timeout_seconds)
    finally:
        signal.set_wakeup_fd(before)
        met.set()
        os.write(write_end, b"!")
        thread.join()
        os.close(read_end)
        os.close(write_end)
