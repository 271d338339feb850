"""Text <-> token ids, by SentencePiece and the `.model` itself.

- `Tokenizer`: encoding, decoding and the special ids; layer 0, so that `pipeline` may import it.
- `padded_vocab_size`: pieces + [MASK], rounded up to the next multiple of 100.

The layout is the released DeBERTaV3's: [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3 are pieces of the model,
[MASK] is the first id behind its last piece. Special tokens cannot be spelled: text that reads
"[MASK]" or "[CLS]" stays text. Training is in `tokenizer_training`, the Hugging Face form of the
same tokenizer in `hf_tokenizer`.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from data_prep.errors import UserError

MODEL_FILE = "spm.model"
PAD, CLS, SEP, UNK, MASK = "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"
CONTROL_PIECES = (PAD, CLS, SEP, UNK)
"""The pieces with ids 0 to 3."""
SPACE_MARK = "\u2581"
"""How pieces spell the space in front of a word."""
_VOCAB_MULTIPLE = 100


def padded_vocab_size(num_pieces: int) -> int:
    """Compute the size of the embedding table for a SentencePiece model.

    Args:
        num_pieces: Pieces of the model.

    Returns:
        Pieces and [MASK], rounded up to a multiple of 100: 128,000 pieces give 128,100.
    """
    return -(-(num_pieces + 1) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def _is_separator(piece: str) -> bool:
    """Tell a single character that is punctuation, a space or a control character.

    ASCII symbols such as "$" and "^" count as punctuation, as in BERT.
    """
    if len(piece) != 1:
        return False
    category = unicodedata.category(piece)
    is_symbol = piece.isascii() and not piece.isalnum()
    return is_symbol or category[0] in "CP" or category == "Zs"


@lru_cache(maxsize=1)
def _processor_of(model: bytes) -> sentencepiece.SentencePieceProcessor:
    # Nothing changes a processor once it is loaded, and 128,000 pieces take 0.16 s: share it.
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


class Tokenizer:
    """A SentencePiece model with DeBERTa's special ids.

    Immutable; safe to share between threads and to send to other processes.

    Args:
        model: Bytes of a SentencePiece `.model`.
        name: What to call it in messages.

    Raises:
        UserError: The bytes are no such model, or its pieces 0 to 3 are not DeBERTa's.
    """

    pad_id = 0
    cls_id = 1
    sep_id = 2
    unk_id = 3

    def __init__(self, model: bytes, name: str = MODEL_FILE):
        self._model = model
        self._name = name
        try:
            self._processor = _processor_of(model)
        except RuntimeError as error:
            raise UserError(
                f"{name} is not a SentencePiece model; name a folder made by "
                "`deberta-prep train-tokenizer`, or a .model file"
            ) from error
        self.num_pieces: int = self._processor.get_piece_size()
        self.mask_id: int = self.num_pieces
        self.vocab_size: int = padded_vocab_size(self.num_pieces)
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self._check_layout()

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Load a tokenizer.

        Args:
            path: A folder with spm.model in it, or a model file.

        Returns:
            The tokenizer.

        Raises:
            UserError: There is no such file, or it is not a model of DeBERTa's layout.
        """
        path = Path(path)
        file = path / MODEL_FILE if path.is_dir() else path
        try:
            model = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer {file} cannot be read: {error.strerror}; name a folder made by "
                "`deberta-prep train-tokenizer`, or a .model file"
            ) from error
        return cls(model, str(file))

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, str]]:
        return (Tokenizer, (self._model, self._name))

    def _check_layout(self) -> None:
        found = tuple(self._processor.id_to_piece(n) for n in range(min(4, self.num_pieces)))
        if found != CONTROL_PIECES:
            raise UserError(
                f"{self._name} starts with the pieces {' '.join(found)}; DeBERTa's layout is "
                f"{' '.join(CONTROL_PIECES)}: train one with `deberta-prep train-tokenizer`"
            )
        spelled = self.encode(" ".join((*CONTROL_PIECES[:3], MASK)))
        if min(spelled, default=self.num_pieces) < self.unk_id:
            raise UserError(
                f"{self._name} turns text that spells a special token into its id; its [PAD], "
                "[CLS] and [SEP] must be control symbols, not user-defined ones"
            )

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of the 256 pieces that spell bytes; empty for a model without byte fallback."""
        return frozenset(n for n in range(self.num_pieces) if self._processor.is_byte(n))

    @cached_property
    def is_word_start(self) -> npt.NDArray[np.bool_]:
        """Which ids begin a word, bool [vocab_size]; other pieces continue the one before them.

        A piece with the space mark does, and so does a lone punctuation mark; ids that are no
        pieces of text do not count.

        Source:
            `spm_tokenizer.py` (part_of_whole_word) of the release.
        """
        flags = np.zeros(self.vocab_size, dtype=np.bool_)
        for value in range(len(CONTROL_PIECES), self.num_pieces):
            piece = self._piece(value)
            flags[value] = piece.startswith(SPACE_MARK) or _is_separator(piece)
        flags.flags.writeable = False
        return flags

    @property
    def model_bytes(self) -> bytes:
        """The SentencePiece model itself, whose SHA-256 is the fingerprint."""
        return self._model

    def encode(self, text: str) -> list[int]:
        """Encode one text; no special tokens are added, none can be spelled.

        Args:
            text: A text without lone surrogates. Memory grows with it; divide long ones with
                `cleaning.split_long`.

        Returns:
            Ids in [3, num_pieces).

        Raises:
            UnicodeEncodeError: The text holds a lone surrogate.
        """
        try:
            # Not as a batch of one, which costs SentencePiece a thread pool a call.
            return self._processor.encode(text, out_type=int)
        except (RuntimeError, TypeError):
            text.encode("utf-8")  # SentencePiece says little; Python names the character
            raise

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts, each alone, in this thread.

        Args:
            texts: Texts as for `encode`.

        Returns:
            The ids of each.

        Raises:
            UnicodeEncodeError: A text holds a lone surrogate.
        """
        try:
            # Without num_threads SentencePiece starts a thread for every core in every worker.
            return self._processor.encode(list(texts), out_type=int, num_threads=1)
        except (RuntimeError, TypeError):
            # SentencePiece says little of what it cannot take; Python names the character.
            for text in texts:
                text.encode("utf-8")
            raise

    def encode_with_offsets(self, text: str) -> tuple[list[int], npt.NDArray[np.int32]]:
        """Encode one text and say of every piece which characters it stands for.

        The space in front of a word belongs to its first piece. Pieces that make one character
        together, as bytes do, are empty but for the last.

        Args:
            text: A text as for `encode`.

        Returns:
            The ids of `encode`, and int32 [n, 2]: begin and end of each in the text.

        Raises:
            UnicodeEncodeError: The text holds a lone surrogate.
        """
        from sentencepiece import sentencepiece_pb2

        data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        proto = sentencepiece_pb2.SentencePieceText.FromString(  # pyright: ignore[reportAttributeAccessIssue]
            self._processor.encode(text, out_type="serialized_proto")
        )
        # Every byte but those that go on with a character begins one.
        character_at = np.concatenate([[0], np.cumsum((data & 0xC0) != 0x80)])
        ends = np.array([(piece.begin, piece.end) for piece in proto.pieces], dtype=np.int64)
        offsets = character_at[ends.reshape(-1, 2)].astype(np.int32)
        return [piece.id for piece in proto.pieces], offsets

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Turn ids back into text; special tokens and [MASK] leave no trace.

        Args:
            ids: Ids in [0, vocab_size), [n].

        Returns:
            The text, as normalized by the model.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        values = self._checked(ids)
        return self._processor.decode([value for value in values if value < self.num_pieces])

    def pieces(self, ids: Iterable[int] | np.ndarray) -> list[str]:
        """Name ids.

        Args:
            ids: Ids in [0, vocab_size), [n].

        Returns:
            The piece of each; "[MASK]", and "[unused128001]" for an id of the padding.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        return [self._piece(value) for value in self._checked(ids)]

    def scores(self, ids: Iterable[int] | np.ndarray) -> list[float]:
        """Look up the log probabilities of pieces.

        Args:
            ids: Ids in [0, num_pieces), [n].

        Returns:
            The model's score of each, in nats; 0 for special and byte pieces.
        """
        return [self._processor.get_score(int(value)) for value in ids]

    def _piece(self, value: int) -> str:
        if value < self.num_pieces:
            return self._processor.id_to_piece(value)
        return MASK if value == self.mask_id else f"[unused{value}]"

    def _checked(self, ids: Iterable[int] | np.ndarray) -> list[int]:
        values = [int(value) for value in ids]
        for value in values:
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"id {value} is not in the vocabulary of {self.vocab_size}")
        return values
