"""The table of labelled tasks in the project's README, made from results/labelled-tasks.

    python -m tests.benchmarks.labelled_table            prints it
    python -m tests.benchmarks.labelled_table --write README.md

A row is a task: the mean over the seeds, and in brackets the lowest and the highest, of the same
network fine-tuned from the pre-trained weights and from random ones. Below it stands what the
pre-training was, and which commands made the figures.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.readme_table import replaced
from tests.benchmarks.rounds import RESULTS

FOLDER = RESULTS / "labelled-tasks"
BEGIN = "<!-- made by tests/benchmarks/labelled_table.py from tests/benchmarks/results -->"
END = "<!-- end of the labelled tasks -->"
COLUMNS = ("task", "pre-trained", "random start", "without a network", "recipe")
FIGURE = "accuracy"

Result = dict[str, Any]


def scores(task: Result, start: str) -> list[float]:
    """Accuracies of all seeds from a start, "pretrained" or "random"."""
    return [run["scores"][FIGURE] for run in task["runs"] if run["start"] == start]


def gap_beyond_ranges(task: Result) -> float:
    """By how much the gap of the means is wider than the ranges of both starts' seeds together.

    Args:
        task: One task of a result file.

    Returns:
        A share; above 0, every pre-trained seed is better than every random one.
    """
    ours, others = scores(task, "pretrained"), scores(task, "random")
    ranges = (max(ours) - min(ours)) + (max(others) - min(others))
    return statistics.fmean(ours) - statistics.fmean(others) - ranges


def _shown(values: Sequence[float]) -> str:
    mean, low, high = statistics.fmean(values), min(values), max(values)
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _row(task: Result) -> tuple[str, ...]:
    options = task["options"]
    guesses = [f"{values[FIGURE]:.3f} {name}" for name, values in task["baselines"].items()]
    recipe = f"{options['epochs']} epochs of {options['batch_size']}, {task['learning_rate']:g}"
    starts = (_shown(scores(task, start)) for start in ("pretrained", "random"))
    return (task["title"], *starts, ", ".join(guesses), recipe)


def _about(result: Result) -> str:
    trained = result["pretraining"]
    figures, removed = trained["heldout"]["figures"], trained["removed"]
    num_bytes = sum(source["text_bytes"] for source in trained["sources"].values())
    config = trained["config"]
    is_mlm = config["objective"]["task"] == "mlm"
    network = config["generator" if is_mlm else "discriminator"]
    learned = f"MLM loss {figures['eval/mlm_loss']:.2f} nats"
    if not is_mlm:
        learned += f", area under RTD's ROC curve {figures['eval/rtd_auc']:.2f}"
    objective = "masked language modelling" if is_mlm else "replaced token detection"
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers"))
    tokens = f"{trained['tokens'] / 1e6:.1f} million tokens out of {num_bytes / 1e6:.0f} MB"
    return (
        f"Accuracy on test files, mean over 3 seeds (lowest to highest). {result['device']}, "
        f"{result['date']}, {versions}. Pre-training: {objective}, "
        f"{network['num_hidden_layers']} layers of {network['hidden_size']}, "
        f"{trained['steps']:,} steps, {tokens}; of {trained['documents']:,} documents "
        f"{removed['near duplicate']} were left out as near-duplicates, "
        f"{removed['evaluation overlap']} for 13 words in a row that a test or dev file has; "
        f"held out, {learned}.\n"
    )


def table(folder: Path) -> str:
    """Make the tables of all devices.

    Args:
        folder: Of result files.

    Returns:
        Markdown, empty where there are no results.
    """
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_row, result["tasks"].values())]
        lines = "".join("| " + " | ".join(row) + " |\n" for row in rows)
        commands = "".join(f"{task['command']}\n" for task in result["tasks"].values())
        parts.append(f"{lines}\n{_about(result)}\n```bash\n{commands}```\n")
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or put it into a page.

    Args:
        argv: Words after the program's name; the process's own where None.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--write", type=Path, help="a page with the marks of the table")
    options = parser.parse_args(argv)
    made = table(options.results)
    if options.write is None:
        print(made, end="")
        return 0
    page = replaced(options.write.read_text(encoding="utf-8"), made, BEGIN, END)
    if page is None:
        sys.exit(f"{options.write} lacks the lines {BEGIN!r} and {END!r}, between which it belongs")
    options.write.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
