"""Where a RunConfig comes from: a preset or file, then `section.key=value` words.

1. A name is a preset (package data, found from any folder), a path to a TOML file, or the
   `config.resolved.json` of an earlier run, which repeats that run.
2. `recipe=released_code`, as a word or as the file's first key, lays the file's tables
   [released_code.SECTION] over its sections: where the paper and the authors' code differ, the
   code's values count.
3. The words replace single keys. Their values are TOML literals (`500_000`, `1e-4`, `true`,
   `[0.9, 0.98]`, `[{until_step=1000, sequence_length=128}]`), else text.
4. `pipeline.config.RunConfig` checks types, bounds and contradictions.

All problems are reported in one message; each says whether the file, its table or the command line
is meant.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.config_files import read_json, read_toml
from pipeline.config_keys import (
    DEEPSPEED_NAMES,
    PLAIN_KEYS,
    SECTIONS,
    meaning_of,
    unknown_key,
    wrong_name,
)
from pipeline.ds_config import BatchPlan, DeepSpeedConfig
from pipeline.findings import describe_error, dotted, nearest, raise_findings, show

RESOLVED_FORMAT = 1
COMMAND_LINE = "command line"
RELEASED_CODE = "released_code"


@dataclass
class _Draft:
    """Values on their way into a RunConfig, and where each came from.

    Attributes:
        file: The preset or path, for messages.
        values: Section -> key -> value, or key -> value for a key without a section.
        overlay: What [released_code] holds, section -> key -> value; None without such a table.
        is_resolved: The file is a `config.resolved.json`: its recipe has been applied.
        origins: Path -> source, where that is not the file.
        findings: Problems so far, complete lines.
    """

    file: str
    values: dict[str, Any]
    overlay: Any = None
    is_resolved: bool = False
    origins: dict[tuple[str, ...], str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    @property
    def overlay_name(self) -> str:
        """Name the table of the released code's values."""
        return f"{self.file}, [{RELEASED_CODE}]"

    def origin(self, path: str) -> str:
        """Name the source of a dotted path."""
        return self.origins.get(tuple(path.split("[")[0].split(".")[:2]), self.file)


def preset_names() -> list[str]:
    """List the presets.

    Returns:
        Names that `load_run_config` accepts, sorted.
    """
    folder = resources.files("pipeline") / "presets"
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def load_run_config(preset_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run configuration.

    Args:
        preset_or_path: A preset's name, a TOML file, or a `config.resolved.json`.
        overrides: `section.key=value` words and `recipe=...`, at most one for each key.

    Returns:
        The checked configuration.

    Raises:
        UserError: With every problem in one message.
    """
    draft = _read_source(preset_or_path)
    for word in overrides:
        _apply_word(draft, word)
    problems = list(_wrong_overlay(draft))
    draft.findings += problems
    if not problems:
        _apply_recipe(draft)
    config = None
    try:
        config = RunConfig.model_validate_json(json.dumps(draft.values, default=str), strict=True)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            draft.findings += _lines(draft, problem)
    raise_findings("the run configuration", draft.findings)
    assert config is not None, "a validation error without a finding"
    return config


def require_data_path(config: RunConfig) -> None:
    """Refuse to train without a dataset; presets cannot name one.

    Args:
        config: The run configuration.

    Raises:
        UserError: If data.path is empty.
    """
    if not config.data.path:
        raise UserError(
            "data.path is not set; add data.path=FOLDER, a dataset written by `deberta-prep build`"
        )


def resolved_config_dict(
    run_config: RunConfig, deepspeed_config: DeepSpeedConfig, plan: BatchPlan
) -> dict[str, Any]:
    """Collect everything that decides a run, for `config.resolved.json`.

    Args:
        run_config: What is learned.
        deepspeed_config: How it is computed.
        plan: The batch arithmetic of this world size, written for readers; loading derives it anew.

    Returns:
        A JSON document that both `load_run_config` and `load_deepspeed_config` accept.
    """
    return {
        "format": RESOLVED_FORMAT,
        "run_config": run_config.model_dump(mode="json"),
        "deepspeed_config": deepspeed_config.raw,
        "deepspeed_config_path": deepspeed_config.path,
        "batch": {
            "world_size": plan.world_size,
            "train_micro_batch_size_per_gpu": plan.train_micro_batch_size_per_gpu,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "train_batch_size": plan.train_batch_size,
            "tokens_per_step": plan.train_batch_size * run_config.data.sequence_length,
        },
    }


def _read_source(preset_or_path: str) -> _Draft:
    """Find the source and read it."""
    if preset_or_path in preset_names():
        text = (resources.files("pipeline") / "presets" / f"{preset_or_path}.toml").read_text()
        return _draft_of_toml(f"{preset_or_path}.toml", tomllib.loads(text))
    path = Path(preset_or_path)
    if not path.exists():
        raise UserError(
            f"--config {preset_or_path}: no such preset or file"
            f"{nearest(preset_or_path, preset_names())}"
        )
    if path.is_dir():
        raise UserError(f"--config {path} is a folder; name a TOML file or a config.resolved.json")
    if path.suffix != ".json":
        return _draft_of_toml(str(path), read_toml(path))
    document = read_json(path)
    if document.get("format") != RESOLVED_FORMAT or not isinstance(
        document.get("run_config"), dict
    ):
        other = {*document} & DEEPSPEED_NAMES
        cure = "pass it as --deepspeed_config" if other else "write the configuration as TOML"
        raise UserError(f"{path} is no config.resolved.json of format {RESOLVED_FORMAT}; {cure}")
    return _Draft(str(path), document["run_config"], is_resolved=True)


def _draft_of_toml(name: str, values: dict[str, Any]) -> _Draft:
    """Part a TOML file's own values from the released code's."""
    overlay = values.pop(RELEASED_CODE, None)
    return _Draft(name, values, overlay)


def _apply_word(draft: _Draft, word: str) -> None:
    """Set one key from a `section.key=value` word, or note what is wrong with the word."""
    path, equals, text = word.partition("=")
    key = tuple(path.split("."))
    problem = None
    if not equals:
        problem = f"'{word}' is not of the form section.key=value"
    elif path.startswith("-"):
        problem = f"'{word}' is not an option; write {path.lstrip('-')}={text} without dashes"
    else:
        problem = wrong_name(key)
    if problem is None and key in draft.origins:
        problem = f"{path} is given twice; keep one"
    if problem is not None:
        draft.findings.append(f"{COMMAND_LINE}: {problem}")
        return
    draft.origins[key] = COMMAND_LINE
    if path in PLAIN_KEYS:
        _set_plain_key(draft, path, _parse_value(text, is_text=True))
        return
    section, name = key
    table = draft.values.setdefault(section, {})
    if isinstance(table, dict):
        table[name] = _parse_value(
            text, is_text=SECTIONS[section].model_fields[name].annotation is str
        )


def _set_plain_key(draft: _Draft, key: str, text: str) -> None:
    """Set `recipe`, but not for a run whose values are settled."""
    before = draft.values.get(key, text)
    if draft.is_resolved and before != text:
        draft.findings.append(
            f"{COMMAND_LINE}: {key}={text} comes too late: {draft.file} holds the values of"
            f" {key}={before}; start from the preset"
        )
        return
    draft.values[key] = text


def _wrong_overlay(draft: _Draft) -> Iterator[str]:
    """Find names in [released_code] that no run has, whether or not the table is used."""
    overlay = {} if draft.overlay is None else draft.overlay
    tables = overlay if isinstance(overlay, dict) else {"": overlay}
    for section, table in tables.items():
        if not isinstance(table, dict):
            path = f"{RELEASED_CODE}.{section}".rstrip(".")
            yield f"{draft.file}: {path} is {show(table)}; it must be a block of keys"
            continue
        names = [(section, key) for key in table] or [(section,)] * (section not in SECTIONS)
        for name in names:
            if problem := wrong_name(name):
                yield f"{draft.overlay_name}: {problem}"


def _apply_recipe(draft: _Draft) -> None:
    """Lay the released code's values over the paper's, below the words, if that is the recipe."""
    if draft.values.get("recipe") != RELEASED_CODE or draft.is_resolved:
        return
    if draft.overlay is None:
        draft.findings.append(
            f"{draft.origin('recipe')}: recipe={RELEASED_CODE} needs tables"
            f" [{RELEASED_CODE}.SECTION], which {draft.file} has not; leave it out"
        )
        return
    for section, table in draft.overlay.items():
        below = draft.values.setdefault(section, {})
        if not isinstance(below, dict):
            continue
        for key, value in table.items():
            if (section, key) not in draft.origins:
                below[key] = value
                draft.origins[section, key] = draft.overlay_name


def _parse_value(text: str, is_text: bool) -> Any:
    """Read a TOML literal; what is none is text, and so is everything that a text key gets."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if parsed.keys() != {"value"} or (is_text and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _lines(draft: _Draft, problem: Mapping[str, Any]) -> Iterator[str]:
    """Translate one pydantic error to finding lines, each with its source."""
    location = problem["loc"]
    path = dotted(location)
    if problem["type"] == "contradiction":
        for key, words in problem["ctx"]["all"]:
            full = f"{path}.{key}" if path else key
            yield f"{draft.origin(full)}: {full} {words}"
    elif problem["type"] == "extra_forbidden":
        yield f"{draft.origin(path)}: {unknown_key(location)}"
    elif problem["type"] == "missing":
        yield f"{draft.origin(path)}: {path} is missing: {meaning_of(location)}"
    else:
        yield f"{draft.origin(path)}: {path} {describe_error(problem)}"
