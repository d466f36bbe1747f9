"""Read the rows of a data source: a Hub name, a folder, a file, or the package's own problems."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli import quickstart
from dude_cli.config import HUB_NAME, DataSource
from dude_cli.data.columns import Columns, check_columns, keep_columns
from dude_cli.data.row_files import (
    FILE_SUFFIXES,
    SUFFIXES_HINT,
    Row,
    Rows,
    first_line,
    numbered,
    read_file,
    without_fillers,
)
from dude_cli.errors import DataError, nearest
from dude_cli.system.cache_dir import folder_cache

if TYPE_CHECKING:
    from datasets import Dataset

EMBEDDED_SPLITS = ("train", "dev", "test")


@dataclass
class Seen:
    """What reading sources shows beside their rows.

    `revisions` has the commits of those from the Hub, by path and the revision asked for, and `unread` the columns that
    are not read, by path.
    """

    revisions: dict[str, str] = field(default_factory=dict)
    unread: dict[str, list[str]] = field(default_factory=dict)

    def note(self, path: str, unread: list[str]) -> None:
        """Add what an entry does not read of a path; another one may."""
        self.unread[path] = [name for name in self.unread.get(path, unread) if name in unread]

    def notes(self) -> list[str]:
        """What to say of columns that no entry reads."""
        return [
            f"note: {path}: columns that are not read: {', '.join(unread)}"
            for path, unread in self.unread.items()
            if unread
        ]


def read_source(source: DataSource, columns: Columns, seen: Seen) -> Rows:
    """Return the rows of a source, each with just the columns asked for; what else there is to know goes to `seen`.

    Raises DataError where it cannot be read, lacks a required column, or has a null in one.
    """
    found = _open_source(source)
    if not isinstance(found, Rows):
        return _read_dataset(source, found, columns, seen)
    there = list(_first_values(found.values))
    check_columns(source, there, columns, empty=not found.values)
    return _kept(source, found, columns, there, seen)


def first_values(source: DataSource) -> Row | None:
    """The columns of a source, each with its first value, None of one without rows; a table's are all in its first row.

    Raises DataError where it cannot be read.
    """
    found = _open_source(source)
    if isinstance(found, Rows):
        return _first_values(found.values) if found.values else None
    return dict(found[0]) if len(found) else None


def _first_values(rows: Sequence[Row]) -> Row:
    """Each column that a row has, in order, with its first value that is not null."""
    first: Row = {}
    for row in rows:
        for column, value in row.items():
            if first.get(column) is None:
                first[column] = value
    return first


def _open_source(source: DataSource) -> Rows | Dataset:
    """The rows of a file or of the package's own problems; of a folder or a Hub name what `datasets` makes of it."""
    path = _local_path(source)
    if source.path == quickstart.NAME:
        return _read_embedded(source)
    if path.is_file():
        return _read_file(source, path)
    if path.is_dir() or not _looks_like_a_path(source.path):
        return _dataset(source)
    raise _missing_path(source)


def _kept(source: DataSource, rows: Rows, columns: Columns, there: list[str], seen: Seen) -> Rows:
    """The rows with just the columns asked for; those of the columns `there` that are not among them are noted."""
    kept = keep_columns(source, rows, columns)
    seen.note(source.path, columns.unread(there, kept.values))
    return kept


def _local_path(source: DataSource) -> Path:
    """Where the source would be on this machine; `~` is the home folder."""
    return Path(os.path.expanduser(source.path))


def _looks_like_a_path(text: str) -> bool:
    """A Hub name is `name` or `owner/name`; anything else, or a data file's suffix, means a local path."""
    return text.startswith((".", "/", "~")) or text.endswith(FILE_SUFFIXES) or not HUB_NAME.fullmatch(text)


def _missing_path(source: DataSource) -> DataError:
    path = _local_path(source)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, siblings)
    parts = [part.strip() for part in source.path.split(",")]
    if len(parts) > 1 and all(part and Path(os.path.expanduser(part)).exists() for part in parts):
        fix = "give each on its own: in a config an entry each, on the command line the option once for each"
    elif close:
        fix = f"did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    else:
        fix = f"give the path of a folder, of a file named {SUFFIXES_HINT}, or a Hub name such as owner/name"
    return DataError(f"no such data file or folder: {source.path}", where="data", fix=fix)


# --- slices -----------------------------------------------------------------------------------------------------


def _slice_rows(source: DataSource, splits: dict[str, Callable[[], Rows]]) -> Rows:
    """Return the rows that `source.split` names; `splits` gives a reader of the rows of each split there is."""
    from datasets import ReadInstruction

    named = set(re.findall(r"(?:^|\+)\s*(\w+)", source.split))
    loaded = {name: read() if name in named else Rows([], []) for name, read in splits.items()}
    lengths = {name: len(rows.values) for name, rows in loaded.items()}
    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise _bad_split(source, list(splits), error) from error
    slices = [(loaded[part.splitname], slice(part.from_, part.to)) for part in parts]
    return _joined([Rows(rows.values[part], rows.places[part]) for rows, part in slices])


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows([row for rows in parts for row in rows.values], [place for rows in parts for place in rows.places])


def _bad_split(source: DataSource, splits: list[str], error: Exception) -> DataError:
    return DataError(
        f"cannot take split {source.split!r}: {first_line(error)}",
        where=source.path,
        fix=f"the splits there are: {', '.join(splits)}; a slice is written like train[:1000] or train[10%:]",
    )


def _read_file(source: DataSource, path: Path) -> Rows:
    if source.name is not None or source.revision is not None:
        raise DataError(
            f"a file has no name ({source.name}) and no revision ({source.revision})",
            where=source.path,
            fix="remove `name` and `revision` from this source; they belong to data sets on the Hub and to folders",
        )
    return _slice_rows(source, {"train": lambda: read_file(path)})


# --- data sets --------------------------------------------------------------------------------------------------


def _read_embedded(source: DataSource) -> Rows:
    def reader(split: str) -> Callable[[], Rows]:
        return lambda: numbered(quickstart.rows(split), f"{source.path}, split {split}")

    return _slice_rows(source, {split: reader(split) for split in EMBEDDED_SPLITS})


def _read_dataset(source: DataSource, dataset: Dataset, columns: Columns, seen: Seen) -> Rows:
    commits = _commits(dataset)
    if commits:
        asked = source.path if source.revision is None else f"{source.path}@{source.revision}"
        seen.revisions[asked] = ", ".join(commits)
    there = list(dataset.column_names)
    check_columns(source, there, columns, empty=len(dataset) == 0)
    kept = [name for name in columns.read() if name in there]
    values = dataset.select_columns(kept).with_format(None)[:]
    rows = [dict(zip(kept, cells, strict=True)) for cells in zip(*(values[name] for name in kept), strict=True)]
    found = numbered(without_fillers(rows), f"{source.path}, split {source.split}")
    return _kept(source, found, columns, there, seen)


def _dataset(source: DataSource) -> Dataset:
    try:
        return _open_dataset(source)
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow and the Hub client raise dozens of types; --debug shows which
        raise _unreadable_dataset(source, error) from error


def _open_dataset(source: DataSource) -> Dataset:
    import datasets

    folder = _local_path(source)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _open_saved(source, datasets.load_from_disk(folder))
    cache = {"cache_dir": str(folder_cache(folder))} if folder.is_dir() else {}
    return datasets.load_dataset(str(folder), source.name, split=source.split, revision=source.revision, **cache)


def _commits(dataset: Dataset) -> list[str]:
    """The commits that a data set's files are from, on the Hub: `datasets` keeps their full addresses."""
    addresses = " ".join(dataset.info.download_checksums or {})
    return sorted(set(re.findall(r"hf://datasets/[^@ ]+@([0-9a-f]{40})/", addresses)))


def _open_saved(source: DataSource, saved: Any) -> Dataset:
    """Take the split of a folder that `save_to_disk` wrote; one without splits has one, called train."""
    import datasets

    splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    lengths = {name: len(dataset) for name, dataset in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise _bad_split(source, list(splits), error) from error
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _unreadable_dataset(source: DataSource, error: Exception) -> DataError:
    """Say in the user's terms why a folder or a Hub data set did not open."""
    message = first_line(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "gated" in message.lower() or "GatedRepoError" in kinds:
        what, fix = (
            f"the data set {source.path} is gated",
            (f"ask for access at https://huggingface.co/datasets/{source.path}, then run `hf auth login`"),
        )
    elif kinds & {"ConnectionError", "ConnectTimeout", "ReadTimeout", "OfflineModeIsEnabled", "ConnectError"}:
        what, fix = (
            f"cannot reach the data set {source.path}: {message}",
            (
                "it is neither a local path nor in the local cache: connect once to download it (and unset "
                "HF_HUB_OFFLINE), or give the path of a local copy"
            ),
        )
    elif "DatasetNotFoundError" in kinds:
        what, fix = (
            f"no such data set: {message}",
            ("check the spelling at https://huggingface.co/datasets; for a private one run `hf auth login`"),
        )
    elif "BuilderConfig" in message or "Config name is missing" in message:
        what, fix = f"cannot open configuration {source.name!r}: {message}", "set `name` to one of those"
    elif "Unknown split" in message or "instruction format" in message:
        what, fix = (
            f"cannot take split {source.split!r}: {message}",
            ("set `split` to one of those, or a slice such as train[:1000] or train[10%:]"),
        )
    elif "DatasetGenerationError" in kinds:
        what, fix = (
            f"cannot open the data set: {_why_not_generated(error)}",
            "write its files with the same columns and types; or give each file on its own, and a broken row is named",
        )
    else:
        what, fix = (
            f"cannot open the data set: {type(error).__name__}: {message}",
            ("check that `datasets.load_dataset` opens it (--debug shows the whole cause)"),
        )
    return DataError(what, where=source.path, fix=fix)


def _why_not_generated(error: Exception) -> str:
    """Why files make no table, on one line.

    The first line of the error never says it: the next ones may, with the file, else the cause does.
    """
    _, _, told = str(error).strip().partition("\n")
    cause = error.__cause__
    if not told and cause is not None:
        told = f"{type(cause).__name__}: {cause}"
    return " ".join((told or str(error)).split())[:500]
