"""The scripts without SLURM: shellcheck, a reason for each line, and the container's files."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.submit.recipe import load_recipe
from pipeline.submit.rendering import PlainScript
from pipeline.submit.site_file import read_site
from pipeline.submit.stages import Layout, plan_jobs
from tests.slurm.conftest import require
from tests.worlds import ROOT

SLURM = ROOT / "slurm"
PLAIN = sorted(SLURM.glob("*.sbatch"))
SHELL = [*PLAIN, *sorted(SLURM.glob("*.sh")), *sorted(SLURM.glob("**/*.env"))]
DEFINITION = SLURM / "container/deberta.def"
SECTIONS = ("files", "post", "environment", "runscript", "test", "labels")


@pytest.fixture
def shellcheck(request):
    """Run shellcheck on files."""
    if not shutil.which("shellcheck"):
        require(request, "shellcheck not found: apt-get install shellcheck")

    def check(*paths):
        argv = ["shellcheck", "--external-sources", f"--source-path={ROOT}", *map(str, paths)]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    return check


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(SLURM)))
def test_shellcheck_finds_nothing(shellcheck, path):
    shellcheck(path)


def test_shellcheck_would_find_something(shellcheck, tmp_path):
    bad = tmp_path / "bad.sh"
    bad.write_text("#!/bin/bash\nrm -r $HOME/$1\n")
    with pytest.raises(AssertionError, match="SC2086"):
        shellcheck(bad)


@pytest.mark.parametrize("recipe", sorted((SLURM / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_rendered_scripts_are_clean(shellcheck, recipe, tmp_path):
    loaded = load_recipe(recipe)
    site = read_site(loaded.site, {"PATH": "/usr/bin:/bin", "DEBERTA_HOME": str(ROOT)})
    paths = []
    for job in plan_jobs(loaded, site, Layout.of(loaded, tmp_path)):
        paths.append(tmp_path / f"{job.stage}.sbatch")
        paths[-1].write_text(job.text("a test"))
        # sbatch reads options up to the first command alone.
        lines = paths[-1].read_text().splitlines()
        first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert not any(line.startswith("#SBATCH") for line in lines[first:])
    shellcheck(*paths)


def test_the_recipe_of_the_readme_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", (SLURM / "README.md").read_text(), re.DOTALL)
    (tmp_path / "recipe.toml").write_text(text)
    assert load_recipe(tmp_path / "recipe.toml").stages == (
        "prep",
        "pretrain",
        "export",
        "evaluate",
    )


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_each_line_of_a_header_has_its_reason(path):
    script = PlainScript.read(path)
    assert set(script.options) - set(script.reasons) <= {"job-name"}


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_scripts_are_strict(path):
    body = PlainScript.read(path).body
    assert body.startswith("set -euo pipefail")
    assert not re.search(r"\|\s*tee\b", body), "a pipe into tee hides an exit code"


def sections():
    """The definition file by its sections, the head under ''."""
    found, name = {"": []}, ""
    for line in DEFINITION.read_text().splitlines():
        if match := re.fullmatch(r"%(\w+)", line):
            name = match[1]
            assert name not in found, f"%{name} twice"
            found[name] = []
        else:
            found[name].append(line)
    return {name: [line for line in lines if line.strip()] for name, lines in found.items()}


def test_the_definition_of_the_container_has_its_parts():
    parts = sections()
    assert set(parts) == {"", *SECTIONS}
    head = [line for line in parts[""] if not line.startswith("#")]
    assert [line.partition(":")[0] for line in head] == ["Bootstrap", "From"]
    for line in parts["files"]:
        source, target = line.split()
        assert (ROOT / source).exists(), source
        assert target == f"/opt/deberta/{source}"


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_the_shell_of_the_container_is_clean(shellcheck, name, tmp_path):
    script = tmp_path / f"{name}.sh"
    script.write_text("\n".join(["#!/bin/sh", "set -e", *sections()[name], ""]))
    shellcheck(script)


def test_the_container_has_the_versions_of_the_suite():
    pinned = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[0] in " ".join(sections()["post"])


@pytest.mark.parametrize(
    ("name", "first"), [("apptainer", "apptainer"), ("pyxis", "--container-image=")]
)
def test_lines_for_containers_are_words_for_the_scripts(name, first):
    program = f'. "{SLURM}/container/{name}.env"; read -ra words <<<"$DEBERTA_CONTAINER"; '
    program += 'printf "%s\\n" "${words[@]}"'
    argv = ["bash", "-c", program]
    words = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[0].startswith(first)
    assert len(words) == (6 if name == "apptainer" else 4)
    if name == "pyxis":
        assert all(word.startswith(("--container-", "--no-container-")) for word in words)


@pytest.mark.parametrize("path", sorted(Path(SLURM / "container").glob("*")), ids=lambda p: p.name)
def test_what_nobody_has_run_says_so(path):
    assert "ntested" in path.read_text()
