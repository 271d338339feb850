"""Names in the run configuration: which there are, and what was meant by one that there is not."""

from collections.abc import Sequence

from pipeline.config import RunConfig, Section
from pipeline.ds_schema import REFUSED, DeepSpeedJson
from pipeline.findings import dotted, model_at, nearest

SECTIONS: dict[str, type[Section]] = {
    name: model
    for name in RunConfig.model_fields
    if issubclass(model := model_at(RunConfig, (name,)), Section) and model is not RunConfig
}
"""Section name -> its model, in the order of RunConfig."""

PLAIN_KEYS = tuple(name for name in RunConfig.model_fields if name not in SECTIONS)
"""Keys of RunConfig itself that are no sections: `recipe`."""

DEEPSPEED_NAMES = {*DeepSpeedJson.model_fields, *(key for key in REFUSED if "." not in key)}
"""Top-level names that belong in the other file."""


def wrong_name(path: Sequence[str]) -> str | None:
    """Say what is wrong with the name of a key, and name the nearest valid one.

    Args:
        path: The dotted path, split: ("schedule", "max_steps").

    Returns:
        The finding, or None for a valid name.
    """
    name, section, key = ".".join(path), path[0], path[-1]
    if section in DEEPSPEED_NAMES and section not in SECTIONS:
        return f"{name} belongs in the DeepSpeed JSON (--deepspeed_config)"
    if section in PLAIN_KEYS:
        return None if len(path) == 1 else f"{section} is no section; write {section}=VALUE"
    if len(path) == 2 and section in SECTIONS and key in SECTIONS[section].model_fields:
        return None
    if key in PLAIN_KEYS:
        return f"unknown key '{name}', did you mean '{key}'? A file has it above all sections"
    homes = [f"{home}.{key}" for home, model in SECTIONS.items() if key in model.model_fields]
    if homes and len(path) <= 2:
        return f"unknown key '{name}', did you mean {' or '.join(repr(home) for home in homes)}?"
    if section not in SECTIONS:
        kind = "key" if len(path) == 1 else "section"
        return f"unknown {kind} '{section}'{nearest(section, RunConfig.model_fields)}"
    if len(path) == 1:
        keys = ", ".join(SECTIONS[name].model_fields)
        return f"'{name}' is a section; name one of its keys: {keys}"
    inner = model_at(RunConfig, path[:2])
    if len(path) > 2 and inner is not SECTIONS[section]:
        example = ", ".join(f"{field}=..." for field in inner.model_fields)
        return (
            f"{path[0]}.{path[1]} is a list; write it whole: {path[0]}.{path[1]}='[{{{example}}}]'"
        )
    return f"unknown key '{name}'{nearest(key, SECTIONS[section].model_fields)}"


def unknown_key(location: Sequence[str | int]) -> str:
    """Say what is wrong with a name that RunConfig does not have.

    Args:
        location: Keys and list positions from the root, as pydantic gives them.

    Returns:
        The finding.
    """
    if any(isinstance(part, int) for part in location):
        fields = model_at(RunConfig, location[:-1]).model_fields
        return f"unknown key '{dotted(location)}'{nearest(str(location[-1]), fields)}"
    names = [str(part) for part in location]
    return wrong_name(names) or f"unknown key '{dotted(location)}'"


def meaning_of(location: Sequence[str | int]) -> str:
    """Tell what a missing key is for.

    Args:
        location: Keys and list positions from the root.

    Returns:
        The first line of its docstring, or the keys of a missing section.
    """
    model = model_at(RunConfig, location[:-1])
    if model is RunConfig:
        return f"it has the keys {', '.join(SECTIONS[str(location[-1])].model_fields)}"
    info = model.model_fields.get(str(location[-1]))
    return (info.description or "").split("\n")[0] if info else "the list is too short"
