"""Where the records of a task's split come from.

    a folder   the task's published files, as they are unpacked (CoLA/train.tsv, BoolQ/val.jsonl),
               or the columns of `datasets` in train.jsonl, .tsv, .csv, .parquet (also as a hub
               repository keeps them, train-00000-of-00001.parquet), or `save_to_disk`'s folder
    hub        each task's own repository on the hub
    org/name   another repository on the hub, in the columns of `datasets`

Below the folder given, files of a task lie in a folder of the task's published name or of its name
on the command line; asked for one task, the folder itself may be it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.evaluate.declaration import Split, TaskSpec
from pipeline.evaluate.labelled import csv_records, jsonl_records, read_sentences
from pipeline.evaluate.records import Record

HUB = "hub"
_STEMS = {"validation": ("validation", "valid", "val", "dev")}
_SUFFIXES = (".jsonl", ".tsv", ".csv", ".parquet")


@dataclass(frozen=True)
class DataSource:
    """Where the data of all asked tasks are."""

    data: str
    """A folder, "hub", or a repository on the hub."""
    is_for_one_task: bool = False
    """Whether the folder itself may hold the task's files."""

    def read(self, spec: TaskSpec, splits: Sequence[Split], is_labelled: bool) -> list[Any]:
        """Read examples.

        Args:
            spec: The task.
            splits: Its splits, read one after the other.
            is_labelled: Whether every example must have a label.

        Returns:
            The examples, at least one.

        Raises:
            UserError: Data are missing or not of this task; the message names file and line.
        """
        examples = []
        for split in splits:
            found = []
            for record in self.records(spec, split):
                found += spec.read(record, is_labelled)
            if not found:
                raise UserError(f"{self.data}: the {split.name} split of {spec.name} is empty")
            examples += found
        return examples

    def has(self, spec: TaskSpec, split: Split) -> bool:
        """Tell whether a split is in a local folder.

        Args:
            spec: The task.
            split: Its split.

        Returns:
            Whether it is there; True for a repository on the hub.
        """
        if not Path(self.data).is_dir():
            return True
        if self._published(spec, split) or self._plain(spec, split):
            return True
        return any(split.name in self._on_disk(folder) for folder in self._saved(spec, split))

    def has_labels(self, spec: TaskSpec, split: Split) -> bool:
        """Tell whether a split is there with its labels, by its first record.

        Args:
            spec: The task.
            split: Its split.

        Returns:
            Whether both are.
        """
        try:
            first = next(self.records(spec, split), None) if self.has(spec, split) else None
        except UserError:
            if Path(self.data).is_dir():
                raise
            return False  # another repository on the hub may lack it
        return first is not None and first.has("label") and first.value("label") != -1

    def records(self, spec: TaskSpec, split: Split) -> Iterator[Record]:
        """Find the records of a split.

        Args:
            spec: The task.
            split: Its split.

        Yields:
            The records, in order.

        Raises:
            UserError: There are none, or a file is unusable.
        """
        for row, (where, values) in enumerate(self._rows(spec, split)):
            # Files of one language have no column that says so.
            if split.only is None or values.get(split.only[0], split.only[1]) == split.only[1]:
                yield Record(where, row, values)

    def _rows(self, spec: TaskSpec, split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
        """Choose the reader."""
        if not Path(self.data).is_dir():
            yield from _numbered(self._from_hub(spec, split), f"{self.data}, {split.name}")
            return
        if files := self._published(spec, split) or self._plain(spec, split):
            for path in files:
                is_published = any(path.match(pattern) for pattern in split.files)
                yield from file_rows(
                    path,
                    is_tagging=spec.kind == "tagging",
                    columns=split.columns if is_published else (),
                    skips_ragged=split.skips_ragged,
                )
            return
        for folder in self._saved(spec, split):
            tables = self._on_disk(folder)
            if split.name in tables:
                yield from _numbered(tables[split.name], f"{folder}, {split.name}")
                return
        raise UserError(self._missing(spec, split))

    def _missing(self, spec: TaskSpec, split: Split) -> str:
        """Say what was looked for, and how to get it."""
        folder = Path(self.data) / spec.folder
        names = (*split.files, f"{split.name}.jsonl")
        wanted = " or ".join(str(folder / (split.config or "") / name) for name in names[-1:])
        published = f"{folder / split.files[0]}, or " if split.files else ""
        return (
            f"{self.data}: no data for the {split.name} split of {spec.name}: put {published}"
            f"{wanted} (columns as in `datasets`; .tsv, .csv and .parquet too) there, or give "
            "--data hub where there is a network"
        )

    def _folders(self, spec: TaskSpec) -> list[Path]:
        """Folders in which the task may lie."""
        root = Path(self.data)
        names = {spec.folder, spec.name, spec.name.replace("-", "_")}
        found = [root / name for name in sorted(names) if (root / name).is_dir()]
        is_itself = root.name.casefold() in {name.casefold() for name in names}
        return [*found, *([root] if self.is_for_one_task or is_itself else [])]

    def _published(self, spec: TaskSpec, split: Split) -> list[Path]:
        """Files under their published names."""
        for folder in self._folders(spec):
            for pattern in split.files:
                if found := sorted(folder.glob(pattern)):
                    return found
        return []

    def _plain(self, spec: TaskSpec, split: Split) -> list[Path]:
        """Files named by the split."""
        for folder in self._configured(spec, split):
            for stem in _STEMS.get(split.name, (split.name,)):
                for suffix in _SUFFIXES:
                    for pattern in (f"{stem}{suffix}", f"{stem}-*-of-*{suffix}"):
                        if found := sorted(folder.glob(pattern)):
                            return found
        return []

    def _configured(self, spec: TaskSpec, split: Split) -> list[Path]:
        """Folders of a split's own configuration before those of the task."""
        folders = self._folders(spec)
        return [f / split.config for f in folders] if split.config else folders

    def _saved(self, spec: TaskSpec, split: Split) -> list[Path]:
        """Folders that `save_to_disk` wrote."""
        return [f for f in self._configured(spec, split) if (f / "dataset_dict.json").is_file()]

    def _on_disk(self, folder: Path) -> Any:
        """Open a folder that `save_to_disk` wrote."""
        import datasets  # costs seconds to import

        try:
            return datasets.load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: `datasets` cannot open this folder: {error}") from error

    def _from_hub(self, spec: TaskSpec, split: Split) -> Any:
        """Download a split."""
        import datasets

        repository, config = spec.hub
        if self.data != HUB:
            repository = self.data
        try:
            return datasets.load_dataset(repository, split.config or config, split=split.name)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"--data {self.data}: it is no folder here, and {repository} cannot be had from "
                f"the hub ({reason}); copy its files to a folder {spec.folder} and give the folder "
                "above it as --data"
            ) from error


def _numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Add the place of each row of a table."""
    for row, values in enumerate(rows):
        yield f"{name}, row {row}", values


def file_rows(
    path: Path,
    *,
    is_tagging: bool = False,
    columns: Sequence[str] = (),
    skips_ragged: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read one file by its suffix.

    Args:
        path: .parquet, .jsonl, .tsv, .csv, or a JSON document.
        is_tagging: Whether other files are CoNLL's.
        columns: Names of the columns of a table without a header.
        skips_ragged: Leave broken rows of a table out.

    Yields:
        Where each record stands, and its values.

    Raises:
        UserError: The file is unusable.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _numbered(_parquet_rows(path), str(path))
    elif suffix == ".jsonl":
        for line, values in jsonl_records(path):
            yield f"{path}, line {line}", values
    elif suffix in (".tsv", ".csv"):
        for line, values in csv_records(path, columns, skips_ragged=skips_ragged):
            yield f"{path}, line {line}", values
    elif is_tagging:
        for sentence in read_sentences(path):
            values = {"tokens": sentence.words, "ner_tags": sentence.tags}
            yield f"{path}, line {sentence.line}", {**values, "document_id": sentence.document}
    else:
        yield from _json_document(path)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: no readable Parquet file: {error}") from error


def _json_document(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the items of `data` in a JSON document, or the document itself."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON in UTF-8: {error}") from error
    items = document.get("data", [document]) if isinstance(document, dict) else document
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{path}: holds no JSON object, and none with a list `data` of objects")
    for number, item in enumerate(items, start=1):
        yield f"{path}, item {number}", item
