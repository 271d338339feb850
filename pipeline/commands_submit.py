"""`deberta submit` and `deberta status`: a chain of SLURM jobs, and how it stands."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.submit.chain import Chain
    from pipeline.submit.client import Slurm

_COPIED = ("*.sbatch", "*.sh", "*.env", "*.md", "recipes/*", "container/*")


def submit_command(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="TOML; examples: slurm/recipes/.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the scripts and what is wrong; submit nothing.")
    ] = False,
    resubmit: Annotated[
        bool,
        typer.Option(
            "--resubmit", help="Submit stages that are neither done nor in the queue, again."
        ),
    ] = False,
    copy_scripts: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Make FOLDER/slurm with site.env to edit; for installed wheels."
        ),
    ] = None,
) -> None:
    """Submit a chain of jobs: tokenizer, preparation, pre-training, export, evaluation.

    Everything that can be checked is checked first; then each stage waits for the one before it.
    Scripts, logs and numbers of jobs are in RUN/slurm.

    Examples:

    deberta submit slurm/recipes/large-8-nodes.toml --dry-run

    deberta submit slurm/recipes/large-8-nodes.toml
    """
    if copy_scripts is not None:
        _copy_scripts(copy_scripts)
    elif recipe is None:
        raise UserError("name a RECIPE; slurm/recipes/ has examples, --copy-scripts copies them")
    if recipe is None:
        return
    from pipeline.findings import raise_findings
    from pipeline.submit.chain import submit_chain

    chain, slurm, findings, absence = _plan(recipe)
    if dry_run:
        _show(chain)
        typer.echo(
            f"SLURM was not asked: {absence}" if absence else "SLURM was asked about all jobs"
        )
        raise_findings(str(recipe), findings)
        return
    raise_findings(str(recipe), findings)
    if absence:
        raise UserError(
            f"{absence}: submit from a login node of the cluster; --dry-run shows the scripts here"
        )
    submitted = submit_chain(chain, slurm, resubmit=resubmit, say=typer.echo)
    if submitted:
        typer.echo(f"\nscripts and logs: {chain.folder}\n\n  deberta status {chain.folder.parent}")


def status_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show the chain, the step, the rate, the time left, and restarts with their reasons.

    Works without SLURM, from the files of the run alone.

    Example: deberta status runs/large
    """
    from pipeline.submit.client import Slurm
    from pipeline.submit.status import read_status, status_lines

    status = read_status(run, Slurm(dict(os.environ)))
    typer.echo(json.dumps(status, indent=2) if as_json else "\n".join(status_lines(status)))


def _plan(recipe_path: Path) -> "tuple[Chain, Slurm, list[str], str]":
    """Render and check a recipe; the last is why SLURM could not be asked."""
    from pipeline.submit.chain import Chain
    from pipeline.submit.checks import findings, frozen_files, load_training, slurm_findings
    from pipeline.submit.client import Slurm
    from pipeline.submit.recipe import load_recipe
    from pipeline.submit.site_file import read_site
    from pipeline.submit.stages import Layout, plan_jobs

    recipe = load_recipe(recipe_path)
    site = read_site(recipe.site, dict(os.environ))
    layout = Layout.of(recipe, Path.cwd())
    jobs = plan_jobs(recipe, site, layout)
    texts = {job.stage: job.text(f"{job.stage} of {recipe.name}") for job in jobs}
    problems, training = [], None
    if recipe.pretrain is not None:
        (nodes,) = (job.options["nodes"] for job in jobs if job.stage == "pretrain")
        training, problems = load_training(recipe.pretrain, int(nodes or 1))
    problems += findings(recipe, layout, site, training)
    slurm = Slurm(site.environment)
    absence = slurm.absence()
    if not absence:
        problems += slurm_findings(jobs, texts, slurm)
    files = frozen_files(recipe, layout, training)
    chain = Chain(recipe_path, layout.slurm, site.folder, jobs, texts, files)
    return chain, slurm, problems, absence


def _show(chain: "Chain") -> None:
    """Print every script, in colours where somebody looks at them."""
    from rich.console import Console
    from rich.syntax import Syntax

    console = Console()
    for stage, text in chain.texts.items():
        typer.echo(f"==> {chain.folder / stage}.sbatch")
        if console.is_terminal:
            console.print(Syntax(text, "bash", background_color="default"))
        else:
            typer.echo(text)


def _copy_scripts(folder: Path) -> None:
    """Copy the plain scripts to where a person may edit them."""
    from pipeline.submit.site_file import scripts_folder

    source, target = scripts_folder({}), folder / "slurm"
    if target.exists():
        raise UserError(f"{target} is there already; name another folder, or remove it")
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    typer.echo(f"edit {target / 'site.env'}, then: export DEBERTA_HOME={folder.absolute()}")
