"""Submitting: one job after the other, each written down; two small programs play SLURM."""

import json

import pytest

from data_prep.errors import UserError
from pipeline.submit.chain import Chain, submit_chain
from pipeline.submit.client import Slurm, SlurmError
from pipeline.submit.record import Record
from pipeline.submit.rendering import PlainScript
from pipeline.submit.stages import Job
from tests.submitting import RECIPE, copy_scripts, write_recipe

STAGES = ("prep", "pretrain", "export")
# jobs: one line a job, "ID STATE COMMENT OPTIONS"; a file `refuse-STAGE` changes sbatch's answer.
SBATCH = """#!/bin/bash
cd "{folder}"; for word; do case $word in --comment=*) comment=${{word#--comment=}};; esac; done
stage=${{comment##*:}}
if [[ -e refuse-$stage ]]; then echo "sbatch: error: Invalid qos" >&2; exit 1; fi
id=$((100 + $(wc -l < jobs))); echo "$id PENDING $comment $*" >> jobs
if [[ -e lose-$stage ]]; then echo "sbatch: error: Socket timed out" >&2; exit 1; fi
echo "$id;cluster"
"""
SQUEUE = """#!/bin/bash
cd "{folder}"
[[ ! -e down ]] || {{ echo "error: Unable to contact slurm controller" >&2; exit 1; }}
for word; do case $word in --jobs=*) wanted=${{word#--jobs=}};; esac; done
while read -r id state comment _; do
    if [[ -z ${{wanted-}} ]]; then echo "$id|$comment"
    elif [[ $id == "$wanted" ]]; then
        for task in ${{state//,/ }}; do echo "$id|N/A|$task|Priority|N/A|"; done
    fi
done < jobs
"""


class Fake:
    """A SLURM of two small programs, and a chain for it."""

    def __init__(self, folder):
        self.folder = folder / "fake"
        self.folder.mkdir()
        self.jobs_file = self.folder / "jobs"
        self.jobs_file.touch()
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
            program = self.folder / name
            program.write_text(text.format(folder=self.folder))
            program.chmod(0o755)
        self.slurm = Slurm({"PATH": f"{self.folder}:/usr/bin:/bin"})
        self.run = folder / "runs/mine"
        script = PlainScript("x.sbatch", {}, {}, "")
        jobs = [Job(stage, script, {}, {}, (self.run / stage,)) for stage in STAGES]
        self.chain = Chain(
            write_recipe(folder, RECIPE),
            self.run / "slurm",
            copy_scripts(folder / "home") / "slurm",
            jobs,
            {stage: f"#!/bin/bash\n# {stage}\n" for stage in STAGES},
            {"pretrain": {"config.json": "{}"}},
        )
        self.said = []

    def submit(self, **options):
        options.setdefault("resubmit", False)
        jobs = submit_chain(self.chain, self.slurm, say=self.said.append, **options)
        return [job.job_id for job in jobs]

    def lines(self):
        return [line.split(" ", 3) for line in self.jobs_file.read_text().splitlines()]

    def set_state(self, job_id, state):
        lines = self.lines()
        for line in lines:
            line[1] = state if line[0] == job_id else line[1]
        self.jobs_file.write_text("".join(" ".join(line) + "\n" for line in lines))

    def record(self):
        return json.loads((self.run / "slurm/jobs.json").read_text())


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


def test_each_job_waits_for_the_one_before(fake):
    assert fake.submit() == ["100", "101", "102"]
    options = [line[3] for line in fake.lines()]
    assert "--dependency" not in options[0]
    assert "--dependency=afterok:100 --kill-on-invalid-dep=yes" in options[1]
    assert "--dependency=afterok:101 --kill-on-invalid-dep=yes" in options[2]
    jobs = fake.record()["jobs"]
    assert [(job["stage"], job["job_id"], job["cluster"]) for job in jobs] == [
        ("prep", "100", "cluster"),
        ("pretrain", "101", "cluster"),
        ("export", "102", "cluster"),
    ]
    slurm = fake.run / "slurm"
    for name in ("prep.sbatch", "config.json", "job.sh", "recipe.toml"):
        assert (slurm / name).is_file()
    assert not (slurm / "site.env").exists()  # its values are in the scripts
    assert fake.said[1] == "pretrain: job 101, after 100"


def test_a_second_submit_refuses_while_jobs_live(fake):
    fake.submit()
    with pytest.raises(UserError, match="prep 100, pretrain 101, export 102; --resubmit submits"):
        fake.submit()
    assert len(fake.lines()) == 3
    assert fake.submit(resubmit=True) == []
    assert len(fake.lines()) == 3


def test_stages_that_are_done_are_not_submitted_again(fake):
    fake.submit()
    for job_id, state in (("100", "COMPLETED"), ("101", "FAILED"), ("102", "CANCELLED")):
        fake.set_state(job_id, state)
    fake.run.joinpath("prep").touch()
    assert fake.submit() == ["103", "104"]
    assert "--dependency" not in fake.lines()[3][3]
    assert fake.said[-3] == f"prep: done, {fake.run / 'prep'} is there"
    assert [job["job_id"] for job in fake.record()["jobs"]][-2:] == ["103", "104"]


def test_resubmit_waits_for_what_still_runs_and_leaves_its_files(fake):
    fake.submit()
    fake.set_state("100", "RUNNING")
    for job_id in ("101", "102"):
        fake.set_state(job_id, "CANCELLED")
    (fake.run / "slurm/job.sh").write_text("read by job 100")
    assert fake.submit(resubmit=True) == ["103", "104"]
    assert "--dependency=afterok:100" in fake.lines()[3][3]
    assert (fake.run / "slurm/job.sh").read_text() == "read by job 100"


def test_a_failed_task_beside_running_ones_is_told(fake):
    fake.submit()
    fake.set_state("100", "RUNNING,FAILED")
    with pytest.raises(UserError, match="of array 100 have failed, and others are at work"):
        fake.submit(resubmit=True)


def test_what_slurm_refuses_leaves_a_record_and_a_cure(fake):
    (fake.folder / "refuse-export").touch()
    with pytest.raises(
        UserError, match=r"export: SLURM refused .*Invalid qos; submitted so far: 10"
    ) as e:
        fake.submit()
    assert "`deberta submit --resubmit`" in str(e.value)
    assert [job["stage"] for job in fake.record()["jobs"]] == ["prep", "pretrain"]
    (fake.folder / "refuse-export").unlink()
    assert fake.submit(resubmit=True) == ["102"]
    assert "--dependency=afterok:101" in fake.lines()[-1][3]


def test_an_answer_that_was_lost_is_found_by_the_comment(fake):
    (fake.folder / "lose-pretrain").touch()
    assert fake.submit() == ["100", "101", "102"]
    assert len(fake.lines()) == 3


def test_a_job_whose_number_nobody_wrote_down_is_found(fake):
    fake.submit()
    record = Record.load(fake.run / "slurm")
    last = record.jobs.pop()
    comment = fake.lines()[2][2]
    record.begin("export", comment, "101", None)
    with pytest.raises(UserError, match="pretrain 101, export 102"):
        fake.submit()
    assert "export: job 102 had been submitted before its number was written down" in fake.said
    assert Record.load(fake.run / "slurm").newest()["export"].job_id == last.job_id


def test_a_submission_that_never_arrived_is_forgotten(fake):
    (fake.run / "slurm").mkdir(parents=True)
    Record(fake.run / "slurm").begin("prep", "deberta:x:prep", "", None)
    assert fake.submit() == ["100", "101", "102"]


def test_a_queue_that_does_not_answer_stops_before_anything_is_submitted(fake, monkeypatch):
    monkeypatch.setattr("pipeline.submit.client._WAIT_SECONDS", 0.0)
    fake.submit()
    (fake.folder / "down").touch()
    with pytest.raises(SlurmError, match=r"squeue: .*Unable to contact slurm controller"):
        fake.submit()
    assert len(fake.lines()) == 3


def test_a_damaged_record_is_told(fake):
    (fake.run / "slurm").mkdir(parents=True)
    (fake.run / "slurm/jobs.json").write_text('{"format": 7}')
    with pytest.raises(
        UserError, match=r"jobs\.json: cannot be read \(format 7\); look with squeue"
    ):
        fake.submit()


def test_two_submissions_at_once_are_refused(fake):
    from filelock import FileLock

    (fake.run / "slurm").mkdir(parents=True)
    with (
        FileLock(fake.run / "slurm/submit.lock"),
        pytest.raises(UserError, match="another `deberta submit` is at work"),
    ):
        fake.submit()
    assert fake.lines() == []


def test_accounting_is_asked_when_the_queue_has_forgotten(fake):
    program = fake.folder / "sacct"
    program.write_text("#!/bin/bash\necho '7_0|COMPLETED|0:0'; echo '7_1|CANCELLED by 0|0:15'\n")
    program.chmod(0o755)
    tasks = fake.slurm.states("7")
    assert [(each.task, each.state, each.reason) for each in tasks] == [
        ("0", "COMPLETED", "exit code 0:0"),
        ("1", "CANCELLED", "exit code 0:15"),
    ]
    program.write_text("#!/bin/bash\necho 'Slurm accounting storage is disabled' >&2; exit 1\n")
    assert fake.slurm.states("7") == []
