"""What can be known to be wrong with a chain before anything waits in a queue.

- `load_training`: preset, words and DeepSpeed JSON, as training will load them.
- `frozen_files`: the same as files beside the script, so that a restart trains what was checked.
- `findings`: paths, vocabulary, batch arithmetic, room for checkpoints.
- `slurm_findings`: what SLURM itself can say: sizes of arrays, partitions, `sbatch --test-only`.
"""

import glob
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.manifest import Manifest, is_complete
from data_prep.tokenizer import Tokenizer, padded_vocab_size
from pipeline.config import RunConfig
from pipeline.config_loading import RESOLVED_FORMAT, load_run_config
from pipeline.ds_config import DeepSpeedConfig, check_device, load_deepspeed_config
from pipeline.evaluate.catalogue import find_tasks
from pipeline.evaluate.sources import HUB, DataSource
from pipeline.findings import nearest
from pipeline.phases import train_schedule
from pipeline.plan.parameters import engine_parameters
from pipeline.plan.storage import plan_storage
from pipeline.run_folder import to_json
from pipeline.submit.client import Slurm
from pipeline.submit.recipe import Recipe
from pipeline.submit.site_file import Site
from pipeline.submit.stages import (
    CONFIG_NAME,
    DEEPSPEED_NAME,
    EVALUATIONS_NAME,
    Job,
    Layout,
    evaluations,
)
from pipeline.submit.tables import EvaluateSection, PretrainSection, TaskSection

_GIB = 2**30
_ON_THE_HUB = re.compile(rf"{HUB}|[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Training:
    """What [pretrain] names, loaded.

    Attributes:
        config: What is learned.
        deepspeed: How it is computed.
        world_size: Ranks.
    """

    config: RunConfig
    deepspeed: DeepSpeedConfig
    world_size: int


def load_training(section: PretrainSection, nodes: int) -> tuple[Training | None, list[str]]:
    """Load what training will load.

    Args:
        section: [pretrain].
        nodes: Nodes of the job.

    Returns:
        The training, or None with findings.
    """
    problems, config, deepspeed = [], None, None
    try:
        config = load_run_config(section.config, section.overrides)
    except UserError as error:
        problems.append(f"pretrain.config: {error}")
    try:
        deepspeed = load_deepspeed_config(section.deepspeed_config)
    except UserError as error:
        problems.append(f"pretrain.deepspeed_config: {error}")
    if config is None or deepspeed is None:
        return None, problems
    ranks = nodes * (section.ntasks_per_node or section.gpus_per_node or 1)
    return Training(config, deepspeed, ranks), problems


def frozen_files(
    recipe: Recipe, layout: Layout, training: Training | None
) -> dict[str, dict[str, str]]:
    """Write out what jobs read beside their scripts.

    Args:
        recipe: The recipe.
        layout: Its paths.
        training: What [pretrain] names.

    Returns:
        Stage -> file name -> text.
    """
    files: dict[str, dict[str, str]] = {}
    if training is not None:
        run_config = training.config.model_dump(mode="json")
        files["pretrain"] = {
            CONFIG_NAME: to_json({"format": RESOLVED_FORMAT, "run_config": run_config}),
            DEEPSPEED_NAME: to_json(training.deepspeed.raw),
        }
    if recipe.evaluate is not None:
        rows = evaluations(recipe, layout)
        files["evaluate"] = {EVALUATIONS_NAME: "".join("\t".join(row) + "\n" for row in rows)}
    return files


def findings(
    recipe: Recipe, layout: Layout, site: Site, training: Training | None
) -> Iterator[str]:
    """Look for what cannot work.

    Args:
        recipe: The recipe.
        layout: Its paths.
        site: The site.
        training: What [pretrain] names, if it could be loaded.

    Yields:
        A line each.
    """
    setup = site.parameters.get("DEBERTA_SETUP")
    if setup and not Path(setup).is_file():
        yield f"DEBERTA_SETUP {setup}: no such file ({site.file}, or site.setup)"
    if recipe.tokenizer is not None:
        yield from _sources("tokenizer", recipe.tokenizer.sources, layout)
    if recipe.prep is not None:
        yield from _sources("prep", recipe.prep.sources, layout)
        yield from _inputs("prep", recipe.prep, ("recipe", "dedup"), layout)
        if recipe.tokenizer is None and not layout.tokenizer.exists():
            yield f"prep.tokenizer {layout.tokenizer}: no such tokenizer"
    if recipe.pretrain is not None:
        yield from _pretrain_findings(recipe, layout, training)
    if recipe.export is not None and recipe.pretrain is None:
        yield from _inputs("export", recipe.export, ("run",), layout)
        if recipe.export.run is None and not (layout.run / "checkpoints").is_dir():
            yield f"export: {layout.run} has no checkpoints; name export.run, or add [pretrain]"
    if recipe.evaluate is not None:
        yield from _evaluate_findings(recipe.evaluate, layout)


def slurm_findings(jobs: Sequence[Job], texts: Mapping[str, str], slurm: Slurm) -> Iterator[str]:
    """Ask SLURM about jobs, without submitting them.

    Args:
        jobs: The jobs.
        texts: Stage -> script.
        slurm: SLURM's commands.

    Yields:
        A line each.
    """
    largest = slurm.max_array_size()
    partitions = slurm.partitions()
    for job in jobs:
        if job.array_tasks and largest is not None and job.array_tasks > largest:
            yield (
                f"{job.stage}: an array of {job.array_tasks} tasks; SLURM here takes {largest} "
                "(MaxArraySize)"
            )
            continue
        wanted = (job.options.get("partition") or "").split(",")
        unknown = [name for name in wanted if name and name not in partitions]
        if partitions and unknown:
            yield from (
                f"{job.stage}: partition '{name}' does not exist{nearest(name, partitions)}"
                for name in unknown
            )
        elif refusal := slurm.refusal(texts[job.stage]):
            yield f"{job.stage}: sbatch --test-only: {refusal}"


def _sources(stage: str, sources: Sequence[str], layout: Layout) -> Iterator[str]:
    """Sources that are not there; those elsewhere are looked at by the job."""
    for source in sources:
        place = str(layout.work / source)
        # Path.glob takes no absolute patterns.
        matches = glob.glob(place, recursive=True)  # noqa: PTH207
        if "://" not in source and not Path(place).exists() and not matches:
            yield f"{stage}.sources '{source}': nothing is there"


def _inputs(
    stage: str, section: object, keys: Sequence[str], layout: Layout, made: Path | None = None
) -> Iterator[str]:
    """Paths that are given and not there, unless the chain makes them."""
    for key in keys:
        value = getattr(section, key)
        path = None if value is None else layout.work / value
        if path is not None and path != made and not path.exists():
            yield f"{stage}.{key} '{value}': no such file or folder"


def _evaluate_findings(section: EvaluateSection, layout: Layout) -> Iterator[str]:
    yield from _inputs("evaluate", section, ("dataset",), layout, made=layout.dataset)
    yield from _inputs("evaluate", section, ("model",), layout, made=layout.export)
    for task in section.tasks:
        yield from _inputs(f"evaluate.tasks {task.name}", task, ("train", "test"), layout)
        yield from _published_findings(task, layout)


def _published_findings(task: TaskSection, layout: Layout) -> Iterator[str]:
    """Splits of published tasks that a folder lacks; what is on the hub is looked at by the job."""
    if task.task is None or task.data is None:
        return
    folder, where = layout.work / task.data, f"evaluate.tasks {task.name}.data '{task.data}'"
    if not folder.is_dir():
        if not _ON_THE_HUB.fullmatch(task.data):
            yield f"{where}: no such folder; give one, `hub` or a repository as `org/name`"
        return
    specs = find_tasks(task.task)
    source = DataSource(str(folder), is_for_one_task=len(specs) == 1)
    for spec in specs:
        for split in (*spec.train, *spec.scored.values()):
            if not source.has(spec, split):
                yield f"{where}: no {split.name} split of {spec.name} is there"


def _pretrain_findings(recipe: Recipe, layout: Layout, training: Training | None) -> Iterator[str]:
    if (switch := layout.run / "no-restart").exists():
        yield f"{switch} is there, so training would not start; remove it"
    if recipe.prep is None and not is_complete(layout.dataset or layout.run):
        yield f"pretrain.dataset {layout.dataset}: no finished dataset is there"
    if training is not None:
        yield from _training_findings(recipe, layout, training)


def _training_findings(recipe: Recipe, layout: Layout, training: Training) -> Iterator[str]:
    config, deepspeed = training.config, training.deepspeed
    section = recipe.pretrain
    assert section is not None, "training was loaded from it"
    # GPUs may also be asked for by --gres, whose names only the site knows.
    if not section.gpus_per_node and not any("gpu" in word for word in section.sbatch_options):
        try:
            check_device(deepspeed, "cpu")
        except UserError as error:
            yield f"pretrain: {error}"
    yield from _vocabulary_findings(recipe, layout, config.model.vocab_size)
    try:
        schedule = train_schedule(config, deepspeed.batch_plan(training.world_size))
        # Without the dataset, which may not be there yet.
        storage = plan_storage(
            config.model_copy(update={"data": config.data.model_copy(update={"path": ""})}),
            engine_parameters(config),
            schedule,
            training.world_size,
        )
    except UserError as error:
        yield f"pretrain: {error}"
        return
    there = layout.run / "checkpoints"
    used = sum(path.stat().st_size for path in there.rglob("*") if path.is_file())
    free = _free_bytes(layout.run) + used
    if storage.disk_bytes > free:
        yield (
            f"pretrain: {storage.kept_commits} checkpoints of {storage.commit_bytes / _GIB:.1f} GiB"
            f" need {storage.disk_bytes / _GIB:.1f} GiB, {layout.run} has {free / _GIB:.1f} GiB:"
            " choose another run.folder, or keep fewer (checkpoint.keep_last,"
            " checkpoint.milestone_interval_steps)"
        )


def _vocabulary_findings(recipe: Recipe, layout: Layout, vocab_size: int) -> Iterator[str]:
    """Compare the model's vocabulary with that of the dataset, which the chain may yet make."""
    try:
        if layout.dataset is not None and is_complete(layout.dataset):
            made, by = Manifest.load(layout.dataset)[0].vocab_size, str(layout.dataset)
        elif recipe.prep is not None and recipe.tokenizer is not None:
            pieces = recipe.tokenizer.vocab_size
            made, by = padded_vocab_size(pieces), f"tokenizer.vocab_size {pieces}"
        elif recipe.prep is not None and layout.tokenizer.exists():
            made, by = Tokenizer.load(layout.tokenizer).vocab_size, str(layout.tokenizer)
        else:
            return
    except UserError as error:
        yield f"pretrain: {error}"
        return
    if made != vocab_size:
        yield (
            f"pretrain: {by} gives a vocabulary of {made}, model.vocab_size is {vocab_size}: add "
            f'"model.vocab_size={made}" to pretrain.overrides'
        )


def _free_bytes(path: Path) -> int:
    """Room for a user's files where a folder is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
