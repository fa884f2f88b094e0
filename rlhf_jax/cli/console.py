"""The terminal: what a command prints, what is typed, and how a script starts and ends."""

import contextlib
import gc
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rlhf_jax.errors import (
    Stopped,
    TrainingFault,
    UserError,
    check_encoding,
    disk_fault,
    escaped,
    file_errors,
    logger,
)
from rlhf_jax.runs import allocator


class _Console(logging.Handler):
    """Prints messages as they are, to ``file`` (None: stdout)."""

    file: TextIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        show(record.getMessage(), file=self.file, flush=True)


def show(text: object, **how: Any) -> None:
    """Prints texts of data, files and settings without control characters."""
    print(escaped(str(text)), **how)


CONSOLE = _Console()


def attach_console() -> None:
    """Prints the messages of the logger ``rlhf_jax``, with which the package reports, to stdout."""
    logger.setLevel(logging.INFO)
    logger.addHandler(CONSOLE)
    # A library that configures the root logger would print each message again.
    logger.propagate = False


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's ``main`` and exits with its code (None: 0). On Linux the script may start
    anew first, with other settings of the allocator: see ``runs.allocator.keep_memory``.

    Errors that are printed without a traceback: a :class:`UserError`, which exits with 2; a
    :class:`TrainingFault`, or a disk that is full or cannot be written, with 1; a :class:`Stopped`,
    with 130 (Ctrl-C), 143 (SIGTERM) or 3 (an alert whose action is stop). Ctrl-C outside a training
    loop exits with 130 too, and a closed pipe, as of ``| head``, with 141 and no message. Any other
    exception passes through: Python prints its traceback and exits with 1.
    """
    allocator.keep_memory()  # first: it may start the process anew
    attach_console()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of a terminal that is not of UTF-8
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **how: escaped(format_warning(*args, **how))
    # Modules and traces are many objects that stay: by default, half a second of each start.
    gc.set_threshold(100_000)
    try:
        check_encoding(sys.argv)
        with contextlib.suppress(FileNotFoundError):  # the folder was deleted
            check_encoding([str(Path.cwd())])
        code = main() or 0
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # of `| head`: nobody reads what is left in the buffer
        os._exit(141)
    except (UserError, TrainingFault, Stopped) as end:
        show(end if isinstance(end, Stopped) else f"error: {end}", file=sys.stderr)
        sys.exit(end.exit_code)
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        show(f"error: {fault}", file=sys.stderr)
        sys.exit(TrainingFault.exit_code)
    except KeyboardInterrupt:
        show("interrupted", file=sys.stderr)
        sys.exit(130)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints texts in columns under these labels."""
    from rich import console, table, text

    shown = table.Table(*columns, box=None)
    for row in rows:
        # Text: brackets in the name of a category are no markup.
        shown.add_row(*(text.Text(escaped(cell)) for cell in row))
    console.Console(width=1000).print(shown)  # a terminal's own width would cut texts


@contextlib.contextmanager
def columns(labels: Sequence[str]) -> Iterator[Callable[[Sequence[str]], None]]:
    """Shows texts in columns under these labels, anew at each call."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with Live(auto_refresh=False) as live:

        def show(texts: Sequence[str]) -> None:
            table = Table(*labels, expand=True)
            for column in table.columns:
                column.ratio = 1
            table.add_row(*(Text(escaped(text)) for text in texts))
            live.update(table, refresh=True)

        yield show


def typed_lines() -> Iterator[str]:
    """The lines of stdin; on a terminal after a mark, and with its line editor."""
    if not sys.stdin.isatty():
        with file_errors("stdin"):
            yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # which `input` then uses
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
