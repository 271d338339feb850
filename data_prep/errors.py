"""The errors that are meant for people: both packages raise them, only entry points catch them.

A message names the file, the key or the number, and then the cure. Everything else that is
raised is a programmer's mistake and keeps its traceback.

Messages end in logs that others read, so the user and password of a URL that somebody gave for a
path are left out.
"""

import re

EXIT_USAGE = 2
EXIT_STOPPED = 75
EXIT_HANG = 86
EXIT_DIVERGED = 87
EXIT_CORRUPT = 88
_CREDENTIALS = re.compile(r"(?<=:/)/?[^/\s@]+@")


class UserError(Exception):
    """Bad usage, configuration or input: reported in one message, never as a traceback."""

    exit_code = EXIT_USAGE

    def __str__(self) -> str:
        return _CREDENTIALS.sub("/***@", super().__str__())


class CorruptError(UserError):
    """A dataset or checkpoint whose bytes are not what was written; the message names the file."""

    exit_code = EXIT_CORRUPT


class DivergedError(UserError):
    """Training produced non-finite steps for too long to go on."""

    exit_code = EXIT_DIVERGED
