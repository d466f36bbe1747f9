"""The memory of a device: how much there is, and the most that a training held."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What is measured where torch does not count the bytes of its tensors.
RESIDENT_SET = "largest resident set of the process, less the one before the model was loaded"


def device_bytes(device: torch.device) -> int:
    """All the memory of a GPU; for any other device the machine's."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def human_bytes(count: int) -> str:
    """`1.5 GiB`: three digits in the unit that fits."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.3g} {units[0]}"


class PeakMemory:
    """The most memory since `restart`, beside what was there when the object was made.

    On a GPU these are the bytes of torch's tensors. On any other device it is the resident set of this process; make
    the object before the model is loaded, so that Python, the imports and the rows do not count. What was freed and
    not given back to the system counts: glibc keeps blocks of up to 32 MiB, which may be more than what is in use.
    Only Linux can restart the count; elsewhere it goes back to the start of the process, loading and decomposing
    included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0 if device.type == "cuda" else _resident_bytes()
        self.definition = "torch.cuda.max_memory_allocated over the training" if device.type == "cuda" else RESIDENT_SET

    def restart(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set

    def peak_bytes(self) -> int:
        if self.device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        return _peak_resident_bytes() - self._before


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _peak_resident_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_models() -> None:
    """Give back what models that are no longer used have held: those in a cycle, as lm-eval's is, Python frees late."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
