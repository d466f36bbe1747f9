"""Where results that a later run can use again are kept, outside the run folders, and how many of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

# Of one kind of result. Llama-2-7B's 224 decompositions of rank 128 take 1.3 GB, a million rows of 200 tokens 1 GB.
LIMIT_BYTES = 10 * 2**30
IN_USE_NS = 3600 * 10**9


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
    content has a cache of its own, by the names, sizes and times of its files. Those of earlier contents are pruned.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([str(folder.absolute()), facts]).encode()).hexdigest()
    path = cache_dir("datasets") / key[:32]
    with suppress(OSError):  # `datasets` says what is wrong with the place
        path.mkdir(parents=True, exist_ok=True)
        os.utime(path)  # the time of the last use
        prune(path.parent)
    return path


def prune(folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
    """Delete what was used least recently in `folder` until `limit_bytes` are enough; the newest stays.

    So does a folder in which something was written of late: another process may be at it.
    """
    used = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process prunes too
            facts = [file.stat() for file in [path, *path.rglob("*")]]
            used.append((max(fact.st_mtime_ns for fact in facts), path, sum(fact.st_size for fact in facts)))
    excess = sum(size for _, _, size in used) - limit_bytes
    for last_ns, path, size in sorted(used)[:-1]:
        if excess <= 0:
            return
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif time.time_ns() - last_ns < IN_USE_NS:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        excess -= size
