import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as Backend

from data_prep.documents import embedded_corpus
from data_prep.errors import UserError
from data_prep.hf_tokenizer import ParityReport, compare_tokenizers, write_hf_tokenizer
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_training import TrainingOptions, train_tokenizer

PROBES = [
    "",
    " ",
    "  two  spaces \t tabs\r\nand\nlines  ",
    "of\ufb01ce \ufb02ow \ufb03",
    "\uff21\uff22\uff23\uff11\uff12\uff13\uff01",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 1\ufe0f\u20e3",
    "no\u00a0break\u202fspaces\u3000wide",
    "zero\u200bwidth\u200djoiner\ufeffmark\u00adsoft",
    "\u6f22\u5b57\u3068\u304b\u306a\u3001\ud55c\uae00\u3002",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    unicodedata.normalize("NFD", "Vi\u1ec7t Nam \u1ee9ng \u304c\u30d1 \ud55c\uae00"),
    "\u00bd \u2460 \u2122 \u00a9 \u212b x\u00b2 \u2026",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "a\u2028b\u2029c\x85d\x0be\x0cf",
    "\x85edges\x85",
    "\u2581literal \u2581 marks\u2581",
    "a\x00b\x07c\x7fd",
    "\uff3bMASK\uff3d \uff3bCLS\uff3d \uff3bUNK\uff3d",
    "<0x41> <0x0A><0x00>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "made"
    paths = sorted(embedded_corpus().iterdir())[:10]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    train_tokenizer([*texts, "< > [ ] K " * 500], folder, TrainingOptions(vocab_size=3000))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", PROBES, ids=ascii)
def test_ids_are_those_of_sentencepiece(folder, loaded, text):
    expected = Tokenizer.load(folder).encode(text)
    assert loaded(text).input_ids == [1, *expected, 2]
    assert loaded(text, add_special_tokens=False).input_ids == expected


def test_every_character_gives_the_same_ids_alone_and_inside(folder):
    assigned = (c for c in map(chr, range(1, 0x30000)) if unicodedata.category(c)[0] != "C")
    # Han and Hangul are uniform: a share of them is enough.
    sample = [c for c in assigned if not "\u4e00" <= c <= "\ud7a3" or ord(c) % 16 == 0]
    assert len(sample) > 40_000
    controls = [chr(n) for n in (*range(1, 32), *range(127, 160))]
    words = [f"a{c}b {c} x{c}" for c in sample + controls]
    report = compare_tokenizers(
        folder, [" ".join(words[n : n + 8]) for n in range(0, len(words), 8)]
    )
    # U+0344 is two marks in one character.
    assert (report.mismatches, report.marks) == (1, 1), report.examples


def test_the_embedded_corpus_gives_the_same_ids(folder):
    texts = [path.read_text(encoding="utf-8") for path in embedded_corpus().iterdir()]
    report = compare_tokenizers(folder, texts)
    assert report.texts > 300
    assert report.mismatches == report.ties
    assert report.ties < report.texts / 100


@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aeo \u0301\u0323[<"))))
def test_no_text_gives_other_ids_for_an_unknown_reason(folder, text):
    assert compare_tokenizers(folder, [text]).other == 0


def test_the_three_classes_are_told_apart(folder):
    texts = {
        "literal": ["say [MASK]", "[CLS]", "x[PAD]y"],
        "marks": ["a\u0300\u0301\u0325", "\u00bd\u0301", "\u3268\u1174", "\uad50\u11bb"],
    }
    report = compare_tokenizers(folder, [*texts["literal"], *texts["marks"], "plain"])
    assert report == ParityReport(
        texts=8,
        marks=4,
        literals=3,
        examples={kind: [ascii(text) for text in some] for kind, some in texts.items()},
    )
    assert report.mismatches == 7
    assert (report + report).mismatches == 14
    assert len((report + report).examples["literal"]) == 5


def edited_folder(folder, tmp_path, edit):
    """A copy of the folder with another tokenizer.json."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    edit(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


def test_a_wrong_normalizer_is_found(folder, tmp_path):
    def drop_charsmap(values):
        steps = values["normalizer"]["normalizers"]
        values["normalizer"]["normalizers"] = [s for s in steps if s["type"] != "Precompiled"]

    report = compare_tokenizers(edited_folder(folder, tmp_path, drop_charsmap), PROBES)
    assert report.other >= 6


@pytest.mark.parametrize(("gap", "kind"), [(0.0, "tie"), (0.001, "other")])
def test_a_difference_is_a_tie_only_if_the_scores_are_equal(folder, tmp_path, gap, kind):
    tokenizer = Tokenizer.load(folder)
    pieces = tokenizer.pieces(range(260, 2000))
    word = next(piece for piece in pieces if piece[0] == "\u2581" and piece[1:].isalpha())
    text = word[1:]

    def forbid_word(values):
        for entry in values["model"]["vocab"]:
            entry[1] -= 1000.0 * (entry[0] == word)

    edited = edited_folder(folder, tmp_path, forbid_word)
    backend = Backend.from_file(str(edited / "tokenizer.json"))
    in_parts = sum(tokenizer.scores(backend.encode(text, add_special_tokens=False).ids))
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "spm.model").read_bytes())
    # One step of float32 above the sum of the parts, so that SentencePiece takes the whole word.
    score = np.nextafter(np.float32(in_parts + gap), np.float32(0))
    next(piece for piece in proto.pieces if piece.piece == word).score = float(score)
    (edited / "spm.model").write_bytes(proto.SerializeToString())

    report = compare_tokenizers(edited, [f"{text} and {text}", "and"])
    assert (report.texts, report.mismatches) == (2, 1)
    assert list(report.examples) == [kind]


def test_transformers_reads_the_folder_as_it_is(folder, loaded):
    assert (loaded.vocab_size, len(loaded)) == (3000, 3001)
    assert loaded.mask_token_id == Tokenizer.load(folder).mask_id == 3000
    assert [loaded.pad_token_id, loaded.cls_token_id, loaded.sep_token_id] == [0, 1, 2]
    assert loaded.unk_token_id == 3
    assert loaded.model_max_length == 512
    pair = loaded("one [MASK]", "two")
    assert pair.token_type_ids == [0] * (len(pair.input_ids) - 2) + [1, 1]
    assert pair.input_ids[0] == 1
    assert pair.input_ids.count(2) == 2
    assert pair.input_ids.count(3000) == 1
    assert loaded(["a", "a b c"], padding=True).attention_mask[0][-1] == 0


@pytest.mark.parametrize("text", ["The \u00e9t\u00e9 of \U0001f600, it's 2024.", "a", ""])
def test_decoding_is_that_of_sentencepiece(folder, loaded, text):
    tokenizer = Tokenizer.load(folder)
    ids = loaded(text).input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == text


def test_saving_by_transformers_changes_no_id(loaded, tmp_path):
    from transformers import AutoTokenizer

    loaded.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(PROBES).input_ids == loaded(PROBES).input_ids
    assert again.mask_token_id == loaded.mask_token_id


def test_a_model_configuration_beside_it_changes_nothing(folder, loaded, tmp_path):
    from transformers import AutoTokenizer

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2", "vocab_size": 3100}')
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported(PROBES).input_ids == loaded(PROBES).input_ids


def test_the_files_are_a_function_of_the_model(folder, tmp_path):
    write_hf_tokenizer(folder / "spm.model", tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("normalizer_spec", "add_dummy_prefix", False, "add_dummy_prefix"),
        ("normalizer_spec", "remove_extra_whitespaces", False, "remove_extra_whitespaces"),
        ("trainer_spec", "split_by_whitespace", False, "split_by_whitespace"),
        ("trainer_spec", "treat_whitespace_as_suffix", True, "treat_whitespace_as_suffix=false"),
        ("trainer_spec", "model_type", 2, "a unigram model"),
    ],
)
def test_a_model_that_depends_on_context_is_refused(
    folder, tmp_path, section, name, value, message
):
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "spm.model").read_bytes())
    setattr(getattr(proto, section), name, value)
    (tmp_path / "spm.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=f"was trained without {message}; its ids would depend"):
        write_hf_tokenizer(tmp_path / "spm.model", tmp_path)


@pytest.mark.parametrize("rule", ["identity", "nfkc"])
def test_other_normalizations_give_the_same_ids_too(folder, train_model, tmp_path, rule):
    lines = next(embedded_corpus().iterdir()).read_text(encoding="utf-8").split("\n")
    options = {"vocab_size": 600, "normalization_rule_name": rule, "byte_fallback": True}
    (tmp_path / "spm.model").write_bytes(train_model(lines, **options))
    write_hf_tokenizer(tmp_path / "spm.model", tmp_path)
    report = compare_tokenizers(tmp_path, PROBES + lines)
    assert report.mismatches == report.literals <= 3


def test_a_broken_file_is_refused(folder, tmp_path):
    edited = edited_folder(folder, tmp_path, lambda values: None)
    (edited / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read as a tokenizer"):
        compare_tokenizers(edited, ["a"])
    (edited / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read as a tokenizer"):
        compare_tokenizers(edited, ["a"])
