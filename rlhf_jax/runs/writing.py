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
      OSError: a file cannot be written; it names the file.
    """
    refuse_links(contents)
    with contextlib.ExitStack() as stack:
        unfinished = {}
        try:
            for path, content in contents.items():
                unfinished[path] = stack.enter_context(unfinished_beside(path, Path.touch))
                _write(unfinished[path], content)
            *first, path = contents
            if first:
                path.unlink(missing_ok=True)
            for path, new in unfinished.items():
                new.replace(path)
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
    former = _free_name(path)
    try:
        with unfinished_beside(path, Path.mkdir) as new:
            yield new
            if path.exists():
                path.rename(former)
            new.rename(path)
    finally:
        delete(former, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raises UserError unless a file can be written in the folder, or in the nearest folder above
    it that exists.
    """
    absolute = folder.absolute()
    place = next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))
    with file_errors(folder, "written"), unfinished_beside(place / "probe", Path.touch) as new:
        _write(new, bytes(1 << 12))


def _write(new: Path, content: str | bytes) -> None:
    """Brings the content to the disk."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def unfinished_beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """What ``make`` makes beside ``path``, locked by this process; deleted unless it is renamed."""
    _sweep_once(path.parent.absolute())
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
        delete(new, ignore_errors=True)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Deletes what killed processes left unfinished in a folder, and no process still holds."""
    with contextlib.suppress(OSError):
        for name in filter(UNFINISHED.fullmatch, os.listdir(folder)):
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                delete(folder / name, ignore_errors=True)
            os.close(descriptor)


_sweep_once = functools.lru_cache(maxsize=256)(sweep)


@contextlib.contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Keeps other processes from writing a file while the block is open, by a locked file
    ``.NAME.lock`` beside it.

    Raises:
      UserError: another process, named by its PID, writes the file.
    """
    with file_errors(path, "written"):
        lock = path.with_name(f".{path.name}.lock")
        release = take_lock(
            lock, f"{path} is being written", "wait for it, or choose another --out"
        )
    try:
        yield
    finally:
        release()


def take_lock(lock: Path, what: str, advice: str) -> Callable[[], None]:
    """Locks a file for this process, whose PID it then holds; returns what unlocks and deletes it.

    Raises:
      UserError: another process holds it: ``WHAT by the process with PID ...; ADVICE``. Or it is a
        symbolic link.
    """
    refuse_links([lock])
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(lock, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.read(descriptor, 32).strip()
            os.close(descriptor)
            holder = (
                f"the process with PID {int(number)}" if number.isdigit() else "another process"
            )
            raise UserError(f"{what} by {holder}; {advice}") from None
        if _is_open_at(descriptor, lock):
            break
        os.close(descriptor)  # its holder has ended and deleted it in between

    def release() -> None:
        lock.unlink(missing_ok=True)
        os.close(descriptor)

    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    except OSError:  # the disk is full
        release()
        raise
    return release


def is_locked(lock: Path) -> bool:
    """Whether a process holds the lock of ``take_lock``. Nothing is written."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # there is none, or it is somebody else's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _free_name(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(8)}.unfinished")


def delete(entry: Path, ignore_errors: bool = False) -> None:
    """Deletes a file, a link, or a folder with what it holds; nothing where there is none."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=ignore_errors)
    else:
        entry.unlink(missing_ok=True)


def copy_files(files: Iterable[Path], source: Path, folder: Path) -> None:
    """Copies those of the files that there are to their places below ``source``, in ``folder``."""
    for file in filter(Path.is_file, files):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def open_to_append(path: Path) -> TextIO:
    """Opens a text file to append lines to it.

    Raises:
      UserError: the path is a symbolic link.
    """
    refuse_links([path])

    def without_following(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, "a", encoding="utf-8", newline="\n", opener=without_following)
