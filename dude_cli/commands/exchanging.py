"""What `dude export` and `dude import` do: an adapter as a model or in PEFT's format, and back."""

from __future__ import annotations

import os
from pathlib import Path

from dude_cli.console import Output
from dude_cli.errors import UsageError
from dude_cli.system import files
from dude_cli.target import Loading, check_dtype, data_config, find_target, load_target


def export(
    target_name: str,
    out: Path,
    *,
    kind: str,
    rank: int | None,
    max_error: float | None,
    dtype: str | None,
    loading: Loading,
    output: Output,
) -> None:
    """Write a trained adapter as a merged model, a PEFT adapter or a plain LoRA, and say how exact it is."""
    from dude_cli.data import prompt_form
    from dude_cli.export import export_lora, export_merged, export_peft, export_shown

    _check_export_options(kind, rank, max_error, dtype)
    chosen = check_dtype(dtype)
    out = _new_folder(out)
    target = find_target(target_name)
    if target.adapter_dir is None:
        raise UsageError(
            f"`{target_name}` is no run and no adapter, so there is nothing to export",
            where=str(Path(target_name).absolute()) if target.path is None else target_name,
            fix="give the folder of a run or of an adapter",
        )
    output.say(f"loading {target}")
    loaded = load_target(target, loading)
    if kind == "merged":
        data = data_config(target)  # what a training taught as the end of an answer
        ends = () if data is None else prompt_form(loaded.tokenizer, data, raw=False).stop_ids(loaded.model)
        report = export_merged(loaded, out, chosen or loaded.config.dtype, ends, output.say)
    elif kind == "peft":
        report = export_peft(loaded, out)
    else:
        report = export_lora(loaded, out, rank=rank, max_error=max_error, say=output.say)
    output.result(export_shown(report), report.record())


def import_adapter(
    folder: Path,
    out: Path,
    *,
    base_model: str | None,
    initial: Path | None,
    quantization: str | None,
    dtype: str | None,
    output: Output,
) -> None:
    """Make an adapter of ours from PEFT's, and compare the two."""
    from dude_cli.export import import_shown, import_to, peft_base
    from dude_cli.model import check_vocabulary, load_model, load_tokenizer
    from dude_cli.system.runtime import best_device, quiet_libraries
    from dude_cli.target import check_dtype

    chosen = check_dtype(dtype)
    out = _new_folder(out)
    quiet_libraries()
    config = peft_base(folder, base_model, chosen, quantization)
    output.say(f"loading {config.name_or_path} in {config.dtype}")
    model = load_model(config, best_device())
    # A trained adapter may bring a tokenizer with a chat template that the base has not.
    tokenizer = load_tokenizer(config, folder)
    check_vocabulary(model, tokenizer)
    report = import_to(model, tokenizer, config, folder, out, initial=initial)
    output.result(import_shown(report), report.record())


def _new_folder(out: Path) -> Path:
    """The absolute path of `out`. Raises UsageError unless nothing is there yet and a folder can be made there."""
    out = out.expanduser().absolute()
    is_empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if os.path.lexists(out) and (not is_empty or out == Path.cwd()):
        raise UsageError(
            f"{out.name or out} is there already, and nothing is ever replaced", where=str(out), fix="name a new folder"
        )
    try:
        files.check_writable(out.parent)
    except OSError as error:
        raise UsageError(
            f"no folder can be made here: {error.strerror}", where=str(out.parent), fix="name another place"
        ) from error
    return out


def _check_export_options(kind: str, rank: int | None, max_error: float | None, dtype: str | None) -> None:
    """Refuse options that another format has, and two that say the same."""
    for name, value, wanted in (
        ("--rank", rank, "lora"),
        ("--max-error", max_error, "lora"),
        ("--dtype", dtype, "merged"),
    ):
        if value is not None and kind != wanted:
            raise UsageError(
                f"{name} is for --format {wanted} alone; an adapter is exported as it is, in float32",
                where=f"{name} {value}, --format {kind}",
                fix=f"leave {name} out, or use --format {wanted}",
            )
    if rank is not None and max_error is not None:
        raise UsageError(
            "--rank and --max-error both say how close the LoRA is to be", where="--rank, --max-error", fix="give one"
        )
