"""Makes glibc's allocator keep freed memory, for XLA's CPU backend.

At each call XLA allocates one buffer for all temporary values of a program and frees it at the end.
glibc maps and unmaps a block of that size each time, so the kernel clears every page again: 81,480
page faults in one SFT step of 4 layers of width 128, a quarter of its time.
"""

import ctypes
import os
import sys
from pathlib import Path

# A heap holds blocks of at most 64 MiB, and larger ones are mapped, unless glibc is to use pages of
# 1 GiB: then of 4 GiB, whether or not there are such pages. Each of four heaps keeps less than 1
# GiB. With one heap for all of them, XLA's threads would wait for each other.
TUNABLES = "glibc.malloc.hugetlb=0x40000000:glibc.malloc.trim_threshold=0x40000000"
# Blocks of 1 GiB and more are mapped, and given back when they are freed. In a heap, those of
# programs of several widths leave holes that the next one does not fit in: a reward model whose
# steps need 11 GiB at most took 18 in its fourth step and was killed at 24.
TUNABLES += ":glibc.malloc.mmap_threshold=0x40000000"
TUNABLES += ":glibc.malloc.arena_max=4"
# XLA asks for aligned blocks. What glibc cuts off at the ends of a block would go to a thread's
# cache and keep the freed block from joining the free memory around it, so that the next block of
# its size would not fit there. Of six blocks of 1.5 GiB, each freed before the next, 7.7 GiB were
# kept and 1.9 million pages faulted; without these caches 1.5 GiB and 0.4 million.
TUNABLES += ":glibc.malloc.tcache_count=0"

KEPT = 4 * 2**30  # bytes of freed memory that a process keeps at most


def keep_memory() -> None:
    """Starts this process again, with the setting that makes glibc keep freed memory for its next
    allocation.

    An entry point calls it first, since all that ran before runs again. glibc reads its settings
    once, from the environment variable ``GLIBC_TUNABLES`` of a new process. The variable is then
    removed: programs that this process starts do not inherit it. The process keeps up to 4 GiB more
    memory. A program whose temporary values take more than 1 GiB still faults its pages at each
    call.

    Does nothing where ``RLHF_JAX_KEEP_MEMORY`` is 0 or ``GLIBC_TUNABLES`` is set, on a kernel that
    knows no pages of 1 GiB, under a debugger (``sys.gettrace``), and where no file is run. With a
    glibc before 2.35 calls fault their pages all the same.
    """
    given = os.environ.get("GLIBC_TUNABLES")
    if given == TUNABLES:
        del os.environ["GLIBC_TUNABLES"]
    is_off = os.environ.get("RLHF_JAX_KEEP_MEMORY") == "0"
    is_known = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB").is_dir()
    is_script = hasattr(sys.modules["__main__"], "__file__")
    if given is None and is_known and is_script and not is_off and not sys.gettrace():
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back() -> None:
    """Returns the freed memory that glibc keeps to the system; does nothing without glibc."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
