"""The wheel for cluster images: the two packages, their data, and nothing else."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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
    assert {"pipeline/slurm_scripts/site.env", "pipeline/submit/job.sbatch.j2"} <= set(names)
    _submit_works_without_a_checkout(wheel, tmp_path)


def _submit_works_without_a_checkout(wheel, tmp_path):
    """`deberta submit` finds the scripts of slurm/ in the wheel, and copies them to be edited."""
    installed, place = tmp_path / "installed", tmp_path / "place"
    zipfile.ZipFile(wheel).extractall(installed)
    (place / "data_prep/samples").mkdir(parents=True)
    (place / "data_prep/samples/speeches").symlink_to(ROOT / "data_prep/samples/speeches")
    (place / "ds_configs").symlink_to(ROOT / "ds_configs")
    programs = tmp_path / "bin"  # and no SLURM, which might have an opinion
    programs.mkdir()
    for name in ("bash", "env"):
        (programs / name).symlink_to(shutil.which(name))
    kept = {name: value for name, value in os.environ.items() if name != "DEBERTA_HOME"}
    environment = {**kept, "PYTHONPATH": str(installed), "PATH": str(programs)}

    def deberta(*words, **variables):
        argv = [sys.executable, "-m", "pipeline.cli", *words]
        done = subprocess.run(
            argv,
            cwd=place,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    deberta("submit", "--copy-scripts", "mine")
    recipe = "mine/slurm/recipes/demo-cpu.toml"
    scripts = deberta("submit", recipe, "--dry-run")
    for path in sorted((ROOT / "slurm").glob("*.sbatch")):
        body = path.read_text().splitlines()[-1]
        assert body in scripts, path
    (place / "mine/slurm/site.env").write_text("SBATCH_PARTITION=from-home\n")
    home = str(Path(place / "mine"))
    edited = deberta("submit", recipe, "--dry-run", DEBERTA_HOME=home)
    assert "#SBATCH --partition=from-home" in edited
    assert "from-home" not in scripts
