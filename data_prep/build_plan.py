"""What determines the bytes of a dataset, written down before the work begins.

- `BuildOptions`: everything beside sources and tokenizer that changes a byte.
- `BuildPlan`: options, input and versions in one comparable value. It is stored in the work folder
  and, with the same field names, in the manifest; a build that finds another one refuses to go on,
  because half a dataset of each would be a dataset of neither.

Left out is what must not change a byte: the number of workers, the output folder, times, the
machine. Sources keep the names that the user typed: absolute paths would make the same corpus
another dataset on another machine.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_prep.cleaning import CleaningOptions
from data_prep.dedup_decisions import Decisions, Duplicates
from data_prep.documents import ReadOptions, Unit
from data_prep.errors import UserError
from data_prep.handling import Handling, SourceHandling
from data_prep.manifest import SourceInfo
from data_prep.source_units import TARGET_BYTES
from data_prep.tokenizer import Tokenizer

SHARD_TOKENS = 2**27
"""Tokens from which a shard takes no further document: 512 MiB, a few seconds to hash."""
SOFTWARE = ("deberta-pretrain", "sentencepiece", "tokenizers")
"""Distributions whose versions determine the ids or the tokenizer files."""
_NOT_READING = ("--heldout-fraction", "--shard-tokens", "--dedup", "--duplicates")
_MEANINGS = {
    "command": "command line (each option spelled out)",
    "software": "versions",
    "tokenizer_fingerprint": "tokenizer (sha256 of the model)",
    "sources": "bytes of the sources",
    "plan_sha256": "input files (sha256 of their names, sizes and cuts)",
    "evaluation_sha256": "evaluation files (sha256 of their runs of words)",
}


@dataclass(frozen=True)
class BuildOptions:
    """Everything beside sources and tokenizer that determines the bytes of a dataset.

    Args:
        read: how sources are read.
        cleaning: which documents are kept.
        heldout_fraction: share of the documents that is held out, in [0, 0.5].
        unit_bytes: bytes of input that one unit of work aims at.
        shard_tokens: tokens from which a shard takes no further document.
        dedup: decisions about the documents; None to keep all of them.
        duplicates: what becomes of duplicates that `dedup` found: `drop` them, or `keep` them in
            the split of the one that they resemble. Documents that hold evaluation text go anyway.
        others: sources that are read and cleaned in ways of their own.
        weights: sources and how often training reads them; 1 where not given.
        recipe: the file that said all of this, as the user named it; empty where the command did.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    cleaning: CleaningOptions = field(default_factory=CleaningOptions)
    heldout_fraction: float = 0.01
    unit_bytes: int = TARGET_BYTES
    shard_tokens: int = SHARD_TOKENS
    dedup: Decisions | None = None
    duplicates: Duplicates = "drop"
    others: tuple[tuple[str, SourceHandling], ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    recipe: str = ""

    @property
    def handling(self) -> Handling:
        """How every source is read and cleaned."""
        return Handling(SourceHandling(self.read, self.cleaning), self.others)

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_fraction <= 0.5:
            raise UserError(
                f"--heldout-fraction {self.heldout_fraction}: must lie between 0 and 0.5"
            )
        for option, value in (("unit-bytes", self.unit_bytes), ("shard-tokens", self.shard_tokens)):
            if value < 1:
                raise UserError(f"--{option} {value}: must be at least 1")

    def words(self) -> list[str]:
        """The options as words of the command line, none left to its default."""
        others = {
            "heldout-fraction": self.heldout_fraction,
            "unit-bytes": self.unit_bytes,
            "shard-tokens": self.shard_tokens,
        }
        if self.dedup is not None:
            # Not the folder's name: what determines the bytes is what it holds.
            others |= {"dedup": self.dedup.fingerprint, "duplicates": self.duplicates}
        return [*self.handling.default.words(), *_as_words(others)]

    def reading_words(self) -> list[str]:
        """Those of `words` that decide which documents there are, and in which unit."""
        words = self.words()
        pairs = zip(words[::2], words[1::2], strict=True)
        return [word for pair in pairs if pair[0] not in _NOT_READING for word in pair]


@dataclass(frozen=True)
class BuildPlan:
    """What must not change between the runs of one build; the fields are those of `Manifest`.

    Args:
        command: the command line, every option spelled out.
        software: versions of what determines the bytes.
        tokenizer_fingerprint: sha256 of the SentencePiece model.
        sources: the sources and their sizes.
        plan_sha256: sha256 of the list of units.
    """

    command: str
    software: dict[str, str]
    tokenizer_fingerprint: str
    sources: tuple[SourceInfo, ...]
    plan_sha256: str

    @classmethod
    def make(
        cls,
        sources: Sequence[str],
        tokenizer_path: Path,
        tokenizer: Tokenizer,
        options: BuildOptions,
        units: Sequence[Unit],
    ) -> "BuildPlan":
        """Describe a build.

        Args:
            sources: as the user named them.
            tokenizer_path: as the user named it.
            tokenizer: what was found there.
            options: everything else that determines the bytes.
            units: what the sources were divided into.

        Returns:
            The plan.

        Raises:
            UserError: the decisions of a deduplication are about another input.
        """
        given = ["--recipe", options.recipe] if options.recipe else sources
        words = ["deberta-prep", "build", *given, "--tokenizer", str(tokenizer_path)]
        source_infos, plan_sha256 = describe_input(sources, units, options.handling)
        if options.dedup is not None:
            reading = shlex.join(options.reading_words())
            options.dedup.refuse_other_input(source_infos, plan_sha256, reading)
        return cls(
            command=shlex.join([*words, *options.words()]),
            software={name: version_of(name) for name in (*SOFTWARE, *options.handling.packages())},
            tokenizer_fingerprint=tokenizer.fingerprint,
            sources=tuple(
                replace(info, weight=dict(options.weights).get(info.name, 1.0))
                for info in source_infos
            ),
            plan_sha256=plan_sha256,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as values that JSON gives back unchanged."""
        return json.loads(json.dumps(asdict(self)))

    def refuse_other(self, stored: dict[str, Any], output: Path, state: str) -> None:
        """Compare with the plan that a folder was made by.

        Args:
            stored: what the folder holds: a parsed plan or manifest.
            output: the folder.
            state: what happened to the folder, for the message.

        Raises:
            UserError: they differ; the message says in what.
        """
        refuse_difference(self.to_dict(), stored, output, state)


def _as_words(values: Mapping[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def describe_input(
    sources: Sequence[str], units: Sequence[Unit], handling: Handling
) -> tuple[tuple[SourceInfo, ...], str]:
    """Describe what is read.

    Args:
        sources: as the user named them.
        units: what they were divided into.
        handling: how they are read and cleaned.

    Returns:
        The sources with their sizes and own options, and the sha256 of the list of units.
    """
    input_bytes = dict.fromkeys(sources, 0)
    for unit in units:
        input_bytes[unit.source] += unit.num_bytes
    listing = json.dumps([unit.to_dict() for unit in units])
    own = {name: shlex.join(way.words()) for name, way in handling.others}
    infos = tuple(SourceInfo(name, count, own.get(name, "")) for name, count in input_bytes.items())
    return infos, hashlib.sha256(listing.encode()).hexdigest()


def refuse_difference(
    now: dict[str, Any], stored: dict[str, Any], output: Path, state: str
) -> None:
    """Refuse to go on in a folder that was begun with something else.

    Args:
        now: what is to be made: values that JSON gives back unchanged.
        stored: what the folder holds.
        output: the folder.
        state: what happened to the folder, for the message.

    Raises:
        UserError: they differ; the message says in what.
    """
    lines = [
        f"  {_MEANINGS.get(key, key)}\n    then: {stored.get(key)}\n    now:  {value}"
        for key, value in now.items()
        if stored.get(key) != value
    ]
    if lines:
        raise UserError(
            f"{output} {state} from something else:\n" + "\n".join(lines) + "\n"
            f"Choose another --output, delete {output} to start afresh, or repeat the command "
            f"and the input of then"
        )


def version_of(distribution: str) -> str:
    """The installed version of a distribution, for people and for comparisons."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
