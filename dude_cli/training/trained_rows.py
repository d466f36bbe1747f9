"""Which rows a run was trained on, as hashes of their tokens: an evaluation on rows can tell those that it has seen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli.system import files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dude_cli.data import EncodedRows

TRAINED_ROWS_FILE = "train_rows.npy"


def record_trained_rows(folder: Path, rows: EncodedRows, *runs: Path | None) -> None:
    """Write the hashes of `rows`, and of what `runs` were trained on before, into the run folder."""
    import numpy as np

    known = [found for run in runs if run is not None and (found := trained_rows(run)) is not None]
    content = io.BytesIO()
    np.save(content, np.unique(np.concatenate([rows.row_hashes(), *known])))
    files.write_bytes(folder / TRAINED_ROWS_FILE, content.getvalue())


def trained_rows(run: Path) -> npt.NDArray[np.uint64] | None:
    """The hashes (n,) of the rows that a run was trained on (`EncodedRows.row_hashes`); None where there are none."""
    import numpy as np

    try:
        found: npt.NDArray[np.uint64] = np.load(run / TRAINED_ROWS_FILE)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == np.uint64 and found.ndim == 1 else None
