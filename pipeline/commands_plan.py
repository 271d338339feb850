"""`deberta plan`: memory, speed, cost and communication of a run, before there is a GPU."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.plan.planning import Plan
    from pipeline.plan.search import Alternative


def plan_command(
    preset_or_toml: Annotated[
        str, typer.Argument(metavar="PRESET_OR_TOML", help="Preset, TOML file, or resolved run.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Single keys.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all.")] = 8,
    gpu: Annotated[
        str, typer.Option(help="Their type, as a100-40; a wrong one lists all.")
    ] = "h100",
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", "--gpus_per_node", min=1, help="GPUs of a node.")
    ] = 8,
    network_gbit: Annotated[
        float, typer.Option(min=1, help="Gbit/s of a GPU's network card, between nodes.")
    ] = 400.0,
    deepspeed_config: Annotated[
        Path | None,
        typer.Option(
            "--deepspeed_config", "--deepspeed-config", metavar="JSON", help="DeepSpeed JSON."
        ),
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-gpu-hour",
            "--price_per_gpu_hour",
            "--price",
            min=0,
            help="Price of a GPU-hour, in any currency.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Plan a run: what it needs of GPUs, networks and disks, and how long it takes.

    Without a DeepSpeed JSON the plan is for the fastest settings that fit; what the configuration
    names of them is kept. With a JSON it is for that file, and the fastest settings stand beside
    it. Each figure is counted, modelled or measured, and says so.

    Example: deberta plan deberta_v3_large --gpus 64 --gpu h100 --price 2.5
    """
    from pipeline.config_loading import load_run_config
    from pipeline.ds_config import load_deepspeed_config
    from pipeline.plan.devices import Cluster, gpu_type
    from pipeline.plan.measurements import deviations, measured_steps
    from pipeline.plan.planning import evaluate
    from pipeline.plan.report import plan_lines
    from pipeline.plan.search import default_deepspeed, fastest, named_keys, propose
    from pipeline.plan.tables import deviation_lines, proposal_lines, stage_lines, way_lines

    price = price_per_gpu_hour
    if price is not None and not math.isfinite(price):
        raise UserError(f"--price-per-gpu-hour {price:g}: give a number")
    cluster = Cluster.of(gpu_type(gpu), gpus, gpus_per_node, network_gbit)
    config = load_run_config(preset_or_toml, overrides or [])
    given = None
    if deepspeed_config is None:
        deepspeed = default_deepspeed(config, cluster)
    else:
        deepspeed = load_deepspeed_config(deepspeed_config)
        given = evaluate(config, deepspeed, cluster)
    alternatives = propose(config, deepspeed, cluster)
    proposal = fastest(alternatives, config)
    plan = given or proposal or _smallest(alternatives)
    if as_json:
        typer.echo(json.dumps(_values(plan, proposal, alternatives, price), indent=2))
        return
    lines = [*plan_lines(plan, price), "", *proposal_lines(plan, proposal)]
    lines += way_lines(alternatives, proposal)
    lines += stage_lines(alternatives, proposal or plan, named_keys(config))
    lines += deviation_lines(deviations(measured_steps()))
    typer.echo("\n".join(lines))


def _smallest(alternatives: "list[Alternative]") -> "Plan":
    """What needs least memory, where nothing fits."""
    plans = [each.too_large for each in alternatives if each.too_large is not None]
    return min(plans, key=lambda plan: plan.peak.total)


def _values(
    plan: "Plan",
    proposal: "Plan | None",
    alternatives: "list[Alternative]",
    price: float | None,
) -> dict[str, object]:
    from pipeline.plan.report import brief_values, plan_values

    return {
        "plan": plan_values(plan, price),
        "proposal": None if proposal is None else plan_values(proposal, price),
        "alternatives": [
            {
                "zero_stage": each.stage,
                "activation_checkpointing": each.config.model.activation_checkpointing,
                "attention_backend": each.way[0],
                "compile": each.way[1],
                "fits": None if each.best is None else brief_values(each.best),
                "does_not_fit": None if each.too_large is None else brief_values(each.too_large),
            }
            for each in alternatives
        ],
    }
