"""All looks at a node, in the order in which a person would want to read them."""

from pathlib import Path

from data_prep.errors import UserError
from pipeline.preflight.disk import look_at_clock, look_at_folder
from pipeline.preflight.finding import Finding
from pipeline.preflight.gpu import look_at_gpus
from pipeline.preflight.network import look_at_interfaces, look_at_loopback, look_at_peers
from pipeline.runtime import World, launcher_environment, node_name


def look_at_node(
    run: Path | None, scratch: Path | None, expected_gpus: int | None
) -> list[Finding]:
    """Look at everything on this node that training needs; a collective where srun started several.

    Args:
        run: The run folder, or the place where it will be made; the current folder where None.
        scratch: A fast disk; None for none.
        expected_gpus: How many GPUs there should be; None where nobody says.

    Returns:
        The findings; of other nodes, too, where rank 0 has waited for them in vain.
    """
    run, node = run or Path(), node_name()
    findings: list[Finding] = []
    variables = launcher_environment()
    if variables.get("DS_ACCELERATOR") == "cpu":
        findings.append(Finding(node, "gpu", True, "not used: DS_ACCELERATOR=cpu"))
    else:
        findings += look_at_gpus(node, expected_gpus)
    findings.append(look_at_folder(node, "run folder", run))
    if scratch is not None:
        findings.append(look_at_folder(node, "scratch", scratch))
    findings.append(look_at_clock(node, run))
    wrong = look_at_interfaces(node, variables)
    findings += wrong
    try:
        world = World.from_environment()
        variables = launcher_environment()
    except UserError as error:
        cure = "start one task a node: srun --ntasks-per-node=1 deberta doctor --node"
        return [*findings, Finding(node, "network", False, str(error), cure)]
    if world.world_size > 1:
        return [*findings, *look_at_peers(node, world, variables)]
    return findings if wrong else [*findings, look_at_loopback(node)]
