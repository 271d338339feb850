"""What job scripts make of variables and of refusals; with stand-ins for SLURM's programs."""

import os
import shutil
import subprocess

import pytest

from tests.worlds import ROOT

SCONTROL = """#!/bin/bash
case $* in
    *hostnames*) echo node0 ;;
    *) echo "JobState=RUNNING Reason=None ExcNodeList=(null) PreemptTime=None EndTime=Unknown" ;;
esac
"""
SRUN = """#!/bin/bash
printf '%s\\0' "$@" >"$SEEN/words"
printf %s "${PYTHONPATH-}" >"$SEEN/path"
if [ -n "${REFUSED_BY-}" ]; then
    touch "$RUN"/slurm/rank-0000{0,1,2}.log
    echo "rank $REFUSED_BY: error: no such device" >>"$RUN/slurm/rank-0000$REFUSED_BY.log"
    echo "srun: error: node0: task $REFUSED_BY: Exited with exit code 2" >&2
    exit 2
fi
printf '{\\n "status": "done",\\n "step": 3\\n}\\n' >"$RUN/state.json"
"""


@pytest.fixture
def run_job(tmp_path):
    """Run pretrain.sbatch."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("sinfo", "#!/bin/bash\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    home = tmp_path / "scripts only"
    shutil.copytree(ROOT / "slurm", home / "slurm")

    def run(with_program=False, **variables):
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SEEN": str(tmp_path),
            "RUN": str(tmp_path / "run"),
            "DATASET": "my set",
            "CONFIG": "config",
            "DEEPSPEED_CONFIG": "deepspeed.json",
            "DEBERTA_HOME": str(ROOT if with_program else home),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node0",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_PARTITION": "p",
            **variables,
        }
        script = ROOT / "slurm/pretrain.sbatch"
        return subprocess.run(
            ["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.fixture
def job(run_job, tmp_path):
    """Run pretrain.sbatch; returns the words behind the run folder's, and PYTHONPATH."""

    def run(**variables):
        done = run_job(**variables)
        assert done.returncode == 0, done.stdout + done.stderr
        words = (tmp_path / "words").read_text().split("\0")[:-1]
        at = words.index("data.path=my set") + 1
        assert words[at] == f"run.folder={tmp_path}/run"
        return words[at + 1 :], (tmp_path / "path").read_text()

    return run


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, []),
        ("", []),
        ("run.seed=1  schedule.max_steps=5", ["run.seed=1", "schedule.max_steps=5"]),
        ("reference.curve=my curve.json\n", ["reference.curve=my curve.json"]),
        ("a=b c\n\nrun.seed=1\nd= * $HOME '\"\\\n", ["a=b c", "run.seed=1", "d= * $HOME '\"\\"]),
    ],
)
def test_words_for_training_may_hold_spaces(job, given, words):
    assert job(**({} if given is None else {"TRAIN_WORDS": given}))[0] == words


def test_only_a_program_beside_the_scripts_goes_before_an_installed_one(job):
    assert job()[1] == ""
    assert job(PYTHONPATH="/mine")[1] == "/mine"
    assert job(with_program=True)[1] == str(ROOT)
    assert job(with_program=True, PYTHONPATH="/mine")[1] == f"{ROOT}:/mine"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("export SOURCES='a  b*'", ["a", "b*"]),
        ("export SOURCES=$'my file\\n\\nb*\\n'", ["my file", "b*"]),
        ("SOURCES=('my file' $'a\\nb')", ["my file", "a\nb"]),
        ("", []),
    ],
)
def test_words_of_other_stages_may_hold_spaces(given, words):
    program = f'set -euo pipefail; . "{ROOT}/slurm/job.sh"; {given}\nwords SOURCES\n'
    program += 'if ((${#SOURCES[@]})); then printf "%s\\0" "${SOURCES[@]}"; fi'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == words


@pytest.mark.parametrize("rank", ["0", "1", "2"])
def test_why_training_refuses_is_in_the_job_s_log_whoever_says_it(run_job, rank):
    done = run_job(REFUSED_BY=rank)
    assert done.returncode == 2
    assert done.stdout.count(f"rank {rank}: error: no such device") == 1
    assert "end: training refuses its command line, configuration or data" in done.stdout
