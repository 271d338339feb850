"""The errors that are meant for people: both packages raise them, only entry points catch them.

A message names the file, the key or the number, and then the cure. Everything else that is
raised is a programmer's mistake and keeps its traceback.
"""

EXIT_USAGE = 2
EXIT_STOPPED = 75
EXIT_HANG = 86
EXIT_DIVERGED = 87
EXIT_CORRUPT = 88


class UserError(Exception):
    """Bad usage, configuration or input: reported in one message, never as a traceback."""

    exit_code = EXIT_USAGE


class CorruptError(UserError):
    """A dataset or checkpoint whose bytes are not what was written; the message names the file."""

    exit_code = EXIT_CORRUPT


class DivergedError(UserError):
    """Training produced non-finite steps for too long to go on."""

    exit_code = EXIT_DIVERGED
