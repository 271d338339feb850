"""An export that is killed leaves nothing or the whole model, with the trainer's numbers."""

import hashlib
import signal
import time

import pytest

from tests.faults.harness import Setup

pytestmark = pytest.mark.distributed


def content(folder):
    """By name: sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.row(32)
@pytest.mark.faults
@pytest.mark.parametrize(("embedding_sharing", "kills"), [("gdes", 3), ("es", 1)])
def test_export_is_killed_at_any_moment(embedding_sharing, kills, lab, tmp_path, note):
    words = (f"objective.embedding_sharing={embedding_sharing}",)
    if embedding_sharing == "es":
        words += ("objective.update=joint",)
    run = lab.reference_folder(Setup(words=words))
    begun = time.monotonic()
    with lab.start_command("export", run, tmp_path / "whole", folder=tmp_path / "a") as running:
        outcome = running.wait()
    took = time.monotonic() - begun
    assert outcome.codes == [0], outcome.output  # it compares its logits with the trainer's
    whole = content(tmp_path / "whole")
    assert any(name.endswith("model.safetensors") for name in whole)
    finished = 0
    for number in range(kills):
        output = tmp_path / f"killed-{number}" / "model"
        output.parent.mkdir()
        with lab.start_command("export", run, output, folder=tmp_path / "a") as running:
            time.sleep(took * (number + 0.5) / kills)
            running.signal(signal.SIGKILL)
            running.wait()
        if output.exists():
            assert content(output) == whole
            finished += 1
        else:
            with lab.start_command("export", run, output, folder=tmp_path / "a") as running:
                assert running.wait().codes == [0]
            assert content(output) == whole
        left = [path.name for path in output.parent.iterdir() if path != output]
        assert not left, "what a killed export left behind is still there"
    note(
        f"SIGKILL at {kills} moments of an export, {embedding_sharing}",
        f"{kills - finished} times nothing, {finished} times all of it; same bytes when repeated",
    )
