"""Builds that are interrupted, damaged or impossible: they go on, or say why not."""

import errno
import hashlib
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from data_prep.build import build
from data_prep.build_plan import BuildOptions
from data_prep.errors import CorruptError, UserError
from data_prep.shards import Dataset

OPTIONS = BuildOptions(heldout_fraction=0.2, unit_bytes=8000)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


class StoppingExecutor:
    """Does some units and then dies, as a machine does."""

    def __init__(self, num_units: int):
        self.num_units = num_units

    def run(self, task, items):
        for number, item in enumerate(items):
            if number == self.num_units:
                raise KeyboardInterrupt
            yield task(item)


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupted_build_goes_on_to_the_same_bytes(
    tiny_dataset, tiny_corpus, tiny_tokenizer, tmp_path, inline_executor, done
):
    sources = [str(tiny_corpus / name) for name in ("a.jsonl", "b.jsonl", "letters")]
    output = tmp_path / "dataset"
    with pytest.raises(KeyboardInterrupt):
        build(sources, tiny_tokenizer, output, OPTIONS, StoppingExecutor(done))
    with pytest.raises(UserError, match="its build has not finished"):
        Dataset.open(output)
    report = build(sources, tiny_tokenizer, output, OPTIONS, inline_executor)
    assert report.resumed_units == done
    assert hashes(output) == hashes(tiny_dataset)


@pytest.mark.parametrize("damage", ["flip", "remove", "mark", "torn mark", "leftovers"])
def test_a_unit_that_does_not_fit_its_mark_is_made_again(
    tiny_dataset, tiny_corpus, tiny_tokenizer, tmp_path, inline_executor, damage
):
    sources = [str(tiny_corpus / name) for name in ("a.jsonl", "b.jsonl", "letters")]
    output = tmp_path / "dataset"
    with pytest.raises(KeyboardInterrupt):
        build(sources, tiny_tokenizer, output, OPTIONS, StoppingExecutor(2))
    unit = output / ".work" / "unit-000001"
    tokens = unit / "shard-00000.tokens.npy"
    if damage == "flip":
        content = bytearray(tokens.read_bytes())
        content[-1] ^= 1
        tokens.write_bytes(content)
    elif damage == "remove":
        tokens.unlink()
    elif damage == "mark":
        (unit / "done.json").unlink()
    elif damage == "torn mark":
        mark = (unit / "done.json").read_bytes()
        (unit / "done.json").write_bytes(mark[: len(mark) // 2])
    else:
        (output / ".work" / "dataset.elsewhere.17.partial").mkdir()
        (output / "shard-00000.tokens.npy").write_bytes(b"y")
        (output / "manifest.json").write_bytes(b"{}")
    build(sources, tiny_tokenizer, output, OPTIONS, inline_executor)
    assert hashes(output) == hashes(tiny_dataset)


def test_a_kill_between_seal_and_clean_up_is_cleaned_up(
    tiny_corpus, tiny_tokenizer, tmp_path, inline_executor
):
    arguments = ([str(tiny_corpus)], tiny_tokenizer, tmp_path / "d", OPTIONS, inline_executor)
    first = build(*arguments)
    (tmp_path / "d" / ".work" / "unit-000000").mkdir(parents=True)
    assert build(*arguments).fingerprint == first.fingerprint
    assert not (tmp_path / "d" / ".work").exists()


def test_a_complete_dataset_is_left_alone(tiny_corpus, tiny_tokenizer, tmp_path, inline_executor):
    arguments = ([str(tiny_corpus)], tiny_tokenizer, tmp_path / "d", OPTIONS)
    first = build(*arguments, inline_executor)
    again = build(*arguments, StoppingExecutor(0))
    assert again.fingerprint == first.fingerprint
    assert again.reading is None


def test_a_complete_dataset_of_something_else_is_not_overwritten(
    tiny_corpus, tiny_tokenizer, tmp_path, inline_executor
):
    arguments = ([str(tiny_corpus)], tiny_tokenizer, tmp_path / "d")
    build(*arguments, OPTIONS, inline_executor)
    before = hashes(tmp_path / "d")
    with pytest.raises(UserError) as caught:
        build(*arguments, replace(OPTIONS, heldout_fraction=0.3), inline_executor)
    message = str(caught.value)
    assert "was built from something else" in message
    assert "--heldout-fraction 0.2" in message
    assert "--heldout-fraction 0.3" in message
    assert "Choose another --output, delete" in message
    assert hashes(tmp_path / "d") == before


def test_a_build_does_not_go_on_with_other_input(
    tiny_corpus, tiny_tokenizer, tmp_path, inline_executor
):
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    arguments = ([str(corpus)], tiny_tokenizer, tmp_path / "d", OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        build(*arguments, StoppingExecutor(1))
    with (corpus / "b.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"is being built from something else:\n  bytes of the sou"):
        build(*arguments, inline_executor)


def test_a_damaged_complete_dataset_is_not_called_complete(
    tiny_corpus, tiny_tokenizer, tmp_path, inline_executor
):
    arguments = ([str(tiny_corpus)], tiny_tokenizer, tmp_path / "d", OPTIONS, inline_executor)
    build(*arguments)
    with (tmp_path / "d" / "manifest.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CorruptError, match=r"manifest\.json: does not match"):
        build(*arguments)


def test_two_builds_in_one_folder_are_refused_with_the_holder(
    tiny_corpus, tiny_tokenizer, tmp_path, inline_executor
):
    arguments = ([str(tiny_corpus)], tiny_tokenizer, tmp_path / "d", OPTIONS, inline_executor)
    work = tmp_path / "d" / ".work"
    work.mkdir(parents=True)
    (work / "holder").write_text("process 17 on node9")
    with (
        FileLock(work / "lock"),
        pytest.raises(UserError, match="is being built by process 17 on node9; wait for it"),
    ):
        build(*arguments)
    build(*arguments)


def test_a_file_system_without_locks_is_built_on(
    tiny_corpus, tiny_tokenizer, tmp_path, inline_executor, monkeypatch
):
    def refuse(number):
        def flock(descriptor, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)

    arguments = ([str(tiny_corpus)], tiny_tokenizer, tmp_path / "d", OPTIONS, inline_executor)
    refuse(errno.EIO)
    with pytest.raises(UserError, match=r"lock: cannot be locked \(Input/output error\); mend"):
        build(*arguments)
    refuse(errno.ENOSYS)
    assert build(*arguments).reading is not None
    assert not (tmp_path / "d" / ".work").exists()


def test_foreign_folders_are_not_written_into(
    tiny_corpus, tiny_tokenizer, tmp_path, inline_executor
):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="neither empty nor an unfinished build; choose another"):
        build([str(tiny_corpus)], tiny_tokenizer, tmp_path, OPTIONS, inline_executor)
    with pytest.raises(UserError, match=r"thesis\.tex is a file; choose another --output"):
        build([str(tiny_corpus)], tiny_tokenizer, tmp_path / "thesis.tex", OPTIONS, inline_executor)
    with pytest.raises(UserError, match=r"cannot be written.*make room or choose another"):
        build(
            [str(tiny_corpus)],
            tiny_tokenizer,
            tmp_path / "thesis.tex" / "below",
            OPTIONS,
            inline_executor,
        )


def test_a_full_disk_is_told_and_the_build_goes_on(
    tiny_tokenizer, tmp_path, inline_executor, texts, jsonl
):
    jsonl(tmp_path / "a.jsonl", texts(2000, seed=10))
    arguments = ([str(tmp_path / "a.jsonl")], tiny_tokenizer, tmp_path / "d", BuildOptions())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for the tokenizer, not for the tokens.
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(UserError, match=r"unit-000000: cannot be written \(File too large\)"):
            build(*arguments, inline_executor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "d").rglob("*.partial"))
    report = build(*arguments, inline_executor)
    assert report.manifest.num_documents() == 2000


def test_the_output_may_not_lie_in_a_source(tiny_corpus, tiny_tokenizer, inline_executor):
    with pytest.raises(UserError, match="would become its own input; choose an --output outside"):
        build([str(tiny_corpus)], tiny_tokenizer, tiny_corpus / "d", OPTIONS, inline_executor)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("heldout_fraction", -0.1, "--heldout-fraction -0.1: must lie between 0 and 0.5"),
        ("heldout_fraction", 0.7, "--heldout-fraction 0.7: must lie"),
        ("heldout_fraction", float("nan"), "--heldout-fraction nan: must lie"),
        ("unit_bytes", 0, "--unit-bytes 0: must be at least 1"),
        ("shard_tokens", 0, "--shard-tokens 0: must be at least 1"),
    ],
)
def test_impossible_options_are_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        BuildOptions(**{key: value})


def test_a_corpus_of_nothing_is_refused_with_the_reasons(tiny_tokenizer, tmp_path, inline_executor):
    source = tmp_path / "empty.jsonl"
    source.write_text('{"text": ""}\nnot json\n{"body": "x"}\n')
    arguments = ([str(source)], tiny_tokenizer, tmp_path / "d", OPTIONS, inline_executor)
    with pytest.raises(
        UserError, match=r"no document is left of 1 files .*missing field 1.*--text"
    ):
        build(*arguments)
    source.write_text('{"text": "kato mire"}\n')
    assert build(*arguments).manifest.num_documents() == 1
