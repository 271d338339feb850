"""The cells of the training step: ours against every peer, both networks, forward and backward.

The first of our variants is the anchor that every other one is measured against. Before the timing,
without dropout and on the anchor's weights and draws, losses and gradients are compared.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config
from pipeline.flops import peak_flops, training_flops_per_token
from tests.benchmarks.attention_variants import (
    DISENTANGLED_FLASH,
    FLASHDEBERTA,
    disentangled_flash_class,
    our_backends,
)
from tests.benchmarks.gpu_results import Cell
from tests.benchmarks.rounds import device_name
from tests.benchmarks.step_variants import Batch, Ours, TransformersPair, agreement, make_batch

if TYPE_CHECKING:
    from tests.benchmarks.gpu_bench import Bench
    from tests.benchmarks.gpu_results import ResultFile

SEQUENCES = {"large": 16, "base": 32, "xsmall": 32, "tiny": 2}
WITH_ADAMW = "ours, with fused AdamW"
TINY = [
    "data.sequence_length=32",
    "model.vocab_size=500",
    *(
        f"{network}.{key}"
        for network in ("generator", "discriminator")
        for key in (
            "hidden_size=64",
            "num_attention_heads=2",
            "intermediate_size=128",
            "num_hidden_layers=2",
            "position_buckets=16",
        )
    ),
]
Train = Callable[[], object]


class MasterAdamW:
    """Fused AdamW on fp32 copies of low precision weights, as engines do it."""

    def __init__(self, module: nn.Module) -> None:
        self._weights = [p for p in module.parameters() if p.requires_grad]
        self._masters = [p.detach().float().clone().requires_grad_() for p in self._weights]
        on_gpu = self._weights[0].is_cuda
        self._adamw = torch.optim.AdamW(self._masters, lr=1e-6, fused=on_gpu)

    @property
    def state_bytes(self) -> int:
        """Masters, their gradients and both averages."""
        return sum(4 * 4 * each.numel() for each in self._masters)

    @torch.no_grad()
    def step(self) -> None:
        """Copy gradients up, step, copy weights down."""
        pairs = [(m, w) for m, w in zip(self._masters, self._weights, strict=True)]
        for master, weight in pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
        self._adamw.step()
        torch._foreach_copy_([w for _, w in pairs], [m for m, _ in pairs])


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Give every matrix random values on its own device: the host would take half a minute."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)


def load_config(size: str, *words: str) -> RunConfig:
    """The preset of a size."""
    if size == "tiny":
        return load_run_config("deberta_v3_xsmall", [*TINY, *words])
    return load_run_config(f"deberta_v3_{size}", list(words))


def our_config(size: str, backend: str, compiles: bool) -> RunConfig:
    """A preset with one of our backends."""
    config = load_config(size)
    words = {"attention_backend": backend, "compile": "layer" if compiles else "none"}
    model = config.model.model_copy(update=words)
    return config.model_copy(update={"model": model})


def build(kind: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A model on the device, its weights random."""
    with device:
        model = kind()
    fill(model)
    return model.to(dtype)


def their_pair(name: str, config: RunConfig, device: torch.device) -> TransformersPair:
    """A peer made of transformers' layers."""
    algorithm = {"transformers": "naive", "released algorithm": "original"}.get(name, "masked")
    pair = TransformersPair(config, algorithm)
    if name.endswith(DISENTANGLED_FLASH):
        from disentangled_flash import enable_deberta_training

        backend = "triton" if device.type == "cuda" else "torch"
        for model in (pair.generator, pair.discriminator):
            enable_deberta_training(model, backend=backend, assume_unpadded=True)
            attention = model.encoder.layer[0].attention.self
            assert isinstance(attention, disentangled_flash_class(device)), "it kept the original"
    elif name.endswith(FLASHDEBERTA):
        from flashdeberta import FlashDisentangledSelfAttention

        for model in (pair.generator, pair.discriminator):
            for layer in model.encoder.layer:
                layer.attention.self.__class__ = FlashDisentangledSelfAttention
    elif "compiled" in name:
        pair.compile_layers()
    return pair


class StepCells:
    """Measures variants of the step against the anchor, which is built once."""

    def __init__(self, size: str, bench: "Bench", dtype: torch.dtype) -> None:
        self.size, self.bench, self.dtype = size, bench, dtype
        self.config = load_config(size)
        self.batch: Batch = make_batch(self.config, SEQUENCES[size], bench.device)
        first = our_backends(bench.device)[0]
        self.anchor_name = f"ours, {first}, compiled layer"
        self._anchor_config = our_config(size, first, compiles=True)
        self._anchor: Ours | None = None
        flops = training_flops_per_token(self.config)
        peak = peak_flops(device_name(bench.device.type))
        self._mfu = flops / peak if peak else None

    @property
    def anchor(self) -> Ours:
        """Our fastest variant."""
        if self._anchor is None:
            self._anchor = build(lambda: Ours(self._anchor_config), self.bench.device, self.dtype)
        return self._anchor

    def trains(self, model: Any) -> Train:
        """Forward and backward, gradients from before forgotten."""

        def run() -> None:
            model.zero_grad(set_to_none=True)
            model.train_on(self.batch, drops=True)

        return run

    def memory(self, name: str, model: nn.Module, run: Train, more_bytes: int = 0) -> dict:
        """Peak with and without weights, gradients and optimizer state."""
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        beyond = self.bench.peak_bytes(run)
        if beyond is None:
            return {}
        state = sum(2 * p.numel() * p.element_size() for p in model.parameters()) + more_bytes
        return {
            f"{name}peak_gib": (beyond + state) / 2**30,
            f"{name}beyond_state_gib": beyond / 2**30,
        }

    def rates(self, compared: dict[str, float]) -> dict[str, Any]:
        """Tokens a second and MFU of both sides."""
        figures: dict[str, Any] = {"against": self.anchor_name, "ratio": compared["ratio"]}
        for prefix, side in (("", "peer"), ("ours_", "ours")):
            figures[f"{prefix}tokens_per_second"] = self.batch.tokens / compared[side]
            if self._mfu:
                figures[f"{prefix}mfu"] = figures[f"{prefix}tokens_per_second"] * self._mfu
        return figures

    def compare(self, make: Callable[[], nn.Module]) -> dict[str, Any]:
        """Build a variant, compare its numbers, then its speed and memory, with the anchor's."""
        self.bench.clean()
        model = build(make, self.bench.device, self.dtype)
        differences = agreement(self.anchor, model, self.batch)
        figures = self.rates(self.bench.compare(self.trains(self.anchor), self.trains(model)))
        for prefix, each in (("", model), ("ours_", self.anchor)):
            run = lambda m=each: m.train_on(self.batch, drops=True)  # noqa: E731
            figures |= self.memory(prefix, each, run)
            each.zero_grad(set_to_none=True)
        return {**figures, "differences": differences}

    def with_adamw(self) -> dict[str, Any]:
        """The anchor's step with the update of each network where training has it."""
        self.bench.clean()
        model, pair = self.anchor, self.anchor.pair
        optimizers = [MasterAdamW(each) for each in (pair.generator, pair.discriminator)]

        def run() -> None:
            model.between = optimizers[0].step
            model.train_on(self.batch, drops=True)
            optimizers[1].step()
            model.between = lambda: None

        def train() -> None:
            model.zero_grad(set_to_none=True)
            run()

        figures = self.rates(self.bench.compare(self.trains(model), train))
        figures |= self.memory("", model, run, sum(each.state_bytes for each in optimizers))
        model.zero_grad(set_to_none=True)
        return figures


def cells(size: str, bench: "Bench", dtype: torch.dtype, results: "ResultFile") -> list[Cell]:
    """The cells of a size, the most valuable first."""
    steps = StepCells(size, bench, dtype)
    words = {"sequences": SEQUENCES[size], "length": steps.config.data.sequence_length}
    results.document["shape"] |= words

    def peer(name: str) -> Cell:
        make = lambda: their_pair(name, steps.config, bench.device)  # noqa: E731
        return Cell(name, lambda: steps.compare(make))

    def ours(backend: str, compiles: bool) -> Cell:
        config = our_config(size, backend, compiles)
        name = f"ours, {backend}{', compiled layer' if compiles else ''}"
        return Cell(name, lambda: steps.compare(lambda: Ours(config)))

    backends = our_backends(bench.device)
    return [
        peer("transformers"),
        peer("transformers, compiled, masked logits"),
        peer(f"transformers, masked logits, {DISENTANGLED_FLASH}"),
        Cell(WITH_ADAMW, steps.with_adamw),
        *(ours(backend, True) for backend in backends[1:2]),
        peer("released algorithm"),
        *(ours(backend, False) for backend in backends),
        peer("transformers, masked logits"),
        peer(f"transformers, masked logits, {FLASHDEBERTA}"),
    ]
