"""The embedded quickstart: a small pretrained model, the generator of its data, and its lm-eval tasks.

A config names it ``embedded:quickstart``: the model, and the data set with splits `train`, `dev` and `test`.

Everything here is a pure function of a seed. A `Kind` describes problems that share one chain of calculations
and the sentences that tell it. It is asked in two forms:

- a `Problem` in GSM8K's layout: ``Question: ...``, ``Answer:``, one calculation per line and ``#### N``;
- a `Choice` in the layout of lm-eval's mmlu: the question, four lettered options, ``Answer:`` and a letter. The
  options are calculations, and one of them solves the question. All questions of a family have the same four
  calculations to choose from, on numbers drawn alike, so that neither options nor numbers tell the right one.

The pretraining corpus mixes sums, stories, reading and choosing a letter. The fine-tuning family, `MARKET`,
joins a multiplication with an addition or a subtraction, which no pretraining story does, in words that
pretraining uses otherwise.

Which split a problem belongs to depends only on its set of numbers: no held-out problem has the numbers of
a training problem, whatever their order, the sentence around them or the form of the question. Pretraining
leaves those sets out too.
"""

from pathlib import Path

from dude_cli.quickstart.problems import rows

NAME = "embedded:quickstart"
MODEL_DIR = Path(__file__).parent / "model"
TASKS_DIR = Path(__file__).parent / "tasks"

__all__ = ["MODEL_DIR", "NAME", "TASKS_DIR", "rows"]
