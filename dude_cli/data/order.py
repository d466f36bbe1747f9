"""Which rows an optimizer step takes: a pure function of (seed, step)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dude_cli.errors import DataError

GROUPED_STEPS = 50  # steps whose rows are sorted together, as in transformers


def steps_per_epoch(n_rows: int, global_batch_size: int) -> int:
    """Return the optimizer steps of one pass; the last may take fewer rows."""
    return -(-n_rows // global_batch_size)


class StepOrder:
    """The rows of each optimizer step of a run.

    A pure function of the arguments and the step: a resumed run asks for its next step and needs no saved state. Each
    epoch takes each row once, in the rows' own order or, with `shuffle`, in a permutation of its own; the last step
    of an epoch takes what is left of it.

    `group_by_length` puts rows of similar length into one step, as transformers' LengthGroupedSampler does: the
    permutation is cut into windows of 50 steps, the rows of a window are sorted by length and cut into steps, and the
    steps of the epoch are shuffled. Which rows share a step then depends on their lengths.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        global_batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        group_by_length: bool = False,
    ) -> None:
        self._lengths, self._size, self._seed = lengths, global_batch_size, seed
        self._shuffle, self._group_by_length = shuffle, group_by_length
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None  # the last one asked for, and its order

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return the indices of the rows of optimizer step `step`, counted from 0 over all epochs; longest first.

        Each rank takes every so many-th of them, and cuts its part into micro-batches: so the ranks have equally much
        to do, a micro-batch's rows are of similar length, and memory that is short is missed in the first one.
        """
        epoch, window = divmod(step, steps_per_epoch(len(self._lengths), self._size))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return longest_first(self._epoch[1][window * self._size : (window + 1) * self._size], self._lengths)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        n_rows = len(self._lengths)
        order = _permutation(n_rows, (self._seed, epoch)) if self._shuffle else np.arange(n_rows)
        if not self._group_by_length:
            return order
        whole = n_rows - n_rows % self._size  # the rows of the last step are those that the permutation has last
        starts = range(0, whole, GROUPED_STEPS * self._size)
        windows = [order[start : min(start + starts.step, whole)] for start in starts]
        grouped = [longest_first(window, self._lengths) for window in windows]
        steps = np.concatenate([order[:0], *grouped]).reshape(-1, self._size)
        shuffled = steps[_permutation(len(steps), (self._seed, epoch, 2))]
        return np.concatenate([shuffled.ravel(), order[whole:]])


def longest_first(rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return `rows` sorted by `lengths[row]`, the longest first, those of one length in the order that they had."""
    return rows[np.argsort(-lengths[rows], kind="stable")]


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
