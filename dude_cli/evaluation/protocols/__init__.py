"""Published evaluation protocols as lm-eval tasks, each under a name of its own beside lm-eval's standard task."""

from pathlib import Path

TASKS_DIR = Path(__file__).parent

__all__ = ["TASKS_DIR"]
