"""A plan for people and for programs: every figure with where it comes from.

counted    exact for the code and DeepSpeed 0.19.8 as they are; tests hold it
modelled   from assumptions, which the figure names
measured   from a benchmark on that type of GPU, which the figure names
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Literal

from pipeline.plan.memory import FRAGMENTATION
from pipeline.plan.planning import Plan
from pipeline.plan.speed import HIDDEN_SHARE

Kind = Literal["counted", "modelled", "measured"]
_GIB = 1 << 30
_ROOFLINE = (
    "roofline: matrix products at 71 % of the peak, attention kernels at 35 %, all else at 85 % of"
    " the memory's bandwidth"
)
_COUNTED_MEMORY = {
    "batches": "ids of all micro batches of a step",
    "rows of E_G": "fp32 rows that the discriminator reads",
    "gradient of E_G": "waits from the head's backward pass to the embeddings'",
}
_MODELLED_MEMORY = {
    "workspace of a layer": "of the largest operations",
    "logits of a chunk": "of the largest operations",
    "CUDA context, cuBLAS, NCCL": "assumed: 0.73 GiB, and 0.5 GiB for several GPUs",
    "allocator": f"assumed: {FRAGMENTATION:.0%} lost to fragmentation",
}


@dataclass(frozen=True)
class Figure:
    """One number of a plan."""

    section: str
    name: str
    value: float | int | str
    unit: str
    text: str
    """The value for people."""
    kind: Kind
    source: str
    """How it was counted, what it assumes, or who measured it."""


def figures(plan: Plan, price_per_gpu_hour: float | None) -> list[Figure]:
    """List all numbers of a plan.

    Args:
        plan: The plan.
        price_per_gpu_hour: In whatever currency; None leaves the cost out.

    Returns:
        Figures by section.
    """
    return [
        *_memory(plan),
        *_speed(plan, price_per_gpu_hour),
        *_communication(plan),
        *_storage(plan),
    ]


def _memory(plan: Plan) -> Iterator[Figure]:
    section = f"memory of a GPU, at its peak ({plan.peak.phase})"
    for name, count in plan.peak.parts.items():
        kind, source = "counted", _COUNTED_MEMORY.get(name, "DeepSpeed's tensors")
        if name in _MODELLED_MEMORY:
            kind, source = "modelled", _MODELLED_MEMORY[name]
        elif name.startswith(("activations", "relative")):
            kind, source = _activation_source(plan)
        yield _bytes(section, name, count, kind, source)
    gpu = plan.cluster.gpu
    room = gpu.memory_bytes - plan.peak.total
    verdict = f"{gib(room)} to spare" if plan.fits else f"{gib(-room)} too much"
    source = f"the sum of the above; of {gib(gpu.memory_bytes)}: {verdict}"
    yield _bytes(section, "total", plan.peak.total, "modelled", source)
    if plan.peak.host:
        source = "offloaded state, from DeepSpeed's source; no test holds it"
        yield _bytes(section, "in CPU memory, a rank", plan.peak.host, "modelled", source)


def _activation_source(plan: Plan) -> tuple[Kind, str]:
    """How activations are known, which depends on who computes them."""
    model = plan.config.model
    if plan.sharding.config.precision == "autocast":
        return "modelled", "as in fp32; autocast keeps copies of weights and halves of others"
    if model.compile == "layer":
        return "modelled", "tensors that autograd keeps without graphs, and masks as bits"
    if model.attention_backend not in ("eager", "torch"):
        return "counted", "counted from the fused kernels' design: no L x L tensor is kept"
    return "counted", "tensors that autograd keeps"


def _speed(plan: Plan, price: float | None) -> Iterator[Figure]:
    phases = len(plan.schedule.phases)
    section = "speed" if phases == 1 else f"speed, in the last of {phases} phases"
    step, row, kind, source = plan.step, plan.measurement, "modelled", _ROOFLINE
    if row is not None:
        where = f"{row.source}, {row.device}, {row.date}"
        source = f"{row.sequences} sequences were measured ({where}), for others by the roofline"
        if plan.is_measured:
            kind, source = "measured", f"{where}; updates and communication are modelled"

    def figure(name: str, value: float, unit: str, text: str, why: str = source) -> Figure:
        return Figure(section, name, value, unit, text, kind, why)

    micro = plan.batch.gradient_accumulation_steps
    yield figure(
        "forward and backward passes",
        step.computing,
        "seconds",
        f"{step.computing:.3f} s",
        f"{micro} micro steps; {source}",
    )
    yield figure(
        "sums, norms, Adam",
        step.updating,
        "seconds",
        f"{step.updating:.3f} s",
        "bytes of gradients and state / 85 % of the memory's bandwidth",
    )
    yield figure(
        "waiting for other ranks",
        step.exposed,
        "seconds",
        f"{step.exposed:.3f} s",
        f"communication; assumed: {HIDDEN_SHARE:.0%} of what is sent while computing is hidden",
    )
    yield figure("step", step.total, "seconds", f"{step.total:.3f} s", "the sum of the above")
    rate, gpus = plan.tokens_per_second, plan.cluster.num_gpus
    tokens = f"{plan.tokens_per_step:,} tokens of a step / its seconds"
    yield figure("tokens a second", rate, "tokens/second", f"{rate:,.0f}", tokens)
    each = f"{rate / gpus:,.0f}"
    yield figure("tokens a second and GPU", rate / gpus, "tokens/second", each, f"{gpus} GPUs")
    flops = plan.flops_per_token
    text = f"{flops / 1e9:.3f} GFLOP"
    source_of_flops = "the minimal exact algorithm, forward and backward"
    yield Figure(section, "FLOPs a token", flops, "FLOP", text, "counted", source_of_flops)
    peak = f"of {plan.cluster.gpu.half_flops / 1e12:,.0f} TFLOP/s of a GPU's tensor cores, dense"
    yield figure("MFU", plan.mfu, "share", f"{plan.mfu:.1%}", peak)
    steps = f"{plan.config.schedule.max_steps:,} steps; without evaluations, commits and failures"
    yield figure("run", plan.run_seconds, "seconds", _duration(plan), steps)
    hours = _amount(plan.gpu_hours)
    yield figure("GPU-hours", plan.gpu_hours, "hours", hours, "the run's hours x GPUs")
    if price is not None:
        cost = plan.gpu_hours * price
        yield figure("cost", cost, "money", _amount(cost), f"at {price:g} a GPU-hour")


def _communication(plan: Plan) -> Iterator[Figure]:
    section, ranks = "communication of a GPU, a step", plan.cluster.num_gpus
    for each in plan.collectives:
        sent = each.sent_bytes(ranks)
        name = f"{each.engine}: {each.purpose}"
        hidden = ", while computing" if each.is_overlapped else ""
        source = f"{each.operation} of {each.payload_bytes / 1e9:,.3f} GB on a ring{hidden}"
        text = f"{sent / 1e9:,.3f} GB"
        yield Figure(section, name, sent, "bytes", text, "counted", source)
    ring = plan.cluster.ring_bytes_per_second
    seconds = plan.step.communicating
    source = f"assumed: {ring / 1e9:,.0f} GB/s on a ring through {_nodes(plan)}"
    yield Figure(section, "time", seconds, "seconds", f"{seconds:.3f} s", "modelled", source)


def _storage(plan: Plan) -> Iterator[Figure]:
    section, storage = "disks", plan.storage
    text = f"{storage.commit_bytes / 1e9:,.2f} GB"
    source = "fp32 weights and Adam's averages of all networks"
    yield Figure(section, "a checkpoint", storage.commit_bytes, "bytes", text, "counted", source)
    newest = storage.kept_commits - storage.milestones - 1
    text = f"{storage.disk_bytes / 1e9:,.1f} GB"
    source = f"the newest {newest}, {storage.milestones} milestones, and one that is being written"
    yield Figure(section, "checkpoints", storage.disk_bytes, "bytes", text, "counted", source)
    tokens = storage.train_tokens
    text = f"{tokens / 1e9:,.1f} billion"
    yield Figure(
        section, "tokens trained on", tokens, "tokens", text, "counted", "all steps, padding too"
    )
    text = f"{storage.data_bytes / 1e9:,.1f} GB"
    if storage.dataset_tokens is None:
        text = f"<= {text}"
        source = "4 bytes a token; less where tokens repeat: data.path=FOLDER counts a dataset"
    else:
        source = f"4 bytes a token; {storage.epochs:,.2f} epochs of {plan.config.data.path}"
    yield Figure(section, "dataset", storage.data_bytes, "bytes", text, "counted", source)


def _duration(plan: Plan) -> str:
    days = plan.run_seconds / 86_400
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.2f} hours"


def _amount(number: float) -> str:
    return f"{number:,.{2 if number < 100 else 0}f}"


def _nodes(plan: Plan) -> str:
    count = plan.cluster.num_nodes
    return "1 node" if count == 1 else f"{count} nodes"


def _bytes(section: str, name: str, count: int, kind: Kind, source: str) -> Figure:
    return Figure(section, name, count, "bytes", gib(count), kind, source)


def gib(count: float) -> str:
    """Write bytes for people.

    Args:
        count: Bytes.

    Returns:
        In GiB, or in MiB where that is less than a tenth.
    """
    if count >= _GIB / 10:
        return f"{count / _GIB:,.2f} GiB"
    return f"{count / (1 << 20):,.2f} MiB"


def plan_lines(plan: Plan, price_per_gpu_hour: float | None) -> list[str]:
    """Write a plan for people: a heading, then a line for each figure.

    Args:
        plan: The plan.
        price_per_gpu_hour: Of a GPU-hour; None leaves the cost out.

    Returns:
        Lines.
    """
    cluster = plan.cluster
    fits = "" if plan.fits else "DOES NOT FIT: "
    lines = [
        f"{cluster.num_gpus} x {cluster.gpu.name} in {_nodes(plan)},"
        f" {plan.sharding.config.precision}: {plan.settings}",
        plan.batch.explain(plan.config.data.sequence_length),
        f"{plan.tokens_per_gpu_second:,.0f} tokens/s a GPU ({plan.mfu:.1%} MFU),"
        f" {_duration(plan)}, {_amount(plan.gpu_hours)} GPU-hours;"
        f" {fits}{gib(plan.peak.total)} of {gib(cluster.gpu.memory_bytes)} a GPU",
    ]
    rows = figures(plan, price_per_gpu_hour)
    width = max(len(row.name) for row in rows)
    for name, group in groupby(rows, lambda row: row.section):
        lines += ["", name]
        lines += [f"  {r.name:<{width}} {r.text:>15}  {r.kind:<8}  {r.source}" for r in group]
    return lines


def plan_values(plan: Plan, price_per_gpu_hour: float | None) -> dict[str, object]:
    """Describe a plan for programs.

    Args:
        plan: The plan.
        price_per_gpu_hour: Of a GPU-hour; None leaves the cost out.

    Returns:
        JSON-ready values.
    """
    return {
        **brief_values(plan),
        "gradient_accumulation_steps": plan.batch.gradient_accumulation_steps,
        "train_batch_size": plan.batch.train_batch_size,
        "precision": plan.sharding.config.precision,
        "deepspeed_config": plan.sharding.config.raw,
        "figures": [asdict(figure) for figure in figures(plan, price_per_gpu_hour)],
    }


def brief_values(plan: Plan) -> dict[str, object]:
    """Describe a plan's settings, memory and speed for programs.

    Args:
        plan: The plan.

    Returns:
        JSON-ready values.
    """
    model = plan.config.model
    return {
        "micro_batch": plan.batch.train_micro_batch_size_per_gpu,
        "zero_stage": plan.sharding.stage,
        "activation_checkpointing": model.activation_checkpointing,
        "attention_backend": model.attention_backend,
        "compile": model.compile,
        "fits": plan.fits,
        "peak_bytes": plan.peak.total,
        "tokens_per_second": plan.tokens_per_second,
        "run_seconds": plan.run_seconds,
        "speed_is": "measured" if plan.is_measured else "modelled",
    }
