"""Where jobs run: slurm/site.env, the variables of whoever submits, and the recipe's [site].

- `scripts_folder`: the folder with the plain scripts and site.env.
- `read_site`: a site.env as bash understands it, and the recipe's [site] over it.

sbatch takes `SBATCH_*` variables over the header of a script, so a rendered script could not say
where it runs. Those that have a place in the header are therefore moved there; the others reach
sbatch as they are.
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from data_prep.errors import UserError
from pipeline.submit.tables import Placement, SiteSection

_HEADER_OF_VARIABLE = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_CLUSTERS": "clusters",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_MEM_PER_NODE": "mem",
}
# Left from jobs that were submitted by hand: a rendered script says what it is given.
_OF_OTHER_JOBS = ("TRAIN_WORDS", "MAX_RESTARTS", "MAX_CRASHES_WITHOUT_PROGRESS")
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Site:
    """What a cluster and its user say about every job.

    Attributes:
        folder: The plain scripts.
        file: The site.env that was read.
        options: sbatch option without dashes -> value, for the header of every script.
        parameters: Variables for every job.
        environment: Of sbatch: this process's and the file's, without what is in `options`.
    """

    folder: Path
    file: Path
    options: Mapping[str, str]
    parameters: Mapping[str, str]
    environment: Mapping[str, str]


def scripts_folder(environment: Mapping[str, str]) -> Path:
    """Find the plain scripts.

    Args:
        environment: Of this process; `DEBERTA_HOME` may name a folder with `slurm/` in it.

    Returns:
        `$DEBERTA_HOME/slurm`, else `./slurm` if the scripts are there, else those that were
        installed with this program.

    Raises:
        UserError: DEBERTA_HOME is set, and there are no scripts.
    """
    if home := environment.get("DEBERTA_HOME"):
        folder = Path(home) / "slurm"
        if not (folder / "site.env").is_file():
            raise UserError(
                f"DEBERTA_HOME={home}: {folder} has no site.env; name the folder that `deberta "
                "submit --copy-scripts` made, or unset it"
            )
        return folder.resolve()
    if (Path("slurm") / "site.env").is_file() and (Path("slurm") / "pretrain.sbatch").is_file():
        return Path("slurm").resolve()
    return Path(str(resources.files("pipeline") / "slurm_scripts")).resolve()


def read_site(section: SiteSection, environment: Mapping[str, str]) -> Site:
    """Read site.env and put the recipe's [site] over it.

    Args:
        section: Of the recipe.
        environment: Of this process.

    Returns:
        The site.

    Raises:
        UserError: The file is missing, or bash cannot read it.
    """
    folder = scripts_folder(environment)
    file = folder / "site.env" if section.file is None else Path(section.file).absolute()
    before = _variables(None, environment)
    after = _variables(file, environment)
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    options = {
        option: after[name] for name, option in _HEADER_OF_VARIABLE.items() if after.get(name)
    }
    options |= placement_options(section)
    parameters = {
        name: value for name, value in changed.items() if value and not name.startswith("SBATCH_")
    }
    if section.setup is not None:
        parameters["DEBERTA_SETUP"] = section.setup
    if section.container is not None:
        parameters["DEBERTA_CONTAINER"] = section.container
    if setup := parameters.get("DEBERTA_SETUP"):
        parameters["DEBERTA_SETUP"] = str(Path(setup).absolute())
    parameters |= section.environment
    dropped = {*_HEADER_OF_VARIABLE, *_OF_OTHER_JOBS}
    passed = {name: value for name, value in after.items() if name not in dropped}
    return Site(folder, file, options, parameters, passed)


def placement_options(section: Placement) -> dict[str, str]:
    """Give what a table says about the place of jobs as sbatch options.

    Args:
        section: [site] or a stage.

    Returns:
        Option without dashes -> value.
    """
    values = {name: getattr(section, name) for name in Placement.model_fields}
    return {name: value for name, value in values.items() if value is not None}


def _variables(file: Path | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment after bash has read a file, which may use what bash offers."""
    # The file is data on the command line, never part of the program.
    program = 'set -a; if [[ -n "$1" ]]; then . "$1" >/dev/null || exit 1; fi; env -0'
    name = "" if file is None else str(file)
    if file is not None and not file.is_file():
        raise UserError(f"site.file {file}: no such file")
    try:
        done = subprocess.run(
            ["bash", "--norc", "--noprofile", "-c", program, "site", name],
            env=dict(environment),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{file}: bash has not read it within {_TIMEOUT_SECONDS} s; let it set variables alone"
        ) from None
    if done.returncode != 0:
        raise UserError(f"{file}: bash cannot read it: {done.stderr.strip()}")
    pairs = (entry.partition("=") for entry in done.stdout.split("\0") if entry)
    drop = {"_", "SHLVL", "PWD", "OLDPWD"}
    return {key: value for key, _, value in pairs if key not in drop or key in environment}
