"""Trackers beside metrics.jsonl, which show the same numbers: TensorBoard, and Weights & Biases.

What each writes is in the folder of its name, in the run's.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from dude_cli.config import Config, TrackerName
from dude_cli.errors import UsageError
from dude_cli.system import files

WANDB = "wandb>=0.31"
FINISH_S = 60.0  # for what is not uploaded when a training ends


def check_trackers(report_to: Sequence[TrackerName]) -> None:
    """Raise UsageError if a tracker's package is not installed, or Weights & Biases does not know its user."""
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"{name} is not installed",
                where=f"train.report_to: {name}",
                fix=f"pip install {name}, or leave it out: metrics.jsonl has the same numbers",
            )
    if "wandb" in report_to:
        _check_wandb()


class Trackers:
    """The trackers of a run. One that fails is told of and left out from then on: no training ends for it."""

    def __init__(self, config: Config, from_step: int, say: Callable[[str], None]) -> None:
        """Start what the trackers have of the run in `config.run_dir`, or go on after its first `from_step` steps."""
        self._say = say
        self._open: dict[TrackerName, _Tracker] = {}
        for name in config.train.report_to:
            with self._dropped_if_it_fails(name):
                self._open[name] = _KINDS[name](config, from_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            with self._dropped_if_it_fails(name):
                tracker.log(step, values)

    def close(self, *, failed: bool) -> None:
        for name, tracker in list(self._open.items()):
            with self._dropped_if_it_fails(name):
                tracker.close(failed)

    @contextmanager
    def _dropped_if_it_fails(self, name: TrackerName) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a disk's, a service's or a network's, of any kind
            self._open.pop(name, None)
            self._say(f"warning: {name} gets no numbers from now on, metrics.jsonl does: {error}")


class _Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, config: Config, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = from_step + 1 if from_step else 0  # a run at its start evaluates again before the first step
        self._writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=first)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """One run there for each run folder, however many parts it is trained in.

    Its x axis is the optimizer step, as a metric: wandb's own counter only grows, and would drop the steps that a run
    repeats which goes on from a checkpoint.
    """

    def __init__(self, config: Config, from_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dude"),
            name=os.environ.get("WANDB_NAME", config.run_dir.name),
            id=_wandb_id(config.run_dir / "wandb" / "id"),
            resume="allow",
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
            # What a command prints is the command's. Without a network it ends a minute late at most, and `wandb sync`
            # does the rest.
            settings=wandb.Settings(console="off", finish_timeout=FINISH_S),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


_KINDS: dict[TrackerName, Callable[[Config, int], _Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def _wandb_id(path: Path) -> str:
    """What the run is called there: the same when it goes on, another when it starts anew, which deletes the folder."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8")


def _check_wandb() -> None:
    """Without a terminal wandb would say that it knows no user when the base is loaded, and in one it would ask."""
    fix = "run `wandb login`, or set WANDB_API_KEY; WANDB_MODE=offline needs neither"
    try:
        import wandb

        is_known = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
    except Exception as error:  # an old one's, or about a key or a setting that is none
        what, fix = f"Weights & Biases cannot be used: {error}", f"pip install '{WANDB}'; {fix}"
        raise UsageError(what, where="train.report_to: wandb", fix=fix) from error
    if not is_known:
        raise UsageError("nobody is logged in to Weights & Biases", where="train.report_to: wandb", fix=fix)
