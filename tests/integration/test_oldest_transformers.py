"""Exports under the oldest transformers of our range, as under the one that is installed.

`export_run` itself compares states, scores, keys and token ids in a process of its own with the
trainer's numbers; here that process finds the oldest version, kept beside the environment.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import transformers
from filelock import FileLock

from pipeline.export import export_run
from tests.commits import run_config, write_commit
from tests.worlds import ROOT

PLACE = Path(sys.prefix) / "oldest-transformers"


def oldest_version():
    """The lower end of the range in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (found,) = re.findall(r"^transformers>=([\d.]+)", "\n".join(project["dependencies"]), re.M)
    return found if found.count(".") == 2 else f"{found}.0"


@pytest.fixture(scope="module")
def oldest():
    """A folder with that version and what it needs (another huggingface_hub), installed once."""
    folder = PLACE / oldest_version()
    try:
        PLACE.mkdir(exist_ok=True)
        with FileLock(PLACE / "lock"):
            if not folder.is_dir():
                install(folder)
    except OSError as error:
        pytest.skip(f"{PLACE} cannot be written: {error}")
    return folder


def install(folder):
    partial = folder.with_suffix(".partial")
    words = ("install", "--quiet", "--no-compile", "--upgrade", "--retries", "1")
    package = f"transformers=={oldest_version()}"
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--target", str(partial), package],
        capture_output=True,
        text=True,
        timeout=200,
    )
    if done.returncode:
        pytest.skip(f"{package} cannot be installed here: {done.stderr.strip()[-300:]}")
    partial.rename(folder)


def test_exports_load_in_the_oldest(oldest, dataset_folder, tmp_path, monkeypatch):
    assert transformers.__version__ != oldest_version(), "tests/unit proves the installed one"
    write_commit(run_config(dataset_folder, tmp_path / "run"), 7)
    monkeypatch.setenv("PYTHONPATH", str(oldest))
    proof = export_run(tmp_path / "run", tmp_path / "export").verification
    assert proof.versions["transformers"] == oldest_version()
    assert {(p.network, p.kind) for p in proof.parities} == {
        ("generator", "states"),
        ("discriminator", "states"),
        ("discriminator", "scores"),
    }
