"""What `deberta doctor` says of packages: real metadata of made-up distributions."""

import tomllib

import pytest

from pipeline.preflight.packages import EXTRAS, Wanted, look_at_packages
from tests.worlds import ROOT

OURS = """
[project]
name = "ours"
requires-python = ">=3.11"
dependencies = ["doctortest-one>=2,<3", "doctortest-two==1.5"]
[project.optional-dependencies]
mpi = ["doctortest-mpi>=4", "doctortest-mpirun>=4"]
test = ["doctortest-never"]
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs distributions that have metadata alone; returns how."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(name, version, *requires, python=""):
        folder = tmp_path / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        lines += [f"Requires-Python: {python}"] * bool(python)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    return install


@pytest.fixture
def look(tmp_path):
    def at(text=OURS):
        (tmp_path / "pyproject.toml").write_text(text)
        return [finding.line for finding in look_at_packages("n", tmp_path / "pyproject.toml")]

    return at


def test_this_environment_is_well():
    findings = look_at_packages("n", ROOT / "pyproject.toml")
    assert [finding.check for finding in findings] == ["python", "packages", "extras"], findings
    assert all(finding.ok and not finding.is_warning for finding in findings)
    wanted = Wanted.of_source(ROOT / "pyproject.toml")
    assert {each.name for each in wanted.packages} >= {"torch", "deepspeed", "packaging"}


def test_packages_in_their_ranges(installed, look):
    installed("doctortest-one", "2.9+cpu", "doctortest-two>=1", "doctortest-three; extra == 'x'")
    installed("doctortest-two", "1.5")
    _, packages, extras = look()
    assert packages.startswith("n packages: ok, 2 in their ranges, and in each other's")
    assert extras == "n extras: ok, none installed; not mpi"


def test_packages_outside_of_their_ranges(installed, look):
    installed("doctortest-one", "3.0", "doctortest-two<1", "doctortest-three>=7")
    installed("doctortest-three", "6.1")
    _, one, two, three, _ = look()
    assert one == (
        "n package doctortest-one: FAIL, 3.0, and deberta-pretrain asks for doctortest-one<3,>=2; "
        "pip install -c constraints.txt 'doctortest-one<3,>=2'"
    )
    assert two.startswith(
        "n package doctortest-two: FAIL, not installed, and deberta-pretrain asks for "
        "doctortest-two==1.5; pip install"
    )
    # What a dependency was made for counts as much.
    assert three.startswith(
        "n package doctortest-three: FAIL, 6.1, and doctortest-one 3.0 asks for doctortest-three>=7"
    )


def test_torch_comes_from_the_index_of_the_driver(look):
    lines = look('[project]\nname = "ours"\ndependencies = ["torch<1"]\n')
    assert lines[1].endswith("'torch<1', with the index of your driver (pytorch.org)")


def test_a_python_that_is_too_old(look):
    python, *_ = look(OURS.replace(">=3.11", ">=3.99"))
    assert python.startswith("n python: FAIL, 3.")
    assert "and >=3.99 is needed; make a virtual environment" in python


def test_extras(installed, look):
    installed("doctortest-one", "2.0")
    installed("doctortest-two", "1.5")
    installed("doctortest-mpi", "4.1")
    assert look()[-1] == "n extras: ok, mpi (without doctortest-mpirun) installed"
    installed("doctortest-mpirun", "3.0")
    assert look()[-1] == (
        "n extras: warning, mpi installed; package doctortest-mpirun 3.0, and [mpi] asks for "
        "doctortest-mpirun>=4; pip install -c constraints.txt 'doctortest-mpirun>=4'"
    )


def test_metadata_without_a_source_tree(installed, tmp_path):
    (finding,) = look_at_packages("n", tmp_path / "none.toml", "doctortest-ours")
    assert finding.line == (
        "n packages: warning, doctortest-ours is not installed, so that no ranges are known; "
        "pip install -c constraints.txt -e . in the folder of pyproject.toml"
    )
    requires = ("doctortest-one>=2", "doctortest-mpi>=4; extra == 'mpi'", "no name at all !")
    installed("doctortest-ours", "1.0", *requires, python=">=3.11")
    installed("doctortest-mpi", "4.1")
    lines = [finding.line for finding in look_at_packages("n", None, "doctortest-ours")]
    assert "not installed, and doctortest-ours asks for" in lines[1]
    assert lines[2] == "n extras: ok, mpi installed; not kernels, clean, remote, onnx"


def test_extras_are_all_of_the_project_but_for_its_tests():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"test"}
