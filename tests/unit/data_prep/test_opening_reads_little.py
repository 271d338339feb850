"""A terabyte opens at once: what is read is the manifest, the tokenizer and headers."""

import subprocess
import sys

import pytest

from data_prep.manifest import BLOCK_BYTES
from tests.sparse_dataset import DOCUMENTS, write_sparse_dataset
from tests.worlds import ROOT

NUM_SHARDS = 32
SHARD_BYTES = 4 << 30
COUNT = """
import sys, psutil
from data_prep.shards import Dataset
process = psutil.Process()
before = process.io_counters().read_chars
dataset = Dataset.open(sys.argv[1])
opened = process.io_counters().read_chars - before
files = [f.path for f in process.open_files() if f.path.startswith(sys.argv[1])]
tokens = dataset.read("train", 5_000_000_000, 5_000_000_510)
assert len(tokens) == 510 and not tokens.any()
print(opened, process.io_counters().read_chars - before - opened, len(files))
"""


@pytest.fixture(scope="module")
def huge(tiny_tokenizer, tmp_path_factory):
    """128 GiB of tokens that take no disk."""
    folder = tmp_path_factory.mktemp("huge") / "dataset"
    write_sparse_dataset(folder, tiny_tokenizer, NUM_SHARDS, SHARD_BYTES)
    return folder


def test_opening_touches_no_token_file_beyond_its_header(huge):
    size = sum(path.stat().st_size for path in huge.glob("*.npy"))
    used = sum(path.stat().st_blocks * 512 for path in huge.glob("*.npy"))
    assert size > 128 << 30
    assert used < 2 << 20
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(huge)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    opened, read, open_files = map(int, done.stdout.split())
    whole = [huge / "manifest.json", huge / "manifest.sha256", *(huge / "tokenizer").iterdir()]
    headers = 128 * 2 * NUM_SHARDS
    expected = sum(path.stat().st_size for path in whole) + headers
    # A few more: /proc, from which the count itself is read.
    assert expected <= opened < expected + 4096
    assert open_files == 0
    # The ends of documents, a block to hash, and the page that holds the tokens.
    ends, page = 128 + 8 * DOCUMENTS, 32 << 10
    assert BLOCK_BYTES < read < BLOCK_BYTES + ends + 2 * page + 4096
