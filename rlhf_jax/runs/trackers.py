"""Services that get a run's numbers, samples and alerts beside its folder: W&B, trackio,
TensorBoard.

    services = trackers.start(run, ("wandb", "tensorboard"), config, resume_step=None)
    services.send("log", 10, {"objective/score": 1.5})
    services.send("close")

Each package sends in its own process or thread, so that no step waits for a network. An error of a
service becomes a warning, once for each service, and one that hangs is left after a bounded wait:
the run continues, and its folder has all its records.
"""

import contextlib
import importlib
import importlib.util
import inspect
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from traceback import format_exception_only
from typing import Any, Literal, TypedDict

from rlhf_jax.errors import UserError, logger
from rlhf_jax.runs.folder import Run
from rlhf_jax.runs.reading import Row, read_json, read_rows
from rlhf_jax.runs.writing import write_atomically

Numbers = Mapping[str, float]
Cells = list[list[Any]]
_PACKAGES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboardX"}
_PATIENCE = 75.0  # seconds that a call may take; longer than W&B waits for its server, see _Client
_NO_ANSWER = TimeoutError("it does not answer")


class _Place(TypedDict, total=False):
    """tracker.json."""

    id: str
    project: str
    name: str
    services: list[str]


class _Client:
    """W&B, or trackio, which has the same interface."""

    def __init__(self, name: str, place: Row, config: Row, resumed: bool):
        # How long W&B waits for a server that has gone away; its own defaults outlast the run by
        # hours.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "20")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        os.environ.setdefault("WANDB_X_GRAPHQL_RETRY_MAX", "5")
        self._module = importlib.import_module(name)
        arguments = {"project": place["project"], "name": place["name"], "config": config}
        # trackio knows a run by its name, not by an id.
        if "id" in inspect.signature(self._module.init).parameters:
            arguments["id"] = place["id"]
        if resumed:
            arguments["resume"] = "allow"
        self._run = self._module.init(**arguments)
        self._title = place["name"]
        self.close = self._run.finish

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log(dict(numbers), step=step)

    def samples(self, step: int, columns: list[str], cells: Cells) -> None:
        self._run.log({"samples": self._module.Table(columns=columns, data=cells)}, step=step)

    def alert(self, step: int, text: str) -> None:
        self._run.alert(title=f"{self._title}, step {step}", text=text)


class _TensorBoard:
    """Event files for TensorBoard: metrics are scalars; samples, alerts and settings texts."""

    def __init__(self, folder: Path, config: Row, resume_step: int | None):
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # a metric may be NaN
        # Not SummaryWriter, whose thread dies of the first error of a disk: its calls, and the end
        # of the process, would then wait for ever.
        writer = importlib.import_module("tensorboardX.event_file_writer")
        self._event = importlib.import_module("tensorboardX.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboardX.summary")
        first = 0 if resume_step is None else resume_step + 1
        folder.mkdir(exist_ok=True)
        # The suffix keeps two starts within one second from writing to one file.
        self._writer = writer.EventsWriter(str(folder / "events"), f".step{first}")
        # Readers forget what was written from this step on.
        self._writer.write_event(self._event(step=first, session_log={"status": "START"}))
        settings = json.dumps(config, indent=2, ensure_ascii=False)
        self._write(first, self._summary.text("config", f"```\n{settings}\n```"))
        self.close = self._writer.close

    def _write(self, step: int, *summaries: Any) -> None:
        for each in summaries:
            self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=each))
        self._writer.flush()

    def log(self, step: int, numbers: Numbers) -> None:
        self._write(step, *(self._summary.scalar(*number) for number in numbers.items()))

    def samples(self, step: int, columns: list[str], cells: Cells) -> None:
        lines = []
        for line in (columns, ["---"] * len(columns), *cells):
            escaped = [str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line]
            lines.append(f"| {' | '.join(escaped)} |")
        self._write(step, self._summary.text("samples", "\n".join(lines)))

    def alert(self, step: int, text: str) -> None:
        self._write(step, self._summary.text("alerts", text))


Service = _Client | _TensorBoard


class Services:
    """Sends to some services. The first error of each is a warning, the next ones are silent."""

    def __init__(self, services: dict[str, Service], sent: Mapping[str, int]):
        """sent: {service: the last step that it has already}; it gets no row up to this step."""
        self._services = services
        self._sent = sent
        self._warned: set[str] = set()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows of ``samples.jsonl`` as a table: numbers, and texts for everything else."""
        if not rows:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[_cell(row.get(name)) for name in columns] for row in rows]
        self.send("samples", step, columns, cells)

    def send(self, what: Literal["log", "samples", "alert", "close"], *values: Any) -> None:
        """Sends a row of metrics, a table of samples or an alert, whose step comes first. Or waits
        until everything has arrived, within a bound, and closes.
        """
        for name, service in list(self._services.items()):
            if values and values[0] <= self._sent[name]:
                continue
            _, error = _ask(getattr(service, what), *values)
            if error and name not in self._warned:
                lacks = "what it lacks is in the run's folder; further errors of it are not shown"
                _warn(name, error, lacks)
                self._warned.add(name)
            if error is _NO_ANSWER:
                del self._services[name]


def _cell(value: Any) -> Any:
    """A value of a table: a number or a text."""
    if isinstance(value, int | float | str | None):
        return value
    return json.dumps(value, ensure_ascii=False)


def check(names: Sequence[str]) -> None:
    """Raises UserError if the package of a service is not installed."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(
                f"--track {name}: the package is not installed; pip install 'rlhf-jax[{name}]'"
            )


def start(
    run: Run,
    names: Sequence[str],
    config: Row,
    resume_step: int | None = None,
    last_sent: int = 0,
) -> Services:
    """Opens the services of these names; one that cannot be opened is left out with a warning.

    ``tracker.json`` in the run's folder keeps the run's name in each service, so that a resumed run
    continues there. ``WANDB_PROJECT`` and ``WANDB_NAME`` name project and run for W&B and trackio.

    Args:
        run: its metrics.jsonl tells, on resume, what has been sent.
        names: of ``wandb``, ``trackio``, ``tensorboard``.
        config: the run's settings as a tree of JSON values, shown beside the curves.
        resume_step: step of the checkpoint that the run goes on from; None: it starts anew. A
            service that the run did not have before gets the earlier rows of metrics too.
        last_sent: the last step that services have, if later rows are no longer in metrics.jsonl.
    """
    if not names:
        return Services({}, {})
    path = run.path / "tracker.json"
    rows: list[Row] = []
    run_id = secrets.token_hex(4)
    place = {
        "id": run_id,
        "project": os.environ.get("WANDB_PROJECT") or "rlhf_jax",
        "name": os.environ.get("WANDB_NAME") or f"{run.path.resolve().name}-{run_id}",
        "services": [],
    }
    if resume_step is not None:
        rows = read_rows(run.metrics)
        if path.is_file():
            place |= read_json(path, _Place)
    known = place["services"]
    services: dict[str, Service] = {}
    sent = dict.fromkeys(names, -1)
    for name in names:
        if name == "tensorboard":
            service, error = _ask(_TensorBoard, run.path / name, config, resume_step)
        else:
            service, error = _ask(_Client, name, place, config, name in known)
        if error:
            _warn(name, error, "the run goes on without it")
        else:
            services[name] = service
        if name in known and rows:
            # TensorBoard forgets the steps after the checkpoint, the others do not.
            last = resume_step or 0 if name == "tensorboard" else rows[-1]["step"]
            sent[name] = last if name == "tensorboard" else max(last, last_sent)
    if services:
        place["services"] = list(dict.fromkeys([*known, *services]))
        write_atomically(path, json.dumps(place, indent=2) + "\n")
    opened = Services(services, sent)
    for row in rows:
        step = row.pop("step")
        if step <= (resume_step or 0):
            opened.send("log", step, row)
    return opened


def _ask(call: Callable[..., Any], *values: Any) -> tuple[Any, BaseException | None]:
    """(what a service returns, None), or (None, its error). The thread keeps from the run what the
    service does there: it may hang or exit. It is a daemon, or the process would wait for it.
    """
    answers: list[tuple[Any, BaseException | None]] = []

    def answer() -> None:
        try:
            with contextlib.chdir("."):  # the run's paths may be relative
                answers.append((call(*values), None))
        except BaseException as error:  # whatever it is: the training is worth more
            answers.append((None, error))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    result, error = answers[0] if answers else (None, _NO_ANSWER)
    if isinstance(error, KeyboardInterrupt):
        raise error
    return result, error


def _warn(name: str, error: BaseException, outcome: str) -> None:
    logger.info(f"--track {name}: {format_exception_only(error)[-1].strip()}; {outcome}")
