"""Files and folders that are whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link to somewhere else
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError, as other writes do, where safetensors has an error of its own."""
    from safetensors.torch import save_file

    with disk_errors(path):
        save_file(dict(tensors), path)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files to `folder`. Raises OSError as other writes do, where tokenizers has its own error."""
    with disk_errors(folder):
        tokenizer.save_pretrained(folder)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within, what safetensors or tokenizers say of a full disk becomes the OSError that other writes raise, of `path`.

    Both are written in Rust; the second one raises plain exceptions.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of `source` into `target`. Raises OSError at the first one that fails; shutil's would go on."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, copied out of the mapped file.

    There they are not aligned, and a matrix product may then round otherwise. Raises OSError and SafetensorError.
    """
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, of nobody else, that takes its place at the end.

    An exception leaves all as it was. A reader sees the old file or the new one. It is not synced, so a power cut may
    leave it damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place at the end; an exception leaves all as it was."""
    make_folder(path.parent)
    recover_folder(path)
    partial = path.with_name(f".{path.name}.partial")
    delete(partial)
    partial.mkdir()
    try:
        yield partial
        _sync_all(partial)
        _replace_folder(partial, path)
    finally:
        recover_folder(path)
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes it at the end; what is there by then is never replaced.

    An exception leaves all as it was. Raises OSError if `path` is anything but an empty folder at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        _sync_all(partial)
        try:
            os.rename(partial, path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Put the old folder back where a process ended just after it had stepped aside for a new one."""
    old = _aside(path)
    if old.exists() and not path.exists():
        with suppress(FileNotFoundError):  # another rank was faster
            os.rename(old, path)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, so that a crash does not take one that something was written to."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def delete(path: Path) -> None:
    """Delete a folder with all that is in it, or a file; of a link, the link alone. Nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def links_in(folder: Path) -> list[Path]:
    """The symbolic links in a folder, sorted; none is followed."""
    found = [Path(parent) / name for parent, folders, names in os.walk(folder) for name in (*folders, *names)]
    return sorted(path for path in found if path.is_symlink())


def size_bytes(folder: Path) -> int:
    """The bytes of all files in a folder; 0 without one."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def check_writable(folder: Path) -> None:
    """Raise OSError unless `folder` can be made and written to; nothing is left behind."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def sync(path: Path) -> None:
    """Ask the disk to hold a file's or a folder's contents before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        sync(path)


def _replace_folder(partial: Path, path: Path) -> None:
    # A folder cannot be renamed onto one that has files, so the old one steps aside first.
    old = _aside(path)
    delete(old)
    if os.path.lexists(path):
        os.rename(path, old)
    os.rename(partial, path)
    sync(path.parent)
    delete(old)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
