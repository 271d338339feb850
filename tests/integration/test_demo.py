"""`deberta demo` as a user runs it, with a short training."""

import json
import subprocess
import sys

import pytest

from tests.worlds import ROOT, environment

SHORT = ("schedule.max_steps=12", "schedule.warmup_steps=2", "evaluation.interval_steps=6")


def demo(output, *words):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "demo", "--output", str(output), *words],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.timeout(1200)
def test_demo_goes_the_whole_way_and_goes_on(tmp_path):
    output = tmp_path / "demo"
    code, out, err = demo(output, *SHORT)
    assert code == 0, err
    figures = json.loads((output / "figures.json").read_text())
    assert figures["last"]["step"] == 12
    # The same held-out figures by another way: the exported files, loaded again.
    exported = figures["heldout"]["heldout"]["figures"]
    assert exported["eval/mlm_loss"] == pytest.approx(figures["last"]["eval/mlm_loss"], rel=1e-5)
    assert 5 < figures["unigram_entropy"] < 8
    for line in ("AutoModel.from_pretrained", "total", "unigram entropy"):
        assert line in out
    code, out, err = demo(output, *SHORT)
    assert code == 0, err
    assert "already there" in out
    assert "nothing left to do" in out


def test_demo_leaves_other_folders_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, err = demo(tmp_path)
    assert code == 2
    assert "is not empty and was not made by the demo" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
