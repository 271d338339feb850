"""From options to a plan: systems scaled to the budget, and everything that could be wrong.

Nothing is written, and nothing here takes more than a second, so that a mistake costs no time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.errors import UserError
from data_prep.manifest import Split
from data_prep.shards import Dataset
from pipeline.compare.matching import (
    SCALED_KEYS,
    Match,
    cost_until,
    count_evaluations,
    scaled_words,
    steps_for,
)
from pipeline.compare.plan import MARKER, CompareOptions, Plan, Run, without_keys
from pipeline.compare.systems import System, load_systems, notes_of
from pipeline.config_files import read_json
from pipeline.config_loading import load_run_config
from pipeline.ds_config import (
    BatchPlan,
    DeepSpeedConfig,
    check_device,
    combine_checks,
    load_deepspeed_config,
)
from pipeline.findings import raise_findings
from pipeline.resume_rules import changed_deepspeed_keys, changed_keys, refuse_changes
from pipeline.run_folder import RunFolder


def make_plan(options: CompareOptions) -> Plan:
    """Check a comparison and work out its runs; reads, and writes nothing.

    Args:
        options: What to compare.

    Returns:
        The plan.

    Raises:
        UserError: With what is wrong: systems, data, budget, or what is in the output folder.
        CorruptError: The dataset is damaged.
    """
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: give 1 or more")
    systems = load_systems(options.systems, options.words)
    deepspeed = load_deepspeed_config(options.deepspeed_config)
    batch = deepspeed.batch_plan(1)
    first = systems[0].config
    budget = options.budget
    if budget is None:
        budget = cost_until(first, first.schedule.max_steps, batch).of(options.match)
    if not math.isfinite(budget) or budget <= 0:
        raise UserError(f"--budget {budget:g}: give a number above 0")
    scaled = _scale(systems, options.match, budget, batch)
    plan = Plan(
        systems=tuple(scaled),
        costs=tuple(
            cost_until(each.config, each.config.schedule.max_steps, batch) for each in scaled
        ),
        seeds=tuple(first.run.seed + number for number in range(options.seeds)),
        match=options.match,
        budget=budget,
        dataset=_open_dataset(options.dataset, scaled[0]),
        deepspeed=deepspeed,
        batch=batch,
        output=options.output,
        notes=tuple(notes_of(scaled) + _warnings(scaled, deepspeed)),
    )
    _check_output(plan)
    _check_runs(plan)
    return plan


def _scale(
    systems: Sequence[System], match: Match, budget: float, batch: BatchPlan
) -> list[System]:
    """Give every system the steps that the budget buys."""
    evaluations = count_evaluations(systems[0].config)
    max_sequences = f"evaluation.max_sequences={systems[0].config.evaluation.max_sequences}"
    findings, scaled = [], []
    for system in systems:
        steps = steps_for(system.config, match, budget, batch)
        if steps < 1:
            one = cost_until(system.config, 1, batch).of(match)
            findings.append(
                f"{system.name}: --budget {budget:.4g} {match} is less than one step, which is"
                f" {one:.4g}; give more"
            )
            continue
        words = [*scaled_words(system.config, steps, evaluations), max_sequences]
        kept = without_keys(system.words, (*SCALED_KEYS, "evaluation.max_sequences"))
        try:
            config = load_run_config(system.source, (*kept, *words))
            scaled.append(replace(system, words=(*kept, *words), config=config))
        except UserError as error:
            findings.append(f"{system.name} in {steps} steps: {error}")
    raise_findings("deberta compare", findings)
    return scaled


def _open_dataset(path: Path, system: System) -> Dataset:
    """Open the dataset and compare it with the systems, which agree about it."""
    dataset = Dataset.open(path)
    vocab_size, ours = dataset.manifest.vocab_size, system.config.model.vocab_size
    if vocab_size != ours:
        raise UserError(
            f"--dataset {path} was tokenized with a vocabulary of {vocab_size}, model.vocab_size"
            f" is {ours}: add model.vocab_size={vocab_size}, or name another dataset"
        )
    needs: dict[Split, str] = {"train": "to train on", "heldout": "held out, to measure on"}
    for split, words in needs.items():
        if dataset.split_tokens(split) == 0:
            raise UserError(
                f"--dataset {path} has nothing {words}: build it with"
                " `deberta-prep build --heldout-fraction`"
            )
    return dataset


def _warnings(systems: Sequence[System], deepspeed: DeepSpeedConfig) -> list[str]:
    """What training will warn of, once for all systems that it is true of."""
    lines: dict[str, list[str]] = {}
    for system in systems:
        for line in combine_checks(system.config, deepspeed):
            lines.setdefault(line, []).append(system.name)
    return [f"{', '.join(names)}: {line}." for line, names in lines.items()]


def check_machine(plan: Plan) -> None:
    """Refuse what this machine cannot compute.

    Args:
        plan: The plan.

    Raises:
        UserError: The DeepSpeed JSON needs a GPU and there is none.
    """
    import torch  # costs seconds, which a mistake in the configuration must not

    check_device(plan.deepspeed, "cuda" if torch.cuda.is_available() else "cpu")


def _check_output(plan: Plan) -> None:
    """Refuse a folder that holds something else, or a comparison on other data."""
    output, marker = plan.output, plan.output / MARKER
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    if not marker.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise UserError(
                f"--output {output} is not empty and holds no comparison: choose another folder"
            )
        return
    before = read_json(marker).get("dataset_fingerprint")
    if before != plan.dataset.fingerprint:
        raise UserError(
            f"--output {output} holds a comparison on another dataset (fingerprint"
            f" {str(before)[:12]}, {plan.dataset.folder} has {plan.dataset.fingerprint[:12]}):"
            " choose another folder"
        )


def _check_runs(plan: Plan) -> None:
    """Refuse runs that were begun with another configuration: they could not go on."""
    raise_findings(
        f"--output {plan.output}", [line for run in plan.runs for line in _begun(run, plan)]
    )


def _begun(run: Run, plan: Plan) -> Iterator[str]:
    resolved = run.folder / "config.resolved.json"
    if not resolved.is_file():
        return
    new = load_run_config(run.system.source, run.words)
    changes = changed_keys(
        load_run_config(str(resolved)), new, RunFolder(run.folder).committed_step()
    )
    changes += changed_deepspeed_keys(load_deepspeed_config(resolved), plan.deepspeed)
    try:
        refuse_changes(str(run.folder), changes)
    except UserError as error:
        yield f"{error}; or choose another --output"
