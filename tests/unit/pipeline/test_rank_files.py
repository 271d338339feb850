"""Files of tensors: byte for byte safetensors' own, and nothing else is read."""

import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from data_prep.errors import CorruptError
from pipeline import rank_files
from pipeline.rank_files import KINDS, StateReader, slice_metadata, write_tensors

STARTS = {"layer.0.weight": 0, "größe/ä": 5, "b": 12}


def tensors():
    torch.manual_seed(0)
    return {f"{kind}/{name}": torch.randn(3 + len(name)) for kind in KINDS for name in STARTS}


def write(path, values, metadata=None, progress=lambda: None):
    shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
    metadata = slice_metadata(STARTS) if metadata is None else metadata
    write_tensors(path, metadata, shapes, values.__getitem__, progress)


@pytest.mark.parametrize("sync_bytes", [8, 1 << 30])
def test_a_file_is_what_safetensors_writes(tmp_path, monkeypatch, sync_bytes):
    monkeypatch.setattr(rank_files, "_WRITE_BYTES", 8)
    monkeypatch.setattr(rank_files, "_SYNC_BYTES", sync_bytes)
    values = {**tensors(), "weight/whole": torch.randn(3, 4), "weight/empty": torch.empty(0)}
    metadata = slice_metadata(STARTS)
    save_file(values, tmp_path / "theirs", metadata=metadata)
    marks = []
    write(tmp_path / "ours", values, metadata, lambda: marks.append(1))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert len(marks) >= sum(tensor.nbytes for tensor in values.values()) / 8


def test_views_are_written_by_their_values(tmp_path):
    square = torch.arange(16.0).view(4, 4)
    write(tmp_path / "ours", {"t": square.T, "part": square[1:3, 1]})
    whole = {"t": square.T.contiguous(), "part": square[1:3, 1].contiguous()}
    save_file(whole, tmp_path / "theirs", metadata=slice_metadata(STARTS))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path):
    for wrong in (torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="weight/w: "):
            write_tensors(tmp_path / "x", {}, {"weight/w": (2,)}, {"weight/w": wrong}.get)


@pytest.fixture
def folder(tmp_path):
    """A network's folder of one rank file."""
    write(tmp_path / "rank-00000.safetensors", tensors())
    reader = StateReader(tmp_path)
    assert reader.names == sorted(STARTS)
    assert reader.count("b") == STARTS["b"] + 4
    return tmp_path


def renamed(values, old, new):
    return {new if name == old else name: tensor for name, tensor in values.items()}


BAD = {
    "a kind is missing": lambda t: {k: v for k, v in t.items() if k != "exp_avg/b"},
    "another tensor": lambda t: {**t, "step": torch.zeros(1)},
    "another name": lambda t: renamed(t, "weight/b", "weight/c"),
    "another type": lambda t: {**t, "weight/b": torch.zeros(4, dtype=torch.bfloat16)},
    "another size": lambda t: {**t, "exp_avg_sq/b": torch.zeros(5)},
    "two dimensions": lambda t: {**t, **{f"{k}/b": torch.zeros(2, 2) for k in KINDS}},
}


@pytest.mark.parametrize("bad", BAD)
def test_other_tensors_are_refused(folder, bad):
    path = folder / "rank-00000.safetensors"
    save_file(BAD[bad](tensors()), path, metadata=slice_metadata(STARTS))
    with pytest.raises(CorruptError, match=r"rank-00000\.safetensors: no file of a checkpoint"):
        StateReader(folder)


@pytest.mark.parametrize(
    "starts", [None, "", "[]", "{", "[" * 100_000, '{"b": -1}', '{"b": 1.5}', '{"b": true}', "null"]
)
def test_other_metadata_is_refused(folder, starts):
    metadata = None if starts is None else {"starts": starts}
    save_file(tensors(), folder / "rank-00000.safetensors", metadata=metadata)
    with pytest.raises(CorruptError, match=r"rank-00000\.safetensors: no file of a checkpoint"):
        StateReader(folder)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_is_not_opened(folder, tmp_path, form):
    target, path = tmp_path / "executed", folder / "rank-00000.safetensors"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save({"weight/b": Payload(target)}, path)
    with pytest.raises(CorruptError, match=r"rank-00000\.safetensors: no file of a checkpoint"):
        StateReader(folder)
    assert not target.exists()


def test_no_damage_of_a_header_escapes_as_another_error(folder):
    """Any byte of the header: the same index as before, or one refusal that names the file."""
    path = folder / "rank-00000.safetensors"
    good, rng = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    refusals = []
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            reader = StateReader(folder)
            assert all(reader.count(name) >= 0 for name in reader.names)
        except CorruptError as error:
            refusals.append(str(error))
    assert len(refusals) > 200
    assert all("rank-00000.safetensors: no file of a checkpoint" in text for text in refusals)
    for size in range(0, header + 1, 7):
        path.write_bytes(good[:size])
        with pytest.raises(CorruptError, match=r"rank-00000\.safetensors"):
            StateReader(folder)
