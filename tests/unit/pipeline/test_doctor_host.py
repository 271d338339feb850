"""What `deberta doctor` says of memory, limits, temporary folders, clock and text."""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.preflight import host
from pipeline.preflight.host import (
    GIB,
    look_at_limits,
    look_at_memory,
    look_at_shared_memory,
    look_at_synchronization,
    look_at_temporary_folder,
    look_at_text,
)
from tests.worlds import ROOT


@pytest.fixture
def mounted(tmp_path):
    """Mounts a tmpfs; returns how."""
    with contextlib.ExitStack() as stack:

        def mount(options):
            folder = tmp_path / "mounted"
            folder.mkdir()
            words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
            if subprocess.run(words, capture_output=True).returncode:
                pytest.skip("nothing may be mounted here")
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return folder

        yield mount


@pytest.mark.parametrize(
    ("gib", "words"),
    [
        (64, "n memory: ok, 64.0 GiB can be taken"),
        (5, "n memory: warning, 5.0 GiB can be taken; ask for more memory (--mem)"),
        (1, "n memory: FAIL, 1.0 GiB can be taken: libraries alone take one GiB a rank; ask for"),
    ],
)
def test_memory(gib, words, monkeypatch):
    monkeypatch.setattr(host, "available_bytes", lambda: gib * GIB)
    assert look_at_memory("n").line.startswith(words)


def test_shared_memory(mounted, tmp_path):
    finding = look_at_shared_memory("n", tmp_path / "none")
    assert finding.line.startswith(
        f"n shared memory {tmp_path / 'none'}: FAIL, No such file or directory: NCCL and MPI need"
    )
    folder = mounted("size=64m")
    finding = look_at_shared_memory("n", folder)
    assert "FAIL, 0.06 of 0.06 GiB free: NCCL's ranks would end in bus errors" in finding.line
    assert "--shm-size=1g" in finding.cure
    assert list(folder.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=2g", str(folder)], check=True)
    assert look_at_shared_memory("n", folder).line.endswith("ok, 2.00 of 2.00 GiB free")


def test_shared_memory_that_is_left_full(mounted):
    folder = mounted("size=600m")
    with (folder / "left").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 200 << 20)
    finding = look_at_shared_memory("n", folder)
    assert not finding.ok
    assert finding.cure == "remove what killed processes have left there"


@contextlib.contextmanager
def limited(kind, soft):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.mark.parametrize(
    ("kind", "soft", "words"),
    [
        (resource.RLIMIT_NOFILE, 200, "limits: FAIL, 200 open files; ulimit -n "),
        (resource.RLIMIT_NOFILE, 512, "limits: warning, 512 open files; ulimit -n "),
        (
            resource.RLIMIT_FSIZE,
            GIB,
            "limits: FAIL, files of at most 1.00 GiB: commits would fail;",
        ),
        (resource.RLIMIT_AS, 100 * GIB, "limits: FAIL, 100 GiB of addresses: CUDA and memory maps"),
        (resource.RLIMIT_NPROC, 700, "limits: warning, 700 processes and threads of this user; "),
    ],
)
def test_limits(kind, soft, words):
    with limited(kind, soft):
        (finding,) = look_at_limits("n")
    assert finding.line.startswith(f"n {words}")


def test_limits_that_are_wide(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "INFINIBAND", tmp_path / "none")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with limited(resource.RLIMIT_NOFILE, min(files, 4096)):
        (finding,) = look_at_limits("n")
    assert finding.line.startswith("n limits: ok, 4,096 open files, ")


def test_memory_that_infiniband_cannot_lock(monkeypatch, tmp_path):
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(host, "INFINIBAND", tmp_path)
    with limited(resource.RLIMIT_MEMLOCK, 4 << 20):
        (finding,) = look_at_limits("n")
    assert finding.line.startswith(
        "n limits: warning, 0.004 GiB may be locked, and there are Infini"
    )
    assert "ulimit -l unlimited" in finding.cure


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=8m", "FAIL, 0.0 GiB free; set TMPDIR to a local folder with room"),
        ("size=2g,noexec", "warning, 2.0 GiB free, mounted noexec: what torch and Triton compile"),
        ("size=2g,ro", "FAIL, Read-only file system; set TMPDIR"),
        ("size=2g", "ok, 2.0 GiB free"),
    ],
)
def test_temporary_folders(options, words, mounted, monkeypatch):
    folder = mounted(options)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    finding = look_at_temporary_folder("n")
    assert finding.line.startswith(f"n temporary folder {folder}: {words}")
    assert list(folder.iterdir()) == []


def test_no_temporary_folder(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    finding = look_at_temporary_folder("n")
    assert finding.line.startswith("n temporary folder: FAIL, there is none: No usable temporary")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (0, "ok, the kernel's clock is kept right"),
        (5, "warning, nobody keeps this kernel's clock right; start chronyd or ntpd"),
        (-1, "ok, the kernel does not say whether one runs: "),
    ],
)
def test_the_time_service(state, words, monkeypatch):
    library = SimpleNamespace(adjtimex=lambda timex: state)
    monkeypatch.setattr(host.ctypes, "CDLL", lambda *_, **__: library)
    assert look_at_synchronization("n").line.startswith(f"n time service: {words}")


def test_the_kernel_is_asked():
    assert look_at_synchronization("n").ok


def test_text():
    code = "from pipeline.preflight.host import look_at_text; print(look_at_text('n').line)"

    def told(**variables):
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables}
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert told(LC_ALL="C.UTF-8") == "n text: ok, UTF-8"
    line = told(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert line.startswith("n text: FAIL, not UTF-8: files ")
    assert line.endswith("; export LC_ALL=C.UTF-8 (or PYTHONUTF8=1)")
    assert look_at_text("n").ok


def test_it_asks_without_torch():
    code = "import sys, pipeline.preflight.host, pipeline.preflight.launchers as l; "
    code += "import pipeline.preflight.installation, pipeline.preflight.packages; "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(ROOT), check=True)
