"""The time that a chat template tells the model, as Llama 3.2's tells the date: in all parts of a run the same one."""

from __future__ import annotations

import re
from datetime import datetime

_ASKED = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
_IS_DEFINED = re.compile(r"\bstrftime_now is defined\b")


def told_at(template: str, moment: datetime) -> str:
    """Return the template with each `strftime_now("...")` in it written out as of `moment`.

    transformers gives a template nothing but plain data, so the function itself cannot be given another time. Where the
    format is not written in the call, the function stays, and tells the present.
    """
    written = _ASKED.sub(lambda asked: repr(moment.strftime(asked[1][1:-1])), template)
    return _IS_DEFINED.sub("true", written)  # so that a template without the name is one that tells no other time
