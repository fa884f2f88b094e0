"""Files and folders that appear whole or not at all, whatever kills the process that writes them.

    write_atomically(path, text)
    with replacing(folder) as new:
        (new / "a.txt").write_text("a")

What is not complete has an unpredictable name, ``.HEX.unfinished``, beside the place that it will
take. Its writer holds a lock on it, which ends with the process. So the next command that writes
there knows that it is a leftover and deletes it.
"""

import contextlib
import fcntl
import functools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from rlhf_jax.errors import UserError, file_errors

UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.unfinished")
_PROBE = bytes(1 << 12)


def refuse_links(paths: Iterable[Path]) -> None:
    """Raises UserError if one of the paths is a symbolic link."""
    for path in paths:
        if path.is_symlink():
            raise UserError(
                f"{path} is a symbolic link to {os.readlink(path)}, and no link in a run's folder "
                "is followed; delete it, or replace it by a copy of what it names"
            )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing, even if the process is killed. The umask gives its mode.

    Raises:
      UserError: the path is a symbolic link.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Writes files that belong together. All are on the disk before the first gets its name. The
    last one is deleted first and gets its name last: where it is, the others are of the same call.

    Raises:
      UserError: a path is a symbolic link.
    """
    refuse_links(contents)
    with contextlib.ExitStack() as stack:
        unfinished = {}
        for path, content in contents.items():
            unfinished[path] = stack.enter_context(_unfinished_file(path))
            _fill(unfinished[path], content, path)
        *first, last = contents
        if first:
            last.unlink(missing_ok=True)
        for path, new in unfinished.items():
            new.replace(path)


def _fill(new: Path, content: str | bytes, path: Path) -> None:
    """Brings the content to the disk; an error names the ``path`` that it is for."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder that replaces ``path`` at the end of the ``with`` block. After an error the new
    folder is deleted, and ``path`` stays.

    Raises:
      UserError: the path is a symbolic link.
    """
    refuse_links([path])
    _sweep_once(path.parent.absolute())
    former = _free_name(path)
    try:
        with _held(path, Path.mkdir) as new:
            yield new
            if path.exists():
                path.rename(former)
            new.rename(path)
    finally:
        _delete(former)


def check_writable(folder: Path) -> None:
    """Raises UserError unless a file can be written in the folder, or in the nearest folder above
    it that exists.
    """
    absolute = folder.absolute()
    place = next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))
    with file_errors(folder, "written"), _unfinished_file(place / "probe") as new:
        _fill(new, _PROBE, folder)


@contextlib.contextmanager
def _unfinished_file(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, deleted at the end unless it has been renamed."""
    _sweep_once(path.parent.absolute())
    try:
        with _held(path, functools.partial(Path.touch, exist_ok=False)) as new:
            yield new
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def _held(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """What ``make`` makes under a free name beside ``path``, with this process's lock on it. At the
    end it is deleted unless it has been renamed.
    """
    while True:
        new = _free_name(path)
        make(new)
        descriptor = os.open(new, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a disk without locks: nothing is swept there either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_open_at(descriptor, new):
            break
        os.close(descriptor)  # another process took it for a leftover before it was locked
    try:
        yield new
    finally:
        _delete(new)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Deletes what killed processes left unfinished in a folder."""
    with contextlib.suppress(OSError):
        for name in filter(UNFINISHED.fullmatch, os.listdir(folder)):
            _delete_leftover(folder / name)


_sweep_once = functools.lru_cache(maxsize=256)(sweep)


def _delete_leftover(path: Path) -> None:
    """Deletes an unfinished file or folder unless a process still holds it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _delete(path)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Keeps other processes from writing a file while the block is open, by a locked file
    ``.NAME.lock`` beside it.

    Raises:
      UserError: another process, named by its PID, writes the file.
    """
    lock = path.with_name(f".{path.name}.lock")
    refuse_links([lock])
    with file_errors(path, "written"):
        descriptor = _locked(lock, path)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(lock: Path, path: Path) -> int:
    """The descriptor of the locked file."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{path} is being written by another process (PID {holder}); wait for it, or "
                "choose another --out"
            ) from None
        if _is_open_at(descriptor, lock):
            return descriptor
        os.close(descriptor)  # its holder has ended and deleted it in between


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _free_name(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(8)}.unfinished")


def _delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def open_to_append(path: Path) -> TextIO:
    """Opens a text file to append lines to it.

    Raises:
      UserError: the path is a symbolic link.
    """
    refuse_links([path])
    return open(path, "a", encoding="utf-8", newline="\n", opener=_without_following)


def _without_following(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
