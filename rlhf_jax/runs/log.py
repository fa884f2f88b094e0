"""What a run records: rows of numbers, seconds and texts in its folder, and lines on the console.

    with Tracker(run, total=100, resume_step=None, ...) as tracker:
        tracker.log(step, metrics)
        tracker.sync()
        checkpoints.save(step, ...)

The rows of a step are written before its checkpoint is saved. A run that is resumed from this
checkpoint removes the rows of later steps and writes them again, so that no row is missing and none
is there twice.
"""

import collections
import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf_jax.errors import logger
from rlhf_jax.runs import processes
from rlhf_jax.runs.folder import Run
from rlhf_jax.runs.reading import json_lines
from rlhf_jax.runs.trackers import Numbers, Services
from rlhf_jax.runs.writing import open_to_append, write_atomically

Row = Mapping[str, Any]
Say = Callable[[str], None]
_PRINT_EVERY = 10  # steps between lines if there is no terminal
SILENCE = 15.0  # seconds without a line, at most, if there is no terminal
SLOW_COMPILE = 5.0  # seconds after which a program that is compiled is named
SLOW_PHASE = 10.0  # seconds after which a phase is named, then after twice as many, and so on
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
PACE_STEPS = 10  # of which the pace is the mean


class Pulse(contextlib.AbstractContextManager["Pulse"]):
    """Prints lines while a step runs: the name of each program that takes long to compile, the name
    of a phase that takes long, and ``status()`` whenever there was no line for ``SILENCE`` seconds.

    A thread calls ``tick`` every second while the context is open.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, say: Say = logger.info):
        """clock: seconds from any origin."""
        self.clock = clock
        self._print = say
        self.status: Callable[[], str] | None = None  # None: only programs are named
        self._last_line = clock()
        self._compiling: dict[str, float] = {}  # {program: when it began}
        self._phase: tuple[str, float] | None = None  # what is done, and when it began
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Pulse":
        jax.monitoring.register_scalar_listener(self.compile_began)
        jax.monitoring.register_event_duration_secs_listener(self.compile_ended)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        jax.monitoring.unregister_scalar_listener(self.compile_began)
        jax.monitoring.unregister_event_duration_listener(self.compile_ended)

    def spoken(self) -> None:
        """Notes that a line was printed."""
        self._last_line = self.clock()

    def is_due(self) -> bool:
        """Whether the last line is ``SILENCE`` seconds old."""
        return self.clock() - self._last_line >= SILENCE

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is done, in a few words."""
        self._named_after = SLOW_PHASE
        self._phase = phase, self.clock()
        try:
            yield
        finally:
            self._phase = None

    def tick(self) -> None:
        """Prints the lines that are due."""
        for name, began in list(self._compiling.items()):
            if self.clock() - began >= SLOW_COMPILE:
                self._compiling.pop(name, None)  # it is named once
                self._say(f"compiling the program {name}")
        phase = self._phase  # its end may come meanwhile
        status = self.status if self.is_due() else None
        if phase is not None:
            waited = self.clock() - phase[1]
            if waited >= self._named_after or status is not None:
                self._named_after = 2 * waited
                self._say(f"{phase[0]}: {duration(waited)} so far")
        elif status is not None:
            self._say(status())

    def compile_began(self, event: str, value: float, **about: Any) -> None:
        """A listener of ``jax.monitoring``."""
        if event == COMPILE_EVENT:
            self._compiling[_program(about)] = self.clock()

    def compile_ended(self, event: str, duration_secs: float, **about: Any) -> None:
        """A listener of ``jax.monitoring``."""
        if event == COMPILE_EVENT:
            self._compiling.pop(_program(about), None)
            if duration_secs >= SLOW_COMPILE:
                self._say(f"compiled the program {_program(about)} in {duration_secs:.0f} s")

    def _say(self, line: str) -> None:
        self._print(line)
        self.spoken()

    def _beat(self) -> None:
        while not self._closed.wait(1.0):
            self.tick()


class Tracker(contextlib.AbstractContextManager["Tracker"]):
    """Writes ``metrics.jsonl``, ``timing.jsonl`` and ``samples.jsonl`` of a run and shows its
    progress.

    On a terminal: the first two of the shown metrics that the run has recorded, a progress bar and
    the time that is left. Elsewhere: a line at the first, every tenth and the last step, and
    whenever there was none for ``SILENCE`` seconds. On both: a line at each validation. Once the
    run is older than ``SILENCE``, the line has the seconds of a step and the time that is left.
    Lines are messages of the logger ``rlhf_jax``; there is no bar if its level is above INFO.
    """

    def __init__(
        self,
        run: Run,
        *,
        total: int,
        resume_step: int | None,
        label: str,
        show: Sequence[str],
        services: Services,
        pulse: Pulse,
    ):
        """Opens the files.

        Args:
          resume_step: step of the checkpoint that the run goes on from; None starts the files anew.
          label: the stage, such as ``ppo``.
          show: the metrics of the console's line.
          services: get rows, samples and alerts too; closed with the tracker.
          pulse: prints lines while a step runs, and has the clock.
        """
        self._services = services
        self._total = total
        self._label = label
        self._show = show
        self._files = [
            RowWriter(path, resume_step) for path in (run.metrics, run.timing, run.samples)
        ]
        self._metrics, self._timing, self._samples = self._files
        self._printed = False
        self._latest: dict[str, float] = {}  # the last value of each metric
        self._pulse = pulse
        # (step, when it ended) of the last steps
        self._ends = collections.deque[tuple[int, float]](maxlen=PACE_STEPS + 1)
        self._started = self._pulse.clock()
        self._resumed = resume_step or 0
        columns = (BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description}", markup=False), *columns)
        self._task = self._progress.add_task(label, total=total, completed=resume_step or 0)
        if self._progress.console.is_terminal and logger.isEnabledFor(logging.INFO):
            self._progress.start()
        elif not self._progress.console.is_terminal:
            self._pulse.status = self.status

    def log(self, step: int, metrics: Row) -> dict[str, float]:
        """Writes a row of ``metrics.jsonl`` and shows it. Returns the metrics as Python numbers.

        metrics: scalars, of which those on a device are waited for.
        """
        numbers = as_numbers(metrics)
        self._metrics.write(step, numbers)
        self._services.send("log", step, numbers)
        line = "  ".join(self._shown(numbers))
        self._latest |= numbers
        live = "  ".join([self._label, *self._shown(self._latest)[:2]])
        self._progress.update(self._task, completed=step, description=live)
        now = self._pulse.clock()
        self._ends.append((step, now))
        is_last = step >= self._total
        due = not self._printed or step % _PRINT_EVERY == 0 or is_last or self._pulse.is_due()
        has_bar = self._progress.console.is_terminal  # which says the time that is left
        validated = any(name.startswith("validation/") and name in numbers for name in self._show)
        if validated or (due and not has_bar):
            is_old = now - self._started >= SILENCE
            pace = f"  {self.pace()}" if is_old and not is_last and not has_bar else ""
            logger.info(f"{self._label} {step}/{self._total}  {line}{pace}".strip())
            self._pulse.spoken()
            self._printed = True
        return numbers

    def _shown(self, numbers: Numbers) -> list[str]:
        """The metrics of the console's line, as texts."""
        return [f"{name} {numbers[name]:.4g}" for name in self._show if name in numbers]

    def pace(self, waited: float = 0.0) -> str:
        """The mean seconds of the last ten steps, and the time that is left ``waited`` seconds
        after the last one; "" before the second step.
        """
        if len(self._ends) < 2:
            return ""
        first, began = self._ends[0]
        last, ended = self._ends[-1]
        seconds = (ended - began) / (last - first)
        left = seconds * (self._total - last) - min(waited, seconds)
        return f"{seconds:.3g} s a step, about {duration(left)} left"

    def status(self) -> str:
        """The step that the run is at, for a moment without a line."""
        last, ended = self._ends[-1] if self._ends else (self._resumed, self._started)
        waited = self._pulse.clock() - ended
        if last >= self._total:
            return f"{self._label}: all {self._total} steps done, finishing for {duration(waited)}"
        step = f"{self._label} step {last + 1} of {self._total} runs for {duration(waited)}"
        if last == self._resumed:
            step += ", the first one compiles its programs"
        return "  ".join(part for part in (step, self.pace(waited)) if part)

    def timing(self, step: int, seconds: Numbers) -> None:
        """Writes a row of ``timing.jsonl``. The metrics, which a seed reproduces, are in another
        file.
        """
        self._timing.write(step, seconds)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Writes rows of ``samples.jsonl``: JSON values such as prompt, response, score."""
        for row in rows:
            self._samples.write(step, row)
        self._services.samples(step, rows)

    def alert(self, step: int, text: str) -> None:
        """Prints a warning about the run and sends it to the services of ``--track``."""
        logger.info(f"alert at step {step}: {text}")
        self._services.send("alert", step, text)

    def sync(self) -> None:
        """Returns when all rows are on the disk; call it before a checkpoint is saved."""
        for writer in self._files:
            writer.sync()

    def __exit__(self, *error: object) -> None:
        """Ends the progress bar and closes the files."""
        self._pulse.status = None
        self._progress.live.stop()
        for writer in self._files:
            writer.close()
        self._services.send("close")


class RowWriter:
    """Appends JSON objects to a file, one a line, each with its ``"step"``.

    Floats read back equal. NaN and the infinities, which JSON lacks, become the strings "NaN",
    "Infinity" and "-Infinity", which Python's ``float`` and NumPy understand. Each row reaches the
    operating system at once, so that a killed process loses none; :meth:`sync` brings the rows to
    the disk, and is due before a checkpoint.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        """Starts an empty file. With ``resume_step``, keeps the rows of the steps up to it instead.

        Rows of later steps, which the resumed run writes again, and a last line cut by a kill are
        removed. If several processes share the run, only the first one writes.

        Raises:
          UserError: a line other than the last one is no row.
        """
        self._writes = processes.is_first()
        if self._writes:
            rows = [] if resume_step is None else json_lines(path)
            kept = [f"{line}\n" for line, row in rows if row["step"] <= resume_step]
            write_atomically(path, "".join(kept))
        self._file = open_to_append(path if self._writes else Path(os.devnull))

    def write(self, step: int, row: Row) -> None:
        """Appends ``{"step": step, **row}``."""
        text = json.dumps({"step": step, **row})
        json_values = json.loads(text, parse_constant=str)  # NaN becomes "NaN"
        self._file.write(json.dumps(json_values, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when all rows are on the disk."""
        if self._writes:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def as_numbers(metrics: Row) -> dict[str, float]:
    """The scalars as Python numbers; those on a device are waited for."""
    host = jax.device_get(dict(metrics))
    numbers = {}
    for name in metrics:  # device_get sorts the keys
        array = np.asarray(host[name])
        if array.shape:
            raise ValueError(f"metric {name}: expected a scalar, got shape {array.shape}")
        numbers[name] = array.item() if array.dtype.kind in "bui" else float(array)
    return numbers


def duration(seconds: float) -> str:
    """A time for people: 12 s, 3 min, 2 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _program(about: Row) -> str:
    """The name of the function that is compiled."""
    return str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
