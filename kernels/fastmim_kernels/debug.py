"""Debug mode: the values of an index are checked on CUDA too, as they always are on the CPU.

An index is read by the device; to look at it first the host must wait, so a kernel trusts what it is given,
and a wrong index reads or writes other memory. In debug mode it is a ValueError of the call that got it,
inside `torch.compile` as well. On with FASTMIM_DEBUG=1, which is read once, or with `set_debug(True)` at any
time. A CUDA graph cannot be captured in debug mode.
"""

import os


def _wanted(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"want FASTMIM_DEBUG 0 or 1, got {value!r}")
    return value == "1"


_mode = _wanted(os.environ.get("FASTMIM_DEBUG", ""))


def debugging() -> bool:
    """Whether a kernel of CUDA should look at the values of its index before it is launched."""
    return _mode


def set_debug(mode: bool) -> None:
    """Switch debug mode on or off, for the whole process; it outdoes FASTMIM_DEBUG."""
    global _mode
    _mode = mode
