"""Findings: what is wrong with a configuration, in lines for people.

Every check of this layer collects lines instead of stopping at the first; `raise_findings` turns
them into one `UserError`. `describe_error` translates one pydantic error into "what is allowed",
and `nearest` adds the name that was probably meant.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from data_prep.errors import UserError

_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number, without a decimal point or exponent",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a block of keys",
}


def nearest(name: str, allowed: Iterable[str]) -> str:
    """End of a sentence about an unknown name: the closest valid name, or all of them.

    Args:
        name: What was written.
        allowed: The valid names.

    Returns:
        ", did you mean 'x'?" or "; valid: a, b, c".
    """
    names = list(allowed)
    matches = difflib.get_close_matches(name, names, n=1)
    if matches:
        return f", did you mean '{matches[0]}'?"
    return f"; valid: {', '.join(names)}"


def dotted(location: Sequence[str | int]) -> str:
    """Join a pydantic location to the dotted path that people type.

    Args:
        location: Keys and list positions from the root, e.g. ("optimizer", "betas", 1).

    Returns:
        For example "optimizer.betas[1]".
    """
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def model_at(root: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """Follow field names down a tree of pydantic models.

    Args:
        root: The outermost model.
        location: Names of fields that hold models, or models or None.

    Returns:
        The model at the end; the last one on the way if the location leaves the tree.
    """
    model = root
    for name in location:
        field = model.model_fields.get(str(name))
        candidates = () if field is None else (field.annotation, *get_args(field.annotation))
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return model


def describe_error(error: Mapping[str, Any]) -> str:
    """Say what the value was and what is allowed.

    Args:
        error: One entry of `pydantic.ValidationError.errors()`, of any type but `missing` and
            `extra_forbidden`, whose wording depends on the caller.

    Returns:
        For example "is 1.5; it must be less than 1.0".
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        allowed = f"{words} {context[name]}"
    elif kind == "literal_error":
        allowed = context["expected"]
    elif kind == "too_long":
        allowed = f"a list of {context['max_length']}"
    elif kind in _EXPECTED:
        allowed = _EXPECTED[kind]
    else:
        return f"is {show(error['input'])}; {error['msg']}"
    return f"is {show(error['input'])}; it must be {allowed}"


def show(value: object) -> str:
    """Write a value as its file would, shortened to one line.

    Args:
        value: A value that came from TOML, JSON or a command line.

    Returns:
        JSON text of at most 80 characters.
    """
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def raise_findings(subject: str, findings: Sequence[str]) -> None:
    """Raise one error for all findings; return if there are none.

    Args:
        subject: The file, or what was put together, e.g. "ds_configs/zero2_bf16.json".
        findings: One line each, without the subject.

    Raises:
        UserError: If there is at least one finding.
    """
    if len(findings) == 1:
        raise UserError(f"{subject}: {findings[0]}")
    if findings:
        lines = "".join(f"\n  - {finding}" for finding in findings)
        raise UserError(f"{subject} has {len(findings)} problems:{lines}")
