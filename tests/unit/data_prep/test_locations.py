import gzip
import io
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep import locations
from data_prep.documents import ReadOptions, ReadReport, plan_units, read_unit
from data_prep.errors import UserError
from data_prep.locations import file_size, is_remote, list_remote, open_file

ROWS = [{"text": f"row {n}"} for n in range(1000)]


class UnsteadyFile(io.BytesIO):
    """A file whose every second read fails."""

    reads = 0

    def read(self, size=-1, /):
        UnsteadyFile.reads += 1
        if UnsteadyFile.reads % 2:
            raise RuntimeError("the connection was lost\nin the middle")
        return super().read(size)


class UnsteadyFileSystem(MemoryFileSystem):
    """A file system of unsteady files, like one behind a bad network."""

    protocol = "unsteady"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("unsteady://", "memory://"))

    store: ClassVar[dict] = {}

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        return UnsteadyFile(file.getvalue()) if mode == "rb" else file


class BrokenFileSystem(MemoryFileSystem):
    """A file system behind a network that is gone."""

    protocol = "broken"

    def info(self, path, **options):
        raise RuntimeError("no route to host")

    def isfile(self, path):
        raise RuntimeError("no route to host")


fsspec.register_implementation("unsteady", UnsteadyFileSystem)
fsspec.register_implementation("broken", BrokenFileSystem)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(locations, "wait_exponential", lambda **_: lambda state: 0)


@pytest.fixture
def bucket(request):
    system = fsspec.filesystem("memory")
    folder = f"/{request.node.name}"
    system.pipe(f"{folder}/a.jsonl.gz", gzip.compress(b"".join(map(line, ROWS))))
    system.pipe(f"{folder}/sub/b.txt", b"one")
    system.pipe(f"{folder}/.hidden/c.txt", b"two")
    system.pipe(f"{folder}/README.md", b"three")
    with system.open(f"{folder}/sub/d.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=100)
    with (
        system.open(f"{folder}/sub/e.arrow", "wb") as file,
        pa.ipc.new_file(file, pa.schema({"text": pa.string()})) as writer,
    ):
        writer.write_table(pa.Table.from_pylist(ROWS), max_chunksize=100)
    yield f"memory:/{folder}"
    system.rm(folder, recursive=True)


def line(row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def texts_of(sources, target_bytes=1 << 20) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    options = ReadOptions()
    units = plan_units(sources, options, target_bytes, report)
    return [d.text for unit in units for d in read_unit(unit, options, report)], report


def test_a_url_is_told_from_a_path():
    assert is_remote("s3://bucket/a.txt")
    assert is_remote("hf://datasets/a/b")
    assert not any(map(is_remote, ("a.txt", "/a://b", "C:\\corpus", "a/b://c", "")))


def test_every_format_is_read_from_a_url(bucket):
    texts, report = texts_of([bucket])
    assert texts == [row["text"] for row in ROWS] + ["one"] + 2 * [row["text"] for row in ROWS]
    assert report.notes == {"ignored file": 1}
    assert report.dropped == {}


def test_large_remote_files_are_cut_like_local_ones(bucket, tmp_path):
    fsspec.filesystem("memory").get(bucket.removeprefix("memory:/"), str(tmp_path), recursive=True)
    for name in ("sub/d.parquet", "sub/e.arrow"):
        [local] = tmp_path.glob(f"**/{name}")
        remote_units = plan_units([f"{bucket}/{name}"], ReadOptions(), 2000)
        local_units = plan_units([str(local)], ReadOptions(), 2000)
        cuts = [[(p.start, p.end, p.num_bytes) for p in u.parts] for u in remote_units]
        assert cuts == [[(p.start, p.end, p.num_bytes) for p in u.parts] for u in local_units]
        assert len(cuts) >= 3
        assert texts_of([f"{bucket}/{name}"], 2000)[0] == [row["text"] for row in ROWS]


def test_globs_of_urls_are_expanded(bucket):
    [url] = list_remote(f"{bucket}/*/*.parquet")
    assert url.endswith("/test_globs_of_urls_are_expanded/sub/d.parquet")
    assert texts_of([f"{bucket}/**/*.txt"])[0] == ["one"]


def test_a_source_reached_twice_is_refused(bucket):
    with pytest.raises(UserError, match=r"b.txt is reached by two sources, memory.* and memory"):
        plan_units([bucket, f"{bucket}/sub/b.txt"], ReadOptions())


def test_a_web_server_serves(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"".join(map(line, ROWS)))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/a.jsonl?download=true"
        assert texts_of([url])[0] == [row["text"] for row in ROWS]
        with pytest.raises(UserError, match=r"none.txt .*(does not exist|cannot be read)"):
            texts_of([url.replace("a.jsonl?download=true", "none.txt")])
        # This server knows no ranges.
        with pytest.raises(UserError, match=r"gives files only as a whole.* --unit-bytes above"):
            plan_units([url], ReadOptions(), 1000)
    finally:
        server.shutdown()
        server.server_close()


def test_a_read_that_fails_is_tried_again_from_where_it_stopped():
    system = fsspec.filesystem("unsteady")
    data = bytes(range(256)) * 8192
    system.pipe("/a.txt", data)
    with open_file("unsteady://a.txt") as file:
        assert file.read(1000) + file.read() == data
        file.seek(1 << 20)
        assert file.read(3) == b"\x00\x01\x02"
    assert UnsteadyFile.reads > 3


def test_what_fails_for_good_is_one_line_of_an_os_error(monkeypatch):
    with pytest.raises(OSError, match=r"^RuntimeError: no route to host$"):
        file_size("broken://a.txt")
    system = fsspec.filesystem("unsteady")
    system.pipe("/a.txt", b"x")
    monkeypatch.setattr(locations, "READ_ATTEMPTS", 1)
    monkeypatch.setattr(UnsteadyFile, "reads", 0)
    with (
        open_file("unsteady://a.txt") as file,
        pytest.raises(OSError, match=r"^RuntimeError: the connection was lost$"),
    ):
        file.read()


def test_a_file_that_fails_while_it_is_read_is_named(monkeypatch):
    system = fsspec.filesystem("unsteady")
    system.pipe("/a.txt", b"x")
    monkeypatch.setattr(locations, "READ_ATTEMPTS", 1)
    monkeypatch.setattr(UnsteadyFile, "reads", 0)
    with pytest.raises(UserError, match=r"unsteady:/+a.txt cannot be read: RuntimeError: the conn"):
        texts_of(["unsteady://a.txt"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("broken://x", "source broken://x cannot be read: RuntimeError: no route to host; check"),
        ("memory://no-such-folder", "no-such-folder does not exist or holds no file; check its"),
        ("nonsense://a", "nonsense://a cannot be read: ValueError: Protocol not known: nonsense"),
        ("zip://a.txt::memory://b.zip", r"chains file systems \(::\), which is not read; unpack"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        plan_units([source], ReadOptions())


def test_a_hub_name_without_a_network_says_how_to_fetch_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    message = r"hf download --repo-type dataset some/corpus --local-dir FOLDER` and name the folder"
    with pytest.raises(UserError, match=message):
        plan_units(["hf://datasets/some/corpus/data/*.parquet"], ReadOptions())


def test_a_name_like_one_of_the_hub_is_told_how_to_write_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\(on the Hugging Face hub\? then hf://datasets/some/co"):
        plan_units(["some/corpus"], ReadOptions())


def test_a_url_of_an_unknown_format_is_refused(bucket):
    with pytest.raises(UserError, match=r"README.md is of no known format"):
        plan_units([f"{bucket}/README.md"], ReadOptions())


def save_remotely(folder, state):
    system = fsspec.filesystem("memory")
    table = pa.table({"text": ["one", "two"]})
    for name in ("data-0.arrow", "cache-9.arrow", "indices/old.arrow"):
        with system.open(f"{folder}/train/{name}", "wb") as file:
            writer = pa.ipc.new_stream(file, table.schema)
            writer.write_table(table)
            writer.close()
    system.pipe(f"{folder}/train/dataset_info.json", b"{}")
    system.pipe(f"{folder}/train/state.json", state)
    system.pipe(f"{folder}/dataset_dict.json", b"{}")
    system.pipe(f"{folder}/beside.txt", b"three")
    return f"memory://{folder}"


def test_a_remote_saved_dataset_is_the_files_of_its_state(request):
    state = json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}).encode()
    source = save_remotely(f"/{request.node.name}", state)
    units = plan_units([source], ReadOptions())
    texts = [d.text for unit in units for d in read_unit(unit, ReadOptions(), ReadReport())]
    assert texts == ["three", "one", "two"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"[]", "state.json is not the state of a folder written by datasets' save_to_disk"),
        (b'{"_data_files": [{"filename": "gone.arrow"}]}', "names the file gone.arrow, which is"),
        (b'{"_data_files": [{"filename": "../beside.txt"}]}', "names the file ../beside.txt"),
    ],
)
def test_a_remote_state_that_makes_no_sense_is_told(request, state, message):
    source = save_remotely(f"/{request.node.name}".replace("[", "-").replace("]", ""), state)
    with pytest.raises(UserError, match=message) as caught:
        plan_units([source], ReadOptions())
    assert "save the dataset again" in str(caught.value)
