"""Configuration files: TOML and JSON text to plain dicts, with readable errors."""

import json
import tomllib
from pathlib import Path
from typing import Any

from data_prep.errors import UserError


class JsonObject(dict[str, Any]):
    """A JSON object that remembers keys written twice, of which `json` keeps only the last.

    Attributes:
        duplicates: Keys that occur more than once.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.duplicates = sorted({name for name in names if names.count(name) > 1})


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Args:
        path: The file; UTF-8, strict JSON (no comments, no trailing commas).

    Returns:
        Its content; every object is a `JsonObject`.

    Raises:
        UserError: If there is no such file, it is not UTF-8 or not JSON, or not an object.
    """
    text = _read_text(path)
    try:
        document = json.loads(text, object_pairs_hook=JsonObject)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
            " (comments, trailing commas and single quotes are not JSON)"
        ) from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: the top level must be an object {{...}}")
    return document


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file, UTF-8.

    Returns:
        Its content.

    Raises:
        UserError: If there is no such file, it is not UTF-8 or not TOML.
    """
    try:
        return tomllib.loads(_read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from None


def _read_text(path: str | Path) -> str:
    """Read UTF-8 text, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
