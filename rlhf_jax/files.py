"""Reads files of others: ordinary files only, and no more of them than fits into memory."""

import os
import stat
from pathlib import Path

from rlhf_jax.errors import UserError, file_errors

MOST_BYTES = 1 << 28
"""The largest file of a folder that is read whole, 256 MiB; weights are read in parts. The largest
tokenizer.json of a public model has 33 MB."""


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


def read_bytes(path: Path, most: int | None = MOST_BYTES) -> bytes:
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
