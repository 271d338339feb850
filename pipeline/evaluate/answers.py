"""How SQuAD and ReCoRD compare a predicted text with the right ones.

All scripts compare what is left of a text in lower case, without punctuation, articles (a, an, the)
and repeated spaces. They differ where nothing is left:

    evaluate-v1.1.py, ReCoRD's    F1 is 0, also where nothing is left of both
    evaluate-v2.0.py              F1 is 1 where nothing is left of both; a right answer of which
                                  nothing is left does not count beside others
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Reduce a text to what is compared.

    Args:
        text: Any text.

    Returns:
        Its words in lower case, without punctuation and articles.

    Source: evaluate-v2.0.py of SQuAD 2.0 (Rajpurkar et al. 2018, arXiv:1806.03822).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(predicted: str, answers: Sequence[str], *, may_be_none: bool) -> float:
    """Compare a text with the right ones; the best counts.

    Args:
        predicted: The predicted text, "" for no answer.
        answers: The right ones; none where the question has no answer.
        may_be_none: Whether SQuAD 2.0's rules hold, by which a question may have no answer.

    Returns:
        1 where it is the same as one of them after normalisation, else 0.
    """
    words = normalize_answer(predicted)
    return float(any(words == right for right in _counted(answers, may_be_none)))


def token_f1(predicted: str, answers: Sequence[str], *, may_be_none: bool) -> float:
    """Compare the words of a text with those of the right ones; the best counts.

    Args:
        predicted: The predicted text, "" for no answer.
        answers: The right ones; none where the question has no answer.
        may_be_none: Whether SQuAD 2.0's rules hold, by which a question may have no answer.

    Returns:
        F1 of the words it shares with one of them, with repetitions.
    """
    words = normalize_answer(predicted).split()
    return max(
        _word_f1(words, right.split(), may_be_none) for right in _counted(answers, may_be_none)
    )


def _counted(answers: Sequence[str], may_be_none: bool) -> list[str]:
    """Normalise the right answers, and leave out what the rules leave out; at least one is left."""
    normal = [normalize_answer(answer) for answer in answers]
    return ([text for text in normal if text] if may_be_none else normal) or [""]


def _word_f1(words: list[str], right: list[str], may_be_none: bool) -> float:
    """Compute F1 of two lists of words."""
    if not words and not right:
        return float(may_be_none)
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right))
