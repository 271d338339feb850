"""`deberta-prep report`: parse, call, write the page."""

from pathlib import Path
from typing import Annotated

import typer

from data_prep import console
from data_prep.errors import UserError
from data_prep.manifest import write_atomically


def register(app: typer.Typer) -> None:
    """Add the command to the program.

    Args:
        app: `deberta-prep`.
    """
    app.command()(report)


def report(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Dataset folder.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Page to write; DATASET.html beside the folder if not given."),
    ] = None,
    sample_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens over which pieces and fertility are counted.")
    ] = 50_000_000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON and write no page.")
    ] = False,
) -> None:
    """Write one HTML page about a dataset: sources, lengths, pieces, what was left out, checksums.

    Example: deberta-prep report dataset --output dataset.html
    """
    import json
    from dataclasses import asdict

    from data_prep.report import collect

    values = collect(dataset, sample_tokens)
    if as_json:
        console.write_line(json.dumps(asdict(values), indent=2))
        return
    from data_prep.report_page import render

    page = output or Path(f"{str(dataset).rstrip('/')}.html")
    if page.is_dir() or not page.parent.is_dir():
        raise UserError(f"--output {page}: not a file in an existing folder; name one")
    try:
        write_atomically(page, render(values).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(
            f"{page} cannot be written: {error.strerror}; name another --output"
        ) from error
    console.write_line(f"{page}: open it in a browser; it needs no other file")
