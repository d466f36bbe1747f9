"""What goes wrong on one rank alone stops or changes all of them; a full disk costs nothing that was saved."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from command import dude_here
from forked import Ranks
from quickstart_config import quickstart_config
from safetensors.torch import load_file
from training import init_here, train_here

from dude_cli.adapter import unpatch_model
from dude_cli.config import load_config
from dude_cli.errors import DivergedError, ResourceError
from dude_cli.system import files
from dude_cli.training import disk, loop, step
from dude_cli.training.checkpoint import TrainState, checkpoints, is_valid, save_checkpoint
from dude_cli.training.metrics import MetricsLog, read_metrics
from dude_cli.training.optimizer import make_optimizer

TENSORS = "adapter.safetensors"


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run_dir) if "loss" in r]


class AtCall:
    """Does something before the `count`-th call of a function in the module that calls it, or each from then on."""

    module, name, count = step, "accumulate_gradients", 3

    def arm(self) -> None:
        function, calls = getattr(self.module, self.name), 0

        def changed(*args, **kwargs):
            nonlocal calls
            calls += 1
            return self.call(function, *args, **kwargs) if calls == self.count else function(*args, **kwargs)

        setattr(self.module, self.name, changed)

    def call(self, function, *args, **kwargs):
        raise NotImplementedError


class NotANumber(AtCall):
    """The gradient of the third step is not finite, the loss is; what the weights are then is saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def call(self, function, summed_loss, *args, **kwargs):
        loss = function(summed_loss, *args, **kwargs)
        next(p for p in summed_loss.parameters() if p.grad is not None).grad[0].fill_(float("nan"))
        return loss

    def arm(self) -> None:
        super().arm()
        from dude_cli.adapter import save_adapter

        take_step = loop.take_step

        def saving(run, stop):
            try:
                return take_step(run, stop)
            except DivergedError:
                save_adapter(run.model, self.folder)
                raise

        loop.take_step = saving


def test_a_gradient_that_is_not_finite_on_one_rank_stops_both_before_the_step(tmp_path):
    config = quickstart_config(tmp_path, max_steps="5", per_device_batch_size="2", extra="  save_steps: 1")
    ranks = Ranks(["train", config], tmp_path, 2, {1: NotANumber(tmp_path / "after")})
    assert ranks.wait() == [4, 4], ranks.said()
    for log in ranks.logs:
        assert "no weight was changed" in log.read_text()
        assert len(log.read_text().partition("training rows ")[2].split("\n")[0].split(", ")) == 4
    saved = checkpoints(tmp_path / "run")
    assert saved[0].name == "step-000002"
    before, after = load_file(saved[0] / "adapter" / TENSORS), load_file(tmp_path / "after" / TENSORS)
    assert all(torch.equal(before[name], after[name]) for name in before)


class TooLittleMemory(AtCall):
    """In one step more than `rows` in a forward are too many, after a first micro-batch that has left its gradient."""

    count = 2

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def call(self, function, summed_loss, rows, *, per_device_batch_size, **kwargs):
        assert per_device_batch_size > self.rows
        function(summed_loss, rows[:per_device_batch_size], per_device_batch_size=per_device_batch_size, **kwargs)
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_memory_that_runs_out_on_one_rank_halves_the_batch_on_both(tmp_path):
    auto, given = (tmp_path / name for name in ("auto", "given"))
    for folder, size in ((auto, "auto"), (given, "2")):
        settings = {"max_steps": "4", "global_batch_size": "8", "per_device_batch_size": size}
        config = quickstart_config(folder, extra="  save_steps: 1", **settings)
        ranks = Ranks(["train", config], folder, 2, {1: TooLittleMemory(2)} if size == "auto" else {})
        assert ranks.wait() == [0, 0], ranks.said()
        if size == "auto":
            assert "from now on 2 rows per forward instead of 4" in ranks.logs[0].read_text()
    state = json.loads((checkpoints(auto / "run")[0] / "state.json").read_text())
    assert state["per_device_batch_size"] == 2
    # The first step had four at once, so its sums are rounded otherwise.
    for one, other in zip(losses(auto / "run"), losses(given / "run"), strict=True):
        assert one == pytest.approx(other, rel=1e-5 if one[0] <= 2 else 1e-3)


def test_the_step_that_ran_out_of_memory_is_that_of_the_smaller_batch_to_the_bit(tmp_path, monkeypatch):
    adapter = "{method: dude, rank: 4, dropout: 0.2}"
    config = quickstart_config(tmp_path, max_steps="1", global_batch_size="8", adapter=adapter)
    shortage = TooLittleMemory(4)
    shortage.count = 1
    with monkeypatch.context() as patch:
        patch.setattr(step, "accumulate_gradients", step.accumulate_gradients)  # put back at the end
        shortage.arm()
        train_here(config, f"output_dir={tmp_path / 'auto'}", "train.per_device_batch_size=auto")
    train_here(config, f"output_dir={tmp_path / 'given'}", "train.per_device_batch_size=4")
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")


def test_a_batch_size_that_is_given_is_not_halved(tmp_path, monkeypatch):
    shortage = TooLittleMemory(2)
    shortage.count = 1
    monkeypatch.setattr(step, "accumulate_gradients", step.accumulate_gradients)  # put back at the end
    shortage.arm()
    with pytest.raises(ResourceError, match="out of memory with 4 rows per forward at step 1"):
        train_here(quickstart_config(tmp_path, max_steps="1", per_device_batch_size="4"))


def test_memory_that_is_too_small_for_one_row_ends_both_ranks(tmp_path):
    config = quickstart_config(tmp_path, max_steps="2", global_batch_size="2", per_device_batch_size="1")
    shortage = TooLittleMemory(0)
    ranks = Ranks(["train", config], tmp_path, 2, {1: shortage})
    assert ranks.wait() == [5, 5], ranks.said()
    assert all("out of memory with 1 rows" in log.read_text() for log in ranks.logs)


class FullDisk(AtCall):
    """From the second save on, no file may be larger than 20 kB: the write fails as on a full disk."""

    module, name, count = loop, "save_checkpoint", 2

    def call(self, function, *args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return function(*args, **kwargs)


def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoint_before(tmp_path):
    config = quickstart_config(tmp_path, max_steps="6", per_device_batch_size="2", extra="  save_steps: 2")
    ranks = Ranks(["train", config], tmp_path, 2, {0: FullDisk()})
    assert ranks.wait() == [5, 5], ranks.said()
    assert "the disk is full" in ranks.logs[0].read_text()
    assert "rank 0 failed: the disk is full" in ranks.logs[1].read_text()
    assert "Traceback" not in ranks.said()
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000002"]
    assert is_valid(tmp_path / "run/checkpoints/step-000002")
    assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]


def test_a_checkpoint_that_cannot_be_checked_deletes_no_older_one(tmp_path, monkeypatch):
    from dude_cli.errors import AdapterError
    from dude_cli.training import checkpoint

    config = quickstart_config(tmp_path, max_steps="3", extra="  save_steps: 1\n  save_total_limit: 1")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "is_valid", lambda folder: folder.name != "step-000002")
        with pytest.raises(AdapterError, match="does not read back"):
            train_here(config)
    assert "step-000001" in [folder.name for folder in checkpoints(tmp_path / "run")]


def test_a_disk_without_room_is_noticed_before_anything_is_decomposed(tmp_path, monkeypatch):
    config = quickstart_config(tmp_path)
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"may write .* MiB more, and 0.977 KiB are free"):
        init_here(config)
    assert not (tmp_path / "run/initial").exists()


def test_what_the_run_has_written_already_needs_no_more_room(tmp_path, monkeypatch):
    prepared = init_here(quickstart_config(tmp_path))
    model = unpatch_model(prepared.model)
    tokenizer, held = prepared.tokenizer, files.size_bytes(tmp_path / "run/initial")
    room = disk.run_bytes(prepared.config, model, disk.tokenizer_bytes(tokenizer)) - held
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=room))
    disk.check_disk_space(prepared.config, model, tokenizer)
    room -= 1
    with pytest.raises(ResourceError, match="are free"):
        disk.check_disk_space(prepared.config, model, tokenizer)


BEST = "  save_steps: 1\n  save_total_limit: 1\n  eval_steps: 1\n  early_stopping_patience: 5"


@pytest.mark.parametrize(("method", "extra"), [("dude", "  save_steps: 1\n  save_total_limit: 2"), ("lora", BEST)])
def test_the_bytes_that_a_run_takes_are_foreseen(method, extra, tmp_path, monkeypatch):
    """In them is one checkpoint more than there is at the end: the one that is written before the oldest goes."""
    monkeypatch.setattr(disk, "SMALL_FILES_BYTES", 0)
    config = quickstart_config(tmp_path, max_steps="3", adapter=f"{{method: {method}, rank: 16}}", extra=extra)
    prepared = init_here(config)
    model = unpatch_model(prepared.model)
    needed = disk.run_bytes(load_config(config), model, disk.tokenizer_bytes(prepared.tokenizer))
    train_here(config)
    run_dir = tmp_path / "run"
    taken, one = (
        sum(file.stat().st_size for pattern in ("*.safetensors", "tokenizer.json") for file in folder.rglob(pattern))
        for folder in (run_dir, checkpoints(run_dir)[0])
    )
    assert taken + one == pytest.approx(needed, rel=0.1)


class Hangs(AtCall):
    def call(self, function, *args, **kwargs):
        signal.pause()


def test_a_rank_that_does_not_answer_is_not_waited_for_forever(tmp_path):
    config = quickstart_config(tmp_path, per_device_batch_size="2", extra="  distributed_timeout_s: 3")
    ranks = Ranks(["train", config], tmp_path, 2, {1: Hangs()})
    ranks.processes[0].join(60)
    ranks.processes[1].kill()
    assert ranks.processes[0].exitcode == 1, ranks.said()
    assert "another rank is gone, or does not answer" in ranks.logs[0].read_text()
    assert "Traceback" not in ranks.logs[0].read_text()


def test_the_lines_of_the_steps_are_synced_before_their_checkpoint(tmp_path, monkeypatch):
    order = []
    sync, save = MetricsLog.sync, loop.save_checkpoint
    monkeypatch.setattr(MetricsLog, "sync", lambda log: (order.append("sync"), sync(log)))
    monkeypatch.setattr(loop, "save_checkpoint", lambda *a, **b: (order.append("save"), save(*a, **b)))
    train_here(quickstart_config(tmp_path, max_steps="2", extra="  save_steps: 1"))
    assert order == ["sync", "save"] * 2


def test_files_and_folders_are_synced_before_the_rename(tmp_path, monkeypatch):
    """All that a checkpoint consists of, its folders included, and then the folder that got the new name."""
    synced = []
    sync, rename = files.sync, os.rename
    monkeypatch.setattr(files, "sync", lambda path: (synced.append(path), sync(path)))
    monkeypatch.setattr(os, "rename", lambda source, target: (synced.append("rename"), rename(source, target)))
    prepared = init_here(quickstart_config(tmp_path))
    optimizer = make_optimizer(prepared.model, prepared.config.train)
    synced.clear()
    state = TrainState(prepared.origin, step=7)
    save_checkpoint(tmp_path / "run", prepared.model, prepared.tokenizer, optimizer, state, keep=1)
    last = len(synced) - 1 - synced[::-1].index("rename")
    partial = tmp_path / "run/checkpoints/.step-000007.partial"
    names = ("adapter/adapter.safetensors", "adapter/adapter_config.json", "optimizer.safetensors", "state.json")
    for path in (partial, partial / "adapter", partial / "manifest.json", *(partial / name for name in names)):
        assert path in synced[:last], path
    assert tmp_path / "run/checkpoints" in synced[last:]
    assert tmp_path / "run" in synced  # the folder of checkpoints is new


def test_without_a_home_folder_nothing_is_kept_and_the_run_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("DUDE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)

    done = dude_here("init", quickstart_config(tmp_path))

    assert done.returncode == 0, done.stderr
    assert "encoded rows are not kept: " in done.stderr
    assert "decompositions are not kept: " in done.stderr
