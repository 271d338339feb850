"""Files of datasets, damaged in every way: refused by name before a byte of them is used.

What a run reads is read here: the manifest, the tokenizer, every training sequence, every held-out
one, every document. What `deberta-prep verify` reads is all there is.
"""

import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import CorruptError
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from pipeline.sequences import SequenceStream
from tests.faults.harness import Setup
from tests.sparse_dataset import reseal_dataset, write_sparse_dataset

FLIPS = 300
LENGTH = 512
SPLITS = ("train", "heldout")


def readings(dataset):
    """What training, evaluation and people read, piece by piece."""
    yield Tokenizer.load(dataset.tokenizer_folder).fingerprint.encode()
    for split in SPLITS:
        stream = SequenceStream(dataset, split, LENGTH)
        for samples in np.array_split(np.arange(stream.num_sequences), 4):
            yield stream.batch(samples, np.zeros_like(samples)).input_ids_BL.numpy().tobytes()
        for index in range(0, dataset.manifest.num_documents(split), 200):
            yield dataset.document(split, index)[0].tobytes()


def read_until_refused(open_dataset, truth):
    """Read all that a run reads; (the refusal or "", whether all before it was as written)."""
    is_true = True
    try:
        for piece, true_piece in zip(readings(open_dataset()), truth, strict=True):
            is_true &= piece == true_piece
    except CorruptError as error:
        return str(error), is_true
    return "", is_true


@pytest.fixture(scope="module")
def truth(dataset_folder):
    return list(readings(Dataset.open(dataset_folder)))


@pytest.fixture
def own(dataset_folder, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(dataset_folder, tmp_path / "dataset"))


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flipped(content, rng, *, header=False):
    bad = bytearray(content)
    bad[rng.randrange(min(len(bad), 128) if header else len(bad))] ^= 1 << rng.randrange(8)
    return bytes(bad)


@pytest.mark.row(12)
def test_no_flipped_bit_is_used(own, truth, note):
    """300 random bits of all files, headers as often as values: found by name, or harmless."""
    files = [path for path in files_of(own) if path.stat().st_size]
    assert {path.suffix for path in files} >= {".npy", ".json", ".sha256", ".model"}
    rng = random.Random(12)
    found = []
    for number in range(FLIPS):
        path = files[number % len(files)]
        good = path.read_bytes()
        path.write_bytes(flipped(good, rng, header=number // len(files) % 2 == 0))
        message, is_true = read_until_refused(lambda: Dataset.open(own), truth)
        assert is_true, f"{path.name}: a wrong token was handed out"
        assert path.name in message or path.name == "manifest.sha256", (path.name, message)
        assert "manifest.sha256" in message or path.name != "manifest.sha256"
        with pytest.raises(CorruptError) as caught:
            verify(own)
        assert path.name in str(caught.value)
        found.append(path.name)
        path.write_bytes(good)
    assert len(found) == FLIPS
    assert read_until_refused(lambda: Dataset.open(own), truth) == ("", True)
    verify(own, 10)
    note(f"{FLIPS} bits of {len(files)} files", f"{len(found)} found and named, 0 used")


@pytest.mark.row(12)
def test_no_bit_that_flips_while_a_run_reads_is_used(own, truth, note):
    """What was right when it was first read and is wrong when it is read again."""
    dataset = Dataset.open(own)
    assert list(readings(dataset)) == truth
    files = [*own.glob("*.tokens.npy"), *own.glob("*.doc_ends.npy")]
    rng = random.Random(13)
    found = harmless = 0
    for number in range(FLIPS):
        path = files[number % len(files)]
        good = path.read_bytes()
        path.write_bytes(flipped(good, rng))
        message, is_true = read_until_refused(lambda: dataset, truth)
        assert is_true, f"{path.name}: a wrong token was handed out"
        assert not message or path.name in message
        found += bool(message)
        harmless += not message
        path.write_bytes(good)
    assert found + harmless == FLIPS
    assert found >= 0.9 * FLIPS
    assert list(readings(dataset)) == truth
    note(
        f"{FLIPS} bits in files of an open dataset",
        f"{found} found and named, {harmless} where all that was read was as written; 0 used",
    )


@pytest.mark.row(12)
def test_a_run_refuses_a_flipped_bit(lab, own, tmp_path, note):
    shard = max(own.glob("*.tokens.npy"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    outcome = lab.run(tmp_path / "run", Setup(2), dataset=own)
    assert set(outcome.codes) == {88}
    assert f"{shard.name}: block 0 (bytes from 0) does not have the sha256" in outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.status["status"] == "corrupt"
    assert shard.name in outcome.status["reason"]
    note("a bit of a shard that two ranks read", "88 on both, state.json corrupt, shard named")


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def append(path):
    with path.open("ab") as file:
        file.write(b"\0")


def replace_by_int32(path):
    np.save(path, np.load(path).astype("<i4"))
    assert path.stat().st_size > 128


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_a_dangling_link(path):
    path.unlink()
    path.symlink_to("nothing")


DAMAGES = [
    *(cut, empty, append, Path.unlink, replace_by_int32),
    *(replace_by_a_folder, replace_by_a_pipe, replace_by_a_dangling_link),
]


@pytest.fixture(scope="module")
def terabyte(tokenizer_folder, tmp_path_factory):
    """256 shards of 4 GiB that take no disk."""
    folder = tmp_path_factory.mktemp("terabyte") / "dataset"
    write_sparse_dataset(folder, tokenizer_folder, 256, 4 << 30, num_heldout=1)
    return folder


@pytest.mark.row(13)
def test_damaged_shards_are_refused_at_the_start_whatever_the_size(terabyte, note):
    """The last of 256 shards of 4 GiB; a header and a size cost the same for any length."""
    shard = terabyte / "shard-00255.tokens.npy"
    size = shard.stat().st_size
    with shard.open("rb") as file:
        header = file.read(128)
    slowest = 0.0
    damages = [damage for damage in DAMAGES if damage is not replace_by_int32]
    for damage in damages:
        Dataset.open(terabyte)
        damage(shard)
        began = time.process_time()
        with pytest.raises(CorruptError, match=r"shard-00255\.tokens\.npy: "):
            Dataset.open(terabyte)
        slowest = max(slowest, time.process_time() - began)
        if shard.is_dir():
            shard.rmdir()
        shard.unlink(missing_ok=True)
        with shard.open("wb") as file:
            file.write(header)
            file.truncate(size)
    assert slowest < 5
    note(
        f"{', '.join(damage.__name__ for damage in damages)}: one of 256 shards of 4 GiB",
        f"refused by name after {slowest:.2f} s of CPU at most",
    )


@pytest.mark.row(13)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_are_refused_on_opening(dataset_folder, tmp_path, damage):
    for number, original in enumerate(files_of(dataset_folder)):
        if damage is replace_by_int32 and original.suffix != ".npy":
            continue
        if original.stat().st_size == 0 and damage in (cut, empty):
            continue
        own = Path(shutil.copytree(dataset_folder, tmp_path / str(number)))
        path = own / original.relative_to(dataset_folder)
        damage(path)
        with pytest.raises(CorruptError) as caught:
            Dataset.open(own)
        assert path.name in str(caught.value)
        with pytest.raises(CorruptError) as caught:
            verify(own)
        assert path.name in str(caught.value)


@pytest.mark.row(13)
def test_a_shard_of_another_version_is_refused(tokenizer_folder, tmp_path, note):
    """The same size and header, other tokens: the one thing that only its hash can tell."""
    write_sparse_dataset(tmp_path / "d", tokenizer_folder, 2, 8 << 20)
    path = tmp_path / "d" / "shard-00001.tokens.npy"
    tokens = np.lib.format.open_memmap(path, mode="r+")
    tokens[-1] = 5
    tokens.flush()
    dataset = Dataset.open(tmp_path / "d")
    half = dataset.split_tokens("train") // 2
    assert not dataset.read("train", half - 5, half + 5).any()
    with pytest.raises(CorruptError, match=r"shard-00001\.tokens\.npy: block 1 "):
        dataset.read("train", 2 * half - 5, 2 * half)
    note("a shard of another version, equal in size", "refused at the first read of that block")


@pytest.mark.row(13)
def test_a_run_refuses_a_missing_shard_at_once(lab, own, tmp_path, note):
    sorted(own.glob("*.tokens.npy"))[-1].unlink()
    outcome = lab.run(tmp_path / "run", Setup(), dataset=own)
    assert outcome.codes == [88]
    assert "tokens.npy: cannot be read (No such file or directory)" in outcome.output
    assert outcome.status["status"] == "corrupt"
    note("a shard missing", f"88 with its name {outcome.seconds[0]:.1f} s after the imports")


@pytest.mark.row(14)
def test_a_resume_with_another_dataset_is_refused(lab, dataset_folder, tmp_path, note):
    setup = Setup()
    run = Path(shutil.copytree(lab.reference_folder(setup), tmp_path / "run"))
    commits = sorted((run / "checkpoints").iterdir())
    other = Path(shutil.copytree(dataset_folder, tmp_path / "other"))
    manifest = other / "manifest.json"
    content = manifest.read_bytes().replace(b'"command": "', b'"command": "again ')
    assert content != manifest.read_bytes()
    manifest.write_bytes(content)
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        Dataset.open(other)
    reseal_dataset(other)
    outcome = lab.run(run, setup, dataset=other)
    assert outcome.codes == [2]
    assert str(other) in outcome.output
    assert Dataset.open(other).fingerprint[:12] in outcome.output
    assert Dataset.open(dataset_folder).fingerprint[:12] in outcome.output
    assert sorted((run / "checkpoints").iterdir()) == commits
    note("a dataset with another manifest, sealed anew", "2, both fingerprints named, untouched")
