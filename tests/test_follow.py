"""``report --follow``: the page of runs that still train."""

import fcntl
import json
from types import SimpleNamespace

import pytest
from builders import METRICS, write_run

from rlhf_jax.cli import report
from rlhf_jax.errors import UserError
from rlhf_jax.report import figures
from rlhf_jax.report import follow as following
from rlhf_jax.runs.writing import is_locked, take_lock

SETTINGS = {"rl": {"num_iterations": 5}}
FEW = {name: values[:2] for name, values in METRICS.items()}
RELOADS = "location.reload()"


@pytest.fixture
def between(monkeypatch):
    """Sets what happens between two looks at the files; the last of them must end the following."""
    monkeypatch.setattr(figures, "element", lambda plot, salt: "")

    def happen(*events):
        left = iter(events)
        monkeypatch.setattr(following.time, "sleep", lambda seconds: next(left)())

    return happen


@pytest.fixture
def slept(monkeypatch):
    """The seconds of each sleep, by a clock that runs in them alone."""
    times = []
    clock = SimpleNamespace(sleep=times.append, monotonic=lambda: sum(times), strftime=str)
    monkeypatch.setattr(following, "time", clock)
    return times


def interrupt():
    raise KeyboardInterrupt


def finish(run):
    (run / "model" / "config.json").write_text("{}")


def test_a_run_is_followed_from_before_its_start_to_its_model(between, tmp_path, caplog):
    caplog.set_level("INFO", "rlhf_jax")
    run = tmp_path / "run"
    page = run / "report.html"
    seen = []

    def begin():
        write_run(run, settings=SETTINGS, metrics=FEW, samples={}, finished=False)
        seen.append(take_lock(run / ".lock", "", ""))
        (run / "metrics.jsonl").rename(tmp_path / "rows")

    def write():
        assert not page.exists()
        (tmp_path / "rows").rename(run / "metrics.jsonl")

    def look():
        seen.append(page.read_text())
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 3, "objective/score": 9.0}) + '\n{"step": 4, "obj')

    def end():
        seen.append(page.read_text())
        finish(run)
        seen[0]()

    between(begin, write, look, end)
    report.report_runs((str(run),), follow=True)
    _, first, second = seen
    assert "iteration 2 of 5, refreshed " in first
    assert "iteration 3 of 5, refreshed " in second
    assert first.count(RELOADS) == second.count(RELOADS) == 1
    assert RELOADS not in page.read_text()
    assert "refreshed" not in page.read_text()
    said = [record.getMessage() for record in caplog.records]
    waits = [f"waiting for {place}; Ctrl-C ends" for place in (run, run / "metrics.jsonl")]
    assert [line for line in said if "Ctrl-C" in line][:2] == waits


def test_nothing_is_drawn_again_while_nothing_is_written(between, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", finished=False)
    take_lock(run / ".lock", "", "")
    drawn = []
    monkeypatch.setattr(following.page, "write", lambda *_, **how: drawn.append(how))
    between(int, int, interrupt)
    with pytest.raises(KeyboardInterrupt):
        following.follow([str(run)])
    assert [bool(how) for how in drawn] == [True, False]  # the last one stands still


def test_a_run_that_has_died_is_an_error_and_on_the_page(slept, tmp_path):
    """After the seconds in which a command may still be starting."""
    run = write_run(tmp_path / "run", settings=SETTINGS, finished=False)
    (run / ".lock").write_text("1\n")  # of a killed process
    message = (
        r"run: no process trains here\. Not finished: the last record is of iteration 3 of 5\."
    )
    with pytest.raises(UserError, match=message):
        following.follow([str(run)])
    assert RELOADS not in (run / "report.html").read_text()
    assert sum(slept) == following.STARTING


def test_a_run_that_begins_anew_is_followed_from_before_its_process_has_the_folder(
    between, tmp_path, caplog
):
    caplog.set_level("INFO", "rlhf_jax")
    run = write_run(tmp_path / "run", settings=SETTINGS)  # an earlier one, which has ended
    seen = []

    def begin():
        seen.append((run / "report.html").exists())
        seen.append(take_lock(run / ".lock", "", ""))

    def end():
        seen.append((run / "report.html").read_text())
        seen[1]()

    between(begin, end)
    assert following.follow([str(run)]) == run / "report.html"
    assert not seen[0]
    assert RELOADS in seen[2]
    assert f"waiting for a process that trains in {run}; Ctrl-C ends" in caplog.text


def test_all_runs_are_followed(between, tmp_path):
    one, other = (
        write_run(tmp_path / "all" / name, seed=i, settings=SETTINGS) for i, name in enumerate("ab")
    )
    release = take_lock(other / ".lock", "", "")
    out = tmp_path / "out.html"
    seen = []

    def end():
        seen.append(out.read_text())
        release()

    between(end)
    assert following.follow([str(one), str(other)], str(out)) == out
    assert "a: iteration 3 of 5, b: iteration 3 of 5, refreshed " in seen[0]


def test_stages_of_a_pipeline_are_waited_for(slept, tmp_path):
    write_run(tmp_path / "all" / "sft", settings=SETTINGS)
    following.follow([str(tmp_path / "all")])
    assert sum(slept) == following.BETWEEN_STAGES  # in which another stage may begin


def test_a_lock_is_looked_at_without_being_taken(tmp_path):
    lock = tmp_path / ".lock"
    assert not is_locked(lock)
    assert not lock.exists()
    release = take_lock(lock, "", "")
    assert is_locked(lock)
    release()
    lock.write_text("1\n")
    assert not is_locked(lock)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing is left of the look
