"""Alerts: what a rule says, when it is true, and what a run does about it."""

import dataclasses
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import cli
from rlhf_jax.config import RunConfig, parse, to_yaml
from rlhf_jax.errors import AlertStop, TrainingFault, UserError
from rlhf_jax.report import page as report
from rlhf_jax.report import plots
from rlhf_jax.report import records as run_records
from rlhf_jax.runs import alerts, checkpoint
from rlhf_jax.training import loop
from rlhf_jax.training.stage import open_stage


def steps(rule, **columns):
    """The steps at which the rule raises an alert in a history; row k is that of step k, None leaves a metric out."""
    history = [
        {"step": step} | {name: value for name, value in zip(columns, row, strict=True) if value is not None}
        for step, row in enumerate(zip(*columns.values(), strict=True))
    ]
    return [alert.step for alert in alerts.check(alerts.parse(["none", rule]), history)]


# --- Rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("x > 2", [1, 2, 3, 4, 1, 3], [2, 5]),  # once each time that it becomes true
        ("x<2", [2, 1], [1]),
        ("x > -1e-3", [-1, 0], [1]),
        ("x > 2 for 2", [3, 1, 3, 3, 3, 1, 3, 3], [3, 7]),
        ("x > 2 for 2", [3, None, 3, None], [2]),  # rows that do not record it do not count
        ("mean 2 of x > 2", [9, 0, 3, 2], [1, 3]),  # 4.5, 1.5, 2.5; nothing in the first row
        ("x > 2x first", [2, 4, 5], [2]),
        ("x > 2x first", [0, 4, 5], []),
        ("x < 0.5x max", [1, 4, 2, 1.9], [3]),
        ("x > min + 1", [3, 2, 3, 3.5], [3]),
        ("x < max - 0.5 gain", [1, 5, 3, 2.9], [3]),  # max 5, first 1: below 3
        ("x > max", [1, 2, 2, 3], [1, 3]),  # of the rows before
        ("mean 2 of x < first", [1, 3, 1, 2], [3]),  # the first mean is 2; then 2, 1.5
        ("x is not finite", [1, math.nan, math.inf, 1, -math.inf], [1, 4]),
        ("x > 2", [math.nan, 3], [1]),
        ("x > 2x max", [1, math.inf, 1.5, 3.5], [1, 3]),  # what is not finite is no reference
        # Second differences of 0 1 0 1 are -2 and 2: sd = sqrt(8 / 12) = 0.816, and max - 2 sd is -0.633.
        ("x < max - 2 sd", [0, 1, 0, 1, -0.63], []),
        ("x < max - 2 sd", [0, 1, 0, 1, -0.64], [4]),
        ("x < max - 2 sd", [0, 1, math.nan, 0, 1, -0.64], [5]),
        ("x < max - 1 sd", [0, 1, 2, 3, 2.9], [4]),  # a straight line has no noise
        ("x < max - 1 sd", [5, 4, 3], []),  # nobody knows the noise before there are three rows
    ],
)
def test_a_rule_about_one_metric(rule, values, expected):
    assert steps(rule, x=values) == expected


def test_a_rule_about_several_metrics():
    assert steps("x / y > 2", x=[1, 5, 6], y=[1, 2, 4]) == [1]
    assert steps("x / y > 2", x=[1], y=[0]) == []  # no number is above 2
    assert steps("x > 1 and y < 1", x=[2, 0, 2], y=[1, 0, 0]) == [2]
    # Asked where all are recorded; what a mean and a maximum are of is seen in the other rows too.
    assert steps("x > 1 and y < 0.5x max", x=[2, None, 2], y=[1, 8, 3]) == [2]
    assert steps("mean 2 of x > 1 and y > 0", x=[3, 0, 0], y=[None, None, 1]) == []


def test_what_a_metric_was_when_another_was_at_its_best():
    assert steps("x > peak of y + 1", x=[1, 2, 3.5, 2.5, 3.2], y=[1, 3, 2, 3, 2]) == [2, 4]  # y's is 3, where x is 2
    assert steps("x > peak of y", x=[1, 2], y=[None, None]) == []


def test_the_message_has_the_numbers():
    (alert,) = alerts.check(
        alerts.parse(["none", "x / y > 2x first and x is not finite: stop"]),
        [{"step": 3, "x": 1.0, "y": 4.0}, {"step": 7, "x": math.inf, "y": 2.0}],
    )
    assert alert == alerts.Alert(
        7, *["x / y > 2x first and x is not finite: stop"] * 2, "stop", "x / y is inf > 0.5, x is inf"
    )


VALUES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0, math.nan, math.inf]), max_size=30)


@settings(deadline=None, derandomize=True)
@given(VALUES, st.integers(0, 30))
def test_a_history_in_two_parts_gives_the_same_alerts(values, cut):
    rules = alerts.parse(
        ["none", "x > 1", "mean 3 of x > first for 2", "x < max - 0.5 gain", "x > min + 1 sd", "x is not finite"]
    )
    history = [{"step": step, "x": value} for step, value in enumerate(values)]
    watches, found = alerts.replay(rules, history[:cut])
    for row in history[cut:]:
        watches, raised = alerts.observe(watches, row)
        found += raised
    assert found == alerts.check(rules, history)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("objective/kl", "no condition"),
        ("objective/kl >= 5", "'= 5' is no threshold"),
        ("objective/kl > high", "'high' is no threshold"),
        ("objective/kl > max - 3 sigma", "no threshold"),
        ("objective/kl > 5: halt", "log or stop, got 'halt'"),
        ("objective/kl > 5 for 0", "at least 1 row, got 0"),
        ("mean 0 of objective/kl > 5", "at least 1 row, got 0"),
        ("objective/kl > 5 and", "'5 and' is no threshold"),
        ("", "is no rule"),
    ],
)
def test_what_is_no_rule_is_quoted(rule, message):
    with pytest.raises(UserError, match=message) as error:
        RunConfig(alerts=("loss > 3", rule))
    assert repr(rule) in str(error.value)


def test_names_may_hold_colons_and_the_defaults_are_on():
    (rule,) = alerts.parse(["none", " reward/count:e / response/length > 0.5x max for 2 : stop "])
    assert (rule.metrics, rule.rows, rule.action) == (("reward/count:e", "response/length"), 2, "stop")
    assert [rule.name for rule in alerts.parse(["x > 1"])] == [*alerts.DEFAULTS, "x > 1"]
    assert {rule.action for rule in alerts.parse([])} == {"log"}


def test_a_metric_that_is_never_recorded():
    names = {"objective/kl", "objective/score", "loss", "validation/score"}

    def check(*entries):
        return alerts.check_metrics(alerts.parse(entries), names)

    assert check("objective/kl > 5", "loss / objective/kl > 5") == []
    for rule, near in (
        ("objective/kll > 5", "objective/kl"),
        ("los > 5", "loss"),
        ("validaton/score > 5", "validation/"),
    ):
        with pytest.raises(UserError, match=f"'{rule}' never comes true: .* nearest that it does is {near}"):
            check(rule)
    # One YAML serves all stages of a pipeline.
    assert len(check("sft/loss > 5", "validation/judge < 1 and dpo/loss > 1")) == 3


def test_rules_on_the_command_line_and_in_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text('alerts: ["objective/kl > 50 for 3: stop", none]\n', "utf-8")
    config = parse(RunConfig, ["--config", str(file)])
    assert config.alerts == ("objective/kl > 50 for 3: stop", "none")
    assert parse(RunConfig, ["--alerts", *config.alerts]).alerts == config.alerts
    assert tuple(yaml.safe_load(to_yaml(config))["alerts"]) == config.alerts
    file.write_text('seed: 1\nalerts: ["objective/kl = 50"]\n', "utf-8")
    with pytest.raises(UserError, match=r"run\.yaml, line 2: alerts: 'objective/kl = 50'"):
        parse(RunConfig, ["--config", str(file)])


# --- In a run: a state of one number, whose row of step k has the loss losses[k] ------------------------------------


class Killed(BaseException):
    """Stands for the process's end: nothing catches it."""


LOSSES = [5, 1, 1, 1, 9, 9, 1, 9, 1, 1]
RULE = "loss > 5"


def run(config, *, die_at=None, losses=LOSSES):
    def advance(state, step):
        if step == die_at:
            raise Killed
        loss = jnp.float32(losses[step + 1])
        return {"n": state["n"] + 1}, {"loss": loss, "nonfinite": ~jnp.isfinite(loss)}

    with open_stage(config, "sft", {}) as stage:
        state, _ = loop.train(stage, stage.replicate({"n": jnp.float32(0)}), advance, num_steps=len(losses) - 1)
    return int(state["n"])


@pytest.fixture
def config(tmp_path):
    return RunConfig(output_dir=str(tmp_path / "run"), checkpoint_interval=3, alerts=(RULE,))


def raised(config):
    rows = run_records.read_rows(Path(config.output_dir) / "alerts.jsonl")
    return [(row["step"], row["rule"]) for row in rows]


def test_a_killed_run_alerts_alike(config, tmp_path, capsys):
    straight = dataclasses.replace(config, output_dir=str(tmp_path / "straight"))
    assert run(straight) == 9
    assert raised(straight) == [(4, RULE), (7, RULE)]
    assert f"alert at step 4: {RULE}: loss is 9 > 5" in capsys.readouterr().out
    for step, resume in (
        (5, False),
        (6, True),
        (8, True),
    ):  # killed with the rule true, after it, and with it true again
        with pytest.raises(Killed):
            run(dataclasses.replace(config, resume=resume), die_at=step)
    assert run(dataclasses.replace(config, resume=True)) == 9
    for name in ("alerts.jsonl", "metrics.jsonl"):
        assert (Path(config.output_dir) / name).read_bytes() == (Path(straight.output_dir) / name).read_bytes()


def test_a_stop_saves_and_holds_until_the_rule_is_changed(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--output-dir", config.output_dir])
    rule = f"{RULE} for 2: stop"
    stopping = dataclasses.replace(config, alerts=(rule,))
    resumed = dataclasses.replace(stopping, resume=True)
    for again in (stopping, resumed, resumed):  # whoever starts it again without a look is stopped again
        with pytest.raises(AlertStop, match=rf"after step 5 of 9(.|\n)*{rule}(.|\n)*--resume --allow-changed alerts"):
            run(again)
        assert checkpoint.steps(Path(config.output_dir) / "checkpoints")[-1] == 5
        assert raised(config) == [(5, rule)]
    with pytest.raises(SystemExit) as ended:
        cli.run_script(lambda: run(resumed))
    assert ended.value.code == 3
    assert "stopped by an alert" in capsys.readouterr().err
    relaxed = dataclasses.replace(resumed, alerts=("loss > 9: stop",), allow_changed=("alerts",))
    assert run(relaxed) == 9


def test_a_rule_of_a_metric_that_the_stage_lacks_ends_the_run_at_once(config, capsys):
    with pytest.raises(UserError, match=r"'los > 5' never comes true: .* nearest that it does is loss"):
        run(dataclasses.replace(config, alerts=("los > 5",)))
    other = dataclasses.replace(config, alerts=("objective/kl > 5: stop",), overwrite=True)
    assert run(other) == 9
    assert (
        "'objective/kl > 5: stop' never comes true: this stage does not record objective/kl" in capsys.readouterr().out
    )


def test_a_non_finite_update_leaves_its_alert(config):
    with pytest.raises(TrainingFault, match="not finite at step 2"):
        run(config, losses=[1, 1, math.nan, 1])
    assert raised(config) == [(2, "nonfinite > 0")]


# --- On the page ----------------------------------------------------------------------------------------------------


def test_the_page_lists_alerts_and_marks_them(config):
    run(config)
    records = run_records.find([config.output_dir])
    expected = {"name": RULE, "rule": RULE, "action": "log", "message": "loss is 9 > 5"}
    assert records[0].alerts == [{"step": step, **expected} for step in (4, 7)]
    curves, _ = plots.curves(run_records.groups(records))
    marks = next(plot for plot in curves if plot.title == "loss").series["alert"]
    np.testing.assert_array_equal([marks.x, marks.y], [[4, 7], [9, 9]])
    page = Path(config.output_dir) / "page.html"
    report.write([config.output_dir], page)
    assert "loss is 9 &gt; 5" in page.read_text("utf-8")
