"""Which lm-eval tasks to score: finding them by name, local data, few-shot defaults.

The official `mmlu` and `gsm8k` are reached through generated task files, one each, that `include:` lm-eval's own and
change as little as possible: `dataset_path` when the data are local, and gsm8k's few-shot sampler. Prompts, filters
and metrics stay lm-eval's. Published protocols have task files of our own, in `protocols/`, which are wrapped in the
same way when their data are local.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dude_cli.config import DataSource, EvalTask
from dude_cli.errors import UsageError, nearest
from dude_cli.evaluation.protocols import TASKS_DIR as PROTOCOLS_DIR
from dude_cli.evaluation.row_reader import RowReader
from dude_cli.system.cache_dir import folder_cache

# The papers' number for both. lm-eval's gsm8k says 5 itself; its mmlu says nothing, which means 0.
BENCHMARK_NUM_FEWSHOT = 5
FEWSHOT_SEED = 1234  # lm-eval's own
PROTOCOLS = "protocols"
FIRST_N_NOTE = "first_n (set by dude: with lm-eval's default the examples depend on the number of processes)"


@dataclass(frozen=True)
class LoadedTask:
    """A task, group or tag as it was asked for, with its data: lm-eval's leaf tasks and groups by name.

    `default_examples` says that its prompts have as many examples as they have when no number is given.
    """

    request: EvalTask
    tasks: dict[str, Any]
    groups: dict[str, Any]
    default_examples: bool = True

    @property
    def names(self) -> list[str]:
        return [*self.groups, *self.tasks]

    @property
    def group_configs(self) -> dict[str, dict[str, Any]]:
        """What the score of each group is made of."""
        return {
            name: {
                "members": sorted(group.child_names),
                "aggregate_metric_list": [asdict(metric) for metric in group.aggregate_metric_list or ()],
            }
            for name, group in self.groups.items()
        }


def load_tasks(
    requested: tuple[EvalTask, ...],
    *,
    data_dir: Path | None,
    include_paths: tuple[Path, ...],
    log: Callable[[str], None],
    warn: Callable[[str], None] = lambda message: None,
    reader: RowReader | None = None,
) -> list[LoadedTask]:
    """Find every task, load its data, and set its number of few-shot examples; in the order asked for.

    Rows of the user's own are read by `reader`, which they need. Raises DataError for what is wrong with them, and
    UsageError for an unknown task (with the nearest names), data that are not there, two requests that share a task,
    more few-shot examples than there are, and tasks that this tool does not run.
    """
    _check_requests(requested, data_dir, include_paths)
    with TemporaryDirectory(prefix="dude-tasks-") as folder:
        official = _write_task_files(Path(folder), data_dir)
        index = _index([task.name for task in requested if task.rows is None], Path(folder), include_paths)
        loaded = []
        for task in requested:
            log(f"loading {task.name}")
            if task.rows is not None:
                loaded.append(_own_rows(task, task.rows, reader, log, warn))
                continue
            file = index.task_index[task.name].yaml_path
            is_users = file is not None and not file.is_relative_to(folder)
            benchmark = None if is_users else official.get(task.name)
            found = _load(index, task, benchmark, data_dir)
            are_default = []
            for name, leaf in found.tasks.items():
                are_default.append(_prepare(name, leaf, task, benchmark is not None, log))
                _name_official_source(leaf, Path(folder))
            loaded.append(replace(found, default_examples=all(are_default)))
    _check_overlap(loaded)
    return loaded


def sampler_note(task: Any) -> str:
    """How a loaded task picks its few-shot examples, for the results."""
    if not task.get_config("num_fewshot"):
        return "none"
    source = str((task.get_config("metadata") or {}).get("config_source", ""))
    if source.endswith("gsm8k/gsm8k.yaml"):
        return FIRST_N_NOTE
    sampler = task.fewshot_cfg.sampler if getattr(task, "fewshot_cfg", None) else "default"
    return f"default (random, seed {FEWSHOT_SEED})" if sampler == "default" else str(sampler)


def is_offline() -> bool:
    """Whether the environment tells Hugging Face's libraries to stay off the network."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


@contextmanager
def offline() -> Iterator[None]:
    """Within, Hugging Face's libraries use what is on this machine and open no connection, so nothing is retried.

    They read the environment once, when they are imported, which may have happened: their settings change too.
    """
    import datasets.config
    import huggingface_hub.constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {name: os.environ.get(name) for name in names}
    settings = [
        (module, name, getattr(module, name))
        for module in (huggingface_hub.constants, datasets.config)
        for name in names
        if hasattr(module, name)
    ]
    try:
        for name in names:
            os.environ[name] = "1"
        for module, name, _ in settings:
            setattr(module, name, True)
        yield
    finally:
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for module, name, before in settings:
            setattr(module, name, before)


def _check_requests(requested: tuple[EvalTask, ...], data_dir: Path | None, include_paths: tuple[Path, ...]) -> None:
    names = [task.name for task in requested]
    if not names:
        raise UsageError("there is no task to score", where="--task", fix="name one, such as --task gsm8k")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"the task `{name}` is given twice", where="--task", fix="give it once")
    for option, folder in [("--data-dir", data_dir), *(("--include-path", path) for path in include_paths)]:
        if folder is not None and not folder.is_dir():
            raise UsageError(f"there is no folder `{folder}`", where=option, fix="give a folder that exists")


def _write_task_files(folder: Path, data_dir: Path | None) -> dict[str, str]:
    """Write a task file for gsm8k and for each of mmlu's; return their names, groups and tags with their benchmark."""
    import lm_eval.tasks
    import yaml

    root = Path(lm_eval.tasks.__file__).parent
    files = {root / "gsm8k" / "gsm8k.yaml": "gsm8k"}
    files |= dict.fromkeys(sorted((root / "mmlu" / "default").glob("*.yaml")), "mmlu")
    benchmarks = {} if data_dir is None else _write_protocol_files(folder / PROTOCOLS, data_dir)
    local = {} if data_dir is None else {name: _local_data(data_dir / name) for name in set(files.values())}
    for official, benchmark in files.items():
        config = yaml.safe_load(official.read_text(encoding="utf-8"))
        benchmarks[config.get("group") or config["task"]] = benchmark
        if benchmark == "mmlu" and "tag" in config:
            benchmarks[config["tag"]] = benchmark
        changed: dict[str, Any] = {"include": str(official)}
        if benchmark == "gsm8k":
            changed["fewshot_config"] = {"sampler": "first_n"}
        # A group hands its keys on to its members, so this reaches the subjects under `mmlu` as well.
        changed |= local.get(benchmark, {})
        ours = folder / official.relative_to(root)
        ours.parent.mkdir(parents=True, exist_ok=True)
        ours.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return benchmarks


def _write_protocol_files(folder: Path, data_dir: Path) -> dict[str, str]:
    """Write a file for each task of `protocols/` that reads its data from `data_dir`; return their data's folders.

    Tasks on GSM8K read gsm8k/ as lm-eval's own does, those of LLM-Adapters' test sets commonsense/NAME/test.json.
    """
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    folder.mkdir()
    found: dict[str, str] = {}
    for file in sorted(PROTOCOLS_DIR.glob("*.yaml")):
        config = load_yaml(file, resolve_func=False)
        changed: dict[str, Any] = {"include": str(file)}
        if "dataset_kwargs" in config:
            url = config["dataset_kwargs"]["data_files"]["test"]
            local = data_dir.absolute() / "commonsense" / Path(url).parent.name / "test.json"
            changed["dataset_kwargs"] = {"data_files": {"test": str(local)}}
        elif config.get("dataset_path") == "openai/gsm8k":
            changed |= _local_data(data_dir / "gsm8k")
        found[config.get("group") or config["task"]] = "gsm8k" if "dataset_path" in changed else "commonsense"
        (folder / file.name).write_text(yaml.safe_dump(changed), encoding="utf-8")
    return found


def _local_data(folder: Path) -> dict[str, Any]:
    """The keys of a task file that has it read `folder`, and nothing that was read before from another one."""
    return {"dataset_path": str(folder.absolute()), "dataset_kwargs": {"cache_dir": str(folder_cache(folder))}}


def _index(names: list[str], official: Path, include_paths: tuple[Path, ...]) -> Any:
    """lm-eval's TaskManager with all of `names`: later folders win, so a user's `gsm8k` replaces the official one."""
    from lm_eval.tasks import TaskManager

    from dude_cli.quickstart import TASKS_DIR

    protocols = [] if (official / PROTOCOLS).is_dir() else [PROTOCOLS_DIR]
    folders = [*protocols, official, TASKS_DIR, *include_paths]
    index = TaskManager(include_path=folders, include_defaults=False)
    if all(name in index.all_tasks for name in names):
        return index
    # All of lm-eval's own files take seconds to read.
    index = TaskManager(include_path=folders, include_defaults=True)
    unknown = [name for name in names if name not in index.all_tasks]
    if unknown:
        close = list(dict.fromkeys(match for name in unknown for match in nearest(name, index.all_tasks)))
        raise UsageError(
            f"lm-eval has no task {', '.join(f'`{name}`' for name in unknown)}",
            where=", ".join(["--task", *(f"--include-path {path}" for path in include_paths)]),
            fix=f"nearest names: {', '.join(close)}" if close else "`lm_eval ls tasks` lists all of them",
        )
    return index


def _load(index: Any, task: EvalTask, benchmark: str | None, data_dir: Path | None) -> LoadedTask:
    local = None if data_dir is None or benchmark is None else data_dir / benchmark
    if local is not None and not local.is_dir():
        raise UsageError(
            f"the task `{task.name}` has no data in --data-dir",
            where=str(local),
            fix=f"put a copy of the {benchmark} data set there: a folder that datasets.load_dataset opens",
        )
    try:
        loaded = index.load([task.name])
    except Exception as error:  # a task file may name any data and any code; whatever it raises is about the task
        raise _not_loaded(task.name, benchmark, local, error) from error
    return LoadedTask(task, loaded["tasks"], loaded.get("groups", {}))


def _own_rows(
    task: EvalTask,
    sources: Sequence[DataSource],
    reader: RowReader | None,
    log: Callable[[str], None],
    warn: Callable[[str], None],
) -> LoadedTask:
    from dude_cli.evaluation.rows_task import rows_task

    assert reader is not None
    return LoadedTask(task, {task.name: rows_task(task.name, sources, reader, task.limit, log, warn)}, {})


def _not_loaded(name: str, benchmark: str | None, local: Path | None, error: Exception) -> UsageError:
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if local is not None:
        return UsageError(
            f"the data of the task `{name}` cannot be read ({reason})",
            where=str(local),
            fix=f"check that datasets.load_dataset opens it with the configurations and splits of {benchmark}",
        )
    if isinstance(error, ImportError):
        return UsageError(
            f"the task `{name}` needs a package that is not installed ({reason})",
            where=f"--task {name}",
            fix="install it; lm-eval's README names the extra of each task",
        )
    if not isinstance(error, OSError):
        return UsageError(
            f"the task `{name}` cannot be loaded ({reason})",
            where=f"--task {name}",
            fix="check its file and its data set",
        )
    connect = "run it once with network, which keeps the data on this machine"
    return UsageError(
        f"the data of the task `{name}` are not on this machine and cannot be fetched ({reason})",
        where=f"--task {name}",
        fix=f"pass --data-dir DIR with a copy in DIR/{benchmark}, or {connect}" if benchmark else connect,
    )


def _prepare(name: str, task: Any, request: EvalTask, is_benchmark: bool, log: Callable[[str], None]) -> bool:
    """Refuse what cannot be run and set the number of few-shot examples, as lm-eval's `simple_evaluate` does.

    Returns whether it is the number that the task has when none is given.
    """
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise UsageError(
            f"the task `{name}` runs code that the model wrote, or shows it images; neither is supported here",
            where=f"--task {request.name}",
            fix="score an exported model with lm-eval itself",
        )
    asked, own = request.num_fewshot, task.get_config("num_fewshot")
    default = BENCHMARK_NUM_FEWSHOT if is_benchmark and own is None else own or 0
    if asked is None:
        asked = default
    elif own == 0 and asked:
        log(f"{name}: its prompt is written for 0 examples, so --num-fewshot {asked} does not apply")
        asked = 0
    available = len(task.sampler.df) if hasattr(task, "sampler") else 0
    if asked > available:
        raise UsageError(
            f"the task `{name}` has {available} few-shot examples, not {asked}",
            where="--num-fewshot",
            fix=f"ask for {available} at most",
        )
    task.set_config(key="num_fewshot", value=asked)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return bool(asked == default)


def _name_official_source(task: Any, folder: Path) -> None:
    # The results should name lm-eval's file, not the generated one that is gone by then.
    metadata = task.get_config("metadata") or {}
    source = Path(str(metadata.get("config_source", "")))
    if source.is_relative_to(folder):
        name = source.relative_to(folder).as_posix()
        ours = name.startswith(f"{PROTOCOLS}/")
        metadata["config_source"] = f"{'dude_cli/evaluation' if ours else 'lm_eval/tasks'}/{name}"


def _check_overlap(loaded: list[LoadedTask]) -> None:
    owner: dict[str, str] = {}
    for found in loaded:
        for name in found.tasks:
            if name in owner:
                raise UsageError(
                    f"the task `{name}` is part of both `{owner[name]}` and `{found.request.name}`",
                    where="--task",
                    fix="ask for one of them",
                )
            owner[name] = found.request.name
