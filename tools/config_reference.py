"""Write docs/config.md from the schema in dude_cli/config/schema.py.

python tools/config_reference.py            prints the page
python tools/config_reference.py FILE       writes it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from dude_cli.config.keys import example, is_section, sections, wanted

INTRODUCTION = """# The config file

A config is one YAML file for one run. `model.name_or_path` and `data.train` are required; every other key has the
default below. `dude ls` lists the configs that come with the package, and `dude cp configs/gsm8k.yaml my.yaml` copies
one to edit. A shipped name works in place of a path too: `dude train configs/quickstart.yaml` runs anywhere. This page
is generated from the schema (`make config-docs`).

Any key can be changed on the command line: `dude train my.yaml train.learning_rate=1e-4 "data.train.0.split=dev[:9]"`.
A number names an entry of a list, from 0. The value follows the same YAML rules as the file, and wins over it; setting
`train.max_steps` also replaces the file's `train.num_train_epochs`, and the other way round. A template needs quotes of
YAML's within those of the shell: `dude train my.yaml 'data.prompt="Q: {question}\\nA:"' 'data.completion=" {answer}"'`.

The YAML is strict. `1e-4` is a number. Only `true` and `false` are booleans: `no` and `off` are text. Dates are text.
A key that is unknown, misspelt or given twice is an error. All problems are reported at once, each with its line and
column, before any model is loaded. Anchors and aliases work; merge keys (`<<`) and tags (`!!...`) do not.

Templates (`data.prompt`, `data.completion`) name columns in braces, `{question}`; `{{` and `}}` are literal braces. The
column's value is inserted as it is; a row with a null there is an error that names the row. One end-of-sequence token
follows each completion.

Relative paths, of data, chat templates, models, adapters and `output_dir`, start from the working directory of the
command, not from the folder of the config file.
"""


def reference() -> str:
    """Return docs/config.md: one table per section with each key's values, default and meaning."""
    parts = [INTRODUCTION]
    for path, section in sections():
        title = f"`{'.'.join(path)}`" if path else "Top level"
        parts.append(f"## {title}\n\n{_table(section.model_fields)}")
    return "\n".join(parts)


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        value = "section, see below" if is_section(field) else wanted(field)
        rows.append(f"| `{name}` | {value} | {_default(field)} | {_meaning(field)} |")
    return "\n".join(rows) + "\n"


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required" if is_section(field) else f"required, such as `{_shown(example(field))}`"
    return "" if is_section(field) else f"`{_shown(field.get_default(call_default_factory=True))}`"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
    else:
        print(reference())
