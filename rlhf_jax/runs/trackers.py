"""Services that get a run's numbers, samples and alerts beside its folder: W&B, trackio,
TensorBoard.

    services = trackers.start(run, ("wandb", "tensorboard"), config, resume_step=None)
    services.log(10, {"objective/score": 1.5})
    services.close()

Each package sends in its own process or thread, so that no step waits for a network. An error of a
service becomes a warning, once for each service: the run continues, and its folder has all its
records.
"""

import importlib
import importlib.util
import inspect
import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.errors import UserError, logger
from rlhf_jax.runs.folder import Run, write_atomically
from rlhf_jax.runs.reading import TRACKER, read_json, read_rows

_PACKAGES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboardX"}


class _Client:
    """W&B, or trackio, which has the same interface."""

    def __init__(
        self,
        name: str,
        place: Mapping[str, Any],
        config: Mapping[str, Any],
        resumed: bool,
    ):
        # How long W&B waits for a server that has gone away; its own defaults outlast the run by
        # hours.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "20")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        os.environ.setdefault("WANDB_X_GRAPHQL_RETRY_MAX", "5")
        self._module = importlib.import_module(name)
        arguments = {"project": place["project"], "name": place["name"], "config": dict(config)}
        # trackio knows a run by its name, not by an id.
        if "id" in inspect.signature(self._module.init).parameters:
            arguments["id"] = place["id"]
        if resumed:
            arguments["resume"] = "allow"
        self._run = self._module.init(**arguments)
        self._title = place["name"]
        self.close = self._run.finish

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def samples(
        self,
        step: int,
        columns: list[str],
        cells: list[list[Any]],
    ) -> None:
        self._run.log({"samples": self._module.Table(columns=columns, data=cells)}, step=step)

    def alert(self, step: int, text: str) -> None:
        self._run.alert(title=f"{self._title}, step {step}", text=text)


class _TensorBoard:
    """Event files for TensorBoard: scalars by the metrics' names; samples, alerts and settings as
    texts.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        resume_step: int | None,
    ):
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # a metric may be NaN
        module = importlib.import_module("tensorboardX")
        # Readers forget what was written from this step on.
        first = 0 if resume_step is None else resume_step + 1
        # The suffix keeps two starts within one second from writing to one file.
        suffix = f".step{first}"
        self._writer = module.SummaryWriter(str(folder), purge_step=first, filename_suffix=suffix)
        settings = json.dumps(config, indent=2, ensure_ascii=False)
        self._writer.add_text("config", f"```\n{settings}\n```", first)
        self.close = self._writer.close

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def samples(
        self,
        step: int,
        columns: list[str],
        cells: list[list[Any]],
    ) -> None:
        lines = []
        for line in (columns, ["---"] * len(columns), *cells):
            escaped = [str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line]
            lines.append(f"| {' | '.join(escaped)} |")
        self._writer.add_text("samples", "\n".join(lines), step)
        self._writer.flush()

    def alert(self, step: int, text: str) -> None:
        self._writer.add_text("alerts", text, step)


class Services:
    """Sends to some services; the first error of one is a warning, its next ones are silent."""

    def __init__(self, services: Mapping[str, _Client | _TensorBoard], sent: Mapping[str, int]):
        """sent: the last step that a service has already; it gets no row up to this step."""
        self._services = services
        self._sent = sent
        self._warned: set[str] = set()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows of ``samples.jsonl`` as a table: numbers, and texts for everything else."""
        if not rows:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))

        def cell(value: Any) -> Any:
            if isinstance(value, int | float | str | None):
                return value
            return json.dumps(value, ensure_ascii=False)

        cells = [[cell(row.get(name)) for name in columns] for row in rows]
        self.send("samples", step, columns, cells)

    def send(self, what: Literal["log", "samples", "alert", "close"], *values: Any) -> None:
        """Sends a row of metrics, a table of samples or an alert, each behind its step; or waits
        until everything has arrived, or until the service's own time limit, and closes."""
        for name, service in self._services.items():
            if values and values[0] <= self._sent[name]:
                continue
            try:
                getattr(service, what)(*values)
            except Exception as error:  # whatever it is: the training is worth more
                if name not in self._warned:
                    rest = "what it lacks is in the run's folder"
                    _warn(name, error, f"{rest}; further errors of it are not shown")
                self._warned.add(name)


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
    config: Mapping[str, Any],
    resume_step: int | None = None,
) -> Services:
    """Opens the services of these names; one that cannot be opened is left out with a warning.

    ``tracker.json`` in the run's folder keeps the run's name in each service, so that a resumed run
    continues there. ``WANDB_PROJECT`` and ``WANDB_NAME`` name project and run for W&B and trackio.

    Args:
        run: its metrics.jsonl tells, on resume, what has been sent: call this before later rows are
            removed from it.
        names: of ``wandb``, ``trackio``, ``tensorboard``.
        config: the run's settings as a tree of JSON values, shown beside the curves.
        resume_step: step of the checkpoint that the run goes on from; None: it starts anew. A
            service that the run did not have before gets the earlier rows of metrics too.
    """
    if not names:
        return Services({}, {})
    path = run.path / "tracker.json"
    run_id = secrets.token_hex(4)
    project = os.environ.get("WANDB_PROJECT") or "rlhf_jax"
    name = os.environ.get("WANDB_NAME") or f"{run.path.resolve().name}-{run_id}"
    place: dict[str, Any] = {"id": run_id, "project": project, "name": name, "services": []}
    rows: list[dict[str, Any]] = []
    if resume_step is not None:
        if path.is_file():
            place |= read_json(path, TRACKER)
        rows = read_rows(run.metrics)
    known = place["services"]
    sent = dict.fromkeys(names, -1)
    services: dict[str, _Client | _TensorBoard] = {}
    for name in names:
        try:
            if name == "tensorboard":
                services[name] = _TensorBoard(run.path / name, config, resume_step)
            else:
                services[name] = _Client(name, place, config, resumed=name in known)
        except Exception as error:
            _warn(name, error, "the run goes on without it")
        if name in known and resume_step is not None:
            sent[name] = resume_step
            # TensorBoard forgets the steps behind the checkpoint, the others do not.
            if rows and name != "tensorboard":
                sent[name] = rows[-1]["step"]
    if services:
        place["services"] = list(dict.fromkeys([*known, *services]))
        write_atomically(path, json.dumps(place, indent=2) + "\n")
    opened = Services(services, sent)
    for row in rows:
        step = row["step"]
        if step <= (resume_step or 0):
            numbers = {key: float(value) for key, value in row.items() if key != "step"}
            opened.send("log", step, numbers)
    return opened


def _warn(name: str, error: Exception, outcome: str) -> None:
    logger.info(f"--track {name}: {type(error).__name__}: {error}; {outcome}")
