"""glibc's allocator told to keep the memory that it once got, for XLA's CPU backend.

At each call XLA allocates one buffer for all temporary values of a program and frees it at the end. glibc maps and
unmaps a block of that size each time, so the kernel clears every page again: 81,480 page faults in one SFT step of 4
layers of width 128, a quarter of its time.
"""

import ctypes
import os
import platform

_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -8, -4, -1  # malloc.h


def keep_memory() -> bool:
    """Makes this process keep freed memory for its own next allocation; for entry points, before JAX starts a backend.

    One arena, no block of its own for a large allocation, nothing given back at the top of the heap: the process holds
    its peak until it ends. In about one of three processes each call faults its pages all the same; the reason is not
    known (see ``tests/test_bench.py``). Does nothing where the C library is not glibc, or where the environment
    variable ``RLHF_JAX_KEEP_MEMORY`` is 0. Returns whether it was set.
    """
    if os.environ.get("RLHF_JAX_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
