"""Verdicts about hangs, from what the ranks wrote about themselves."""

import sys
import threading
from dataclasses import replace

import pytest

from pipeline.hang_report import (
    Beat,
    PeerWatch,
    Place,
    Sighting,
    beat_file,
    judge,
    place_of,
    publish,
    seen_by,
    somebody_works,
    table,
)

LATELY_SECONDS = 60.0
STANDING = Beat(
    rank=0,
    host="n1",
    pid=100,
    start="s",
    number=7,
    unix_seconds=0.0,
    phase="step",
    step=1200,
    marks=3,
    stalled_seconds=61.0,
    limit_seconds=60.0,
    at="pipeline/step.py:10 in phases",
    waits_in="all_reduce",
)


def world(**changes_by_rank):
    """Four ranks that wait in a collective, but for the changes given as r2={...} or r2=None."""
    sightings = []
    for rank in range(4):
        changes = changes_by_rank.get(f"r{rank}", {})
        lives = changes is not None
        beat = replace(STANDING, rank=rank, pid=100 + rank, host=f"n{rank // 2}", **(changes or {}))
        sightings.append(Sighting(rank, beat, lives))
    return sightings


def test_silence_counts_most():
    """Rank 1 stands in no collective and has fewer marks, but rank 2 says nothing any more."""
    verdict = judge(world(r1={"waits_in": "", "marks": 1}, r2=None), 62.4)
    assert verdict.behind == (2,)
    assert verdict.reason == (
        "hang: rank 2 (host n1, pid 102) gave no sign of life while the others waited 62 s in "
        'phase "step" of step 1,200; last seen in phase "step" of step 1,200: its process has '
        "ended or was stopped, its host is down, or it holds the interpreter's lock"
    )


def test_a_rank_that_never_came_up():
    sightings = world()
    sightings[3] = Sighting(3, None, False)
    verdict = judge(sightings, 600)
    assert verdict.behind == (3,)
    assert "hang: rank 3 gave no sign of life" in verdict.reason
    assert "; it did not come up in this start" in verdict.reason
    assert table(sightings)[3] == "  rank 3: never seen in this start"


def test_many_silent_ranks_are_counted():
    sightings = [Sighting(rank, None, rank == 0) for rank in range(9)]
    reason = judge(sightings, 60).reason
    assert "hang: rank 1, rank 2, rank 3, rank 4 and 4 more gave no sign of life" in reason


def test_not_waiting_while_the_others_wait():
    """Rank 3 has fewer marks, but it waits: only rank 1 can be what it waits for."""
    idle = {"waits_in": "", "phase": "data", "at": "pipeline/prefetch.py:50 in next"}
    verdict = judge(world(r1=idle, r3={"marks": 1}), 61)
    assert verdict.behind == (1,)
    assert verdict.reason == (
        'hang: rank 1 (host n0, pid 101) made no progress for 61 s, in phase "data" of step 1,200, '
        "at pipeline/prefetch.py:50 in next, while 3 other ranks wait in collectives"
    )


@pytest.mark.parametrize("fewest", [{"marks": 2}, {"step": 1199, "marks": 90}])
@pytest.mark.parametrize("waits_in", ["", "all_reduce"])
def test_fewest_signs_of_progress(fewest, waits_in):
    changes = {f"r{rank}": {"waits_in": waits_in} for rank in range(4)}
    changes["r2"] = {"waits_in": waits_in, **fewest}
    verdict = judge(world(**changes), 61)
    assert verdict.behind == (2,)
    assert verdict.reason.endswith("with the fewest signs of progress")


@pytest.mark.parametrize(
    ("waits_in", "says"), [("all_reduce", "wait for each other in collectives"), ("", "stand")]
)
def test_nothing_tells_the_ranks_apart(waits_in, says):
    verdict = judge(world(**{f"r{rank}": {"waits_in": waits_in} for rank in range(4)}), 61)
    assert verdict.behind == ()
    assert f"hang: no rank is behind; all 4 {says}" in verdict.reason
    assert "the network or a device does not answer" in verdict.reason


def test_a_world_of_one():
    verdict = judge([Sighting(0, replace(STANDING, waits_in="", phase="data"), True)], 61)
    assert verdict.behind == (0,)
    assert 'made no progress for 61 s, in phase "data"' in verdict.reason


def test_a_rank_whose_time_is_not_over_works():
    assert somebody_works(world(r0={"stalled_seconds": 3.0}))
    assert not somebody_works(world())
    silent = world()
    silent[0] = Sighting(0, replace(STANDING, stalled_seconds=3.0), False)
    assert not somebody_works(silent), "a rank that died while it worked"


def test_every_rank_has_a_line():
    lines = table(world(r1={"waits_in": ""}, r2=None))
    assert len(lines) == 4
    assert lines[0] == (
        '  rank 0 (host n0, pid 100): no progress for 61 s, in phase "step" of step 1,200, mark 3, '
        "at pipeline/step.py:10 in phases, waits in all_reduce"
    )
    assert "waits in" not in lines[1]
    assert "pid 102): NO SIGN OF LIFE, last seen in phase" in lines[2]


def test_a_beat_survives_its_file(tmp_path):
    STANDING.write(tmp_path)
    assert Beat.read(tmp_path, 0) == STANDING
    assert list(tmp_path.iterdir()) == [beat_file(tmp_path, 0)]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rank": 0}', '{"unknown": 1}'])
def test_what_is_no_beat_is_not_believed(tmp_path, text):
    assert Beat.read(tmp_path, 0) is None
    beat_file(tmp_path, 0).write_text(text)
    assert Beat.read(tmp_path, 0) is None


def test_only_a_change_is_a_sign_of_life(tmp_path):
    """Clocks play no part: the file of an earlier start may have any time in it."""
    for rank, start in enumerate(["s", "s", "earlier", "earlier"]):
        replace(STANDING, rank=rank, start=start, unix_seconds=9e9).write(tmp_path)
    watch = PeerWatch(tmp_path, 5, "s", LATELY_SECONDS)
    for rank in (1, 3):
        replace(STANDING, rank=rank, number=8).write(tmp_path)
    beat_file(tmp_path, 0).write_text("torn")  # what was known of it stays
    sightings = watch.look()
    assert [each.lives for each in sightings] == [False, True, False, True, False]
    assert [each.beat is not None for each in sightings] == [True, True, False, True, False]


def test_life_wears_off(tmp_path):
    STANDING.write(tmp_path)
    watch = PeerWatch(tmp_path, 1, "s", lately_seconds=0.0)
    replace(STANDING, number=8).write(tmp_path)
    assert [each.lives for each in watch.look()] == [False]
    assert watch.is_long_enough
    assert not PeerWatch(tmp_path, 1, "s", LATELY_SECONDS).is_long_enough


def test_a_rank_knows_itself_without_reading():
    silent = [Sighting(rank, None, False) for rank in range(2)]
    own, other = seen_by(silent, STANDING)
    assert own == Sighting(0, STANDING, True)
    assert other == silent[1]


def test_the_first_report_stays(tmp_path):
    path = tmp_path / "hang-s.txt"
    verdict = judge(world(r1={"waits_in": ""}), 61)
    assert publish(path, verdict, world())
    assert not publish(path, judge(world(r2={"waits_in": ""}), 61), world())
    assert path.read_text().splitlines()[0] == verdict.reason
    assert len(path.read_text().splitlines()) == 5


def place_while(target, left_out=False):
    """Where a thread is that calls `target(ready, done)` and waits there."""
    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=target, args=(ready, done), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        frames = {key: frame for key, frame in sys._current_frames().items() if key == thread.ident}
        return place_of(frames, -1 if left_out else thread.ident, [thread.ident] * left_out)
    finally:
        done.set()
        thread.join()


def compiled(path, name):
    """A function that waits and seems to come from another file."""
    source = f"def {name}(ready, done):\n    ready.set(); done.wait()\n"
    space = {}
    exec(compile(source, path, "exec"), space)
    return space[name]


@pytest.mark.parametrize(
    ("path", "name", "waits_in"),
    [
        ("/lib/torch/distributed/distributed_c10d.py", "barrier", "barrier"),
        ("/lib/deepspeed/comm/torch.py", "all_gather", "all_gather"),
        ("/lib/torch/cuda/__init__.py", "synchronize", "synchronize"),
        ("/lib/torch/cuda/__init__.py", "_lazy_init", ""),
        ("/lib/torch/distributed/run.py", "main", ""),
        ("/lib/somewhere/else.py", "work", ""),
    ],
)
def test_waiting_for_others_is_seen_in_the_frames(path, name, waits_in):
    function = compiled(path, name)

    def own_code(ready, done):
        function(ready, done)

    place = place_while(own_code)
    assert place.waits_in == waits_in
    assert place.at.startswith("pipeline/test_hang_report.py:")
    assert place.at.endswith("in own_code")


def test_the_watching_threads_are_left_out():
    collective = compiled("/lib/torch/distributed/distributed_c10d.py", "barrier")
    assert place_while(collective, left_out=True) == Place("", "")


def test_a_backward_pass_waits_in_a_thread_of_its_own():
    """The main thread, here this one, is in no collective; another thread of its process is."""
    ready, done = threading.Event(), threading.Event()
    collective = compiled("/lib/torch/distributed/distributed_c10d.py", "all_reduce")
    thread = threading.Thread(target=collective, args=(ready, done), daemon=True)
    thread.start()
    assert ready.wait(10)
    place = place_of(dict(sys._current_frames()), threading.get_ident(), ())
    done.set()
    thread.join()
    assert place.waits_in == "all_reduce"
    assert place.at.endswith("in test_a_backward_pass_waits_in_a_thread_of_its_own")
