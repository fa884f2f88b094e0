"""How often intervals hold the true value: of 95% all but the lowest few."""

import json

import intervals
import numpy as np
import pytest

from rlhf_jax import metrics


def held(one, interval, num, draws=400):
    share, _ = intervals.coverage(one, interval, num, draws, np.random.default_rng(num))
    return share


@pytest.mark.parametrize(
    ("num", "lowest"), [(5, 0.88), (10, 0.89), (20, 0.9), (50, 0.9), (200, 0.91)]
)
def test_wins_with_ties_are_covered_at_any_number_of_rows(num, lowest):
    """The exact shares, of all outcomes, are .904, .914, .925, .922 and .933 at the worst; those
    of 400 draws have an error of .013.
    """
    cases = [(0.05, 0.0), (0.2, 0.9), (0.5, 0.0), (0.5, 0.9), (0.8, 0.3), (0.95, 0.9), (1.0, 0.0)]
    found = [held(intervals.wins(*case), metrics.share_interval, num) for case in cases]
    assert min(found) >= lowest
    assert found[-1] == 1  # 20 of 20 are no proof of 1, but 1 is never denied
    assert np.mean(found) < 0.99  # nor is it wide for nothing
    worst = held(intervals.wins(0.05, 0.0), metrics.student, num)
    assert worst < {5: 0.3, 10: 0.5, 20: 0.7, 50: 0.95, 200: 0.95}[num]  # what it replaced


@pytest.mark.parametrize(("num", "lowest"), [(5, 0.94), (20, 0.93), (50, 0.93)])
def test_changes_of_shares_are_covered_and_little_wider_than_newcombes(num, lowest):
    cases = [intervals.changes(*case) for case in ((0.1, 0.9, 0), (0.5, 0.5, 0.9), (0.9, 1, 0))]
    ours = intervals.KINDS["change of shares"][1]["paired_change"]
    assert min(held(one, ours, num) for one in cases) >= lowest
    generators = [np.random.default_rng(0), np.random.default_rng(0)]
    width, other = (
        intervals.coverage(cases[1], how, num, 400, generator)[1]
        for how, generator in zip((ours, intervals.newcombe), generators, strict=True)
    )
    assert width < 1.3 * other  # where 19 of 20 rows do not change


def test_newcombes_interval_of_pairs_by_hand():
    """Table III of Newcombe 1998: of 50 pairs 36 are right both times, 12 before alone, 2 after
    alone, none never: a change of .2 with .0569 to .3404 (method 10).
    """
    rows = np.repeat([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [36, 12, 2], axis=0)
    low, high = intervals.newcombe(rows)
    assert (-high, -low) == pytest.approx((0.0569, 0.3404), abs=2e-3)


def drawn(one, num):
    """All rows of one draw."""
    [(rows, times)] = one.draw(np.random.default_rng(0), num, 1)
    assert (len(rows), times) == (num, 1)
    return rows


def test_distributions_are_what_they_say():
    one = intervals.judges(0.9, 0.3)
    rows = drawn(one, 200_000)
    assert metrics.cohen_kappa(*rows.T) == pytest.approx(one.truth, abs=0.01)
    assert rows[:, 0].mean() == pytest.approx(0.3, abs=0.01)
    both = intervals.changes(0.5, 0.9, 0.5)
    before, after = drawn(both, 200_000).T
    assert (after - before).mean() == pytest.approx(both.truth, abs=0.01)
    assert before.mean() == pytest.approx(0.5, abs=0.01)
    assert np.corrcoef(before, after)[0, 1] > 0.1
    won = intervals.wins(0.8, 0.5)
    assert drawn(won, 200_000).mean() == pytest.approx(won.truth, abs=0.01)
    assert np.mean(drawn(won, 200_000) == 0.5) == pytest.approx(0.2, abs=0.01)
    for one in intervals.NUMBERS.values():
        assert drawn(one, 200_000).mean() == pytest.approx(one.truth, abs=0.02)


def test_samples_that_are_equal_count_as_often_as_they_came():
    """Of five rows with a share of 1 there is one sample; of two shares both edges count."""
    always = intervals.wins(1.0, 0.0)
    [(rows, times)] = always.draw(np.random.default_rng(0), 5, 9)
    assert (rows.tolist(), times) == ([1] * 5, 9)
    one = intervals.wins(0.5, 0.0)
    share = held(one, lambda rows: (0.0, 1.0) if rows.all() else (2.0, 3.0), 1, draws=4000)
    assert share == pytest.approx(0.5, abs=0.03)


def test_no_interval_is_not_counted():
    one = intervals.NUMBERS["normal"]
    assert np.isnan(held(one, lambda rows: (np.nan, np.nan), 5, draws=3))
    assert held(one, lambda rows: (-9.0, 9.0), 5, draws=3) == 1
    assert held(one, lambda rows: (rows.max() + 9, 99.0), 5, draws=3) == 0


def test_a_job_that_was_cut_off_goes_on_and_one_of_another_revision_does_not(tmp_path, monkeypatch):
    cases, hows = intervals.KINDS["mean of normal numbers"]
    monkeypatch.setattr(intervals, "NUMS", (5,))
    monkeypatch.setattr(intervals, "KINDS", {"a": (cases, {"student": hows["student"]})})
    out = tmp_path / "out.json"
    intervals.main(out, draws=8)
    first = json.loads(out.read_text())
    assert [row["variant"] for row in first["rows"]] == ["a: student"] * 3
    monkeypatch.setitem(intervals.KINDS, "kappa b", (cases, {"student": hows["student"]}))
    asked = []
    monkeypatch.setattr(intervals, "rows_of", lambda *job: asked.append(job) or [])
    intervals.main(out, draws=8)
    assert asked == [("kappa b", 1)]
    assert json.loads(out.read_text())["rows"] == first["rows"]
    monkeypatch.setattr(intervals.results, "REVISION", "another")
    intervals.main(out, draws=8)
    assert asked[1:] == [("a", 8), ("kappa b", 1)]
