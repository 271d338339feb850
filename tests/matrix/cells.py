"""The cells of the matrix: every way to compute one run, and what the program says to each.

    ZeRO stage x precision x accumulation x activation checkpointing x offload x ranks x update

    every_cell      all 1,152 of them
    Cell.document   the DeepSpeed JSON that a user would write for it
    Cell.refusal    what the program's own checks answer to that JSON; None where it trains

The JSON has the options of the shipped `ds_configs/`, with buckets and thresholds so small that
small networks fill several buckets and ZeRO-3 gathers their matrices one by one.
"""

from dataclasses import asdict, dataclass, fields
from itertools import product

from data_prep.errors import UserError
from pipeline.ds_config import DeepSpeedConfig, check_deepspeed_config, check_device

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16", "autocast", "fp16")
ACCUMULATIONS = (1, 4)
RECOMPUTATIONS = ("none", "full")
OFFLOADS = ("none", "optimizer", "optimizer+parameters")
RANKS = (1, 2, 4)
UPDATES = ("decoupled", "joint")
AXES = {
    "stage": STAGES,
    "precision": PRECISIONS,
    "accumulation": ACCUMULATIONS,
    "recomputation": RECOMPUTATIONS,
    "offload": OFFLOADS,
    "ranks": RANKS,
    "update": UPDATES,
}

TRAIN_BATCH_SIZE = 16
CLIPPING = 10.0
"""The generator's norm is always below it, the others' always above: both sides of clipping."""
FIRST_SCALE_POWER, SCALE_WINDOW_STEPS = 4, 3
"""fp16's loss scale doubles several times in 20 steps and comes nowhere near an overflow, whose
moment would depend on rounding; a reference step that is made infinite is skipped instead."""
_PRECISION_BLOCKS = {
    "fp32": {"bf16": {"enabled": False}},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "fp16": {
        "fp16": {
            "enabled": True,
            "initial_scale_power": FIRST_SCALE_POWER,
            "loss_scale_window": SCALE_WINDOW_STEPS,
            "hysteresis": 2,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}
_ZERO_BLOCKS = {
    0: {},
    1: {"reduce_bucket_size": 8000, "allgather_bucket_size": 8000},
    2: {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 8000,
        "allgather_bucket_size": 8000,
    },
    3: {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 8000,
        "sub_group_size": 10_000,
        "stage3_prefetch_bucket_size": 2000,
        "stage3_param_persistence_threshold": 700,
    },
}


@dataclass(frozen=True)
class Cell:
    """One way to compute the run."""

    stage: int
    precision: str
    accumulation: int
    recomputation: str
    offload: str
    ranks: int
    update: str

    def __str__(self):
        return (
            f"stage {self.stage} {self.precision} accumulation {self.accumulation} recomputation"
            f" {self.recomputation} offload {self.offload} ranks {self.ranks} {self.update}"
        )

    @property
    def micro_batch(self):
        """Sequences in one forward pass of one rank."""
        return TRAIN_BATCH_SIZE // (self.ranks * self.accumulation)

    def document(self):
        """The DeepSpeed JSON."""
        zero = {"stage": self.stage, **_ZERO_BLOCKS[self.stage]}
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
            zero["round_robin_gradients"] = self.stage == 2
        if self.offload == "optimizer+parameters":
            zero["offload_param"] = {"device": "cpu", "pin_memory": False}
        return {
            "train_batch_size": TRAIN_BATCH_SIZE,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_clipping": CLIPPING,
            **_PRECISION_BLOCKS[self.precision],
            "zero_optimization": zero,
        }

    def deepspeed_config(self) -> DeepSpeedConfig:
        """The checked JSON; a UserError where the program refuses it on any device."""
        return check_deepspeed_config(self.document(), "deepspeed.json")

    def refusal(self, device_type="cpu"):
        """What the program's checks say against this cell, None if nothing."""
        try:
            check_device(self.deepspeed_config(), device_type)
        except UserError as error:
            return str(error)
        return None

    def is_patched(self):
        """Whether only the CPU stands against it: then it is trained under a test's patch."""
        return self.refusal() is not None and self.refusal("cuda") is None

    def trains(self):
        """Whether it is trained here at all."""
        return self.refusal("cuda") is None

    def to_json(self):
        """All axes by name."""
        return asdict(self)


def every_cell() -> list[Cell]:
    """The full product, cells of the same world together."""
    assert tuple(AXES) == tuple(field.name for field in fields(Cell))
    cells = [Cell(*values) for values in product(*AXES.values())]
    return sorted(cells, key=lambda cell: cell.ranks)
