"""`deberta train --dry-run`: what a run would be, without a device, a world or a write.

data        tokens and passes over them, where data.path is given
start       what a model that is continued brings, where initialize.path is given too
parameters  of each network, counted on networks without memory
batch       split over the ranks; precision, sharding and clipping
steps       sequences and tokens of a step, where they change
reference   runs that were made of this configuration, where there are any
run         tokens and operations of the whole run
memory      of weights, gradients and optimizer on a rank
"""

from pipeline.banner import memory_line, parameter_counts
from pipeline.config import RunConfig
from pipeline.ds_config import BatchPlan, DeepSpeedConfig, combine_checks
from pipeline.flops import training_flops
from pipeline.initialize.pair import initialize_pair
from pipeline.mixture_sources import describe_mixture
from pipeline.phases import TrainSchedule, train_schedule
from pipeline.reference_curves import find_reference
from pipeline.run_data import RunData, open_run_data
from pipeline.run_services import probe_pairs

_PETAFLOP_DAY = 1e15 * 24 * 60 * 60


def describe_run(config: RunConfig, ds: DeepSpeedConfig, world_size: int) -> list[str]:
    """Check a run and say what it would be.

    Args:
        config: The run.
        ds: The DeepSpeed JSON.
        world_size: Ranks to plan for.

    Returns:
        Lines.

    Raises:
        UserError: Something does not fit.
    """
    plan = ds.batch_plan(world_size)
    schedule = train_schedule(config, plan)
    lines = []
    if config.data.path:
        data = open_run_data(config)
        lines += _data_lines(config, data, schedule) + _probe_lines(config, plan, data)
        if config.initialize.path:
            lines += [f"start: {note}" for note in initialize_pair(config, data.tokenizer).notes]
    counts = parameter_counts(config)
    return [
        *lines,
        "parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        *ds.explain(plan, config.data.sequence_length),
        *schedule.explain(),
        *_reference_lines(config, plan.train_batch_size),
        _run_line(config, schedule, plan.train_batch_size),
        memory_line(sum(counts.values()), ds, world_size),
        *(f"warning: {text}" for text in combine_checks(config, ds)),
    ]


def _run_line(config: RunConfig, schedule: TrainSchedule, train_batch_size: int) -> str:
    """Sum up the whole run."""
    steps = config.schedule.max_steps
    tokens, flops = schedule.tokens_before(steps), training_flops(config, train_batch_size)
    return (
        f"run: {steps:,} steps, {tokens:.4g} tokens, {flops:.4g} FLOPs"
        f" = {flops / _PETAFLOP_DAY:.4g} PetaFLOP-days"
    )


def _probe_lines(config: RunConfig, plan: BatchPlan, data: RunData) -> list[str]:
    """Say with how many pairs of sentences the networks are probed."""
    if data.minimal_pairs is None:
        return []
    count, every = len(probe_pairs(config, plan, data.minimal_pairs)), len(data.minimal_pairs.pairs)
    share = config.evaluation.minimal_pairs_compute_fraction
    return [
        f"minimal pairs: {count:,} of {every:,} for {share:.2%} of the training's operations; "
        f"{data.minimal_pairs.num_left_out:,} cannot be used"
    ]


def _reference_lines(config: RunConfig, train_batch_size: int) -> list[str]:
    """Name the runs that this one will be compared with."""
    reference = find_reference(config, train_batch_size)
    if reference is None:
        return []
    steps = ", ".join(f"{step:,}" for step in reference.milestones)
    return [f"reference: {reference.label}; compared at steps {steps}"]


def _data_lines(config: RunConfig, data: RunData, schedule: TrainSchedule) -> list[str]:
    """Say how often the dataset is read, and each source of a mixture."""
    samples = schedule.samples_by_length()
    epochs = sum(samples[length] / each.num_sequences for length, each in data.train.items())
    tokens = data.train[data.heldout.sequence_length].num_tokens
    return [
        f"data: {tokens:,} training tokens, {epochs:.3g} epochs",
        *describe_mixture(data.train, config.data, samples),
    ]
