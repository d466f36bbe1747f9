"""Where results that a later run can use again are kept, outside the run folders."""

from __future__ import annotations

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
