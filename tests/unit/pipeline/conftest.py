"""What tests of several modules share: a run with random weights, its export, plain engines."""

import json
from types import SimpleNamespace

import pytest

from pipeline import commit_writer, faults
from tests.commits import plain_engine, random_pair, run_config, take_step, write_commit
from tests.reference.released_repositories import Release

STEP = 40
HELDOUT_ROWS = [
    {"step": 30, "eval/mlm_loss": 9.0},
    {"step": 40, "train/mlm_loss": 1.0},
    {"step": 40, "eval/mlm_loss": 6.25, "eval/rtd_auc": 0.75},
    {"step": 50, "eval/mlm_loss": 2.0},
]


@pytest.fixture(scope="session")
def random_run(dataset_folder, tmp_path_factory):
    """folder, config, commit, step and the networks of a run; read-only."""
    folder = tmp_path_factory.mktemp("random_run") / "run"
    config = run_config(dataset_folder, folder)
    pair = random_pair(config, STEP)
    commit = write_commit(config, STEP, pair)
    rows = "".join(json.dumps(row) + "\n" for row in HELDOUT_ROWS)
    (folder / "metrics.jsonl").write_text(rows + '{"step": 6')
    return SimpleNamespace(folder=folder, config=config, commit=commit, step=STEP, pair=pair)


@pytest.fixture(scope="session")
def exported(random_run, tmp_path_factory):
    """folder and report of the run's export; read-only."""
    from pipeline.export import export_run

    folder = tmp_path_factory.mktemp("exported") / "deeper" / "export"
    return SimpleNamespace(folder=folder, report=export_run(random_run.folder, folder))


@pytest.fixture
def release(config):
    """A discriminator and a generator as somebody might have published them."""
    return Release(config)


@pytest.fixture
def repository(release, tmp_path):
    """A repository with both networks, for tests that damage it."""
    return release.write(tmp_path / "repository", generator="generator.bin")


@pytest.fixture
def engines():
    """Two plain engines that have taken a step, to be saved."""
    both = {"generator": plain_engine(1), "discriminator": plain_engine(2)}
    for engine in both.values():
        take_step(engine)
    return both


@pytest.fixture
def short_pauses(monkeypatch):
    """A failed write is tried again at once; what the test broke is whole again afterwards."""
    monkeypatch.setattr(commit_writer, "FIRST_PAUSE_SECONDS", 0.01)
    yield
    faults.configure("", 0)
