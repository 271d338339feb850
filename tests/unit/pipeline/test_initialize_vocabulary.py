"""Continuing under another tokenizer: refused, or rows moved by the spelling of their pieces."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.build import build
from data_prep.build_plan import BuildOptions
from data_prep.documents import ReadOptions, ReadReport, embedded_corpus
from data_prep.errors import UserError
from data_prep.executors import ProcessExecutor
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_training import TrainingOptions, train_tokenizer_from_sources
from pipeline.evaluate.load import load_pretrained
from pipeline.initialize.pair import initialize_pair
from tests.commits import run_config
from tests.reference.released_repositories import DELTA, TABLE, Release

BIAS = "lm_predictions.lm_head.bias"
RESIZE = {"new_vocabulary": "resize"}


@pytest.fixture(scope="module")
def other_dataset(corpus, tmp_path_factory):
    """The corpus under a smaller tokenizer, trained on other speeches."""
    folder = tmp_path_factory.mktemp("other")
    options = ReadOptions(txt_document="line")
    speeches = sorted(Path(embedded_corpus()).rglob("*.txt"))[-6:]
    train_tokenizer_from_sources(
        [str(speech) for speech in speeches],
        folder / "tokenizer",
        TrainingOptions(450),
        options,
        ReadReport(),
    )
    plan = BuildOptions(read=options, heldout_fraction=0.1)
    build([str(corpus)], folder / "tokenizer", folder / "dataset", plan, ProcessExecutor(1))
    return folder / "dataset"


@pytest.fixture
def repository(dataset_folder, tokenizer_folder, tmp_path):
    """release, folder: both networks with the spm.model that they learned with."""
    release = Release(run_config(dataset_folder, tmp_path / "no run"))
    folder = release.write(tmp_path / "repository", generator="generator.bin")
    shutil.copy(tokenizer_folder / "spm.model", folder)
    return release, folder


def asked(dataset, path, **initialize):
    return run_config(
        dataset, dataset.parent / "no run", initialize={"path": str(path), **initialize}
    )


def initialized(dataset, path, **initialize):
    tokenizer = Tokenizer.load(Dataset.open(dataset).tokenizer_folder)
    return initialize_pair(asked(dataset, path, **initialize), tokenizer)


def refusal(dataset, path, **initialize) -> str:
    with pytest.raises(UserError) as error:
        initialized(dataset, path, **initialize)
    return str(error.value)


def test_the_same_tokenizer_needs_no_word(repository, dataset_folder):
    text = "\n".join(initialized(dataset_folder, repository[1]).notes)
    assert "vocabulary" not in text
    assert "spm.model" not in text


def test_without_a_tokenizer_the_sizes_must_agree(repository, dataset_folder, other_dataset):
    (repository[1] / "spm.model").unlink()
    text = "\n".join(initialized(dataset_folder, repository[1]).notes)
    assert "has no spm.model: that its ids mean" in text
    for initialize in ({}, RESIZE):
        text = refusal(other_dataset, repository[1], **initialize)
        assert "has a vocabulary of 700, model.vocab_size is 500" in text
        assert "without an spm.model beside the weights" in text


def test_another_tokenizer_is_refused(repository, dataset_folder, other_dataset, random_run):
    text = refusal(other_dataset, repository[1])
    assert "learned with another tokenizer (spm.model " in text
    assert f"build --tokenizer {repository[1] / 'spm.model'}" in text
    assert "initialize.new_vocabulary=resize" in text
    assert "another tokenizer" in refusal(other_dataset, random_run.folder)


def test_rows_follow_their_pieces(repository, dataset_folder, other_dataset):
    release, folder = repository
    result = initialized(other_dataset, folder, **RESIZE)
    old = Tokenizer.load(Dataset.open(dataset_folder).tokenizer_folder)
    new = Tokenizer.load(Dataset.open(other_dataset).tokenizer_folder)
    old_ids = {piece: number for number, piece in enumerate(old.pieces(range(old.num_pieces)))}
    pieces = new.pieces(range(new.num_pieces))
    known = [number for number, piece in enumerate(pieces) if piece in old_ids]
    fresh = sorted(set(range(new.num_pieces)) - set(known))
    rows = torch.tensor([old_ids[pieces[number]] for number in known])
    assert rows.tolist() != known, "the tokenizers must differ for this test to mean anything"
    assert fresh
    generator, discriminator = result.pair.generator, result.pair.discriminator
    tables = {
        "E_G": (generator.state_dict()[TABLE], release.generator[TABLE]),
        "bias": (generator.state_dict()[BIAS], release.generator[BIAS]),
        "Delta": (discriminator.state_dict()[DELTA], release.delta),
    }
    for name, (ours, theirs) in tables.items():
        tolerance = {"rtol": 0, "atol": 2e-8 if name == "Delta" else 0}
        assert len(ours) == new.vocab_size
        torch.testing.assert_close(ours[known], theirs[rows], **tolerance)
        mean = theirs[: old.num_pieces].mean(0).expand_as(ours[fresh])
        torch.testing.assert_close(ours[fresh], mean, rtol=0, atol=1e-7)
        behind = new.vocab_size - new.num_pieces
        torch.testing.assert_close(ours[new.mask_id :], theirs[old.mask_id :][:behind], **tolerance)
    (note,) = [note for note in result.notes if note.startswith("new vocabulary")]
    assert f"{len(known)} of {new.num_pieces} pieces are known" in note
    assert f"{old.num_pieces - len(known)} of its pieces are gone" in note
    assert f"{len(fresh)} of {new.vocab_size} rows are new" in note


def test_a_run_of_ours_under_another_tokenizer(random_run, exported, other_dataset):
    new = Tokenizer.load(Dataset.open(other_dataset).tokenizer_folder)
    for path in (random_run.folder, exported.folder):
        pair = initialized(other_dataset, path, **RESIZE).pair
        mask_row = pair.generator.state_dict()[TABLE][new.mask_id]
        assert torch.equal(mask_row, random_run.pair.generator.state_dict()[TABLE][600])


def test_a_table_of_another_length_for_the_same_tokenizer(repository, dataset_folder):
    release, folder = repository
    for weights in (release.generator, release.discriminator):
        weights[TABLE] = torch.cat([weights[TABLE], torch.ones(80, 24)])
    release.generator[BIAS] = torch.cat([release.generator[BIAS], torch.ones(80)])
    release.write(folder, generator="generator.bin")
    text = refusal(dataset_folder, folder)
    assert "has a table of 780 rows, model.vocab_size is 700, for the same tokenizer" in text
    pair = initialized(dataset_folder, folder, **RESIZE).pair
    assert torch.equal(pair.generator.state_dict()[TABLE], release.generator[TABLE][:700])


@pytest.mark.parametrize(
    ("is_there", "says"), [(True, "is another one by now"), (False, "cannot be read")]
)
def test_resizing_needs_the_old_tokenizer(
    is_there, says, random_run, other_dataset, tmp_path, monkeypatch
):
    def load_moved(path):
        model = load_pretrained(path)
        moved = {"path": str(other_dataset if is_there else tmp_path)}
        data = model.config.data.model_copy(update=moved)
        return replace(model, config=model.config.model_copy(update={"data": data}))

    monkeypatch.setattr("pipeline.initialize.pair.load_pretrained", load_moved)
    text = refusal(other_dataset, random_run.folder, **RESIZE)
    assert "new_vocabulary=resize needs the tokenizer that" in text
    assert says in text


def test_a_table_too_short_for_its_tokenizer(repository, other_dataset):
    release, folder = repository
    for weights in (release.generator, release.discriminator):
        weights[TABLE] = weights[TABLE][:550]
    release.generator[BIAS] = release.generator[BIAS][:550]
    release.write(folder, generator="generator.bin")
    text = refusal(other_dataset, folder, **RESIZE)
    assert "the word table has 550 rows, spm.model 600 pieces and [MASK]" in text
