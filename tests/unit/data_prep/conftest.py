"""A tiny tokenizer, a tiny corpus and the dataset made of them; read-only, made once a session."""

import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_prep.build import build
from data_prep.build_plan import BuildOptions
from data_prep.cli import main
from data_prep.tokenizer_training import TrainingOptions, train_tokenizer
from tests.two_token_files import COUNTS, block_hashes

SYLLABLES = ["ka", "to", "mi", "re", "su", "no", "la", "vi", "po", "den", "gra", "shi"]


class InlineExecutor:
    """Runs the units in this process: the smallest thing that satisfies `Executor`."""

    def run(self, task, items):
        for item in items:
            yield task(item)


def make_texts(count: int, seed: int) -> list[str]:
    """Texts of 5 to 60 invented words, all different."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))

    return [" ".join(word() for _ in range(rng.randint(5, 60))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="session")
def inline_executor():
    return InlineExecutor()


@pytest.fixture(scope="session")
def texts():
    """(count, seed) -> texts."""
    return make_texts


@pytest.fixture(scope="session")
def jsonl():
    """(path, texts) -> a .jsonl file, its folder made."""
    return write_jsonl


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Path:
    """A tokenizer folder of 400 pieces for the invented words."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(make_texts(400, seed=1), folder, TrainingOptions(vocab_size=400))
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """Two .jsonl files and a folder of .txt files."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", make_texts(150, seed=2))
    write_jsonl(folder / "b.jsonl", make_texts(60, seed=3))
    (folder / "letters").mkdir()
    for index, text in enumerate(make_texts(10, seed=4)):
        (folder / "letters" / f"{index}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory, tiny_corpus, tiny_tokenizer) -> Path:
    """The corpus as a dataset of three sources and both splits."""
    folder = tmp_path_factory.mktemp("dataset") / "dataset"
    sources = [str(tiny_corpus / name) for name in ("a.jsonl", "b.jsonl", "letters")]
    options = BuildOptions(heldout_fraction=0.2, unit_bytes=8000)
    build(sources, tiny_tokenizer, folder, options, InlineExecutor())
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """(words of the command line) -> exit code, stdout, stderr."""

    def run_main(*words):
        monkeypatch.setattr(sys, "argv", ["deberta-prep", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run_main


@pytest.fixture(scope="session")
def train_model():
    """(lines, options of SentencePiece) -> the bytes of a model with our special pieces."""

    def train(lines, **options) -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="[PAD]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            unk_piece="[UNK]",
            minloglevel=2,
            **options,
        )
        return model.getvalue()

    return train


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2**32, count, np.uint32) for count in COUNTS]


@pytest.fixture(scope="module")
def originals(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    paths = [folder / str(number) for number in range(len(tokens))]
    for path, values in zip(paths, tokens, strict=True):
        path.write_bytes(values.tobytes())
    return paths


@pytest.fixture
def paths(tokens, tmp_path):
    """Files that a test may damage."""
    for number, values in enumerate(tokens):
        (tmp_path / str(number)).write_bytes(values.tobytes())
    return [tmp_path / str(number) for number in range(len(tokens))]


@pytest.fixture(scope="module")
def hashes(tokens):
    return [block_hashes(values.tobytes()) for values in tokens]
