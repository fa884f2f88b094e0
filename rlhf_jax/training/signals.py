"""Ctrl-C and SIGTERM end a run after the step it is in, with a checkpoint; a second one ends it at once."""

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Whether a signal has asked the run to stop, and which."""

    received: signal.Signals | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While open, SIGINT and SIGTERM set ``received``; the same signal again acts as it did before.

    Python hands signals to the main thread alone: elsewhere nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        request.received = signal.Signals(number)
        signal.signal(number, before[request.received])
        print(f"{request.received.name}: stopping after this step", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command() -> str:
    """The command line of this process, with ``--resume``."""
    arguments = [argument for argument in sys.argv if argument not in ("--overwrite", "--resume")]
    return shlex.join(["python", *arguments, "--resume"])
