"""Sources and options of a command: its own words, or a recipe in their place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from data_prep.build_plan import BuildOptions
from data_prep.errors import UserError

RecipeOption = Annotated[
    Path | None,
    typer.Option(help="A .toml or .yaml file that names sources, fields, weights and cleaning."),
]
_IN_RECIPE = (
    "sources",
    "text_field",
    "txt_document",
    "max_document_bytes",
    "min_characters",
    "clean",
    "heldout_fraction",
    "unit_bytes",
    "shard_tokens",
)


def sources_and_options(
    context: typer.Context,
    sources: Sequence[str] | None,
    recipe: Path | None,
    options: BuildOptions,
) -> tuple[list[str], BuildOptions]:
    """Choose between the words of a command and a recipe.

    Args:
        context: The command, which knows what was typed.
        sources: Those that were typed.
        recipe: The file that was named.
        options: What the words say.

    Returns:
        Sources, and the options of their build.

    Raises:
        UserError: Both or neither were given, or the recipe is impossible.
    """
    if recipe is None:
        return list(sources or ()), options
    typed = [name for name in _IN_RECIPE if _was_typed(context, name)]
    if typed:
        names = ", ".join(
            name if name == "sources" else f"--{name.replace('_', '-')}" for name in typed
        )
        raise UserError(f"--recipe {recipe} says this already: {names}; write them into the file")
    # Here, because a command without a recipe needs no pydantic.
    from data_prep.recipe import load_recipe

    return load_recipe(recipe)


def _was_typed(context: typer.Context, name: str) -> bool:
    # By name: typer brings a click of its own along, whose values are not those of another one.
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
