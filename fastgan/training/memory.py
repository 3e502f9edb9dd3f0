"""What malloc does with freed memory."""

import ctypes
import sys

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLDS = (1 << 30, 1 << 25)  # the largest that any version takes, and that all do


def keep_freed_memory() -> None:
    """Has malloc keep what is freed in this process for what is allocated next.

    glibc gives large freed pieces back to the system. A step of training on the CPU asks for the same again, and the system
    hands them out page by page, filled with zeros: tens of thousands of times a step, which takes longer than small layers
    do. Afterwards the process stays as large as it has ever been. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        for size in _MMAP_THRESHOLDS:
            if mallopt(_M_MMAP_THRESHOLD, size):
                break
