"""A corpus as a file: its sources, how each is read and cleaned, what it weighs in training.

    # corpus.toml, or the same as YAML
    heldout_fraction = 0.005
    clean = ["fix-unicode", "gopher"]

    [[sources]]
    path = "wiki/*.parquet"
    weight = 3.0

    [[sources]]
    path = "forum.jsonl.zst"
    text_field = "body"
    clean = ["fix-unicode", "c4", "email", "ip"]

- `load_recipe`: the file, checked, as sources and options of a build.

A path is what could stand on the command line: a file, a folder, a glob or a URL, seen from where
the command runs. What a source does not say is what the file says for all, or the default. A weight
says how often training reads the source while one of weight 1 is read once (`data.source_weights`).
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.build_plan import SHARD_TOKENS, BuildOptions
from data_prep.cleaning import CleaningOptions
from data_prep.documents import ReadOptions
from data_prep.errors import UserError
from data_prep.handling import SourceHandling
from data_prep.source_units import TARGET_BYTES

_READ = ReadOptions()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Source(_Strict):
    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    text_field: str | None = None
    txt_document: Literal["file", "line"] | None = None
    max_document_bytes: int | None = None
    min_characters: int | None = None
    clean: list[str] | None = None


class _File(_Strict):
    sources: Annotated[list[_Source], Field(min_length=1)]
    text_field: str = _READ.text_field
    txt_document: Literal["file", "line"] = _READ.txt_document
    max_document_bytes: int = _READ.max_document_bytes
    min_characters: int = 1
    clean: list[str] = Field(default_factory=list)
    heldout_fraction: float = 0.01
    unit_bytes: int = TARGET_BYTES
    shard_tokens: int = SHARD_TOKENS


def load_recipe(path: Path) -> tuple[list[str], BuildOptions]:
    """Read a recipe.

    Args:
        path: A .toml, .yaml or .yml file.

    Returns:
        The sources in their order, and the options of their build.

    Raises:
        UserError: The file cannot be read or says something impossible; the message names the key.
    """
    try:
        recipe = _File.model_validate(_parsed(path))
    except ValidationError as error:
        problems = "; ".join(_in_words(problem) for problem in error.errors())
        raise UserError(f"{path}: {problems}") from error
    names = [source.path for source in recipe.sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: sources name {name} twice; name it once")
    try:
        return names, _options(path, recipe)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _parsed(path: Path) -> Any:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}; name a .toml or .yaml") from error
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if path.suffix != ".toml":
        raise UserError(f"recipe {path}: its name must end in .toml, .yaml or .yml")
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from error


def _in_words(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "the file"
    if problem["type"] == "extra_forbidden":
        model = _Source if problem["loc"][0] == "sources" else _File
        return f"{place} is unknown; there are {', '.join(model.model_fields)}"
    return f"{place}: {problem['msg']}"


def _options(path: Path, recipe: _File) -> BuildOptions:
    return BuildOptions(
        read=ReadOptions(recipe.text_field, recipe.txt_document, recipe.max_document_bytes),
        cleaning=CleaningOptions.parse(recipe.clean, recipe.min_characters),
        heldout_fraction=recipe.heldout_fraction,
        unit_bytes=recipe.unit_bytes,
        shard_tokens=recipe.shard_tokens,
        others=tuple(
            (source.path, _handling(source, recipe))
            for source in recipe.sources
            if len(source.model_fields_set - {"path", "weight"})
        ),
        weights=tuple((source.path, source.weight) for source in recipe.sources),
        recipe=str(path),
    )


def _handling(source: _Source, recipe: _File) -> SourceHandling:
    def chosen(key: str) -> Any:
        own = getattr(source, key)
        return getattr(recipe, key) if own is None else own

    read = ReadOptions(*map(chosen, ("text_field", "txt_document", "max_document_bytes")))
    return SourceHandling(read, CleaningOptions.parse(chosen("clean"), chosen("min_characters")))
