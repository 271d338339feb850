"""Training of a tokenizer: texts -> a folder with the model and its Hugging Face form.

- `TrainingOptions`: vocabulary size and sample.
- `train_tokenizer`: from any stream of texts; `train_tokenizer_from_sources`: from files.
- `TokenizerReport`: how well it fits text that it was not trained on.

The same texts give the same bytes, in whatever order they come: the sample is chosen by the hash of
the text, and the trainer's threads, over which it adds up floats, are fixed in number.
"""

import hashlib
import heapq
import io
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from data_prep.cleaning import CleaningOptions, clean_document, split_long
from data_prep.documents import ReadOptions, ReadReport, plan_units, read_unit
from data_prep.errors import UserError
from data_prep.hf_tokenizer import write_hf_tokenizer
from data_prep.tokenizer import CLS, MODEL_FILE, PAD, SEP, UNK, Tokenizer

# Two runs agree only with equal numbers of threads, so the number is part of the recipe.
_NUM_THREADS = 16
_SAMPLE_UNIT_BYTES = 16 << 10
_SENTENCE_BYTES = 4096
_HELD_BACK_FRACTION = 0.02
_HELD_BACK_BYTES = 2 << 20
_TOO_HIGH = re.compile(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)")
_TOO_LOW = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


@dataclass(frozen=True)
class TrainingOptions:
    """What to train."""

    vocab_size: int = 128_000
    """Pieces of the model, special and byte pieces included; [MASK] and padding come on top."""
    sample_bytes: int = 256 << 20
    """Text that is used at most, chosen by hash; training takes about 20 times that in memory."""
    character_coverage: float = 0.9995
    """Share of the characters that get pieces; the rest is spelled in bytes."""

    def __post_init__(self) -> None:
        if not 300 <= self.vocab_size <= 4_000_000:
            raise UserError(
                f"vocabulary size {self.vocab_size} is out of range; choose 300 to 4000000 pieces "
                "(260 of them are special and byte pieces)"
            )
        if not 0.98 <= self.character_coverage <= 1:
            raise UserError(
                f"character coverage {self.character_coverage} is out of range; choose 0.98 to 1"
            )
        if self.sample_bytes < _SAMPLE_UNIT_BYTES:
            raise UserError(
                f"a sample of {self.sample_bytes} bytes is too small; "
                f"allow {_SAMPLE_UNIT_BYTES} or more"
            )


@dataclass(frozen=True)
class TokenizerReport:
    """How well a tokenizer fits; the rates are measured on text held back from its training."""

    num_pieces: int
    """Pieces of the model."""
    vocab_size: int
    """Rows of the embedding table: pieces and [MASK], padded."""
    fingerprint: str
    """SHA-256 of spm.model, in hex."""
    text_bytes: int
    """Bytes of text offered."""
    trained_bytes: int
    """Bytes of the sample that it was trained on."""
    held_back_bytes: int
    """Bytes of the sample that the rates are measured on."""
    tokens_per_word: float
    """Fertility: tokens a word between white space."""
    bytes_per_token: float
    """UTF-8 bytes a token."""
    unknown_rate: float
    """Share of [UNK] among the tokens."""
    byte_rate: float
    """Share of byte pieces among the tokens."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return asdict(self)


def train_tokenizer_from_sources(
    sources: Sequence[str],
    output: Path,
    options: TrainingOptions,
    read_options: ReadOptions,
    read_report: ReadReport,
) -> TokenizerReport:
    """Train a tokenizer on files; every document is read once, none is held.

    Args:
        sources: Files, folders and globs.
        output: Folder to make; it must be empty if it exists.
        options: What to train.
        read_options: How the sources are read.
        read_report: Where dropped inputs are counted.

    Returns:
        How well the tokenizer fits.

    Raises:
        UserError: As `plan_units`, `read_unit` and `train_tokenizer`.
    """
    _check_output(output)
    units = plan_units(sources, read_options, report=read_report)
    cleaning = CleaningOptions()

    def texts() -> Iterator[str]:
        for unit in units:
            for document in read_unit(unit, read_options, read_report):
                cleaned = clean_document(document, cleaning, read_report)
                if cleaned is not None:
                    yield cleaned.text

    return train_tokenizer(texts(), output, options)


def train_tokenizer(
    texts: Iterable[str], output: Path, options: TrainingOptions
) -> TokenizerReport:
    """Train a SentencePiece unigram model and write the tokenizer folder.

    nmt_nfkc normalization, byte fallback, [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3: the layout of the
    released DeBERTaV3 (arXiv:2111.09543, section 4).

    Args:
        texts: Texts without lone surrogates, read once.
        output: Folder to make, empty if it exists. It appears when it is complete.
        options: What to train.

    Returns:
        How well the tokenizer fits.

    Raises:
        UserError: The folder is not empty, there is no text, or too little for the vocabulary.
    """
    _check_output(output)
    sample = _draw_sample(texts, options.sample_bytes)
    if not sample.units:
        raise UserError("there is no text to train a tokenizer on; every source was empty")
    held_back, trained = _hold_back(sample.units)
    model = _train_model(trained, options)
    _write_folder(model, output)
    return _measure(Tokenizer(model), sample.text_bytes, trained, held_back)


def _check_output(output: Path) -> None:
    # A rename replaces an empty folder, and nothing else.
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} exists already; name a new folder, or delete this one, so that no dataset "
            "loses its tokenizer"
        )


@dataclass(frozen=True)
class _Sample:
    units: list[str]
    text_bytes: int


def _draw_sample(texts: Iterable[str], sample_bytes: int) -> _Sample:
    """Keep the texts with the lowest hashes, as many as fit: the same ones in any order of input.

    The result is the longest run, in the order of the hashes, that fits. What was once pushed out
    bounds what may come in (`ceiling`), or a small late text could slip in behind a large one.
    """
    heap: list[tuple[int, str]] = []
    ceiling = 1 << 64
    kept_bytes = text_bytes = 0
    for text in texts:
        for unit in split_long(text, _SAMPLE_UNIT_BYTES):
            data = unit.encode("utf-8")
            text_bytes += len(data)
            key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            if key >= ceiling:
                continue
            heapq.heappush(heap, (-key, unit))
            kept_bytes += len(data)
            while kept_bytes > sample_bytes:
                negative_key, removed = heapq.heappop(heap)
                ceiling = -negative_key
                kept_bytes -= len(removed.encode("utf-8"))
    heap.sort(reverse=True)
    return _Sample([unit for _, unit in heap], text_bytes)


def _hold_back(units: list[str]) -> tuple[list[str], list[str]]:
    """Set a share of the sample aside for the report; one unit at least, but not the only one."""
    count = max(1, int(len(units) * _HELD_BACK_FRACTION))
    count = min(count, _HELD_BACK_BYTES // _SAMPLE_UNIT_BYTES)
    return (units[:count], units[count:]) if len(units) > count else (units, units)


def _sentences(units: Iterable[str]) -> Iterator[str]:
    # SentencePiece skips sentences above its limit without a word.
    for unit in units:
        for line in unit.split("\n"):
            for sentence in split_long(line, _SENTENCE_BYTES):
                if not sentence.isspace():
                    yield sentence


def _train_model(units: list[str], options: TrainingOptions) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(units),
            model_writer=model,
            model_type="unigram",
            vocab_size=options.vocab_size,
            character_coverage=options.character_coverage,
            normalization_rule_name="nmt_nfkc",
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=CLS,
            eos_piece=SEP,
            unk_piece=UNK,
            max_sentence_length=2 * _SENTENCE_BYTES,
            shuffle_input_sentence=False,
            num_threads=_NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(error, options.vocab_size) from error
    return model.getvalue()


def _training_error(error: RuntimeError, vocab_size: int) -> Exception:
    if match := _TOO_HIGH.search(str(error)):
        return UserError(
            f"the text is too small for a vocabulary of {vocab_size} pieces; "
            f"the largest that fits is {match[1]}: pass --vocab-size {match[1]}, or add text"
        )
    if match := _TOO_LOW.search(str(error)):
        return UserError(
            f"a vocabulary of {vocab_size} pieces cannot hold the characters of the text; "
            f"pass --vocab-size {match[1]} or more, or a lower character coverage"
        )
    return error


def _write_folder(model: bytes, output: Path) -> None:
    partial = output.with_name(f"{output.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    model_file = partial / MODEL_FILE
    model_file.write_bytes(model)
    write_hf_tokenizer(model_file, partial)
    partial.rename(output)


def _measure(
    tokenizer: Tokenizer, text_bytes: int, trained: list[str], held_back: list[str]
) -> TokenizerReport:
    tokens = unknown = byte_pieces = words = 0
    for unit in held_back:
        ids = tokenizer.encode(unit)
        words += len(unit.split())
        tokens += len(ids)
        unknown += ids.count(tokenizer.unk_id)
        byte_pieces += sum(value in tokenizer.byte_ids for value in ids)
    held_back_bytes = _size(held_back)
    return TokenizerReport(
        num_pieces=tokenizer.num_pieces,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        text_bytes=text_bytes,
        trained_bytes=_size(trained),
        held_back_bytes=held_back_bytes,
        tokens_per_word=tokens / max(1, words),
        bytes_per_token=held_back_bytes / max(1, tokens),
        unknown_rate=unknown / max(1, tokens),
        byte_rate=byte_pieces / max(1, tokens),
    )


def _size(units: list[str]) -> int:
    return sum(len(unit.encode("utf-8")) for unit in units)
