"""Prediction files in the forms that the tasks' own servers and scripts take.

glue       CoLA.tsv, MNLI-m.tsv, ...: index and prediction, classes by name
jsonl      SuperGLUE's: one {"idx": ..., "label": ...} a line, classes by name
multirc    SuperGLUE's for MultiRC: a line a passage, with its questions and their answers
squad      SQuAD's: one object, id -> text, "" for no answer
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.evaluate.declaration import TaskSpec

_STSB_RANGE = (0.0, 5.0)

Format = Callable[[TaskSpec, Sequence[Any], Sequence[Any]], str]


def _named(spec: TaskSpec, prediction: Any) -> Any:
    """Give a class its name; choices keep their number and texts their words."""
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


def _lines(objects: Sequence[Any]) -> str:
    """Write one object a line."""
    return "".join(json.dumps(value) + "\n" for value in objects)


def _jsonl(spec: TaskSpec, examples: Sequence[Any], predictions: Sequence[Any]) -> str:
    """Write one object an example."""
    return _lines(
        [
            {"idx": example.key, "label": _named(spec, prediction)}
            for example, prediction in zip(examples, predictions, strict=True)
        ]
    )


def _multirc(spec: TaskSpec, examples: Sequence[Any], predictions: Sequence[Any]) -> str:
    """Write one object a passage; the keys are numbers of passage, question and answer."""
    passages: dict[int, dict[int, list[dict[str, int]]]] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        passage, question, answer = example.key
        answers = passages.setdefault(passage, {}).setdefault(question, [])
        answers.append({"idx": answer, "label": prediction})
    return _lines(
        [
            {
                "idx": passage,
                "passage": {"questions": [{"idx": q, "answers": a} for q, a in questions.items()]},
            }
            for passage, questions in passages.items()
        ]
    )


def _squad(spec: TaskSpec, examples: Sequence[Any], predictions: Sequence[Any]) -> str:
    """Write the object that evaluate-v2.0.py reads."""
    pairs = zip(examples, predictions, strict=True)
    return json.dumps({example.key: text for example, text in pairs}, indent=2) + "\n"


FORMATS: dict[str, Format] = {
    "glue": _glue,
    "jsonl": _jsonl,
    "multirc": _multirc,
    "squad": _squad,
}
"""(task, examples, predictions) -> content of the file."""
