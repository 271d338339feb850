"""The Hugging Face form of a tokenizer, and the proof that it gives the same ids.

- `write_hf_tokenizer`: spm.model -> tokenizer.json and the two small files beside it.
- `compare_tokenizers`: the ids of both on the same texts; mismatches counted by class.

transformers' own conversion (DebertaV2Tokenizer) drops the normalization of the model, which turns
ligatures, full-width letters and no-break spaces into [UNK]; so the file is built here and is
declared as a PreTrainedTokenizerFast, which takes it as it is.

Three classes of text can still differ, for reasons that a tokenizer.json cannot express:

    tie        two segmentations with the same score; SentencePiece adds float32, the other float64
    marks      stacked combining marks, marks on compatibility characters, Korean letters (jamo)
               that form no syllable: the normalizer of `tokenizers` looks at one grapheme at a
               time and reorders its marks
    literal    text that spells a special token: text to SentencePiece, the token itself to Hugging
               Face; also a byte piece ("<0x41>") or a full-width special token if its brackets
               have no pieces, and the mark for spaces if the model does not normalize it
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.cleaning import split_long
from data_prep.errors import UserError
from data_prep.tokenizer import CLS, CONTROL_PIECES, MASK, MODEL_FILE, PAD, SEP, UNK, Tokenizer

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
MAX_LENGTH = 512
_SPACE_MARK = "\u2581"
_COMPARED_BYTES = 4096
_EXAMPLES = 5
_SPELLED = re.compile(rf"\[(?:PAD|CLS|SEP|UNK|MASK)\]|<0x[0-9A-F]{{2}}>|{_SPACE_MARK}")
_LOOSE_JAMO = re.compile("[\u1100-\u11ff\u3131-\u318e\uffa0-\uffdc]")
# Rules whose character maps contain canonical composition, so that composing first changes nothing.
_COMPOSING_RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")


def write_hf_tokenizer(model_file: Path, folder: Path) -> None:
    """Write the Hugging Face files of a SentencePiece model.

    Args:
        model_file: The model, of DeBERTa's layout.
        folder: Existing folder; tokenizer.json, tokenizer_config.json and special_tokens_map.json
            are written into it. spm.model is not copied.

    Raises:
        UserError: The model is not of the layout, or normalizes in a way that has no
            Hugging Face form.
    """
    tokenizer = Tokenizer.load(model_file)
    backend = _build_backend(tokenizer, str(model_file))
    backend.save(str(folder / TOKENIZER_FILE), pretty=True)
    special = {
        "bos_token": CLS,
        "eos_token": SEP,
        "unk_token": UNK,
        "sep_token": SEP,
        "pad_token": PAD,
        "cls_token": CLS,
        "mask_token": MASK,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": MAX_LENGTH,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / CONFIG_FILE, config)
    _write_json(folder / SPECIAL_TOKENS_FILE, special)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _build_backend(tokenizer: Tokenizer, name: str) -> Any:
    """Build the `tokenizers` object; imported here, since only this needs it."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, decoders, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import Unigram

    proto = sentencepiece_model_pb2.ModelProto.FromString(  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.model_bytes
    )
    _check_expressible(proto, name)
    backend = Backend(
        Unigram(
            _vocabulary(proto), tokenizer.unk_id, byte_fallback=proto.trainer_spec.byte_fallback
        )
    )
    backend.normalizer = _build_normalizer(proto.normalizer_spec)
    # Pieces never cross white space, so words can be encoded one by one: without the split, time
    # and memory grow faster than the text.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE_MARK, "always", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(_SPACE_MARK, "always")]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*CONTROL_PIECES, MASK)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, tokenizer.cls_id), (SEP, tokenizer.sep_id)],
    )
    return backend


def _check_expressible(proto: Any, name: str) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    needed = {
        "a unigram model": trainer.model_type == trainer.UNIGRAM,
        "split_by_whitespace": trainer.split_by_whitespace,
        "treat_whitespace_as_suffix=false": not trainer.treat_whitespace_as_suffix,
        "add_dummy_prefix": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "escape_whitespaces": normalizer.escape_whitespaces,
    }
    missing = [property_ for property_, holds in needed.items() if not holds]
    if missing:
        raise UserError(
            f"{name} was trained without {', '.join(missing)}; its ids would depend on what "
            "stands around a word. Train one with `deberta-prep train-tokenizer`"
        )


def _vocabulary(proto: Any) -> list[tuple[str, float]]:
    """The pieces with their scores, such that text cannot match the special ones.

    To SentencePiece, control and byte pieces are no text; `tokenizers` matches every piece. With a
    score below that of their characters together, theirs are never the best.
    """
    visible = (proto.SentencePiece.NORMAL, proto.SentencePiece.USER_DEFINED)
    # Read once: a field of a message costs more than all that is done with it here.
    pieces = [(piece.piece, piece.score, piece.type in visible) for piece in proto.pieces]
    lowest = min(score for _, score, _ in pieces)
    longest = max(len(piece) for piece, _, is_visible in pieces if not is_visible)
    hidden = (longest + 1) * lowest
    return [(piece, score if is_visible else hidden) for piece, score, is_visible in pieces]


def _build_normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.name in _COMPOSING_RULES:
        # The next step sees one grapheme at a time and misses compositions of more than 5 bytes
        # (Japanese, Korean and Vietnamese in decomposed form); composed, there are none.
        steps.append(normalizers.NFC())
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    # Not Strip: it would take U+0085 too, which SentencePiece keeps.
    steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
    steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    return normalizers.Sequence(steps)


@dataclass
class ParityReport:
    """How often the Hugging Face form gives other ids than SentencePiece, by class."""

    texts: int = 0
    """Texts compared (long ones in parts of 4 KiB, each counted)."""
    ties: int = 0
    """Differences between segmentations of the same score."""
    marks: int = 0
    """Differences in texts with stacked or unusual combining marks, or loose jamo."""
    literals: int = 0
    """Differences in texts that spell a special token or a byte piece."""
    other: int = 0
    """Differences of no known class: there should be none."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Class -> the first texts that differ, shortened, in ASCII."""

    @property
    def mismatches(self) -> int:
        """Texts with differences of any class."""
        return self.ties + self.marks + self.literals + self.other

    def __add__(self, other: "ParityReport") -> "ParityReport":
        examples = {kind: list(texts) for kind, texts in self.examples.items()}
        for kind, texts in other.examples.items():
            examples[kind] = (examples.get(kind, []) + texts)[:_EXAMPLES]
        return ParityReport(
            self.texts + other.texts,
            self.ties + other.ties,
            self.marks + other.marks,
            self.literals + other.literals,
            self.other + other.other,
            examples,
        )


def compare_tokenizers(folder: Path, texts: Iterable[str]) -> ParityReport:
    """Encode texts with spm.model and with tokenizer.json, and count the differences by class.

    Args:
        folder: A tokenizer folder.
        texts: Texts without lone surrogates; long ones are compared in parts.

    Returns:
        The counts.

    Raises:
        UserError: A file of the folder is missing or broken.
    """
    from tokenizers import Tokenizer as Backend

    tokenizer = Tokenizer.load(folder / MODEL_FILE)
    file = folder / TOKENIZER_FILE
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:
        # `tokenizers` raises bare Exceptions.
        raise UserError(
            f"{file} cannot be read as a tokenizer ({error}); train the tokenizer again"
        ) from error
    report = ParityReport()
    for text in texts:
        for part in split_long(text, _COMPARED_BYTES):
            expected = tokenizer.encode(part)
            found = backend.encode(part, add_special_tokens=False).ids
            report += _compare(tokenizer, part, expected, found)
    return report


def _compare(
    tokenizer: Tokenizer, text: str, expected: list[int], found: list[int]
) -> ParityReport:
    if expected == found:
        return ParityReport(texts=1)
    example = ascii(text)[:200]
    if _SPELLED.search(unicodedata.normalize("NFKC", text)):
        return ParityReport(texts=1, literals=1, examples={"literal": [example]})
    if _is_tie(tokenizer, expected, found):
        return ParityReport(texts=1, ties=1, examples={"tie": [example]})
    if _has_unusual_marks(text):
        return ParityReport(texts=1, marks=1, examples={"marks": [example]})
    return ParityReport(texts=1, other=1, examples={"other": [example]})


def _is_tie(tokenizer: Tokenizer, expected: list[int], found: list[int]) -> bool:
    """Tell whether two segmentations spell the same and every word scores the same in float32."""
    ours, theirs = _words(tokenizer, expected), _words(tokenizer, found)
    if [word for word, _ in ours] != [word for word, _ in theirs]:
        return False
    total = abs(math.fsum(tokenizer.scores(expected)))
    for (_, our_ids), (_, their_ids) in zip(ours, theirs, strict=True):
        gap = abs(math.fsum(tokenizer.scores(our_ids)) - math.fsum(tokenizer.scores(their_ids)))
        # SentencePiece sums from the start of the text; each float32 addition rounds a sum of up
        # to `total` by half of its last bit.
        if gap > (len(our_ids) + len(their_ids)) * total * 2.0**-24:
            return False
    return True


def _words(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    words: list[tuple[str, list[int]]] = []
    for value, piece in zip(ids, tokenizer.pieces(ids), strict=True):
        if words and not piece.startswith(_SPACE_MARK):
            spelled, members = words[-1]
            words[-1] = (spelled + piece, [*members, value])
        else:
            words.append((piece, [value]))
    return words


def _has_unusual_marks(text: str) -> bool:
    if _LOOSE_JAMO.search(text + unicodedata.normalize("NFC", text)):
        return True
    previous = ""
    for character in text:
        if unicodedata.category(character).startswith("M"):
            stacked = previous and unicodedata.category(previous).startswith("M")
            on_compatibility = unicodedata.normalize("NFKC", previous) != previous
            if stacked or on_compatibility or unicodedata.decomposition(character):
                return True
        previous = character
    return False
