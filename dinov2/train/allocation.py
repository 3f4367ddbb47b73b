"""How a training on a CPU gets its memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for what is asked for next, instead of giving it back to the system.

    Each step asks for the same gigabytes again, and the system would fill every page of them with zeros first. Has no
    effect where the C library is not GNU's.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)  # large pieces come from the heap too
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # which never shrinks
