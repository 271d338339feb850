"""All published tasks, by name and by suite."""

from difflib import get_close_matches

from data_prep.errors import UserError
from pipeline.evaluate.declaration import TaskSpec
from pipeline.evaluate.glue import GLUE
from pipeline.evaluate.inference import INFERENCE
from pipeline.evaluate.ner import NER
from pipeline.evaluate.reading import READING
from pipeline.evaluate.superglue import SUPERGLUE

TASKS = {spec.name: spec for spec in (*GLUE, *SUPERGLUE, *READING, *NER, *INFERENCE)}
"""By name."""
SUITES = {
    suite: tuple(spec for spec in TASKS.values() if spec.suite == suite)
    for suite in dict.fromkeys(spec.suite for spec in TASKS.values())
}
"""Tasks by suite."""


def find_tasks(names: str) -> tuple[TaskSpec, ...]:
    """Find the tasks that a user names.

    Args:
        names: Tasks and suites, divided by commas.

    Returns:
        The tasks, each once, in the order of the names.

    Raises:
        UserError: A name is unknown.
    """
    found: dict[str, TaskSpec] = {}
    for name in names.split(","):
        key = name.strip().lower()
        specs = SUITES.get(key) or ((TASKS[key],) if key in TASKS else ())
        if not specs:
            known = [*SUITES, *TASKS]
            close = get_close_matches(key, known, n=1)
            raise UserError(
                f"--task {name}: no such task{f'; did you mean {close[0]}?' if close else ''} "
                f"Suites: {', '.join(SUITES)}. Tasks: {_shown_tasks()}. For own files give "
                "--kind with --train and --test"
            )
        found |= {spec.name: spec for spec in specs}
    return tuple(found.values())


def _shown_tasks() -> str:
    """Write the names of all tasks, those of one language in short."""
    languages = [name for name in TASKS if TASKS[name].suite == "xnli-translate-train"]
    names = [name for name in TASKS if name not in languages]
    return ", ".join((*names, f"{languages[0]} to {languages[-1][-2:]}"))
