import pytest

from data_prep.array_tasks import ArrayTask, Division
from data_prep.errors import UserError


def task(task_id, smallest, largest, count, step=1):
    """A task as SLURM describes it."""
    return ArrayTask.from_environment(
        {
            "SLURM_ARRAY_JOB_ID": "17",
            "SLURM_ARRAY_TASK_ID": str(task_id),
            "SLURM_ARRAY_TASK_MIN": str(smallest),
            "SLURM_ARRAY_TASK_MAX": str(largest),
            "SLURM_ARRAY_TASK_COUNT": str(count),
            "SLURM_ARRAY_TASK_STEP": str(step),
        }
    )


def test_a_range_is_divided_among_its_tasks():
    tasks = [task(number, 3, 11, 5, step=2) for number in (3, 5, 7, 9, 11)]
    assert {each.divide(None) for each in tasks} == {Division(3, 2, 5)}
    division = Division(3, 2, 5)
    assert [division.share_of(each.task_id) for each in tasks] == [0, 1, 2, 3, 4]
    assert [division.share_of(number) for number in (2, 4, 13, 1)] == [None] * 4
    assert [division.task_id(share) for share in range(5)] == [3, 5, 7, 9, 11]
    assert str(division) == "3-11:2"
    assert tasks[1].name == "17_5"


def test_without_the_range_tasks_count_from_zero():
    environment = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
    found = ArrayTask.from_environment(environment)
    assert found.divide(None) == Division(0, 1, 4)
    assert found.name == "array_2"


def test_some_tasks_submitted_again_keep_their_shares():
    kept = Division(0, 1, 8)
    # sbatch --array=3,7, and --array=3-4
    for again in (task(3, 3, 7, 2), task(7, 3, 7, 2), task(3, 3, 4, 2)):
        assert again.divide(kept) == kept


def test_a_larger_array_divides_anew():
    assert task(3, 0, 15, 16).divide(Division(0, 1, 8)) == Division(0, 1, 16)
    assert task(8, 8, 15, 8).divide(Division(0, 1, 8)) == Division(8, 1, 8)


@pytest.mark.parametrize("kept", [None, Division(0, 1, 4)])
def test_an_array_with_gaps_is_refused(kept):
    with pytest.raises(UserError, match=r"3 tasks between 1 and 7 has gaps.*--array=0-2") as caught:
        task(3, 1, 7, 3).divide(kept)
    assert ("divided among the tasks 0-3" in str(caught.value)) == (kept is not None)


def test_outside_slurm_it_says_what_to_type():
    with pytest.raises(UserError) as caught:
        ArrayTask.from_environment({"SLURM_JOB_ID": "17"})
    message = str(caught.value)
    assert "SLURM_ARRAY_TASK_ID is not set" in message
    assert "sbatch --array=0-7 --wrap 'deberta-prep build" in message
    assert "--executor processes --workers N" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_ARRAY_TASK_ID": "two"}, "SLURM_ARRAY_TASK_ID=two is not a number"),
        ({"SLURM_ARRAY_TASK_COUNT": None}, "SLURM_ARRAY_TASK_COUNT=None is not a number"),
        ({"SLURM_ARRAY_TASK_ID": "4"}, "SLURM_ARRAY_TASK_ID=4 is not one of 4 tasks from 0 to 3"),
        ({"SLURM_ARRAY_TASK_STEP": "0"}, "in steps of 0"),
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
            "4 processes of one array task would all do its share.*--ntasks=1",
        ),
    ],
)
def test_impossible_variables_are_refused(changes, message):
    environment = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", **changes}
    environment = {name: value for name, value in environment.items() if value is not None}
    with pytest.raises(UserError, match=message):
        ArrayTask.from_environment(environment)


def test_one_process_of_a_step_is_an_array_task():
    environment = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert ArrayTask.from_environment({**environment, **step}).task_id == 2
