"""`deberta plan`: memory, speed, cost and communication of a run, before there is a GPU."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.plan.planning import Alternative, Plan


def plan_command(
    preset_or_toml: Annotated[
        str, typer.Argument(metavar="PRESET_OR_TOML", help="Preset, TOML file, or resolved run.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Single keys.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all.")] = 8,
    gpu: Annotated[str, typer.Option(help="Type of the GPUs.")] = "h100",
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
        float | None, typer.Option(min=0, help="Price of a GPU-hour, in any currency.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Plan a run: what it needs of GPUs, networks and disks, and how long it takes.

    Without a DeepSpeed JSON the plan is for the fastest settings that fit, in bf16. With one it is
    for that file, and the fastest settings stand beside it. Each figure is counted, modelled or
    measured, and says so.

    Example: deberta plan deberta_v3_large --gpus 64 --gpu h100 --price-per-gpu-hour 2.5
    """
    from pipeline.config_loading import load_run_config
    from pipeline.ds_config import load_deepspeed_config
    from pipeline.plan.devices import Cluster, gpu_type
    from pipeline.plan.planning import (
        default_deepspeed,
        evaluate,
        fastest,
        other_backends,
        propose,
    )
    from pipeline.plan.report import alternative_lines, backend_lines, plan_lines

    cluster = Cluster.of(gpu_type(gpu), gpus, gpus_per_node, network_gbit)
    config = load_run_config(preset_or_toml, overrides or [])
    given = None
    if deepspeed_config is None:
        deepspeed = default_deepspeed(config)
    else:
        deepspeed = load_deepspeed_config(deepspeed_config)
        given = evaluate(config, deepspeed, cluster)
    alternatives = propose(config, deepspeed, cluster)
    proposal = fastest(alternatives)
    plan = given or proposal
    if as_json:
        typer.echo(json.dumps(_values(plan, proposal, alternatives, price_per_gpu_hour), indent=2))
        return
    lines = [] if plan is None else plan_lines(plan, price_per_gpu_hour)
    lines += alternative_lines(alternatives, proposal)
    if proposal is not None:
        lines += backend_lines(other_backends(proposal))
    typer.echo("\n".join(lines))


def _values(
    plan: "Plan | None",
    proposal: "Plan | None",
    alternatives: "list[Alternative]",
    price: float | None,
) -> dict[str, object]:
    from pipeline.plan.report import plan_values

    return {
        "plan": None if plan is None else plan_values(plan, price),
        "proposal": None if proposal is None else plan_values(proposal, price),
        "alternatives": [
            {
                "zero_stage": each.stage,
                "activation_checkpointing": each.checkpointing,
                "fits": None if each.best is None else plan_values(each.best, price),
                "does_not_fit": None
                if each.too_large is None
                else plan_values(each.too_large, price),
            }
            for each in alternatives
        ],
    }
