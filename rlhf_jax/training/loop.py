"""The loop of every stage: restore, step, validate, log, save. What a step does is the stage's own."""

import contextlib
import dataclasses
import random
import signal
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from rlhf_jax.config import Optimizer
from rlhf_jax.data.batches import ABSENT
from rlhf_jax.errors import AlertStop, Stopped, TrainingFault, UserError
from rlhf_jax.report import records
from rlhf_jax.runs import alerts, processes, trackers
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.log import RowWriter, Tracker
from rlhf_jax.training.optimizer import Judge
from rlhf_jax.training.signals import resume_command, stop_requests
from rlhf_jax.training.stage import Stage
from rlhf_jax.types import Metrics

State = TypeVar("State")


class Validation(NamedTuple):
    """Metrics of a validation, and texts for samples.jsonl."""

    metrics: dict[str, float]
    samples: Sequence[dict[str, Any]] = ()


class Job(NamedTuple):
    """What the loop runs."""

    advance: Callable[[Any, int], tuple[Any, Metrics]]  # (state, step) -> (state, metrics); step counts from 0
    num_steps: int
    validate: Callable[[Any], Validation] | None = None  # None: nothing is held out
    validation_interval: int = 1
    show: tuple[str, ...] = ()  # metrics of the console's line
    sources: Callable[[int], Iterable[str]] = lambda step: ()  # data rows of a step's batch, as "FILE, line N"
    optimizer: Optimizer = Optimizer()
    judged_by: str = "min:validation/loss"  # the metric of early stopping and plateau, unless keep_best names one


def train(stage: Stage, state: State, job: Job) -> tuple[State, dict[str, float]]:
    """Runs ``job.advance`` for each step, from the checkpoint of a resumed run if there is one.

    Row k of metrics.jsonl speaks of the state after k steps; a checkpoint of step k is saved after row k, step 0 before
    the first update. Validations come before the first step, every ``validation_interval`` steps and at the end; with
    ``keep_best`` they are followed by a checkpoint too. Each row is shown to the rules of ``config.alerts``.

    Returns:
        The last state and the last row of metrics; with ``keep_best`` those of the best checkpoint.

    Raises:
        Stopped: SIGINT or SIGTERM came; the step was finished and saved.
        AlertStop: a rule with the action stop is true, now or at the checkpoint from which the run is resumed.
        TrainingFault: an update was not finite; the last checkpoint holds the state before it. Or a checkpoint could
            not be written.
        UserError: ``keep_best`` names no metric of the validations.
    """
    config = stage.config
    judge = Judge(config.keep_best or job.judged_by, config.early_stopping_patience, job.optimizer)
    if job.validate is None and (judge.used or config.keep_best):
        key = f"keep_best {config.keep_best}" if config.keep_best else "early_stopping_patience and schedule plateau"
        raise UserError(f"{key}: nothing is held out, so there are no validations to judge by")
    with (
        contextlib.ExitStack() as stack,
        Checkpoints(
            stage.run.checkpoints, config.keep_last, keep_best=config.keep_best, asynchronous=config.checkpoint_async
        ) as checkpoints,
    ):
        loop, state = _start(stage, job, judge, checkpoints, state, stack)
        stop = stack.enter_context(stop_requests())
        loop.obey_alerts()
        while loop.going_on:
            state = loop.step(state)
            received = processes.highest(stop.received or 0)
            loop.save_if_due(state, received)
            if received and loop.going_on:
                checkpoints.wait()
                raise Stopped(
                    f"{signal.Signals(received).name}: stopped after step {loop.done} of {job.num_steps}, saved. "
                    f"Go on with:\n    {resume_command()}",
                    received,
                )
        checkpoints.wait()
        if loop.ended and loop.done < job.num_steps:
            waited = f"{judge.metric} has not improved for {judge.stop_after} validations"
            loop.tracker.print(f"ended early, after step {loop.done} of {job.num_steps}: {waited}")
        best, row = checkpoints.best(), loop.row
        if best is not None:
            state, meta = checkpoints.restore(state, best)
            row = meta["metrics"]
            score = f"{judge.metric} is best at step {best}: {row[judge.metric]:.4g}"
            loop.tracker.print(f"{score}; model/ is of that step")
    return state, row


@dataclasses.dataclass
class _Loop:
    """A loop under way: what was recorded, and up to which step."""

    stage: Stage
    job: Job
    judge: Judge
    checkpoints: Checkpoints
    tracker: Tracker
    alert_rows: RowWriter
    history: list[dict[str, Any]]  # rows of the steps so far: all of a resumed run, then those with validations
    done: int  # steps
    row: dict[str, float]  # the last row of metrics
    ended: bool = False  # early, by the judge
    validated: bool = False  # after the last step

    def __post_init__(self) -> None:
        # A resumed run's rules see the rows before its checkpoint again, and go on from there.
        self.rules = alerts.parse(self.stage.config.alerts)
        self.watches, _ = alerts.replay(self.rules, self.history)
        self.rules_checked = False

    @property
    def going_on(self) -> bool:
        """Whether another step follows."""
        return self.done < self.job.num_steps and not self.ended

    def begin(self, state: Any) -> None:
        """Validates and saves step 0 of a new run."""
        seed_libraries(self.stage.config.seed, 0)
        self._record(self._validation(state))
        self.history.append(self.row)
        self._save(state)
        self.checkpoints.wait()  # before the first update, also if saves are asynchronous

    def step(self, state: Any) -> Any:
        """One step with its row of metrics, and a validation if one is due."""
        started = time.perf_counter()
        seed_libraries(self.stage.config.seed, self.done + 1)
        state, metrics = self.job.advance(state, self.done)
        self.done += 1
        finite = not float(metrics["nonfinite"]) > 0
        self.tracker.timing(self.done, {"timing/step": time.perf_counter() - started})
        last = self.done == self.job.num_steps
        self.validated = finite and (last or self.done % self.job.validation_interval == 0)
        found = self._validation(state) if self.validated else {}
        recorded = {name for row in (self.row, *self.history) for name in row}
        self._record({**metrics, **self.judge.metrics(state), **found})
        if self.validated:
            self.history.append(self.row)
            state, self.ended = self.judge.lowered(state, self.history), self.judge.stops(self.history)
        if not finite:
            self._refuse()
        if not self.rules_checked:
            self.rules_checked = True
            for sentence in alerts.check_metrics(self.rules, {"step"} | recorded | self.row.keys()):
                self.tracker.print(sentence)
        return state

    def save_if_due(self, state: Any, received: int) -> None:
        """Saves at the end, at the interval, for a signal or an alert, and after validations under ``keep_best``."""
        config = self.stage.config
        due = received or not self.going_on or any(watch.stops for watch in self.watches)
        if due or self.done % config.checkpoint_interval == 0 or (self.validated and config.keep_best):
            self._save(state)
        self.obey_alerts()

    def obey_alerts(self) -> None:
        """Ends the run, whose last step is saved, if a rule with the action stop is true."""
        stopping = [repr(watch.rule.text) for watch in self.watches if watch.stops]
        if stopping and self.going_on:
            self.checkpoints.wait()
            raise AlertStop(
                f"stopped by an alert after step {self.done} of {self.job.num_steps}, saved: {' and '.join(stopping)} "
                "is true. Look at alerts.jsonl in the run's folder; go on without the rule, or with another one, by\n"
                f"    {resume_command()} --allow-changed alerts --alerts RULE..."
            )

    def _validation(self, state: Any) -> dict[str, float]:
        if self.job.validate is None:
            return {}
        started = time.perf_counter()
        metrics, samples = self.job.validate(state)
        self.tracker.samples(self.done, samples)
        self.tracker.timing(self.done, {"timing/validation": time.perf_counter() - started})
        if self.judge.used or self.stage.config.keep_best:
            self.judge.check(metrics)
        return metrics

    def _record(self, metrics: Mapping[str, Any]) -> None:
        self.row = self.tracker.log(self.done, metrics)
        self.watches, raised = alerts.observe(self.watches, {"step": self.done, **self.row})
        for alert in raised:
            self.alert_rows.write(self.done, {key: x for key, x in alert._asdict().items() if key != "step"})
            self.tracker.print(f"alert at step {self.done}: {alert.name}: {alert.message}")
            self.tracker.alert(self.done, f"{alert.name}: {alert.message}")

    def _save(self, state: Any) -> None:
        self.tracker.sync()
        self.alert_rows.sync()
        self.checkpoints.save(self.done, state, {"step": self.done, "metrics": self.row})

    def _refuse(self) -> None:
        """Ends the run after an update that was not finite and so was not applied."""
        self.checkpoints.wait()
        rows = _grouped(self.job.sources(self.done - 1))
        raise TrainingFault(
            f"{self.stage.name}: loss or gradient was not finite at step {self.done}; the update was not applied. The "
            f"last good checkpoint is step {self.checkpoints.latest()} in {self.stage.run.checkpoints}. Lower the "
            "learning rate or clip harder (optimizer.max_grad_norm; with --resume, name what changes under "
            "--allow-changed)" + (f", or look at the rows of this batch: {rows}" if rows else "")
        )


def _start(
    stage: Stage, job: Job, judge: Judge, checkpoints: Checkpoints, state: State, stack: contextlib.ExitStack
) -> tuple[_Loop, State]:
    """Opens the files of the run, goes on from its checkpoint or begins it."""
    config, run = stage.config, stage.run
    done, row, resume_step = 0, {}, None
    if run.resumed:
        state, meta = checkpoints.restore(state)
        done = resume_step = meta["step"]
        row = meta["metrics"]
        finished = " (finished already)" if done >= job.num_steps else ""
        print(f"resumed from step {done} of {job.num_steps}{finished}", flush=True)
    tracked = config.track if processes.is_first() else ()
    services = trackers.start(run, tracked, dataclasses.asdict(config), resume_step)
    tracker = stack.enter_context(
        Tracker(run, total=job.num_steps, resume_step=resume_step, label=stage.name, show=job.show, services=services)
    )
    rows = records.read_rows(run.metrics) if run.resumed else []
    history = [earlier for earlier in rows if earlier["step"] <= done]
    alert_rows = stack.enter_context(contextlib.closing(RowWriter(run.path / "alerts.jsonl", resume_step)))
    loop = _Loop(stage, job, judge, checkpoints, tracker, alert_rows, history, done, row)
    if not run.resumed:
        loop.begin(state)
    loop.ended = judge.stops(loop.history)
    return loop, state


def seed_libraries(seed: int, step: int) -> None:
    """Seeds Python's and NumPy's global generators, which a reward or judge in Python may draw from.

    By the step, so that a run that goes on from a checkpoint draws what it would have drawn without the stop.
    """
    number = zlib.crc32(f"{seed} {step}".encode())
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 (what others draw from is the legacy one)


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
