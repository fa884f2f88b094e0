"""The page of runs: what it reads from their folders, which numbers its figures show, what it says
is missing.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from builders import COMMAND, HOSTILE, SAMPLES, Page, write_run

from rlhf_jax import metrics
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.report import figures, page, plots, records
from rlhf_jax.report.export import export

BROKEN_FOLDERS = [
    ("manifest.json", None, "no run here, as there is no manifest.json"),
    ("manifest.json", "[]", r"run/manifest.json: expected a mapping of keys, found \[\]"),
    ("manifest.json", "{}", "run/manifest.json: lacks the key command"),
]
BROKEN_FOLDERS += [
    ("config.yaml", None, "run/config.yaml: cannot be read: No such file"),
    ("config.yaml", "a: [", "run/config.yaml: cannot be read as YAML: expected the node"),
    ("evaluation.json", "{}", "run/evaluation.json: lacks the key rows"),
]
NO_STEP = "metrics.jsonl, line 2: expected a JSON object with the key step"
BAD_LINES = ("[1]", "{}", "step", '{"step": null}', "")
BROKEN_FOLDERS += [
    ("metrics.jsonl", f'{{"step": 0}}\n{line}\n{{"step": 1}}\n', NO_STEP) for line in BAD_LINES
]
CARDS = [("", False, "A language model trained"), ("", True, "A reward model trained")]
CARDS.append(("member_0", True, "An ensemble of reward models (`member_0`, `member_1`, ...)"))


def read_page(tmp_path: Path, *folders: Path) -> Page:
    page.write(folders, tmp_path / "out.html")
    return Page((tmp_path / "out.html").read_text("utf-8"))


def groups_of(*folders: Path) -> list[records.Group]:
    return records.groups(records.find(folders))


# --- The page of one run
# --------------------------------------------------------------------------------------------


def test_the_page_of_one_run(tmp_path):
    run = write_run(tmp_path / "mine")
    read = read_page(tmp_path, run)
    assert (read.texts("h1"), read.texts("pre")[0]) == (["PPO: mine"], f"\n{COMMAND}")
    facts = dict(zip(read.texts("dt"), read.texts("dd"), strict=True))
    expected = {
        "stage": "PPO",
        "seed": "5",
        "steps": "3",
        "s/step (median)": "0.375",
        "state": "finished",
    }
    expected |= {
        "objective/score": "4",
        "validation/score": "1.5",
        "git commit": "0123456789ab (modified)",
    }
    expected |= {"devices": "2 x cpu", "jax": "0.10.2", "prompts.json, sha256": "fedcba987654…"}
    assert expected.items() <= facts.items()
    titles = ["Score: objective/score", "KL from the reference: objective/kl", "Reward against KL"]
    assert read.texts("h3") == [*titles, "Scores", "Response lengths"]
    assert {"target", "iteration", "before (step 0, n = 3)", "after (step 3, n = 3)"} <= set(
        read.texts("text")
    )
    assert "These metrics never changed and have no curve: nonfinite 0." in read.texts("p")
    assert ["kl_target" in text for text in read.texts("details")] == [True]
    # Samples stand beside what was said to the same prompt before.
    assert read.texts("th") == [
        "prompt",
        "response, step 0",
        "score, step 0",
        "response, step 3",
        "score, step 3",
    ]
    rows = (
        ("a", "b↵\nc", "1", "again", "3"),
        ("a", HOSTILE, "2", "second", "5"),
        ("d", "NaN", "1", "NaN", "3"),
    )
    assert read.texts("td") == [cell for row in rows for cell in row]
    first_bytes = (tmp_path / "out.html").read_bytes()
    read_page(tmp_path, run)
    assert (tmp_path / "out.html").read_bytes() == first_bytes
    table = page._samples(*records.find([run]), limit=2, is_one=True)
    assert (len(table.rows), table.note[:34]) == (2, "The first 2 of 3 in samples.jsonl.")


def test_alerts_and_an_evaluation_are_listed(tmp_path):
    run = write_run(tmp_path / "run")
    alert = {
        "step": 2,
        "name": "far",
        "rule": "far: log",
        "action": "log",
        "message": "objective/kl is 3 > 2",
    }
    (run / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    row = {
        "category": "quality",
        "metric": "win rate",
        "value": 0.5,
        "low": 0.25,
        "high": 0.75,
        "n": 8,
    }
    (run / "evaluation.json").write_text(json.dumps({"rows": [row]}))
    read = read_page(tmp_path, run)
    assert read.texts("td")[:5] == list(map(str, alert.values()))
    assert read.texts("td")[-8:] == [
        "quality",
        "win rate",
        "0.500",
        "0.250",
        "0.750",
        "8",
        "–",
        "–",
    ]
    [score, kl] = plots.curves(groups_of(run))[0]
    assert "alert" not in score.series
    assert kl.series["alert"][:2] == ((2,), (0.5,))


def test_what_is_missing_is_said(tmp_path):
    run = write_run(
        tmp_path / "run", metrics={"objective/reward": [1.0]}, samples={}, finished=False
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    (run / "timing.jsonl").unlink()
    read = read_page(tmp_path, run)
    assert {
        "Reward against KL: no run has measured a KL (rl.kl_coef is 0) or finished an iteration.",
        "Histograms and samples before and after: no validation has written texts.",
        "No validation: nothing was held out, or no validation has been reached.",
        "run: not finished, as there is no model yet; last recorded step: 1.",
        "run: the last line of metrics.jsonl is cut and has been passed over.",
    } <= set(read.texts("p"))
    assert "–" in read.texts("dd")  # seconds of a step
    assert read.all("svg") == read.all("table") == []
    read = read_page(tmp_path, write_run(tmp_path / "begun", metrics={}, samples={0: SAMPLES[0]}))
    assert read.texts("th") == ["prompt", "response, step 0", "score, step 0"]


# --- Curves
#
# ---------------------------------------------------------------------------------------------------------


def test_every_metric_has_a_curve_and_validation_stands_with_its_training(tmp_path):
    metrics = {
        name: [1.0, 2.0]
        for name in ("mine/new", "reward/a", "validation/reward/a", "validation/other")
    }
    metrics |= {"dpo/accuracy": [0.5, math.nan], "validation/accuracy": [0.5, 1.0]}
    run = write_run(tmp_path / "run", stage="dpo", metrics=metrics, samples={})
    curves, constant = plots.curves(groups_of(run))
    members = (
        ["dpo/accuracy", "validation/accuracy"],
        ["mine/new"],
        ["reward/a", "validation/reward/a"],
    )
    assert [list(plot.series) for plot in curves] == [*members, ["validation/other"]]
    labels = [("step", "share of pairs", {"equal log-ratios": 0.5}), ("step", "new", {})]
    assert [(plot.x_label, plot.y_label, plot.lines) for plot in curves[:2]] == labels
    assert constant == {}
    [note] = read_page(tmp_path, run).texts("p", class_="note")
    assert note == "dpo/accuracy: 1 of 2 values not finite, not drawn."
    assert [plot.lines for plot in plots.curves(groups_of(write_run(tmp_path / "ppo")))[0]] == [
        {},
        {"target": 2.0},
    ]


def test_long_curves_stay_small_and_long_paths_are_means_over_stretches(tmp_path):
    values = list(map(float, range(2500)))
    groups = groups_of(
        write_run(tmp_path, metrics={"objective/score": values, "objective/kl": values}, samples={})
    )
    kl = plots.curves(groups)[0][1]
    line = kl.series["objective/kl"]
    assert (line.y[:2].tolist(), line.x[-1], line.y[-1], len(line.y)) == ([0, 1], 2500, 2499, 2500)
    noise = figures.Plot("p", "x", "y", {"a": (range(20000), np.sin(np.arange(20000.0) ** 2))})
    assert len(figures.svg(noise)) < 200_000  # matplotlib leaves out what no pixel shows
    [path] = plots.reward_against_kl(groups).series.values()
    assert (path.x[0], path.y[0], len(path.x), path.labels[:11]) == (
        20.5,
        20.5,
        60,
        ["22", *[""] * 9, "442"],
    )


# --- Several runs
#
# ---------------------------------------------------------------------------------------------------


def test_seeds_are_a_mean_with_a_band_over_the_steps_that_all_have(tmp_path):
    first = write_run(tmp_path / "ppo-seed0", seed=0, metrics={"objective/score": [1.0, 2.0, 4.0]})
    second = write_run(tmp_path / "ppo-seed1", seed=1, metrics={"objective/score": [3.0, 2.5]})
    [group] = groups_of(first, second)
    assert group.name == "ppo (n = 2)"
    [plot] = plots.curves([group])[0]
    assert list(plot.series) == ["objective/score", "validation/score"]
    line = plot.series["objective/score"]
    np.testing.assert_array_equal(
        [line.x, line.y, line.low, line.high], [[1, 2], [2, 2.25], [1, 2], [3, 2.5]]
    )
    scores, _ = plots.distributions([group])
    assert list(scores.series) == [
        "before (step 0, n = 6)",
        "after (step 3, n = 6)",
    ]  # two runs of three samples
    assert [line.y.tolist() for line in scores.series.values()] == [
        [0, 4, 2, 0, 0, 0, 0],
        [0, 0, 0, 4, 0, 2, 0],
    ]
    read = read_page(tmp_path, first, second)
    assert (
        "The runs of ppo (n = 2) end at steps [2, 3]; their curves show the steps that all have."
        in read.texts("p")
    )
    assert read.texts("td")[:3] == ["group", "ppo (n = 2)", "ppo (n = 2)"]


def test_groups_are_compared_by_what_differs(tmp_path):
    def run(name, clip, target, **more):
        settings = {
            "ppo": {"clip": clip},
            "dpo": {"beta": clip},
            "rl": {"kl_target": target, "same": 1},
            "data": [],
        }
        return write_run(tmp_path / name, settings=settings, **more)

    folders = [run("a", 0.2, 1.0, seed=1), run("b", 0.2, 1.0, seed=2), run("c", 0.1, None)]
    folders.append(run("d", 0.1, None, stage="mine"))  # an algorithm from outside
    groups = groups_of(*folders)
    assert [[record.name for record in group.records] for group in groups] == [
        ["a", "b"],
        ["c"],
        ["d"],
    ]
    expected = {
        "stage": ["ppo", "ppo", "mine"],
        "ppo.clip": [0.2, 0.1, "(none)"],
        "rl.kl_target": [1.0, None, None],
    }
    assert records.differences(groups) == expected  # dpo.beta is no setting of these stages
    read = read_page(tmp_path, *folders)
    assert read.texts("h1") == ["PPO, MINE: a, b, c, d"]
    at = read.texts("td").index("rl.kl_target")
    assert read.texts("td")[at : at + 4] == ["rl.kl_target", "1.0", "null", "null"]
    looks = {
        name: (line.color, line.style) for name, line in plots.curves(groups)[0][0].series.items()
    }
    names = enumerate(("a (n = 2)", "c", "d"))
    assert looks == {
        f"{name}{more}": (i, j) for i, name in names for j, more in enumerate(("", ", validation"))
    }


def test_a_folder_of_runs_is_its_stages_one_after_another(tmp_path):
    for stage in ("ppo", "sft", "reward_model"):
        write_run(tmp_path / "pipeline" / stage, stage=stage, metrics={"loss": [1.0]}, samples={})
    (tmp_path / "pipeline" / "data").mkdir()
    assert read_page(tmp_path, tmp_path / "pipeline").texts("h2") == ["SFT", "Reward model", "PPO"]
    assert page.default_path([tmp_path / "pipeline"]) == tmp_path / "pipeline" / "stages.html"


def test_names_are_distinct_and_paths_within_a_pipeline_no_difference(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        for stage in ("sft", "ppo"):
            settings = {
                "model": f"{tmp_path / name}/sft/model",
                "reward": ["count:e", f"{tmp_path / name}/rm/model"],
            }
            write_run(tmp_path / name / stage, stage=stage, seed=seed, settings=settings)
    found = records.find([tmp_path / "one", tmp_path / "two" / "ppo", tmp_path / "two" / "sft"])
    assert [record.name for record in found] == ["one/ppo", "one/sft", "two/ppo", "two/sft"]
    assert (
        len(records.groups(found)) == 4
    )  # the second pipeline's stages, given alone, started from its models
    assert len(groups_of(tmp_path / "one", tmp_path / "two")) == 2


# --- Reward models
# --------------------------------------------------------------------------------------------------


def test_calibration_bins():
    margin = np.array(
        [math.log(3), -math.log(3), 0.0, math.log(3), 50.0]
    )  # confidence .75, .75, .5, .75, 1
    np.testing.assert_allclose(
        metrics.reliability(margin), ([1, 3, 1], [0.5, 0.75, 1.0], [0.5, 2 / 3, 1.0])
    )


def test_a_reward_models_page(tmp_path):
    def pairs(*margins):
        names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
        return [
            dict(zip(names, (f"p{i}", "c", "r", m + 1.0, 1.0), strict=True))
            for i, m in enumerate(margins)
        ]

    metrics = {"reward_model/loss": [0.7, 0.5], "validation/ece": [0.3, 0.125]}
    samples = {0: pairs(-1.0, 0.5), 2: pairs(1.0, 50.0)}
    read = read_page(
        tmp_path,
        write_run(tmp_path / "run", stage="reward_model", metrics=metrics, samples=samples),
    )
    assert read.texts("h3")[-2:] == ["Margins", "Calibration"]
    [note] = [text for text in read.texts("p", class_="note") if "confidence" in text]
    assert "2 held-out rows, those that samples.jsonl holds of step 2." in note
    assert note.endswith("Expected calibration error over all held-out rows: 0.125.")
    assert read.texts("th") == ["prompt", "chosen", "rejected", "margin, step 0", "margin, step 2"]
    assert read.texts("td") == ["p0", "c", "r", "-1", "1", "p1", "c", "r", "0.5", "50"]


def test_a_reward_model_with_targets(tmp_path):
    answers = [
        {"prompt": "p", "response": r, "target": t, "length": 1}
        for r, t in (("x", 0.0), ("y", 1.0))
    ]
    samples = {step: [row | {"score": row["target"] + step} for row in answers] for step in (0, 1)}
    run = write_run(
        tmp_path / "run",
        stage="reward_model",
        metrics={"reward_model/loss": [1.0]},
        samples=samples,
    )
    read = read_page(tmp_path, run)
    assert read.texts("h3") == ["Scores", "Score against target"]
    assert read.texts("td") == ["p", "x", "0", "0", "1", "p", "y", "1", "1", "2"]
    [_, plot] = plots.distributions(groups_of(run))
    assert plot.series["responses"][:2] == ((0.0, 1.0), (1.0, 2.0))


# --- Folders and files
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "text", "message"), BROKEN_FOLDERS)
def test_a_broken_folder_is_a_sentence(file, text, message, tmp_path):
    run = write_run(tmp_path / "run")
    (run / file).unlink(missing_ok=True) if text is None else (run / file).write_text(text)
    with pytest.raises(UserError, match=message):
        page.write([run], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(("member", "shift", "kind"), CARDS)
def test_model_cards(member, shift, kind, tmp_path):
    run = write_run(tmp_path / "run", finished=False, settings={"rl": {"max_new_tokens": 7}})
    tokenizers.characters("ab").save(run / "model" / member)
    (run / "model" / member / "config.json").write_text('{"reward_shift": 0.5}' if shift else "{}")
    card = (export(run, tmp_path / "card") / "README.md").read_text("utf-8")
    assert all(
        part in card
        for part in (kind, "# card\n", "Seed 5. Versions: jax 0.10.2. Devices: 2 x cpu.\n")
    )
    assert ("reward_shift" in card) == shift != ("apply_chat_template" in card)
    assert ("model.generate(**inputs, max_new_tokens=7)" in card) != shift


def test_a_run_twice_and_no_place_for_the_page(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="given twice"):
        page.write([run, tmp_path], tmp_path / "out.html")
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        page.write([run], tmp_path / "no" / "out.html")


def test_rows_and_series_of_a_run(tmp_path):
    path = tmp_path / "samples.jsonl"
    strange = {"loss": "NaN", "prompt": "NaN", "note": "a\u2028b"}
    rows = {"validation/score": 0.5}, strange, {"loss": "-Infinity", "validation/score": 0.75}
    lines = [json.dumps({"step": step} | row, ensure_ascii=False) for step, row in enumerate(rows)]
    path.write_text("\n".join([*lines, '{"step": 3, "lo']), encoding="utf-8")  # cut by a kill
    rows = records.read_rows(path)
    assert records.series(rows, "validation/score") == ([0, 2], [0.5, 0.75])
    np.testing.assert_array_equal(records.series(rows, "loss"), [[1, 2], [math.nan, -math.inf]])
    assert (rows[1]["prompt"], rows[1]["note"], len(rows)) == ("NaN", "a\u2028b", 3)
    with pytest.raises(UserError, match="there is no such file"):
        records.read_rows(tmp_path / "other.jsonl")
