"""Looks at what the system allows this user: memory, limits, temporary folders, clock, text."""

import ctypes
import locale
import mmap
import os
import resource
import secrets
import sys
import tempfile
from pathlib import Path

from pipeline.host_memory import available_bytes
from pipeline.preflight.finding import Finding

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
_MIN_MEMORY_GIB, _SCARCE_MEMORY_GIB = 2, 8
_MIN_SHARED_BYTES = 512 << 20
_MIN_TEMPORARY_BYTES = 1 << 30
_MIN_FILES, _SCARCE_FILES = 256, 1024
_MIN_PROCESSES = 1024
_MIN_FILE_BYTES = 16 * GIB
"""More than a whole commit of the largest preset (8.6 GB)."""
_MIN_ADDRESS_BYTES = 256 * GIB
_UNSYNCHRONIZED = 5
"""TIME_ERROR of adjtimex(2)."""
_TIMEX_BYTES = 512
"""Room for `struct timex` of any architecture, whose first field is 0 for a question."""


def look_at_memory(node: str) -> Finding:
    """See how much memory can be taken: the machine's, or what a control group leaves.

    Args:
        node: This node's name.

    Returns:
        The finding.
    """
    gib = available_bytes() / GIB
    text = f"{gib:,.1f} GiB can be taken"
    cure = "ask for more memory (--mem), end who uses it, or start fewer ranks on this node"
    if gib < _MIN_MEMORY_GIB:
        return Finding(node, "memory", False, f"{text}: libraries alone take one GiB a rank", cure)
    return Finding(node, "memory", True, text, cure if gib < _SCARCE_MEMORY_GIB else "")


def look_at_shared_memory(node: str, folder: Path = SHARED_MEMORY) -> Finding:
    """See how large the folder is through which ranks of a host pass messages.

    Args:
        node: This node's name.
        folder: Where it is mounted.

    Returns:
        The finding.
    """
    check = f"shared memory {folder}"
    cure = "start the container with --shm-size=1g or --ipc=host, or mount a larger tmpfs there"
    try:
        found = os.statvfs(folder)
        _try_file(folder)
    except OSError as error:
        return Finding(node, check, False, f"{error.strerror}: NCCL and MPI need it", cure)
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"{free / GIB:,.2f} of {size / GIB:,.2f} GiB free"
    if free < _MIN_SHARED_BYTES:
        cure = cure if size < _MIN_SHARED_BYTES else "remove what killed processes have left there"
        return Finding(node, check, False, f"{text}: NCCL's ranks would end in bus errors", cure)
    return Finding(node, check, True, text)


def look_at_limits(node: str) -> list[Finding]:
    """Read this process's limits, as ulimit does.

    Args:
        node: This node's name.

    Returns:
        One finding for each limit that is too low, or one for all.
    """
    files = _limit(resource.RLIMIT_NOFILE)
    findings = []

    def tell(ok: bool, text: str, cure: str) -> None:
        findings.append(Finding(node, "limits", ok, text, cure))

    if files < _SCARCE_FILES:
        cure = f"ulimit -n {min(65536, _limit(resource.RLIMIT_NOFILE, hard=True)):.0f}"
        tell(files >= _MIN_FILES, f"{files:,.0f} open files", f"{cure} before training")
    if (largest := _limit(resource.RLIMIT_FSIZE)) < _MIN_FILE_BYTES:
        text = f"files of at most {largest / GIB:,.2f} GiB: commits would fail"
        tell(False, text, "ulimit -f unlimited")
    if (space := _limit(resource.RLIMIT_AS)) < _MIN_ADDRESS_BYTES:
        text = (
            f"{space / GIB:,.0f} GiB of addresses: CUDA and memory maps reserve more than they use"
        )
        tell(False, text, "ulimit -v unlimited; limit memory by control groups")
    if (processes := _limit(resource.RLIMIT_NPROC)) < _MIN_PROCESSES:
        text = f"{processes:,.0f} processes and threads of this user"
        tell(True, text, "ulimit -u 4096")
    locked = _limit(resource.RLIMIT_MEMLOCK)
    if INFINIBAND.is_dir() and any(INFINIBAND.iterdir()) and locked != float("inf"):
        text = f"{locked / GIB:,.3f} GiB may be locked, and there are InfiniBand adapters"
        tell(True, text, "ulimit -l unlimited (LimitMEMLOCK=infinity for slurmd), or NCCL fails")
    text = f"{files:,.0f} open files, {processes:,.0f} processes"
    return findings or [Finding(node, "limits", True, text.replace("inf", "unlimited"))]


def _limit(kind: int, hard: bool = False) -> float:
    value = resource.getrlimit(kind)[1 if hard else 0]
    return float("inf") if value == resource.RLIM_INFINITY else value


def look_at_temporary_folder(node: str) -> Finding:
    """See whether the folder for temporary files has room, and whether code in it may run.

    Args:
        node: This node's name.

    Returns:
        The finding.
    """
    check, cure = "temporary folder", "set TMPDIR to a local folder with room"
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        return Finding(node, check, False, f"there is none: {error.strerror}", cure)
    check = f"{check} {folder}"
    try:
        room = os.statvfs(folder)
        is_executable = _try_file(folder)
    except OSError as error:
        return Finding(node, check, False, f"{error.strerror}", cure)
    free = room.f_bavail * room.f_frsize
    text = f"{free / GIB:,.1f} GiB free"
    if free < _MIN_TEMPORARY_BYTES:
        return Finding(node, check, False, text, cure)
    if not is_executable:
        text += ", mounted noexec: what torch and Triton compile there cannot be loaded"
        return Finding(
            node, check, True, text, "set TMPDIR to a folder whose files may be executed"
        )
    return Finding(node, check, True, text)


def _try_file(folder: Path) -> bool:
    """Write a page of a new file, which is removed again; returns whether it may be executed."""
    path = folder / f".deberta-doctor-{secrets.token_hex(4)}"
    try:
        with path.open("w+b") as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            rights = mmap.PROT_READ | mmap.PROT_EXEC
            try:
                mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=rights).close()
            except PermissionError:
                return False
    finally:
        path.unlink(missing_ok=True)
    return True


def look_at_synchronization(node: str) -> Finding:
    """Ask the kernel whether somebody keeps its clock right.

    Args:
        node: This node's name.

    Returns:
        The finding; a warning at most, because a virtual machine's clock may be its host's.
    """
    check, cure = "time service", "start chronyd or ntpd here, or on a virtual machine's host"
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if state < 0:
        why = os.strerror(ctypes.get_errno())
        return Finding(node, check, True, f"the kernel does not say whether one runs: {why}")
    if state == _UNSYNCHRONIZED:
        return Finding(node, check, True, "nobody keeps this kernel's clock right", cure)
    return Finding(node, check, True, "the kernel's clock is kept right")


def look_at_text(node: str) -> Finding:
    """See whether files are read and written as UTF-8 where nothing else is said.

    Args:
        node: This node's name.

    Returns:
        The finding.
    """
    found = {
        "files": locale.getpreferredencoding(False),
        "file names": sys.getfilesystemencoding(),
        "the terminal": getattr(sys.stdout, "encoding", None) or "utf-8",
    }
    wrong = [f"{name} {value}" for name, value in found.items() if not _is_utf8(value)]
    if wrong:
        cure = "export LC_ALL=C.UTF-8 (or PYTHONUTF8=1)"
        return Finding(node, "text", False, f"not UTF-8: {', '.join(wrong)}", cure)
    return Finding(node, "text", True, "UTF-8")


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("-", "").replace("_", "") == "utf8"
