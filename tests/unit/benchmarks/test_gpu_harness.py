"""The driver of GPU benchmarks, on a CPU: budget, crashes, kills, wheels, and the cells."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.modeling import compiled as compiled_module
from pipeline.modeling.compiled import compiled
from tests.benchmarks import gpu, gpu_cells, gpu_steps, gpu_wheels
from tests.benchmarks.gpu_bench import Bench
from tests.benchmarks.gpu_results import Cell, ResultFile, run_cells
from tests.benchmarks.run import GPU_FILES

CPU = torch.device("cpu")
# Dynamo looks at every argument's gradient, and hides the warning where warnings are not errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
BENCH = Bench(CPU)


@pytest.fixture
def without_compiler(monkeypatch):
    """Graphs are made, but not compiled."""
    compiled.cache_clear()
    monkeypatch.setattr(compiled_module, "BACKEND", "aot_eager")
    yield
    compiled.cache_clear()


class Clock:
    """Time that only cells move."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def cell(self, name, seconds, error=None):
        def run():
            self.now += seconds
            if error is not None:
                raise error
            return {"ratio": 2.0}

        return Cell(name, run)


def result_file(folder, run_id="one", part="step"):
    return ResultFile(folder, part, "tiny", "cpu", run_id)


def statuses(results):
    document = json.loads(results.path.read_text())
    return {name: cell["status"] for name, cell in document["cells"].items()}


def test_cells_run_in_order_until_the_next_one_would_not_fit(tmp_path):
    clock, results, said = Clock(), result_file(tmp_path), []
    cells = [clock.cell("a", 10), clock.cell("b", 30), clock.cell("c", 1), clock.cell("d", 1)]
    run_cells(cells, results, 170.0, clock=clock, say=said.append)
    # b took 30: c may take 37.5, and 30 are left.
    assert statuses(results) == dict(zip("abcd", ["measured"] * 2 + ["left out"] * 2, strict=True))
    assert said[0] == "a: measured in 10.0 s: ratio 2"
    assert said[2:] == ["c: left out, no time", "d: left out, no time"]


def test_a_cell_is_on_disk_before_the_next_one_begins(tmp_path):
    results, seen = result_file(tmp_path), []
    cells = [
        Cell("a", lambda: {"ratio": 3.0}),
        Cell("b", lambda: seen.append(statuses(results)) or {}),
    ]
    run_cells(cells, results, time.monotonic() + 60, say=seen.append)
    assert seen[1] == {"a": "measured", "b": "running"}
    assert json.loads(results.path.read_text())["cells"]["a"]["ratio"] == 3.0


def test_a_cell_that_raises_is_a_result_and_the_others_go_on(tmp_path):
    clock, results = Clock(), result_file(tmp_path)
    cells = [clock.cell("a", 1, RuntimeError("no such kernel")), clock.cell("b", 1)]
    run_cells(cells, results, 900.0, clock=clock, say=lambda _: None)
    assert statuses(results) == {"a": "failed", "b": "measured"}
    document = json.loads(results.path.read_text())
    assert document["cells"]["a"]["reason"] == "RuntimeError: no such kernel"


def test_a_cell_that_breaks_the_device_ends_the_process(tmp_path):
    clock, results = Clock(), result_file(tmp_path)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    cells = [clock.cell("a", 1, error), clock.cell("b", 1)]
    with pytest.raises(SystemExit, match="70"):
        run_cells(cells, results, 900.0, clock=clock, say=lambda _: None)
    assert statuses(results) == {"a": "failed"}
    run_cells(cells, result_file(tmp_path), 900.0, clock=clock, say=lambda _: None)
    assert statuses(results) == {"a": "failed", "b": "measured"}


def test_behind_a_crash_the_same_run_goes_on_and_another_begins_again(tmp_path):
    clock, results = Clock(), result_file(tmp_path)
    run_cells([clock.cell("a", 1)], results, 900.0, clock=clock, say=lambda _: None)
    results.put("b", "running")
    again = result_file(tmp_path)
    log = []
    cells = [
        Cell("a", lambda: log.append("a") or {}),
        Cell("b", lambda: log.append("b") or {}),
        Cell("c", lambda: log.append("c") or {}),
    ]
    run_cells(cells, again, 900.0, clock=clock, say=lambda _: None)
    assert log == ["c"]
    assert statuses(again) == {"a": "measured", "b": "failed", "c": "measured"}
    assert json.loads(again.path.read_text())["cells"]["b"]["reason"] == "the process ended in it"
    run_cells(cells, result_file(tmp_path, "two"), 900.0, clock=clock, say=lambda _: None)
    assert log == ["c", "a", "b", "c"]


def test_what_is_left_out_keeps_an_earlier_result_of_the_same_versions(tmp_path):
    clock, results = Clock(), result_file(tmp_path)
    run_cells([clock.cell("a", 1)], results, 900.0, clock=clock, say=lambda _: None)
    later = result_file(tmp_path, "two")
    run_cells([clock.cell("a", 1)], later, 0.0, clock=clock, say=lambda _: None)
    assert statuses(later) == {"a": "measured"}
    document = json.loads(later.path.read_text())
    document["versions"]["torch"] = "1.0"
    later.path.write_text(json.dumps(document))
    assert result_file(tmp_path, "three").document["cells"] == {}


def test_a_process_and_its_children_are_killed_at_the_end_of_the_budget(tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    start = time.monotonic()
    while not pid_file.exists() or not pid_file.read_text():
        found = gpu.supervise([sys.executable, "-c", code], time.monotonic() + 3, dict(os.environ))
        assert found is None
    assert time.monotonic() - start < 60
    status = Path(f"/proc/{pid_file.read_text()}/stat")
    deadline = time.monotonic() + 30
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child of the killed process still runs"
        time.sleep(0.05)


def test_a_process_that_ends_gives_its_exit_code():
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert gpu.supervise(command, time.monotonic() + 60, dict(os.environ)) == 3


def options(folder, **changes):
    words = {"size": "tiny", "device": "cpu", "results": folder}
    return SimpleNamespace(**{**words, **changes})


def test_the_driver_starts_again_behind_crashes_and_gives_up_in_the_end(tmp_path, monkeypatch):
    codes, commands = iter([-11, -11, 0]), []

    def supervise(command, _deadline, _env):
        commands.append(command)
        return next(codes)

    monkeypatch.setattr(gpu, "supervise", supervise)
    assert gpu.run_part("step", options(tmp_path), time.monotonic() + 60, {}) == 0
    assert len(commands) == 3
    runs = {command[command.index("--run-id") + 1] for command in commands}
    assert len(runs) == 1
    codes = iter([-11] * 99)
    assert gpu.run_part("step", options(tmp_path), time.monotonic() + 60, {}) == 1
    assert len(commands) == 3 + gpu.MAX_STARTS


def test_all_parts_share_one_budget(tmp_path, monkeypatch):
    seen = []

    def run_part(part, _options, deadline, _env):
        seen.append((part, deadline - time.monotonic()))
        return 0

    monkeypatch.setattr(gpu, "run_part", run_part)
    words = ["--device", "cpu", "--size", "tiny", "--results", str(tmp_path)]
    assert gpu.main([*words, "--budget-seconds", "100"]) == 0
    assert [part for part, _ in seen] == list(gpu.PARTS)
    # Nothing was used, so that each one gets what the ones before it have left.
    assert [round(seconds) for _, seconds in seen] == [25, 33, 50, 100]
    seen.clear()
    assert gpu.main([*words, "--part", "layer"]) == 0
    assert [(part, round(seconds)) for part, seconds in seen] == [("layer", 480)]


def test_what_a_cpu_tries_is_never_taken_for_a_gpu(tmp_path, capsys):
    tried = result_file(tmp_path, "one")
    tried.put("cell", "measured", ratio=2.0)
    assert tried.path.name.startswith("smoke-")
    assert tried.document["benchmark"].startswith("smoke-")
    assert list(tmp_path.glob(GPU_FILES)) == []
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--size", "tiny"])
    assert "measures no GPU: give it its --results" in capsys.readouterr().err


HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheels_folder(folder, content="VALUE = 7\n", python=HERE):
    folder.mkdir()
    wheel = folder / "carried-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carried/__init__.py", content)
    document = {**gpu_wheels.manifest(folder), "python": python}
    (folder / gpu_wheels.MANIFEST).write_text(json.dumps(document))
    return wheel


def test_unpacked_wheels_are_importable_by_the_children(tmp_path):
    wheels_folder(tmp_path / "wheels")
    gpu.unpack(tmp_path / "wheels", tmp_path / "packages")
    env = gpu.environment("cpu", tmp_path / "packages")
    code = "import carried, pipeline; print(carried.VALUE)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr


def test_wheels_of_another_python_are_refused(tmp_path):
    wheels_folder(tmp_path / "wheels", python="3.99")
    with pytest.raises(SystemExit, match=rf"is for Python 3\.99, and this is {HERE}: no --wheels"):
        gpu.unpack(tmp_path / "wheels", tmp_path / "packages")


def test_a_wheel_that_is_not_the_manifests_is_refused(tmp_path):
    wheel = wheels_folder(tmp_path / "wheels")
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(SystemExit, match=r"carried-1.0.* is not the file of manifest.json: run"):
        gpu.unpack(tmp_path / "wheels", tmp_path / "packages")
    assert not (tmp_path / "packages").exists()


def test_wheels_of_another_platform_twice_or_too_many_are_refused(tmp_path, monkeypatch):
    for name in ("a-1-py3-none-any.whl", "b-1-cp312-cp312-manylinux_2_17_x86_64.whl"):
        (tmp_path / name).write_bytes(b"12345")
    document = gpu_wheels.manifest(tmp_path)
    assert document["bytes"] == 10
    assert [entry["distribution"] for entry in document["wheels"].values()] == ["a", "b"]
    monkeypatch.setattr(gpu_wheels, "MAX_BYTES", 9)
    with pytest.raises(SystemExit, match="more than 64"):
        gpu_wheels.manifest(tmp_path)
    (tmp_path / "a-2-py3-none-any.whl").write_bytes(b"1")
    with pytest.raises(SystemExit, match="two versions of a: remove one and run again"):
        gpu_wheels.manifest(tmp_path)
    (tmp_path / "c-1-cp312-cp312-win_amd64.whl").write_bytes(b"1")
    with pytest.raises(SystemExit, match=r"c-1-cp312-cp312-win_amd64\.whl is of another platform"):
        gpu_wheels.manifest(tmp_path)


def test_carried_versions_are_those_of_the_constraints():
    wanted = gpu_wheels.pinned([*gpu_wheels.DOWNLOADED, *gpu_wheels.BUILT])
    assert "deepspeed==0.19.8" in wanted
    assert all("==" in each for each in wanted)
    with pytest.raises(SystemExit, match=r"constraints.txt has no version of torchvision"):
        gpu_wheels.pinned(["torchvision"])


@pytest.mark.parametrize("part", ["attention", "layer"])
@pytest.mark.usefixtures("without_compiler")
def test_a_peer_of_the_attention_and_of_the_layer_is_measured_on_a_cpu(tmp_path, part):
    results = result_file(tmp_path, part=part)
    cells = gpu_cells.make_cells(part, "tiny", BENCH, results)
    (cell,) = (each for each in cells if each.name == "2 x 32: transformers")
    run_cells([cell], results, time.monotonic() + 200, say=lambda _: None)
    figures = json.loads(results.path.read_text())["cells"][cell.name]
    assert figures["status"] == "measured", figures
    assert figures["ratio"] > 0
    assert figures["tokens_per_second"] > 0
    assert set(figures["differences"]) == {"output", "gradient of x", "gradient of the table"}
    assert max(figures["differences"].values()) < 1e-5


def test_every_part_has_its_peers_in_the_order_of_their_value(tmp_path):
    names = {
        part: [c.name for c in gpu_cells.make_cells(part, "tiny", BENCH, result_file(tmp_path))]
        for part in ("attention", "layer", "step", "tests")
    }
    for part in ("attention", "layer"):
        assert names[part][0].endswith("32: transformers")
        for peer in ("disentangled-flash", "transformers, compiled", "flashdeberta"):
            assert any(peer in name for name in names[part])
    assert len({name.split(":")[0] for name in names["attention"]}) == 4
    assert names["step"][:4] == [
        "transformers",
        "transformers, compiled, masked logits",
        "transformers, masked logits, disentangled-flash",
        gpu_steps.WITH_ADAMW,
    ]
    assert "test_device_habits" in names["tests"]
    for part in names:
        assert len(set(names[part])) == len(names[part])


def test_a_file_of_tests_is_a_cell(tmp_path):
    path = tmp_path / "test_two.py"
    path.write_text("def test_good(): pass\ndef test_bad(): raise AssertionError\n")
    figures = gpu_cells.run_tests(path, "cpu")
    assert figures == {"passed": 1, "failed_tests": 1, "skipped": 0, "failures": ["test_bad"]}
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(RuntimeError, match="pytest ended with 2"):
        gpu_cells.run_tests(path, "cpu")
