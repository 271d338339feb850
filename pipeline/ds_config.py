"""The DeepSpeed JSON: how a run is computed (what is learned is in `pipeline.config`).

`load_deepspeed_config` reads one file and reports every problem in one message; names and types
are in `pipeline.ds_schema`, rules in `pipeline.ds_checks`. The dict goes to DeepSpeed as it was
written, plus `DeepSpeedConfig.overlay`: the few keys that the program owns. Nothing here imports
DeepSpeed or torch.
"""

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.config_files import read_json
from pipeline.ds_checks import Precision, enabled_precisions, findings
from pipeline.ds_schema import DeepSpeedJson
from pipeline.findings import raise_findings, show


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step's sequences are split; all four are counts of sequences or steps."""

    world_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    train_batch_size: int

    def explain(self, sequence_length: int) -> str:
        """Write the batch arithmetic in one line.

        Args:
            sequence_length: Tokens in a sequence.

        Returns:
            For example "8,192 sequences = 32 per rank x 4 accumulation x 64 ranks = 4,194,304
            tokens a step".
        """
        return (
            f"{self.train_batch_size:,} sequences = {self.train_micro_batch_size_per_gpu} per rank"
            f" x {self.gradient_accumulation_steps} accumulation x {self.world_size} ranks"
            f" = {self.train_batch_size * sequence_length:,} tokens a step"
        )


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A DeepSpeed JSON that passed all checks.

    Attributes:
        path: The file, for messages.
        raw: Its content, exactly as written; treat it as immutable.
        settings: The same, typed and with defaults.
    """

    path: str
    raw: dict[str, Any]
    settings: DeepSpeedJson

    @property
    def train_batch_size(self) -> int:
        """Sequences in one optimizer step, over all ranks."""
        return self.settings.train_batch_size

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward pass of one rank: train_micro_batch_size_per_gpu."""
        return self.settings.train_micro_batch_size_per_gpu

    @property
    def gradient_clipping(self) -> float:
        """Global gradient norm at which each network is clipped; 0 does not clip."""
        return self.settings.gradient_clipping

    @cached_property
    def precision(self) -> Precision:
        """The type of the weights: fp32, bf16, fp16, or autocast (fp32 weights, bf16 products)."""
        enabled = enabled_precisions(self.raw)
        return enabled[0] if enabled else "fp32"

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.settings.zero_optimization.stage

    @property
    def offload_optimizer(self) -> bool:
        """Whether optimizer state lies in CPU memory, which needs DeepSpeed's own CPU Adam."""
        block = self.settings.zero_optimization.offload_optimizer
        return block is not None and block.device == "cpu"

    def batch_plan(self, world_size: int) -> BatchPlan:
        """Derive the accumulation steps for a number of ranks.

        Args:
            world_size: Ranks: one for each GPU, or for each CPU process.

        Returns:
            The plan; its three factors multiply to train_batch_size.

        Raises:
            UserError: If they cannot, with the micro batches and world sizes that can.
        """
        per_pass = self.micro_batch * world_size
        if self.train_batch_size % per_pass == 0:
            steps = self.train_batch_size // per_pass
            return BatchPlan(world_size, self.micro_batch, steps, self.train_batch_size)
        message = (
            f"{self.path}: train_batch_size {self.train_batch_size} is not a multiple of"
            f" {self.micro_batch} per rank x {world_size} ranks = {per_pass}.\n"
        )
        if self.train_batch_size % world_size == 0:
            fitting = _divisors(self.train_batch_size // world_size)
            raise UserError(
                f"{message}Values of train_micro_batch_size_per_gpu that fit {world_size} ranks:"
                f" {', '.join(map(str, fitting))}."
            )
        below = max(n for n in _divisors(self.train_batch_size) if n < world_size)
        multiple = -(-self.train_batch_size // per_pass) * per_pass
        raise UserError(
            f"{message}No micro batch fits {world_size} ranks; use {below} ranks,"
            f" or train_batch_size {multiple}."
        )

    def overlay(self, plan: BatchPlan) -> dict[str, Any]:
        """Give the keys that the program sets itself, because no choice of theirs is the user's.

        Args:
            plan: The batch plan of this run's world size.

        Returns:
            Top-level keys to add to `raw`; none of them may be written in the file.
        """
        return {
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            # Our AdamW subclasses are not on DeepSpeed's list of optimizers tried with ZeRO.
            "zero_allow_untested_optimizer": True,
        }

    def engine_dict(self, plan: BatchPlan) -> dict[str, Any]:
        """Give what `deepspeed.initialize(config=...)` takes.

        Args:
            plan: The batch plan of this run's world size.

        Returns:
            A fresh deep copy of `raw` with the overlay applied.
        """
        return copy.deepcopy(self.raw) | self.overlay(plan)

    def explain(self, plan: BatchPlan, sequence_length: int) -> list[str]:
        """Write the lines of the startup banner that this file decides.

        Args:
            plan: The batch plan of this run's world size.
            sequence_length: Tokens in a sequence.

        Returns:
            One line each: batch, precision and sharding, clipping, overlay.
        """
        accumulation = self.settings.data_types
        added = f", gradients added in {accumulation.grad_accum_dtype}" if accumulation else ""
        place = ", optimizer state in CPU memory" if self.offload_optimizer else ""
        owned = ", ".join(f"{key}={show(value)}" for key, value in self.overlay(plan).items())
        return [
            f"batch: {plan.explain(sequence_length)}",
            f"precision: {self.precision}{added}; ZeRO stage {self.zero_stage}{place}",
            f"clipping: global norm {self.gradient_clipping:g}, of each optimizer by itself"
            if self.gradient_clipping
            else "clipping: none",
            f"DeepSpeed: {self.path}, plus {owned}",
        ]


def load_deepspeed_config(path: str | Path) -> DeepSpeedConfig:
    """Read and check a DeepSpeed JSON.

    Args:
        path: The file, or the `config.resolved.json` of an earlier run, which contains one.

    Returns:
        The checked configuration.

    Raises:
        UserError: With every problem of the file in one message.
    """
    document = read_json(path)
    if isinstance(document.get("deepspeed_config"), dict):
        return check_deepspeed_config(document["deepspeed_config"], f"{path}, deepspeed_config")
    if "run_config" in document or "generator" in document:
        raise UserError(f"{path} is a run configuration; pass it as --config")
    return check_deepspeed_config(document, str(path))


def check_deepspeed_config(document: dict[str, Any], name: str) -> DeepSpeedConfig:
    """Check a DeepSpeed configuration that is already a dict.

    Args:
        document: The JSON object.
        name: Where it came from, for messages.

    Returns:
        The checked configuration, which keeps a copy.

    Raises:
        UserError: With every problem in one message.
    """
    raise_findings(name, findings(document))
    raw = json.loads(json.dumps(document))
    return DeepSpeedConfig(name, raw, DeepSpeedJson.model_validate(raw))


def check_device(config: DeepSpeedConfig, device_type: str) -> None:
    """Refuse what the device cannot compute; call it once the device is known.

    Args:
        config: The checked DeepSpeed configuration.
        device_type: "cpu", "cuda", ... as in `torch.device.type`.

    Raises:
        UserError: If DeepSpeed 0.19.8 has no implementation for the device.
    """
    if device_type != "cpu":
        return
    problems = []
    if config.precision == "fp16":
        problems.append("fp16 needs a GPU; on a CPU use ds_configs/cpu_debug.json, or bf16")
    zero = config.settings.zero_optimization
    if zero.zero_quantized_weights or zero.zero_quantized_gradients:
        problems.append("zero_optimization.zero_quantized_* needs a GPU; remove it on a CPU")
    raise_findings(config.path, problems)


def combine_checks(run_config: RunConfig, config: DeepSpeedConfig) -> list[str]:
    """Compare the JSON with what the preset's source used.

    Args:
        run_config: Its `reference` section may name a batch and a clipping norm.
        config: The checked DeepSpeed configuration.

    Returns:
        One warning for each difference; the learning rates were chosen for the reference.
    """
    reference = run_config.reference
    pairs = {
        "train_batch_size": (config.train_batch_size, reference.train_batch_size),
        "gradient_clipping": (config.gradient_clipping, reference.gradient_clipping),
    }
    return [
        f"{config.path}: {key} is {ours}, the preset's source used {theirs};"
        " its learning rates and schedule were chosen for that"
        for key, (ours, theirs) in pairs.items()
        if theirs is not None and ours != theirs
    ]


def _divisors(number: int) -> list[int]:
    """All divisors in increasing order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
