"""The long tables of results that docs draw."""

import datetime
import json
import re
from pathlib import Path

import pytest
import results

PUBLISHED = sorted((Path(__file__).parents[1] / "docs" / "results").glob("*.json"))


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


def test_what_is_written_says_when_and_where_and_of_which_revision(tmp_path):
    path = tmp_path / "a.json"
    rows = [results.row("a", seed, 1, "score", 0.25) for seed in (0, 1)]
    results.write(path, "python a.py", 1.6, rows, sizes={"n": 3})
    assert sum('"metric"' in line for line in path.read_text("utf-8").splitlines()) == 2
    found = json.loads(path.read_text("utf-8"))
    keys = ["command", "date", "revision", "machine", "seconds", "sizes", "rows"]
    assert list(found) == keys
    assert found["rows"] == rows
    assert found["seconds"] == 2
    now = datetime.datetime.now(datetime.UTC).date()
    assert now - datetime.date.fromisoformat(found["date"]) <= datetime.timedelta(1)
    assert found["revision"] == results.REVISION
    results.write(path, "python a.py", 1, rows, revision="abc", date="2026-01-02")
    found = json.loads(path.read_text("utf-8"))
    assert (found["revision"], found["date"]) == ("abc", "2026-01-02")
    assert list(found)[:3] == keys[:3]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_what_is_published_has_a_date_a_machine_and_a_clean_revision(path):
    found = json.loads(path.read_text("utf-8"))
    assert datetime.date.fromisoformat(found["date"]) >= datetime.date(2026, 11, 1)
    assert re.match(r"\d+ cores, \S", found["machine"])
    assert found["command"].startswith(("python ", "rlhf-jax "))
    assert re.match("[0-9a-f]{7,}", found["revision"])
    assert "dirty" not in found["revision"]
