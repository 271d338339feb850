"""Reading and choosing: SQuAD 1.1 and 2.0 (arXiv:1606.05250, 1806.03822), RACE (1704.04683), SWAG.

Records are articles of SQuAD's .json, RACE's .txt of one JSON object each, SWAG's .csv, or rows of
`datasets`. The authors published recipes for RACE with DeBERTa-large only, and none for SQuAD and
SWAG.
"""

import re
from typing import Any

from data_prep.errors import UserError
from pipeline.evaluate.declaration import Recipe, Split, TaskSpec
from pipeline.evaluate.examples import ChoiceExample, SpanExample
from pipeline.evaluate.records import Record
from pipeline.evaluate.text_readers import record_key

_LETTERS = ("A", "B", "C", "D")
_LEVELS = ("middle", "high")
_LEVEL_IN_PATH = r"[/_](middle|high)[/.]"


def read_squad(record: Record, is_labelled: bool) -> list[Any]:
    """Make an example of every question.

    Args:
        record: An article of the published document, or a question in the columns of `datasets`.
        is_labelled: Whether to read the answers.

    Returns:
        Its SpanExamples.

    Raises:
        UserError: It is neither.
    """
    if record.has("context"):
        return [_question(record, record.text("context"), is_labelled)]
    examples = []
    for values in record.items("paragraphs"):
        paragraph = record.inner(values, "paragraphs")
        context = paragraph.text("context")
        for question in paragraph.items("qas"):
            examples.append(_question(paragraph.inner(question, "qas"), context, is_labelled))
    return examples


def _question(record: Record, context: str, is_labelled: bool) -> SpanExample:
    """Read the answers of a question, in the published form or that of `datasets`."""
    texts: list[Any] = []
    start = None
    if is_labelled and not (record.has("is_impossible") and record.value("is_impossible")):
        answers = record.value("answers")
        if isinstance(answers, dict):
            pairs = record.inner(answers, "answers")
            texts, starts = pairs.items("text"), pairs.items("answer_start")
        else:
            found = [record.inner(answer, "answers") for answer in record.items("answers")]
            texts = [answer.text("text") for answer in found]
            starts = [answer.whole("answer_start") for answer in found]
        if len(starts) != len(texts):
            raise UserError(
                f"{record.where}: answers have {len(texts)} texts, but {len(starts)} places"
            )
        if texts:
            start = Record(record.where, 0, {"answer_start": starts[0]}).whole("answer_start")
            record.place(start, start + len(str(texts[0])), context, "the first answer")
    return SpanExample(
        record.value("id"), record.text("question"), context, tuple(map(str, texts)), start
    )


def _race(record: Record, is_labelled: bool) -> list[Any]:
    """Make an example of every question: the article, and question and option."""
    article = record.text("article")
    if record.has("question"):
        rows = [(record.text("question"), record.items("options"), record.values.get("answer"))]
    else:
        questions, options = record.items("questions"), record.items("options")
        answers = record.items("answers") if is_labelled else [None] * len(questions)
        if not len(questions) == len(options) == len(answers):
            raise UserError(
                f"{record.where}: {len(questions)} questions, {len(options)} lists of options and "
                f"{len(answers)} answers"
            )
        rows = list(zip(questions, options, answers, strict=True))
    key = record.value("example_id", "id") if record.has("example_id", "id") else record.row
    # Articles are named by their level, high123.txt, and so are the files that hold several.
    found = re.findall(r"^(middle|high)", str(key)) or re.findall(_LEVEL_IN_PATH, record.where)
    level = found[-1] if found else None
    examples = []
    for number, (question, choices, answer) in enumerate(rows):
        pairs = tuple((article, f"{question} {choice}".strip("_ ")) for choice in choices)
        given = Record(record.where, record.row, {"answer": answer})
        label = given.label(_LETTERS[: len(choices)], "answer") if is_labelled else None
        examples.append(ChoiceExample(f"{key}-{number}", pairs, label, level))
    return examples


def _swag(record: Record, is_labelled: bool) -> list[Any]:
    """Read four endings of a sentence."""
    first, begun = record.text("sent1"), record.text("sent2")
    endings = [record.text(f"ending{number}") for number in range(4)]
    label = record.label(("0", "1", "2", "3"), "label") if is_labelled else None
    pairs = tuple((first, f"{begun} {ending}") for ending in endings)
    return [ChoiceExample(record_key(record), pairs, label)]


def _squad_task(name: str, version: str, allows_no_answer: bool, hub: str) -> TaskSpec:
    """Fill what both versions share."""
    folder = f"SQuAD-{version}"
    dev = Split("validation", (f"dev-v{version}.json",))
    return TaskSpec(
        name=name,
        suite="reading",
        kind="span",
        folder=folder,
        hub=(hub, None),
        read=read_squad,
        figures=("token_f1", "exact_match"),
        train=(Split("train", (f"train-v{version}.json",)),),
        scored={"": dev},
        predicted={f"{folder}.json": dev},
        submission="squad",
        recipe=Recipe(1e-5, 3, 32, 500, 384, 0.0, "chosen; the authors published none"),
        allows_no_answer=allows_no_answer,
        is_averaged=False,
    )


READING = (
    _squad_task("squad", "1.1", False, "rajpurkar/squad"),
    _squad_task("squad2", "2.0", True, "rajpurkar/squad_v2"),
    TaskSpec(
        name="race",
        suite="reading",
        kind="multiple-choice",
        folder="RACE",
        hub=("ehovy/race", "all"),
        read=_race,
        figures=("accuracy",),
        train=(Split("train", ("train/*/*.txt", "train_*.jsonl")),),
        scored={"": Split("test", ("test/*/*.txt", "test_*.jsonl"))},
        groups=_LEVELS,
        recipe=Recipe(
            8e-6, 6, 32, 100, 512, 0.2, "experiments/my_exp/run_race.sh, DeBERTa-large; length 512"
        ),
        is_averaged=False,
    ),
    TaskSpec(
        name="swag",
        suite="reading",
        kind="multiple-choice",
        folder="SWAG",
        hub=("allenai/swag", "regular"),
        read=_swag,
        figures=("accuracy",),
        train=(Split("train", ("train.csv",)),),
        scored={"": Split("validation", ("val.csv",))},
        predicted={"SWAG.jsonl": Split("test", ("test.csv",))},
        recipe=Recipe(8e-6, 3, 32, 500, 128, 0.1, "chosen; the authors published none"),
        is_averaged=False,
    ),
)
