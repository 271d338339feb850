"""What the whole suite shares: one small corpus, tokenizer and dataset, and a tiny run on them."""

import collections
import contextlib
import gc
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

# Before torch is imported anywhere: two cores, shared by the processes of a distributed test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# A GPU machine tests without it.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # An example's time is the machine's load: what hangs is ended by the timeout of its test.
    settings.register_profile("any load", deadline=None)
    settings.load_profile("any load")


@pytest.fixture(autouse=True)
def no_launcher_is_left():
    """A rank that a test has set would silence every message of the tests behind it."""
    before = os.environ.get("RANK")
    yield
    assert os.environ.get("RANK") == before, "the test leaves RANK in the environment"


TINY_RUN = """
[data]
sequence_length = 32
block_sequences = 16
window_blocks = 4
[model]
vocab_size = {vocab_size}
[generator]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 64
max_position_embeddings = 64
position_buckets = 16
hidden_dropout_prob = {dropout}
attention_probs_dropout_prob = {dropout}
[discriminator]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 64
max_position_embeddings = 64
position_buckets = 16
hidden_dropout_prob = {dropout}
attention_probs_dropout_prob = {dropout}
[optimizer]
generator_learning_rate = 2e-3
discriminator_learning_rate = 1e-3
[schedule]
max_steps = 12
warmup_steps = 2
[checkpoint]
interval_steps = 4
[evaluation]
interval_steps = 6
max_sequences = 24
[logging]
interval_steps = 3
"""


def pytest_addoption(parser):
    parser.addoption("--slow-files", type=int, default=0, help="show so many of the slowest files")


def pytest_terminal_summary(terminalreporter, config):
    """Seconds by file, setups and teardowns included: what keeps `make test` long."""
    if not (count := config.getoption("slow_files")):
        return
    seconds = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section(f"slowest {count} files, of {seconds.total():.0f} s in all")
    for name, spent in seconds.most_common(count):
        terminalreporter.write_line(f"{spent:7.1f}s {name}")


@pytest.fixture(scope="session", autouse=True)
def _fork_server_ends():
    """Worlds are forked from a server that the first of them starts."""
    yield
    if forks := sys.modules.get("tests.faults.forks"):  # tests on a GPU need none of its imports
        forks.close_shared_server()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A few speeches of the embedded corpus, a folder of .txt files."""
    from data_prep.documents import embedded_corpus

    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(embedded_corpus()).rglob("*.txt"))[:8]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus, tmp_path_factory):
    """A trained tokenizer of 600 pieces with its Hugging Face files."""
    from data_prep.documents import ReadOptions, ReadReport
    from data_prep.tokenizer_training import TrainingOptions, train_tokenizer_from_sources

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    options = ReadOptions(txt_document="line")
    train_tokenizer_from_sources([str(corpus)], folder, TrainingOptions(600), options, ReadReport())
    return folder


@pytest.fixture(scope="session")
def dataset_folder(corpus, tokenizer_folder, tmp_path_factory):
    """The corpus as a dataset, a paragraph a document, a tenth held out."""
    from data_prep.build import build
    from data_prep.build_plan import BuildOptions
    from data_prep.documents import ReadOptions
    from data_prep.executors import ProcessExecutor

    folder = tmp_path_factory.mktemp("dataset") / "dataset"
    options = BuildOptions(read=ReadOptions(txt_document="line"), heldout_fraction=0.1)
    build([str(corpus)], tokenizer_folder, folder, options, ProcessExecutor(1))
    return folder


@pytest.fixture(scope="session")
def vocab_size(dataset_folder):
    from data_prep.shards import Dataset

    return Dataset.open(dataset_folder).manifest.vocab_size


@pytest.fixture(scope="session")
def world():
    """A world of this process alone; a process can start only one. `tests.engines` builds on it."""
    import deepspeed  # noqa: F401
    import torch.distributed as dist

    from pipeline.runtime import World, start_world
    from tests.engines import LAUNCHER

    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER:
            patch.delenv(name, raising=False)
        world = World.from_environment()
        start_world(world)
        for name in LAUNCHER:  # a training process that a test starts must not inherit them
            del os.environ[name]
        gc.freeze()  # DeepSpeed collects a dozen times for every engine
        patch.setenv("LOCAL_RANK", "0")  # DeepSpeed reads it in every step, and nobody else alone
        yield world
    dist.destroy_process_group()


@pytest.fixture
def tiny_run(tmp_path, vocab_size):
    """Write the tiny run's TOML; `dropout=0.1` for resume, 0 to compare worlds."""

    def write(dropout=0.0):
        path = tmp_path / f"tiny-{dropout}.toml"
        path.write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=dropout))
        return path

    return write


@pytest.fixture
def deepspeed_json(tmp_path):
    """Write a DeepSpeed JSON for the tiny run."""

    def write(stage=1, micro=4, precision="fp32", train_batch_size=8, **extra):
        value = {
            "train_batch_size": train_batch_size,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
            **extra,
        }
        if precision == "bf16":
            value["data_types"] = {"grad_accum_dtype": "fp32"}
        path = tmp_path / f"zero{stage}-{precision}-{micro}-{train_batch_size}.json"
        path.write_text(json.dumps(value))
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    """The tokenizer of 600 pieces, loaded."""
    from data_prep.tokenizer import Tokenizer

    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def config(dataset_folder):
    """A run of small networks that nobody starts."""
    from tests.commits import run_config

    return run_config(dataset_folder, dataset_folder.parent / "no run")
