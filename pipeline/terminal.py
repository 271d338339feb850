"""Lines for the person who watches; a terminal that has gone away is no reason to end a run."""

import os
import sys


def tell(text: str) -> None:
    """Print to standard error at once.

    Args:
        text: One line or several.
    """
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # such as a closed pipe; files have everything that matters
        # Everything later goes nowhere, the interpreter's own last flush included.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
