"""pretrain.sbatch broken on purpose: each break turns a case of `requeue_cases` red."""

import pytest

from tests.slurm import requeue_cases as cases
from tests.slurm.trials import Trial, broken_home

pytestmark = pytest.mark.slurm

# What is broken; file; line; what stands there instead; the case; what the case then sees.
BREAKS = {
    "SLURM is not asked whether the job was cancelled": (
        *("books.sh", "RUNNING/* | COMPLETING/TimeLimit | TIMEOUT/*)", "*)"),
        *(cases.cancelled, "'JobState': 'COMPLETED'"),
    ),
    "srun's exit code is trusted": (
        *("requeue.sh", '[ "$(state_identity)" = "$BEFORE" ]; then STATUS=silent'),
        *(
            '[ "$1" = 0 ]; then STATUS=done',
            cases.stopped_with_exit_code_zero,
            "'stopped' == 'done'",
        ),
    ),
    "USR1 is not trapped": (
        *("pretrain.sbatch", "trap on_usr1 USR1\n", "", cases.usr1_by_hand),
        "'JobState': 'FAILED'",
    ),
    "TERM is not trapped": (
        *("pretrain.sbatch", "trap on_term TERM", ":"),
        *(cases.requeued_by_the_user, r"\['end'\] == \['left to SLURM', 'end'\]"),
    ),
    "crashes without progress are not bounded": (
        *("requeue.sh", '[ "$count" -ge "$MAX_CRASHES_WITHOUT_PROGRESS" ]', "false"),
        *(cases.crashes_without_progress, "At index 2 diff: 'requeue' != 'end'"),
    ),
    "restarts are not bounded": (
        *("requeue.sh", '[ "$RESTART" -ge "$MAX_RESTARTS" ]', "false"),
        *(cases.crashes_with_progress, "At index 3 diff: 'requeue' != 'end'"),
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_break_turns_a_case_red(broken, cluster, tmp_path, outcome):
    file, old, new, case, seen = BREAKS[broken]
    trial = Trial(cluster, tmp_path, broken_home(tmp_path, file, old, new))
    try:
        with pytest.raises(AssertionError, match=seen):
            case(trial)
    finally:
        cluster.cancel_all()
    outcome(f"broken on purpose: {broken}", end=f"{case.__name__} is red")
