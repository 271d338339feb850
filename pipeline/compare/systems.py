"""The systems of a comparison: named, loaded, and refused where they cannot be compared.

Systems are trained on the same sequences in the same order, which is a function of the seed, the
sequence length and the blocks; so these must agree, and the vocabulary with them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config, preset_names
from pipeline.findings import raise_findings, show

_RESOLVED = "config.resolved.json"
_OWNED = {
    "data.path": "--dataset names it",
    "run.folder": "every run has a folder of its own in --output",
}
_COMMON = ("model.vocab_size", "data.sequence_length", "data.block_sequences", "data.window_blocks")
_MASKING = (
    "mask_prob",
    "masking_law",
    "mask_token_prob",
    "random_token_prob",
    "whole_word_masking",
    "max_ngram",
)


@dataclass(frozen=True)
class System:
    """One configuration of a comparison."""

    name: str
    """Of the preset or file; also that of its folders and curves."""
    source: str
    """Preset or path, as typed."""
    words: tuple[str, ...]
    """`section.key=value` words that make `config` of the source."""
    config: RunConfig


def load_systems(sources: Sequence[str], words: Sequence[str]) -> list[System]:
    """Load all systems of a comparison.

    Args:
        sources: Presets, TOML files or `config.resolved.json` files.
        words: `section.key=value` words for every one of them.

    Returns:
        The systems, in the order of the sources.

    Raises:
        UserError: With everything that is wrong, in one message.
    """
    findings = [
        f"{key}={value}: {_OWNED[key]}; leave the word out"
        for key, _, value in (word.partition("=") for word in words)
        if key in _OWNED
    ]
    if len(sources) < 2:
        findings.append(
            f"a comparison takes two systems or more, here are {len(sources)}: name presets or"
            f" TOML files ({', '.join(name for name in preset_names() if 'demo' in name)}, ...)"
        )
    names = [system_name(source) for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        both = [source for source, other in zip(sources, names, strict=True) if other == name]
        findings.append(
            f"{name} is the name of {len(both)} systems ({', '.join(both)}): names are those of"
            " presets and files, and must differ"
        )
    systems = []
    for name, source in zip(names, sources, strict=True):
        try:
            config = load_run_config(source, words)
            systems.append(System(name, source, tuple(words), config))
        except UserError as error:
            findings.append(f"{name}: {error}")
    findings += _disagreements(systems)
    raise_findings("deberta compare", findings)
    return systems


def system_name(source: str) -> str:
    """Name a system after its preset or file.

    Args:
        source: Preset or path.

    Returns:
        The preset, the file without its suffix, or the run folder of a `config.resolved.json`.
    """
    path = Path(source)
    if source in preset_names():
        return source
    return path.resolve().parent.name if path.name == _RESOLVED else path.stem


def _disagreements(systems: Sequence[System]) -> Iterator[str]:
    """Values in which systems must agree and do not."""
    for system in systems[1:]:
        for key in _COMMON:
            ours, theirs = _value(systems[0], key), _value(system, key)
            if ours != theirs:
                yield (
                    f"{key} is {theirs} in {system.name} and {ours} in {systems[0].name}: systems"
                    f" are trained on the same sequences in the same order; add {key}={ours}, or"
                    f" another value for all"
                )


def _value(system: System, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(system.config, section), name)


def notes_of(systems: Sequence[System]) -> list[str]:
    """Say which figures of some systems cannot be held against each other.

    Args:
        systems: All systems of a comparison.

    Returns:
        Sentences.
    """
    notes = []
    for key in _MASKING:
        values = {system.name: getattr(system.config.objective, key) for system in systems}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{show(value)} in {name}" for name, value in values.items())
            notes.append(
                f"objective.{key} is {each}: the masks differ, held-out ones too, and the MLM"
                " figures are those of different tasks."
            )
    if sum(system.config.discriminator is not None for system in systems) > 1:
        notes.append(
            "Each discriminator is measured on the replacements of its own generator: a better"
            " generator makes its task harder."
        )
    lengths = {system.name: system.config.sequence_lengths for system in systems}
    if any(len(each) > 1 for each in lengths.values()):
        each = ", ".join(f"{value} in {name}" for name, value in lengths.items())
        notes.append(
            f"Sequence lengths: {each}. A phase of another length reads the same text in an order"
            " of its own."
        )
    return notes
