from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dude_cli.data import packing
from dude_cli.data.batches import NOT_LEARNED, EncodedRow, EncodedRows, collate
from dude_cli.data.encode import Encoded
from dude_cli.data.packing import pack
from dude_cli.data.table import TokenTable

row_tokens = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12)


def stored(rows: list[list[tuple[int, bool]]]) -> EncodedRows:
    """The rows of a table from the third on."""
    encoded = [Encoded([t for t, _ in row], [on for _, on in row], 0, 0) for row in [[(7, True)], [], *rows]]
    return EncodedRows(TokenTable.of(encoded, 100), np.arange(2, 2 + len(rows)))


@given(lengths=st.lists(st.integers(1, 20), max_size=80), window=st.integers(1, 5))
def test_each_row_is_packed_once_within_the_limit(lengths, window):
    before, packing.OPEN_SEQUENCES = packing.OPEN_SEQUENCES, window
    try:
        groups = pack(lengths, 20)
    finally:
        packing.OPEN_SEQUENCES = before
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(group for group in groups)
    assert all(sum(lengths[row] for row in group) <= 20 for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    assert groups == pack(lengths, 20) or window < len(groups)


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(10, 300, 5000).tolist()
    assert sum(lengths) / (512 * len(pack(lengths, 512))) > 0.95


@given(rows=st.lists(row_tokens, min_size=1, max_size=10))
def test_stored_rows_come_back_with_their_labels(rows):
    encoded = stored(rows)
    assert len(encoded) == len(rows)
    for index, (row, back) in enumerate(zip(rows, encoded, strict=True)):
        assert back.input_ids == [token for token, _ in row]
        assert back.labels == [NOT_LEARNED, *(token if on else NOT_LEARNED for token, on in row[1:])]
        assert back.segment_lengths == [len(row)]
        assert back.source_rows == [2 + index]
        assert encoded.target_tokens[index] == sum(on for _, on in row[1:])
        assert encoded.lengths[index] == len(row)


@given(rows=st.lists(row_tokens, min_size=1, max_size=20))
def test_packing_conserves_tokens_and_targets_and_predicts_no_row_from_another(rows):
    single = stored(rows)
    packed = single.packed(pack(single.lengths.tolist(), 12))
    seen = set()
    for index, sequence in enumerate(packed):
        start = 0
        assert packed.target_tokens[index] == sum(label != NOT_LEARNED for label in sequence.labels)
        for length, source in zip(sequence.segment_lengths, sequence.source_rows, strict=True):
            row = single[source - 2]
            assert sequence.input_ids[start : start + length] == row.input_ids
            assert sequence.labels[start : start + length] == row.labels
            assert sequence.labels[start] == NOT_LEARNED
            seen.add(source)
            start += length
        assert start == len(sequence) <= 12
    assert seen == set(range(2, 2 + len(rows)))
    assert packed.target_tokens.sum() == single.target_tokens.sum()
    assert packed.fingerprint() != single.fingerprint() or len(packed) == len(single)


def test_fingerprint_changes_with_every_part():
    row = [(1, False), (2, True), (3, True)]
    prints = {
        stored(rows).fingerprint()
        for rows in ([row], [row, row], [[(1, False), (2, True), (4, True)]], [[(1, False), (2, False), (3, True)]])
    }
    assert len(prints) == 4
    assert stored([row]).fingerprint() == stored([row]).fingerprint()


@settings(max_examples=50)
@given(rows=st.lists(row_tokens, min_size=1, max_size=6), pad_id=st.integers(0, 9))
def test_a_batch_is_padded_by_length_whatever_the_pad_id(rows, pad_id):
    encoded = list(stored(rows))
    batch = collate(encoded, pad_id)
    longest = max(map(len, rows))
    assert set(batch) == {"input_ids", "labels"}
    assert all(tensor.dtype == torch.int64 and tensor.shape == (len(rows), longest) for tensor in batch.values())
    for index, row in enumerate(encoded):
        assert batch["input_ids"][index].tolist() == row.input_ids + [pad_id] * (longest - len(row))
        assert batch["labels"][index].tolist() == row.labels + [NOT_LEARNED] * (longest - len(row))


def test_positions_restart_with_each_packed_row():
    rows = [EncodedRow([5, 6, 7, 8, 9], [-100, 6, -100, 8, 9], [2, 3], [0, 1]), EncodedRow([1, 2], [-100, 2], [2], [2])]
    assert collate(rows, 0)["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]
    flat = collate(rows, 0, flatten=True)
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2]]
    assert flat["labels"].tolist() == [[-100, 6, -100, 8, 9, -100, 2]]
    assert flat["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]
