"""`deberta`: the commands that people type."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from data_prep.errors import UserError
from pipeline.commands_card import card_command
from pipeline.commands_checkpoint import checkpoint_app
from pipeline.commands_compare import compare_command
from pipeline.commands_doctor import doctor_command
from pipeline.commands_evaluate import evaluate_command
from pipeline.commands_export import export_command, export_onnx_command, push_command
from pipeline.commands_extend import extend_command
from pipeline.commands_launch import launch_command
from pipeline.commands_plan import plan_command
from pipeline.commands_report import report_command
from pipeline.commands_submit import status_command, submit_command
from pipeline.train import leave
from pipeline.train import run as run_training

app = typer.Typer(
    help="Pre-train, export and evaluate DeBERTaV3 models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(
    # What launchers start is a flat command with its own parser; this is the same one.
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    add_help_option=False,
)
def train(
    context: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Train in this process; `deberta train --help` for more."""
    raise typer.Exit(run_training([*(words or []), *context.args]))


app.command("export")(export_command)
app.command("export-onnx")(export_onnx_command)
app.command("push")(push_command)
app.command("evaluate")(evaluate_command)
app.command("card")(card_command)
app.command("compare")(compare_command)
app.command("extend")(extend_command)
app.command("launch")(launch_command)
app.command("plan")(plan_command)
app.command("doctor")(doctor_command)
app.command("submit")(submit_command)
app.command("status")(status_command)
app.command("report")(report_command)
app.add_typer(checkpoint_app, name="checkpoint")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="For training.")
    ] = None,
) -> None:
    """Go the whole way on the embedded corpus: text, tokenizer, shards, training, export, scores.

    Takes some minutes on two CPU cores; run again after an interruption to go on.

    Example: deberta demo --output demo
    """
    from pipeline.demo import Demo

    Demo(output, overrides or []).run()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what a user did wrong is told in one message, without a traceback.

    Args:
        argv: Words after the program's name; the process's own where None.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        if arguments[:1] == ["train"]:
            leave(run_training(arguments[1:]))
        app(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
