"""The kinds of tasks by name, and the model that each fine-tunes.

classification   a class of a text or pair          AutoModelForSequenceClassification
regression       a number of a text or pair         the same, with one output
multiple-choice  the best of several pairs          AutoModelForMultipleChoice
tagging          a tag of every word                AutoModelForTokenClassification
span             an answer inside a text            AutoModelForQuestionAnswering
marked           a class of two marked places       heads.MarkedPairModel
entity           the entity that fills a gap        heads.EntityModel
"""

from collections.abc import Sequence

from pipeline.evaluate.kind import Kind
from pipeline.evaluate.kinds_marked import Entity, MarkedPair
from pipeline.evaluate.kinds_text import Classification, MultipleChoice, Regression
from pipeline.evaluate.kinds_tokens import Span, Tagging


def find_kind(
    name: str, labels: Sequence[str] = (), *, allows_no_answer: bool = False
) -> tuple[Kind, int]:
    """Make the kind of a task.

    Args:
        name: As in `declaration.KindName`.
        labels: Names of classes or tags.
        allows_no_answer: Whether a span may be missing.

    Returns:
        The kind, and the number of outputs of its head.
    """
    if name == "classification":
        return Classification(), len(labels)
    if name == "tagging":
        return Tagging(labels), len(labels)
    if name == "span":
        return Span(allows_no_answer=allows_no_answer), 2
    if name == "marked":
        return MarkedPair(), len(labels)
    kinds: dict[str, Kind] = {
        "regression": Regression(),
        "multiple-choice": MultipleChoice(),
        "entity": Entity(),
    }
    return kinds[name], 1
