"""Encoded rows, kept for later runs: the same texts go through the same tokenizer once.

    <cache>/tokens/<key>.safetensors    one `TokenTable`, with its own SHA-256 in the header

The rows themselves are read each time, so a key is a function of what they hold now and of nothing that could be out of
date: no path, no time of a change. A file is mapped, not read: the ranks of one machine share its pages.
Processes may come at once: a file is renamed into place whole, and whoever has an older one open keeps it.
A file that cannot be read or written costs the time of encoding, never the run.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dude_cli.config import DataConfig
from dude_cli.data.row_files import first_line
from dude_cli.data.table import TokenTable
from dude_cli.system.cache_dir import cache_dir, prune
from dude_cli.system.files import disk_errors, new_file

Say = Callable[[str], None]


def encoded_once(key: str | None, encode: Callable[[], TokenTable], say: Say) -> TokenTable:
    """Return the table that is kept under `key`, or else that of `encode`, kept from now on; None keeps nothing."""
    if key is None:
        return encode()
    try:
        path = cache_dir("tokens") / f"{key}.safetensors"
    except RuntimeError as error:  # no home folder
        say(f"encoded rows are not kept: {error}")
        return encode()
    found = _read(path, say)
    if found is not None:
        return found
    table = encode()
    try:
        _write(table, path)
    except OSError as error:
        say(f"encoded rows are not kept: {path.parent}: {error.strerror or error}")
    return table


# --- the key ----------------------------------------------------------------------------------------------------


def token_key(tokenizer: Any, inputs: Iterable[Any], config: DataConfig, template: str | None) -> str | None:
    """Return what the encoding of `inputs` depends on, as a SHA-256: pairs of texts, conversations, of which kind.

    Conversations go through `template`, which is None where there are none.
    None for a tokenizer with code of its own, whose result may depend on anything.
    """
    content = _tokenizer_content(tokenizer, template)
    if content is None:
        return None
    settings = [config.max_length, config.train_on_inputs]
    digest = hashlib.sha256()
    for value in (_code(), content, settings, *inputs):
        digest.update(repr(value).encode())  # quotes and escapes: two inputs never look like one
    return digest.hexdigest()


def _tokenizer_content(tokenizer: Any, template: str | None) -> list[Any] | None:
    """All that a tokenizer's ids depend on, and in chat format what the texts do."""
    kind = type(tokenizer)
    if not tokenizer.is_fast or kind.__module__.partition(".")[0] != "transformers":
        return None
    backend = tokenizer.backend_tokenizer.to_str()
    content = [kind.__qualname__, backend, tokenizer.special_tokens_map, tokenizer.split_special_tokens]
    if template is not None:
        # What it tells of the time is written in it, as far as that can be known: see `told_at`.
        content += [template, str(date.today()) if "strftime_now" in template else None]
    return content


@cache
def _code() -> list[str]:
    """The code that encodes: this package's, by content, and the libraries', by version."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    own = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return [own, *(f"{name} {version(name)}" for name in ("tokenizers", "transformers", "jinja2"))]


# --- the files --------------------------------------------------------------------------------------------------


def _read(path: Path, say: Say) -> TokenTable | None:
    """Return the table of a file; None if there is none, or it is damaged."""
    try:
        table = _mapped(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # a damaged file may hold anything
        say(f"rows are encoded anew: {path} cannot be used: {first_line(error)}")
        return None
    with suppress(OSError):
        os.utime(path)  # the time of the last use
    say(f"these rows were encoded before: {path}")
    return table


def _mapped(path: Path) -> TokenTable:
    """Map a safetensors file: the length of the header in 8 bytes, the header in JSON, then the arrays.

    Raises FileNotFoundError, and any exception for a file that is not what `_write` wrote.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    sha256 = header.pop("__metadata__")["sha256"]
    arrays: dict[str, Any] = {}
    for name, entry in header.items():
        dtype, (first, last) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        arrays[name] = np.frombuffer(content, np.uint8)[start + first : start + last].view(dtype)
    table = TokenTable(**arrays)
    if table.sha256() != sha256:
        raise ValueError("its content is not what was written")
    return table


_DTYPES = {"I64": np.int64, "I32": np.int32, "BOOL": np.bool_}  # as safetensors names them


def _write(table: TokenTable, path: Path) -> None:
    """Keep a table, in a file that only its owner may read. Raises OSError."""
    from safetensors.numpy import save_file

    with new_file(path) as partial, disk_errors(path):
        save_file(table.arrays(), partial, {"sha256": table.sha256()})
    prune(path.parent)
