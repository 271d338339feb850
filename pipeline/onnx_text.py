"""Real sentences to compare two forms of a model on.

Letters: B sequences, L sequence length.
"""

import importlib.resources
import re
from pathlib import Path

import torch

from data_prep.errors import UserError

SENTENCES = 200
_BATCH = 8
_SENTENCE = re.compile(r"[^.!?]+[.!?]+")
_LEAST_WORDS = 4


def read_sentences(text: Path | None, count: int = SENTENCES) -> list[str]:
    """Read sentences, evenly spaced over a text.

    Args:
        text: A UTF-8 file; the project's sample corpus where None.
        count: At most so many.

    Returns:
        Sentences of four words or more, white space made single.

    Raises:
        UserError: The file cannot be read, or holds no sentence.
    """
    if text is None:
        folder = importlib.resources.files("data_prep") / "samples" / "speeches"
        files = sorted(folder.iterdir(), key=lambda file: file.name)
        content = "\n".join(file.read_text(encoding="utf-8") for file in files)
    else:
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {text}: cannot be read as UTF-8 text ({error})") from error
    found = [" ".join(match.split()) for match in _SENTENCE.findall(content)]
    sentences = [sentence for sentence in found if len(sentence.split()) >= _LEAST_WORDS]
    if not sentences:
        raise UserError(
            f"--text {text}: has no sentence of {_LEAST_WORDS} words that ends in . ! or ?"
        )
    step = max(1.0, len(sentences) / count)
    return [sentences[int(i * step)] for i in range(min(count, len(sentences)))]


def probe_inputs(
    repository: Path, max_length: int, text: Path | None
) -> list[dict[str, torch.Tensor]]:
    """Tokenize sentences as a user of the repository would.

    Args:
        repository: Holds the tokenizer.
        max_length: Of the model, in tokens.
        text: As of `read_sentences`.

    Returns:
        Batches of eight with padding, one of a single sentence, and one as long as the model takes:
        input_ids and attention_mask, int64 [B, L].

    Raises:
        UserError: There is no text, or no tokenizer.
    """
    from transformers import AutoTokenizer  # costs seconds to import

    if not any((repository / name).is_file() for name in ("tokenizer.json", "spm.model")):
        raise UserError(f"{repository}: tokenizer.json is missing, without which no text is read")
    tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=False)
    sentences = read_sentences(text)
    others = sentences[:-1]
    groups = [others[i : i + _BATCH] for i in range(0, len(others), _BATCH)]
    groups += [sentences[-1:], [" ".join(sentences)]]
    batches = []
    for group in groups:
        inputs = tokenizer(
            group, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        batches.append({key: inputs[key] for key in ("input_ids", "attention_mask")})
    return batches
