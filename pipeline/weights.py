"""Where a run's weights come from: its seed, or a commit.

new_pair            initial weights as functions of the seed
load_commit_pair    the fp32 weights of a commit, whatever world wrote it
load_average_pair   the mean of several commits' weights
"""

from collections.abc import Sequence

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


def load_average_pair(commits: Sequence[Commit], config: RunConfig) -> NetworkPair:
    """Build the networks with the mean of the fp32 weights of some commits.

    Args:
        commits: Verified commits of one run, at least one.
        config: The run that they belong to.

    Returns:
        The networks, fp32, on the CPU; sums are made in fp64.

    Raises:
        CorruptError: A commit's parameters are not the model's.

    Source:
        Izmailov et al., arXiv:1803.05407 (stochastic weight averaging), with equal weights.
    """
    pair = load_commit_pair(commits[0], config)
    if len(commits) == 1:
        return pair
    sums = {name: parameter.detach().double() for name, parameter in pair.named_parameters()}
    for commit in commits[1:]:
        for name, parameter in load_commit_pair(commit, config).named_parameters():
            sums[name] += parameter.detach()
    with torch.no_grad():
        for name, parameter in pair.named_parameters():
            parameter.copy_(sums[name] / len(commits))
    return pair
