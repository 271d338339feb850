"""What `deberta doctor` says of DeepSpeed and its compiler, without the seconds of importing it."""

import os
import shutil
import time

import pytest

from pipeline.preflight import deepspeed_ops
from pipeline.preflight.children import Answer, ask, child_environment
from pipeline.preflight.deepspeed_ops import look_at_deepspeed, stale_lock

FACTS = {
    "version": "0.19.8",
    "compatible": ["cpu_adam", "pin_memory"],
    "has_ninja": True,
    "compiler": "c++",
    "flags": ["-O3", "-fopenmp"],
}
COMPILES = pytest.mark.skipif(shutil.which("c++") is None, reason="no c++ is installed")


@pytest.fixture
def look(monkeypatch, tmp_path):
    """Lines where DeepSpeed says FACTS, or what is given."""

    def at(**changes):
        facts = {**FACTS, "folder": str(tmp_path), **changes}
        monkeypatch.setattr(deepspeed_ops, "_facts", lambda answer: facts)
        monkeypatch.setattr(deepspeed_ops.sys, "executable", "/bin/true")
        return [finding.line for finding in look_at_deepspeed("n", os.environ, False)]

    return at


def planted(folder, source):
    """A package of DeepSpeed's name that is found before it; the variables for it."""
    package = folder / "deepspeed" / "ops" / "op_builder"
    package.mkdir(parents=True)
    (folder / "deepspeed" / "__init__.py").write_text(source)
    for each in (package.parent, package):
        (each / "__init__.py").write_text(source)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_a_deepspeed_that_cannot_be_imported(tmp_path):
    variables = planted(tmp_path, "raise ImportError('libfoo.so.1: cannot open')")
    (finding,) = look_at_deepspeed("n", variables, False)
    assert finding.line == (
        "n deepspeed: FAIL, cannot be imported: ImportError: libfoo.so.1: cannot open; python -c "
        "'import deepspeed' shows all of it; see the lines of packages"
    )


@COMPILES
def test_a_compiler_that_works(look):
    deepspeed, compiler, build = look()
    assert deepspeed == "n deepspeed: ok, 0.19.8, ops that could be built: cpu_adam, pin_memory"
    assert compiler == "n compiler: ok, c++ compiles with OpenMP; ninja is there"
    assert build.startswith("n offload build: ok, not tried: it takes a minute or two at the first")


def test_compilers_that_do_not(look, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text(
        "#!/bin/sh\necho 'try.cpp:1:10: fatal error: omp.h: No such file' >&2; exit 1\n"
    )
    broken.chmod(0o755)
    for_offload = "; needed for offload_optimizer alone (ds_configs/zero2_bf16_offload.json)"
    for changes, words in (
        ({"compiler": str(broken)}, "try.cpp:1:10: fatal error: omp.h: No such file; install g++"),
        ({"compiler": "/no/c++"}, "/no/c++: No such file or directory; install g++ 9 or newer"),
        (
            {"has_ninja": False},
            "ninja is not found; pip install ninja, and have its folder in PATH",
        ),
        (
            {"compatible": []},
            "DeepSpeed says that its cpu_adam cannot be built here; see `ds_report`",
        ),
    ):
        _, line, _ = look(**changes)
        assert line.startswith("n compiler: warning, ")
        assert words in line
        assert line.endswith(for_offload)


@COMPILES
def test_flags_that_the_processor_cannot_run(look, tmp_path):
    wrapper = tmp_path / "crash-c++"
    program = "#!/bin/sh\\nkill -ILL \\$\\$"
    script = f'for last; do :; done\nprintf "{program}" > "$last"\nchmod +x "$last"'
    wrapper.write_text(f"#!/bin/sh\n{script}\n")
    wrapper.chmod(0o755)
    _, line, _ = look(compiler=str(wrapper))
    assert line.startswith(f"n compiler: warning, {wrapper}: exit code -4; install g++")


def test_builds_of_before(look, tmp_path):
    (tmp_path / "cpu_adam.so").touch()
    assert look()[2] == f"n offload build: ok, done before, in {tmp_path}"
    lock = tmp_path / "lock"
    lock.touch()
    assert stale_lock(tmp_path) is None, "somebody compiles"
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    assert look()[2] == (
        f"n offload build: warning, {lock} was left by a build that was killed; offloading would "
        f"wait for it for ever; end whoever still compiles, then: rm {lock}"
    )
    line = look(folder_problem="[Errno 30] Read-only file system: '/x'")[2]
    assert line.startswith(
        "n offload build: warning, [Errno 30] Read-only file system: '/x'; set TORC"
    )


@pytest.mark.parametrize(
    ("body", "ok", "words"),
    [
        ("pass", True, "cpu_adam built and loaded in "),
        ("raise RuntimeError('Error building extension')", False, "RuntimeError: Error building"),
    ],
)
def test_builds(body, ok, words, tmp_path):
    source = f"class CPUAdamBuilder:\n    def load(self, verbose):\n        {body}\n"
    variables = planted(tmp_path, source)
    finding = deepspeed_ops._build("n", child_environment(variables))
    assert finding.ok is ok
    assert words in finding.text
    assert ok or "TORCH_EXTENSIONS_DIR must be a folder" in finding.cure


def test_programs_that_do_not_end(tmp_path):
    answer = ask(["/bin/sh", "-c", "sleep 600 & echo began; wait"], os.environ, 0.5)
    # Had its own child lived on, its pipe would still be open.
    assert answer == Answer(None, "began\n", "\nno end within 0 s")
    assert answer.reason == "no end within 0 s"
    answer = ask([str(tmp_path / "none")], os.environ, 1)
    assert answer.reason == f"{tmp_path / 'none'}: No such file or directory"
    assert Answer(7, "", "----\n").reason == "exit code 7"


def test_children_have_no_launcher():
    variables = {
        "RANK": "3",
        "SLURM_STEP_ID": "0",
        "PMI_RANK": "1",
        "HOME": "/h",
        "PYTHONPATH": "/x",
    }
    found = child_environment(variables, WORLD_SIZE="2")
    assert {**found, "PYTHONPATH": ""} == {"HOME": "/h", "WORLD_SIZE": "2", "PYTHONPATH": ""}
    assert found["PYTHONPATH"].endswith(":/x")
