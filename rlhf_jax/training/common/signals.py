"""Ctrl-C and SIGTERM end a run after the step it is in, with a checkpoint; a second one ends it at
once.
"""

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType

import jax

from rlhf_jax.runs import manifest


@contextlib.contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """While open, SIGINT and SIGTERM are added to the list; the same signal again acts as it did
    before.

    With several processes SIGTERM is left to JAX, see ``processes.stop_signal``, and SIGINT raises
    one. Python delivers signals only to the main thread; in other threads nothing is caught.
    """
    is_alone = jax.process_count() == 1
    received: list[signal.Signals] = []
    caught = (signal.SIGINT, signal.SIGTERM) if is_alone else (signal.SIGINT,)
    before = {
        number: signal.getsignal(number) for number in caught if current_thread() is main_thread()
    }

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, before[received[-1]])
        print(f"{received[-1].name}: stopping after this step", file=sys.stderr, flush=True)
        if not is_alone:
            signal.raise_signal(signal.SIGTERM)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number in before:
            signal.signal(number, before[number])


def resume_command(stage: str, folder: Path) -> str:
    """The command line of this process, with ``--resume``. A fork goes on as a run of its stage;
    what its config names was typed or trusted when it began.
    """
    words = manifest.command_line()
    if words[:2] == ["rlhf-jax", "fork"]:
        words = ["rlhf-jax", stage.replace("_", "-"), "--config", str(folder / "config.yaml")]
        words += ["--output-dir", str(folder), "--trust-config"]
    kept = [word for word in words if word not in ("--overwrite", "--resume")]
    return shlex.join([*kept, "--resume"])
