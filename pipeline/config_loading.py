"""Where a RunConfig comes from: a preset or file, then `section.key=value` words.

1. A name is a preset (package data, found from any folder), a path to a TOML file, or the
   `config.resolved.json` of an earlier run, which repeats that run.
2. The words replace single keys. Their values are TOML literals (`500_000`, `1e-4`, `true`,
   `[0.9, 0.98]`), else text.
3. `pipeline.config.RunConfig` checks types, bounds and contradictions.

All problems are reported in one message; each says whether the file or the command line is meant.
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
from pipeline.config import RunConfig, Section
from pipeline.config_files import read_json, read_toml
from pipeline.ds_config import BatchPlan, DeepSpeedConfig
from pipeline.ds_schema import REFUSED, DeepSpeedJson
from pipeline.findings import describe_error, dotted, model_at, nearest, raise_findings

RESOLVED_FORMAT = 1
COMMAND_LINE = "command line"

_SECTIONS: dict[str, type[Section]] = {
    name: model
    for name in RunConfig.model_fields
    if issubclass(model := model_at(RunConfig, (name,)), Section)
}
_DEEPSPEED_NAMES = {*DeepSpeedJson.model_fields, *(key for key in REFUSED if "." not in key)}


@dataclass
class _Draft:
    """Values on their way into a RunConfig, and where each came from.

    Attributes:
        file: The preset or path, for messages.
        values: Section -> key -> value.
        origins: (section, key) -> "command line", for keys that words have set.
        findings: Problems so far, complete lines.
    """

    file: str
    values: dict[str, Any]
    origins: dict[tuple[str, ...], str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def origin(self, path: str) -> str:
        """Name the source of a dotted path."""
        return self.origins.get(tuple(path.split("[")[0].split(".")), self.file)


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
        overrides: `section.key=value` words, at most one for each key.

    Returns:
        The checked configuration.

    Raises:
        UserError: With every problem in one message.
    """
    draft = _Draft(*_read_source(preset_or_path))
    for word in overrides:
        _apply_word(draft, word)
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


def _read_source(preset_or_path: str) -> tuple[str, dict[str, Any]]:
    """Find the source: its name for messages, and its sections."""
    if preset_or_path in preset_names():
        text = (resources.files("pipeline") / "presets" / f"{preset_or_path}.toml").read_text()
        return f"{preset_or_path}.toml", tomllib.loads(text)
    path = Path(preset_or_path)
    if not path.exists():
        raise UserError(
            f"--config {preset_or_path}: no such preset or file"
            f"{nearest(preset_or_path, preset_names())}"
        )
    if path.is_dir():
        raise UserError(f"--config {path} is a folder; name a TOML file or a config.resolved.json")
    if path.suffix != ".json":
        return str(path), read_toml(path)
    document = read_json(path)
    if document.get("format") != RESOLVED_FORMAT or not isinstance(
        document.get("run_config"), dict
    ):
        other = {*document} & _DEEPSPEED_NAMES
        cure = "pass it as --deepspeed_config" if other else "write the configuration as TOML"
        raise UserError(f"{path} is no config.resolved.json of format {RESOLVED_FORMAT}; {cure}")
    return str(path), document["run_config"]


def _apply_word(draft: _Draft, word: str) -> None:
    """Set one key from a `section.key=value` word, or note what is wrong with the word."""
    path, equals, text = word.partition("=")
    problem = None
    if not equals:
        problem = f"'{word}' is not of the form section.key=value"
    elif path.startswith("-"):
        problem = f"'{word}' is not an option; write {path.lstrip('-')}={text} without dashes"
    else:
        problem = _unknown_path(tuple(path.split(".")))
    key = tuple(path.split("."))
    if problem is None and key in draft.origins:
        problem = f"{path} is given twice; keep one"
    if problem is not None:
        draft.findings.append(f"{COMMAND_LINE}: {problem}")
        return
    section, name = key
    table = draft.values.setdefault(section, {})
    if isinstance(table, dict):
        table[name] = _parse_value(
            text, is_text=_SECTIONS[section].model_fields[name].annotation is str
        )
        draft.origins[key] = COMMAND_LINE


def _parse_value(text: str, is_text: bool) -> Any:
    """Read a TOML literal; what is none is text, and so is everything that a text key gets."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if parsed.keys() != {"value"} or (is_text and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _unknown_path(path: tuple[str, ...]) -> str | None:
    """What is wrong with the name of a key, with the nearest valid one; None if it is valid."""
    name = ".".join(path)
    section, key = path[0], path[-1]
    if section in _DEEPSPEED_NAMES and section not in _SECTIONS:
        return f"{name} belongs in the DeepSpeed JSON (--deepspeed_config)"
    if len(path) == 2 and section in _SECTIONS and key in _SECTIONS[section].model_fields:
        return None
    homes = [f"{home}.{key}" for home, model in _SECTIONS.items() if key in model.model_fields]
    if homes and len(path) <= 2:
        return f"unknown key '{name}', did you mean {' or '.join(repr(home) for home in homes)}?"
    if section not in _SECTIONS:
        kind = "key" if len(path) == 1 else "section"
        return f"unknown {kind} '{section}'{nearest(section, _SECTIONS)}"
    if len(path) == 1:
        keys = ", ".join(_SECTIONS[name].model_fields)
        return f"'{name}' is a section; name one of its keys: {keys}"
    return f"unknown key '{name}'{nearest(key, _SECTIONS[section].model_fields)}"


def _lines(draft: _Draft, problem: Mapping[str, Any]) -> Iterator[str]:
    """Translate one pydantic error to finding lines, each with its source."""
    location = problem["loc"]
    path = dotted(location)
    if problem["type"] == "contradiction":
        for key, words in problem["ctx"]["all"]:
            full = f"{path}.{key}" if path else key
            yield f"{draft.origin(full)}: {full} {words}"
    elif problem["type"] == "extra_forbidden":
        yield f"{draft.file}: {_unknown_path(tuple(map(str, location)))}"
    elif problem["type"] == "missing":
        yield f"{draft.origin(path)}: {path} is missing: {_documentation(location)}"
    else:
        yield f"{draft.origin(path)}: {path} {describe_error(problem)}"


def _documentation(location: Sequence[str | int]) -> str:
    """The docstring of a missing key, or the keys of a missing section."""
    model = model_at(RunConfig, location[:-1])
    info = model.model_fields.get(str(location[-1]))
    if model is RunConfig:
        keys = _SECTIONS[str(location[-1])].model_fields
        return f"it has the keys {', '.join(keys)}"
    return (info.description or "").split("\n")[0] if info else "the list is too short"
