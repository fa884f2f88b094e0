"""Rows that read back equal, no row twice and none missing after a kill, and a console that works
anywhere.
"""

import contextlib
import io
import json
import math
import time
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import rich.progress

from rlhf_jax.cli.planning import plan
from rlhf_jax.errors import UserError
from rlhf_jax.runs.folder import open_run
from rlhf_jax.runs.log import COMPILE_EVENT, Pulse, RowWriter, Tracker, duration
from rlhf_jax.runs.trackers import Services
from rlhf_jax.training.common.progress import Progress, Validation
from rlhf_jax.training.supervised import normalization


def tracking(run, total, show=(), resume_step=None, pulse=None) -> Tracker:
    return Tracker(
        run,
        total=total,
        resume_step=resume_step,
        label="ppo",
        show=show,
        services=Services({}, {}),
        pulse=pulse or Pulse(),
    )


def rows(path) -> list[dict]:
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()
    ]


def write(path, steps, resume_step=None) -> None:
    writer = RowWriter(path, resume_step)
    for step in steps:
        writer.write(step, {"x": step / 3})
    writer.close()


def test_rows(tmp_path):
    writer = RowWriter(tmp_path / "m.jsonl")
    row = {"loss": 0.1 + 0.2, "n": 3, "ok": True, "text": "ä\n", "none": None}
    writer.write(1, row)
    assert rows(tmp_path / "m.jsonl") == [
        {"step": 1} | row
    ]  # before sync or close: a killed process loses no row


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"step": 8, "x', b'{"step": 8}', b"\x00\x00\x00", b'{"step": 8, "t": "\xc3', b"8"],
)
def test_resume_leaves_no_row_twice_and_none_out(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    straight = tmp_path / "straight.jsonl"
    write(straight, [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    write(path, [0, 0, 1, 2, 3, 4, 5, 6, 7])
    path.write_bytes(path.read_bytes() + torn)
    write(path, range(5, 10), resume_step=4)
    assert path.read_bytes() == straight.read_bytes()


def test_the_start_of_a_file(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [3], resume_step=2)  # there is none yet
    write(path, range(2))  # a new run starts it anew
    path.write_bytes(path.read_bytes()[:-1])
    write(path, [2], resume_step=1)  # a complete last row is kept, though its line has no end
    assert [row["step"] for row in rows(path)] == [0, 1, 2]


@pytest.mark.parametrize("line", ["[]", "{}", '{"step": "a"}', '{"step": 1', "{"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    before = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    (tmp_path / "m.jsonl").write_text(before)
    with pytest.raises(
        UserError, match=r"m.jsonl, line 2: expected a JSON object with the key step"
    ):
        RowWriter(tmp_path / "m.jsonl", resume_step=2)
    assert (tmp_path / "m.jsonl").read_text() == before


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal would show."""
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(rich.progress, "get_console", lambda: console)
    return console.file


@pytest.mark.parametrize("place", ["capsys", "terminal"])
def test_tracker_writes_the_three_files(tmp_path, place, request):
    request.getfixturevalue(place)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(
        jnp.int32(2), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    metrics = {
        "spread": spread,
        "loss": jnp.float32(0.1),
        "half": jnp.bfloat16(0.5),
        "flag": np.bool_(True),
        "x": 0.25,
    }
    with open_run(tmp_path) as run, tracking(run, total=2) as tracker:
        returned = tracker.log(1, metrics | {"bad": jnp.float32(jnp.nan)})
        tracker.timing(1, {"rollout": 0.5})
        tracker.samples(
            1,
            [
                {"prompt": "a", "score": 1.5},
                {"prompt": "b", "score": -math.inf, "deep": [math.inf]},
            ],
        )
        tracker.sync()
        loss = float(np.float32(0.1))
        expected = {
            "step": 1,
            "spread": 2,
            "loss": loss,
            "half": 0.5,
            "flag": True,
            "x": 0.25,
            "bad": "NaN",
        }
        assert rows(run.metrics) == [expected]
        assert returned["loss"] == loss
        assert math.isnan(returned["bad"])
        assert rows(run.timing) == [{"step": 1, "rollout": 0.5}]
        assert rows(run.samples) == [
            {"step": 1, "prompt": "a", "score": 1.5},
            {"step": 1, "prompt": "b", "score": "-Infinity", "deep": ["Infinity"]},
        ]
        with pytest.raises(ValueError, match=r"metric vector: expected a scalar, got shape \(2,\)"):
            tracker.log(2, {"vector": jnp.ones(2)})


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    with open_run(tmp_path) as run, tracking(run, total=25, show=["kl", "score"]) as tracker:
        for step in range(1, 26):
            tracker.log(step, {"loss": 0.0, "score": step / 7, "kl": 2.0})
        tracker.alert(25, "[bold]done[/bold] :smile: " + "x" * 200)
    scores = {1: 0.1429, 10: 1.429, 20: 2.857, 25: 3.571}
    lines = [f"ppo {step}/25  kl 2  score {score}" for step, score in scores.items()]
    expected = [*lines, "alert at step 25: [bold]done[/bold] :smile: " + "x" * 200]
    assert capsys.readouterr().out.splitlines() == expected


def test_progress_on_a_terminal(tmp_path, terminal):
    """The first two of the metrics, with the last value that each one had."""
    show = ["objective/score", "absent", "[x]", "third"]
    with (
        open_run(tmp_path) as run,
        tracking(run, total=4, show=show, resume_step=1) as tracker,
    ):
        tracker.log(2, {"objective/score": 1.25, "[x]": 1.0, "third": 7.0})
        tracker.log(3, {"[x]": 2.0})
        tracker.alert(3, "a message")
    said = terminal.getvalue()
    assert all(text in said for text in ("3/4", "ppo  objective/score 1.25  [x] 2", "a message"))
    assert "third" not in said


@pytest.mark.parametrize("is_terminal", [False, True])
def test_each_validation_has_a_line(tmp_path, capsys, is_terminal, request, clock):
    """With the time that is left where no bar says it."""
    out = request.getfixturevalue("terminal").getvalue if is_terminal else None
    show = ["score", "validation/judge"]
    pulse = Pulse(clock)
    with open_run(tmp_path) as run, tracking(run, total=9, show=show, pulse=pulse) as tracker:
        tracker.log(1, {"score": 1.0})
        tracker.log(2, {"score": 1.0, "validation/other": 1.0})
        clock.now += 20.0
        tracker.log(3, {"score": 1.0, "validation/judge": 0.0})
    said = out() if out else capsys.readouterr().out
    assert "ppo 3/9  score 1  validation/judge 0" in said
    assert ("left" in said) != is_terminal
    assert "ppo 2/9" not in said
    assert ("ppo 1/9" in said) != is_terminal


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("total", "seconds", "expected"),
    [
        # A line for each slow step, with pace and remainder.
        (
            20,
            [25.0] * 4,
            [
                "ppo 1/20",
                "ppo 2/20    25 s a step, about 8 min left",
                "ppo 3/20    25 s a step, about 7 min left",
                "ppo 4/20    25 s a step, about 7 min left",
            ],
        ),
        # Every tenth line of fast steps; the pace is that of the last ten.
        (
            100,
            [0.1] * 20 + [1.2] * 20,
            [
                *(f"ppo {step}/100" for step in (1, 10, 20, 30)),
                "ppo 40/100    1.2 s a step, about 72 s left",
            ],
        ),
        # A line after fifteen seconds, between tenth steps.
        (100, [4.0] * 7, ["ppo 1/100", "ppo 5/100    4 s a step, about 6 min left"]),
    ],
)
def test_lines_by_time_and_number(tmp_path, capsys, clock, total, seconds, expected):
    with open_run(tmp_path) as run, tracking(run, total=total, pulse=Pulse(clock)) as tracker:
        for step, duration_of_step in enumerate(seconds, 1):
            clock.now += duration_of_step
            tracker.log(step, {})
    assert lines_of(capsys) == expected


def test_a_step_that_takes_long_is_spoken_of_meanwhile(tmp_path, capsys, clock):
    pulse = Pulse(clock)
    with open_run(tmp_path) as run, tracking(run, total=3, pulse=pulse) as tracker:
        tracker.log(0, {})
        for seconds in (14.0, 1.0, 14.0, 1.0):
            clock.now += seconds
            pulse.tick()
        tracker.log(1, {})
        for seconds in (16.0, 15.0):
            clock.now += seconds
            pulse.tick()
        tracker.log(3, {})
        clock.now += 15.0
        pulse.tick()
    clock.now += 100.0
    pulse.tick()  # the run is over
    assert lines_of(capsys) == [
        "ppo 0/3",
        "ppo step 1 of 3 runs for 15 s, the first one compiles its programs",
        "ppo step 1 of 3 runs for 30 s, the first one compiles its programs",
        "ppo step 2 of 3 runs for 16 s  30 s a step, about 44 s left",
        "ppo step 2 of 3 runs for 31 s  30 s a step, about 30 s left",
        "ppo 3/3",
        "ppo: all 3 steps done, finishing for 15 s",
    ]


def test_a_phase_is_named_after_ten_seconds_and_then_ever_more_seldom(capsys, clock):
    """And not after its end, also that by an error."""
    pulse = Pulse(clock)
    for _ in range(2):
        with contextlib.suppress(ValueError), pulse.during("sampling 8 answers"):
            for _ in range(50):
                clock.now += 1.0
                pulse.tick()
            raise ValueError("failed")
        clock.now += 100.0
        pulse.tick()
    assert lines_of(capsys) == [f"sampling 8 answers: {s} s so far" for s in (10, 20, 40)] * 2


def test_a_phase_of_a_run_is_named_in_place_of_its_step(tmp_path, capsys, clock):
    """At most ``SILENCE`` seconds pass without a line, also then."""
    pulse = Pulse(clock)
    with open_run(tmp_path) as run, tracking(run, total=3, pulse=pulse):
        with pulse.during("validation"):
            for _ in range(70):
                clock.now += 1.0
                pulse.tick()
        clock.now += 15.0
        pulse.tick()
    *of_phase, of_step = lines_of(capsys)
    assert of_phase == [f"validation: {s} s so far" for s in (10, 20, 35, 50, 65)]
    assert of_step.startswith("ppo step 1 of 3 runs")


def test_a_terminal_has_no_lines_by_time(tmp_path, capsys, clock, terminal):
    pulse = Pulse(clock)
    with open_run(tmp_path) as run, tracking(run, total=3, pulse=pulse) as tracker:
        tracker.log(0, {})
        clock.now += 20.0
        pulse.tick()
    assert lines_of(capsys) == []


def test_slow_compiles_are_named_while_they_run_and_at_their_end(capsys, clock):
    pulse = Pulse(clock)
    for name, seconds in (("jit(learn)", 17.0), ("jit(small)", 1.0)):
        pulse.compile_began(COMPILE_EVENT, 0.0, fun_name=name)
        pulse.compile_began("another", 0.0, fun_name="other")
        for _ in range(2):
            clock.now += seconds / 2
            pulse.tick()
        pulse.compile_ended("another", 99.0, fun_name="other")
        pulse.compile_ended(COMPILE_EVENT, seconds, fun_name=name)
    clock.now += 20.0
    pulse.tick()
    assert lines_of(capsys) == [
        "compiling the program learn",
        "compiled the program learn in 17 s",
    ]


def test_the_pulse_hears_what_jax_compiles_and_its_thread_ends(capsys, monkeypatch):
    monkeypatch.setattr("rlhf_jax.runs.log.SLOW_COMPILE", 0.0)

    def heard(x):
        return x + time.time()  # no cache of compiled programs has it

    def unheard(x):
        return x - time.time()

    with Pulse() as pulse:
        pulse.status = lambda: "still here"
        jax.jit(heard)(1.0)
        pulse._last_line -= 100.0
        until = time.monotonic() + 120.0
        while time.monotonic() < until and pulse._last_line < time.monotonic() - 50.0:
            time.sleep(0.05)
    jax.jit(unheard)(1.0)
    lines = lines_of(capsys)
    assert sum(line.startswith("compiled the program heard in ") for line in lines) == 1
    assert not any("unheard" in line for line in lines)
    assert "still here" in lines
    assert not pulse._thread.is_alive()


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (89, "89 s"), (200, "3 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_phases_that_may_take_long_are_named(tmp_path, monkeypatch, capsys, clock):
    """What they do takes eleven seconds of a clock."""
    pulses = []
    during = Pulse.during

    def work(*arguments):
        pulses[-1].clock = lambda: clock.now + 11.0
        pulses[-1].tick()
        return Validation({}) if not arguments or arguments == (None,) else ["fits", "ppo"]

    def heard(pulse, phase):
        pulse.clock = clock
        pulses.append(pulse)
        return during(pulse, phase)

    monkeypatch.setattr(Pulse, "during", heard)
    progress = SimpleNamespace(
        validate=work,
        state=None,
        done=4,
        tracker=Mock(),
        patience=SimpleNamespace(used=False),
        run=SimpleNamespace(config=SimpleNamespace(keep_best=None)),
        _pulse=Pulse(clock),
    )
    Progress._validated(progress)

    monkeypatch.setattr(normalization, "base_samples", lambda *given: (work(*given), Mock())[1])
    monkeypatch.setattr(normalization.scoring, "answer_scorer", lambda *given, jit: None)
    job = SimpleNamespace(
        source=SimpleNamespace(model="m"), run=SimpleNamespace(layout=SimpleNamespace(jit=None))
    )
    normalization.normalize_members(job, Mock(), {}, 256, reads_end=False)
    assert lines_of(capsys) == [
        "validation after step 4: 11 s so far",
        "sampling 256 answers of the base policy to normalise scores: 11 s so far",
    ]

    monkeypatch.setattr(plan, "read_data", lambda config, stage: (config, 16))
    monkeypatch.setattr(plan, "choose_remat", lambda config, *given: config)
    monkeypatch.setattr(plan, "report", work)
    plan.main(["ppo", "--config", "tiny", "--devices", "4"])
    printed = capsys.readouterr()
    assert printed.out.startswith("fits\nppo\n")  # what others read
    assert "programs of the stage: 11 s so far" in printed.err
