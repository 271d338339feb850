"""Repositories in the released layout, and in that of transformers, as donors of weights.

    config.json             the discriminator, or a masked language model
    model.safetensors       its weights, or model.safetensors.index.json, or pytorch_model.bin, ...
    generator_config.json   the generator, with generator.safetensors, pytorch_model.generator.bin
                            or generator.bin; or a folder `generator`; or initialize.generator_path
    spm.model               the tokenizer, beside the weights

Keys may begin with `deberta.`, with the `bert.` of older files, or with neither; the head of a
masked language model is `lm_predictions.lm_head` or transformers' `cls.predictions`. What a file is
for is told by its heads: released discriminators hold both, so that `mask_predictions` decides.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from data_prep.tokenizer import MODEL_FILE
from pipeline.config_files import read_json
from pipeline.hf_layout import DELTA, WORD_TABLE, Tensors
from pipeline.initialize.donors import LAYER_NUMBER, RELATIVE_END, Donor, Source
from pipeline.initialize.weight_files import read_weights

MLM_HEAD, RTD_HEAD = "lm_predictions.", "mask_predictions."
MLM_BIAS = "lm_predictions.lm_head.bias"
_MAIN = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_GENERATOR = ("generator.safetensors", "pytorch_model.generator.bin", "generator.bin")
_OURS = {
    "bert.": "deberta.",
    "embeddings.": "deberta.embeddings.",
    "encoder.": "deberta.encoder.",
    "cls.predictions.transform.": "lm_predictions.lm_head.",
    "cls.predictions.bias": MLM_BIAS,
}
"""Beginnings of names in files -> ours."""
_DECODER = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
_BUFFERS = ("deberta.embeddings.position_ids",)
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_DEFAULTS = {
    "layer_norm_eps": 1e-7,
    "relative_attention": False,
    "position_biased_input": True,
    "conv_kernel_size": 0,
    "conv_act": "tanh",
}
"""Fields that DebertaV2Config may leave out, and their values there."""


def read_repository(
    path: Path, generator_path: Path | None, *, needs_discriminator: bool, needs_heads: bool
) -> Source:
    """Read a repository and the generator that belongs to it.

    Args:
        path: Folder with config.json, or a file of weights in one.
        generator_path: Folder or file of the generator; None looks beside the discriminator.
        needs_discriminator: False reads the generator alone, where there is one.
        needs_heads: Whether an encoder without a head is refused.

    Returns:
        One donor or two.

    Raises:
        UserError: Files are missing or unsuited.
        CorruptError: A file is not whole.
    """
    weights_file = _weights_file(path, _MAIN)
    config_file = weights_file.parent / "config.json"
    if not config_file.is_file():
        raise UserError(
            f"initialize.path {path}: {config_file.name} is missing beside {weights_file.name}; "
            "name a run, a commit, an export or a repository"
        )
    donors = {}
    if place := generator_path or _generator_beside(weights_file.parent):
        donors["generator"] = _read_generator(place, weights_file.parent, needs_heads)
    if needs_discriminator or not donors:
        donor = _read_donor(weights_file, config_file, needs_heads)
        if not donor.has(RTD_HEAD) and (donor.has(MLM_HEAD) or not needs_discriminator):
            if donors:
                raise UserError(
                    f"{weights_file} is given as a discriminator beside the generator "
                    f"{donors['generator'].source}, but has no {RTD_HEAD}*: name the "
                    "discriminator's repository, or leave initialize.generator_path out"
                )
            donors["generator"] = donor
        else:
            donors["discriminator"] = donor
    model = weights_file.parent / MODEL_FILE
    fingerprint = hashlib.sha256(model.read_bytes()).hexdigest() if model.is_file() else None
    return Source(path, donors, fingerprint, model if fingerprint else None)


def _weights_file(path: Path, names: tuple[str, ...]) -> Path:
    """Find a repository's weights."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"initialize.path or initialize.generator_path: {path} is not there")
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"initialize.path or initialize.generator_path: {path} is neither a run, a commit nor an "
        f"export, and no repository: it has none of {', '.join(names)}"
    )


def _generator_beside(folder: Path) -> Path | None:
    """Find a generator that was published with a discriminator."""
    places = [folder / name for name in (*_GENERATOR, "generator")]
    return next((place for place in places if place.exists()), None)


def _read_generator(place: Path, discriminator_folder: Path, needs_head: bool) -> Donor:
    """Read a generator, with its configuration where there is one."""
    weights_file = _weights_file(place, (*_GENERATOR, *_MAIN))
    config_file = weights_file.parent / "generator_config.json"
    if not config_file.is_file() and weights_file.parent != discriminator_folder:
        config_file = weights_file.parent / "config.json"
    given_config = config_file if config_file.is_file() else None
    donor = _read_donor(weights_file, given_config, needs_head)
    if needs_head and not donor.has(MLM_HEAD):
        raise UserError(
            f"{weights_file} is given as a generator, but holds neither lm_predictions.* nor "
            "cls.predictions.*: name the generator's weights by initialize.generator_path"
        )
    return donor


def _read_donor(weights_file: Path, config_file: Path | None, needs_head: bool) -> Donor:
    """Read one network."""
    weights = our_names(read_weights(weights_file), weights_file)
    has_layers = any(LAYER_NUMBER.match(key) for key in weights)
    if not has_layers or not {WORD_TABLE, DELTA} & set(weights):
        raise UserError(
            f"{weights_file} holds no DeBERTa encoder with its word embeddings, under the prefix "
            f"deberta., bert. or none; its names are like {', '.join(sorted(weights)[:3])}"
        )
    if needs_head and not any(key.startswith((MLM_HEAD, RTD_HEAD)) for key in weights):
        raise UserError(
            f"{weights_file} has neither the discriminator's head {RTD_HEAD}* nor that of a masked "
            "language model, lm_predictions.* or cls.predictions.*: a model without its head would "
            "begin untrained; name one that was saved for pre-training, or begin with a fresh "
            "head by initialize.missing_heads=fresh"
        )
    if config_file is None:
        return Donor(str(weights_file), weights, {})
    values = read_json(config_file)
    problems = (f"{config_file.name}: {line}" for line in _unsuited(values))
    return Donor(str(weights_file), weights, _sizes(values, config_file), tuple(problems))


def our_names(weights: Tensors, file: Path) -> Tensors:
    """Give tensors the names that they have here.

    Args:
        weights: As stored.
        file: For messages.

    Returns:
        The same tensors, without buffers and without an output table that is tied.

    Raises:
        UserError: Two tensors have the same name here, or the output table is not tied.
    """
    renamed: Tensors = {}
    for key, tensor in weights.items():
        if key in _DECODER:
            continue
        old = next((prefix for prefix in _OURS if key.startswith(prefix)), "")
        name = _OURS.get(old, "") + key.removeprefix(old)
        if name in renamed:
            raise UserError(f"{file} holds {name} twice, once as {key}: remove one")
        if name not in _BUFFERS:
            renamed[name] = tensor
    table, bias = (weights.get(key) for key in _DECODER)
    if table is not None and WORD_TABLE in renamed and not torch.equal(table, renamed[WORD_TABLE]):
        raise UserError(
            f"{file}: {_DECODER[0]} differs from the word embeddings; the head here is tied to "
            "them, and this model would not be the same"
        )
    if bias is not None:
        renamed.setdefault(MLM_BIAS, bias)
    return renamed


def _sizes(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Translate config.json into the fields of our sections."""
    if missing := [key for key in _SIZES if key not in values]:
        raise UserError(f"{file}: {', '.join(missing)} missing; a DebertaV2Config has them")
    sizes = {key: values[key] for key in _SIZES}
    sizes |= {key: values.get(key, default) for key, default in _DEFAULTS.items()}
    sizes["embedding_size"] = values.get("embedding_size") or values["hidden_size"]
    if sizes["relative_attention"]:
        end = values.get("max_relative_positions", -1)
        sizes["position_buckets"] = values.get("position_buckets", -1)
        sizes[RELATIVE_END] = values["max_position_embeddings"] if end < 1 else end
    return sizes


def _unsuited(values: Mapping[str, Any]) -> Iterator[str]:
    """Settings of config.json that no network here can have."""
    if values.get("model_type", "deberta-v2") != "deberta-v2":
        yield f"model_type is {values['model_type']!r}, not deberta-v2, which v3 has too"
        return
    if (activation := values.get("hidden_act", "gelu")) != "gelu":
        yield f"hidden_act is {activation!r}; layers here have the exact gelu"
    if types := values.get("type_vocab_size", 0):
        yield f"type_vocab_size is {types}; networks here have no token types"
    if values.get("conv_groups", 1) != 1:
        yield f"conv_groups is {values['conv_groups']}; the convolution here has one"
    if not values.get("relative_attention", False):
        return
    kinds = values.get("pos_att_type") or ()
    kinds = set(kinds.split("|") if isinstance(kinds, str) else kinds)
    if kinds != {"p2c", "c2p"}:
        yield f"pos_att_type is {sorted(kinds)}; attention here is p2c|c2p"
    if not values.get("share_att_key", False):
        yield "share_att_key is false; positions here share the projections of content"
    if "layer_norm" not in str(values.get("norm_rel_ebd", "none")).lower().split("|"):
        yield "norm_rel_ebd is not layer_norm; the relative table here is normalized"
