"""What others could see of a run: its files, its output and its sockets."""

import json
import re
from pathlib import Path

import psutil
import pytest

from tests.faults.harness import Setup
from tests.worlds import ROOT

SECRETS = {
    "HF_TOKEN": "hf_0c5wNotARealTokenButOneThatLooksLikeIt",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYNOTAREALKEY",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdefnotakey",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.notarealone",
    "http_proxy": "http://alice:hunter2proxy@localhost:9",
}


def holders(folder, secrets):
    """Files below a folder, by content or name, that hold one of some secrets."""
    return [
        (path.name, secret)
        for path in folder.rglob("*")
        for secret in secrets
        if secret in str(path) or (path.is_file() and secret.encode() in path.read_bytes())
    ]


@pytest.mark.row(31)
def test_no_file_of_a_run_holds_a_secret_of_its_environment(lab, tmp_path, note):
    """Started, killed in a step, resumed, stopped: everything that writes has written."""
    setup, run = Setup(), tmp_path / "run"
    crashed = lab.run(run, setup, fault="step.begin:0:6:raise", variables=SECRETS)
    assert crashed.codes != [0]
    done = lab.run(run, setup, variables=SECRETS)
    assert done.codes == [0], done.output
    secrets = [*SECRETS.values(), "hunter2proxy"]
    assert not holders(run, secrets)
    assert not [secret for secret in secrets if secret in crashed.output + done.output]
    kinds = {path.name.partition(".tfevents")[0] for path in run.rglob("*") if path.is_file()}
    written = {"config.resolved.json", "environment.json", "metrics.jsonl", "state.json"}
    assert kinds >= {*written, "restarts.jsonl", "events.out", "rank-00000.log"}
    known = {"deberta-pretrain", "torch", "deepspeed", "numpy", "safetensors", "python"}
    values = json.loads((run / "environment.json").read_text())
    assert {*values} >= known
    assert all(re.fullmatch(r"[\w.+() -]*", value) for value in values.values())
    note(f"{', '.join(SECRETS)} in the environment", f"in none of {len(kinds)} kinds of files")


@pytest.mark.row(31)
@pytest.mark.parametrize("key", ["data.path", "initialize.path"])
def test_a_url_with_a_password_is_refused_without_it(lab, tmp_path, key, note):
    url = "https://alice:hunter2@store/model"
    if key == "data.path":
        outcome = lab.run(tmp_path / "run", Setup(), dataset=url)
    else:
        outcome = lab.run(tmp_path / "run", Setup(), f"{key}={url}")
    assert outcome.codes == [2], outcome.output
    assert "store/model" in outcome.output
    assert "hunter2" not in outcome.output
    assert not holders(tmp_path / "run", ["hunter2"])
    note(f"a URL with a password as {key}", "2; the message leaves it out")


def listeners(pid):
    """(address, port) at which a process or one of its children waits for connections."""
    everybody = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    connections = [c for process in everybody for c in process.net_connections("inet")]
    return {(*c.laddr,) for c in connections if c.status == psutil.CONN_LISTEN}


LOOPBACK = {"127.0.0.1", "::1"}


@pytest.mark.row(31)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_listens_to_nobody_else(lab, tmp_path, ranks, note):
    """Alone a rank listens on the loopback; among others torch's store does so for all of them."""
    run = tmp_path / "run"
    with lab.start(run, Setup(ranks), fault="step.begin:0:6:sleep:60") as running:
        running.until_begun(6)
        found = [listeners(pid) for pid in running.pids()]
    strange = [{place for place in places if place[0] not in LOOPBACK} for places in found]
    assert len(strange[0]) <= ranks - 1, "more than the store that torch keeps on rank 0"
    assert not set().union(*strange[1:])
    note(f"sockets of {ranks} ranks", f"{len(strange[0])} beside the loopback (torch's store)")


README = ROOT / "README.md"
DOCUMENTS = [README, *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "slurm").iterdir())]


@pytest.mark.row(31)
def test_dashboards_are_shown_on_this_machine_alone(note):
    lines = [
        line.strip()
        for path in DOCUMENTS
        if path.is_file()
        for line in path.read_text().splitlines()
        if "tensorboard --logdir" in line
    ]
    assert lines
    for line in lines:
        assert "--host localhost" in line or "--host 127.0.0.1" in line, line
    note("the README's line for TensorBoard", "--host localhost")


def test_holders_are_found(tmp_path):
    (tmp_path / "a").write_text("x hunter2 y")
    (tmp_path / "hunter2").mkdir()
    assert {name for name, _ in holders(tmp_path, ["hunter2"])} == {"a", "hunter2"}
    assert isinstance(README, Path)
