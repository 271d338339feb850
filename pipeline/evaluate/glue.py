"""GLUE: nine tasks (Wang et al. 2018, arXiv:1804.07461), as DeBERTa's authors ran them.

Columns are those of the published .tsv files and of `nyu-mll/glue`. Order of the texts of a pair,
lengths, rates and batches are those of DeBERTa's experiments/glue (QNLI puts the sentence before
its question); `experiments/glue` has no script for WNLI, which the papers leave out.
"""

from typing import Any

from pipeline.evaluate.declaration import Recipe, Split, TaskSpec
from pipeline.evaluate.text_readers import text_reader

_BINARY = ("0", "1")
_NLI = ("entailment", "neutral", "contradiction")
_QNLI = ("entailment", "not_entailment")
_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_SENTENCES = (("sentence1",), ("sentence2",))


def _recipe(
    script: str, rate: float, epochs: int, batch: int, warmup: int, length: int, dropout: float
) -> Recipe:
    """Fill a recipe from one of the authors' scripts."""
    return Recipe(rate, epochs, batch, warmup, length, dropout, f"experiments/glue/{script}.sh")


def _task(name: str, folder: str, figures: tuple[str, ...], **values: Any) -> TaskSpec:
    """Fill what most tasks of GLUE share."""
    shared = {
        "suite": "glue",
        "kind": "classification",
        "hub": ("nyu-mll/glue", name),
        "labels": _BINARY,
        "train": (Split("train", ("train.tsv",)),),
        "scored": {"": Split("validation", ("dev.tsv",))},
        "predicted": {f"{folder}.tsv": Split("test", ("test.tsv",))},
        "submission": "glue",
    }
    return TaskSpec(name=name, folder=folder, figures=figures, **{**shared, **values})


GLUE = (
    _task(
        "cola",
        "CoLA",
        ("matthews_correlation",),
        read=text_reader(("sentence",), labels=_BINARY),
        train=(Split("train", ("train.tsv",), columns=_COLA_COLUMNS),),
        scored={"": Split("validation", ("dev.tsv",), columns=_COLA_COLUMNS)},
        recipe=_recipe("cola", 5.5e-6, 10, 32, 50, 128, 0.1),
    ),
    _task(
        "sst2",
        "SST-2",
        ("accuracy",),
        read=text_reader(("sentence",), labels=_BINARY),
        recipe=_recipe("sst2", 6e-6, 8, 32, 500, 128, 0.1),
    ),
    _task(
        "mrpc",
        "MRPC",
        ("accuracy", "f1"),
        read=text_reader(
            ("sentence1", "#1 String"),
            ("sentence2", "#2 String"),
            label=("label", "Quality"),
            labels=_BINARY,
        ),
        recipe=_recipe("mrpc", 6e-6, 6, 32, 50, 128, 0.2),
    ),
    _task(
        "stsb",
        "STS-B",
        ("pearson", "spearman"),
        kind="regression",
        labels=(),
        read=text_reader(*_SENTENCES, label=("label", "score")),
        recipe=_recipe("stsb", 7e-6, 4, 32, 50, 128, 0.1),
    ),
    _task(
        "qqp",
        "QQP",
        ("accuracy", "f1"),
        read=text_reader(
            ("question1",), ("question2",), label=("label", "is_duplicate"), labels=_BINARY
        ),
        train=(Split("train", ("train.tsv",), skips_ragged=True),),
        scored={"": Split("validation", ("dev.tsv",), skips_ragged=True)},
        recipe=_recipe("qqp", 1e-5, 6, 64, 1000, 320, 0.2),
    ),
    _task(
        "mnli",
        "MNLI",
        ("accuracy",),
        labels=_NLI,
        read=text_reader(
            ("premise", "sentence1"),
            ("hypothesis", "sentence2"),
            label=("label", "gold_label"),
            labels=_NLI,
        ),
        scored={
            "matched": Split("validation_matched", ("dev_matched.tsv",)),
            "mismatched": Split("validation_mismatched", ("dev_mismatched.tsv",)),
        },
        predicted={
            "MNLI-m.tsv": Split("test_matched", ("test_matched.tsv",)),
            "MNLI-mm.tsv": Split("test_mismatched", ("test_mismatched.tsv",)),
            "AX.tsv": Split("test", ("diagnostic.tsv", "../diagnostic/diagnostic.tsv"), "ax"),
        },
        recipe=_recipe("mnli", 7e-6, 2, 64, 500, 256, 0.3),
        recipes={
            "xsmall": _recipe("mnli", 4.5e-5, 3, 64, 1000, 256, 0.1),
            "small": _recipe("mnli", 4.5e-5, 3, 64, 1500, 256, 0.2),
            "base": _recipe("mnli", 1.5e-5, 3, 64, 1000, 256, 0.1),
        },
    ),
    _task(
        "qnli",
        "QNLI",
        ("accuracy",),
        labels=_QNLI,
        read=text_reader(("sentence",), ("question",), labels=_QNLI),
        recipe=_recipe("qnli", 7e-6, 6, 64, 200, 512, 0.2),
    ),
    _task(
        "rte",
        "RTE",
        ("accuracy",),
        labels=_QNLI,
        read=text_reader(*_SENTENCES, labels=_QNLI),
        recipe=_recipe("rte", 1e-5, 6, 32, 50, 320, 0.3),
    ),
    _task(
        "wnli",
        "WNLI",
        ("accuracy",),
        read=text_reader(*_SENTENCES, labels=_BINARY),
        recipe=Recipe(1e-5, 6, 32, 50, 320, 0.3, "as RTE's; the authors ran no WNLI"),
        is_averaged=False,
    ),
)
