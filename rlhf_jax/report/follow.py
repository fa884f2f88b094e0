"""The page of runs that still train, written again whenever they have written something."""

import time
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.errors import UserError, logger
from rlhf_jax.report import page, records, verdict
from rlhf_jax.report.parts import Part
from rlhf_jax.runs.writing import is_locked

WATCHED = ("metrics.jsonl", "samples.jsonl", "alerts.jsonl")
SECONDS = 2.0  # between looks at the files
STARTING = 20.0  # seconds in which a command may not have taken its folder yet
BETWEEN_STAGES = 60.0  # the same of a stage of a pipeline


def follow(runs: Sequence[str], output: str | None = None, parts: Sequence[Part] = ()) -> Path:
    """Writes the page of ``page.write`` until no process trains in the runs' folders; until then
    the open page loads itself again. Runs that have not begun are waited for. After Ctrl-C the page
    stands still too.

    Args:
        output: the page; None: ``page.default_path``.

    Returns:
        The page.

    Raises:
        UserError: a run has ended without a model, or as ``page.write``.
    """
    said = ""
    drawn: list[int] = []
    trained_at = time.monotonic()
    has_trained = False
    try:
        while True:
            by_run = {run: records.folders(Path(run)) for run in runs}
            folders = [folder for inner in by_run.values() for folder in inner]
            trains = any(is_locked(folder / ".lock") for folder in folders)
            has_trained |= trains
            if trains:
                trained_at = time.monotonic()
            # The sizes are read after the locks: a run that has ended writes no more.
            files = [folder / name for folder in folders for name in WATCHED]
            written = [file.stat().st_size if file.exists() else 0 for file in files]
            waited_for = [run for run, inner in by_run.items() if not inner]
            patience = 0.0 if has_trained else STARTING
            if set(folders) != set(map(Path, runs)):
                patience = BETWEEN_STAGES
            if not trains and not waited_for:
                if time.monotonic() - trained_at >= patience:
                    break
                waited_for = [f"a process that trains in {run}" for run in runs]
            waited_for += [
                str(file)
                for file, size in zip(files, written, strict=True)
                if file.name == WATCHED[0] and not size
            ]
            message = f"waiting for {', '.join(waited_for)}; Ctrl-C ends"
            if not waited_for:
                path = output or page.default_path(runs)
                message = f"{path} is written again while the run trains; Ctrl-C ends"
                if written != drawn:
                    page.write(runs, path, parts, following=_progress(runs))
                    drawn = written
            if message != said:
                logger.info(message)
                said = message
            time.sleep(SECONDS)
    except KeyboardInterrupt:
        if drawn:
            page.write(runs, path, parts)
        raise
    path = output or page.default_path(runs)
    page.write(runs, path, parts)
    ends = {record.path: verdict.unfinished(record) for record in records.find(runs)}
    dead = [f"{folder}: no process trains here. {end}" for folder, end in ends.items() if end]
    if dead:
        raise UserError(
            "\n".join([*dead, f"{path} shows them; go on by the run's command with --resume"])
        )
    return Path(path)


def _progress(runs: Sequence[str]) -> str:
    """How far the runs are, and the time: "step 120 of 500, refreshed 14:02:31"."""
    found = records.find(runs)
    steps = []
    for record in found:
        name = f"{record.name}: " if len(found) > 1 else ""
        planned = record.planned_steps
        of = f" of {planned}" if planned else ""
        steps.append(f"{name}{record.unit} {record.steps}{of}")
    return f"{', '.join(steps)}, refreshed {time.strftime('%H:%M:%S')}"
