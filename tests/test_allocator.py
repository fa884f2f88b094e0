"""The allocator of entry points: which processes start anew, and that their calls fault no page
twice.
"""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rlhf_jax.runs import allocator, devices

NAME = "GLIBC_TUNABLES"
PAGES = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB")
SCRIPT = """
import json, os, resource, sys
print("begun")
from rlhf_jax import cli
from rlhf_jax.runs import allocator

def faults():
    import jax, jax.numpy as jnp
    f = jax.jit(lambda x: jnp.sin(jnp.outer(x, x)) @ x)
    x, counts = jnp.ones(5000), []  # 100 MB in between
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        f(x).block_until_ready()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return counts

def main():
    # As the process was started; glibc cuts the string at its colons.
    with open("/proc/self/environ") as file:
        inside = "GLIBC_TUNABLES=" + allocator.TUNABLES.partition(":")[0] in file.read()
    counts = faults() if sys.argv[1:2] == ["faults"] else []
    tunables = os.environ.get("GLIBC_TUNABLES")
    print(json.dumps([inside, tunables, sys.argv[1:], sys.flags.utf8_mode, counts]))
    return 7

cli.run_script(main)
"""
needs_pages = pytest.mark.skipif(not PAGES.is_dir(), reason="a kernel that knows pages of 1 GiB")


BLOCKS = """
import ctypes
library = ctypes.CDLL(None)
for _ in range(5):
    block = ctypes.c_void_p()
    library.posix_memalign(ctypes.byref(block), 64, 1 << 27)
    ctypes.memset(block, 1, 1 << 27)
    library.free(block)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def printed(script):
    """The number that a script prints under our settings."""
    env = os.environ | {NAME: allocator.TUNABLES}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return int(done.stdout)


@needs_pages
def test_a_freed_block_is_room_for_the_next_one():
    """Five aligned blocks of 128 MiB, one after the other, take the memory of one."""
    assert 128 * 1024 < printed(BLOCKS) < 2 * 128 * 1024


LARGE = """
import ctypes
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
for eighths in (12, 11, 13, 12, 11):
    block = ctypes.c_void_p()
    assert library.posix_memalign(ctypes.byref(block), 64, eighths << 27) == 0
    stays = [library.malloc(1 << 20) for _ in range(3)]
    library.free(block)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")))
"""


@needs_pages
def test_blocks_of_gigabytes_leave_no_holes_in_a_heap():
    """Each is given back though small ones were allocated behind it; in heaps 3.3 GB stay."""
    assert printed(LARGE) < 2**20  # KiB


def test_what_glibc_keeps_is_given_back_where_there_is_glibc(monkeypatch):
    given = []
    library = types.SimpleNamespace(malloc_trim=given.append)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    devices.free_memory()
    assert given == [0]
    del library.malloc_trim
    allocator.give_back()


def started(tmp_path, *argv, how=(), **environment):
    """(how often the script began, whether with our settings, what GLIBC_TUNABLES is, flags, UTF-8
    mode, faults).
    """
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, *(how or ["-X", "utf8", str(tmp_path / "script.py")]), *argv]
    env = {
        key: value for key, value in os.environ.items() if key not in (NAME, "RLHF_JAX_KEEP_MEMORY")
    } | environment
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=env, timeout=120
    )
    assert done.returncode == 7, done.stderr
    *begun, line = done.stdout.splitlines()
    return len(begun), *json.loads(line)


@needs_pages
def test_a_script_starts_anew_once_with_its_flags_and_leaves_the_environment_as_it_was(tmp_path):
    assert started(tmp_path, "--a", "b c") == (2, True, None, ["--a", "b c"], 1, [])


@needs_pages
def test_what_a_user_set_is_left_alone(tmp_path):
    assert started(tmp_path, RLHF_JAX_KEEP_MEMORY="0") == (1, False, None, [], 1, [])
    assert started(tmp_path, **{NAME: "glibc.malloc.check=0"}) == (
        1,
        False,
        "glibc.malloc.check=0",
        [],
        1,
        [],
    )


def test_a_program_that_is_no_file_goes_on_since_it_may_have_been_read_from_a_pipe(tmp_path):
    assert started(tmp_path, "--a", how=["-X", "utf8", "-c", SCRIPT]) == (
        1,
        False,
        None,
        ["--a"],
        1,
        [],
    )


def test_a_debugger_keeps_its_process(monkeypatch):
    begun = []
    monkeypatch.delenv("RLHF_JAX_KEEP_MEMORY")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    monkeypatch.setattr(allocator.Path, "is_dir", lambda path: True)
    monkeypatch.setattr(allocator.os, "execv", lambda *command: begun.append(command))
    for tracing, known in (
        (print, True),
        (None, False),
        (None, True),
    ):  # known: on some kernels and systems not
        assert not begun
        monkeypatch.delenv(NAME, raising=False)
        monkeypatch.setattr(allocator.sys, "gettrace", lambda tracing=tracing: tracing)
        monkeypatch.setattr(allocator.Path, "is_dir", lambda path, known=known: known)
        allocator.keep_memory()
    assert begun == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    allocator.keep_memory()  # in the new process
    assert NAME not in os.environ
    assert len(begun) == 1


@needs_pages
@pytest.mark.slow
def test_entry_points_keep_memory_so_that_a_call_faults_no_page_twice(tmp_path):
    """But for the first calls of each of four heaps, whichever of XLA's threads takes a call."""
    pages = 5000 * 5000 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert min(started(tmp_path, "faults", RLHF_JAX_KEEP_MEMORY="0")[-1]) > pages / 2
    assert sum(count > pages / 20 for count in started(tmp_path, "faults")[-1]) <= 10
