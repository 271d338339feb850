"""Named entities: CoNLL-2003 (Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050).

Records are sentences of the published files, eng.train, eng.testa and eng.testb, or of their usual
copies train.txt, valid.txt and test.txt, or rows of `eriktks/conll2003`.

As in the authors' ner_task.py, sentences of a document are read together, as many as fit. Published
files tell documents by -DOCSTART-; rows of `datasets` do not, and each sentence is an input of its
own there. Spans are scored by sentence in both cases, as conlleval does.
"""

from typing import Any

from data_prep.errors import UserError
from pipeline.evaluate.declaration import Recipe, Split, TaskSpec
from pipeline.evaluate.examples import TaggedExample
from pipeline.evaluate.records import Record

_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
_DOCUMENT = ("document_id", "doc_id")


def _read(record: Record, is_labelled: bool) -> list[Any]:
    """Read the words of a sentence and their tags, names or numbers."""
    words = tuple(map(str, record.items("tokens", "words")))
    document = record.value(*_DOCUMENT) if record.has(*_DOCUMENT) else None
    if not is_labelled or not words:
        return [TaggedExample(record.row, words, None, document)] if words else []
    tags = record.items("ner_tags", "tags")
    if len(tags) != len(words):
        raise UserError(f"{record.where}: {len(words)} tokens, but {len(tags)} tags")
    numbers = [Record(record.where, 0, {"ner_tags": t}).label(_TAGS, "ner_tags") for t in tags]
    tag_names = tuple(_TAGS[number] for number in numbers)
    return [TaggedExample(record.row, words, tag_names, document)]


NER = (
    TaskSpec(
        name="conll2003",
        suite="ner",
        kind="tagging",
        folder="CoNLL-2003",
        hub=("eriktks/conll2003", None),
        read=_read,
        labels=_TAGS,
        figures=("span_f1",),
        train=(Split("train", ("eng.train", "train.txt")),),
        scored={
            "dev": Split("validation", ("eng.testa", "valid.txt")),
            "test": Split("test", ("eng.testb", "test.txt")),
        },
        recipe=Recipe(9e-6, 10, 16, 10, 512, 0.0, "experiments/ner/ner.sh"),
        is_averaged=False,
    ),
)
