"""Small networks with weights that no symmetry hides behind, and padded batches."""

from dataclasses import dataclass

import torch

from pipeline.config import ModelSection, NetworkSection, ObjectiveSection
from pipeline.modeling.networks import Discriminator, Generator
from pipeline.rtd import DrawKey

VOCABULARY = 61  # not a multiple of 4, so that the last chunk of ids is ragged
MASK_ID = 60


def network_section(layers=3, **changes):
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
        "position_buckets": 8,
        "layer_norm_eps": 1e-3,  # large enough to be seen
    }
    return NetworkSection(**{**sizes, **changes})


def model_section(**changes):
    return ModelSection(**{"vocab_size": VOCABULARY, **changes})


def scramble(module, seed, scale=0.3):
    """Give every parameter, biases, LayerNorms and Delta included, random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * scale
        if name.endswith("LayerNorm.weight"):
            values = values + 1.0
        parameter.data.copy_(values)
    return module


def generator(dtype=torch.float32, layers=3, seed=1, model=None, objective=None, **changes):
    objective = objective or ObjectiveSection()
    network = Generator(network_section(layers, **changes), model or model_section(), objective)
    return scramble(network, seed).to(dtype)


def discriminator(dtype=torch.float32, layers=3, seed=2, model=None, objective=None, **changes):
    objective = objective or ObjectiveSection()
    network = Discriminator(network_section(layers, **changes), model or model_section(), objective)
    return scramble(network, seed).to(dtype)


@dataclass
class Batch:
    """Three padded sequences with masked slots; the second has a slot fewer than the others."""

    ids: torch.Tensor
    masked_ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    targets: torch.Tensor
    draw: DrawKey

    def generator_arguments(self, dropout=None):
        return (
            self.masked_ids,
            self.mask,
            self.positions,
            self.valid,
            self.targets,
            self.draw,
            dropout,
        )


def batch(length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, MASK_ID, (3, length), generator=generator)
    lengths = torch.tensor([length, length - 7, length - 2])
    mask = torch.arange(length) < lengths[:, None]
    ids[~mask] = 0
    positions = torch.tensor([[1, 5, length - 2], [2, 9, 0], [3, 4, 10]])
    valid = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    masked = ids.clone()
    for row in range(3):
        masked[row, positions[row][valid[row]]] = MASK_ID
    samples = torch.tensor([[0, 7], [0, 8], [1, 2**31]])
    return Batch(
        ids,
        masked,
        mask,
        positions,
        valid,
        ids.gather(1, positions),
        DrawKey((11, 12), samples, temperature=0.8),
    )


def leaves(module):
    """State dict of a network as independent leaves, for the plain reference."""
    return {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in module.state_dict().items()
    }
