"""The gradient of one global batch does not depend on how it is split into micro-batches."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from dude_cli.adapter import AdapterConfig, patch_model, trainable_parameters
from dude_cli.data.batches import NOT_LEARNED, EncodedRow, collate
from dude_cli.training.gradients import accumulate_gradients, equal_batches
from dude_cli.training.loss import SummedLoss, with_targets

ROWS = 13  # no split below divides it: the last micro-batch is short


def unequal_rows() -> list[EncodedRow]:
    """Rows of 4 to 28 tokens of which 1 to 24 are learned."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for index in range(ROWS):
        length = 4 + 2 * index
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        masked = length - max(1, length - 4) if index % 2 else length - 1
        rows.append(EncodedRow(ids, [NOT_LEARNED] * masked + ids[masked:], [length], [index]))
    return rows


def gradients(rows: list[EncodedRow], per_device_batch_size: int, world_size: int = 1) -> dict[str, torch.Tensor]:
    """The gradient as `world_size` ranks would make it, averaged as DDP does."""
    total: dict[str, torch.Tensor] = {}
    targets = sum(label != NOT_LEARNED for row in rows for label in row.labels[1:])
    for rank in range(world_size):
        model = patch_model(tiny_model("llama"), AdapterConfig(method="dude", rank=4)).train()
        accumulate_gradients(
            SummedLoss(model),
            rows[rank::world_size],
            per_device_batch_size=per_device_batch_size,
            target_tokens=targets,
            make_batch=lambda rows: with_targets(collate(rows, pad_id=0)),
            backward=lambda loss: loss.backward(),
            world_size=world_size,
            most_rows=-(-len(rows) // world_size),
        )
        for name, parameter in trainable_parameters(model).items():
            total[name] = total.get(name, 0) + parameter.grad.double() / world_size
    return total


@pytest.fixture(scope="module")
def whole_batch() -> dict[str, torch.Tensor]:
    return gradients(unequal_rows(), per_device_batch_size=ROWS)


@pytest.mark.parametrize(("per_device_batch_size", "world_size"), [(1, 1), (2, 1), (5, 1), (12, 1), (3, 2), (2, 5)])
def test_every_split_gives_the_same_gradient(per_device_batch_size, world_size, whole_batch):
    found = gradients(unequal_rows(), per_device_batch_size, world_size)
    for name, expected in whole_batch.items():
        assert float((found[name] - expected).norm() / expected.norm()) <= 1e-5, name


def test_the_gradient_is_that_of_the_mean_over_all_target_tokens(whole_batch):
    """Against one dense loss over every row at once, without our loss and masks."""
    model = patch_model(tiny_model("llama"), AdapterConfig(method="dude", rank=4)).train()
    losses = []
    for row in unequal_rows():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        losses += [-logits[i - 1, label] for i, label in enumerate(row.labels) if label != NOT_LEARNED]
    torch.stack(losses).mean().backward()
    for name, parameter in trainable_parameters(model).items():
        expected = parameter.grad.double()
        assert float((whole_batch[name] - expected).norm() / expected.norm()) <= 1e-5, name


def test_a_rank_without_rows_takes_part_with_zero_gradients():
    found = gradients([unequal_rows()[0]], per_device_batch_size=2, world_size=3)
    alone = gradients([unequal_rows()[0]], per_device_batch_size=1)
    for name, expected in alone.items():
        assert float((found[name] - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize(("rows", "size", "world_size"), [(ROWS, 6, 2), (ROWS, 4, 3), (1, 2, 3)])
def test_all_ranks_run_equally_many_forward_passes(rows, size, world_size):
    """A sharded base is gathered in each. None has a row of another one."""
    shares = [unequal_rows()[rank:rows:world_size] for rank in range(world_size)]
    batches = [list(equal_batches(share, size, -(-rows // world_size))) for share in shares]
    assert len({len(each) for each in batches}) == 1
    assert [[row for batch in each for row in batch if row.source_rows] for each in batches] == shares
