"""Whether the disk has room for what a training will write: better known before an hour of decomposing."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from dude_cli.config import Config
from dude_cli.errors import ResourceError
from dude_cli.system import files
from dude_cli.system.memory import human_bytes
from dude_cli.training.checkpoint import BEST, CHECKPOINTS
from dude_cli.training.run_dir import INITIAL, RESULT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logs and manifests.
SMALL_FILES_BYTES = 2**22


def check_disk_space(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ResourceError unless the run folder's disk has room for `run_bytes`, less what the folder has already."""
    folder = config.run_dir
    held = sum(files.size_bytes(folder / name) for name in (INITIAL, RESULT, BEST, CHECKPOINTS))
    needed = run_bytes(config, model, tokenizer_bytes(tokenizer)) - held
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"the run may write {human_bytes(needed)} more, and {human_bytes(free)} are free",
            where=f"output_dir: {folder}",
            fix="free some space, choose another output_dir, or lower train.save_total_limit or adapter.rank",
        )


def run_bytes(config: Config, model: PreTrainedModel, tokenizer_bytes: int) -> int:
    """The most bytes that a training has in its run folder, by the shapes of the target layers of the plain model.

    The adapter at step 0, the result, the best one, the checkpoints that are kept, and the one that is written before
    the oldest goes. A checkpoint has the adapter, the best one, and two moments of each trained value, all in float32.
    Each adapter has its tokenizer beside it.
    """
    from dude_cli.adapter import find_targets
    from dude_cli.adapter.weight import weight_shape

    adapter, train = config.adapter, config.train
    shapes = [weight_shape(layer) for layer in find_targets(model, adapter).values()]
    factors = sum(adapter.rank * (out_features + in_features) for out_features, in_features in shapes)
    trained = factors + (sum(out_features for out_features, _ in shapes) if adapter.has_magnitude else 0)
    saved = trained + (factors if adapter.has_svd_init else 0)
    bests = int(train.keeps_best)
    checkpoints = 1 if train.save_steps is None else train.save_total_limit + 1  # a signal saves one too
    adapters = (2 + bests) + checkpoints * (1 + bests)
    return 4 * (adapters * saved + checkpoints * 2 * trained) + adapters * tokenizer_bytes + SMALL_FILES_BYTES


def tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """About what a saved tokenizer takes: its vocabulary and merges, in JSON."""
    return len(tokenizer.backend_tokenizer.to_str(pretty=True).encode()) if tokenizer.is_fast else 0
