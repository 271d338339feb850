"""The text that sbatch gets: a plain script of slurm/ with the options and parameters of a job.

- `PlainScript`: a script of slurm/ in its parts; what works by hand is what is submitted.
- `render`: header, parameters, body, as one script.

Every value that came from a person is one quoted word of the shell, or is refused: nothing in it is
ever run.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from data_prep.errors import UserError

_HEADER = re.compile(r"#SBATCH\s+--([a-z-]+)(?:=(\S+))?(?:\s+#\s*(.*))?\s*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
Options = Mapping[str, str | None]
Parameters = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class PlainScript:
    """A script of slurm/.

    Attributes:
        name: Its file's name.
        options: sbatch option without dashes -> value; None for a flag.
        reasons: Option -> why it is there, where the script says so.
        body: Everything behind the header.
    """

    name: str
    options: Options
    reasons: Mapping[str, str]
    body: str

    @classmethod
    def read(cls, path: Path) -> "PlainScript":
        """Take a script apart.

        Args:
            path: The script.

        Returns:
            Its parts.

        Raises:
            UserError: It is missing, or a line of its header is not `#SBATCH --option[=value]`.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such script; DEBERTA_HOME or ./slurm is not complete: copy it anew "
                "with `deberta submit --copy-scripts FOLDER`"
            ) from None
        options: dict[str, str | None] = {}
        reasons: dict[str, str] = {}
        last = 0
        for number, line in enumerate(lines, start=1):
            if not line.startswith("#SBATCH"):
                continue
            match = _HEADER.fullmatch(line)
            if match is None:
                raise UserError(
                    f"{path}, line {number}: '{line}': write one option a line, #SBATCH "
                    "--option=value  # reason"
                )
            options[match[1]] = match[2]
            if match[3]:
                reasons[match[1]] = match[3].strip()
            last = number
        body = "\n".join(lines[last:]).strip("\n")
        return cls(path.name, options, reasons, body)


def quote(value: str) -> str:
    """Quote a value as one word of the shell, and of sbatch's header.

    Args:
        value: What a person typed.

    Returns:
        The word.

    Raises:
        UserError: It holds a line break or another control character.
    """
    return shlex.quote(one_line(value))


def one_line(value: str) -> str:
    """Refuse what would begin a line of its own.

    Args:
        value: What a person typed.

    Returns:
        The same.

    Raises:
        UserError: It holds a line break or another control character.
    """
    if _CONTROL.search(value):
        raise UserError(f"{value!r}: a line break or control character cannot be in a job script")
    return value


def render(title: str, script: PlainScript, options: Options, parameters: Parameters) -> str:
    """Write the script of a job.

    Args:
        title: What the job is, for the first line.
        script: The plain script.
        options: All of the header, the plain script's included where they stay.
        parameters: Variable -> value, or words of an array.

    Returns:
        The script's text.

    Raises:
        UserError: A value cannot be in a script.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"quote": quote, "one_line": one_line}
    source = resources.files("pipeline.submit").joinpath("job.sbatch.j2")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        title=title,
        script=script.name,
        header=[_header_line(name, value, script) for name, value in options.items()],
        parameters=parameters,
        body=script.body,
    )


def _header_line(name: str, value: str | None, script: PlainScript) -> str:
    """Write an option; its reason stays as long as its value does."""
    text = f"--{name}" if value is None else f"--{name}={header_value(name, value)}"
    reason = script.reasons.get(name)
    return f"{text:<38} # {reason}" if reason else text


def header_value(name: str, value: str) -> str:
    """Quote a value for sbatch's header.

    Args:
        name: The option, for messages.
        value: Its value.

    Returns:
        The quoted value.

    Raises:
        UserError: It holds what sbatch would read in its own way.
    """
    if "\\" in value:
        raise UserError(
            f"--{name} {value}: sbatch reads backslashes in its own way; leave them out"
        )
    return quote(value)
