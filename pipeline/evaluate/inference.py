"""Natural language inference beyond MNLI: XNLI (arXiv:1809.05053) and ANLI (arXiv:1910.14599).

XNLI is run in three ways: trained on English alone and tested on every language (zero-shot), on the
translations of all languages together, and on those of one language for itself. Records are lines
of the published files, in which the test of all languages is one, or rows of `facebook/xnli`, which
has a configuration a language. The authors published no recipes for them: MNLI's are taken.
"""

from dataclasses import replace
from typing import Any

from pipeline.evaluate.declaration import Split, TaskSpec
from pipeline.evaluate.glue import GLUE
from pipeline.evaluate.text_readers import text_reader

LANGUAGES = (
    "ar",
    "bg",
    "de",
    "el",
    "en",
    "es",
    "fr",
    "hi",
    "ru",
    "sw",
    "th",
    "tr",
    "ur",
    "vi",
    "zh",
)
_LABELS = ("entailment", "neutral", "contradiction")
_READ = text_reader(
    ("premise", "sentence1", "context"),
    ("hypothesis", "hypo", "sentence2"),
    label=("label", "gold_label"),
    labels=_LABELS,
)
_MNLI = next(spec for spec in GLUE if spec.name == "mnli")
_SOURCE = "as MNLI's; the authors published none"


def _task(name: str, suite: str, **values: Any) -> TaskSpec:
    """Fill what all share, MNLI's recipes included."""
    recipes = {size: replace(r, source=_SOURCE) for size, r in _MNLI.recipes.items()}
    return TaskSpec(
        name=name,
        suite=suite,
        kind="classification",
        read=_READ,
        labels=_LABELS,
        figures=("accuracy",),
        recipe=replace(_MNLI.recipe, source=_SOURCE),
        recipes=recipes,
        **values,
    )


def _train(language: str) -> Split:
    """Training data in one language: MNLI, translated."""
    files = (
        f"XNLI-MT-1.0/multinli/multinli.train.{language}.tsv",
        f"multinli/multinli.train.{language}.tsv",
    )
    return Split("train", files, language)


def _test(language: str) -> Split:
    """Test data in one language: translated by people."""
    files = ("XNLI-1.0/xnli.test.tsv", "xnli.test.tsv")
    return Split("test", files, language, only=("language", language))


def _xnli(name: str, suite: str, train: tuple[str, ...], test: tuple[str, ...]) -> TaskSpec:
    """Train on some languages and test on some."""
    is_one = len(test) == 1
    return _task(
        name,
        suite,
        folder="XNLI",
        hub=("facebook/xnli", "en"),
        train=tuple(map(_train, train)),
        scored={"" if is_one else language: _test(language) for language in test},
        averages_parts=not is_one,
        is_averaged=is_one,
    )


_ROUNDS = ("R1", "R2", "R3")

INFERENCE = (
    _xnli("xnli-zero-shot", "xnli", ("en",), LANGUAGES),
    _xnli("xnli-translate-train-all", "xnli", LANGUAGES, LANGUAGES),
    *(
        _xnli(f"xnli-translate-train-{language}", "xnli-translate-train", (language,), (language,))
        for language in LANGUAGES
    ),
    _task(
        "anli",
        "anli",
        folder="anli_v1.0",
        hub=("facebook/anli", None),
        train=tuple(Split(f"train_{r.lower()}", (f"{r}/train.jsonl",)) for r in _ROUNDS),
        scored={r: Split(f"test_{r.lower()}", (f"{r}/test.jsonl",)) for r in _ROUNDS},
    ),
)
