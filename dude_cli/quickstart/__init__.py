"""The embedded quickstart: a small pretrained model, the generator of its data, and its lm-eval tasks.

A config names it ``embedded:quickstart``: the model, and the data set with splits `train`, `dev` and `test`.
"""

from pathlib import Path

from dude_cli.quickstart.problems import rows

NAME = "embedded:quickstart"
MODEL_DIR = Path(__file__).parent / "model"
TASKS_DIR = Path(__file__).parent / "tasks"

__all__ = ["MODEL_DIR", "NAME", "TASKS_DIR", "rows"]
