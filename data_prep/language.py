"""The language of a text, by a model that comes with its package and needs no network.

- `identify_language`: its two-letter code and how probable that is.

The beginning of a text is looked at: a thousand characters tell the language as surely as all.
"""

from functools import lru_cache
from typing import Any

from data_prep.errors import UserError

LOOKED_AT_CHARACTERS = 1000


def identify_language(text: str) -> tuple[str, float]:
    """Tell the language of a text.

    Args:
        text: Any text.

    Returns:
        ISO 639-1 code of the likeliest language, and its probability among those that are known.

    Raises:
        UserError: The package py3langid is not installed.
    """
    code, probability = _identifier().classify(text[:LOOKED_AT_CHARACTERS])
    return str(code), float(probability)


def known_languages() -> frozenset[str]:
    """The codes that `identify_language` can return; UserError as there."""
    return frozenset(str(code) for code in _identifier().nb_classes)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError(
            "--clean language needs the package py3langid; install it with pip install '.[clean]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
