"""Alerts: what a rule says, when it is true, and what a run does about it."""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import Killed, run_loop

from rlhf_jax import cli
from rlhf_jax.config import Compute, RunConfig, parse, to_yaml
from rlhf_jax.errors import AlertStop, TrainingFault, UserError
from rlhf_jax.report import figures, plots
from rlhf_jax.report import page as report
from rlhf_jax.report import records as run_records
from rlhf_jax.runs import alerts, checkpoint


def steps(rules, columns):
    """The steps at which rules raise an alert in a history; row k is that of step k, None leaves a
    metric out.
    """
    history = [
        {"step": step}
        | {name: value for name, value in zip(columns, row, strict=True) if value is not None}
        for step, row in enumerate(zip(*columns.values(), strict=True))
    ]
    return [alert.step for alert in alerts.check(alerts.parse(["none", *rules]), history)]


# --- Rules
#
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("x > 2", [1, 2, 3, 4, 1, 3], [2, 5]),  # once each time that it becomes true
        ("x<2", [2, 1], [1]),
        ("x > -1e-3", [-1, 0], [1]),
        ("x > 2 for 2", [3, 1, 3, 3, 3, 1, 3, 3], [3, 7]),
        ("x > 2 for 2", [3, None, math.nan, 3], [3]),  # rows that record no number do not count
        ("x > 2", [math.inf, -math.inf], [0]),
        ("mean 2 of x > 2", [9, 0, 3, 2], [1, 3]),  # 4.5, 1.5, 2.5; nothing in the first row
        ("x > 2x first", [2, 4, 5], [2]),
        ("x < 2x first", [2, 3], [1]),  # nothing to compare the first row with
        ("x > 2x first", [0, 4, 5], []),  # a multiple of 0 is no threshold
        ("mean 2 of x < 1x first", [1, 3, 1, 2], [3]),  # the first mean is 2; then 2, 1.5
    ],
)
def test_a_rule_about_one_metric(rule, values, expected):
    assert steps([rule], {"x": values}) == expected


RAMP = [*np.linspace(0, 1, 41)]  # without noise
NOISE = [(-1.0) ** step for step in range(40)]  # without a trend; sd 1.63
WAVES = [*([1.0] * 4 + [-1.0] * 4) * 5]  # whose means of four lie as far apart
VALUED = ("value/loss", "value/return_variance")
JUDGED = ("validation/judge", "validation/score")
MOVED = ("validation/moved", "validation/planned_steps")
LEARNED = ("objective/score", "objective/kl")
RAISED = [*NOISE[:10], *(value + 0.95 for value in NOISE[:9])]


THRESHOLDS = [
    ("non-finite update", ["nonfinite"], [[]], [0], [1], 1),
    ("KL explosion", ["objective/kl", "response/length"], [[], []], [20, 10], [20.1, 10], 3),
    (
        "entropy collapse",
        ["objective/entropy", "response/length"],
        [[20], [10]],
        [0.51, 5],
        [0.49, 5],
        5,
    ),
    (
        "reward collapse",
        ["objective/score"],
        [RAMP],
        [0.51],
        [0.49],
        5,
    ),  # means from 0.05 to 0.95
    # 5 + 30 / 45 standard errors of sqrt(2) 1.633 / sqrt(5) below the highest mean, 0.2.
    ("reward collapse", ["objective/score"], [NOISE], [-5.6], [-5.7], 5),
    ("value-loss explosion", VALUED, [[3, 1, 2, 1, 3], [3] * 5], [19.9, 1], [20.1, 1], 5),
    ("value-loss explosion", VALUED, [[0, 0, 1, 0, 0], [0, 6, 0, 0, 0]], [29.9, 1], [30.1, 1], 5),
    ("degenerate text", ["response/repetition"], [[0.1]], [0.39], [0.41], 3),
    ("sampler gap", ["policy/sampler_gap"], [[]], [0.0199], [0.0201], 3),
    ("nothing to learn", ["grad_norm"], [[]], [1.1e-8], [0.9e-8], 5),
    # The limit of the KL is 0.002 in row 20.
    ("nothing learned", LEARNED, [[1.0] * 19, [0.0] * 19], [1.0, 0.0101], [1.0, 0.0099], 1),
    ("nothing learned", LEARNED, [[1.0] * 19, [0.0] * 19], [1.0, -0.0101], [1.0, -0.0099], 1),
    # The last ten rows lie .95 or .93 higher; two standard errors are .943 or .953.
    ("nothing learned", LEARNED, [RAISED, [0.0] * 19], [-0.05, 0.0], [-0.25, 0.0], 1),
    ("nothing moved", MOVED, [[0.0], [2.0]], [0.051, 2], [0.049, 2], 1),
    ("nothing moved", MOVED, [[0.0] * 3, [8.0] * 3], [0, 8], [0, 6], 1),  # in step 3 of 8, of 6
    ("responses collapse", ["response/most_common"], [[]], [0.9], [0.91], 5),
    # Means of four validations: the highest is 0.9625 of a gain of 0.925, of which 5% may be lost.
    ("reward hacking", JUDGED, [RAMP, RAMP], [0.9165, 2], [0.916, 2], 4),
    # 5 + 30 / 44 standard errors of sqrt(2) 1.633 / 2 below the highest mean, 0.
    ("reward hacking", JUDGED, [NOISE, [0] * 40], [-6.5, 1], [-6.6, 1], 4),
    # Means of four that go up and down alike have a standard error of 1.028, rows one of 0.28.
    ("reward hacking", JUDGED, [WAVES, [0] * 40], [-7.2, 1], [-7.3, 1], 4),
    # The score's mean of four at the judge's best, before the last four rows, is 0.8875 too.
    ("reward hacking", JUDGED, [RAMP, RAMP], [0, 0.62], [0, 0.63], 1),
    ("reward hacking", JUDGED, [RAMP, [1.0] * 41], [0, 1.0], [0, 1.01], 1),
    # The last nine validations are the first on which the rule has a say.
    ("reward hacking", JUDGED, [[0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [0] * 6], [0.1, 0], [0, 1], 3),
]


@pytest.mark.parametrize("unit", [1e-4, 1.0, 3600.0])
def test_a_value_loss_explodes_in_any_unit(unit):
    """A hundred times the loss is seen where rewards range over a hundredth and over sixty."""
    [rule] = alerts.parse(["none", "value-loss explosion"])
    loss = [0.5] * 10 + [0.2] * 10 + [20.0] * 5
    rows = [
        {"step": n, "value/loss": unit * x, "value/return_variance": unit}
        for n, x in enumerate(loss)
    ]
    [alert] = alerts.check([rule], rows)
    assert alert.step == 21


def test_a_run_whose_gradient_is_not_0_is_not_told_that_it_learns_nothing():
    """Whatever its groups say, and whether it has any."""
    [rule] = alerts.parse(["none", "nothing to learn"])
    rows = [{"step": n, "reward/equal_share": 1.0, "grad_norm": 0.3} for n in range(9)]
    assert not alerts.check([rule], rows)
    [alert] = alerts.check([rule], [{"step": n, "grad_norm": 0.0} for n in range(9)])
    assert alert.step == 4


@pytest.mark.parametrize(("name", "metrics", "before", "silent", "raising", "rows"), THRESHOLDS)
def test_the_threshold_of_a_default_rule(name, metrics, before, silent, raising, rows):
    """Just below it there is no alert; just above it there is one, in the last row that the rule
    asks for.
    """

    def raised_with(last, count):
        columns = [earlier + [value] * count for earlier, value in zip(before, last, strict=True)]
        return steps([name], dict(zip(metrics, columns, strict=True)))

    assert raised_with(silent, rows) == raised_with(raising, rows - 1) == []
    assert raised_with(raising, rows) == [len(before[0]) + rows - 1]


def test_the_alert_for_a_policy_that_stays_names_the_learning_rate():
    rows = [{"step": step, "objective/score": 0.0625, "objective/kl": 0.001} for step in range(20)]
    [alert] = alerts.check(alerts.parse(["none", "nothing learned"]), rows)
    expected = (
        "mean 5 of objective/kl is 0.001 < 0.002, objective/score was 0.0625 in the first 10 "
    )
    expected += "rows and is 0.0625 in the last: raise rl.optimizer.learning_rate"
    assert (alert.step, alert.message) == (19, expected)


def test_a_policy_that_will_be_far_from_its_reference_by_row_100_has_not_stayed():
    """0.05 (89 / 100)^2 is 0.0396 and 0.05 (90 / 100)^2 0.0405."""
    for kl, expected in ((0.04, [89]), (0.051, [])):
        history = {"objective/score": [1.0] * 300, "objective/kl": [kl] * 300}
        assert steps(["nothing learned"], history) == expected


def judged_runs(level, num, sd=0.1):
    """Histories of 30 validations [num, 2, 30] of a judge, and of a score that goes on rising."""
    t = np.linspace(0, 1, 30)
    noise = np.random.default_rng(0).normal(scale=sd, size=(num, 2, 30))
    return np.stack([level(t), t]) + noise


@pytest.mark.parametrize(
    ("level", "lowest", "highest"),
    [
        (lambda t: 1 - np.exp(-t / 0.1), 0.0, 0.1),  # the judge saturates long before the score
        (np.zeros_like, 0.0, 0.1),
        (lambda t: np.where(t < 0.5, np.sqrt(t), -0.5), 0.8, 1.0),  # it turns
    ],
)
def test_how_often_a_judge_raises_the_alert(level, lowest, highest):
    runs = judged_runs(level, 200)
    raised = [steps(["reward hacking"], dict(zip(JUDGED, run, strict=True))) for run in runs]
    assert lowest <= np.mean([bool(alert) for alert in raised]) <= highest


def test_a_fall_by_hand():
    """Means of two: 1, 3, 5, 4.5, 2, .5; the last is none of those that it is compared with."""
    values = np.array([0.0, 2.0, 4.0, 6.0, 3.0, 1.0, 0.0])
    mean, limit, best = alerts.fall(values, size=2, part=0.1)
    assert (mean, best) == (0.5, 2)
    # Second differences of the five rows before: 0, 0, -5.
    error = np.sqrt((25 / 3) / 6) / np.sqrt(2)
    assert limit == pytest.approx(5 - (5 + 30 / 7) * np.sqrt(2) * error)
    _, limit, _ = alerts.fall(np.array([0.0, 1, 2, 3, 4, 5, 6, 6, 6]), size=2, part=0.9)
    assert limit == pytest.approx(5.5 - 0.9 * 5)  # no noise: the part of the gain
    assert alerts.fall(np.arange(9.0), size=2, part=0.1)[2] == 5  # nor do the last rows count


def test_one_wrong_answer_of_a_task_that_was_solved_from_the_start_is_no_collapse():
    rows = [{"step": step, "objective/score": 1.0} for step in range(60)]
    rows[50]["objective/score"] = 31 / 32
    assert alerts.check(alerts.parse([]), rows) == []
    for row in rows[51:]:
        row["objective/score"] = 0.0
    assert {alert.name for alert in alerts.check(alerts.parse([]), rows)} == {"reward collapse"}


def test_rows_to_come_change_no_alert():
    """So a run that is resumed anywhere raises the same ones."""
    rng = np.random.default_rng(0)
    read = {name for rule in alerts.DEFAULTS.values() for name in rule.metrics}
    names = sorted(read - {"step"})
    level = np.linspace(0, 1, 60) * np.linspace(1, -1, 60)
    rows = [
        {"step": step} | {name: level[step] + 0.01 * rng.normal() for name in names}
        for step in range(60)
    ]
    whole = alerts.check(alerts.parse([]), rows)
    assert "reward collapse" in {alert.name for alert in whole}
    for step in (15, 31, 47):
        so_far = alerts.check(alerts.parse([]), rows[:step])
        assert so_far == [alert for alert in whole if alert.step < step]


def test_default_rules_are_on_until_none_and_can_stop():
    assert [rule.name for rule in alerts.parse(["x > 1"])] == [*alerts.DEFAULTS, "x > 1"]
    stopping = [(rule.name, rule.action) for rule in alerts.parse(["reward hacking: stop"])]
    expected = dict.fromkeys(alerts.DEFAULTS, "log") | {"reward hacking": "stop"}
    assert sorted(stopping) == sorted(expected.items())


def test_names_may_hold_colons():
    rules = alerts.parse(
        ["none", " mean 3 of reward/count:e > 0.5x first for 2 : stop ", "reward/count:e > 3"]
    )
    assert [(rule.rows, rule.action) for rule in rules] == [(2, "stop"), (1, "log")]
    assert {rule.metrics for rule in rules} == {("reward/count:e",)}


def test_the_message_has_the_numbers():
    rule = "mean 2 of x > 2x first: stop"
    history = [{"step": step, "x": x} for step, x in ((3, 1.0), (5, 1.0), (7, 4.0))]
    (alert,) = alerts.check(alerts.parse(["none", rule]), history)
    assert alert == alerts.Alert(
        7, "mean 2 of x > 2x first", rule, "stop", "mean 2 of x is 2.5 > 2"
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        *(
            (rule, "is no rule: expected METRIC < NUMBER")
            for rule in ("", "objective/kl", "objective/kl >= 5")
        ),
        *(
            (f"objective/kl > {end}", "is no rule")
            for end in ("high", "max - 3 sd", "5 for 0", "5 and x > 1")
        ),
        ("mean 0 of objective/kl > 5", "is no rule"),
        ("objective/kl > 5: halt", "log or stop, got 'halt'"),
    ],
)
def test_what_is_no_rule_is_quoted(rule, message):
    with pytest.raises(UserError, match=message) as error:
        alerts.parse(["loss > 3", rule])
    assert repr(rule) in str(error.value)


def test_a_metric_that_is_never_recorded():
    def check(*entries):
        return alerts.check_metrics(
            alerts.parse(entries), {"objective/kl", "objective/score", "loss", "validation/score"}
        )

    assert check("objective/kl > 5") == []
    for rule, near in (
        ("objective/kll > 5", "objective/kl"),
        ("los > 5", "loss"),
        ("validaton/a > 5", "validation/"),
    ):
        with pytest.raises(UserError, match=f"'{rule}' never .* {near}"):
            check(rule)
    # One YAML serves all stages of a pipeline.
    assert len(check("sft/loss > 5", "validation/judge < 1", "reward hacking: stop")) == 3


def test_rules_on_the_command_line_and_in_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    rules = ("objective/kl > 50 for 3: stop", "none")
    assert parse(RunConfig, ["--alerts", *rules], sections=("lora.rank",)).alerts == rules
    file.write_text(to_yaml(RunConfig(alerts=rules)), "utf-8")
    assert parse(RunConfig, ["--config", str(file)]).alerts == rules
    file.write_text('seed: 1\nalerts: ["objective/kl = 50"]\n', "utf-8")
    with pytest.raises(UserError, match=r"run\.yaml, line 2: alerts: 'objective/kl = 50'"):
        parse(RunConfig, ["--config", str(file)])


# --- In a run: step k has the loss LOSSES[k - 1]
# ---------------------------------------------------------------------

LOSSES = [1, 1, 1, 9, 9, 1, 9, 1, 1]
RULE = "loss > 5"
MEANS = "mean 3 of loss > 1x first for 2"


def run(config, **options):
    return run_loop(config, num_steps=len(LOSSES), **{"losses": LOSSES} | options)[0]


@pytest.fixture
def config(tmp_path):
    return RunConfig(output_dir=str(tmp_path / "run"), checkpoint_interval=9, alerts=(RULE,))


def test_an_alert_on_a_part_of_a_reward_shows_an_example(config):
    shares = [0.0, 0.6, 0.7, 0.8, 0.2]
    rows = [{"step": step, "reward/math/repeats_prompt": x} for step, x in enumerate(shares)]
    rows = [row | {"reward/other/repeats_prompt": 0.1} for row in rows]
    (alert,) = alerts.check(alerts.parse(["none", "prompt repeated"]), rows)
    assert (alert.step, alert.message) == (3, "reward/repeats_prompt is 0.8 > 0.5")
    rows = [row | {"reward/repeats_prompt": 0.0} for row in rows]
    assert alerts.check(alerts.parse(["none", "prompt repeated"]), rows) == []
    metrics = {"reward/math/repeats_prompt": 0.9}
    config = dataclasses.replace(config, alerts=("none", "prompt repeated"))
    assert run(config, metrics=metrics, examples=lambda: {"repeats_prompt": "3 + 4 ="}) == 9
    [row] = run_records.read_rows(Path(config.output_dir) / "alerts.jsonl")
    assert (row["step"], row["message"]) == (
        3,
        "reward/repeats_prompt is 0.9 > 0.5, as in '3 + 4 ='",
    )


def raised(config):
    rows = run_records.read_rows(Path(config.output_dir) / "alerts.jsonl")
    return [(row["step"], row["rule"]) for row in rows]


def test_a_killed_run_alerts_alike(config, tmp_path, capsys):
    config = dataclasses.replace(config, alerts=(RULE, MEANS), checkpoint_interval=3)
    straight = dataclasses.replace(config, output_dir=str(tmp_path / "straight"))
    assert run(straight) == 9
    assert raised(straight) == [(4, RULE), (5, MEANS), (7, RULE)]
    assert f"alert at step 4: {RULE}: loss is 9 > 5" in capsys.readouterr().out
    for step, resume in ((5, False), (8, True)):  # with the rule true, and with it true again
        with pytest.raises(Killed):
            run(dataclasses.replace(config, resume=resume), die_at=step)
    assert run(dataclasses.replace(config, resume=True)) == 9
    for name in ("alerts.jsonl", "metrics.jsonl"):
        assert (Path(config.output_dir) / name).read_bytes() == (
            Path(straight.output_dir) / name
        ).read_bytes()


def test_a_gap_that_the_dtype_explains_raises_nothing(config):
    gap = {"policy/sampler_gap": 0.49}
    history = [{"step": step} | gap for step in range(3)]
    for dtype, expected in {"float32": ["sampler gap"], "float16": []}.items():
        found = alerts.check(alerts.parse((), dtype), history)
        assert [alert.name for alert in found] == expected
    run(dataclasses.replace(config, compute=Compute(dtype="bfloat16"), alerts=()), metrics=gap)
    assert raised(config) == []


def test_a_stop_saves_and_holds_until_the_rule_is_changed(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--output-dir", config.output_dir])
    rule = f"{RULE} for 2: stop"
    stopping = dataclasses.replace(config, alerts=(rule,))
    resumed = dataclasses.replace(stopping, resume=True)
    said = rf"(?s)step 5 of 9.*{rule}.*--resume --allow-changed alerts"
    with pytest.raises(AlertStop, match=said):
        run(stopping)
    assert checkpoint.steps(Path(config.output_dir) / "checkpoints")[-1] == 5
    # Whoever starts it again without a look is stopped again.
    with pytest.raises(SystemExit) as ended:
        cli.run_script(lambda: run(resumed))
    assert ended.value.code == 3
    assert "stopped by an alert" in capsys.readouterr().err
    assert checkpoint.steps(Path(config.output_dir) / "checkpoints")[-1] == 5
    assert raised(config) == [(5, rule)]
    relaxed = dataclasses.replace(resumed, alerts=("loss > 9: stop",), allow_changed=("alerts",))
    assert run(relaxed) == 9


def test_a_rule_of_a_metric_that_the_stage_lacks_ends_the_run_at_once(config, capsys):
    with pytest.raises(UserError, match=r"'los > 5' never .* loss"):
        run(dataclasses.replace(config, alerts=("los > 5",)))
    assert run(dataclasses.replace(config, alerts=("objective/kl > 5",), overwrite=True)) == 9
    assert (
        "'objective/kl > 5' never comes true: this stage does not record objective/kl"
        in capsys.readouterr().out
    )


def test_a_non_finite_update_leaves_its_alert(config):
    with pytest.raises(TrainingFault, match="not finite at step 2"):
        run(config, losses=[1, math.nan])
    assert raised(config) == [(2, "non-finite update")]


# --- On the page
#
# --------------------------------------------------------------------------------------------------


def test_the_page_lists_alerts_and_marks_them(config, monkeypatch):
    monkeypatch.setattr(figures, "element", lambda plot, salt: "")  # drawing takes long
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
