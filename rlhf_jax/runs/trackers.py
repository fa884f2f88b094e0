"""Services that get a run's numbers, samples and alerts beside its folder: W&B, trackio, TensorBoard.

    services = trackers.start(run, ("wandb", "tensorboard"), config, resume_step=None)
    services.log(10, {"objective/score": 1.5})
    services.close()

W&B and trackio have one interface and are served by the same lines. Each service is called from a thread of its own: a
server that is away can hold a call up for minutes. What a service raises becomes a warning, once for each service. The
run goes on, and all that it records is in its folder too.
"""

import functools
import importlib
import importlib.util
import inspect
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.errors import UserError
from rlhf_jax.runs.folder import Run, write_atomically

CLOSE_SECONDS = 90  # for what is still to be sent when a run ends

Row = Mapping[str, Any]


class Service(NamedTuple):
    """A service that is open, as functions: of a step and what to send, and ``finish()``."""

    log: Callable[[int, Mapping[str, float]], Any]
    samples: Callable[[int, Sequence[Row]], Any]
    alert: Callable[[int, str], Any]
    finish: Callable[[], Any]


class Services:
    """Sends to each of some services, in order; the first error of one is a warning, the next ones are silent."""

    def __init__(self, services: Mapping[str, Service], sent: Mapping[str, int]):
        """sent: the step up to which a service has everything already; what comes for those steps is not sent."""
        self._services = dict(services)
        self._sent = sent
        self._calls: dict[str, queue.SimpleQueue[Callable[[], Any] | None]] = {}
        self._threads = {}
        for name in services:
            self._calls[name] = queue.SimpleQueue()
            self._threads[name] = threading.Thread(target=self._work, args=(name,), daemon=True)
            self._threads[name].start()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends a row of metrics."""
        self._send("log", step, numbers)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Sends rows of ``samples.jsonl`` as a table."""
        if rows:
            self._send("samples", step, rows)

    def alert(self, step: int, text: str) -> None:
        """Sends a warning about the run."""
        self._send("alert", step, text)

    def close(self) -> None:
        """Waits until what was sent has arrived, for at most ``CLOSE_SECONDS``."""
        for name, service in self._services.items():
            self._calls[name].put(service.finish)
            self._calls[name].put(None)
        end = time.monotonic() + CLOSE_SECONDS
        for name, thread in self._threads.items():
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                print(f"--track {name}: not all is sent after {CLOSE_SECONDS} s; the run ends without it", flush=True)

    def _send(self, what: str, step: int, value: Any) -> None:
        for name, service in self._services.items():
            if step > self._sent[name]:
                self._calls[name].put(functools.partial(getattr(service, what), step, value))

    def _work(self, name: str) -> None:
        warned = False
        while (call := self._calls[name].get()) is not None:
            try:
                call()
            except Exception as error:  # whatever a service comes up with: the training is worth more
                if not warned:
                    _warn(name, error, "what it lacks is in the run's folder; further errors of it are not shown")
                warned = True


def check(names: Sequence[str]) -> None:
    """Raises UserError where the package of a service is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name}: the package is not installed; pip install 'rlhf-jax[{name}]'")


def start(run: Run, names: Sequence[str], config: Mapping[str, Any], resume_step: int | None = None) -> Services:
    """Opens the services of these names; one that cannot be opened is left out with a warning.

    ``tracker.json`` in the run's folder keeps what the run is called there, so that a resumed one goes on in the same
    place. ``WANDB_PROJECT`` and ``WANDB_NAME`` name project and run for W&B and trackio.

    Args:
        run: its metrics.jsonl tells, on resume, what has been sent: call this before it is shortened.
        names: of ``wandb``, ``trackio``, ``tensorboard``.
        config: the run's settings as a tree of JSON values, shown beside the curves.
        resume_step: step of the checkpoint that the run goes on from; None: it starts anew. A service that the run did
            not have before gets the earlier rows of metrics too.

    Raises:
        UserError: a package is not installed.
    """
    check(names)
    if not names:
        return Services({}, {})
    path = run.path / "tracker.json"
    known: dict[str, Any] = {}
    if resume_step is not None and path.is_file():
        known = json.loads(path.read_text("utf-8"))
    run_id = known.get("id") or secrets.token_hex(4)
    place = {
        "id": run_id,
        "project": known.get("project") or os.environ.get("WANDB_PROJECT") or "rlhf_jax",
        "name": known.get("name") or os.environ.get("WANDB_NAME") or f"{run.path.resolve().name}-{run_id}",
    }
    before = known.get("services", [])
    rows = [] if resume_step is None else _rows(run.metrics)
    services, sent = {}, {}
    for name in names:
        try:
            if name == "tensorboard":
                services[name] = _tensorboard(run.path / "tensorboard", config, resume_step)
            else:
                services[name] = _client(name, place, config, resumed=name in before)
        except Exception as error:
            _warn(name, error, "the run goes on without it")
            continue
        # TensorBoard can be told to forget the steps behind the checkpoint; the others keep what they have.
        last = resume_step if name == "tensorboard" else max((row["step"] for row in rows), default=resume_step)
        sent[name] = -1 if last is None or name not in before else last
    if services:
        place["services"] = list(dict.fromkeys([*before, *services]))
        write_atomically(path, json.dumps(place, indent=2) + "\n")
    opened = Services(services, sent)
    for row in rows:
        if resume_step is not None and row["step"] <= resume_step:
            opened.log(row["step"], {key: float(value) for key, value in row.items() if key != "step"})
    return opened


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to one that a kill cut off."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _warn(name: str, error: Exception, outcome: str) -> None:
    print(f"--track {name}: {type(error).__name__}: {error}; {outcome}", flush=True)


def _client(name: str, place: Mapping[str, str], config: Mapping[str, Any], resumed: bool) -> Service:
    """W&B, or what imitates its Python interface; where its server is not reached, what W&B calls offline mode."""
    # How long W&B waits for its server; its own defaults outlast the run by hours when the server has gone away.
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "20")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
    os.environ.setdefault("WANDB_X_GRAPHQL_RETRY_MAX", "5")
    os.environ.setdefault("WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS", "10")
    module = importlib.import_module(name)
    accepted = inspect.signature(module.init).parameters
    arguments: dict[str, Any] = {"project": place["project"], "name": place["name"], "config": dict(config)}
    if "id" in accepted:  # trackio knows a run by its name
        arguments["id"] = place["id"]
    if resumed:
        arguments["resume"] = "allow"
    try:
        run = module.init(**arguments)
    except Exception as error:
        if "mode" not in accepted:
            raise
        _warn(name, error, f"it records offline; send that later with `{name} sync`")
        module.teardown()  # the attempt that failed still holds the run's id
        run = module.init(**arguments, mode="offline")

    def samples(step: int, rows: Sequence[Row]) -> None:
        columns, cells = _table(rows)
        run.log({"samples": module.Table(columns=columns, data=cells)}, step=step)

    return Service(
        log=lambda step, numbers: run.log(dict(numbers), step=step),
        samples=samples,
        alert=lambda step, text: run.alert(title=f"{place['name']}, step {step}", text=text),
        finish=run.finish,
    )


def _tensorboard(folder: Path, config: Mapping[str, Any], resume_step: int | None) -> Service:
    """Event files as TensorBoard reads them: scalars by the metrics' names, samples, alerts and settings as texts."""
    events = importlib.import_module("tensorboard.compat.proto.event_pb2")
    summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
    text_plugin = importlib.import_module("tensorboard.plugins.text.metadata")
    tensors = importlib.import_module("tensorboard.util.tensor_util")
    writer = importlib.import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter(str(folder))

    def write(step: int, **fields: Any) -> None:
        writer.add_event(events.Event(wall_time=time.time(), step=step, **fields))

    def text(step: int, tag: str, markdown: str) -> None:
        value = summaries.Summary.Value(
            tag=tag,
            metadata=text_plugin.create_summary_metadata(display_name=tag, description=""),
            tensor=tensors.make_tensor_proto([markdown.encode()]),
        )
        write(step, summary=summaries.Summary(value=[value]))

    def log(step: int, numbers: Mapping[str, float]) -> None:
        values = [summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        write(step, summary=summaries.Summary(value=values))

    def samples(step: int, rows: Sequence[Row]) -> None:
        columns, cells = _table(rows)
        lines = [columns, ["---"] * len(columns), *cells]
        escaped = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
        text(step, "samples", "\n".join(f"| {' | '.join(line)} |" for line in escaped))
        writer.flush()

    # Whoever reads the folder then forgets what was written for this step and later ones.
    first = 0 if resume_step is None else resume_step + 1
    write(first, session_log=events.SessionLog(status=events.SessionLog.START))
    text(first, "config", f"```\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```")
    return Service(log, samples, alert=lambda step, message: text(step, "alerts", message), finish=writer.close)


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Columns, and the cells [rows][columns]: numbers, and texts for all else."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> Any:
        return value if value is None or isinstance(value, (int, float, str)) else json.dumps(value, ensure_ascii=False)

    return columns, [[cell(row.get(name)) for name in columns] for row in rows]
