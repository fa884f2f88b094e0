"""The page of runs: what it reads from their folders, which numbers its figures show, what it says is missing."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_page import HOSTILE, Page

from rlhf_jax import metrics as evaluation
from rlhf_jax import models, sharding
from rlhf_jax.config import RunConfig
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.report import page as report
from rlhf_jax.report import records as run_records
from rlhf_jax.report import run_figures
from rlhf_jax.report.run_figures import histograms, reliability
from rlhf_jax.runs import folder as runs
from rlhf_jax.runs.log import RowWriter
from rlhf_jax.training.adapters import Trainable
from rlhf_jax.training.stage import Stage

COMMAND = "python experiments/ppo.py --seed 5"
KL, SCORE = [0.0, 0.5, 1.5], [1.0, 2.0, 4.0]
VALIDATIONS = {
    0: [("a", "b\nc", 1.0, 3), ("a", HOSTILE, 2.0, 3), ("d", "NaN", 1.0, 1)],
    3: [("a", "again", 3.0, 4), ("a", "second", 5.0, 4), ("d", "NaN", 3.0, 1)],
}


def write_run(
    folder: Path,
    *,
    stage: str = "ppo",
    seed: int = 5,
    settings: dict | None = None,
    metrics: dict[str, list[float]] | None = None,
    samples: dict[int, list[dict]] | None = None,
    finished: bool = True,
) -> Path:
    """A run folder whose metric rows are of steps 1, 2, ...; ``validation/score`` of 0 and the last step."""
    (folder / "model").mkdir(parents=True)
    if finished:
        (folder / "model" / "config.json").write_text("{}")
    manifest = {
        "command": COMMAND,
        "versions": {"jax": "0.10.2"},
        "backend": "cpu",
        "devices": {"kind": "cpu", "count": 2},
        "git": {"commit": "0123456789abcdef", "modified": True},
        "seed": seed,
        "data": {"prompts.json": "fedcba9876543210"},
        "stage": stage,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    config = {"seed": seed, "output_dir": str(folder), **(settings or {"rl": {"kl_target": 2.0}})}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    metrics = {"objective/score": SCORE, "objective/kl": KL, "nonfinite": [0.0] * 3} if metrics is None else metrics
    rows = RowWriter(folder / "metrics.jsonl")
    if metrics and "objective/score" in metrics:
        rows.write(0, {"validation/score": 1.5})
    for step, values in enumerate(zip(*metrics.values(), strict=True), 1):
        rows.write(step, dict(zip(metrics, values, strict=True)))
    timing = RowWriter(folder / "timing.jsonl")
    for step, seconds in ((1, 9.0), (2, 0.5), (3, 0.25)):
        timing.write(step, {"timing/step": seconds})
    texts = RowWriter(folder / "samples.jsonl")
    if samples is None:
        keys = ("prompt", "response", "score", "length")
        samples = {step: [dict(zip(keys, row, strict=True)) for row in some] for step, some in VALIDATIONS.items()}
    for step, some in samples.items():
        for row in some:
            texts.write(step, row)
    for writer in (rows, timing, texts):
        writer.close()
    return folder


def read_page(tmp_path: Path, *folders: Path) -> Page:
    report.write(folders, tmp_path / "out.html")
    return Page((tmp_path / "out.html").read_text("utf-8"))


def facts(page: Page) -> dict[str, str]:
    return dict(zip(page.texts("dt"), page.texts("dd"), strict=True))


def test_the_page_of_one_run(tmp_path):
    page = read_page(tmp_path, write_run(tmp_path / "mine"))
    assert page.texts("h1") == ["PPO: mine"]
    assert page.texts("pre")[0] == f"\n{COMMAND}"
    found = facts(page)
    assert found["seed"] == "5"
    assert found["steps"] == "3"
    assert found["s/step (median)"] == "0.375"
    assert found["state"] == "finished"
    assert found["objective/score"] == "4"
    assert found["validation/score"] == "1.5"
    assert found["git commit"] == "0123456789ab (modified)"
    assert found["devices"] == "2 x cpu"
    assert found["jax"] == "0.10.2"
    assert found["prompts.json, sha256"] == "fedcba987654…"
    titles = ["Score: objective/score", "KL from the reference: objective/kl", "Reward against KL"]
    assert page.texts("h3") == [*titles, "Scores", "Response lengths"]
    assert {"target", "iteration", "before (step 0, n = 3)", "after (step 3, n = 3)"} <= set(page.texts("text"))
    assert "These metrics never changed and have no curve: nonfinite 0." in page.texts("p")
    config = page.texts("details")
    assert len(config) == 1
    assert "kl_target" in config[0]


def test_samples_stand_beside_what_was_said_to_the_same_prompt_before(tmp_path):
    page = read_page(tmp_path, write_run(tmp_path / "mine"))
    columns = ["prompt", "response, step 0", "score, step 0", "response, step 3", "score, step 3"]
    assert page.texts("th") == columns
    assert page.texts("td") == [
        *("a", "b↵\nc", "1", "again", "3"),
        *("a", HOSTILE, "2", "second", "5"),
        *("d", "NaN", "1", "NaN", "3"),
    ]
    assert page.all("script") == []


def test_the_same_runs_give_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "mine")
    pages = []
    for name in ("one", "two"):
        report.write([run], tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_histograms_count_the_first_and_the_last_validation_in_the_same_bins(tmp_path):
    [group] = run_records.groups(run_records.find([write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=6)]))
    [histogram] = histograms([group], "score", "Scores", "score")
    assert list(histogram.values) == ["before (step 0, n = 6)", "after (step 3, n = 6)"]  # two runs of three
    before, after = (np.histogram(values, histogram.edges)[0] for values in histogram.values.values())
    np.testing.assert_array_equal(histogram.edges, [0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
    np.testing.assert_array_equal(before, [4, 2, 0, 0, 0])
    np.testing.assert_array_equal(after, [0, 0, 4, 0, 2])


def test_seeds_are_a_mean_with_a_band_over_the_steps_that_all_have(tmp_path):
    first = write_run(tmp_path / "ppo-seed0", seed=0, metrics={"objective/score": [1.0, 2.0, 4.0]})
    second = write_run(tmp_path / "ppo-seed1", seed=1, metrics={"objective/score": [3.0, 2.5]})
    [group] = run_records.groups(run_records.find([first, second]))
    assert group.name == "ppo (n = 2)"
    curve = run_figures.curve(group, "objective/score")
    np.testing.assert_array_equal(curve.steps, [1, 2])
    np.testing.assert_array_equal(curve.mean, [2.0, 2.25])
    np.testing.assert_array_equal(curve.low, [1.0, 2.0])
    np.testing.assert_array_equal(curve.high, [3.0, 2.5])
    [plot] = run_figures.curves([group])[0]
    assert list(plot.series) == ["objective/score", "validation/score"]
    np.testing.assert_array_equal(plot.series["objective/score"].high, [3.0, 2.5])
    page = read_page(tmp_path, first, second)
    assert "Curves, mean and range of 2 runs" in page.texts("h2")
    assert "The runs of ppo (n = 2) end at steps [2, 3]; their curves show the steps that all have." in page.texts("p")


def test_groups_are_compared_by_what_differs(tmp_path):
    def settings(clip, target):
        return {"ppo": {"clip": clip}, "dpo": {"beta": clip}, "rl": {"kl_target": target, "same": 1}, "data": []}

    folders = [
        write_run(tmp_path / "a", settings=settings(0.2, 1.0), seed=1),
        write_run(tmp_path / "b", settings=settings(0.2, 1.0), seed=2),
        write_run(tmp_path / "c", settings=settings(0.1, None)),
        write_run(tmp_path / "d", settings=settings(0.1, None), stage="vpg"),
    ]
    groups = run_records.groups(run_records.find(folders))
    assert [[record.name for record in group.records] for group in groups] == [["a", "b"], ["c"], ["d"]]
    differing = run_records.differences(groups)
    assert differing == {  # dpo.beta is no setting of these stages
        "stage": ["ppo", "ppo", "vpg"],
        "ppo.clip": [0.2, 0.1, "(none)"],
        "rl.kl_target": [1.0, None, None],
    }
    page = read_page(tmp_path, *folders)
    assert page.texts("h1") == ["PPO, VPG: a, b, c, d"]
    cells = page.texts("td")
    at = cells.index("rl.kl_target")
    assert cells[at : at + 4] == ["rl.kl_target", "1.0", "null", "null"]
    assert page.texts("pre")[0] == f"\n{COMMAND}"  # the same of all four
    plots, _ = run_figures.curves(groups)
    names = ["a (n = 2)", "a (n = 2), validation", "c", "c, validation", "d", "d, validation"]
    assert list(plots[0].series) == names
    assert [line.color for line in plots[0].series.values()] == [0, 0, 1, 1, 2, 2]


def test_every_metric_has_a_curve_and_validation_stands_with_its_training(tmp_path):
    metrics = {name: [1.0, 2.0] for name in ("mine/new", "reward/a", "validation/reward/a", "validation/other")}
    metrics |= {"sft/loss": [3.0, math.nan], "validation/loss": [3.0, 2.0]}
    run = write_run(tmp_path / "run", stage="sft", metrics=metrics, samples={})
    plots, constant = run_figures.curves(run_records.groups(run_records.find([run])))
    assert [list(plot.series) for plot in plots] == [
        *(["sft/loss", "validation/loss"], ["mine/new"], ["reward/a", "validation/reward/a"], ["validation/other"]),
    ]
    assert constant == {}
    notes = read_page(tmp_path, run).texts("p", class_="note")
    assert notes == ["sft/loss: 1 of 2 values not finite, not drawn."]


def test_long_curves_are_means_over_stretches(tmp_path):
    run = write_run(tmp_path / "run", stage="sft", metrics={"sft/loss": list(map(float, range(2500)))}, samples={})
    [plot] = run_figures.curves(run_records.groups(run_records.find([run])))[0]
    line = plot.series["sft/loss"]
    assert len(line.y) == 834
    np.testing.assert_array_equal(line.y[:2], [1.0, 4.0])
    np.testing.assert_array_equal((line.x[-1], line.y[-1]), (2500.0, 2499.0))
    assert plot.note == "Each point is the mean of up to 3 steps."


def pairs(margins: list[float], **more) -> list[dict]:
    return [
        {"prompt": f"p{i}", "chosen": "c", "rejected": "r", "score_chosen": margin + 1.0, "score_rejected": 1.0} | more
        for i, margin in enumerate(margins)
    ]


def test_calibration_bins():
    margin = np.array([math.log(3), -math.log(3), 0.0, math.log(3), 50.0])  # confidence .75, .75, .5, .75, 1
    bins = reliability(margin)
    np.testing.assert_array_equal(bins.counts, [1, 0, 0, 0, 0, 3, 0, 0, 0, 1])
    np.testing.assert_allclose(bins.confidence[[0, 5, 9]], [0.5, 0.75, 1.0])
    np.testing.assert_allclose(bins.accuracy[[0, 5, 9]], [0.5, 2 / 3, 1.0])
    margin = np.random.default_rng(0).normal(size=200)
    bins = reliability(margin)
    gaps = np.nansum(np.abs(bins.accuracy - bins.confidence) * bins.counts) / len(margin)
    assert gaps == pytest.approx(evaluation.expected_calibration_error(margin))


def test_a_reward_models_page(tmp_path):
    metrics = {"reward_model/loss": [0.7, 0.5], "validation/ece": [0.3, 0.125]}
    samples = {0: pairs([-1.0, 0.5]), 2: pairs([1.0, 50.0], length_chosen=3)}
    run = write_run(tmp_path / "run", stage="reward_model", metrics=metrics, samples=samples)
    page = read_page(tmp_path, run)
    assert page.texts("h3")[-2:] == ["Margins", "Calibration"]
    [note] = [text for text in page.texts("p", class_="note") if "confidence" in text]
    assert "2 held-out rows, those that samples.jsonl holds of step 2." in note
    assert note.endswith("Expected calibration error over all held-out rows: 0.125.")
    assert page.texts("th") == ["prompt", "chosen", "rejected", "margin, step 0", "margin, step 2"]
    assert page.texts("td") == ["p0", "c", "r", "-1", "1", "p1", "c", "r", "0.5", "50"]


def test_a_reward_model_with_targets(tmp_path):
    answers = [{"prompt": "p", "response": r, "target": t, "length": 1} for r, t in (("x", 0.0), ("y", 1.0))]
    samples = {step: [row | {"score": row["target"] + step} for row in answers] for step in (0, 1)}
    run = write_run(tmp_path / "run", stage="reward_model", metrics={"reward_model/loss": [1.0]}, samples=samples)
    page = read_page(tmp_path, run)
    assert page.texts("h3") == ["Scores", "Score against target"]
    assert page.texts("td") == ["p", "x", "0", "0", "1", "p", "y", "1", "1", "2"]
    assert "Calibration: the samples are scored answers, not pairs." in page.texts("p")


def test_what_is_missing_is_said(tmp_path):
    run = write_run(tmp_path / "run", metrics={"objective/reward": [1.0]}, samples={}, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    (run / "timing.jsonl").unlink()
    page = read_page(tmp_path, run)
    said = page.texts("p")
    for sentence in (
        "Reward against KL: no run has measured a KL (rl.kl_coef is 0) or finished an iteration.",
        "Histograms and samples before and after: no validation has written texts.",
        "No validation: nothing was held out, or no validation has been reached.",
        "run: not finished, as there is no model yet; last recorded step: 1.",
        "run: the last line of metrics.jsonl is cut and has been passed over.",
    ):
        assert sentence in said
    assert facts(page)["s/step (median)"] == "–"
    assert page.all("svg") == page.all("table") == []


def test_a_run_that_has_just_begun_and_old_samples(tmp_path):
    rows = {0: [{"prompt": "p", "response": "r", "score": 1.0}]}
    page = read_page(tmp_path, write_run(tmp_path / "run", metrics={}, samples=rows, finished=False))
    assert page.texts("th") == ["prompt", "response, step 0", "score, step 0"]
    assert "Histogram of lengths: samples.jsonl has no lengths." in page.texts("p")


def test_a_folder_of_runs_is_its_stages_one_after_another(tmp_path):
    outer = tmp_path / "pipeline"
    for stage in ("ppo", "sft", "reward_model"):
        write_run(outer / stage, stage=stage, metrics={"loss": [1.0]}, samples={})
    (outer / "data").mkdir()
    page = read_page(tmp_path, outer)
    assert page.texts("h2") == ["SFT", "Reward model", "PPO"]
    assert report.default_path([outer]) == outer / "stages.html"
    assert report.default_path([outer / "sft"]) == outer / "sft" / "report.html"
    assert report.default_path([outer / "sft", outer / "ppo"]) == Path("report.html")


def test_names_are_distinct_and_paths_within_a_pipeline_no_difference(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        for stage in ("sft", "ppo"):
            settings = {"model": f"{tmp_path / name}/sft/model", "reward": ["count:e", f"{tmp_path / name}/rm/model"]}
            write_run(tmp_path / name / stage, stage=stage, seed=seed, settings=settings)
    records = run_records.find([tmp_path / "one", tmp_path / "two" / "ppo", tmp_path / "two" / "sft"])
    assert [record.name for record in records] == ["one/ppo", "one/sft", "two/ppo", "two/sft"]
    assert len(run_records.groups(records)) == 4  # the second pipeline's stages, given alone, started from its models
    assert len(run_records.groups(run_records.find([tmp_path / "one", tmp_path / "two"]))) == 2


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "manifest.json").unlink(), "no run here, as there is no manifest.json"),
        (lambda run: (run / "manifest.json").write_text("{"), "not the folder of a run"),
        (lambda run: (run / "manifest.json").write_text("[]"), "expected a JSON object with the key command"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "not the folder of a run"),
        (lambda run: (run / "samples.jsonl").write_text("{}\n"), "samples.jsonl, line 1: expected a JSON object"),
    ],
)
def test_a_broken_folder_is_a_sentence(break_it, message, tmp_path):
    run = write_run(tmp_path / "run")
    break_it(run)
    with pytest.raises(UserError, match=message):
        report.write([run], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_no_run_and_a_run_twice(tmp_path):
    run = write_run(tmp_path / "run")
    for folders, message in (
        ([], "expected the folder"),
        ([tmp_path / "no"], "no run here"),
        ([run, run], "given twice"),
    ):
        with pytest.raises(UserError, match=message):
            report.write(folders, tmp_path / "out.html")
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        report.write([run], tmp_path / "no" / "out.html")


def test_rows_and_series_of_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = RowWriter(path)
    writer.write(0, {"validation/score": 0.5})
    writer.write(1, {"loss": math.nan, "prompt": "NaN", "note": "a\u2028b"})
    writer.write(2, {"loss": -math.inf, "validation/score": 0.75})
    writer.close()
    rows = run_records.read_rows(path)
    assert run_records.series(rows, "validation/score") == ([0, 2], [0.5, 0.75])
    assert run_records.series(rows, "absent") == ([], [])
    steps, losses = run_records.series(rows, "loss")
    assert steps == [1, 2]
    assert math.isnan(losses[0])
    assert losses[1] == -math.inf
    assert (rows[1]["prompt"], rows[1]["note"]) == ("NaN", "a\u2028b")
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(run_records.read_rows(path)) == 3  # cut by a kill


@pytest.mark.parametrize("line", ["[1]", "{}", "step", '{"step": null}', ""])
def test_lines_that_are_no_rows(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: expected a JSON object with the key step"):
        run_records.read_rows(path)


def test_no_rows_file(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        run_records.read_rows(tmp_path / "metrics.jsonl")


def test_the_end_of_a_run_draws_it_and_a_failure_to_draw_loses_nothing(tmp_path, capsys):
    model = models.build(models.GPT2Config(vocab_size=300, max_length=8, hidden_size=8, num_layers=1, num_heads=1))
    params, tokenizer = model.init(jax.random.key(0)), tokenizers.train_bpe(["some text"], 300)
    for name, message in (("whole", "saved {}"), ("broken", "{} could not be drawn: UserError: ")):
        folder = write_run(tmp_path / name, stage="sft", metrics={"sft/loss": [1.0, 2.0]}, samples={}, finished=False)
        if name == "broken":
            (folder / "config.yaml").unlink()
        with runs.open_run(folder, overwrite=False, resume=True) as run:
            result = Stage(RunConfig(), "sft", run, sharding.make_mesh()).finish(
                model, Trainable(params), params, tokenizer, {}
            )
        assert message.format(folder / "report.html") in capsys.readouterr().out
        assert (folder / "report.html").exists() == (name == "whole")
        assert models.load(result.model_folder)[0].config.vocab_size == 300
    assert "not finished" not in (tmp_path / "whole" / "report.html").read_text("utf-8")


def test_matplotlib_is_not_imported_before_something_is_drawn():
    code = "import sys; from rlhf_jax.training import rl, stage; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
