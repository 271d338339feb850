"""One encoder layer, forward and backward: our two backends and transformers' layer.

Beside the time stand the bytes that every operation reads and writes at the shape of large, counted
on meta tensors: they are exact, and on a GPU they are what the time is made of. A processor's
caches hide them, so its times say little about attention.
"""

import torch
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Layer

from pipeline.config import ModelSection, NetworkSection
from pipeline.modeling.layer import EncoderLayer, LayerContext
from pipeline.modeling.relative_positions import relative_positions
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, device_seconds, main, measure
from tests.numerics.test_attention_traffic import our_traffic, transformers_traffic
from tests.reference.transformers_encoder import transformers_config

SHAPES = {
    "cpu": {"sequences": 4, "length": 256, "hidden": 512, "heads": 8, "dtype": "float32"},
    "cuda": {"sequences": 16, "length": 512, "hidden": 1024, "heads": 16, "dtype": "bfloat16"},
}
ROUNDS = {"cpu": 7, "cuda": 20}
LAYERS_A_ROUND = {"cpu": 2, "cuda": 10}
THEIRS = "transformers layer"


def networks(shape: dict) -> tuple[NetworkSection, DebertaV2Config]:
    """The same layer in both vocabularies, without dropout."""
    section = NetworkSection(
        hidden_size=shape["hidden"],
        num_hidden_layers=1,
        num_attention_heads=shape["heads"],
        intermediate_size=4 * shape["hidden"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return section, transformers_config(section, vocab_size=128_100)


def benchmark(device_name: str) -> Outcome:
    shape, device = SHAPES[device_name], torch.device(device_name)
    dtype, length = getattr(torch, shape["dtype"]), shape["length"]
    section, config = networks(shape)
    states = torch.randn(shape["sequences"], length, shape["hidden"], device=device, dtype=dtype)
    table = torch.randn(2 * section.position_buckets, shape["hidden"], device=device, dtype=dtype)
    states.requires_grad_()
    table.requires_grad_()
    relative = relative_positions(length, section.position_buckets, 512, device)
    context = LayerContext(relative, table, None, None)
    theirs = DebertaV2Layer(config).to(device, dtype)
    # transformers wants the whole mask and the positions as the encoder would have made them.
    mask = torch.ones(shape["sequences"], 1, length, length, device=device)
    pairs = relative.index() - section.position_buckets

    def train(forward):
        for _ in range(LAYERS_A_ROUND[device_name]):
            forward().sum().backward()

    def ours(backend):
        layer = EncoderLayer(section, ModelSection(attention_backend=backend)).to(device, dtype)
        return lambda: train(lambda: layer(states, context, 0))

    def transformers():
        train(lambda: theirs(states, mask, relative_pos=pairs, rel_embeddings=table)[0])

    cases = [Case(name, ours(name)) for name in ("torch", "eager")] + [Case(THEIRS, transformers)]
    clock = device_seconds if device_name == "cuda" else cpu_seconds
    seconds, notes = measure(cases, ROUNDS[device_name], clock)
    traffic = {"torch": our_traffic("torch"), "eager": our_traffic("eager")}
    traffic[THEIRS] = transformers_traffic()
    return Outcome(
        benchmark="attention",
        unit="tokens",
        work=shape["sequences"] * length * LAYERS_A_ROUND[device_name],
        clock="seconds" if device_name == "cuda" else "CPU-seconds",
        seconds=seconds,
        pairs=[("torch", THEIRS), ("torch", "eager")],
        shape={**shape, "dropout": 0.0},
        facts={
            **{f"KiB a token at large's shape, {name}": kib for name, kib in traffic.items()},
            "bytes of transformers layer / torch": traffic[THEIRS] / traffic["torch"],
        },
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark)
