"""The small corpus of the test suite as a dataset, for what runs without pytest."""

from pathlib import Path

from data_prep.build import build
from data_prep.build_plan import BuildOptions
from data_prep.documents import ReadOptions, ReadReport, embedded_corpus
from data_prep.executors import ProcessExecutor
from data_prep.tokenizer_training import TrainingOptions, train_tokenizer_from_sources

DOCUMENTS = 8


def make_small_dataset(folder: Path) -> Path:
    """Train a tokenizer of 600 pieces and build a dataset with a tenth held out."""
    texts = [str(path) for path in sorted(Path(embedded_corpus()).rglob("*.txt"))[:DOCUMENTS]]
    options = ReadOptions(txt_document="line")
    tokenizer = folder / "tokenizer"
    train_tokenizer_from_sources(texts, tokenizer, TrainingOptions(600), options, ReadReport())
    dataset = folder / "dataset"
    build_options = BuildOptions(read=options, heldout_fraction=0.1)
    build(texts, tokenizer, dataset, build_options, ProcessExecutor(1))
    return dataset
