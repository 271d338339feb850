"""Where a run's weights come from: its seed, or a commit.

new_pair            initial weights as functions of the seed
load_commit_pair    the fp32 weights of a commit, whatever world wrote it
"""

import torch

from pipeline.commit import Commit
from pipeline.config import RunConfig
from pipeline.engine_state import StateReader
from pipeline.modeling.pair import NetworkPair


def new_pair(config: RunConfig) -> NetworkPair:
    """Build the networks with the initial weights of the run's seed.

    Args:
        config: The run.

    Returns:
        The networks, fp32, on the CPU.
    """
    pair = NetworkPair(config)
    pair.init_weights(config.run.seed)
    return pair


def load_commit_pair(commit: Commit, config: RunConfig) -> NetworkPair:
    """Build the networks with the fp32 weights of a commit.

    Args:
        commit: A verified commit.
        config: The run that it belongs to.

    Returns:
        The networks, fp32, on the CPU.

    Raises:
        CorruptError: The commit's parameters are not the model's.
    """
    pair = NetworkPair(config)
    for name, module in pair.trained_modules().items():
        shapes = {key: parameter.shape for key, parameter in module.named_parameters()}
        weights = StateReader(commit.path / name).weights(shapes)
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                parameter.copy_(weights[key])
    return pair
