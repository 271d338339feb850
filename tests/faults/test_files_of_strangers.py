"""Files that somebody made to do harm: nothing in them is executed, no name leads elsewhere.

The payload makes a folder when it is unpickled. Every test that puts it somewhere also shows that
it is no dud.
"""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pyarrow
import pytest
import torch

from data_prep.documents import ReadOptions, ReadReport, plan_units, read_unit
from data_prep.errors import CorruptError, UserError
from data_prep.manifest import FILE_NAME, SHARD_NAME
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import Commit, commit_name, verify_commit
from pipeline.config import CheckpointSection
from pipeline.evaluate.finetune import FinetuneOptions, finetune
from pipeline.initialize.pair import initialize_pair
from pipeline.rank_files import StateReader
from pipeline.weights import load_commit_pair
from tests.commits import relist, reseal, run_config, write_commit
from tests.faults.harness import Setup
from tests.initializing import asked
from tests.reference.released_repositories import Release
from tests.sparse_dataset import reseal_dataset

HIDDEN_CODE = "import pathlib\npathlib.Path({harm!r}).mkdir()\n"


class Payload:
    """What an attacker would put into a pickle."""

    def __init__(self, harm):
        self.harm = harm

    def __reduce__(self):
        return (os.mkdir, (str(self.harm),))


@pytest.fixture
def harm(tmp_path):
    """The folder that the payload makes; absent at the end of a test."""
    path = tmp_path / "harm"
    yield path
    assert not path.exists(), "the payload was executed"


def write_plain_pickle(path, harm):
    path.write_bytes(pickle.dumps(Payload(harm), protocol=2))  # torch's; warns of later ones


def write_torch_file(path, harm):
    torch.save({"weight": Payload(harm)}, path)


def write_old_torch_file(path, harm):
    torch.save({"weight": Payload(harm)}, path, _use_new_zipfile_serialization=False)


WRITERS = [write_plain_pickle, write_torch_file, write_old_torch_file]
FORMS = "a pickle, a torch file, one of old torch"
writers = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


@pytest.mark.row(30)
@writers
def test_the_payload_is_no_dud(write, tmp_path):
    write(tmp_path / "file", tmp_path / "done")
    if write is write_plain_pickle:
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "done").is_dir()


@pytest.fixture
def commit(dataset_folder, tmp_path):
    """A commit, its configuration and a store that finds it."""
    config = run_config(dataset_folder, tmp_path / "run")
    return config, write_commit(config, 8)


def newest(commit):
    return CheckpointStore(commit.parent, CheckpointSection(), 0, None).newest_valid()


@pytest.mark.row(30)
@writers
def test_a_payload_in_a_rank_file_is_refused_by_name(write, commit, harm, note):
    """The manifest is sealed anew: its hash is that of the payload."""
    config, path = commit
    write(path / "generator" / "rank-00001.safetensors", harm)
    relist(path, "generator/rank-00001.safetensors")
    read = {
        "verified": lambda: verify_commit(Commit(path, 8)),
        "chosen": lambda: newest(path),
        "loaded": lambda: load_commit_pair(Commit(path, 8), config),
        "read": lambda: StateReader(path / "generator"),
    }
    for what, action in read.items():
        with pytest.raises(CorruptError, match=r"rank-00001\.safetensors: no file of a checkpoi"):
            pytest.fail(f"{what}: {action()}")
    if write is WRITERS[0]:
        note(f"{FORMS} as a rank's file, sealed", "refused by name, nothing executed")


@pytest.mark.row(30)
@pytest.mark.parametrize("name", ["train_state.json", "config.resolved.json"])
def test_a_payload_in_a_json_file_is_refused(name, commit, harm):
    _, path = commit
    write_plain_pickle(path / name, harm)
    relist(path, name)
    with pytest.raises(CorruptError, match=rf"{name}: unreadable"):
        newest(path).read_json(name)


@pytest.mark.row(30)
@pytest.mark.parametrize("listed", [False, True])
def test_files_of_deepspeed_in_a_commit_are_refused(listed, commit, harm, note):
    _, path = commit
    name = "mp_rank_00_model_states.pt"
    write_torch_file(path / name, harm)
    if listed:
        relist(path, name)
    with pytest.raises(CorruptError, match=name):
        newest(path)
    if listed:
        note(f"{name} beside rank files, listed or not", "refused by name")


NAMES = ["../../secret", "/etc/passwd", "generator/../../secret", "generator//../../../secret"]


@pytest.mark.row(30)
@pytest.mark.parametrize("name", [*NAMES, "manifest.json", "a.pt", "", "generator"])
def test_names_in_a_commit_lead_nowhere_else(name, commit, tmp_path, note):
    _, path = commit
    (tmp_path / "secret").write_text("secret")
    files = json.loads((path / "manifest.json").read_text())["files"]
    reseal(path, files={**files, name: {"bytes": 6, "sha256": "0" * 64}})
    with pytest.raises(CorruptError, match=r"outside of the commit|no file of a commit"):
        verify_commit(Commit(path, 8))
    if name == NAMES[0]:
        note(f"{', '.join(NAMES)} in a commit's manifest", "refused")


@pytest.mark.row(30)
@pytest.mark.parametrize("what", ["a file", "a folder", "a loop"])
def test_links_in_a_commit_lead_nowhere_else(what, commit, tmp_path):
    _, path = commit
    target = path / "generator" if what == "a folder" else path / "train_state.json"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(target if what == "a loop" else tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match=r"train_state|generator"):
        verify_commit(Commit(path, 8))


@pytest.mark.row(30)
def test_a_run_refuses_a_payload_in_its_commit(lab, tmp_path, harm, note):
    run = Path(shutil.copytree(lab.reference_folder(Setup()), tmp_path / "run"))
    commits = run / "checkpoints"
    for path in commits.glob("step-*"):
        if path.name != commit_name(12):
            shutil.rmtree(path)
    write_torch_file(commits / commit_name(12) / "discriminator" / "rank-00000.safetensors", harm)
    relist(commits / commit_name(12), "discriminator/rank-00000.safetensors")
    outcome = lab.run(run, Setup())
    assert outcome.codes == [88]
    assert "discriminator/rank-00000.safetensors: no file of a checkpoint" in outcome.output
    assert "Traceback" not in outcome.output
    note("the same in the only commit of a run that resumes", "88, file named, nothing executed")


@pytest.fixture(scope="module")
def release(config):
    return Release(config)


BIN_PLACES = {
    "pytorch_model.bin": ("pytorch_model.bin", None),
    "the generator's": ("model.safetensors", "generator.bin"),
    "a shard": ("pytorch_model.bin.index.json", None),
}


@pytest.mark.row(30)
@pytest.mark.parametrize("place", BIN_PLACES)
@writers
def test_a_payload_in_a_repository_is_refused(
    place, write, release, dataset_folder, tokenizer, tmp_path, harm, note
):
    main, generator = BIN_PLACES[place]
    path = release.write(tmp_path / "repository", main=main, generator=generator)
    files = sorted(path.glob("*.bin"))
    assert files
    write(files[-1], harm)
    with pytest.raises(UserError) as caught:
        initialize_pair(asked(dataset_folder, path), tokenizer)
    assert f"{files[-1]}" in str(caught.value)
    assert "is damaged, or holds Python objects" in str(caught.value)
    if (place, write) == (next(iter(BIN_PLACES)), WRITERS[0]):
        places = ", ".join(BIN_PLACES)
        note(f"the same as {places} of initialize.path", "refused by name, nothing executed")


@pytest.fixture
def labelled(tmp_path):
    lines = ["text\tlabel", *(f"some words {n}\t{n % 2}" for n in range(8))]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "train.tsv"


@pytest.mark.row(30)
@pytest.mark.parametrize("how", ["pickle", "code", "code of an unknown model"])
def test_a_payload_in_a_model_to_evaluate_is_not_executed(
    how, release, tokenizer_folder, labelled, tmp_path, harm, monkeypatch, note
):
    """transformers' own loader, which asks for its answer: nobody is there to say yes."""
    path = release.write(tmp_path / "repository", main="pytorch_model.bin")
    shutil.copy(tokenizer_folder / "spm.model", path)
    if how == "pickle":
        write_torch_file(path / "pytorch_model.bin", harm)
    else:
        values = json.loads((path / "config.json").read_text())
        values["auto_map"] = {
            "AutoConfig": "hidden.Config",
            "AutoModelForSequenceClassification": "hidden.Model",
        }
        if how == "code of an unknown model":
            values["model_type"] = "unheard-of"
        (path / "config.json").write_text(json.dumps(values))
        (path / "hidden.py").write_text(HIDDEN_CODE.format(harm=str(harm)))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    options = FinetuneOptions(seeds=1, epochs=1, batch_size=4, max_length=16)
    if how == "code":
        report = finetune(path, labelled, labelled, options=options)
        seen = f"scored by transformers' own code, {len(report.runs)} runs"
    else:
        words = {"pickle": "hold Python objects", "code of an unknown model": "cannot load"}
        with pytest.raises(UserError, match=words[how]) as caught:
            finetune(path, labelled, labelled, options=options)
        assert str(caught.value).startswith(f"{path}: ")
        seen = f"refused: {str(caught.value).removeprefix(str(path)).partition(';')[0]}"
    note(f"{how} in a repository that is evaluated", f"{seen}; nothing executed")


@pytest.mark.row(30)
def test_a_payload_as_a_tokenizer_is_refused(dataset_folder, tmp_path, harm, note):
    own = Path(shutil.copytree(dataset_folder, tmp_path / "dataset"))
    write_plain_pickle(own / "tokenizer" / "spm.model", harm)
    with pytest.raises(UserError, match=r"spm\.model is not a SentencePiece model"):
        Tokenizer.load(own / "tokenizer")
    with pytest.raises(CorruptError, match=r"spm\.model"):
        Dataset.open(own)
    note("a pickle as spm.model", "refused by name, nothing executed")


@pytest.mark.row(30)
def test_code_beside_a_tokenizer_is_not_executed(dataset_folder, tmp_path, harm, note):
    own = Path(shutil.copytree(dataset_folder, tmp_path / "dataset"))
    write_plain_pickle(own / "tokenizer" / "added_tokens.pkl", harm)
    (own / "tokenizer" / "hidden.py").write_text(HIDDEN_CODE.format(harm=str(harm)))
    settings = own / "tokenizer" / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    values["auto_map"] = {"AutoTokenizer": ["hidden.Tokenizer", None]}
    settings.write_text(json.dumps(values))
    with pytest.raises(CorruptError, match=r"tokenizer_config\.json"):
        Dataset.open(own)
    reseal_dataset(own, "tokenizer/tokenizer_config.json")
    assert verify(own, 5).unlisted == ("tokenizer/added_tokens.pkl", "tokenizer/hidden.py")
    note("code and a pickle in a dataset's tokenizer, sealed", "named by verify, not executed")


@pytest.mark.row(30)
def test_a_payload_in_an_arrow_file_is_not_executed(tmp_path, harm, note):
    """Arrow once unpickled the description of a column's type (CVE-2023-47248)."""
    field = pyarrow.field(
        "text",
        pyarrow.string(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Payload(harm)),
        },
    )
    table = pyarrow.table([["one", "two"]], schema=pyarrow.schema([field]))
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    report = ReadReport()
    texts = []
    for unit in plan_units([str(tmp_path / "a.arrow")], ReadOptions()):
        texts += [document.text for document in read_unit(unit, ReadOptions(), report)]
    assert texts in ([], ["one", "two"])
    assert len(texts) + report.total_dropped == 2
    note("a pickle as the type of an Arrow column", f"{len(texts)} texts read, nothing executed")


@pytest.mark.row(30)
@pytest.mark.parametrize("name", [*NAMES, "tokenizer/../../secret", "tokenizer/", "..", ".hidden"])
def test_names_in_a_dataset_lead_nowhere_else(name, dataset_folder, tmp_path, note):
    own = Path(shutil.copytree(dataset_folder, tmp_path / "dataset"))
    (tmp_path / "secret").write_text("secret")
    values = json.loads((own / "manifest.json").read_text())
    for key, entry in (("files", values["files"][0]), ("shards", values["shards"][0])):
        changed = {**values, key: [{**entry, "name": name}]}
        (own / "manifest.json").write_text(json.dumps(changed))
        reseal_dataset(own)
        with pytest.raises(CorruptError, match=r"leaves the folder|is not shard-00000"):
            Dataset.open(own)
    assert not FILE_NAME.fullmatch(name)
    assert not SHARD_NAME.fullmatch(name)
    if name == NAMES[0]:
        note("the same in a dataset's, as file and as shard", "refused")


@pytest.mark.row(30)
def test_a_link_in_a_dataset_hands_out_nothing_unchecked(dataset_folder, tmp_path, note):
    """Links are allowed, as caches of downloads are made of them; their content is hashed."""
    own = Path(shutil.copytree(dataset_folder, tmp_path / "dataset"))
    shard = sorted(own.glob("*.tokens.npy"))[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    truth = Dataset.open(dataset_folder).read("train", 0, 100)
    assert Dataset.open(own).read("train", 0, 100).tolist() == truth.tolist()
    content = bytearray((tmp_path / "elsewhere").read_bytes())
    content[-1] ^= 1
    (tmp_path / "elsewhere").write_bytes(content)
    dataset = Dataset.open(own)
    split = dataset.manifest.shards[0].split
    with pytest.raises(CorruptError, match=shard.name):
        dataset.read(split, 0, dataset.split_tokens(split))
    note("a link to other content as a shard", "refused by its hash")


@pytest.mark.row(30)
def test_a_saved_dataset_names_no_file_elsewhere(tmp_path, note):
    (tmp_path / "source").mkdir()
    (tmp_path / "secret.arrow").write_bytes(b"secret")
    for name in ("../secret.arrow", "/etc/passwd"):
        (tmp_path / "source" / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": name}]})
        )
        with pytest.raises(UserError, match="which is not in the folder"):
            plan_units([str(tmp_path / "source")], ReadOptions())
    note("../ in the state.json of a saved dataset", "refused")
