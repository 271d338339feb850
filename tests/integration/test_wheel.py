"""The wheel for cluster images: the two packages, their data, and nothing else."""

import subprocess
import sys
import zipfile

from tests.worlds import ROOT


def test_wheel_holds_exactly_the_packages(tmp_path):
    # A copy, because setuptools leaves a build folder where it works.
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    folders = ["--wheel-dir", str(tmp_path), str(tmp_path / "clone")]
    subprocess.run([*pip, *folders], check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"data_prep", "pipeline"}
    assert "pipeline/presets/demo.toml" in names
    assert any(name.startswith("data_prep/samples/") and name.endswith(".txt") for name in names)
