from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from dude_cli.config import TrainConfig
from dude_cli.training.schedule import learning_rate_at, total_steps, warmup_steps


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(1, 60), st.floats(0, 1))
def test_rates_are_those_of_transformers(kind, steps, warmup_ratio):
    config = TrainConfig(lr_scheduler_type=kind, warmup_ratio=warmup_ratio, learning_rate=3e-4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    name = "constant_with_warmup" if kind == "constant" else kind
    warmup = warmup_steps(config, steps)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        assert learning_rate_at(step, steps, config) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_steps_come_from_max_steps_or_the_epochs():
    assert total_steps(TrainConfig(max_steps=7), steps_per_epoch=100) == 7
    assert total_steps(TrainConfig(num_train_epochs=1.5), steps_per_epoch=3) == 5
    assert total_steps(TrainConfig(num_train_epochs=0.01), steps_per_epoch=3) == 1


@pytest.mark.parametrize(("steps", "warmup_ratio"), [(1, 0.03), (1, 1.0), (2, 1.0), (10, 0.99)])
def test_the_last_step_is_never_one_of_the_warm_up(steps, warmup_ratio):
    config = TrainConfig(lr_scheduler_type="constant", warmup_ratio=warmup_ratio, learning_rate=3e-4)
    assert warmup_steps(config, steps) == steps - 1
    assert learning_rate_at(steps - 1, steps, config) == 3e-4
