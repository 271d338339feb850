"""Memory that is left within the limits of control groups, of both versions and in containers."""

import psutil
import pytest

from pipeline import host_memory
from pipeline.host_memory import available_bytes, room_bytes

MIB = 1 << 20


def make_v1(folder, limit, used, files=0):
    """A group of version 1; MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_bytes = 9223372036854771712 if limit is None else limit * MIB
    (folder / "memory.limit_in_bytes").write_text(f"{limit_bytes}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(
        "cache 1\ninactive_file 7\nactive_file 7\n"
        f"total_inactive_file {files * MIB}\ntotal_active_file {MIB}\n"
    )


def make_v2(folder, limit, used, files=0):
    """A group of version 2; MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text("max\n" if limit is None else f"{limit * MIB}\n")
    (folder / "memory.current").write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files * MIB}\nactive_file 0\n")


def test_pages_of_files_do_not_count(tmp_path):
    make_v1(tmp_path / "one", 100, 90, files=30)
    make_v2(tmp_path / "two", 100, 90, files=30)
    assert room_bytes(tmp_path / "one") == 41 * MIB
    assert room_bytes(tmp_path / "two") == 40 * MIB


@pytest.mark.parametrize("make", [make_v1, make_v2])
def test_groups_without_a_limit(make, tmp_path):
    make(tmp_path / "group", None, 90)
    assert room_bytes(tmp_path / "group") is None
    assert room_bytes(tmp_path / "none") is None


def test_more_than_the_limit_is_used(tmp_path):
    make_v2(tmp_path / "group", 50, 90)
    assert room_bytes(tmp_path / "group") == 0


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Where groups are mounted; a function that says which this process is in."""

    def member_of(text):
        (tmp_path / "cgroup").write_text(text)
        read = host_memory._groups
        paths = (tmp_path / "cgroup", tmp_path / "mounted")
        monkeypatch.setattr(host_memory, "_groups", lambda *_: read(*paths))

    return member_of


JOB = "slurm/uid_0/job_7"


@pytest.mark.parametrize(
    ("make", "membership", "top"),
    [
        (make_v1, f"5:cpu,memory:/{JOB}/step_0/task_1\n0::/\n", "mounted/memory"),
        (make_v2, f"0::/{JOB}/step_0/task_1\n", "mounted"),
    ],
)
def test_the_tightest_limit_above_counts(make, membership, top, groups, tmp_path):
    groups(membership)
    job = tmp_path / top / JOB
    make(job, 100, 70)
    make(job / "step_0", None, 70)
    make(job / "step_0" / "task_1", 90, 10)
    assert available_bytes() == room_bytes(job) < room_bytes(job / "step_0" / "task_1")


def test_a_container_sees_only_its_own_group_under_another_name(groups, tmp_path):
    groups("5:memory:/docker/0a1b2c\n")
    make_v1(tmp_path / "mounted" / "memory", 100, 70)
    assert available_bytes() == 31 * MIB


def test_without_limits_it_is_the_machine(groups, monkeypatch):
    groups("5:cpu:/x\n")
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert available_bytes() == memory.available


def test_this_machine():
    assert 0 < available_bytes() <= psutil.virtual_memory().total
