"""The dataset of a run, opened and compared with the run's configuration."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import CorruptError, UserError
from data_prep.manifest import SPLITS, Manifest
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from pipeline.config import RunConfig
from pipeline.evaluate.minimal_pairs import MinimalPairs, read_minimal_pairs
from pipeline.masking import MaskingVocabulary
from pipeline.objective_keys import ObjectiveKeys
from pipeline.sequences import SequenceStream

_MAX_SOURCES = 100
"""Sources that a commit names; the tokens of the others are summed up."""


@dataclass(frozen=True)
class RunData:
    """What a run reads."""

    dataset: Dataset
    tokenizer: Tokenizer
    train: dict[int, SequenceStream]
    """By sequence length, in the order of the phases; the last is data.sequence_length."""
    heldout: SequenceStream
    train_keys: dict[int, ObjectiveKeys]
    """By sequence length: masks and draws of training."""
    heldout_keys: ObjectiveKeys
    minimal_pairs: MinimalPairs | None = None
    """What the networks are probed with."""

    def describe(self) -> str:
        """Sum up the data for the banner.

        Returns:
            Fingerprint, shards, tokens and sequences of both splits.
        """
        sequences = ", then ".join(
            f"{stream.num_sequences:,} sequences of {length}"
            for length, stream in self.train.items()
        )
        tokens = self.train[self.heldout.sequence_length].num_tokens
        return (
            f"{len(self.dataset.manifest.shards)} shards, fingerprint "
            f"{self.dataset.fingerprint[:12]}; train {tokens:,} tokens in {sequences}; held out "
            f"{self.heldout.num_sequences:,} sequences"
        )


def open_run_data(config: RunConfig) -> RunData:
    """Open the dataset and compare it with the model.

    Args:
        config: The run.

    Returns:
        The open data.

    Raises:
        UserError: The vocabulary differs, there is nothing to train on, or
            evaluation.minimal_pairs cannot be used.
        CorruptError: The dataset is not what was written.
    """
    dataset = Dataset.open(config.data.path)
    vocab_size = dataset.manifest.vocab_size
    if vocab_size != config.model.vocab_size:
        raise UserError(
            f"data.path {config.data.path} was tokenized with a vocabulary of {vocab_size}, "
            f"model.vocab_size is {config.model.vocab_size}: set model.vocab_size={vocab_size}, or "
            "choose a dataset that belongs to this model"
        )
    lengths, final = config.sequence_lengths, config.data.sequence_length
    train = {length: SequenceStream(dataset, "train", length) for length in lengths}
    if train[final].num_sequences == 0:
        raise UserError(f"data.path {config.data.path} holds no training tokens: build it again")
    tokenizer = Tokenizer.load(dataset.tokenizer_folder)
    if tokenizer.fingerprint != dataset.manifest.tokenizer_fingerprint:
        raise CorruptError(
            f"{dataset.tokenizer_folder}: its model is not the one that the manifest names; build "
            "the dataset again"
        )
    vocabulary = MaskingVocabulary.from_tokenizer(tokenizer)

    def keys(length: int, split: str) -> ObjectiveKeys:
        return ObjectiveKeys(config.objective, config.run.seed, length, vocabulary, split)

    probe = config.evaluation.minimal_pairs
    return RunData(
        dataset,
        tokenizer,
        train,
        SequenceStream(dataset, "heldout", final),
        {length: keys(length, "train") for length in lengths},
        keys(final, "heldout"),
        read_minimal_pairs(Path(probe), tokenizer, final) if probe else None,
    )


def summarize_dataset(manifest: Manifest) -> dict[str, Any]:
    """Say about a dataset what a commit keeps, so that another one can be told from it.

    Args:
        manifest: The dataset's manifest.

    Returns:
        JSON-ready values: build command and software, plan, what was dropped; and of each split
        the tokens, documents, tokens by source and a hash over all of its tokens.
    """
    splits: dict[str, Any] = {}
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        hashes = "".join(shard.tokens_sha256 for shard in shards)
        by_source: Counter[str] = Counter()
        for shard in shards:
            by_source[shard.source] += shard.num_tokens
        named = dict(by_source.most_common(_MAX_SOURCES))
        if len(by_source) > len(named):
            named["(others)"] = by_source.total() - sum(named.values())
        splits[split] = {
            "shards": len(shards),
            "tokens": sum(shard.num_tokens for shard in shards),
            "documents": sum(shard.num_documents for shard in shards),
            "content": hashlib.sha256(hashes.encode()).hexdigest(),
            "tokens from": named,
        }
    return {
        "command": manifest.command,
        "software": dict(manifest.software),
        "plan_sha256": manifest.plan_sha256,
        "dropped": dict(manifest.dropped),
        **splits,
    }
