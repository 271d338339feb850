"""Rates that somebody measured on a GPU: `measured.json`, package data beside this file.

    python -m pipeline.plan.measurements tests/benchmarks/results

collects them from the results of `make gpu PART=step`: the cells of our own variants, "ours,
BACKEND" and "ours, BACKEND, compiled layer". A plan takes a measured rate where network, GPU,
backend, compilation and length agree; all other speeds are modelled.
"""

import json
import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config
from pipeline.plan.devices import Gpu

FILE = "measured.json"
BENCHMARK = "gpu-step"
_VARIANT = re.compile(r"ours, (\w+)(, compiled layer)?")


class MeasuredStep(BaseModel):
    """One measured training step, forward and backward of all networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    """As the driver reports it."""
    hidden_size: int
    num_hidden_layers: int
    """Of the last network: the discriminator where there is one."""
    task: str
    sequence_length: int
    sequences: int
    """Of a micro batch."""
    attention_backend: str
    compile: str = "none"
    activation_checkpointing: str = "none"
    dropout: float
    tokens_per_second: float
    """Of one GPU."""
    beyond_state_bytes: int | None = None
    """Peak of tensors without weights, gradients and optimizer state."""
    source: str
    """File of the benchmark's results."""
    date: str


def measured_steps() -> list[MeasuredStep]:
    """Read the package's measurements.

    Returns:
        Rows; none where nobody has measured yet.
    """
    text = (resources.files("pipeline.plan") / FILE).read_text(encoding="utf-8")
    return TypeAdapter(list[MeasuredStep]).validate_json(text)


def find_measurement(
    rows: Sequence[MeasuredStep], config: RunConfig, gpu: Gpu, sequences: int, length: int
) -> MeasuredStep | None:
    """Find the measurement that is most like a step.

    Args:
        rows: Measurements.
        config: The run.
        gpu: GPU type.
        sequences: Micro batch of one GPU.
        length: Tokens in a sequence.

    Returns:
        Of those with the same network, GPU and settings the one with the nearest micro batch; None
        where there is none.
    """
    network, model = [*config.networks.values()][-1], config.model
    wanted = {
        "hidden_size": network.hidden_size,
        "num_hidden_layers": network.num_hidden_layers,
        "task": config.objective.task,
        "sequence_length": length,
        "attention_backend": model.attention_backend,
        "compile": model.compile,
        "activation_checkpointing": model.activation_checkpointing,
        "dropout": network.attention_probs_dropout_prob,
    }
    alike = [
        row
        for row in rows
        if row.device.startswith(gpu.name)
        and all(getattr(row, key) == value for key, value in wanted.items())
    ]
    return min(alike, key=lambda row: abs(row.sequences - sequences), default=None)


def collect(folder: Path) -> list[MeasuredStep]:
    """Collect the measurements of a folder of results.

    Args:
        folder: JSON files of benchmarks.

    Returns:
        One row for each file and variant of ours, in the order of files and cells.

    Raises:
        UserError: A file of measured steps is not as the benchmark writes it.
    """
    found: dict[tuple[str, str], MeasuredStep] = {}
    for path in sorted(folder.glob(f"{BENCHMARK}-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        try:
            if not document["device"].startswith("NVIDIA"):
                continue
            for name, cell in document["cells"].items():
                if cell["status"] != "measured":
                    continue
                # A cell of a peer has the rate of the variant that it is compared with.
                for variant, prefix in ((name, ""), (cell.get("against", ""), "ours_")):
                    if (row := _row(path.name, document, cell, variant, prefix)) is not None:
                        found.setdefault((path.name, variant), row)
        except (KeyError, TypeError, AttributeError, ValidationError) as error:
            raise UserError(
                f"{path}: not a result of {BENCHMARK} ({type(error).__name__}: {error}); measure"
                " it again"
            ) from error
    return [*found.values()]


def _row(
    file: str, document: dict[str, Any], cell: dict[str, Any], variant: str, prefix: str
) -> MeasuredStep | None:
    """One variant of ours in one cell; None for a peer."""
    match = _VARIANT.fullmatch(variant)
    if match is None:
        return None
    config, shape = load_run_config(f"deberta_v3_{document['size']}"), document["shape"]
    network = [*config.networks.values()][-1]
    beyond = cell.get(f"{prefix}beyond_state_gib")
    return MeasuredStep(
        device=document["device"],
        hidden_size=network.hidden_size,
        num_hidden_layers=network.num_hidden_layers,
        task=config.objective.task,
        sequence_length=shape["length"],
        sequences=shape["sequences"],
        attention_backend=match[1],
        compile="layer" if match[2] else "none",
        dropout=shape["dropout"],
        tokens_per_second=cell[f"{prefix}tokens_per_second"],
        beyond_state_bytes=None if beyond is None else round(beyond * 2**30),
        source=file,
        date=cell["date"],
    )


def main(arguments: Sequence[str]) -> None:
    """Write the package's measurements.

    Args:
        arguments: The folder of results.
    """
    (folder,) = arguments
    rows = [row.model_dump() for row in collect(Path(folder))]
    target = Path(__file__).parent / FILE
    target.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{target}: {len(rows)} measured steps")


if __name__ == "__main__":
    main(sys.argv[1:])
