"""What a run records while it goes: rows of numbers, seconds and texts in its folder, and a line on the console.

    with Tracker(run, total=config.rl.num_iterations, resume_step=step) as tracker:
        tracker.log(iteration, metrics)
        tracker.sync()
        checkpoints.save(iteration, ...)

A row of step s is written before the checkpoint of step s is saved. A run that is resumed from that checkpoint removes
the rows of later steps and writes them again, so that no row is missing and none is there twice.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import rich.console
import rich.live
import rich.progress
import rich.text

from rlhf_jax.runs import processes
from rlhf_jax.runs.folder import Run, read_rows, write_atomically
from rlhf_jax.runs.trackers import Services


class Tracker:
    """Writes ``metrics.jsonl``, ``timing.jsonl`` and ``samples.jsonl`` of a run and shows how it goes.

    On a terminal: a progress bar and the newest metrics below it. Elsewhere: a line at the first, every
    ``print_every``-th and the last step.
    """

    def __init__(
        self,
        run: Run,
        *,
        total: int,
        resume_step: int | None = None,
        label: str = "",
        show: Sequence[str] = (),
        print_every: int = 10,
        console: rich.console.Console | None = None,
        services: Services | None = None,
    ):
        """Opens the files.

        Args:
          run: the run whose files are written.
          total: the last step.
          resume_step: step of the checkpoint that the run goes on from; None starts the files anew.
          label: what is going on, such as ``ppo``.
          show: the metrics of the console's line; by default the first four.
          print_every: steps between lines if there is no terminal.
          console: by default standard output.
          services: also get rows, samples and alerts; closed with the tracker.
        """
        self._services = services or Services({}, {})
        self._total, self._label, self._show, self._print_every = total, label, tuple(show), print_every
        self._console = console or rich.console.Console()
        self._files = [RowWriter(path, resume_step) for path in (run.metrics, run.timing, run.samples)]
        self._metrics, self._timing, self._samples = self._files
        self._printed = False
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self._task = self._progress.add_task(label, total=total, completed=resume_step or 0)
        self._line = rich.text.Text(no_wrap=True, overflow="ellipsis")
        self._live = rich.live.Live(rich.console.Group(self._progress, self._line), console=self._console)
        if self._console.is_terminal:
            self._live.start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Writes a row of ``metrics.jsonl`` and shows it. Returns the metrics as Python numbers.

        Waits for the devices: ``metrics`` holds scalars, on a device or not.
        """
        host = jax.device_get(dict(metrics))
        numbers = {name: _number(name, host[name]) for name in metrics}  # device_get sorts the keys
        self._metrics.write(step, numbers)
        self._services.log(step, numbers)
        shown = [name for name in self._show if name in numbers] if self._show else list(numbers)[:4]
        line = "  ".join(f"{name} {numbers[name]:.4g}" for name in shown)
        self._progress.update(self._task, completed=step)
        self._line.plain = line
        due = not self._printed or step % self._print_every == 0 or step >= self._total
        if due and not self._console.is_terminal:
            self.print(f"{self._label} {step}/{self._total}  {line}".strip())
            self._printed = True
        return numbers

    def timing(self, step: int, seconds: Mapping[str, float]) -> None:
        """Writes a row of ``timing.jsonl``. Times are kept apart from the metrics, which a seed reproduces."""
        self._timing.write(step, {name: _number(name, value) for name, value in seconds.items()})

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows of ``samples.jsonl``: JSON values such as prompt, response, score."""
        rows = list(rows)
        for row in rows:
            self._samples.write(step, row)
        self._services.samples(step, rows)

    def alert(self, step: int, text: str) -> None:
        """Sends a warning to the services of ``--track`` only."""
        self._services.alert(step, text)

    def print(self, message: str) -> None:
        """Prints a message, above the progress bar if there is one."""
        self._console.print(message, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def sync(self) -> None:
        """Returns when all rows are on the disk; call it before a checkpoint is saved."""
        for writer in self._files:
            writer.sync()

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        self._live.stop()
        for writer in self._files:
            writer.close()
        self._services.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class RowWriter:
    """Appends JSON objects to a file, one a line, each with its ``"step"``.

    Floats are written so that they read back equal. NaN and the infinities, which JSON lacks, become the strings "NaN",
    "Infinity" and "-Infinity", which Python's ``float`` and NumPy understand. Each row reaches the operating system at
    once, so a killed process loses none; :meth:`sync` brings them to the disk, and is due before a checkpoint.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None):
        """Starts an empty file; with ``resume_step`` goes on behind the rows of the steps up to it.

        Removes the rows of later steps, which the resumed run writes again, and a last line cut by a kill. If several
        processes share the run, only the first one writes.

        Raises:
          UserError: a line other than the last one is no row.
        """
        self._path, self._writes = Path(path), processes.is_first()
        if self._writes:
            rows = [] if resume_step is None else read_rows(self._path)
            write_atomically(self._path, "".join(f"{line}\n" for line, row in rows if row["step"] <= resume_step))
            self._file = self._path.open("a", encoding="utf-8", newline="\n")

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Appends ``{"step": step, **row}``."""
        if "step" in row:
            raise ValueError(f"a row cannot have a key step of its own: {row}")
        if self._writes:
            self._file.write(json.dumps({"step": step, **_finite(row)}, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Returns when all rows are on the disk."""
        if self._writes:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._writes:
            self._file.close()


def _number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.shape:
        raise ValueError(f"metric {name}: expected a scalar, got shape {array.shape}")
    if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
        return array.item()
    return float(array)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
