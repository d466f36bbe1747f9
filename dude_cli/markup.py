"""Text as Markdown that shows it: what somebody has called a run or a recipe is never markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"[\\`*_<\[#&$|~]")
_CODE_OR_SPECIAL = re.compile(rf"`[^`]+`|{_SPECIAL.pattern}")


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def escaped_but_code(text: str) -> str:
    """The same, but what stands between backticks is code."""
    return _CODE_OR_SPECIAL.sub(
        lambda found: found[0] if len(found[0]) > 1 else f"\\{found[0]}", " ".join(text.split())
    )


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escaped, cells)) + " |"
