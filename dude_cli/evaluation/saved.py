"""Results on disk: one document for each task that was asked for, and a line for each question beside it.

    <task>.json                    lm-eval's layout, with the base's part if it was scored too
    samples_<task>.jsonl           each question's document, answer, scores and hashes
    samples_<task>.base.jsonl      the same of the base model

Of rows of the user's own the names have `.rows` after the task; asked in the chat template `.chat`, and with a system's
message of one's own `.system-SHA256`; with another number of examples than the task's own, M, `.shots-M`, and with a
limit N `.limit-N`: so a quick look does not replace the full score.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dude_cli.config import EvalTask
from dude_cli.errors import UsageError
from dude_cli.evaluation.results import BY_TASK, plain, results_json
from dude_cli.system.files import write_text


def write_results(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write each requested task's part of `results`, samples first; each file is whole or not there.

    Returns the paths of the documents. `base` and `difference` are in the same document.
    """
    paths = []
    for name in results["requested"]:
        part = task_results(results, name)
        path = results_path(folder, requested_task(part), other_examples(part))
        for side, samples_path in ((part, _samples_path(path)), (part.get("base", {}), _samples_path(path, ".base"))):
            lines = [
                json.dumps(plain({"task": task, **sample}), ensure_ascii=False, allow_nan=False)
                for task, samples in side.get("samples", {}).items()
                for sample in samples
            ]
            if lines:
                write_text(samples_path, "\n".join(lines) + "\n")
            else:
                samples_path.unlink(missing_ok=True)  # of an earlier evaluation
        write_text(path, results_json(part))
        paths.append(path)
    return paths


def task_results(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part of `results` that belongs to one requested task: the same layout with fewer names."""
    request = results["requested"][name]
    names = set(request["names"])

    def cut(section: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: {task: value[task] for task in value if task in names} if key in (*BY_TASK, "samples") else value
            for key, value in section.items()
        }

    part = cut(results)
    part["requested"] = {name: request}
    part["config"] = {**results["config"], "limit": request["limit"]}
    if "base" in results:
        part["base"] = cut(results["base"])
    return part


def join_results(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One document of those of several tasks: what is not by task, such as the settings, is the last one's."""
    document: dict[str, Any] = {}
    parts = list(parts)
    for part in parts:
        by_task = {key: document.get(key, {}) | part[key] for key in ("requested", *BY_TASK, "samples") if key in part}
        base = {"base": join_results([document.get("base", {}), part["base"]])} if "base" in part else {}
        document = {**document, **part, **by_task, **base}
    took = [float(part["total_evaluation_time_seconds"]) for part in parts if "total_evaluation_time_seconds" in part]
    document |= {"total_evaluation_time_seconds": str(sum(took))} if took else {}
    limits = {request["limit"] for request in document.get("requested", {}).values()}
    if len(limits) > 1:
        by_name = {name: request["limit"] for name, request in document["requested"].items()}
        document["config"] = document["config"] | {"limit": by_name}
    templates = {name: part.get("chat_template") for part in parts for name in part.get("requested", {})}
    if len(set(templates.values())) > 1:
        document["chat_template"] = templates
    return document


def results_path(folder: Path, task: EvalTask, shots: int | None) -> Path:
    """The document of a task in a folder of results; `shots` None for as many examples as the task has by default."""
    parts = [task.name.replace("/", "_")]  # a task file of someone's may be called ../../x
    if task.rows is not None:
        parts = [re.sub(r"[^\w.-]+", "_", task.name), "rows"]
    parts += ["chat"] if task.apply_chat_template else []
    if task.system_instruction is not None:
        parts.append(f"system-{hashlib.sha256(task.system_instruction.encode()).hexdigest()[:12]}")
    parts += [f"{key}-{value}" for key, value in {"shots": shots, "limit": task.limit}.items() if value is not None]
    return folder / f"{'.'.join(parts)}.json"


def result_files(folder: Path) -> list[Path]:
    """The documents of a folder of results, in the order of their names."""
    return sorted(path for path in folder.glob("*.json") if _is_results(path))


def read_results(path: Path, *, samples: bool = True) -> dict[str, Any]:
    """A document that `write_results` wrote, with its samples, and the base's, under `samples` as they were.

    Raises UsageError for a file that is none, and if samples are asked for that are not there.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not ({"results", "requested", "prompt_hashes", "versions"} <= results.keys()):
            raise ValueError("it has no results, or not the hashes of its prompts")
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"this is no result of `dude eval`: {reason}",
            where=str(path),
            fix="give a run, an adapter, a model, or a .json file that `dude eval` wrote",
        ) from error
    if samples:
        results["samples"] = _read_samples(_samples_path(path))
        if "base" in results and _samples_path(path, ".base").exists():
            results["base"]["samples"] = _read_samples(_samples_path(path, ".base"))
    return results


def find_results(
    folder: Path,
    task: EvalTask,
    *,
    adapter_sha256: str,
    base_fingerprint: str,
    dtype: str,
    samples: bool = True,
) -> dict[str, Any] | None:
    """What a folder of results has of a task, if it was scored so, with this adapter on this base; else None.

    A number of examples of None is the task's own. A document that cannot be read is as good as none.
    """
    # The number that is asked for may be the task's own.
    for shots in dict.fromkeys((task.num_fewshot, None)):
        with suppress(UsageError):
            results = read_results(results_path(folder, task, shots), samples=samples)
            if _is_wanted(results, task, adapter_sha256, base_fingerprint, dtype):
                return results
    return None


def is_of_adapter(results: Mapping[str, Any], adapter_sha256: str | None) -> bool:
    """Whether this adapter was scored; no result is of None, the adapter of a run that is not finished."""
    return adapter_sha256 is not None and results.get("adapter_sha256") == adapter_sha256


def _is_wanted(
    results: Mapping[str, Any], task: EvalTask, adapter_sha256: str, base_fingerprint: str, dtype: str
) -> bool:
    return (
        is_of_adapter(results, adapter_sha256)
        # Results of an earlier version do not say on which base.
        and results.get("base_fingerprint") == base_fingerprint
        and task.num_fewshot in (None, *_examples(results))
        and results["config"]["model_dtype"] == f"torch.{dtype}"
    )


def requested_task(results: Mapping[str, Any]) -> EvalTask:
    """The task that a document is about, as it may be asked for again."""
    ((name, request),) = results["requested"].items()
    rows = request.get("rows")
    return EvalTask(
        name=name,
        rows=rows,
        num_fewshot=None if rows else _examples(results)[0],
        limit=request["limit"],
        apply_chat_template=request.get("apply_chat_template", False),
        system_instruction=request.get("system_instruction"),
    )


def other_examples(results: Mapping[str, Any]) -> int | None:
    """The number of examples that a document was asked for, where that is not the task's own; else None."""
    (request,) = results["requested"].values()
    return None if request.get("default_examples", True) else request["num_fewshot"]


def _examples(results: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The number of examples in the prompts, None if the parts of a task differ in it, and the one asked for.

    They are not the same where a prompt is written for no examples, whatever is asked for.
    """
    (request,) = results["requested"].values()
    shots = {results["n-shot"].get(part) for part in request["names"]} - {None}
    asked = request.get("num_fewshot")
    return (shots.pop() if len(shots) == 1 else asked), asked


def _samples_path(path: Path, side: str = "") -> Path:
    return path.with_name(f"samples_{path.stem}{side}.jsonl")


def _read_samples(path: Path) -> dict[str, list[dict[str, Any]]]:
    samples: dict[str, list[dict[str, Any]]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                sample = json.loads(line)
                samples.setdefault(sample.pop("task"), []).append(sample)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"the questions of this result cannot be read: {error}",
            where=str(path),
            fix="evaluate again: `dude eval RUN --task NAME` writes one line for each question",
        ) from error
    return samples


def _is_results(path: Path) -> bool:
    try:
        read_results(path, samples=False)
    except UsageError:
        return False
    return True
