"""How SQuAD and ReCoRD compare a predicted text with a right one.

By the definitions of SQuAD's evaluate-v2.0.py: lower case, then without punctuation, articles
(a, an, the) and repeated spaces. ReCoRD's script and SQuAD 1.1's share them, but for F1 where
nothing is left of both texts: 1 here, 0 there.
"""

import re
import string
from collections import Counter

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


def exact_match(predicted: str, answer: str) -> float:
    """Compare two texts.

    Args:
        predicted: The predicted text, "" for no answer.
        answer: A right one, "" where there is none.

    Returns:
        1 where both are the same after normalisation, else 0.
    """
    return float(normalize_answer(predicted) == normalize_answer(answer))


def token_f1(predicted: str, answer: str) -> float:
    """Compare the words of two texts.

    Args:
        predicted: The predicted text, "" for no answer.
        answer: A right one, "" where there is none.

    Returns:
        F1 of the words they share, with repetitions; where one side has none, whether both do.
    """
    words, right = normalize_answer(predicted).split(), normalize_answer(answer).split()
    if not words or not right:
        return float(words == right)
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right))
