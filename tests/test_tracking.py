"""Rows that read back equal, no row twice and none missing after a kill, and a console that works
anywhere.
"""

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import rich.progress

from rlhf_jax.errors import UserError
from rlhf_jax.runs.folder import open_run
from rlhf_jax.runs.log import RowWriter, Tracker
from rlhf_jax.runs.trackers import Services


def tracking(run, total, show=(), resume_step=None) -> Tracker:
    return Tracker(
        run, total=total, resume_step=resume_step, label="ppo", show=show, services=Services({}, {})
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
    writer, row = (
        RowWriter(tmp_path / "m.jsonl"),
        {"loss": 0.1 + 0.2, "n": 3, "ok": True, "text": "ä\n", "none": None},
    )
    writer.write(1, row)
    assert rows(tmp_path / "m.jsonl") == [
        {"step": 1} | row
    ]  # before sync or close: a killed process loses no row
    with pytest.raises(ValueError, match="key step of its own"):
        writer.write(1, {"step": 2})


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"step": 8, "x', b'{"step": 8}', b"\x00\x00\x00", b'{"step": 8, "t": "\xc3', b"8"],
)
def test_resume_leaves_no_row_twice_and_none_out(tmp_path, torn):
    path, straight = tmp_path / "m.jsonl", tmp_path / "straight.jsonl"
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
    with (
        open_run(tmp_path) as run,
        tracking(run, total=4, show=["objective/score", "[x]"], resume_step=2) as tracker,
    ):
        tracker.log(3, {"objective/score": 1.25, "[x]": 2.0})
        tracker.alert(3, "a message")
    assert all(
        text in terminal.getvalue()
        for text in ("ppo", "3/4", "objective/score 1.25  [x] 2", "a message")
    )
