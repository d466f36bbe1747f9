"""Where results that a later run can use again are kept, outside the run folders."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def cache_dir(kind: str) -> Path:
    """The folder for one kind of result, "decompositions", "tokens" or "datasets"; it may not be there yet.

    `$DUDE_CACHE_DIR`, else `$XDG_CACHE_HOME/dude`, else `~/.cache/dude`. Deleting it costs time and nothing else.
    Raises RuntimeError where the home folder is asked for and not known.
    """
    own = os.environ.get("DUDE_CACHE_DIR")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dude"
    return root.expanduser() / kind


def folder_cache(folder: Path) -> Path:
    """The folder for what `datasets` makes of the files of a local one.

    It takes two folders of one name and layout for the same data set, and would answer from its cache. So each
    content has a cache of its own, by the names, sizes and times of its files.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([str(folder.absolute()), facts]).encode()).hexdigest()
    return cache_dir("datasets") / key[:32]
