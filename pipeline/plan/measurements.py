"""Rates that somebody measured on a GPU: `measured.json`, package data beside this file.

    python -m pipeline.plan.measurements tests/benchmarks/results

collects them from the results of `make gpu PART=step`: the cells of our own variants, "ours,
BACKEND" and "ours, BACKEND, compiled layer". A plan takes a measured rate where networks, GPU,
precision, backend, compilation and length agree; all other speeds are modelled. `deviations` holds
the model against every measured point.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config, preset_names
from pipeline.flops import training_flops_per_token
from pipeline.plan.devices import GPUS, Gpu
from pipeline.plan.memory import computing_bytes
from pipeline.plan.speed import micro_step_seconds

FILE = Path(__file__).with_name("measured.json")
BENCHMARK = "gpu-step"
_BF16_BYTES = 2
PRECISION = "bf16"
"""That of all measurements."""
_VARIANT = re.compile(r"ours, (\w+)(, compiled layer)?")


class MeasuredStep(BaseModel):
    """One measured training step, forward and backward of all networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    """As the driver reports it."""
    preset: str
    flops_per_token: float
    """Of its networks and objective at this length; tells them from all others."""
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

    @property
    def seconds(self) -> float:
        """Of a micro batch, forward and backward."""
        return self.sequences * self.sequence_length / self.tokens_per_second

    @property
    def config(self) -> RunConfig:
        """The run that was measured."""
        words = [
            f"model.{key}={getattr(self, key)}"
            for key in ("attention_backend", "compile", "activation_checkpointing")
        ]
        words.append(f"data.sequence_length={self.sequence_length}")
        return load_run_config(self.preset, words)


def measured_steps() -> list[MeasuredStep]:
    """Read the package's measurements.

    Returns:
        Rows; none where nobody has measured yet.
    """
    text = FILE.read_text(encoding="utf-8")
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
    flops = training_flops_per_token(config, length)
    wanted = {
        "sequence_length": length,
        "attention_backend": model.attention_backend,
        "compile": model.compile,
        "activation_checkpointing": model.activation_checkpointing,
        "dropout": network.attention_probs_dropout_prob,
    }
    alike = [
        row
        for row in rows
        if gpu.is_type_of(row.device)
        and math.isclose(row.flops_per_token, flops, rel_tol=1e-9)
        and all(getattr(row, key) == value for key, value in wanted.items())
    ]
    return min(alike, key=lambda row: abs(row.sequences - sequences), default=None)


@dataclass(frozen=True)
class Deviation:
    """One measured point and what the model says there."""

    row: MeasuredStep
    tokens_per_second: float
    """Modelled."""
    beyond_state_bytes: int
    """Modelled: activations and workspaces of the network that needs more."""

    @property
    def speed_ratio(self) -> float:
        """Measured by modelled."""
        return self.row.tokens_per_second / self.tokens_per_second

    @property
    def memory_ratio(self) -> float | None:
        """Measured by modelled; None where memory was not measured."""
        beyond = self.row.beyond_state_bytes
        return None if beyond is None else beyond / self.beyond_state_bytes


def deviations(rows: Sequence[MeasuredStep]) -> list[Deviation]:
    """Hold the model against measured points.

    Args:
        rows: Measurements.

    Returns:
        One for each row whose GPU is known.
    """
    found = []
    for row in rows:
        gpu = _type_of(row.device)
        if gpu is None:
            continue
        config, length = row.config, row.sequence_length
        seconds = micro_step_seconds(
            config, gpu, PRECISION, micro_batch=row.sequences, length=length
        )
        parts = computing_bytes(config, _BF16_BYTES, row.sequences, length).values()
        rate = row.sequences * length / seconds
        found.append(Deviation(row, rate, max(sum(each.values()) for each in parts)))
    return found


def _type_of(device: str) -> Gpu | None:
    """The type of a device; None for one that is not planned for."""
    return next((gpu for gpu in GPUS if gpu.is_type_of(device)), None)


def collect(folder: Path) -> list[MeasuredStep]:
    """Collect the measurements of a folder of results.

    Args:
        folder: JSON files of benchmarks.

    Returns:
        One row for each file and variant of ours, in the order of files and cells; those in bf16
        on GPUs that can be planned for.

    Raises:
        UserError: A file of measured steps is not as the benchmark writes it.
    """
    found: dict[tuple[str, str], MeasuredStep] = {}
    for path in sorted(folder.glob(f"{BENCHMARK}-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        try:
            if f"deberta_v3_{document['size']}" not in preset_names():
                continue  # "tiny", which tries the benchmark
            if document["shape"]["dtype"] != "bfloat16" or _type_of(document["device"]) is None:
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
    preset, shape = f"deberta_v3_{document['size']}", document["shape"]
    beyond = cell.get(f"{prefix}beyond_state_gib")
    return MeasuredStep(
        device=document["device"],
        preset=preset,
        flops_per_token=training_flops_per_token(load_run_config(preset), shape["length"]),
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
        arguments: The folder of results, and another file to write than the package's.
    """
    folder, *other = arguments
    rows = [row.model_dump() for row in collect(Path(folder))]
    target = Path(*other) if other else FILE
    target.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{target}: {len(rows)} measured steps")


if __name__ == "__main__":
    main(sys.argv[1:])
