"""Two ranks share a model's decompositions, and fail together."""

from __future__ import annotations

import json
import subprocess
import sys

from command import environment

SCRIPT = """
import json
import sys

import torch
sys.path.insert(0, sys.argv[1])
from tiny_models import tiny_model

from dude_cli.adapter import AdapterConfig, find_targets
from dude_cli.adapter.decompose import decompose_layer
from dude_cli.decompositions import decompose_on_all_ranks
from dude_cli.errors import DudeError
from dude_cli.runtime import make_accelerator

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
record = {"rank": accelerator.process_index, "names": list(found), "all": list(alone), "mine": [*mine]}
record["equal"] = is_equal
bad = mine[0] if accelerator.process_index == 1 else None
if bad is not None:
    model.get_submodule(bad).weight.data[0, 0] = float("nan")
try:
    on_all_ranks()
except DudeError as error:
    record["error"] = str(error)
sys.stdout.write(json.dumps(record) + "\\n")  # in one write, or the ranks' lines may mix
sys.stdout.flush()
"""


def test_each_layer_is_decomposed_once_the_main_rank_has_all_and_both_fail_together(tmp_path, request):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(tmp_path / "script.py")]
    done = subprocess.run(
        [sys.executable, *launcher, str(request.config.rootpath / "tests")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = sorted(map(json.loads, done.stdout.split("\n")[:2]), key=lambda record: record["rank"])
    assert first["names"] == first["all"]
    assert second["names"] == []
    assert first["equal"]
    assert sorted(first["mine"] + second["mine"]) == sorted(first["all"])
    assert abs(len(first["mine"]) - len(second["mine"])) <= 1
    assert "infinite or NaN" in second["error"]
    assert "rank 1 failed" in first["error"]
    assert second["mine"][0] in first["error"]
