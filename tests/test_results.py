"""The long tables of results that docs draw."""

import pytest
import results


def test_a_mean_over_seeds_has_students_interval():
    rows = [results.row("a", seed, 5, "score", value) for seed, value in enumerate((1.0, 3.0))]
    rows.append(results.row("a", 0, 5, "score low", 0.5))  # of one seed's own rows: no number
    found = {
        (row["seed"], row["step"], row["metric"]): row["value"] for row in results.over_seeds(rows)
    }
    assert found == {
        ("all", 5, "score"): 2.0,
        ("all", 5, "score low"): pytest.approx(2 - 12.7062, abs=1e-3),  # t of one degree, error 1
        ("all", 5, "score high"): pytest.approx(2 + 12.7062, abs=1e-3),
    }


def test_one_seed_has_no_interval():
    rows = [results.row("a", 0, 1, "score", 0.25)]
    assert results.over_seeds(rows) == [results.row("a", "all", 1, "score", 0.25)]


def test_a_share_has_wilsons_interval():
    assert results.share(8, 10) == pytest.approx(
        {"": 0.8, " low": 0.4902, " high": 0.9433}, abs=1e-3
    )
