"""Read a file and overrides into its schema, with every problem of both in one error; write a config as YAML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dude_cli import shipped
from dude_cli.config.data_schema import DataSource
from dude_cli.config.overrides import apply_overrides
from dude_cli.config.problems import validate
from dude_cli.config.schema import Config
from dude_cli.config.section import Section
from dude_cli.config.strict_yaml import SCALAR_PATTERNS, Document, Place, Problem, parse, place_of
from dude_cli.errors import ConfigError, UsageError, nearest

S = TypeVar("S", bound=Section)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config at `path`, changed by overrides such as `train.learning_rate=1e-4`.

    A shipped name (`configs/gsm8k.yaml`, as `dude ls` prints it) works where no such file exists. `output_dir` is
    `runs/<name of the file>` if it is not given.

    Raises ConfigError: for a file that cannot be read, or with one line per problem, `file:line:column: message`, in
    the order of the file and then of the overrides.
    """
    config = load_sections(find_file(path, "config"), Config, overrides)
    return config if config.output_dir else config.model_copy(update={"output_dir": f"runs/{path.stem}"})


def load_sections(file: Path, root: type[S], overrides: Sequence[str] = ()) -> S:
    """Read a file whose schema is `root`, as `load_config` does; raises ConfigError as it does."""
    document = _read(file)
    if document.value is not None:
        apply_overrides(document, overrides)
    valid = validate(document, root)
    if valid is None or document.problems:
        ordered = dict.fromkeys(sorted(document.problems, key=lambda problem: problem.place))
        lines = [f"{problem.place.in_file(str(file))}: {problem.message}" for problem in ordered]
        raise ConfigError("\n".join(lines), problems=[problem.record(str(file)) for problem in ordered])
    return valid


def given_source(text: str, option: str) -> DataSource:
    """A data set given as the value of `option`: its path, or an entry such as `{path: openai/gsm8k, name: main}`.

    Raises UsageError for an empty path, ConfigError with each of an entry's problems.
    """
    if not text.lstrip().startswith("{"):
        try:
            return DataSource(path=text)
        except ValueError as error:  # empty, or no UTF-8
            fix = "give a file, a folder or a name on the hub"
            raise UsageError(f"{text!r} names no data set", where=option, fix=fix) from error
    document = _top_level(parse(text))
    valid = validate(document, DataSource)
    if valid is None or document.problems:
        messages = list(dict.fromkeys(problem.message for problem in document.problems))
        raise ConfigError("\n".join(messages), where=f"{option} {text}", fix="write it as an entry of `data.train`")
    return valid


def find_file(path: Path, kind: str) -> Path:
    """The file at `path`, else the shipped one of that name; `kind` is what it is to be: config or recipe.

    Raises ConfigError, with the nearest names, if there is neither.
    """
    found = path if path.exists() else shipped.find_shipped(path.as_posix())
    if found is None:
        raise _no_such_file(path, kind)
    return found


def dump_config(config: Config) -> str:
    """Return the config as YAML with each value written out; `load_config` reads it back to an equal Config."""
    return yaml.dump(resolved(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def resolved(config: Config) -> dict[str, Any]:
    """Return the config as plain values: each key written out, but for `num_train_epochs` beside `max_steps`."""
    values = config.model_dump()
    if config.train.max_steps is not None:
        del values["train"]["num_train_epochs"]
    return values


def _read(path: Path) -> Document:
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        names = sorted(str(file) for file in [*path.glob("*.yaml"), *path.glob("*.yml")])
        fix = "name one of its files: " + ", ".join(names) if names else "name a .yaml file"
        raise ConfigError("a file is wanted, and this is a folder", where=str(path), fix=fix) from error
    except OSError as error:
        raise ConfigError(
            f"cannot read the file: {error.strerror or error}", where=str(path), fix="check its permissions"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", errors="replace")
        message = f"not UTF-8 text: {error.reason}; save the file as UTF-8"
        return Document(problems=[Problem(place_of(before, len(before)), message)])
    return _top_level(parse(text))


def _top_level(document: Document) -> Document:
    """Report a file that is empty, or anything but a mapping of keys."""
    if not isinstance(document.value, dict) and not document.problems:
        kind = "is empty" if document.value is None else f"is not a mapping but {json.dumps(document.value)[:40]}"
        message = f"the file {kind}; wanted keys and their values (copy a shipped one: `dude ls`, `dude cp`)"
        document.problems.append(Problem(document.values.get((), Place(1, 1)), message))
    if not isinstance(document.value, dict):
        document.value = None
    return document


def _no_such_file(path: Path, kind: str) -> ConfigError:
    folders = {path.parent, Path(f"{kind}s"), Path(".")}
    present = [file.as_posix() for folder in folders for file in folder.glob("*.y*ml")]
    names = [name for name, _ in shipped.list_shipped() if name.startswith(f"{kind}s/")]
    close = nearest(path.as_posix(), sorted({*present, *names}))
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return ConfigError(f"no such {kind} file", where=str(path), fix=f"{meant}shipped: {', '.join(names)}")


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 (other readers) or YAML 1.2 (`strict_yaml`) would take for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        **yaml.SafeDumper.yaml_implicit_resolvers,
        None: SCALAR_PATTERNS,
    }


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Double quotes escape line breaks and invisible characters, which other styles fold.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
