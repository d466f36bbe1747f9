"""Two ranks share a model's decompositions, and fail together."""

from __future__ import annotations

import json

import torch
from forked import dude_forked
from tiny_models import tiny_model

from dude_cli.adapter import AdapterConfig, find_targets
from dude_cli.adapter.decompose import decompose_layer
from dude_cli.errors import DudeError
from dude_cli.system.runtime import make_accelerator
from dude_cli.training.decompositions import decompose_on_all_ranks


def decompose_twice(arguments: list[str]) -> None:
    """Print what this rank did and got; the second time one of the other rank's layers is not finite."""
    accelerator = make_accelerator()
    config, model, mine = AdapterConfig(rank=3), tiny_model("llama"), []

    def decompose(name, layer, config):
        mine.append(name)
        return decompose_layer(name, layer, config)

    def on_all_ranks():
        return decompose_on_all_ranks(model, config, accelerator, decompose, lambda done, total: None)

    found = on_all_ranks()
    alone = {name: decompose_layer(name, layer, config) for name, layer in find_targets(model, config).items()}
    is_equal = all(torch.equal(found[name].A, alone[name].A) for name in found)
    is_equal &= all(torch.equal(found[name].B, alone[name].B) for name in found)
    record = {"names": list(found), "all": list(alone), "mine": [*mine], "equal": is_equal}
    if accelerator.process_index == 1:
        model.get_submodule(mine[0]).weight.data[0, 0] = float("nan")
    try:
        on_all_ranks()
    except DudeError as error:
        record["error"] = str(error)
    print(json.dumps(record))


def test_each_layer_is_decomposed_once_the_main_rank_has_all_and_both_fail_together():
    done = dude_forked(count=2, command=decompose_twice)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["names"] == first["all"]
    assert second["names"] == []
    assert first["equal"]
    assert sorted(first["mine"] + second["mine"]) == sorted(first["all"])
    assert abs(len(first["mine"]) - len(second["mine"])) <= 1
    assert "infinite or NaN" in second["error"]
    assert "rank 1 failed" in first["error"]
    assert second["mine"][0] in first["error"]
