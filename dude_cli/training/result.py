"""What a training leaves behind when it ends: the adapter, how far its layers moved, the memory that it took."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from dude_cli.system import files
from dude_cli.system.ranks import on_main_rank
from dude_cli.training.checkpoint import BEST
from dude_cli.training.metrics import LAYERS_FILE, MEMORY_FILE, run_summary
from dude_cli.training.model_card import model_card
from dude_cli.training.run import Run
from dude_cli.training.run_dir import RESULT


def finish(run: Run) -> dict[str, Any]:
    """Write the end of a run; `adapter/` is the last step's or the best evaluation's, as `train.keep` says.

    Returns the run's summary.
    """
    from dude_cli.adapter import restore_adapter

    if run.config.train.keeps_best:
        restore_adapter(run.model, run.run_dir / BEST)
    on_main_rank(run.accelerator, lambda: _write(run))
    return run_summary(run.config)


def _write(run: Run) -> None:
    _write_json(run, MEMORY_FILE, _memory(run))
    _write_json(run, LAYERS_FILE, _layers(run))
    write_adapter(run, RESULT)  # last: a run that has it is finished


def _memory(run: Run) -> dict[str, Any]:
    """Predicted against measured, of this rank and of the part of the run that this process has done."""
    peak, forecast = run.prepared.peak_memory, run.prepared.memory
    return {
        "device": str(run.accelerator.device),
        "predicted": None if forecast is None else forecast.report(),
        "predicted_training_bytes": None if forecast is None else forecast.training_bytes,
        "measured_training_bytes": peak.peak_bytes(),
        "measured": peak.definition,
    }


def _layers(run: Run) -> dict[str, Any]:
    """How far each layer has moved from the base, while the base's weights are at hand."""
    from dude_cli.adapter import movements

    return {
        "trainable_parameters": run.prepared.trainable_parameters,
        "all_parameters": run.prepared.all_parameters,
        "layers": [asdict(layer) for layer in movements(run.model)],
    }


def _write_json(run: Run, name: str, record: dict[str, Any]) -> None:
    files.write_text(run.run_dir / name, json.dumps(record, indent=2) + "\n")


def write_adapter(run: Run, name: str) -> None:
    """Write the adapter as it is now to a folder of the run, with its tokenizer and its card."""
    from dude_cli.adapter import save_adapter

    prepared = run.prepared
    save_adapter(
        run.model,
        run.run_dir / name,
        base_revision=prepared.origin.base_revision,
        tokenizer=prepared.tokenizer,
        model_card=model_card(
            run.config, run_summary(run.config), prepared.source_sha256, commit=prepared.origin.base_revision
        ),
    )
