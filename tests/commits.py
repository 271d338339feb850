"""A run folder written by hand, in the documented layout, with weights that hide nothing.

Trained weights of a tiny run are close to their start: Delta is small, biases are zero, LayerNorms
are ones. Here everything is random, so that a tensor left out or put elsewhere shows.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_prep.shards import Dataset
from pipeline.config import RunConfig
from pipeline.modeling.pair import NetworkPair
from tests.reference.small_networks import scramble

NETWORK = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "position_buckets": 12,
    "layer_norm_eps": 1e-3,  # large enough to be seen
}


def run_config(dataset: Path, run_folder: Path, **sections: dict) -> RunConfig:
    """A run whose networks differ in depth; `sections` replace or add whole sections."""
    return RunConfig.model_validate(
        {
            "run": {"folder": str(run_folder), "seed": 5},
            "data": {"path": str(dataset), "sequence_length": 40},
            "model": {"vocab_size": Dataset.open(dataset).manifest.vocab_size},
            "generator": NETWORK,
            "discriminator": {**NETWORK, "num_hidden_layers": 3},
            "optimizer": {"generator_learning_rate": 1e-3},
            "schedule": {"max_steps": 100, "warmup_steps": 10},
            "evaluation": {"max_sequences": 8},
            **sections,
        }
    )


def random_pair(config: RunConfig, seed: int) -> NetworkPair:
    """Networks with all their weights random."""
    pair = NetworkPair(config)
    scramble(pair.generator, seed)
    if pair.discriminator is not None:
        scramble(pair.discriminator, seed + 1)
    return pair.eval()


def write_commit(config: RunConfig, step: int, pair: NetworkPair | None = None) -> Path:
    """Write a commit of two ranks into the run's folder."""
    commit = Path(config.run.folder) / "checkpoints" / f"step-{step:08d}"
    for folder_name, network in (pair or random_pair(config, step)).trained_modules().items():
        folder = commit / folder_name
        folder.mkdir(parents=True)
        for rank in range(2):
            starts, tensors = {}, {}
            for name, parameter in network.named_parameters():
                flat = parameter.detach().flatten()
                middle = flat.numel() // 3
                part = flat[:middle] if rank == 0 else flat[middle:]
                starts[name] = rank * middle
                for kind in ("weight", "exp_avg", "exp_avg_sq"):
                    tensors[f"{kind}/{name}"] = part.clone() * (1.0 if kind == "weight" else 0.0)
            save_file(
                tensors,
                folder / f"rank-{rank:05d}.safetensors",
                metadata={"starts": json.dumps(starts)},
            )
    dataset = Dataset.open(config.data.path)
    identity = {
        "dataset_fingerprint": dataset.fingerprint,
        "tokenizer_fingerprint": dataset.manifest.tokenizer_fingerprint,
        "world_size": 2,
        "environment": {"torch": "0.0-test", "python": "3.0-test", "host": "secret-host"},
    }
    resolved = {
        "format": 1,
        "run_config": config.model_dump(mode="json"),
        "deepspeed_config": {},
        "batch": {"train_micro_batch_size_per_gpu": 4, "tokens_per_step": 320},
    }
    state = {"state": {"step": step}, "identity": identity, "tokens": step * 320}
    (commit / "train_state.json").write_text(json.dumps(state))
    (commit / "config.resolved.json").write_text(json.dumps(resolved))
    _seal(commit, step)
    return commit


def _seal(commit: Path, step: int) -> None:
    files = {
        str(path.relative_to(commit)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in commit.rglob("*")
        if path.is_file()
    }
    manifest = {"format_version": 1, "step": step, "world_size": 2, "files": files}
    (commit / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((commit / "manifest.json").read_bytes()).hexdigest()
    (commit / "manifest.sha256").write_text(digest + "\n")


def flip_a_byte(path: Path) -> None:
    """Damage a file in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def padded_ids(vocab_size: int, length: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences of ids and their mask: bool, False at padding."""
    ids = torch.randint(4, vocab_size, (3, length), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(length) < torch.tensor([[length], [length - 11], [3]])
    return ids * mask, mask
