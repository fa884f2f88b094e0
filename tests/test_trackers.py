"""What W&B, trackio and TensorBoard get, once each, and that none of them can stop a run.

A stand-in has the calls of W&B's and trackio's Python interface that are made here; the packages
themselves run where they are installed: trackio on its local files, W&B offline.
"""

import asyncio
import errno
import importlib
import importlib.util
import json
import os
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from builders import Killed, run_loop

from rlhf_jax.config import RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.runs import trackers
from rlhf_jax.runs.folder import open_run
from rlhf_jax.runs.log import Pulse, Tracker
from rlhf_jax.training.common import setup

SAMPLES = [
    {"prompt": "a|b", "response": "c\nd", "score": 0.5},
    {"prompt": [["user", "x"]], "response": "e", "score": float("nan"), "unsafe": None},
]


def init_wandb(project=None, name=None, id=None, config=None, resume=None):
    """The signature of ``wandb.init``, as far as it is used here."""


def init_trackio(project, name=None, config=None, resume="never"):
    """That of ``trackio.init``."""


def stand_in(monkeypatch, name, broken=(), fault=None):
    """Puts a module in the place of wandb or trackio; ``broken`` names the calls that raise, or
    whose effect is ``fault``. Returns its ``init``.
    """
    module = types.ModuleType(name)
    module.init = init = mock.create_autospec({"wandb": init_wandb, "trackio": init_trackio}[name])
    init.return_value = mock.Mock(spec=["log", "alert", "finish"])
    for call in broken:
        (init if call == "init" else getattr(init.return_value, call)).side_effect = (
            fault or ConnectionError(f"no {call}")
        )
    module.Table = lambda columns, data: ("table", columns, data)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return init


def track(folder, names, steps, resume_step=None):
    """A run that records ``x = step`` in each of the steps, samples before those that 4 divides, an
    alert at 2.
    """
    with open_run(folder, resume=resume_step is not None) as run:
        services = trackers.start(run, names, {"seed": 1}, resume_step)
        with Tracker(
            run,
            total=9,
            resume_step=resume_step,
            label="",
            show=(),
            services=services,
            pulse=Pulse(),
        ) as tracker:
            for step in steps:
                if step % 4 == 0:
                    tracker.samples(step, SAMPLES)
                tracker.log(step, {"x": float(step), "loss": float("nan")})
                if step == 2:
                    tracker.alert(step, "KL explosion")


def track_killed_run(folder, name, seconds_between=0):
    """Killed in step 7; its checkpoint is step 4."""
    track(folder, [name], range(7))
    time.sleep(seconds_between)
    track(folder, [name], range(5, 10), resume_step=4)


def logged(init, name="x"):
    """The steps at which a service got this name."""
    return [
        call.kwargs["step"] for call in init.return_value.log.call_args_list if name in call.args[0]
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_and_its_resumption_are_one_run_in_which_no_step_comes_twice(
    tmp_path, monkeypatch, name
):
    init = stand_in(monkeypatch, name)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    track_killed_run(tmp_path / "ppo", name)
    assert logged(init) == list(range(10))
    assert logged(init, "samples") == [0, 4, 8]
    kind, columns, cells = init.return_value.log.call_args_list[0].args[0]["samples"]
    assert (kind, columns) == ("table", ["prompt", "response", "score", "unsafe"])
    assert cells[0] == ["a|b", "c\nd", 0.5, None]
    assert cells[1][0] == '[["user", "x"]]'
    first, second = (call.kwargs for call in init.call_args_list)
    assert second == first | {"resume": "allow"}
    assert "resume" not in first
    assert (first["project"], first["name"][:4], first["config"]) == ("mine", "ppo-", {"seed": 1})
    kept = json.loads((tmp_path / "ppo" / "tracker.json").read_text())
    assert kept == {
        "id": first["name"][4:],
        "project": "mine",
        "name": first["name"],
        "services": [name],
    }
    assert first.get("id") == (kept["id"] if name == "wandb" else None)
    init.return_value.alert.assert_called_once_with(
        title=f"{first['name']}, step 2", text="KL explosion"
    )
    assert init.return_value.finish.call_count == 2


def test_a_service_that_joins_later_gets_what_was_before(tmp_path, monkeypatch):
    first = stand_in(monkeypatch, "wandb")
    second = stand_in(monkeypatch, "trackio")
    track(tmp_path, ["wandb"], range(7))
    track(tmp_path, ["wandb", "trackio"], range(5, 8), resume_step=4)
    assert logged(first) == logged(second) == list(range(8))


@pytest.mark.parametrize(
    ("name", "broken", "warning"),
    [
        ("wandb", ["init"], "no init; the run goes on without it"),
        ("wandb", ["log"], "no log; what it lacks is in the run's folder"),
        ("trackio", ["alert", "finish"], "no alert; what it lacks is in the run's folder"),
    ],
)
def test_errors_are_one_warning_and_stop_nothing(
    tmp_path, monkeypatch, capsys, name, broken, warning
):
    init = stand_in(monkeypatch, name, broken)
    other = "trackio" if name == "wandb" else "wandb"
    healthy = stand_in(monkeypatch, other)
    track(tmp_path, [name, other], range(5))
    out = capsys.readouterr().out
    assert warning in out
    assert out.count("run goes on without") + out.count("what it lacks") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert logged(healthy) == [0, 1, 2, 3, 4]
    assert init.return_value.finish.call_count == (0 if "init" in broken else 1)


def run_within(seconds, task):
    """Whether the task ends in time; it has a thread of its own, for it may stand for ever."""
    thread = threading.Thread(target=task, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@pytest.mark.parametrize("call", ["init", "log", "alert", "finish"])
def test_a_service_that_hangs_is_left_after_a_bounded_wait(tmp_path, monkeypatch, capsys, call):
    monkeypatch.setattr(trackers, "_PATIENCE", 0.3)
    hangs = threading.Event()
    init = stand_in(monkeypatch, "wandb", [call], lambda *_, **__: hangs.wait(60))
    healthy = stand_in(monkeypatch, "trackio")
    steps = range(9)
    ended = run_within(10, lambda: track(tmp_path, ["wandb", "trackio"], steps))
    hangs.set()
    assert ended
    assert capsys.readouterr().out.count("--track wandb: TimeoutError") == 1
    assert logged(healthy) == list(steps)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(steps)
    asked = [name for name, _, _ in init.return_value.mock_calls]
    assert call == "init" or (asked[-1], asked.count(call)) == (call, 1)  # nothing more


def test_a_service_that_hangs_does_not_keep_the_process(monkeypatch):
    monkeypatch.setattr(trackers, "_PATIENCE", 0.05)
    hangs, others = threading.Event(), threading.enumerate()
    answer, error = trackers._ask(hangs.wait, 60)
    [left] = [thread for thread in threading.enumerate() if thread not in others]
    hangs.set()
    assert (answer, type(error), left.daemon) == (None, TimeoutError, True)


def test_an_error_of_no_kind_and_no_message_is_a_warning(tmp_path, monkeypatch, capsys):
    init = stand_in(monkeypatch, "wandb", ["log"], asyncio.CancelledError())
    track(tmp_path, ["wandb"], range(5))
    assert "CancelledError; what it lacks" in capsys.readouterr().out
    assert logged(init) == list(range(5))


def test_an_error_whose_text_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    class Odd(Exception):
        def __str__(self):
            raise ZeroDivisionError

    init = stand_in(monkeypatch, "wandb", ["log"], Odd())
    track(tmp_path, ["wandb"], range(5))
    assert "Odd: <exception str() failed>; what it lacks" in capsys.readouterr().out
    assert logged(init) == list(range(5))


def test_a_service_that_changes_the_working_folder_moves_no_run(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch, "wandb", ["init", "log"], lambda *_, **__: os.chdir("elsewhere"))
    track("run", ["wandb"], range(2))
    assert Path.cwd() == tmp_path
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_service_whose_own_request_takes_too_long_is_asked_again(tmp_path, monkeypatch):
    init = stand_in(monkeypatch, "wandb", ["log"], TimeoutError("no reply of the server"))
    track(tmp_path, ["wandb"], range(5))
    assert logged(init) == list(range(5))


def test_a_slow_service_gets_everything_before_the_run_closes(tmp_path, monkeypatch):
    init = stand_in(monkeypatch, "wandb", ["log"], lambda *_, **__: time.sleep(0.01))
    track(tmp_path, ["wandb"], range(20))
    assert logged(init) == list(range(20))
    assert init.return_value.mock_calls[-1] == mock.call.finish()


@pytest.mark.parametrize("call", ["init", "log", "alert", "finish"])
def test_a_service_that_calls_sys_exit_does_not_end_the_run(tmp_path, monkeypatch, capsys, call):
    init = stand_in(monkeypatch, "wandb", [call], SystemExit(0))
    track(tmp_path, ["wandb"], range(5))
    assert "--track wandb: SystemExit: 0;" in capsys.readouterr().out
    assert logged(init) == ([] if call == "init" else [0, 1, 2, 3, 4])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_package_that_exits_when_it_is_imported(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    track(tmp_path / "run", ["wandb"], range(2))
    assert "--track wandb: SystemExit: 3; the run goes on without it" in capsys.readouterr().out


def test_an_interrupt_ends_the_run(tmp_path, monkeypatch):
    stand_in(monkeypatch, "wandb", ["init"], KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        track(tmp_path, ["wandb"], range(2))


def test_a_missing_package_is_said_before_anything_else(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup.devices, "choose", lambda device: pytest.fail("too late"))
    with pytest.raises(
        UserError,
        match=r"--track wandb: the package is not installed; pip install 'rlhf-jax\[wandb\]'",
    ):
        setup.set_up(RunConfig(track=("wandb",)))


# --- The packages themselves
# ----------------------------------------------------------------------------------------


def test_tensorboard_reads_each_step_once(tmp_path, caplog):
    pytest.importorskip("tensorboardX")
    began = time.time()
    event_accumulator = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    track_killed_run(tmp_path, "tensorboard")
    read = event_accumulator.EventAccumulator(
        str(tmp_path / "tensorboard"), {"tensors": 0, "scalars": 0}
    ).Reload()

    def texts(tag):
        return {
            event.step: event.tensor_proto.string_val[0].decode()
            for event in read.Tensors(f"{tag}/text_summary")
        }

    assert [(event.step, event.value) for event in read.Scalars("x")] == [
        (step, float(step)) for step in range(10)
    ]
    assert all(began <= event.wall_time <= time.time() for event in read.Scalars("x"))
    assert "NaN" not in caplog.text
    assert len(read.Tags()["tensors"]) == 3
    assert list(texts("samples")) == [0, 4, 8]
    lines = [
        "| prompt | response | score | unsafe |",
        "| --- | --- | --- | --- |",
        "| a\\|b | c<br>d | 0.5 | None |",
    ]
    assert texts("samples")[0].splitlines()[:3] == lines
    assert texts("alerts") == {2: "KL explosion"}
    assert [step for step, text in texts("config").items() if '"seed": 1' in text] == [0, 5]


def test_a_full_disk_is_one_warning_of_tensorboard(tmp_path, monkeypatch, capsys):
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    whole, written = record_writer.RecordWriter.write, []

    def write(self, data):
        written.append(data)
        if len(written) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", write)
    assert run_within(10, lambda: track(tmp_path, ["tensorboard"], range(40)))
    assert capsys.readouterr().out.count("--track tensorboard: OSError: [Errno 28] No space") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40


def test_tensorboard_has_each_row_on_the_disk_before_the_next_one(tmp_path):
    """A killed run loses none that its checkpoint counts as sent."""
    pytest.importorskip("tensorboardX")
    service = trackers._TensorBoard(tmp_path / "tensorboard", {}, None)
    [events] = (tmp_path / "tensorboard").iterdir()
    before = events.stat().st_size
    service.log(0, {"x": 1.0})
    assert events.stat().st_size > before
    service.close()


def test_trackio_itself(tmp_path, monkeypatch):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv(
        "TRACKIO_DIR", str(tmp_path / "trackio")
    )  # which it reads when it is imported
    for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)
    track_killed_run(tmp_path / "run", "trackio")
    name = json.loads((tmp_path / "run" / "tracker.json").read_text())["name"]
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    assert storage.get_runs("rlhf_jax") == [name]
    found = storage.get_logs("rlhf_jax", name)
    assert sorted(row["step"] for row in found if "x" in row) == list(range(10))
    assert sum("samples" in row for row in found) == 3


def test_w_and_b_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    # W&B names an offline folder by the second of its start; two starts within one second share a
    # folder.
    track_killed_run(tmp_path / "run", "wandb", seconds_between=1)
    run_id = json.loads((tmp_path / "run" / "tracker.json").read_text())["id"]
    written = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(written) == 2


def test_a_killed_run_that_is_resumed_sends_no_step_twice(tmp_path, monkeypatch):
    """Though its rows after the checkpoint have been removed."""
    init = stand_in(monkeypatch, "trackio")
    config = RunConfig(output_dir=str(tmp_path), checkpoint_interval=3, track=("trackio",))
    with pytest.raises(Killed):
        run_loop(config, num_steps=7, die_at=5)
    run_loop(replace(config, resume=True), num_steps=7)
    assert logged(init, "loss") == [1, 2, 3, 4, 5, 6, 7]
