"""One record of a task's data, and the typed values that readers take from it.

A record is a line of a file or a row of a `datasets` table. Published files and `datasets` name
the same columns differently: every getter takes all names, and the first that is there counts.
What is missing or of another type is said with the place of the record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError
from pipeline.evaluate.labelled import shown

_SPELLINGS = {
    "e": "entailment",
    "n": "neutral",
    "c": "contradiction",
    "contradictory": "contradiction",  # multinli.train.*.tsv of XNLI's translations
}


@dataclass(frozen=True)
class Record:
    """Values by column, and where they stand."""

    where: str
    """For messages: file and line, or table and row."""
    row: int
    """Number of the record in its split, from 0."""
    values: Mapping[str, Any]

    def has(self, *names: str) -> bool:
        """Tell whether one of the columns is there and not empty.

        Args:
            names: Names of the column.

        Returns:
            Whether it is.
        """
        return any(self.values.get(name) is not None for name in names)

    def value(self, *names: str) -> Any:
        """Take a value.

        Args:
            names: Names of the column; the first that is there counts.

        Returns:
            Its value.

        Raises:
            UserError: None is there.
        """
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        wanted = " or ".join(map(repr, names))
        raise UserError(
            f"{self.where}: no column {wanted}; there are "
            f"{', '.join(repr(str(name)) for name in self.values)}: is this the file of another "
            "task?"
        )

    def text(self, *names: str) -> str:
        """Take a text.

        Args:
            names: Names of the column.

        Returns:
            The text as it stands.

        Raises:
            UserError: There is none.
        """
        value = self.value(*names)
        # JSON can spell halves of characters, which no text has.
        if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{self.where}: {names[0]} is {shown(value)}, which is no text")
        return value

    def whole(self, *names: str) -> int:
        """Take a whole number.

        Args:
            names: Names of the column.

        Returns:
            The number.

        Raises:
            UserError: There is none.
        """
        value = self.value(*names)
        try:
            return int(str(value))
        except ValueError as error:
            raise UserError(
                f"{self.where}: {names[0]} is {shown(value)}, which is no whole number"
            ) from error

    def number(self, *names: str) -> float:
        """Take a number.

        Args:
            names: Names of the column.

        Returns:
            The number.

        Raises:
            UserError: There is none, or it is not finite.
        """
        value = self.value(*names)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number != number or abs(number) == float("inf"):
            raise UserError(f"{self.where}: {names[0]} is {shown(value)}, which is no number")
        return number

    def label(self, labels: tuple[str, ...], *names: str) -> int:
        """Take a class: its name, its number in the order of `datasets`, or a truth value.

        Args:
            labels: Names of the classes.
            names: Names of the column.

        Returns:
            The number of the class.

        Raises:
            UserError: There is none, or it is none of these.
        """
        value = self.value(*names)
        text = str(value).strip().casefold()
        known = [label.casefold() for label in labels]
        for spelling in (text, _SPELLINGS.get(text)):
            if spelling in known:
                return known.index(spelling)
        if text.isdecimal() and int(text) < len(labels):
            return int(text)
        raise UserError(
            f"{self.where}: {names[0]} is {shown(value)}; the classes are {', '.join(labels)}"
        )

    def place(self, start: int, end: int, text: str, what: str) -> tuple[int, int]:
        """Hold a place against the text that it is in.

        Args:
            start: First character.
            end: The one behind the last.
            text: The text.
            what: Name of the place, for messages.

        Returns:
            Both ends.

        Raises:
            UserError: The text has no such place.
        """
        if not 0 <= start < end <= len(text):
            raise UserError(
                f"{self.where}: {what} is at the characters {start} to {end} of a text with "
                f"{len(text)}: {shown(text)}"
            )
        return start, end

    def inner(self, values: Any, what: str) -> "Record":
        """Look into a nested object.

        Args:
            values: What the column holds.
            what: Its name, for messages.

        Returns:
            A record of its values.

        Raises:
            UserError: It is no object.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{self.where}: {what} is {shown(values)}, which is no object {{...}}")
        return Record(f"{self.where}, {what}", self.row, values)

    def items(self, *names: str) -> list[Any]:
        """Take a list.

        Args:
            names: Names of the column.

        Returns:
            Its items.

        Raises:
            UserError: There is none.
        """
        value = self.value(*names)
        if not isinstance(value, list | tuple):
            raise UserError(f"{self.where}: {names[0]} is {shown(value)}, which is no list [...]")
        return list(value)
