"""Checkpoints: whole or not there, verified before use, the newest valid one wins.

    checkpoints/step-000500/
      adapter/                 a full adapter folder, which `dude eval` takes
      best/                    the best adapter so far, where the run keeps it
      optimizer.safetensors    AdamW's moments and step counts by parameter name
      state.json               TrainState, with float16's loss scale
      manifest.json            the sha256 of each file, written last

The row order, the learning rate and the random numbers of a step are functions of (seed, step), so no generator
state has to be kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.data.chat_template import TEMPLATE_KEY
from dude_cli.errors import AdapterError
from dude_cli.system import files

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BEST = "best"  # the adapter of the lowest evaluation loss so far, where the run keeps it
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Origin:
    """What a run's numbers depend on beside its config."""

    world_size: int
    base_revision: str | None  # the commit of a base from the hub
    data_fingerprints: dict[str, str]  # of data.train, data.validation and the chat template

    def differences(self, now: Origin) -> list[str]:
        """The names of what is otherwise now, with both values where a person can read them."""
        changed = dict(now.data_fingerprints.items() ^ self.data_fingerprints.items())
        if TEMPLATE_KEY in changed:  # which makes other rows
            found = [f"{TEMPLATE_KEY} (another text)"]
        else:
            found = [f"{name} (other rows)" for name in sorted(changed)]
        if self.base_revision != now.base_revision:
            found.append(f"model.revision (commit {self.base_revision}, now {now.base_revision})")
        if self.world_size != now.world_size:
            found.append(f"world size ({self.world_size}, now {now.world_size})")
        return found

    def has_validation_of(self, now: Origin) -> bool:
        """Whether the evaluation losses are of the rows that they are of now."""
        before, after = (origin.data_fingerprints.get("data.validation") for origin in (self, now))
        return before == after


@dataclass
class TrainState:
    """Where a run stands, apart from its tensors."""

    origin: Origin
    step: int = 0  # optimizer steps done
    elapsed_s: float = 0.0  # spent on the steps so far, all parts of the run together
    total_tokens: int = 0  # of the rows of the steps so far, prompts included, padding not
    per_device_batch_size: int = 0  # as `auto` was resolved
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    evaluation_is_due: bool = True  # of this step: none was done, or a signal ended it
    evaluated_step: int | None = None  # of the last evaluation
    validation_is_new: bool = False  # the losses so far are of other rows
    loss_scaler: dict[str, float] = field(default_factory=dict)  # of torch's GradScaler; empty but for float16


def save_checkpoint(
    run_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    keep: int,
) -> Path:
    """Write checkpoints/step-N, verify it, and only then delete all but the newest `keep`.

    It has a copy of the best adapter so far, where the run keeps one: what is beside it may be of a later step.
    """
    from dude_cli.adapter import save_adapter

    folder = run_dir / CHECKPOINTS / f"step-{state.step:06d}"
    with files.new_folder(folder) as partial:
        save_adapter(model, partial / "adapter", base_revision=state.origin.base_revision, tokenizer=tokenizer)
        if (run_dir / BEST).is_dir():
            files.copy_folder(run_dir / BEST, partial / BEST)
        files.save_tensors(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
        files.write_text(partial / "state.json", json.dumps(asdict(state), indent=2) + "\n")
        files.write_text(partial / MANIFEST, _manifest(partial))
    if not is_valid(folder):
        raise AdapterError(
            "the checkpoint does not read back as it was written", where=str(folder), fix="check the disk"
        )
    for old in checkpoints(run_dir)[keep:]:
        files.delete(old)
    return folder


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    folders = (run_dir / CHECKPOINTS).glob("step-*")
    found = [folder for folder in folders if re.fullmatch(r"step-[0-9]{6,}", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all as they were written; a broken one is set aside as `*.broken`."""
    for folder in checkpoints(run_dir):
        if is_valid(folder):
            return folder
        aside = folder.with_name(f"{folder.name}.broken")
        files.delete(aside)
        folder.rename(aside)
        warn(f"{folder.name} is damaged and was set aside as {aside.name}; falling back to an older one")
    return None


def is_valid(folder: Path) -> bool:
    """Whether every file of the manifest is there with its checksum, and no other; nor a link, which leads away.

    The manifest is compared as text, so a change of it that means nothing is seen too.
    """
    try:
        if folder.is_symlink() or files.links_in(folder):
            return False
        return (folder / MANIFEST).read_text(encoding="utf-8") == _manifest(folder)
    except (OSError, ValueError):
        return False


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put a valid checkpoint's adapter and optimizer state into `model`, patched alike, and `optimizer`."""
    from safetensors.torch import load_file

    from dude_cli.adapter import restore_adapter

    state = read_state(folder)
    restore_adapter(model, folder / "adapter")
    _restore_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
    return state


def restore_best(folder: Path, run_dir: Path, *, keeps_best: bool) -> None:
    """Put the best adapter of a valid checkpoint into the run folder, or take away what is there if it has none.

    A run that ends with its last step keeps none: a lower loss would come, and the adapter would stay.
    """
    if not keeps_best or not (folder / BEST).is_dir():
        files.delete(run_dir / BEST)
        return
    with files.new_folder(run_dir / BEST) as partial:
        files.copy_folder(folder / BEST, partial)


def read_state(folder: Path) -> TrainState:
    """Where the run stood at a valid checkpoint. Raises AdapterError for one of another version."""
    path = folder / "state.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["evaluated_step"]  # without it, there is no best adapter in it either
        return TrainState(**values | {"origin": Origin(**values["origin"])})
    except (TypeError, KeyError) as error:
        raise AdapterError(
            f"this checkpoint is of another version of dude: {error}",
            where=str(path),
            fix="continue with the version that wrote it, or start anew with --overwrite",
        ) from error


def _manifest(folder: Path) -> str:
    return json.dumps(_checksums(folder), indent=2) + "\n"


def _checksums(folder: Path) -> dict[str, str]:
    found = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    return {file.relative_to(folder).as_posix(): files.sha256(file) for file in found}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{key}": value.detach().contiguous().cpu()
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    entries: dict[str, dict[str, Any]] = {}
    for joined, tensor in tensors.items():
        name, _, key = joined.partition("|")
        # AdamW keeps its step count on the CPU unless it is fused.
        device = parameters[name].device if key != "step" or optimizer.defaults.get("fused") else tensor.device
        entries.setdefault(name, {})[key] = tensor.to(device)
    for name, values in entries.items():
        optimizer.state[parameters[name]] = values
