"""When a run warns and when it stops because something runs out."""

import logging

import pytest
import torch

from pipeline import resources
from pipeline.config import SafetySection
from pipeline.resources import GIB, MIB, CommitNeeds, Kind, ResourceWatch, Shortage
from pipeline.runtime import World

MAIN = World(0, 0, 8, torch.device("cpu"))
NOTHING = CommitNeeds(0, 0, 0)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("rank", "amount"), [(0, 0), (7, 1), (100_000, 10**9)])
def test_a_shortage_travels_as_one_number(kind, rank, amount):
    shortage = Shortage(kind, rank, amount)
    number = shortage.encode()
    assert 0 < number < 2**63
    assert Shortage.decode(int(torch.tensor([number])[0])) == shortage


def test_what_is_too_large_to_travel_is_cut_and_hurts_nothing_else():
    found = Shortage.decode(Shortage(Kind.DISK, 2**40, 2**60).encode())
    assert (found.kind, found.rank, found.amount) == (Kind.DISK, 2**20 - 1, 2**38 - 1)


@pytest.mark.parametrize("kind", Kind)
def test_reasons_name_the_key_the_amount_and_a_cure(kind):
    reason = Shortage(kind, 3, 1234).reason
    assert "1,234 " in reason
    (key,) = [name for name in SafetySection.model_fields if f"(safety.{name})" in reason]
    assert key.startswith("min_")
    assert ": " in reason


@pytest.fixture
def gauged(monkeypatch, tmp_path):
    """A watch of rank 0 that reads the test's figures; returns it and the figures."""
    figures = {"memory": 64 * GIB, "disk": 64 * GIB, "inodes": 10**6}
    monkeypatch.setattr(resources, "available_bytes", lambda: figures["memory"])
    monkeypatch.setattr(resources, "_free_bytes_of", lambda _: lambda: figures["disk"])
    monkeypatch.setattr(resources, "_free_inodes_of", lambda _: lambda: figures["inodes"])
    (tmp_path / "checkpoints").mkdir()

    def make(world=MAIN, needs=NOTHING, **keys):
        section = SafetySection(resource_interval_seconds=0, **keys)
        watch = ResourceWatch(section, world, tmp_path, lambda: needs)
        return watch, figures

    return make


def test_memory(gauged, caplog):
    watch, figures = gauged(needs=CommitNeeds(0, 3 * GIB, 0), min_host_memory_gib=1)
    assert watch.look() is None
    figures["memory"] = 9 * GIB
    assert watch.look() is None
    assert not caplog.records
    figures["memory"] = 7 * GIB
    assert watch.look() is None
    assert watch.look() is None
    assert len(caplog.records) == 1, "said once"
    assert caplog.records[0].levelno == logging.WARNING
    assert "7,168 MiB of memory are left on the host of rank 0" in caplog.text
    figures["memory"] = 4 * GIB - 1
    assert watch.look() == Shortage(Kind.HOST_MEMORY, 0, 4095)


def test_a_run_that_only_just_fits_is_not_stopped_for_it(gauged):
    watch, figures = gauged(needs=CommitNeeds(0, 3 * GIB, 0), min_host_memory_gib=1)
    figures["memory"] = GIB
    assert watch.look() is None
    figures["memory"] = GIB // 2 + MIB
    assert watch.look() is None
    figures["memory"] = GIB // 2 - MIB
    assert watch.look() == Shortage(Kind.HOST_MEMORY, 0, 511)


def test_room_is_kept_for_the_next_commit(gauged):
    watch, figures = gauged(needs=CommitNeeds(10 * GIB, 0, 0), min_free_disk_gib=1)
    assert watch.look() is None
    figures["disk"] = 11 * GIB
    assert watch.look() is None
    figures["disk"] = 11 * GIB - 1
    assert watch.look() == Shortage(Kind.DISK, 0, 11 * 1024 - 1)
    figures["disk"] = 10 * GIB
    assert watch.look() is not None
    figures["disk"] = 10 * GIB - 1
    assert watch.look() is None, "nothing could be committed: somebody may make room"


def test_a_disk_that_is_always_as_full(gauged):
    watch, figures = gauged(needs=CommitNeeds(10 * GIB, 0, 0), min_free_disk_gib=4)
    figures["disk"] = 12 * GIB
    assert watch.look() is None
    figures["disk"] = 11 * GIB
    assert watch.look() is None
    figures["disk"] = 11 * GIB - 1
    assert watch.look() is not None


def test_inodes_and_file_systems_without_them(gauged):
    watch, figures = gauged(needs=CommitNeeds(0, 0, 40), min_free_inodes=100)
    figures["inodes"] = None
    assert watch.look() is None
    figures["inodes"] = 1000
    assert watch.look() is None
    figures["inodes"] = 139
    assert watch.look() == Shortage(Kind.INODES, 0, 139)


def test_of_several_one_is_told(gauged):
    watch, figures = gauged()
    assert watch.look() is None
    figures.update(memory=0, disk=0)
    assert watch.look() == Shortage(Kind.DISK, 0, 0)


def test_nothing_is_watched_where_a_limit_is_zero(gauged):
    keys = ("min_host_memory_gib", "min_free_disk_gib", "min_free_inodes")
    watch, figures = gauged(**dict.fromkeys(keys, 0))
    assert watch.look() is None
    figures.update(memory=0, disk=0, inodes=0)
    assert watch.look() is None


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        (World(3, 1, 8, torch.device("cpu")), None),
        (World(2, 0, 8, torch.device("cpu")), Kind.HOST_MEMORY),
        (World(3, 1, 8, torch.device("cuda", 1)), Kind.GPU_MEMORY),
    ],
)
def test_who_watches_what(gauged, monkeypatch, world, kind):
    left = {"highest": 10 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: left["highest"])
    watch, figures = gauged(world)
    assert watch.look() is None
    figures.update(memory=0, disk=0, inodes=0)
    left["highest"] = 72 * GIB - 200 * MIB
    found = watch.look()
    assert (found and found.kind) == kind
    if kind is Kind.GPU_MEMORY:
        assert (found.rank, found.amount) == (3, 200)


def test_looks_are_rare(gauged, monkeypatch):
    watch, figures = gauged()
    now = [100.0]
    monkeypatch.setattr(resources.time, "monotonic", lambda: now[0])
    watch._section = SafetySection(resource_interval_seconds=10)
    assert watch.look() is None
    figures["memory"] = 0
    now[0] += 9.9
    assert watch.look() is None
    now[0] += 0.2
    assert watch.look() is not None


def test_real_file_systems(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    keys = {"min_host_memory_gib": 0, "min_free_disk_gib": 1e9, "min_free_inodes": 10**15}
    section = SafetySection(resource_interval_seconds=0, **keys)
    watch = ResourceWatch(section, MAIN, tmp_path, lambda: NOTHING)
    assert watch.look() is None  # all of it is there at first, so that half of it would have to go
    assert watch.look() is None
    kinds = [gauge.kind for gauge in watch._gauges]
    assert kinds == [Kind.DISK, Kind.INODES]
    assert watch._gauges[0].read() > 0
