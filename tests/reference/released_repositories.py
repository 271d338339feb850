"""Tiny repositories in the released layout, of transformers' own models with random weights.

`Release` holds the truth: what the weights of both networks are, whatever files say it. `write`
puts it into files in one of the forms that are in circulation.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DebertaV2ForMaskedLM, DebertaV2Model

from tests.reference.small_networks import scramble
from tests.reference.transformers_encoder import transformers_config

TABLE = "deberta.embeddings.word_embeddings.weight"
DELTA = "deberta.embeddings.word_embeddings._weight"
POSITIONS = "deberta.embeddings.position_embeddings.weight"


def encoder(network, vocab_size, weights, dtype):
    """transformers' encoder with the weights of one of our networks."""
    built = DebertaV2Model(transformers_config(network, vocab_size)).to(dtype).eval()
    mine = {
        key.removeprefix("deberta."): tensor.to(dtype)
        for key, tensor in weights.items()
        if key.startswith("deberta.")
        and (network.position_biased_input or "position_embeddings" not in key)
    }
    built.load_state_dict(mine)
    return built


def masked_lm(network, vocab_size, legacy, seed=1):
    """transformers' masked language model with random weights, its head tied."""
    config = transformers_config(network, vocab_size, legacy=legacy)
    built = scramble(DebertaV2ForMaskedLM(config), seed, scale=0.2)
    built.deberta.embeddings.word_embeddings.weight.data.mul_(0.25)
    return built.eval()


def _random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


@dataclass
class Release:
    """A discriminator and a generator, names without any oddity."""

    config: object
    """Our RunConfig, whose sections describe the networks."""
    dtype: torch.dtype = torch.float32
    """How the weights are stored; their values are rounded to it."""
    generator: dict = field(default_factory=dict)
    discriminator: dict = field(default_factory=dict)
    delta: torch.Tensor | None = None

    def __post_init__(self):
        vocab_size, network = self.config.model.vocab_size, self.config.discriminator
        model = masked_lm(self.config.generator, vocab_size, legacy=False, seed=1)
        self.generator = {k: t.detach().clone() for k, t in model.state_dict().items()}
        longest, width = self.config.generator.max_position_embeddings, network.hidden_size
        self.generator[POSITIONS] = _random(3, longest, width)
        body = scramble(DebertaV2Model(transformers_config(network, vocab_size)), 2, scale=0.2)
        self.discriminator = {f"deberta.{k}": t.clone() for k, t in body.state_dict().items()}
        shapes = {"LayerNorm.weight": (width,), "LayerNorm.bias": (width,)}
        shapes |= {"dense.weight": (width, width), "dense.bias": (width,)}
        shapes |= {"classifier.weight": (1, width), "classifier.bias": (1,)}
        for seed, (key, shape) in enumerate(shapes.items(), start=10):
            self.discriminator[f"mask_predictions.{key}"] = _random(seed, *shape)
        self.delta = (_random(4, vocab_size, width) * 0.05).to(self.dtype)
        self.generator = {k: t.to(self.dtype).float() for k, t in self.generator.items()}
        self.discriminator[TABLE] = self.generator[TABLE] + self.delta.float()
        self.discriminator = {k: t.to(self.dtype).float() for k, t in self.discriminator.items()}

    def table(self, dtype, *, from_delta):
        """E_D: as stored, or E_G + Delta."""
        if from_delta:
            return self.generator[TABLE].to(dtype) + self.delta.to(dtype)
        return self.discriminator[TABLE].to(dtype)

    def write(
        self,
        folder: Path,
        *,
        main="model.safetensors",
        generator=None,
        prefix="deberta.",
        with_delta=False,
        **changes,
    ) -> Path:
        """Write a repository; `changes` are for its config.json."""
        vocab_size = self.config.model.vocab_size
        stored = dict(self.discriminator)
        if with_delta:
            # As the released code leaves it: merged before the last update.
            stored[TABLE] = stored[TABLE] - 1e-4 * _random(5, *stored[TABLE].shape).sign()
            stored[DELTA] = self.delta.clone()
            stored[POSITIONS] = self.generator[POSITIONS].clone()
        # Released discriminators hold a head that no discriminator has.
        extra = {k: t for k, t in self.generator.items() if k.startswith("lm_predictions.")}
        write_config(folder, self.config.discriminator, vocab_size, **changes)
        self._save({**stored, **extra}, folder / main, prefix)
        if generator is not None:
            place = folder / generator
            name = "config.json" if place.parent != folder else "generator_config.json"
            write_config(place.parent, self.config.generator, vocab_size, name=name)
            self._save({**self.generator, "mask_predictions.dense.bias": extra[min(extra)]}, place)
        return folder

    def _save(self, weights, file, prefix="deberta."):
        renamed = {k.replace("deberta.", prefix, 1): t.to(self.dtype) for k, t in weights.items()}
        save(renamed, file)


def write_config(folder, network, vocab_size, name="config.json", **changes):
    """Write what `save_pretrained` writes, with the spelling of released files."""
    folder.mkdir(parents=True, exist_ok=True)
    values = transformers_config(network, vocab_size).to_dict()
    values |= {"pos_att_type": "p2c|c2p", **changes}
    (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def save(weights, file):
    """Save tensors in the form that the file's name says."""
    weights = {key: tensor.contiguous().clone() for key, tensor in weights.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".bin":
        torch.save(weights, file)
    elif file.suffix == ".safetensors":
        save_file(weights, file, metadata={"format": "pt"})
    else:  # an index of shards
        form = "safetensors" if ".safetensors" in file.name else "bin"
        keys, places = sorted(weights), {}
        for number in range(3):
            shard = file.parent / f"{file.name.split('.')[0]}-{number + 1:05d}-of-00003.{form}"
            save({key: weights[key] for key in keys[number::3]}, shard)
            places |= dict.fromkeys(keys[number::3], shard.name)
        file.write_text(json.dumps({"metadata": {}, "weight_map": places}))
