import hashlib
import importlib
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer, _is_separator, padded_vocab_size
from data_prep.tokenizer_training import TrainingOptions, train_tokenizer
from tests.reference import released_encoder

TEXT = "".join(
    f"the number {n * n:x} of words, [x] [MASK] [CLS] \u00e9t\u00e9\n" for n in range(500)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "made"
    train_tokenizer([TEXT], folder, TrainingOptions(vocab_size=320))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.load(folder)


def train_raw(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 60, **options},
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("pieces", "padded"), [(128_000, 128_100), (99, 100), (100, 200), (199, 200), (31_999, 32_000)]
)
def test_the_vocabulary_is_padded_to_hundreds(pieces, padded):
    assert padded_vocab_size(pieces) == padded


def test_the_layout_is_the_released_one(tokenizer):
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert (tokenizer.num_pieces, tokenizer.mask_id, tokenizer.vocab_size) == (320, 320, 400)
    assert tokenizer.pieces([0, 1, 2, 3, 320, 321, 399]) == [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "[MASK]",
        "[unused321]",
        "[unused399]",
    ]
    assert len(tokenizer.byte_ids) == 256


def test_word_starts_are_the_released_ones(folder, tokenizer):
    """The rule of the authors' PyPI package, for every piece and for single characters."""
    with released_encoder.loaded():
        released = importlib.import_module("DeBERTa.deberta.spm_tokenizer")
        theirs = released.SPMTokenizer(str(folder / "spm.model"))
    flags = tokenizer.is_word_start
    assert (flags.shape, flags.dtype) == ((400,), np.bool_)
    assert not flags[:4].any()
    assert not flags[320:].any()
    for value, piece in enumerate(tokenizer.pieces(range(4, 320)), 4):
        assert flags[value] == (not theirs.part_of_whole_word(piece)), piece
    assert 10 < flags.sum() < 300
    texts = dict(zip(tokenizer.pieces(range(400)), flags.tolist(), strict=True))
    assert (texts["\u2581"], texts[","], texts["e"], texts["<0x41>"]) == (True, True, False, False)
    for character in map(chr, range(0x3100)):
        expected = (
            released._is_punctuation(character)
            or released._is_control(character)
            or released._is_whitespace(character)
        )
        assert _is_separator(character) == expected, hex(ord(character))
    with pytest.raises(ValueError, match="read-only"):
        flags[0] = True


def test_ids_are_those_of_sentencepiece(folder, tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    texts = [TEXT, "", " ", "\u00e9 \ufb01 \uff21\n x", "\U0001f600", "[MASK]"]
    assert [tokenizer.encode(text) for text in texts] == [reference.encode(t) for t in texts]
    assert tokenizer.encode_batch(texts) == reference.encode(texts)
    assert tokenizer.scores([4, 300]) == [reference.get_score(4), reference.get_score(300)]


@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("[]MASKCLEPUND"))))
def test_no_text_spells_a_special_token(tokenizer, text):
    for spelled in (text, "[MASK]", f"[CLS]{text}[SEP] [PAD] [UNK]", f"<s>{text}</s>"):
        ids = tokenizer.encode(spelled)
        assert all(3 < value < tokenizer.num_pieces for value in ids)


def test_decoding_undoes_encoding_and_leaves_special_tokens_out(tokenizer):
    text = "the words of \u00e9t\u00e9, [MASK] \U0001f600"
    ids = [1, *tokenizer.encode(text), 320, 399, 2, 0]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array(ids, dtype=np.uint32)) == text
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("value", [-1, 400, 2**32 - 1])
def test_ids_outside_the_vocabulary_are_a_mistake(tokenizer, value):
    for use in (tokenizer.decode, tokenizer.pieces):
        with pytest.raises(ValueError, match=f"id {value} is not in the vocabulary of 400"):
            use([5, value])


def test_a_lone_surrogate_is_a_mistake(tokenizer):
    with pytest.raises(UnicodeEncodeError, match="position 1: surrogates not allowed"):
        tokenizer.encode("a\ud800")


def test_it_can_be_loaded_from_folder_or_file_and_be_sent(folder, tokenizer):
    model = (folder / "spm.model").read_bytes()
    for other in (
        Tokenizer.load(str(folder)),
        Tokenizer.load(folder / "spm.model"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert other.fingerprint == hashlib.sha256(model).hexdigest()
        assert other.model_bytes == model
        assert other.encode(TEXT) == tokenizer.encode(TEXT)


def test_threads_share_it(tokenizer):
    texts = [f"{n} words of the mask" * 50 for n in range(200)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == tokenizer.encode_batch(texts)


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none/spm.model cannot be read|none cannot be read"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"spm.model cannot be read: No such file"):
        Tokenizer.load(tmp_path)
    for content in (b"not a model", b""):
        (tmp_path / "spm.model").write_bytes(content)
        with pytest.raises(
            UserError, match=r"spm.model is not a SentencePiece model; name a folder"
        ):
            Tokenizer.load(tmp_path)


def test_another_layout_is_refused(tmp_path):
    (tmp_path / "spm.model").write_bytes(train_raw())
    with pytest.raises(
        UserError, match=r"starts with the pieces <unk> <s> </s> .*DeBERTa's layout"
    ):
        Tokenizer.load(tmp_path)


def test_special_tokens_that_text_can_spell_are_refused():
    model = train_raw(
        pad_id=-1,
        bos_id=-1,
        eos_id=-1,
        unk_id=3,
        unk_piece="[UNK]",
        user_defined_symbols=["[PAD]", "[CLS]", "[SEP]"],
    )
    with pytest.raises(UserError, match="text that spells a special token into its id"):
        Tokenizer(model)
