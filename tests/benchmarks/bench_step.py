"""The step's algorithm on a CPU: forward and backward of both networks on one masked micro batch.

Beside ours stand two peers made of transformers' layers (`step_variants`): what one writes first,
and the released code's algorithm. Shapes are a quarter of deberta_v3_large's. Masks are chosen and
the optimizer is left out on all sides. Losses and gradients of all sides, on the same weights and
draws, are compared in the same run. What a GPU does is measured by `gpu.py`.
"""

import torch

from pipeline.config_loading import load_run_config
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, main, measure
from tests.benchmarks.step_variants import Ours, TransformersPair, agreement, make_batch

ROUNDS = 6
SEQUENCES = 16
PEERS = {"naive": "transformers", "original": "released algorithm"}
QUARTER_OF_LARGE = [
    "data.sequence_length=128",
    "model.vocab_size=32_100",
    *(
        f"{network}.{key}"
        for network in ("generator", "discriminator")
        for key in (
            "hidden_size=256",
            "num_attention_heads=4",
            "intermediate_size=1024",
            "max_position_embeddings=128",
            "position_buckets=64",
            "hidden_dropout_prob=0.0",
            "attention_probs_dropout_prob=0.0",
        )
    ),
    "generator.num_hidden_layers=6",
    "discriminator.num_hidden_layers=12",
]


def benchmark(_device: str) -> Outcome:
    config = load_run_config("deberta_v3_large", QUARTER_OF_LARGE)
    batch = make_batch(config, SEQUENCES, torch.device("cpu"))
    ours = Ours(config)
    ours.pair.init_weights(0)
    peers = {name: TransformersPair(config, algorithm) for algorithm, name in PEERS.items()}
    facts = {
        f"{name}, relative difference of {what}": value
        for name, peer in peers.items()
        for what, value in agreement(ours, peer, batch).items()
    }

    def case(name, model):
        def prepare():
            model.zero_grad(set_to_none=True)

        return Case(name, lambda: model.train_on(batch, drops=False), prepare)

    cases = [case("ours", ours), *(case(name, peer) for name, peer in peers.items())]
    seconds, notes = measure(cases, ROUNDS, cpu_seconds)
    return Outcome(
        benchmark="step",
        unit="tokens",
        work=batch.tokens,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[("ours", name) for name in peers],
        shape={"words": QUARTER_OF_LARGE, "sequences": SEQUENCES, "dtype": "float32"},
        facts=facts,
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark, devices=("cpu",))
