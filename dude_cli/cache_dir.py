"""Where files are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(kind: str) -> Path:
    """The folder of one kind of cached files, `decompositions` or `tokens`; it may not be there yet.

    It is in `$DUDE_CACHE_DIR`, else in `$XDG_CACHE_HOME/dude`, else in `~/.cache/dude`.
    """
    chosen = os.environ.get("DUDE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dude" / kind
