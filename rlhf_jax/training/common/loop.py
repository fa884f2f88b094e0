"""The loop of every stage: restore, step, validate, log, save. A step is the stage's own."""

import itertools
import random
import signal
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from rlhf_jax.config import Optimizer
from rlhf_jax.data.batches import ABSENT
from rlhf_jax.data.rows import places
from rlhf_jax.errors import (
    AlertStop,
    ServiceError,
    Stopped,
    TrainingFault,
    UserError,
    logger,
)
from rlhf_jax.report import records
from rlhf_jax.runs import alerts, allocator, keeping, objects, processes, trackers
from rlhf_jax.runs.checkpoint import CheckpointError, Checkpoints
from rlhf_jax.runs.log import Pulse, RowWriter, Tracker, as_numbers
from rlhf_jax.training.common import memory
from rlhf_jax.training.common.optimizer import Patience, learning_rates
from rlhf_jax.training.common.signals import resume_command, stop_requests
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.types import Metrics

State = TypeVar("State")
Row = dict[str, float]  # of metrics.jsonl
OnStep = Callable[[int, Any, Row], object]
PAUSE = "pause"
"""What ``on_step`` returns to end the run without a last validation, as a signal does."""


class Validation(NamedTuple):
    """Metrics of a validation, and texts for samples.jsonl."""

    metrics: Row
    samples: Sequence[dict[str, Any]] = ()


class Job(NamedTuple):
    """What the loop runs."""

    # (state, step) -> (state, metrics); step counts from 0
    advance: Callable[[Any, int], tuple[Any, Metrics]]
    num_steps: int
    validate: Callable[[Any], Validation] | None = None  # None: nothing is held out
    validation_interval: int = 1
    show: tuple[str, ...] = ()  # metrics of the console's line
    # data rows of a step's batch, as "FILE, line N"
    sources: Callable[[int], Iterable[str]] = lambda step: ()
    optimizer: Optimizer = Optimizer()
    # the metric of early stopping and plateau, unless keep_best names one
    monitor: str = "min:validation/loss"
    # compiles the largest step and raises ``memory.TooLarge`` if it does not fit
    check_memory: Callable[[Any], object] = lambda state: None
    # (step, state after it, its row of metrics) -> whether the run ends here
    on_step: OnStep | None = None
    # (restored state, the settings with which it was saved) -> the state that the loop goes on from
    adopt: Callable[[Any, Mapping[str, Any]], Any] = lambda state, settings: state
    # {last part of a metric's name: what an alert on it shows of the last step}
    examples: Callable[[], Mapping[str, str]] = dict


def train(stage: Stage, state: State, job: Job) -> tuple[State, Row]:
    """Runs ``job.advance`` for each step, from the checkpoint of a resumed run if there is one.

    ``job.check_memory`` comes first, so that a run that does not fit into memory fails at once,
    also when it is resumed. Row k of metrics.jsonl describes the state after k steps. The
    checkpoint of step k is saved after row k, that of step 0 before the first update. Validations
    come before the first step, every ``validation_interval`` steps and at the end, also if
    ``on_step`` ends the run; with ``keep_best`` they are followed by a checkpoint too. Each row is
    shown to the rules of ``alerts``.

    Returns:
        The last state and the last row of metrics; with ``keep_best`` those of the best checkpoint.

    Raises:
        Stopped: SIGINT or SIGTERM came; the step was finished and saved.
        AlertStop: a rule with the action stop is true, now or at the checkpoint from which the run
            is resumed.
        TrainingFault: an update was not finite; the last checkpoint holds the state before it. Or a
            checkpoint could not be written.
        UserError: ``keep_best`` names no metric of the validations; or a reward or environment
            failed, a server that it asks for example (ServiceError); the step before it is saved.
    """
    kept = stage.keeping
    best = kept.keep_best
    patience = Patience(best or job.monitor, kept.early_stopping_patience, job.optimizer)
    if job.validate is None and (patience.used or best):
        key = f"keep_best {best}" if best else "early_stopping_patience and schedule plateau"
        raise UserError(f"{key}: nothing is held out, so there are no validations to judge by")
    saved = Checkpoints(
        stage.run.checkpoints,
        kept.keep_last,
        keep_best=best,
        asynchronous=kept.checkpoint_async,
    )
    with ExitStack() as stack, saved as checkpoints:
        stops = stack.enter_context(stop_requests())  # from before step 0 is validated and saved
        loop = _Loop(stage, job, patience, checkpoints, state, stack)
        loop.obey_alerts()
        while loop.going_on:
            try:
                loop.step()
                received = processes.stop_signal(stops)
                loop.settle(received)
            except Exception as error:
                advice = loop.left_by(error)
                if not advice:
                    raise
                if isinstance(error, UserError | TrainingFault):
                    error.args = (f"{error}\n{advice}",)
                else:
                    logger.error(advice)  # a traceback follows
                raise
            if received and loop.going_on:
                checkpoints.wait()
                raise Stopped(
                    f"{signal.Signals(received).name}: stopped {loop.place}, saved. Go on with:\n"
                    f"    {resume_command()}",
                    received,
                )
        checkpoints.wait()
        return loop.result()


class _Loop:
    """The state of a running loop: the training state, the records, and the last step."""

    done = 0  # steps, the one under way included
    ended = ""  # early: why
    pending: Metrics | None = None  # of the last step, on the device still
    rules_checked = False
    is_advancing = False  # the state is still the one before the step
    examples: Mapping[str, str] = {}  # of the step whose metrics are pending

    def __init__(
        self,
        stage: Stage,
        job: Job,
        patience: Patience,
        checkpoints: Checkpoints,
        state: Any,
        stack: ExitStack,
    ):
        """Opens the files of the run and continues from its checkpoint, or validates and saves step
        0.
        """
        pulse = stack.enter_context(Pulse())  # it names what compiles
        self.stage = stage
        self.job = job
        self.patience = patience
        self.checkpoints = checkpoints
        self.state = state
        self.row: Row = {}  # the last row of metrics
        # All rows of a resumed run's steps, then those with validations.
        self.history: list[dict[str, Any]] = []
        if (checkpoints.latest() or 0) < job.num_steps:
            logger.info("compiling; the first steps take longest")
            job.check_memory(state)
        if stage.run.resumed:
            self._restore()
        self._open_files(stack, pulse)
        kept = stage.keeping
        self.rules = alerts.parse(kept.alerts, stage.compute.dtype)
        self.watches = [alerts.Watch(rule) for rule in self.rules]
        # A resumed run's rules see the rows before its checkpoint again, and go on from there.
        for watch, row in itertools.product(self.watches, self.history):
            watch.observe(row)
        stack.callback(self._catch_up)  # a run that fails keeps the row of its last step
        if not stage.run.resumed:
            seed_libraries(kept.seed, 0)
            self._record(self._validation())
            self.history.append(self.row)
            self._save()
            checkpoints.wait()  # before the first update, also if saves are asynchronous
            allocator.give_back()  # the copy of the state that was saved
        self._judge_history()
        self.clock = time.perf_counter()

    def _restore(self) -> None:
        """Goes on from the newest checkpoint."""
        target = memory.shapes(self.state)
        self.state = None  # the first state makes room for the restored one
        self.state, meta = self.checkpoints.restore(target)
        if not {"step", "metrics"} <= meta.keys():
            raise CheckpointError(f"{self.stage.run.checkpoints}: its newest one is of no run")
        self.state = self.job.adopt(self.state, meta.get("config", {}))
        self.done = meta["step"]
        self.row = meta["metrics"]
        processes.in_first(
            lambda: keeping.restore_rows(self.stage.run, self.checkpoints, self.done)
        )
        rows = records.read_rows(self.stage.run.metrics)
        self.history = [row for row in rows if row["step"] <= self.done]
        finished = " (finished already)" if self.done >= self.job.num_steps else ""
        logger.info(f"resumed from step {self.done} of {self.job.num_steps}{finished}")

    def _open_files(self, stack: ExitStack, pulse: Pulse) -> None:
        """Opens the files of rows, and the services that get the rows too."""
        run = self.stage.run
        resume_step = self.done if run.resumed else None
        tracked = self.stage.keeping.track if processes.is_first() else ()
        settings = objects.describe(self.stage.settings)
        tracker = Tracker(
            run,
            total=self.job.num_steps,
            resume_step=resume_step,
            label=self.stage.name,
            show=self.job.show,
            services=trackers.start(run, tracked, settings, resume_step),
            pulse=pulse,
        )
        self.tracker = stack.enter_context(tracker)
        if tracked:
            keeping.keep_start(run)
        alert_rows = RowWriter(run.path / "alerts.jsonl", resume_step)
        self.alert_rows = stack.enter_context(closing(alert_rows))

    @property
    def going_on(self) -> bool:
        """Whether another step follows."""
        return self.done < self.job.num_steps and not self.ended

    @property
    def place(self) -> str:
        """The last step, in words."""
        return f"after step {self.done} of {self.job.num_steps}"

    def step(self) -> None:
        """Starts a step; while the device is at it, records the metrics of the one before."""
        seed_libraries(self.stage.keeping.seed, self.done + 1)
        self.is_advancing = True
        self.state, metrics = self.job.advance(self.state, self.done)
        self.is_advancing = False
        examples = dict(self.job.examples())
        self._catch_up()
        self.examples = examples
        self.done += 1
        self.pending = {**metrics, **learning_rates(self.state)}

    def settle(self, received: int) -> None:
        """Waits for the step if its result is needed: by a validation, by an alert or a function of
        the user's that may stop the run, or by a checkpoint. A checkpoint is due at the end, at the
        interval, for a signal or an alert, and after validations under ``keep_best``.
        """
        kept = self.stage.keeping
        is_last = self.done == self.job.num_steps
        is_interval = self.done % self.job.validation_interval == 0
        validates = self.job.validate is not None and (is_last or is_interval)
        saves = received or is_last or self.done % kept.checkpoint_interval == 0
        may_stop = self.job.on_step is not None or "stop" in {rule.action for rule in self.rules}
        if not (validates or saves or may_stop):
            return
        if self._catch_up(validates, asks=True):
            validates = True
            self.history.append(self.row)
            self.state = self.patience.lowered(self.state, self.history)
            self._judge_history()
        is_alarmed = any(watch.stops for watch in self.watches)
        if saves or self.ended or is_alarmed or (validates and kept.keep_best):
            self._save()
        self.clock = time.perf_counter()
        self.obey_alerts()

    def left_by(self, error: Exception) -> str:
        """Saves the state before the step that failed, by a reward for example. Returns advice how
        to continue; "" where the error has its own. A failed validation saves nothing.
        """
        # Processes save together, and only these errors are raised in all of them.
        is_shared = isinstance(error, UserError | TrainingFault) or jax.process_count() == 1
        if not isinstance(error, UserError) and not (self.is_advancing and is_shared):
            return ""
        leaves = jax.tree.leaves(self.state)
        is_whole = not any(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array))
        if self.is_advancing and is_whole:
            self._catch_up()
            if self.checkpoints.latest() != self.done:
                self._save()
        self.checkpoints.wait()
        when = "the service is there again" if isinstance(error, ServiceError) else "that is mended"
        return (
            f"Step {self.checkpoints.latest()} of {self.job.num_steps} is saved. When {when}, go "
            f"on with:\n    {resume_command()}"
        )

    def _judge_history(self) -> None:
        """Ends the run early if the validations so far say so."""
        if self.patience.stops(self.history):
            count = self.patience.stop_after
            self.ended = f"{self.patience.metric} has not improved for {count} validations"

    def _catch_up(self, validates: bool = False, asks: bool = False) -> bool:
        """Records the step whose metrics are pending, with a validation of the state after it if
        one is due. Returns whether there was a validation.

        asks: whether ``on_step`` is called, which may end the run; the last state is validated.
        """
        if self.pending is None:
            return False
        metrics = as_numbers(self.pending)
        self.pending = None
        finite = not metrics["nonfinite"] > 0
        now = time.perf_counter()
        self.tracker.timing(self.done, {"timing/step": now - self.clock})
        self.clock = now
        validates = finite and validates
        recorded = {"step"}.union(self.row, *self.history)
        if validates:
            metrics |= self._validation()
        try:
            ending = self._ending_by_user(metrics) if finite and asks else None
        except BaseException:
            self._record(metrics)  # a run that fails keeps the row of its last step
            raise
        is_whole = ending is not None and ending is not PAUSE
        if is_whole and not validates and self.job.validate is not None:
            validates = True
            metrics |= self._validation()
        self._record(metrics)
        if not finite:
            self._refuse()
        if not self.rules_checked:
            self.rules_checked = True
            for sentence in alerts.check_metrics(self.rules, recorded | self.row.keys()):
                logger.info(sentence)
        return validates

    def _ending_by_user(self, row: Row) -> object:
        """What ``on_step`` returns after the step of this row if that ends the run; else None."""
        on_step = self.job.on_step
        ending = None if on_step is None else on_step(self.done, self.state, row)
        if not ending:
            return None
        self.ended = self.ended or "on_step asked for it"
        return ending

    def obey_alerts(self) -> None:
        """Ends the run, whose last step is saved, if a rule with the action stop is true."""
        stopping = [repr(watch.rule.text) for watch in self.watches if watch.stops]
        if stopping and self.going_on:
            self.checkpoints.wait()
            raise AlertStop(
                f"stopped by an alert {self.place}, saved: {' and '.join(stopping)} is true. Look "
                "at alerts.jsonl in the run's folder; go on without the rule, or with another one, "
                f"by\n    {resume_command()} --allow-changed alerts --alerts RULE..."
            )

    def result(self) -> tuple[Any, Row]:
        """The last state and row, or those of the best checkpoint. Logs why the run ended early,
        and which checkpoint it returns.
        """
        metric = self.patience.metric
        best = self.checkpoints.best()
        if self.ended and self.done < self.job.num_steps:
            logger.info(f"ended early, {self.place}: {self.ended}")
        if best is None:
            return self.state, self.row
        state, meta = self.checkpoints.restore(self.state, best)
        logger.info(
            f"{metric} is best at step {best}: {meta['metrics'][metric]:.4g}; model/ is of that "
            "step"
        )
        return state, meta["metrics"]

    def _validation(self) -> Row:
        if self.job.validate is None:
            return {}
        started = time.perf_counter()
        metrics, samples = self.job.validate(self.state)
        self.tracker.samples(self.done, samples)
        self.tracker.timing(self.done, {"timing/validation": time.perf_counter() - started})
        is_read = self.patience.used or self.stage.keeping.keep_best
        if is_read and self.patience.metric not in metrics:
            raise UserError(
                f"keep_best: no metric {self.patience.metric}; the validations give "
                f"{', '.join(metrics)}"
            )
        return metrics

    def _record(self, metrics: Mapping[str, Any]) -> None:
        self.row = self.tracker.log(self.done, metrics)
        row = {"step": self.done, **self.row}
        for watch in self.watches:
            alert = watch.observe(row)
            if alert is None:
                continue
            example = self.examples.get(watch.rule.metrics[0].rpartition("/")[2])
            if example is not None:
                alert = alert._replace(message=f"{alert.message}, as in {example[-200:]!r}")
            fields = alert._asdict()
            del fields["step"]
            self.alert_rows.write(self.done, fields)
            self.tracker.alert(self.done, f"{alert.name}: {alert.message}")

    def _save(self) -> None:
        self.tracker.sync()
        self.alert_rows.sync()
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        meta = {
            "step": self.done,
            "metrics": self.row,
            "seed": self.stage.keeping.seed,
            "device": device,
            "config": objects.describe(self.stage.settings),
        }
        rows = keeping.rows_of(self.stage.run) if processes.is_first() else {}
        self.checkpoints.save(self.done, self.state, meta, rows)

    def _refuse(self) -> None:
        """Ends the run after an update that was not finite and so was not applied."""
        self.checkpoints.wait()
        sources = sorted(set(self.job.sources(self.done - 1)))
        rows = places(sources, most=len(sources))
        look = f", or look at the rows of this batch: {rows}" if rows else ""
        raise TrainingFault(
            f"{self.stage.name}: loss or gradient was not finite at step {self.done}; the update "
            f"was not applied. The last good checkpoint is step {self.checkpoints.latest()} in "
            f"{self.stage.run.checkpoints}. Lower the learning rate or clip harder "
            "(optimizer.max_grad_norm; with --resume, name what changes under --allow-changed)"
            f"{look}"
        )


def seed_libraries(seed: int, step: int) -> None:
    """Seeds Python's and NumPy's global generators, which a reward or judge in Python may use. The
    seed depends on the step, so that a resumed run draws the same numbers as an uninterrupted one.
    """
    number = zlib.crc32(f"{seed} {step}".encode())
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def pad_rows(rows: np.ndarray, multiple: int) -> np.ndarray:
    """Row numbers, padded with missing rows (-1) to a multiple."""
    return np.pad(rows, (0, -len(rows) % multiple), constant_values=ABSENT)


def in_order(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """The rows in batches [N, batch_size]. The last batch is padded with missing rows."""
    return pad_rows(rows, batch_size).reshape(-1, batch_size)
