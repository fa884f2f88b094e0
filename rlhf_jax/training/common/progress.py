"""The progress of a run: rows of metrics, checkpoints, alerts, validations; where it goes on, and
why it ends.

    with Progress(run, state, num_steps=100, validate=validate) as progress:
        progress.begin()
        for step in progress.steps():
            state, metrics = update(progress.state, batch_of(step))
            progress.record(state, metrics)
            progress.settle()
        state, row = progress.result()

Row k of metrics.jsonl describes the state after k steps, and so does checkpoint k. A step's row is
written when the next step has started, so that the devices need not wait for the host.
"""

import contextlib
import itertools
import random
import signal
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from rlhf_jax.config import Optimizer, to_dict
from rlhf_jax.data.batches import ABSENT
from rlhf_jax.data.rows import places
from rlhf_jax.errors import AlertStop, ServiceError, Stopped, TrainingFault, UserError, logger
from rlhf_jax.runs import alerts, allocator, keeping, objects, processes, reading, trackers
from rlhf_jax.runs.checkpoint import CheckpointError, Checkpoints
from rlhf_jax.runs.log import Pulse, RowWriter, Tracker, as_numbers
from rlhf_jax.training.common import memory
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.common.optimizer import Patience, learning_rates
from rlhf_jax.training.common.signals import resume_command, stop_requests
from rlhf_jax.types import Metrics

Row = dict[str, float]  # of metrics.jsonl
PAUSE = "pause"
"""What ``on_step`` returns to end the run without a last validation, as a signal does."""


TRAIN = {"split": "train"}
"""Of the rows of samples.jsonl that are no validation: their prompts are trained on."""


class Validation(NamedTuple):
    """Metrics of a validation, and texts for samples.jsonl."""

    metrics: Row
    samples: Sequence[dict[str, Any]] = ()


class Progress(AbstractContextManager["Progress"]):
    """The state of a run, its records and its checkpoints.

    Left by an error before the update of a step, it saves the state before that step and tells how
    to go on.

    Args:
        state: of step 0; its arrays are donated. ``progress.state`` is that of the last step.
        validate: ``(state) -> Validation``; None: nothing is held out.
        sample: ``(state) -> rows of samples.jsonl``, of training prompts: the first and the last
            state are asked, if nothing is held out.
        show: metrics of the console's line.
        optimizer: whose schedule may be lowered by validations.
        monitor: the metric of early stopping and of the schedule plateau, unless ``keep_best``
            names one.

    Raises:
        UserError: early stopping, ``keep_best`` or the schedule plateau has no validations.
    """

    def __init__(
        self,
        run: OpenRun,
        state: Any,
        *,
        num_steps: int,
        validate: Callable[[Any], Validation] | None = None,
        sample: Callable[[Any], Sequence[dict[str, Any]]] | None = None,
        validation_interval: int = 1,
        show: tuple[str, ...] = (),
        optimizer: Optimizer | None = None,
        monitor: str = "min:validation/loss",
    ):
        kept = run.config
        self.run = run
        self.state = state
        self.num_steps = num_steps
        self.validate = validate
        self.sample = sample
        self.validation_interval = validation_interval
        self.show = show
        self.patience = Patience(
            kept.keep_best or monitor, kept.early_stopping_patience, optimizer or Optimizer()
        )
        if validate is None and (self.patience.used or kept.keep_best):
            best = kept.keep_best
            key = f"keep_best {best}" if best else "early_stopping_patience and schedule plateau"
            raise UserError(f"{key}: nothing is held out, so there are no validations to judge by")
        self.checkpoints = Checkpoints(
            run.folder.checkpoints,
            kept.keep_last,
            keep_best=kept.keep_best,
            asynchronous=kept.checkpoint_async,
        )
        self.rules = alerts.parse(kept.alerts, kept.compute.dtype)
        self.watches = [alerts.Watch(rule) for rule in self.rules]
        self.row: Row = {}  # the last row of metrics
        self.history: list[
            dict[str, Any]
        ] = []  # rows of a resumed run, then those with validations
        self.done = 0  # steps, the one under way included
        self.ended = ""  # early: why
        self.is_advancing = False  # a step is under way, and the state is the one before it
        self._has_begun = False
        self._pending: Metrics | None = None  # of the last step, on the devices still
        self._sources: Callable[[], Iterable[str]] = list  # data rows of that step
        self._cause: Callable[[], str] = str
        self._examples: Mapping[str, str] = {}  # what an alert shows of that step
        self._rules_checked = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._stops = stack.enter_context(stop_requests())
            stack.enter_context(self.checkpoints)
            self._pulse = stack.enter_context(Pulse())  # it names what compiles
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            advice = ""
            if self._has_begun and isinstance(error, Exception):
                advice = self._save_before(error)
            if advice and isinstance(error, UserError | TrainingFault):
                error.args = (f"{error}\n{advice}",)
            elif advice:
                logger.error(advice)  # a traceback follows
        finally:
            self._stack.__exit__(kind, error, trace)

    @property
    def has_steps(self) -> bool:
        """Whether a step is left, by the checkpoints there are."""
        return (self.checkpoints.latest() or 0) < self.num_steps

    @property
    def is_open(self) -> bool:
        """Whether another step follows."""
        return self.done < self.num_steps and not self.ended

    def begin(
        self, adopt: Callable[[Any, Mapping[str, Any]], Any] = lambda state, saved: state
    ) -> None:
        """Goes on from the newest checkpoint of a resumed run, or validates and saves step 0.

        Args:
            adopt: ``(restored state, the settings with which it was saved) -> state``.

        Raises:
            AlertStop: a rule with the action stop is true at the checkpoint.
        """
        run = self.run
        self._settings = objects.describe(to_dict(run.config))
        resume_step = None
        last_sent = 0  # the last step that trackers have
        if run.folder.resumed:
            target = memory.shapes(self.state)
            self.state = None  # the first state makes room for the restored one
            self.state, meta = self.checkpoints.restore(target)
            if not {"step", "metrics"} <= meta.keys():
                raise CheckpointError(f"{run.folder.checkpoints}: its newest one is of no run")
            self.state = adopt(self.state, meta.get("config", {}))
            self.done = resume_step = meta["step"]
            self.row = meta["metrics"]
            with contextlib.suppress(UserError):  # a damaged file is restored now
                steps = [row["step"] for row in reading.read_rows(run.folder.metrics)]
                last_sent = max(steps, default=0)
            processes.in_first(
                lambda: keeping.restore_rows(run.folder, self.checkpoints, self.done)
            )
            rows = reading.read_rows(run.folder.metrics)
            self.history = [row for row in rows if row["step"] <= self.done]
            finished = " (finished already)" if self.done >= self.num_steps else ""
            logger.info(f"resumed from step {self.done} of {self.num_steps}{finished}")
        tracked = run.config.track if processes.is_first() else ()
        tracker = Tracker(
            run.folder,
            total=self.num_steps,
            resume_step=resume_step,
            label=run.name,
            show=self.show,
            services=trackers.start(run.folder, tracked, self._settings, resume_step, last_sent),
            pulse=self._pulse,
        )
        self.tracker = self._stack.enter_context(tracker)
        if tracked:
            keeping.keep_start(run.folder)
        alert_rows = RowWriter(run.folder.path / "alerts.jsonl", resume_step)
        self.alert_rows = self._stack.enter_context(closing(alert_rows))
        # A resumed run's rules see the rows before its checkpoint again, and go on from there.
        for watch, row in itertools.product(self.watches, self.history):
            watch.observe(row)
        self._stack.callback(self._finish_step)  # a run that fails keeps the row of its last step
        if not run.folder.resumed:
            seed_libraries(run.config.seed, 0)
            self._log(self._validated())
            self.history.append(self.row)
            self._save()
            self.checkpoints.wait()  # before the first update, also if saves are asynchronous
            allocator.give_back()  # the copy of the state that was saved
        self._judge_history()
        self.clock = time.perf_counter()
        self._obey_alerts()
        self._has_begun = True

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left, from 1 on. Before each, Python's and NumPy's
        global generators are seeded.

        Raises:
            Stopped: SIGINT or SIGTERM came; the step was finished and saved.
        """
        while self.is_open:
            seed_libraries(self.run.config.seed, self.done + 1)
            self.is_advancing = True
            yield self.done + 1
        self.checkpoints.wait()

    def record(
        self,
        state: Any,
        metrics: Metrics,
        *,
        sources: Callable[[], Iterable[str]] = list,
        cause: Callable[[], str] = str,
        examples: Mapping[str, str] = {},
    ) -> None:
        """The state after a step and its metrics, among them ``nonfinite``. The row of the step
        before is written now.

        Args:
            sources: the data rows of the step, as "FILE, line N", for the message if its update is
                not finite.
            cause: why it is not, if that is known, for the same message.
            examples: {last part of a metric's name: what an alert on it shows of this step}.

        Raises:
            TrainingFault: the update of the step before was not finite.
        """
        self.state = state
        self.is_advancing = False
        self._finish_step()
        self._examples = examples
        self._sources = sources
        self._cause = cause
        self.done += 1
        self._pending = {**metrics, **learning_rates(state)}

    def settle(self, on_step: Callable[..., object] | None = None, *more: Any) -> None:
        """Validates and saves the step if that is due, asks ``on_step``, and obeys alerts and
        signals. It waits for the step only if one of them needs its result.

        A checkpoint is due at the end, at the interval, for a signal or an alert, and after
        validations under ``keep_best``.

        Args:
            on_step: ``on_step(step, state, row of numbers, *more)``; if it returns True, or PAUSE,
                the run ends here.

        Raises:
            TrainingFault: the update was not finite; the last checkpoint holds the state before it.
            AlertStop: a rule with the action stop is true.
            Stopped: SIGINT or SIGTERM came.
        """
        received = processes.stop_signal(self._stops)
        kept = self.run.config
        is_last = self.done == self.num_steps
        is_due = self.done % self.validation_interval == 0
        validates = is_last or (is_due and self.validate is not None)
        saves = received or is_last or self.done % kept.checkpoint_interval == 0
        may_stop = on_step is not None or "stop" in {rule.action for rule in self.rules}
        if not (validates or saves or may_stop):
            return
        asked = on_step and (lambda row: on_step(self.done, self.state, row, *more))
        if self._finish_step(validates, asked):
            validates = True
            self.history.append(self.row)
            self.state = self.patience.lowered(self.state, self.history)
            self._judge_history()
        is_alarmed = any(watch.stops for watch in self.watches)
        if saves or self.ended or is_alarmed or (validates and kept.keep_best):
            self._save()
        self.clock = time.perf_counter()
        self._obey_alerts()
        if received and self.is_open:
            self.checkpoints.wait()
            raise Stopped(
                f"{signal.Signals(received).name}: stopped {self.place}, saved. Go on with:\n"
                f"    {self._resume_command()}",
                received,
            )

    def result(self) -> tuple[Any, Row]:
        """The last state and row, or with ``keep_best`` those of the best checkpoint. Logs why the
        run ended early, and which checkpoint it returns.
        """
        metric = self.patience.metric
        best = self.checkpoints.best()
        if self.ended and self.done < self.num_steps:
            logger.info(f"ended early, {self.place}: {self.ended}")
        if best is None:
            return self.state, self.row
        self.state, meta = self.checkpoints.restore(self.state, best)
        logger.info(
            f"{metric} is best at step {best}: {meta['metrics'][metric]:.4g}; model/ is of that "
            "step"
        )
        return self.state, meta["metrics"]

    @property
    def place(self) -> str:
        """The last step, in words."""
        return f"after step {self.done} of {self.num_steps}"

    def _resume_command(self) -> str:
        return resume_command(self.run.name, self.run.folder.path)

    def _save_before(self, error: Exception) -> str:
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
            self._finish_step()
            if self.checkpoints.latest() != self.done:
                self._save()
        self.checkpoints.wait()
        when = "the service is there again" if isinstance(error, ServiceError) else "that is mended"
        return (
            f"Step {self.checkpoints.latest()} of {self.num_steps} is saved. When {when}, go "
            f"on with:\n    {self._resume_command()}"
        )

    def _judge_history(self) -> None:
        """Ends the run early if the validations so far say so."""
        if self.patience.stops(self.history):
            count = self.patience.stop_after
            self.ended = f"{self.patience.metric} has not improved for {count} validations"

    def _finish_step(
        self, validates: bool = False, asked: Callable[[Row], object] | None = None
    ) -> bool:
        """Writes the row of the step whose metrics are pending, with a validation of the state
        after it if one is due, or if the user, who is ``asked``, ends the run. Returns whether
        there was one.
        """
        if self._pending is None:
            return False
        metrics = as_numbers(self._pending)
        self._pending = None
        finite = not metrics["nonfinite"] > 0
        now = time.perf_counter()
        self.tracker.timing(self.done, {"timing/step": now - self.clock})
        self.clock = now
        validates = finite and validates
        recorded = {"step"}.union(self.row, *self.history)
        if validates:
            metrics |= self._validated()
        try:
            ending = asked(metrics) if finite and asked is not None else None
        except BaseException:
            self._log(metrics)  # a run that fails keeps the row of its last step
            raise
        if ending:
            self.ended = self.ended or "on_step asked for it"
            if ending is not PAUSE and not validates:
                validates = True
                metrics |= self._validated()
        self._log(metrics)
        if not finite:
            self.checkpoints.wait()
            sources = sorted(set(self._sources()))
            rows = places(sources, most=len(sources))
            look = f", or look at the rows of this batch: {rows}" if rows else ""
            advice = (
                "Lower the learning rate or clip harder (optimizer.max_grad_norm; with --resume, "
                f"name what changes under --allow-changed){look}"
            )
            raise TrainingFault(
                f"{self.run.name}: loss or gradient was not finite at step {self.done}; the "
                f"update was not applied. The last good checkpoint is step "
                f"{self.checkpoints.latest()} in {self.run.folder.checkpoints}. "
                f"{self._cause() or advice}"
            )
        if not self._rules_checked:
            self._rules_checked = True
            for sentence in alerts.check_metrics(self.rules, recorded | self.row.keys()):
                logger.info(sentence)
        return validates

    def _obey_alerts(self) -> None:
        """Ends the run, whose last step is saved, if a rule with the action stop is true."""
        stopping = [repr(watch.rule.text) for watch in self.watches if watch.stops]
        if stopping and self.is_open:
            self.checkpoints.wait()
            raise AlertStop(
                f"stopped by an alert {self.place}, saved: {' and '.join(stopping)} is true. Look "
                "at alerts.jsonl in the run's folder; go on without the rule, or with another one, "
                f"by\n    {self._resume_command()} --allow-changed alerts --alerts RULE..."
            )

    def _validated(self) -> Row:
        """The metrics of a validation; its texts are written, alone if nothing is held out."""
        if self.validate is None:
            if self.sample is not None:
                self.tracker.samples(self.done, self.sample(self.state))
            return {}
        started = time.perf_counter()
        with self._pulse.during(f"validation after step {self.done}"):
            metrics, samples = self.validate(self.state)
        self.tracker.samples(self.done, samples)
        self.tracker.timing(self.done, {"timing/validation": time.perf_counter() - started})
        is_read = self.patience.used or self.run.config.keep_best
        if is_read and self.patience.metric not in metrics:
            raise UserError(
                f"keep_best: no metric {self.patience.metric}; the validations give "
                f"{', '.join(metrics)}"
            )
        return metrics

    def _log(self, metrics: Mapping[str, Any]) -> None:
        """Writes a row, and shows it to the rules of alerts."""
        self.row = self.tracker.log(self.done, metrics)
        row = {"step": self.done, **self.row}
        for watch in self.watches:
            alert = watch.observe(row)
            if alert is None:
                continue
            example = self._examples.get(watch.rule.metrics[0].rpartition("/")[2])
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
            "seed": self.run.config.seed,
            "device": device,
            "config": self._settings,
        }
        rows = keeping.rows_of(self.run.folder) if processes.is_first() else {}
        self.checkpoints.save(self.done, self.state, meta, rows)


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
