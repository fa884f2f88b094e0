"""The experiment on alerts: shares and their summaries by hand, and populations in short form."""

import json

import alert_rates
import alert_runs
import numpy as np
import pytest
import results
from alert_rates import Family, Sizes

from rlhf_jax.runs import alerts


def history(judge):
    """A judge beside a score that goes on rising."""
    return {"validation/judge": np.array(judge), "validation/score": np.arange(len(judge)) * 1.0}


TURNS = [*np.linspace(0, 1, 20), *[0.0] * 10]


def test_the_first_alert_is_that_of_a_run():
    rng = np.random.default_rng(0)
    equal = rng.binomial(1, 0.8, 200) * 1.0
    noisy = {
        "reward/equal_share": equal,
        "grad_norm": 1.0 - equal,
        **history([*TURNS] * 6 + [0.0] * 20),
    }
    rows = [
        {"step": step} | {name: values[step] for name, values in noisy.items()}
        for step in range(200)
    ]
    for name in ("nothing to learn", "reward hacking"):
        rule = alert_rates.RULES[name]
        expected = alerts.check([rule], rows)[0].step
        assert alert_rates.first_alerts(rule, [noisy, noisy]) == [expected] * 2
    rises = history(np.linspace(0, 1, 40))
    assert alert_rates.first_alerts(alert_rates.RULES["reward hacking"], [rises]) == [None]


def test_alerts_before_the_failure_are_not_counted(monkeypatch):
    monkeypatch.setattr(alert_rates, "LENGTHS", (101,))
    places = [None, 30, 59, 60, 64, 80]
    monkeypatch.setattr(alert_rates, "first_alerts", lambda rule, histories: places)
    family = Family("reward hacking", "turns", lambda rng, t: {}, onset=0.6)
    rows = alert_rates.simulate(family, Sizes(failed=6))
    found = {row["metric"]: row["value"] for row in rows}
    assert {row["variant"] for row in rows} == {"failed reward hacking: turns"}
    assert found["101 rows"] == 0.5
    assert found["101 rows: of"] == 6
    assert found["rows late of 101"] == 4
    assert found["101 rows low"] == pytest.approx(0.1876, abs=1e-4)


def test_families_are_of_the_times_they_are_given():
    families = list(alert_rates.families())
    assert len({family.variant for family in families}) == len(families)
    silent = {"non-finite update", "sampler gap"}  # of which runs alone tell
    assert {family.rule for family in families} >= set(alerts.DEFAULTS) - silent - {"nothing moved"}
    for family in families:
        columns = family.make(np.random.default_rng(0), np.linspace(0, 1, 30))
        for name in alert_rates.RULES[family.rule].metrics:
            assert columns[name].shape == (30,)
            assert np.isfinite(columns[name]).all()


def test_noise_has_the_deviation_and_the_correlation_it_says():
    rngs = [np.random.default_rng(seed) for seed in range(3000)]
    for name, noise in alert_rates.NOISES.items():
        drawn = np.array([noise(rng, 12)[-2:] for rng in rngs])
        assert drawn[:, 1].std() == pytest.approx(1, abs=0.1), name
        expected = {"autocorrelated .4": 0.4, "autocorrelated .6": 0.6}.get(name, 0)
        assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(expected, abs=0.1), name


def test_the_summary_takes_the_worst_honest_family_and_all_failed_ones():
    share = alert_rates.share_rows
    rows = [
        *share("honest reward collapse: a", "30 rows", 1, 100),
        *share("honest reward collapse: b", "30 rows", 4, 100),
        *share("failed reward collapse: c", "30 rows", 10, 20),
        *share("failed reward collapse: d", "30 rows", 20, 20),
    ]
    found = summary(rows, (30,))
    assert found["simulated, honest: reward collapse", "30 rows"] == 0.04
    assert found["simulated, honest: reward collapse", "30 rows: of"] == 100
    assert found["simulated, failed: reward collapse", "30 rows"] == 0.75
    assert found["simulated, failed: reward collapse", "30 rows: of"] == 40


def summary(rows, lengths):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alert_rates, "LENGTHS", lengths)
        found = alert_rates.summary(rows)
    return {(row["variant"], row["metric"]): row["value"] for row in found}


def test_runs_are_honest_or_failed_by_what_pays():
    """A hacked one counts only if the gold reward fell; a run counts for the rules it can raise."""

    def run(name, seed, judge, gold):
        rows = [
            {"step": step, "validation/judge": one, "validation/score": step * 1.0, "gold": other}
            for step, (one, other) in enumerate(zip(judge, gold, strict=True), start=1)
        ]
        return alert_runs.rows_of_run(alert_runs.variant("RLOO", name), seed, rows)

    rises = list(np.linspace(0, 1, 30))
    rows = [
        *run("gold", 0, rises, rises),
        *run("gold", 1, TURNS, rises),  # a false alarm
        *run("proxy", 0, rises, [3 * x for x in TURNS]),  # seen by gold alone
        *run("proxy", 1, TURNS, rises),  # not hacked
    ]
    found = summary(rows, (20, 30))
    assert found["runs, honest: reward hacking", "30 rows"] == 0.5
    assert found["runs, honest: reward hacking", "20 rows"] == 0
    assert found["runs, failed: reward hacking", "30 rows"] == 0
    assert found["runs, failed: reward hacking", "30 rows: of"] == 1
    assert found["runs, failed: reward hacking, gold looks on", "30 rows"] == 1
    assert ("runs, honest: reward collapse", "30 rows") not in found
    lost = {(row["variant"], row["seed"]): row["value"] for row in rows if "lost" in row["metric"]}
    assert lost["run of RLOO: proxy", 0] == pytest.approx(3 * np.mean(TURNS[10:20]), abs=1e-4)
    assert lost["run of RLOO: gold", 0] == 0


def test_gold_pays_pairs_once():
    tokens = np.array([[0, 5, *[1, 2] * 6], [0, 5, *range(12)]])
    counts = alert_runs.pair_counts(tokens)
    assert counts.sum(1).tolist() == [12, 12]
    assert counts[0, [16 + 2, 2 * 16 + 1]].tolist() == [6, 5]
    assert alert_runs.repeats(counts)[:, 0].tolist() == [5**2 + 4**2, 0]


def test_a_reward_model_finds_the_feature_that_decides():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 2, 3))
    labels = (features[:, 1, 0] > features[:, 0, 0]) * 1.0
    weights = alert_runs.fitted(features, labels)
    assert weights[0] > 5 * np.abs(weights[1:]).max()


def test_a_file_grows(tmp_path, monkeypatch):
    def turning(rng, t):
        return history(np.interp(t, [0, 0.7, 1], [0, 1, 0]))

    families = [
        Family("reward hacking", "turns", turning, 0.7),
        Family("reward hacking", "rises", lambda rng, t: history(t)),
    ]
    out = tmp_path / "rates.json"
    sizes = Sizes(honest=2, failed=2)
    for number in (1, 2):
        monkeypatch.setattr(alert_rates, "families", lambda number=number: families[:number])
        alert_rates.main(out, ("simulated",), sizes)
        rows = json.loads(out.read_text("utf-8"))["rows"]
        assert len(rows) == len({(row["variant"], row["metric"]) for row in rows})
    found = {(row["variant"], row["metric"]): row["value"] for row in rows}
    assert found["simulated, failed: reward hacking", "100 rows"] == 1
    assert found["simulated, honest: reward hacking", "100 rows"] == 0


@pytest.mark.slow
def test_a_population_in_short_form():
    rows = alert_runs.population("PPO", 0, 6)
    found = {(row["variant"], row["seed"], row["metric"]): row["value"] for row in rows}
    for seed in range(4):
        assert found["run of PPO: one reward for all", seed, "first nothing to learn"] == 5
        assert ("run of PPO: gold", seed, "first nothing to learn") not in found
    read = {key[2] for key in found if key[:2] == ("run of PPO: gold", results.ALL)}
    assert {"reads value-loss explosion", "reads reward hacking", "reads sampler gap"} <= read
    assert ("run of PPO: rare reward", results.ALL, "reads reward hacking") not in found
