"""Which rows an optimizer step takes: a pure function of (seed, step)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dude_cli.errors import DataError


def steps_per_epoch(n_rows: int, global_batch_size: int) -> int:
    """Return the optimizer steps of one pass; the last may take fewer rows."""
    return -(-n_rows // global_batch_size)


def step_rows(n_rows: int, step: int, global_batch_size: int, seed: int, shuffle: bool) -> npt.NDArray[np.int64]:
    """Return the indices of the rows of optimizer step `step`, counted from 0 over all epochs.

    A pure function: a resumed run asks for its next step and needs no saved state. Each epoch takes each row once,
    in the rows' own order or, with `shuffle`, in a permutation of its own; the last step of an epoch takes what is
    left of it.
    """
    epoch, window = divmod(step, steps_per_epoch(n_rows, global_batch_size))
    order = _permutation(n_rows, (seed, epoch)) if shuffle else np.arange(n_rows)
    return order[window * global_batch_size : (window + 1) * global_batch_size].copy()


def split_rows(n_rows: int, share: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices to train on and those held out: `share` of the rows, at least one, chosen by `seed`."""
    held_out = max(1, round(n_rows * share))
    if held_out >= n_rows:
        raise DataError(
            f"holding out {held_out} of {n_rows} rows leaves none to train on",
            where=f"data.validation: {share}",
            fix="give more rows, a smaller share, or a validation set of its own",
        )
    order = _permutation(n_rows, (seed, 0, 1))  # (seed, epoch) never equals it: the stream is another one
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@lru_cache(maxsize=4)
def _permutation(size: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """A permutation from the raw stream of Philox, which numpy keeps stable over versions (`shuffle` it does not)."""
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    order = np.argsort(raw, kind="stable")
    order.flags.writeable = False
    return order
