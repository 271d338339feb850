"""`deberta card`: what was measured, on the cards of an export."""

from pathlib import Path
from typing import Annotated

import typer


def card_command(
    export: Annotated[
        Path, typer.Argument(metavar="EXPORT", help="Folder written by `deberta export`.")
    ],
    scores: Annotated[
        list[Path],
        typer.Option(help="What `deberta evaluate` wrote: --output's file, or a results.json."),
    ],
) -> None:
    """Write scores on the model cards of an export, as a table and as the hub's metadata.

    Scores of other weights are refused. Given again, the new scores take the place of the old.

    Example: deberta card exports/base --scores glue/results.json --scores pairs.json
    """
    from pipeline.card_scores import add_scores, read_scores  # costs seconds to import

    for path in add_scores(export, read_scores(scores)):
        typer.echo(path)
