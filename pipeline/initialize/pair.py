"""Continued pre-training: the networks of a new run with the weights of a model that exists.

    1. source      a run, commit or export of ours, or a repository (`released_layout`)
    2. roles       who gives each network its weights; one donor can give both
    3. refusals    sizes (`donors`) and vocabulary (`new_vocabulary`) must agree
    4. weights     rows of a new vocabulary moved, positions of a longer context repeated
    5. tables      E_D expressed by the law of embedding sharing: Delta := E_D - E_G, in fp32
    6. networks    every parameter given, or fresh by a rule that a note names; else refused

Forgetting step 5 is what makes a continued DeBERTaV3 worse than it was: a published discriminator
holds E_D alone, and with Delta = 0 it would be read as E_G.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data_prep.errors import UserError
from data_prep.tokenizer import MODEL_FILE, Tokenizer
from pipeline.commit import list_commits
from pipeline.config import NetworkSection, RunConfig
from pipeline.config_loading import load_run_config
from pipeline.evaluate.load import load_pretrained
from pipeline.export_repositories import PRETRAINING_CONFIG
from pipeline.findings import raise_findings
from pipeline.hf_layout import (
    DELTA,
    POSITION_DELTA,
    POSITION_TABLE,
    WORD_TABLE,
    Tensors,
)
from pipeline.initialize.donors import (
    LAYER_NUMBER,
    Donor,
    Source,
    context_notes,
    disagreements,
    measured_sizes,
    section_sizes,
)
from pipeline.initialize.new_vocabulary import RowTransfer, transfer_rows
from pipeline.initialize.released_layout import MLM_HEAD, RTD_HEAD, read_repository
from pipeline.initialize.shared_tables import join_tables
from pipeline.modeling.pair import NetworkPair
from pipeline.weights import new_pair

_NETWORKS = ("generator", "discriminator")
_HEADS = {"generator": MLM_HEAD, "discriminator": RTD_HEAD}
_POSITIONS = (POSITION_TABLE, POSITION_DELTA)


@dataclass(frozen=True)
class Initialized:
    """Networks that continue a model."""

    pair: NetworkPair
    notes: list[str]
    """What was decided and what is fresh, for the banner."""


@dataclass(frozen=True)
class _Role:
    """A network of the run and where its weights come from."""

    name: str
    network: NetworkSection
    donor: Donor
    is_rebuilt: bool
    """The donor is the other network: its encoder is taken, its head is not."""
    may_be_shallower: bool
    """The network may have fewer layers than the donor."""


def initialize_pair(
    config: RunConfig, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> Initialized:
    """Build the networks with the weights that `initialize.path` names.

    Args:
        config: The run.
        tokenizer: The dataset's.
        dtype: fp32 or fp64, of the networks; weights are widened before Delta is formed.

    Returns:
        The networks, on the CPU, and notes.

    Raises:
        UserError: The model cannot be read, or is not one that this run could continue.
        CorruptError: A file is damaged.
    """
    source = _open_source(config)
    roles = _roles(config, source)
    _refuse_disagreements(config, roles)
    transfer, notes = transfer_rows(source, config, tokenizer)
    notes = [*_role_notes(config, source, roles), *notes]
    weights = {role.name: _fitted(role, roles, transfer, dtype) for role in roles}
    for role in roles:
        notes += context_notes(role.name, role.network, role.donor)
    notes += join_tables(config, weights, str(source.path))
    pair = new_pair(config).to(dtype)
    findings: list[str] = []
    for role in roles:
        network = pair.get_submodule(role.name)
        findings += _unfillable(role, network, weights[role.name], config)
        notes += _leftover_notes(role, network, weights[role.name], config)
    raise_findings(f"initialize.path {config.initialize.path}", findings)
    for role in roles:
        pair.get_submodule(role.name).load_state_dict(weights[role.name], strict=False)
    return Initialized(pair, notes)


def _open_source(config: RunConfig) -> Source:
    """Read whatever `initialize.path` is."""
    path, generator = Path(config.initialize.path), config.initialize.generator_path
    is_run = any(place.exists() for place in (path / "train_state.json", path / "checkpoints"))
    is_run = is_run or bool(list_commits(path))
    if not is_run and (generator or not _is_whole_export(path)):
        return read_repository(
            path,
            Path(generator) if generator else None,
            needs_discriminator=config.objective.task == "rtd",
            needs_heads=config.initialize.missing_heads == "refuse",
        )
    if generator:
        raise UserError(
            f"initialize.generator_path {generator} does not go with initialize.path {path}, which "
            "is a run with a generator of its own: leave it out, or export the run first"
        )
    model = load_pretrained(path)
    tokenizer = Path(model.config.data.path) / "tokenizer"
    if not is_run:
        tokenizer = model.source / next(iter(model.config.networks)) / MODEL_FILE
    donors = {
        name: Donor(
            f"{model.source} ({name})",
            {k: p.detach() for k, p in model.pair.get_submodule(name).named_parameters()},
            section_sizes(section),
        )
        for name, section in model.config.networks.items()
    }
    return Source(path, donors, model.tokenizer_fingerprint, tokenizer)


def _is_whole_export(path: Path) -> bool:
    """Whether a path is an export of ours, or a folder of one, with every network that it had."""
    root = path.resolve().parent if (path / PRETRAINING_CONFIG).is_file() else path
    documents = [root / name / PRETRAINING_CONFIG for name in _NETWORKS]
    present = [document for document in documents if document.is_file()]
    if not present:
        return False
    networks = load_run_config(str(present[0])).networks
    return all(root / name / PRETRAINING_CONFIG in present for name in networks)


def _roles(config: RunConfig, source: Source) -> list[_Role]:
    """Choose a donor for each network of the run."""
    is_rtd, is_single = config.objective.task == "rtd", len(source.donors) == 1
    roles = []
    for name, network in config.networks.items():
        donor, is_rebuilt = source.donors.get(name), False
        if donor is None:
            donor, is_rebuilt = next(iter(source.donors.values())), True
        # Of one model, one network is made whole and the other may be its lower layers.
        shallower = is_rebuilt or (is_single and is_rtd and name == "generator")
        roles.append(_Role(name, network, donor, is_rebuilt, shallower))
    return roles


def _refuse_disagreements(config: RunConfig, roles: list[_Role]) -> None:
    """Name everything in which the model is not the one that the run describes."""
    findings = []
    for role in roles:
        findings += disagreements(role.name, role.network, role.donor, role.may_be_shallower)
        if role.is_rebuilt or role.name != "discriminator" or not role.donor.has(RTD_HEAD):
            continue
        has_norm = f"{RTD_HEAD}LayerNorm.weight" in role.donor.weights
        found = "debertav3" if has_norm else "electra"
        if config.objective.rtd_head != found:
            findings.append(
                f"objective.rtd_head is {config.objective.rtd_head}, {role.donor.source} has the "
                f"head of {found}: set objective.rtd_head={found}"
            )
    rows = {role.donor.source: role.donor.num_rows for role in roles if role.donor.num_rows}
    if len(set(rows.values())) > 1:
        sizes = " and ".join(f"{count} in {donor}" for donor, count in rows.items())
        findings.append(f"the word tables have different numbers of rows, {sizes}")
    raise_findings(f"initialize.path {config.initialize.path}", list(dict.fromkeys(findings)))


def _role_notes(config: RunConfig, source: Source, roles: list[_Role]) -> Iterator[str]:
    """Say what each network is made of."""
    for role in roles:
        have = role.network.num_hidden_layers
        layers = measured_sizes(role.donor.weights)["num_hidden_layers"]
        part = f"all {layers} layers" if have == layers else f"the first {have} of {layers} layers"
        if not role.is_rebuilt:
            head = "its head" if role.donor.has(_HEADS[role.name]) else "a fresh head"
            yield f"{role.name}: {part} of {role.donor.source}, with {head}"
        elif role.name == "generator":
            yield (
                f"{role.name}: rebuilt from the discriminator alone, {role.donor.source}: its "
                f"embeddings (E_G := E_D), {part}, and a fresh head; its first predictions are "
                "noise, and warm-up matters"
            )
        else:
            yield (
                f"{role.name}: built from a masked language model, {role.donor.source}: its "
                f"embeddings (E_D := E_G), {part}, and a fresh head"
            )
    if config.discriminator is None and "discriminator" in source.donors and len(source.donors) > 1:
        yield "objective.task=mlm: the discriminator is left out"


def _fitted(
    role: _Role, roles: list[_Role], transfer: RowTransfer | None, dtype: torch.dtype
) -> Tensors:
    """Take what a network needs, widened, with a row for each id and position of the run."""
    # A Delta is to the donor's own generator, which is not there where one network is rebuilt.
    is_alone = any(other.is_rebuilt for other in roles) and WORD_TABLE in role.donor.weights
    left_out = (DELTA, POSITION_DELTA) if is_alone else ()
    weights = {}
    for key, tensor in role.donor.weights.items():
        number = LAYER_NUMBER.match(key)
        if number and int(number[1]) >= role.network.num_hidden_layers and role.may_be_shallower:
            continue
        if role.is_rebuilt and key.startswith((MLM_HEAD, RTD_HEAD)):
            continue
        if key not in left_out:
            weights[key] = tensor.to(dtype)
    if transfer is not None:
        weights = transfer.apply(weights)
    rows = torch.arange(role.network.max_position_embeddings)
    for key in _POSITIONS:
        if key in weights and len(weights[key]) < len(rows):
            weights[key] = weights[key][rows % len(weights[key])]
    return weights


def _is_fresh(role: _Role, key: str, config: RunConfig) -> bool:
    """Whether a parameter that the donor lacks may keep the initial weights of the seed."""
    if key.startswith((MLM_HEAD, RTD_HEAD)):
        saved = role.donor.has(_HEADS[role.name])
        return role.is_rebuilt or (config.initialize.missing_heads == "fresh" and not saved)
    # Published generators and transformers' models often lack the decoder's positions.
    in_decoder = config.objective.enhanced_mask_decoder and role.name == "generator"
    return in_decoder and key == POSITION_TABLE


def _unfillable(
    role: _Role, network: nn.Module, weights: Tensors, config: RunConfig
) -> Iterator[str]:
    """Find parameters that the donor lacks or has in another shape."""
    shapes = {key: parameter.shape for key, parameter in network.named_parameters()}
    missing = [k for k in shapes if k not in weights and not _is_fresh(role, k, config)]
    if missing:
        yield f"{role.donor.source} lacks {len(missing)} of the {role.name}: {', '.join(missing)}"
    for key, shape in shapes.items():
        if key in weights and weights[key].shape != shape:
            yield (
                f"{role.donor.source}: {key} is {list(weights[key].shape)}, the {role.name} needs "
                f"{list(shape)}"
            )


def _leftover_notes(
    role: _Role, network: nn.Module, weights: Tensors, config: RunConfig
) -> Iterator[str]:
    """Say which positions are fresh and which tensors have no place."""
    names = {key for key, _ in network.named_parameters()}
    if POSITION_TABLE in names - set(weights):
        yield (
            f"{role.name}: {role.donor.source} has no {POSITION_TABLE}: the enhanced mask decoder "
            "begins with fresh positions; objective.enhanced_mask_decoder=false is what the "
            "file alone describes"
        )
    if strangers := sorted(set(weights) - names):
        yield (
            f"{role.name}: {len(strangers)} tensors of {role.donor.source} have no place and are "
            f"left out: {', '.join(strangers)}"
        )
