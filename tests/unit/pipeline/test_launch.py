"""Files and command lines for several hosts, and what a supervisor makes of launchers' ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline import cli
from pipeline.launch.commands import (
    LAUNCHERS,
    SSH_OPTIONS,
    Launch,
    check_mpi,
    check_words,
    command_line,
    launcher_variables,
)
from pipeline.launch.forward import deepspeed_env, forwarded
from pipeline.launch.hosts import Host, hostfile, parse_hosts
from pipeline.launch.supervise import Supervisor

ROOT = Path(__file__).parents[3]


def test_hosts():
    hosts = parse_hosts("n1:2, n2.lan:4")
    assert hosts == [Host("n1", 2), Host("n2.lan", 4)]
    assert hostfile(hosts) == "n1 slots=2\nn2.lan slots=4\n"


@pytest.mark.parametrize(
    "text", ["n1", "n1:0", "n1:x", ":2", "n1:2,,n2:2", "-o:1", "a;b:1", "$(x):1"]
)
def test_what_are_no_hosts(text):
    with pytest.raises(UserError, match="write hosts as n1:8,n2:8"):
        parse_hosts(text)


def test_a_host_that_comes_twice():
    with pytest.raises(UserError, match="n1 comes twice; add up its ranks"):
        parse_hosts("n1:2,n2:2,n1:2")


def test_what_goes_to_the_other_hosts():
    variables = {
        "NCCL_DEBUG": "WARN",
        "GLOO_SOCKET_IFNAME": "eth0",
        "DS_ACCELERATOR": "cpu",
        "HF_TOKEN": "secret",
        "NCCL_API_KEY": "secret",
        "OMP_NUM_THREADS": "",
        "PATH": "/a/bin:/b/bin",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "0",
        "MINE": "yes",
    }
    found = forwarded(variables, ["MINE"])
    assert found == {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "MINE": "yes",
        "NCCL_DEBUG": "WARN",
        "PATH": "/a/bin:/b/bin",
    }
    assert forwarded(variables, ["HF_TOKEN"])["HF_TOKEN"] == "secret", "asked for by name"


@pytest.mark.parametrize("value", ["a b", "$(reboot)", "`x`", 'a"b', "a\nb", "a;b", "é"])
def test_values_that_a_shell_would_change(value):
    with pytest.raises(UserError) as caught:
        forwarded({"NCCL_X": value}, [])
    assert f"NCCL_X={value!r} would not reach the other hosts as it is" in str(caught.value)


def test_a_name_that_is_not_set():
    with pytest.raises(UserError, match="--export NOWHERE: there is no such variable"):
        forwarded({}, ["NOWHERE"])


def test_deepspeed_reads_what_is_written():
    """As launcher/runner.py of DeepSpeed 0.19.8 does, which a blank line or a comment ends."""
    variables = {"A": "1", "NCCL_SOCKET_IFNAME": "=eth0"}
    lines = deepspeed_env(variables).splitlines(keepends=True)
    read = dict(line.split("=", maxsplit=1) for line in lines)
    assert {key.strip(): value.strip() for key, value in read.items()} == variables


@pytest.fixture
def launch(tmp_path):
    hosts = [Host("n1", 2), Host("n2", 2)]
    words = ["--config", "tiny.toml", "run.folder=run"]
    files = (tmp_path / "hostfile", tmp_path / "deepspeed_env")
    return Launch(hosts, 29500, words, *files, {"DS_ACCELERATOR": "cpu"})


def test_command_lines(launch, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = {launcher: command_line(launch, launcher) for launcher in LAUNCHERS}
    for words in lines.values():
        assert " ".join(words).endswith("pipeline.train --config tiny.toml run.folder=run")
    for launcher in ("pdsh", "openmpi"):
        text = " ".join(lines[launcher])
        assert f"--launcher {launcher} --force_multi --master_addr n1 --master_port 29500" in text
    assert "-x MASTER_ADDR=n1 -x MASTER_PORT=29500" in " ".join(lines["mpirun"])
    assert lines["torchrun"][:6] == ["pdsh", "-S", "-f", "1024", "-w", "n1,n2"]
    remote = lines["torchrun"][6]
    assert remote.startswith(f"export DS_ACCELERATOR=cpu; cd {tmp_path}; ")
    assert "--nnodes 2 --nproc_per_node 2 --node_rank %n --master_addr n1" in remote


@pytest.mark.parametrize("word", ["a b", "x=$(reboot)", "x=[1]", "x='1'", "a;b"])
def test_words_that_a_shell_would_change(launch, word):
    launch.words.append(word)
    with pytest.raises(UserError) as caught:
        check_words(launch, "pdsh")
    assert f"{word!r} would not reach the other hosts as it is" in str(caught.value)
    assert "put the key into the TOML" in str(caught.value)


def test_unequal_hosts(launch):
    launch.hosts.append(Host("n3", 1))
    check_words(launch, "pdsh")
    with pytest.raises(UserError, match="as many ranks on every host; use pdsh"):
        check_words(launch, "torchrun")


@pytest.mark.parametrize("says", ["HYDRA build details:", None])
def test_an_mpirun_of_another_mpi(says, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if says:
        (tmp_path / "mpirun").write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / "mpirun").chmod(0o755)
    check_mpi("pdsh")
    with pytest.raises(UserError) as caught:
        check_mpi("openmpi")
    assert "needs Open MPI's mpirun, and the first one in PATH says" in str(caught.value)
    assert (says or "mpirun") in str(caught.value)
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    (tmp_path / "mpirun").chmod(0o755)
    check_mpi("openmpi")


def test_the_users_own_ssh_options_come_first(launch):
    found = launcher_variables(launch, {"PDSH_SSH_ARGS_APPEND": "-p 2222", "X": "1"})
    assert found["PDSH_SSH_ARGS_APPEND"] == f"-p 2222 {SSH_OPTIONS}"
    assert found["DS_ENV_FILE"] == str(launch.deepspeed_env)
    assert found["X"] == "1"


WRITE = """
import json, os, sys, time
def state(status, step=4, reason=""):
    with open("run/state.json.new", "w") as file:
        json.dump({"status": status, "step": step, "reason": reason}, file)
    os.replace("run/state.json.new", "run/state.json")
"""


def supervised(tmp_path, code, patience=60.0, before="running"):
    """What a supervisor returns for a launcher made of Python."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    if before:
        value = {"status": before, "step": 0, "reason": "before"}
        (run / "state.json").write_text(json.dumps(value))
    words = [sys.executable, "-c", WRITE + code]
    return words, Supervisor(run, 2, patience)


@pytest.fixture
def signals():
    """Handlers, put back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        ("state('done'); sys.exit(7)", 0, "the run is done at step 4"),
        ("state('stopped', reason='SIGTERM')", 75, "stopped at step 4: SIGTERM"),
        ("state('hang', reason='hang: rank 1')", 86, "hang at step 4: hang: rank 1"),
        ("state('diverged')", 87, "diverged"),
        ("state('corrupt')", 88, "corrupt"),
        ("sys.exit(2)", 2, "training did not begin: the launcher ended with 2"),
        ("pass", 1, "training did not begin: the launcher ended with 0"),
        ("os.kill(os.getpid(), 9)", 1, "training did not begin"),
    ],
)
def test_the_run_decides_and_not_the_launcher(
    code, expected, said, tmp_path, monkeypatch, capsys, signals
):
    monkeypatch.chdir(tmp_path)
    words, supervisor = supervised(tmp_path, code, before="done")
    assert supervisor.run(words, os.environ) == expected
    assert said in capsys.readouterr().err


def test_a_launcher_that_ends_while_ranks_go_on(tmp_path, monkeypatch, capsys, signals):
    from pipeline.launch import supervise

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervise, "_BEAT_SECONDS", 1.5)
    words, supervisor = supervised(tmp_path, "state('running', 8)")
    beating = """
import time
from pathlib import Path
from pipeline.hang_report import Beat
folder = Path("run/heartbeats")
folder.mkdir()
for number in range(1000):
    Beat(1, "n2", 17, "s", number, 0.0, "step", 8, 1, 0.0, 60.0).write(folder)
    time.sleep(0.2)
"""
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    rank = subprocess.Popen([sys.executable, "-c", beating], env=path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "heartbeats" / "rank-00001.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert supervisor.run(words, os.environ) == 1
    finally:
        rank.kill()
        rank.wait()
    said = capsys.readouterr().err
    assert "ended with 0, and the run did not: state.json says running, with step 8" in said
    assert "still at work: rank 1 (host n2, pid 17)" in said
    assert supervisor.run(words, os.environ) == 1
    assert "still at work" not in capsys.readouterr().err


def test_a_launcher_that_outlives_its_run_is_ended(tmp_path, monkeypatch, capsys, signals):
    monkeypatch.chdir(tmp_path)
    code = "import signal; signal.signal(15, signal.SIG_IGN); state('hang'); time.sleep(600)"
    monkeypatch.setattr("pipeline.launch.supervise._END_SECONDS", 1.0)
    words, supervisor = supervised(tmp_path, code, patience=1.0)
    assert supervisor.run(words, os.environ) == 86
    assert "its launcher has not: it is ended" in capsys.readouterr().err


def test_a_signal_becomes_a_request_that_all_ranks_hear(tmp_path, monkeypatch, capsys, signals):
    monkeypatch.chdir(tmp_path)
    code = f"""
os.kill({os.getpid()}, 10)
while not os.path.exists("run/stop"):
    time.sleep(0.05)
state("stopped", reason="the file run/stop")
"""
    words, supervisor = supervised(tmp_path, code)
    assert supervisor.run(words, os.environ) == 75
    assert "SIGUSR1: all ranks commit and stop" in capsys.readouterr().err


def test_a_second_signal_ends_the_launcher(tmp_path, monkeypatch, signals):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.launch.supervise.SECOND_SIGNAL_SECONDS", 0.5)
    code = f"""
for _ in range(2):
    os.kill({os.getpid()}, 15)
    time.sleep(1.0)
time.sleep(600)
"""
    words, supervisor = supervised(tmp_path, code)
    assert supervisor.run(words, os.environ) == 1


def dry_run(*words):
    return ["launch", "--hosts", "n1:1,n2:1", "--dry-run", *words]


TRAIN = [
    *(
        "--config",
        "deberta_v3_base",
        "--deepspeed_config",
        str(ROOT / "ds_configs/zero1_bf16.json"),
    ),
    *("run.folder=run", "data.path=here"),
]


def test_the_command_says_what_is_wrong_before_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit) as caught:
        cli.main(dry_run("--", *TRAIN))
    assert caught.value.code == 0
    assert "--launcher pdsh" in capsys.readouterr().out
    written = (tmp_path / "run" / "launch" / "deepspeed_env").read_text()
    assert "MASTER_ADDR=n1\n" in written
    assert (tmp_path / "run" / "launch" / "hostfile").read_text() == "n1 slots=1\nn2 slots=1\n"
    for words, message in (
        (["--launcher", "slurm", "--", *TRAIN], "--launcher slurm: write pdsh, openmpi"),
        (["--", *TRAIN[:5]], "data.path"),
        (["--", *TRAIN, "no.such=1"], "unknown section 'no'"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(dry_run(*words))
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_a_launcher_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit):
        cli.main(["launch", "--hosts", "n1:1", "--", *TRAIN])
    assert "needs pdsh, which is not installed here" in capsys.readouterr().err
