"""Messages for the user: the errors that end a run early (wrong input, failed training, a signal,
an alert), and the logger of all other messages. And the reader of files of others, whose faults are
such messages: ordinary files only, and no more of them than fits into memory.
"""

import contextlib
import difflib
import errno
import functools
import itertools
import logging
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_OF_DISKS |= {errno.EIO, errno.ENAMETOOLONG}
logger = logging.getLogger("rlhf_jax")
warn_once = functools.cache(logger.warning)
MOST_BYTES = 1 << 28
"""The largest file of a folder that is read whole, 256 MiB; weights are read in parts. The largest
tokenizer.json of a public model has 33 MB."""
# Characters that a terminal obeys instead of showing them: control characters (C0 but tab and
# newline, DEL, C1), marks that change the direction of a text, other line ends; and halves of
# surrogate pairs, which cannot be sent to a terminal.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FEW = 12  # folders that an error lists


class UserError(ValueError):
    """What went wrong, where (file and line, row, config key) and what to do about it.

    Scripts print the message without a traceback and exit with code 2.
    """

    exit_code = 2


class ServiceError(UserError):
    """A server that the user named does not reply, or its reply is wrong. A run saves the step
    before it.
    """


class TrainingFault(RuntimeError):
    """A fault of a run whose input was right, such as non-finite numbers. Scripts print it and exit
    with code 1.
    """

    exit_code = 1


class Stopped(Exception):
    """A run that a signal ended, after a checkpoint. Scripts print it and exit with 128 + the
    signal's number.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class AlertStop(Stopped):
    """A run that an alert ended, after a checkpoint. Scripts print it and exit with code 3."""

    def __init__(self, message: str):
        Exception.__init__(self, message)
        self.exit_code = 3


def escaped(text: str) -> str:
    """The text for a terminal: characters that it would obey become escapes such as ``\\x1b``."""
    return _OBEYED.sub(lambda match: repr(match[0])[1:-1], text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint ``; did you mean OTHER?`` with the most similar known name; "" without one."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def is_hub_name(name: str) -> bool:
    """Whether a name may be one on the Hugging Face hub, NAME or OWNER/NAME; else it is a path:
    with an OWNER that is a folder here, or ``runs``.
    """
    owner, slash, _ = name.partition("/")
    is_path = slash and (owner == "runs" or os.path.isdir(owner))
    return bool(_HUB_NAME.fullmatch(name)) and not is_path


def no_folder(name: str | os.PathLike[str]) -> UserError:
    """The error of a folder that is not there. It names the most similar of those beside it, or the
    first ones.
    """
    path = Path(name)
    beside: list[str] = []
    if os.path.isdir(path.parent):
        beside = sorted(entry.name for entry in os.scandir(path.parent) if entry.is_dir())
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    if beside and not near and path.parent != Path():
        more = ", ..." if len(beside) > _FEW else ""
        hint = f" ({path.parent} has {', '.join(beside[:_FEW])}{more})"
    return UserError(f"{name}: no such folder{hint}")


@contextlib.contextmanager
def file_errors(path: object, verb: str = "read") -> Iterator[None]:
    """Says as a UserError, caused by the OSError, why a file or folder cannot be read (or written),
    or that it or its name is not UTF-8.
    """
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{path}: cannot be {verb}: {getattr(error, 'strerror', None) or error}"
        ) from error


def check_encoding(words: Iterable[str]) -> None:
    """Raises UserError if a word of the command line, or a path, is not UTF-8, since no file of a
    run could record it; or if this process cannot use names of files in UTF-8.
    """
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        raise UserError(
            f"names of files and texts are in UTF-8, and this process has {encoding}: set "
            "PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8"
        )
    for word in words:
        if word.encode("utf-8", "ignore").decode("utf-8") != word:
            raise UserError(f"{word}: is not UTF-8; give the file or folder another name")


def disk_fault(error: OSError) -> str | None:
    """A sentence about a disk that is full, cannot be written or is broken; None for another error,
    which a bug may have caused.
    """
    if error.errno not in _OF_DISKS:
        return None
    # Of a copy the second name is that of the new file.
    return f"{error.filename2 or error.filename or 'stdout or an open file'}: {error.strerror}"


def check_pattern(name: str, pattern: str) -> None:
    """Raises UserError unless the pattern is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{name} is no regular expression: {error}") from error


def is_there(path: Path) -> bool:
    """Whether there is a file or folder of that name.

    Raises:
        UserError: it is a symbolic link that leads nowhere or in a circle.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a symbolic link to {os.readlink(path)}, which cannot be followed; delete "
            "it, or put the file there"
        )
    return path.exists()


def refuse_links_out(folder: Path) -> None:
    """Refuses a folder of somebody else that would pass on files from outside as its own. The links
    of the hub's cache, from snapshots/NAME/ to blobs/, are followed.

    Raises:
        UserError: a symbolic link in the folder, or in a folder in it, leads out of it.
    """
    whole = Path(os.path.realpath(folder))
    inside = [whole]
    for place in whole.parents:
        if place.name == "snapshots":  # the folder may be one in snapshots/NAME/
            inside.append(place.parent / "blobs")
    # Those of the folder first: the second pattern lists what its links name.
    for path in itertools.chain(folder.glob("*"), folder.glob("*/*")):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not any(target.is_relative_to(place) for place in inside):
            raise UserError(
                f"{path} is a symbolic link to {os.readlink(path)}, out of its folder, and such "
                "links are not followed; delete it, or replace it by a copy of what it names"
            )


def read_file(path: Path, most: int | None = MOST_BYTES) -> bytes:
    """The content of a file.

    Raises:
        UserError: it is no ordinary file, but a pipe, a device or a folder; it has more than
            ``most`` bytes; or it cannot be read.
    """
    is_there(path)
    with file_errors(path):
        # Without waiting for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"{path}: is no file")
            if most is not None and about.st_size > most:
                raise UserError(f"{path}: has more than {most >> 20} MiB, which no such file needs")
            return file.read()
