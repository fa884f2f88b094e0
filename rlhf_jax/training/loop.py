"""The loop of every stage: restore, step, validate, log, save. What a step does is the stage's own."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from rlhf_jax.data.batches import ABSENT
from rlhf_jax.errors import AlertStop, Stopped, TrainingFault, UserError
from rlhf_jax.report import records
from rlhf_jax.runs import alerts, processes, trackers
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.log import RowWriter, Tracker
from rlhf_jax.training import checks, patience, setup
from rlhf_jax.training.signals import resume_command, stop_requests
from rlhf_jax.training.stage import Stage
from rlhf_jax.types import Metrics

State = TypeVar("State")


class Validation(NamedTuple):
    """What a validation found: metrics, and texts for samples.jsonl."""

    metrics: dict[str, float]
    samples: Sequence[dict[str, Any]] = ()


def train(
    stage: Stage,
    state: State,
    advance: Callable[[State, int], tuple[State, Metrics]],
    *,
    num_steps: int,
    validate: Callable[[State], Validation] | None = None,
    validation_interval: int = 1,
    show: tuple[str, ...] = (),
    sources: Callable[[int], Iterable[str]] = lambda step: (),
    beside: Mapping[str, Any] | None = None,
    cache: Any = None,
) -> tuple[State, dict[str, float]]:
    """Runs ``advance(state, step)`` for steps 0, 1, ..., from the checkpoint of a resumed run if there is one.

    Row k of metrics.jsonl speaks of the state after k steps; a checkpoint of step k is saved after row k, step 0 before
    the first update. Validations come before the first step, every ``validation_interval`` steps and at the end; with
    ``keep_best`` they are followed by a checkpoint too. Each row is shown to the rules of ``config.alerts``.

    sources: the data rows of the batch of a step, as "FILE, line N", for a message about it.
    beside, cache: what lies on the devices beside the state, for a message about memory; as ``checks.explains_memory``.

    Returns:
        The last state and the last row of metrics; with ``keep_best`` those of the best checkpoint.

    Raises:
        Stopped: SIGINT or SIGTERM came; the step was finished and saved.
        AlertStop: a rule whose action is stop has come true, or still is at the checkpoint that the run goes on from.
        TrainingFault: an update was not finite; the state from before it has been kept in the last checkpoint. Or a
            checkpoint could not be written.
        UserError: ``keep_best`` names no metric of the validations, or a rule none that the stage records.
    """
    config = stage.config
    best_metric = (config.keep_best or "").partition(":")[2]
    judge = patience.Judge.of(config, stage.name, validated=validate is not None)
    with Checkpoints(
        stage.run.checkpoints, config.keep_last, keep_best=config.keep_best, asynchronous=config.checkpoint_async
    ) as checkpoints:
        first, row = 0, {}
        if stage.run.resumed:
            state, meta = checkpoints.restore(state)
            first, row = meta["step"], meta["metrics"]
            finished = " (finished already)" if first >= num_steps else ""
            print(f"resumed from step {first} of {num_steps}{finished}", flush=True)
        resume_step = first if stage.run.resumed else None
        tracked = config.track if processes.is_first() else ()
        services = trackers.start(stage.run, tracked, dataclasses.asdict(config), resume_step)
        tracker = Tracker(
            stage.run, total=num_steps, resume_step=resume_step, label=stage.name, show=show, services=services
        )
        rules = alerts.parse(config.alerts)
        # A resumed run's rules see the rows before its checkpoint again, and go on from there.
        history = records.read_rows(stage.run.metrics) if stage.run.resumed else []
        history = [earlier for earlier in history if earlier["step"] <= first]
        watches, _ = alerts.replay(rules, history)
        alert_rows = RowWriter(stage.run.path / "alerts.jsonl", resume_step)
        with (
            tracker,
            contextlib.closing(alert_rows),
            stop_requests() as stop,
            checks.explains_memory(config, stage.name, state, beside, cache),
        ):

            def save(step: int) -> None:
                tracker.sync()
                alert_rows.sync()
                checkpoints.save(step, state, {"step": step, "metrics": row})

            def validated(step: int) -> dict[str, float]:
                if validate is None:
                    return {}
                started = time.perf_counter()
                found = validate(state)
                tracker.samples(step, found.samples)
                tracker.timing(step, {"timing/validation": time.perf_counter() - started})
                if (best_metric or judge.used) and judge.metric not in found.metrics:
                    known = ", ".join(found.metrics)
                    raise UserError(f"keep_best: no metric {judge.metric}; the validations give {known}")
                return found.metrics

            def log(step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
                nonlocal watches
                numbers = tracker.log(step, metrics)
                watches, raised = alerts.observe(watches, {"step": step, **numbers})
                for alert in raised:
                    alert_rows.write(step, {key: value for key, value in alert._asdict().items() if key != "step"})
                    tracker.print(f"alert at step {step}: {alert.name}: {alert.message}")
                    tracker.alert(step, f"{alert.name}: {alert.message}")
                return numbers

            if not stage.run.resumed:
                setup.seed_libraries(config.seed, 0)
                row = log(0, validated(0))
                history.append(row)
                save(0)
                checkpoints.wait()  # before the first update, even where saves are asynchronous
            recorded = {"step"} | {name for earlier in (row, *history) for name in earlier}
            ended, done = judge.stops(history), first
            if not ended:
                _obey(watches, first, num_steps)
            for step in range(first, first if ended else num_steps):
                started = time.perf_counter()
                setup.seed_libraries(config.seed, step + 1)
                state, metrics = advance(state, step)
                done = step + 1
                nonfinite = float(metrics["nonfinite"]) > 0
                tracker.timing(done, {"timing/step": time.perf_counter() - started})
                last = done == num_steps
                due = not nonfinite and (last or done % validation_interval == 0)
                row = log(done, {**metrics, **judge.metrics(state), **(validated(done) if due else {})})
                if due:
                    history.append(row)
                    state, ended = judge.lowered(state, history), judge.stops(history)
                    last = last or ended
                if nonfinite:
                    checkpoints.wait()
                    rows = _grouped(sources(step))
                    raise TrainingFault(
                        f"{stage.name}: loss or gradient was not finite at step {done}; the update was not "
                        f"applied. The last good checkpoint is step {checkpoints.latest()} in {stage.run.checkpoints}. "
                        "Lower the learning rate or clip harder (optimizer.max_grad_norm; with --resume, name what "
                        "changes under --allow-changed)"
                        + (f", or look at the rows of this batch: {rows}" if rows else "")
                    )
                if step == first:
                    for sentence in alerts.check_metrics(rules, recorded | row.keys()):
                        tracker.print(sentence)
                stopping = any(watch.stops for watch in watches)
                received = processes.highest(stop.received or 0)
                if last or received or stopping or done % config.checkpoint_interval == 0 or (due and best_metric):
                    save(done)
                if stopping and not last:
                    checkpoints.wait()
                    _obey(watches, done, num_steps)
                if received and not last:
                    checkpoints.wait()
                    name = signal.Signals(received).name
                    raise Stopped(
                        f"{name}: stopped after step {done} of {num_steps}, saved. Go on with:\n    {resume_command()}",
                        received,
                    )
                if ended:
                    break
            checkpoints.wait()
            if ended and done < num_steps:
                wait = f"{judge.metric} has not improved for {judge.stop_after} validations"
                tracker.print(f"ended early, after step {done} of {num_steps}: {wait}")
            best = checkpoints.best()
            if best is not None:
                state, meta = checkpoints.restore(state, best)
                row = meta["metrics"]
                tracker.print(f"{best_metric} is best at step {best}: {row[best_metric]:.4g}; model/ is of that step")
    return state, row


def _obey(watches: Iterable[alerts.Watch], step: int, num_steps: int) -> None:
    """Ends the run whose checkpoint of that step is saved, where a rule whose action is stop is true."""
    stopping = [repr(watch.rule.text) for watch in watches if watch.stops]
    if stopping and step < num_steps:
        raise AlertStop(
            f"stopped by an alert after step {step} of {num_steps}, saved: {' and '.join(stopping)} is true. Look at "
            "alerts.jsonl in the run's folder; go on without the rule, or with another one, by\n"
            f"    {resume_command()} --allow-changed alerts --alerts RULE..."
        )


def _grouped(sources: Iterable[str]) -> str:
    """The distinct sources, those of one file together: "a.json, line 3, 7; b.json, line 1"."""
    numbers: dict[str, list[str]] = {}
    for source in dict.fromkeys(sources):
        where, _, number = source.rpartition(" ")
        numbers.setdefault(where, []).append(number)
    return "; ".join(f"{where} {', '.join(group)}".strip() for where, group in numbers.items())


def select(subset: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Row numbers ``subset[indices]``; absent rows (-1) stay absent."""
    return np.where(indices == ABSENT, ABSENT, subset[indices])


def pad_rows(rows: np.ndarray, multiple: int) -> np.ndarray:
    """Row numbers completed with absent rows to a multiple."""
    return np.pad(rows, (0, -len(rows) % multiple), constant_values=ABSENT)


def in_order(rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """The rows in batches of one size, the last completed with absent rows."""
    padded = pad_rows(rows, batch_size)
    return iter(np.split(padded, len(padded) // batch_size))
