"""Prediction files in the forms that the tasks' own servers and scripts take.

glue       CoLA.tsv, MNLI-m.tsv, ...: index and prediction, classes by name
jsonl      one {"idx": ..., "label": ...} a line, classes by name
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.evaluate.declaration import TaskSpec

_STSB_RANGE = (0.0, 5.0)

Format = Callable[[TaskSpec, Sequence[Any], Sequence[Any]], str]


def _named(spec: TaskSpec, prediction: Any) -> Any:
    """Give a class its name; choices keep their number."""
    return spec.labels[prediction] if spec.labels else prediction


def _glue(spec: TaskSpec, examples: Sequence[Any], predictions: Sequence[Any]) -> str:
    """Write GLUE's table."""
    lines = ["index\tprediction"]
    for example, prediction in zip(examples, predictions, strict=True):
        if spec.kind == "regression":
            low, high = _STSB_RANGE
            shown = f"{min(max(prediction, low), high):.3f}"
        else:
            shown = _named(spec, prediction)
        lines.append(f"{example.key}\t{shown}")
    return "\n".join(lines) + "\n"


def _jsonl(spec: TaskSpec, examples: Sequence[Any], predictions: Sequence[Any]) -> str:
    """Write one object an example."""
    return "".join(
        json.dumps({"idx": example.key, "label": _named(spec, prediction)}) + "\n"
        for example, prediction in zip(examples, predictions, strict=True)
    )


FORMATS: dict[str, Format] = {"glue": _glue, "jsonl": _jsonl}
"""(task, examples, predictions) -> content of the file."""
