"""What is wrong is said once, and is said even if rank 0 is ended before it can say it."""

import multiprocessing
import sys
import time

import pytest

from data_prep.errors import EXIT_USAGE, UserError
from pipeline import refusals, train
from tests.worlds import ROOT

FORKING = multiprocessing.get_context("fork")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a rank of a world of two, whose command line is wrong."""

    def rank_of(number, late_seconds, first_seconds, words):
        sys.stderr = (tmp_path / f"rank-{number}.log").open("w")
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("LOCAL_RANK", str(number))
        monkeypatch.setattr(refusals, "RANK_0_FIRST_SECONDS", first_seconds)
        time.sleep(late_seconds)
        sys.exit(train.run(words))

    started = []

    def start(number, late_seconds=0.0, first_seconds=120.0, words=("--config", "demo")):
        process = FORKING.Process(target=rank_of, args=(number, late_seconds, first_seconds, words))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def said(folder, number):
    return (folder / f"rank-{number}.log").read_text()


def test_only_the_first_rank_says_what_both_know(start, tmp_path):
    other = start(1)
    first = start(0, late_seconds=0.5)
    first.join(60)
    assert first.exitcode == EXIT_USAGE
    assert said(tmp_path, 0).startswith("error: the following arguments are required: --deepspeed")
    assert other.is_alive(), "its end would have been that of the first rank, which was late"
    other.terminate()  # as a launcher does
    other.join(60)
    assert said(tmp_path, 1) == ""


def test_another_rank_says_what_the_first_one_did_not_live_to_say(start, tmp_path):
    first, other = start(0, late_seconds=100.0), start(1, first_seconds=0.3)
    other.join(60)
    assert other.exitcode == EXIT_USAGE
    first.terminate()  # as a launcher does
    assert said(tmp_path, 1).startswith("rank 1: error: the following arguments are required")
    assert said(tmp_path, 0) == ""


def test_a_rank_says_what_it_alone_finds_before_the_ranks_have_met(start, tmp_path, monkeypatch):
    """Such as a node without a GPU: rank 0 waits for the others, and knows of nothing wrong."""

    def refuse(*_):
        raise UserError("no GPU here")

    monkeypatch.setattr(train, "_join_world", refuse)
    # Other tests of this process may have met others, which the fork would inherit.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    words = ["--config", "demo", "--deepspeed_config", str(ROOT / "ds_configs/cpu_debug.json")]
    words += [f"data.path={tmp_path}", f"run.folder={tmp_path / 'run'}"]
    other = start(1, first_seconds=0.3, words=words)
    other.join(120)
    assert other.exitcode == EXIT_USAGE
    assert said(tmp_path, 1) == "rank 1: error: no GPU here\n"


@pytest.mark.parametrize(
    ("rank", "local_rank", "stopped", "expected"),
    [
        ("8", "0", False, "rank 8: error: no\n"),
        ("8", "0", True, ""),
        ("9", "1", False, ""),
    ],
)
def test_one_rank_of_a_host_speaks(rank, local_rank, stopped, expected, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(refusals, "RANK_0_FIRST_SECONDS", 0.2)
    monkeypatch.setattr(refusals, "_LAUNCHER_SECONDS", 0.2)
    begin = time.monotonic()
    code = refusals.refuse_before_meeting(UserError("no"), lambda: stopped)
    assert (code, capsys.readouterr().err) == (EXIT_USAGE, expected)
    waited = {("8", False): 0.2, ("9", False): 0.4}.get((rank, stopped), 0.0)
    assert time.monotonic() - begin >= waited
