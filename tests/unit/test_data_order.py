from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dude_cli.data.order import split_rows, step_rows, steps_per_epoch
from dude_cli.errors import DataError

sizes = st.integers(1, 60)
batches = st.integers(1, 70)
seeds = st.integers(0, 2**70)
PINNED_ORDER = [0, 1, 4, 2, 6, 8, 5, 9, 7, 3]  # of 10 rows with seed 42: a change breaks every resume


@given(n_rows=sizes, batch=batches, seed=seeds, epoch=st.integers(0, 5), shuffle=st.booleans())
def test_each_epoch_takes_each_row_once_and_only_its_last_step_is_short(n_rows, batch, seed, epoch, shuffle):
    steps = steps_per_epoch(n_rows, batch)
    taken = [step_rows(n_rows, epoch * steps + step, batch, seed, shuffle) for step in range(steps)]
    assert sorted(np.concatenate(taken)) == list(range(n_rows))
    assert [len(rows) for rows in taken[:-1]] == [batch] * (steps - 1)
    assert len(taken[-1]) == n_rows - batch * (steps - 1)
    if not shuffle:
        assert list(np.concatenate(taken)) == list(range(n_rows))


@given(n_rows=sizes, batch=batches, seed=seeds, steps=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_step_depends_on_nothing_but_its_number_and_the_seed(n_rows, batch, seed, steps):
    once = [step_rows(n_rows, step, batch, seed, True) for step in steps]
    for step, rows in reversed(list(zip(steps, once, strict=True))):
        again = step_rows(n_rows, step, batch, seed, True)
        assert np.array_equal(again, rows)
        again += 1  # a caller's own copy: the next call must not see this


def test_epochs_and_seeds_differ_and_the_order_is_the_same_on_every_machine():
    orders = {tuple(step_rows(1000, epoch, 1000, seed, True)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert step_rows(10, 0, 10, 42, True).tolist() == PINNED_ORDER
    assert step_rows(10, 1, 10, 42, True).tolist() != PINNED_ORDER


@given(n_rows=st.integers(2, 300), share=st.floats(0.001, 0.5), seed=seeds)
def test_the_held_out_rows_are_a_fixed_share_apart_from_the_others(n_rows, share, seed):
    train, held_out = split_rows(n_rows, share, seed)
    assert sorted([*train, *held_out]) == list(range(n_rows))
    assert len(held_out) == max(1, round(n_rows * share))
    assert list(train) == sorted(train)
    assert np.array_equal(split_rows(n_rows, share, seed)[1], held_out)


def test_holding_out_everything_is_an_error():
    for n_rows, share in ((1, 0.01), (10, 0.99)):
        with pytest.raises(DataError, match="leaves none to train on"):
            split_rows(n_rows, share, 0)
