"""`deberta train --profile` and `--memory-snapshot` as a user types them, with a slow loader."""

import gzip
import json

import pytest

from tests.worlds import train

SLEEP_SECONDS = 2.0


def figures(line):
    """Name and milliseconds on the host of a row of the table, and its share."""
    name, _calls, host, device, share = (cell.strip() for cell in line.strip("|").split("|"))
    assert device == "", "there is no GPU here"
    return name, float(host), float(share.removesuffix("%"))


def test_a_profiled_run_with_a_slow_loader(
    tiny_run, deepspeed_json, dataset_folder, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    monkeypatch.setenv("DEBERTA_FAULT", f"data.read:0:0:sleep:{SLEEP_SECONDS}")
    words = ("schedule.max_steps=4", "logging.interval_steps=1")
    measured = ("--profile", "2-3", "--memory-snapshot", "3")
    arguments = (tiny_run(), deepspeed_json(1), dataset_folder, folder)
    code, output = train(*arguments, *words, *measured)
    assert code == 0, output
    stem = folder / "profile" / "rank-00000-steps-2-3"
    trace, table = (
        stem.with_name(f"{stem.name}.pt.trace.json.gz"),
        stem.with_name(f"{stem.name}.md"),
    )
    assert f"profile of 2 steps: {trace}" in output
    assert "--memory-snapshot 3 needs a GPU: no snapshot is written" in output
    assert not list(folder.rglob("*.pickle"))

    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    ranges = [event["name"] for event in events if event.get("ph") == "X"]
    lines = [figures(line) for line in table.read_text().splitlines()[2:]]
    names = [name for name, *_ in lines]
    end = names.index("**step**")
    for network in ("generator", "discriminator"):
        for part in ("forward", "backward", "update"):
            assert ranges.count(f"{network} {part}") >= 2
            assert f"{network} {part}" in names[:end]
    assert {"data", "masks", "sums"} <= {*names[:end]}
    assert {"of which draw", "of which vocabulary head"} == {*names[end + 1 :]}
    # Every figure is rounded to a hundredth of a millisecond, or to a tenth of a percent.
    _, whole, all_of_it = lines[end]
    assert sum(host for _, host, _ in lines[:end]) == pytest.approx(whole, abs=0.01 * end)
    assert sum(share for *_, share in lines[:end]) == pytest.approx(100.0, abs=0.1 * end)
    assert all_of_it == 100.0

    everything = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = [row for row in everything if "perf/step_seconds" in row]
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(0.0 <= row["perf/data_wait_fraction"] <= 1.0 for row in found)
    assert all("perf/mfu" not in row for row in found), "nobody knows this CPU's peak"
    waited_seconds = found[0]["perf/data_wait_fraction"] * found[0]["perf/step_seconds"]
    assert waited_seconds > SLEEP_SECONDS / 2, "the first batch came after the sleep"
