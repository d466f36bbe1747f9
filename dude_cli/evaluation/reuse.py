"""Whether a stored score is what scoring again would give, and what a new one takes the place of."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dude_cli.errors import UsageError
from dude_cli.evaluation.chat import chat_template, prompt_settings
from dude_cli.evaluation.harness import own_generation_length, quiet, templates_compiled_once
from dude_cli.evaluation.results import plain
from dude_cli.evaluation.saved import other_examples, read_results, requested_task, results_path
from dude_cli.evaluation.tasks import FEWSHOT_SEED, LoadedTask

# What says how an answer is made and judged: keys of a task's config that neither its prompts nor its questions show.
_JUDGING = (
    *("output_type", "doc_to_choice", "doc_to_target", "target_delimiter", "repeats"),
    *("generation_kwargs", "filter_list", "process_results", "metric_list"),
)
# What a score is of, by its key in a document or its `config`.
_SCORED = ("adapter_sha256", "base_fingerprint", "model_dtype", "lm_eval_version")


def changes_since(results: Mapping[str, Any], found: LoadedTask, tokenizer: Any = None) -> list[str]:
    """What is not as it was when a task's stored `results` were made, in words; none if they can be taken again.

    `tokenizer` is the model's as it is now, for a task that is asked in its chat template.
    All prompts are made, and they and the questions with their answers compared by their hashes.
    """
    version = importlib.metadata.version("lm_eval")
    if results["lm_eval_version"] != version:
        return [f"it was scored by lm-eval {results['lm_eval_version']}, and this is {version}"]
    if results["configs"].keys() != found.tasks.keys():
        return ["it has other parts now"]
    groups = _changed_groups(results.get("group_configs", {}), found.group_configs)
    if groups:
        return groups
    # The end of a turn may be another one though the prompts are the same.
    if found.request.apply_chat_template and results["chat_template"] != chat_template(tokenizer):
        return ["its chat template is another one now"]
    settings = prompt_settings(found.request, tokenizer)
    with quiet(), templates_compiled_once():
        changed = [_change(results, name, task, found.request.limit, settings) for name, task in found.tasks.items()]
    return list(dict.fromkeys(filter(None, changed)))


def replaced_by(results: Mapping[str, Any], folder: Path) -> str | None:
    """What a document in `folder` has that these results of one task, which take its place, have not; in words."""
    path = results_path(folder, requested_task(results), other_examples(results))
    try:
        before = read_results(path, samples=False)
    except UsageError:
        return None
    pairs = {key: [_value(side, key) for side in (before, results)] for key in _SCORED}
    lost = [f"{key} was {old} and is {new}" for key, (old, new) in pairs.items() if old != new]
    sources = [_sources(side) for side in (before, results)]
    if sources[0] != sources[1]:
        lost.append(f"its rows were {sources[0]} and are {sources[1]}")
    if "base" in before and "base" not in results:
        lost.append("it had the base's scores too")
    return f"{path.name} is replaced: {'; '.join(lost)}" if lost else None


def _change(
    results: Mapping[str, Any], name: str, task: Any, limit: int | None, settings: Mapping[str, Any]
) -> str | None:
    if plain(results["versions"].get(name)) != plain(task.VERSION):
        return f"its version was {results['versions'].get(name)} and is {task.VERSION}"
    if _judging(results["configs"][name]) != _judging(task.dump_config()):
        return "its answers are made or judged in another way now"
    before, own = results.get("max_gen_toks", {}).get(name, {}).get("official"), own_generation_length(task)
    if before != own:
        return f"its longest answer was {before} tokens and is {own}"
    asked = {sample["doc_id"]: sample["doc_hash"] for sample in results["samples"].get(name, [])}
    own_rows = results["requested"].get(name, {}).get("rows")
    if asked != {number: _doc_hash(doc) for number, doc in task.doc_iterator(limit=limit)}:
        return "its rows are others now, or in another form" if own_rows else "it has other questions now"
    is_same = _prompts_hash(task, limit, settings) == results["prompt_hashes"][name]
    return None if is_same else "its prompts are others now"


def _prompts_hash(task: Any, limit: int | None, settings: Mapping[str, Any]) -> str:
    """What the results of a task have as its `prompt_hashes`."""
    from lm_eval.utils import hash_string

    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    task.build_all_requests(limit=limit, **settings)
    first = {instance.doc_id: instance for instance in reversed(task.instances)}  # of each question's requests
    return str(hash_string("".join(hash_string(first[number].args[0]) for number in sorted(first))))


def _judging(config: Mapping[str, Any]) -> Any:
    """The part of a task's config that says how answers are judged, as it is after it was written and read."""
    found = plain({key: config.get(key) for key in _JUDGING})
    # The one in the results is fitted to the model's context; `max_gen_toks` beside it has the task's own.
    (found["generation_kwargs"] or {}).pop("max_gen_toks", None)
    return _comparable(found)


def _changed_groups(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The groups whose scores are made of other members or metrics, each in words."""
    changed = [name for name in now if _comparable(before.get(name)) != _comparable(now[name])]
    return [f"the score of the group {name} is made in another way now" for name in changed]


def _comparable(value: Any) -> str:
    """`value` as it is after it was written and read; an object's address says nothing of it."""
    return re.sub(r" at 0x[0-9a-f]+", "", json.dumps(plain(value), sort_keys=True))


def _doc_hash(doc: Any) -> str:
    """As lm-eval computes it for its samples."""
    from lm_eval.utils import handle_non_serializable, hash_string

    return str(hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)))


def _sources(results: Mapping[str, Any]) -> str:
    """Where the rows are from that a document is about, if they are the user's own."""
    (request,) = results["requested"].values()
    sources = request.get("rows") or ()
    parts = [
        (source["path"], source["name"], source["split"] if source["split"] != "train" else None) for source in sources
    ]
    return ", ".join(" ".join(filter(None, part)) for part in parts)


def _value(results: Mapping[str, Any], key: str) -> str:
    return str(results[key] if key in results else results["config"].get(key))[:24]
