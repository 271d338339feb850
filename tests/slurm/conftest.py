"""What tests on a live SLURM share: clusters and hosts, their absence, and the table of outcomes.

A cluster starts in about a second, so each file has its own and may kill nodes. `SHAPE` of a file
holds `Cluster`'s options.
"""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_there_can_be_no_cluster
from tests.slurm.hosts import Hosts, unique_prefix, why_there_can_be_no_hosts
from tests.slurm.outcomes import PROPERTY, Outcome, markdown, sorted_outcomes

# Assertions of these say what they saw, as those of a test do.
pytest.register_assert_rewrite("tests.slurm.requeue_cases", "tests.slurm.trials")


def pytest_addoption(parser):
    parser.addoption("--require-slurm", action="store_true", help="a skip for lack of SLURM fails")
    parser.addoption("--slurm-table", help="write what was seen on the live SLURM to this .md file")


def require(request, reason):
    """Skip, or fail where SLURM is required, if there is a reason to."""
    if reason and request.config.getoption("require_slurm", default=False):
        pytest.fail(f"--require-slurm: {reason}")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(request, tmp_path_factory):
    """A running cluster for a file of tests."""
    require(request, why_there_can_be_no_cluster())
    shape = getattr(request.module, "SHAPE", {})
    with Cluster(tmp_path_factory.mktemp("cluster"), **shape) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def hosts(request, tmp_path_factory):
    """Two hosts with sshd and without SLURM for a file of tests."""
    require(request, why_there_can_be_no_hosts())
    prefix = unique_prefix()
    names = [f"{prefix}-n{index + 1}" for index in range(2)]
    with Hosts(tmp_path_factory.mktemp("hosts"), names) as hosts:
        hosts.start_sshd()
        yield hosts


@pytest.fixture
def outcome(request):
    """Say what a case has shown: `outcome(case, states=..., restarts=..., ...)`, see `Outcome`."""

    def note(case, **seen):
        request.node.user_properties.append((PROPERTY, Outcome(case, **seen).as_dict()))

    return note


def pytest_terminal_summary(terminalreporter, config):
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    if outcomes := sorted_outcomes(reports):
        text = markdown(outcomes)
        terminalreporter.section("seen on the live SLURM")
        terminalreporter.write_line(text)
        if path := config.getoption("slurm_table", default=None):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(f"# Seen on a live SLURM\n\nWritten by `make slurm`.\n\n{text}\n")
