"""The page of runs: what it reads from their folders, which numbers its figures show, what it says
is missing.
"""

import itertools
import json
import math
import re
from types import SimpleNamespace

import browsing
import numpy as np
import pytest
import yaml
from builders import COMMAND, HOSTILE, METRICS, SAMPLES, Page, write_run
from safetensors.numpy import save_file

from rlhf_jax import metrics
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.report import chapters, export, figures, page, plots, records
from rlhf_jax.runs import manifest
from rlhf_jax.training.common import saving

NO_STEP = "metrics.jsonl, line 2: .* step"
BROKEN_FOLDERS = [
    ("manifest.json", None, "no manifest.json"),
    ("manifest.json", "[]", r"run/manifest.json: .* found \[\]"),
    ("manifest.json", "{}", "run/manifest.json: .* command"),
    ("config.yaml", None, "run/config.yaml: .*No such file"),
    ("config.yaml", "a: [", "run/config.yaml: .* YAML"),
    ("evaluation.json", "{}", "run/evaluation.json: .* rows"),
    *(
        ("metrics.jsonl", f'{{"step": 0}}\n{line}\n{{"step": 1}}\n', NO_STEP)
        for line in ("[1]", "{}", "step", '{"step": null}', "")
    ),
]
CARDS = [
    ("", False, "A language model trained"),
    ("", True, "A reward model trained"),
    ("member_0", True, "An ensemble of reward models (`member_0`, `member_1`, ...)"),
]
# --- The page of one run


def read_page(tmp_path, *folders):
    page.write(folders, tmp_path / "out.html")
    return Page((tmp_path / "out.html").read_text("utf-8"))


def groups_of(*folders):
    return records.groups(records.find(folders))


def chapter_of(*folders):
    """What the template is given, of which nothing is drawn yet."""
    [chapter] = chapters.of(records.find(folders))
    return chapter


def change(run, **manifest):
    file = run / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | manifest))


def after(texts, word, count):
    """The texts after a word."""
    at = texts.index(word) + 1
    return texts[at : at + count]


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without the insides of their figures, which take long to draw."""
    monkeypatch.setattr(figures, "element", lambda plot, salt: "")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The page of one run, and the run."""
    place = tmp_path_factory.mktemp("one")
    run = write_run(place / "mine")
    return read_page(place, run), run


def test_the_page_of_one_run(one):
    read, run = one
    again = f"\nrlhf-jax ppo --config {run}/config.yaml --output-dir {run}-again"
    assert read.texts("h1") == ["PPO trained on prompts.json"]
    assert read.texts("pre")[0] == again
    assert f"Started by {COMMAND}." in read.texts("p")
    values = [e["text"] for e in read.all("dd") if e.get("class") != "note"]
    facts = dict(zip(read.texts("dt"), values, strict=True))
    expected = {
        "stage": "PPO",
        "seed": "5",
        "steps": "3",
        "s/step (median)": "0.375",
        "state": "finished",
        "Validation score": "1.5",
        "KL": "0 → 1.5",
        "Time": "10 s",
        "Alerts": "no alert",
        "git commit": "0123456789ab (modified)",
        "devices": "2 x cpu",
        "jax": "0.10.2",
        "prompts.json, sha256": "fedcba987654…",
    }
    assert expected.items() <= facts.items()


def test_the_figures_and_samples_of_one_run(one):
    read, _ = one
    titles = ["Score: objective/score", "KL from the reference: objective/kl", "Reward against KL"]
    assert read.texts("h3") == [*titles, "Scores", "Response lengths"]
    labels = {"target", "iteration", "before (step 0, n = 3)", "after (step 3, n = 3)"}
    assert labels <= set(read.texts("text"))
    assert "These metrics never changed and have no curve: nonfinite 0." in read.texts("p")
    assert read.texts("summary") == ["All metrics", "Run", "Settings: config.yaml of mine"]
    assert ["kl_target" in text for text in read.texts("details")] == [False, False, True]
    # Samples stand beside what was said to the same prompt before.
    columns = [f"{name}, step {step}" for step in (0, 3) for name in ("response", "score")]
    assert read.texts("th")[:5] == ["prompt", *columns]
    rows = [
        ["a", "b↵\nc", "1", "again", "3"],
        ["a", HOSTILE, "2", "second", "5"],
        ["d", "NaN", "1", "NaN", "3"],
    ]
    assert read.texts("td")[:15] == [*itertools.chain(*rows)]
    meaning = "Mean score of the responses, before any penalty."
    assert after(read.texts("td"), "objective/score", 3) == ["1", "4", meaning]


def test_the_same_run_gives_the_same_bytes(tmp_path, undrawn):
    run = write_run(tmp_path / "run")
    for i in range(2):
        page.write([run], tmp_path / f"{i}.html")
    assert (tmp_path / "0.html").read_bytes() == (tmp_path / "1.html").read_bytes()


def test_three_samples_and_four_curves_are_shown_and_the_others_folded(tmp_path, undrawn):
    metrics = {name: [1.0, 2.0] for name in "abcdef"}
    rows = [{"prompt": f"\np{i}\n", "response": "r"} for i in range(20)]
    samples = {0: rows, 2: rows[:1], 3: rows}
    run, other = (
        write_run(tmp_path / name, samples=samples, metrics=metrics, settings={"model": name})
        for name in ("run", "other")
    )
    read = read_page(tmp_path, run)
    assert read.texts("th")[1:3] == ["response, step 0", "response, step 3"]
    prompts = [text for text in read.texts("td") if text[1:].isdigit()]
    assert prompts == [f"p{i}" for i in range(8)]
    assert read.texts("h3") == [*"abcdef"]
    [curves, answers, *_] = read.texts("details")
    assert "The other curves (2)" in curves
    assert curves.split()[-2:] == ["e", "f"]
    assert ["p2" in answers, "p3" in answers] == [False, True]
    both = read_page(tmp_path, run, other)  # of each of several groups one is shown
    prompts = [text for text in both.texts("td") if text[1:].isdigit()]
    assert prompts[:3] == ["p0", "p0", "p1"]


SCORE = "Validation score 1.5 (of iteration 0, n = 2 held-out prompts)"
KL = f"{SCORE} in 3 iterations, KL 1.5 of 2 nats"
FAR = {"step": 3, "name": "far", "rule": "far: log", "message": "objective/kl is 3 > 2"}
VERDICTS = {
    "finished": f"{KL}, no alert.",
    "killed": f"Not finished: the last record is of iteration 3 of 9. {KL}, no alert.",
    "stop": f"Stopped after iteration 3 of 9 by the alert 'far'. {KL}, 1 alert: far.",
    "failed": "Failed in iteration 3 of 9: the loss or the gradient was not finite. "
    f"{KL}, no alert.",
    "begun": "Not finished: the last record is of iteration 0 of 9. 0 iterations, no alert.",
    "sft": "Not finished: the last record is of step 3. 3 steps, no alert.",
    "log": f"Not finished: the last record is of iteration 3 of 9. {KL}, 1 alert: far.",
}


@pytest.mark.parametrize("state", VERDICTS)
def test_the_page_says_first_what_came_of_the_run(state, tmp_path):
    metrics = {} if state == "begun" else METRICS
    if state == "failed":
        metrics = METRICS | {"nonfinite": [0.0, 0.0, 1.0]}
    settings = {"rl": {"kl_target": 2.0, "num_iterations": 9}}
    is_done = state == "finished"
    stage = "sft" if state == "sft" else "ppo"
    given = {"stage": stage, "settings": settings, "metrics": metrics}
    given |= {"samples": {}} if state == "sft" else {}
    run = write_run(tmp_path / "run", finished=is_done, **given)
    if state in ("stop", "log"):
        (run / "alerts.jsonl").write_text(json.dumps(FAR | {"action": state}) + "\n")
    assert chapter_of(run)["verdicts"] == {"run": VERDICTS[state]}


def test_each_figure_says_on_how_many_rows_it_rests(tmp_path):
    metrics = {"sft/loss": [1.0, 0.5], "validation/loss": [2.0, 1.0], "validation/rows": [54, 54]}
    given = {"stage": "sft", "settings": {"sft": {"batch_size": 8}}, "samples": {}}
    run = write_run(tmp_path / "run", metrics=metrics, **given)
    chapter = chapter_of(run)
    numbers = [tile.number for tile in chapter["tiles"]]
    assert numbers == ["n = 54 held-out rows", "n = 8 rows each step", "", ""]
    assert "Validation loss 2 → 1 (n = 54 held-out rows) in 2 steps" in chapter["verdicts"]["run"]
    assert "n = 8 rows each step" in chapter["metrics"].note
    assert "n = 54 held-out rows" in chapter["metrics"].note
    twice = [write_run(tmp_path / f"{i}", seed=i, metrics=metrics, **given) for i in range(2)]
    assert "n = 54 held-out rows a run" in next(iter(chapter_of(*twice)["verdicts"].values()))


def training(rows):
    return [row | {"split": "train"} for row in rows]


def test_training_samples_of_rl_stand_by_step_and_are_no_validation(tmp_path):
    rows = [
        {"prompt": "p", "response": f"r{i}", "score": i / 2, "reward/a": 0.25} for i in range(4)
    ]
    samples = {1: training(rows[:2]), 2: training(rows[1:3]), 3: training(rows[2:])}
    settings = {"rl": {"temperature": 0.7}}
    run = write_run(tmp_path / "run", samples=samples, settings=settings)
    chapter = chapter_of(run)
    assert [table.title for table in chapter["samples"]] == [
        f"Training samples of iteration {step}" for step in (1, 3)
    ]
    first, last = chapter["samples"]
    assert first.columns == ["prompt", "response, step 1", "score, step 1", "reward/a, step 1"]
    assert first.rows == [["p", "r0", 0.0, 0.25], ["p", "r1", 0.5, 0.25]]
    assert last.rows == [["p", "r2", 1.0, 0.25], ["p", "r3", 1.5, 0.25]]
    assert "No validation" in last.note
    assert "temperature 0.7" in last.note
    assert {plot.title for plot in chapter["distributions"]} == {"Reward against KL"}
    assert chapter["rewarded"] == []


def test_training_samples_stand_before_and_after_and_are_no_validation(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    samples = {
        step: training([pair | {"score_chosen": score, "score_rejected": 1.0}])
        for step, score in ((0, 0.5), (3, 4.0))
    }
    metrics = {"reward_model/loss": [1.0, 0.5, 0.25]}
    run = write_run(tmp_path / "run", stage="reward_model", metrics=metrics, samples=samples)
    chapter = chapter_of(run)
    [table] = chapter["samples"]
    assert table.title == "Training samples before and after"
    assert table.rows == [["p", "c", "r", -0.5, 3.0]]
    assert "No validation: the run trains on these pairs" in table.note
    assert chapter["distributions"] == []


@pytest.mark.parametrize(
    ("num", "shares", "said"),
    [
        (4, (0.5, 1.0), "4 held-out rows, change -0.1 to 0.85 at 95%: within noise"),
        (400, (0.5, 1.0), "400 held-out rows, change 0.45 to 0.55 at 95%"),
        (400, (0.6, 0.5), "400 held-out rows, change -0.17 to -0.031 at 95%"),
    ],
)
def test_the_verdict_on_a_share_says_on_how_many_rows(num, shares, said, tmp_path):
    """Newcombe's interval of 4 rows by hand: Wilson's of 2 of 4 are .15 to .85, those of 4 of 4 .51
    to 1, and .5 - sqrt(.49^2 + .35^2) = -.10, .5 + .35 = .85.
    """
    metrics = {"validation/accuracy": shares, "validation/rows": [num, num]}
    run = write_run(tmp_path / "run", stage="dpo", metrics=metrics, samples={})
    before, after = shares
    expected = f"Validation accuracy {before:.3g} → {after:.3g} ({said}) in 2 steps, no alert."
    assert chapter_of(run)["verdicts"] == {"run": expected}
    again = write_run(tmp_path / "again", stage="dpo", metrics=metrics, samples={}, seed=6)
    [of_two] = chapter_of(run, again)["verdicts"].values()
    assert "noise" not in of_two
    assert "mean of 2 runs" in of_two


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        # Differences 1, 2, 0: mean 1, sd 1, and 4.303 / sqrt(3) is 2.484.
        ("0 1 2", "1 3 2", "3 held-out prompts (few), change -1.5 to 3.5 at 95%: within noise"),
        ("0.0 0.5 1.0", "1 1.6 2", "3 held-out prompts (few), change 0.89 to 1.2 at 95%"),
        # All better: Wilson's interval of 4 of 4 is .51 to 1; a change is twice that less 1.
        ("0 0 0 0", "1 1 1 1", "4 held-out prompts, change 0.02 to 1 at 95%"),
        ("0 2 0 0", "1 3 1 1", "4 held-out prompts, each changed by 1"),  # no shares: no spread
        ("2 0 " * 10, "3 0 " * 10, "20 held-out prompts, change 0.26 to 0.74 at 95%"),  # not few
        ("0 0", "NaN 1", "n = 2 held-out prompts"),  # one prompt is left to compare
    ],
)
def test_the_verdict_on_a_score_compares_the_answers_to_a_prompt(before, after, said, tmp_path):
    """Each prompt has two responses, of which the mean counts."""

    def rows(scores):
        return [
            {"prompt": f"p{i}", "response": "r", "score": float(score) + more}
            for more in (0.0, 0.0)
            for i, score in enumerate(scores.split())
        ]

    metrics = {"objective/score": [1.0], "validation/score": [2.0]}
    run = write_run(tmp_path / "run", metrics=metrics, samples={0: rows(before), 1: rows(after)})
    expected = f"Validation score 1.5 → 2 ({said}) in 1 iteration, no alert."
    assert chapter_of(run)["verdicts"] == {"run": expected}


MARGINS = {
    "dpo": "margin 0.0007 nats, moved 0.0004 nats an answer, samples: 1 of 3 changed, no alert",
    "simpo": "margin 0.0007 nats a token, ",
    "normalised": "margin 0.0007 nats a token, ",
    "kto": "margin 0.0007 nats, moved 0.0004 nats an answer, samples: 1 of 3 changed, ",
    "reward_model": "margin 3 in score, moved 0.0004 in score, no alert",
}


@pytest.mark.parametrize("how", MARGINS)
def test_an_accuracy_has_its_margin_its_scale_and_what_moved(how, tmp_path):
    """Of the three prompts that both ask one gets another answer; the last one is new."""
    metrics = {
        "validation/accuracy": [0.5, 0.75],
        "validation/rows": [400, 400],
        "validation/length_accuracy": [0.625, 0.625],
        "validation/log_ratio_margin": [0.0, 0.0007],
        "validation/margin": [0.0, 3.0],
        "validation/moved": [0.0, 0.0004],
    }
    stage = how if how in ("kto", "reward_model") else "dpo"
    own = {"kind": "simpo"} if how == "simpo" else {"length_normalised": how == "normalised"}
    said = [{"a": "x", "b": "y", "c": "w"}, {"a": "z", "b": "y", "c": "w", "d": "v"}]
    samples = {
        step: [{"prompt": prompt, "response": text} for prompt, text in of_step.items()]
        for step, of_step in enumerate(said)
    }
    given = {"settings": {"dpo": own}, "metrics": metrics, "samples": samples}
    run = write_run(tmp_path / "run", stage=stage, **given)
    [verdict] = chapter_of(run)["verdicts"].values()
    assert "400 held-out rows, change 0.18 to 0.31 at 95%, 0.625 by the longer answer" in verdict
    assert MARGINS[how] in verdict


def test_a_policy_has_the_share_of_answers_that_ended_and_a_caution_if_all_are_masked(tmp_path):
    metrics = METRICS | {"response/masked": [2.0, 4.0, 3.0], "response/eos_fraction": [0.5] * 3}
    metrics |= {"response/length": [1.0, 2.0, 3.0], "grad_norm": [1.0] * 3, "lr": [0.0, 1.0, 1.0]}
    run = write_run(tmp_path / "run", settings={"rl": {"batch_size": 4}}, metrics=metrics)
    chapter = chapter_of(run)
    assert "samples" not in chapter["verdicts"]["run"]  # they are drawn
    number = "n = 4 responses each iteration"
    assert ("Answers that ended", "0.5", "", number) in chapter["tiles"]
    [caution] = chapter["cautions"]["run"]
    assert "in 1 of 3 iterations rl.mask_truncated masked every response" in caution


ROWS = {"read": 5, "dropped": {"empty": 1, "too long": 2}, "cut": {"response cut": 4}}
UNTOUCHED = {"read": 5, "dropped": {}, "cut": {}}
CAUTIONS = [
    ({"lr": [0.0, 0.0]}, UNTOUCHED, "learning rate was 0 in each step"),
    ({"lr": [0.0, 1e-9]}, UNTOUCHED, None),  # a warm-up
    ({"grad_norm": [0.0, 0.9e-8, 1.0]}, UNTOUCHED, "gradient was 0 in 2 of 3 steps"),
    ({"grad_norm": [0.0, 1.1e-8]}, UNTOUCHED, None),
    ({"lr": [1.0]}, ROWS, "3 of 5 answers dropped (2 too long, 1 empty), 4 texts: response cut"),
    ({"lr": [1.0]}, ROWS | {"read": 6}, None),
]


@pytest.mark.parametrize(("metrics", "rows", "said"), CAUTIONS)
def test_a_run_that_cannot_have_learned_says_so(metrics, rows, said, tmp_path):
    run = write_run(tmp_path / "run", stage="sft", metrics=metrics, samples={})
    change(run, rows=rows)
    found = chapter_of(run)["cautions"]["run"]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    assert all(caution in " ".join(read_page(tmp_path, run).texts("p")) for caution in found)


def judged(scores, judges):
    """Metrics and samples of two validations, of these scores of each prompt in both."""
    both = {"score": scores, "judge": judges}
    metrics = {f"validation/{name}": [float(np.mean(v)) for v in by] for name, by in both.items()}
    samples = {
        step: [
            {"prompt": f"p{i}", "response": "r", "score": score, "judge": judge}
            for i, (score, judge) in enumerate(zip(scores[step - 1], judges[step - 1], strict=True))
        ]
        for step in (1, 2)
    }
    return {"metrics": metrics, "samples": samples}


def test_a_judge_stands_first_whatever_its_value_and_its_curve_is_open(tmp_path):
    """Of four changes of 0 among shares, Korn and Graubard's interval of .5 is that of 8 rows."""
    low, high = metrics.share_interval(np.full(4, 0.5))
    change = f"4 held-out prompts, change {2 * low - 1:.2g} to {2 * high - 1:.2g} at 95%"
    given = judged([[1.0, 2.0, 1.0, 2.0], [2.0, 3.5, 2.0, 3.5]], [[0.0] * 4, [0.0] * 4])
    given["metrics"] |= {"objective/kl": [0.0, 0.5], "objective/score": [1.0, 2.0]}
    chapter = chapter_of(write_run(tmp_path / "run", **given))
    [verdict] = chapter["verdicts"].values()
    said = f"Judge 0 → 0 ({change}: within noise), validation score 1.5 → 2.75 (4 held-out"
    assert verdict.startswith(said)
    assert ("Judge", "0 → 0", f"{change}: within noise", "") in chapter["tiles"]
    shown = [plot.title.partition(": ")[2] for plot in chapter["curves"]]
    assert shown == ["objective/score", "validation/judge", "objective/kl"]
    assert chapter["constant"] == {}
    [table] = chapter["samples"]
    assert list(table.columns[1:4]) == ["response, step 1", "score, step 1", "judge, step 1"]
    assert table.formats["judge, step 1"] == ".3g"


@pytest.mark.parametrize(
    ("score", "judge", "said"),
    [
        (1.0, 0.0, "judge did not rise"),
        (1.0, -1.0, "judge fell"),
        (1.0, 1.0, None),
        (0.0, -1.0, None),
    ],
)
def test_a_score_that_rises_without_the_judge_is_said(score, judge, said, tmp_path):
    first = np.arange(20.0) % 3
    noise = np.tile([0.1, -0.1], 10)  # of a mean of 0 and an interval of .05 around it
    rows = [(list(first), list(first + change + noise)) for change in (score, judge)]
    found = chapter_of(write_run(tmp_path / "run", **judged(*rows)))["cautions"]["run"]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


@pytest.mark.parametrize(
    ("correlations", "size", "said"),
    [
        ([-0.85, -0.8, -0.3, 0.0], 32, "shorter answers score higher (correlation -0.82)"),
        ([0.0, 0.0, 0.78, 0.84], 32, "longer answers score higher (correlation 0.81)"),
        ([-0.9, -0.6, 0.0, 0.0], 32, None),  # the mean over 64 answers is -.75
        ([-0.9, -0.9, -0.9], 16, None),  # of 48 answers alone
        ([0.9, 0.0], 64, "longer answers score higher (correlation 0.90)"),
        ([math.nan, -0.9], 64, "shorter answers score higher"),
    ],
)
def test_a_score_that_length_alone_explains_is_said(correlations, size, said, tmp_path):
    settings = {"rl": {"batch_size": size}}
    given = {"reward/length_correlation": correlations}
    run = write_run(tmp_path / "run", settings=settings, metrics=given, samples={})
    found = chapter_of(run)["cautions"]["run"]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


@pytest.mark.parametrize(
    ("accuracy", "longer", "num", "said"),
    [
        (1.0, 0.0, 20, "the shorter answer is right in 100% of the 20"),
        (0.72, 0.667, 300, "the longer answer is right in 67%"),
        (0.8, 0.667, 300, None),  # .133 above, of which .07 are noise
        (0.6, 0.55, 20, None),  # nor is the rule above a coin
        (0.3, 0.9, 20, "the longer answer is right in 90%"),
    ],
)
@pytest.mark.parametrize("kind", ["", "pairwise_"])
def test_an_accuracy_that_length_alone_explains_is_said(
    kind, accuracy, longer, num, said, tmp_path
):
    """Of a ranking the pairs count: the best answer may be right, and the longest, by chance."""
    given = {f"validation/{kind}accuracy": accuracy, f"validation/{kind}length_accuracy": longer}
    others = {"validation/accuracy": 0.9, "validation/length_accuracy": 0.9} if kind else {}
    given = {name: [value] for name, value in (others | given | {"validation/rows": num}).items()}
    run = write_run(tmp_path / "run", stage="reward_model", metrics=given, samples={})
    found = chapter_of(run)["cautions"]["run"]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


@pytest.mark.parametrize(
    ("ended", "masked", "said"),
    [
        ([1.0, 0.02], 0.0, "98% of the last answers did not end"),
        ([0.0, 0.12], 0.0, None),
        ([1.0, 0.0], 4.0, "masked every response"),  # and no word of a score
    ],
)
def test_answers_that_nearly_all_are_cut_are_said(ended, masked, said, tmp_path):
    metrics = {"response/eos_fraction": ended, "response/masked": [masked] * 2}
    settings = {"rl": {"batch_size": 64 if not masked else 4}}
    run = write_run(tmp_path / "run", settings=settings, metrics=metrics, samples={})
    found = chapter_of(run)["cautions"]["run"]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_nothing_is_cut_at_the_width_of_a_phone(tmp_path):
    """With two rewards, one of a long name, a value that hardly changes, and all that is folded."""
    name = "reward/a_function_with_a_name_as_long_as_those_that_people_write_for_a_reward"
    values = {"value/return_variance": [1.0, 1.0 + 1e-7, 1.0], name: [1.0, 2.0, 3.0]}
    rows = [{"prompt": "p", "response": "said", "score": 1.5, "reward/b": 0.5, name: 1.0}] * 4
    run = write_run(tmp_path / "run", metrics=METRICS | values, samples={0: rows, 3: rows})
    page.write([run], tmp_path / "out.html")
    with browsing.chromium() as browser:
        phone = {"width": 390, "height": 844}
        opened, errors = browsing.opened(browser, (tmp_path / "out.html").as_uri(), phone)
        opened.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        assert opened.evaluate(CUT) == []
        assert errors == []


# The texts that stand outside of the window, or of their figure.
CUT = """[...document.querySelectorAll("main *")].filter(node => {
    const box = node.getBoundingClientRect(), svg = node.closest("svg");
    const edge = svg ? svg.getBoundingClientRect() : new DOMRect(0, -1e9, innerWidth, 2e9);
    return node.textContent.trim() && box.width && node.localName != "g" &&
        (box.left < edge.left - 1 || box.right > edge.right + 1 ||
         box.top < edge.top - 1 || box.bottom > edge.bottom + 1);
}).map(node => `${node.localName}: ${node.textContent.trim().slice(0, 60)}`)"""


def test_the_console_ends_with_the_cautions(tmp_path, capsys, pages, undrawn):
    run = write_run(tmp_path / "run", stage="sft", metrics={"lr": [0.0]}, samples={})
    saving._draw_page(SimpleNamespace(path=run, report=run / "report.html"))
    *_, verdict, caution = capsys.readouterr().out.splitlines()
    assert verdict == "1 step, no alert."
    assert caution.startswith("caution: the learning rate was 0")


def test_the_rows_that_were_dropped_stand_in_the_verdict_most_frequent_reasons_first(tmp_path):
    run = write_run(tmp_path / "run", stage="sft", metrics={"sft/loss": [1.0, 0.5]}, samples={})
    dropped = {"a": 1, "b": 5, "c": 2, "d": 4, "e": 3}
    change(run, rows={"read": 40, "dropped": dropped, "cut": {}})
    chapter = chapter_of(run)
    said = "15 of 40 answers dropped (5 b, 4 d, 3 e, 3 for other reasons)"
    assert chapter["verdicts"] == {"run": f"Loss 1 → 0.5 in 2 steps, {said}, no alert."}
    assert chapter["facts"].values["data"] == said
    assert chapter["cautions"] == {"run": []}


def test_three_rewarded_answers_stand_beside_the_verdict(tmp_path):
    def rewarded(name, *pairs):
        rows = [{"prompt": "3 + 4?", "response": text, "score": score} for text, score in pairs]
        samples = {0: [{"prompt": "", "response": "old", "score": 9.0}], 3: rows}
        run = write_run(tmp_path / name, samples=samples)
        return chapter_of(run)["rewarded"]

    many = rewarded("many", ("3 + 4 =", 1.0), ("8", 0.0), ("7", 1.0), ("7", 1.0), ("x" * 200, 0.5))
    shown = f"'... {'x' * 100}' (score 0.5, to '3 + 4?')"
    assert many == [f"{text!r} (score 1, to '3 + 4?')" for text in ("3 + 4 =", "7")] + [shown]
    assert rewarded("none", ("8", 0.0), ("9", 0.0)) == []
    assert len(rewarded("all", ("8", 1.0), ("9", 1.0), ("10", 1.0), ("11", 1.0))) == 3


def test_the_verdict_and_the_title_of_seeds_are_those_of_their_means(tmp_path):
    runs = []
    for seed, values in enumerate(([1.0, 2.0, 4.0], [3.0, 4.0, 6.0])):
        metrics = {"dpo/accuracy": values}
        settings = {"dpo": {"validation_data": ["held.json"]}}
        given = {"seed": seed, "settings": settings, "metrics": metrics, "samples": {}}
        run = write_run(tmp_path / f"{seed}", stage="dpo", **given)
        change(run, data={"model": "0", "prompts.json": "1", "held.json": "2"})
        runs.append(run)
    chapter = chapter_of(*runs)
    expected = "Accuracy 2 → 5 in 3 steps, mean of 2 runs, no alert."
    assert list(chapter["verdicts"].values()) == [expected]
    assert chapter["title"] == "DPO trained on prompts.json, 2 runs of 2 seeds"
    change(runs[1], seed=0)
    assert chapter_of(*runs)["title"].endswith(", 2 runs of 1 seed")


def test_a_reward_is_in_the_title_and_what_python_gave_is_not_in_the_command(tmp_path):
    settings = {"reward": ["runs/q/reward_model/model", "length:20*-0.05"]}
    run = write_run(tmp_path / "run", settings=settings)
    change(run, given={"reward": "mine"})
    chapter = chapter_of(run)
    assert chapter["title"] == "PPO rewarded by reward_model and length:20*-0.05"
    assert chapter["commands"] == [COMMAND]


def test_alerts_and_an_evaluation_are_listed(tmp_path, undrawn):
    run = write_run(tmp_path / "run")
    alert = FAR | {"step": 2, "action": "log"}
    (run / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    ends = {"value": 0.5, "low": 0.25, "high": 0.75}
    row = {"category": "quality", "metric": "win rate", **ends, "n": 8}
    (run / "evaluation.json").write_text(json.dumps({"rows": [row]}))
    cells = read_page(tmp_path, run).texts("td")
    assert after(cells, "far", 3) == ["far: log", "log", "objective/kl is 3 > 2"]
    numbers = ["0.500", "0.250", "0.750", "8", "–", "–"]
    assert after(cells, "quality", 7) == ["win rate", *numbers]
    [score, kl] = plots.curves(groups_of(run))[0]
    assert "alert" not in score.series
    assert kl.series["alert"][:2] == ((2,), (0.5,))


def test_long_words_are_broken_and_short_ones_are_not(tmp_path):
    """A word of 20,000 letters made the page 217,696 pixels wide."""
    word = "x" * 25
    lines = [[word, 0, None], [word[1:], 10**24, None]]
    table = page.Table("t", [word, "n", "none"], lines, {"n": "d"})
    text = page.render("t", [page.Gates({word: (True, word), "kl": (True, "1 < 2")}), table])
    style, _, body = text.partition("</style>")
    [rule] = re.findall(r"^body \{[^}]*\}", style, re.MULTILINE)
    assert "overflow-wrap: anywhere" in rule
    unbroken = re.findall(r"([^\n{}]*) \{[^}]*(?:nowrap|overflow-wrap: normal)", style)
    assert [name for name in unbroken if "short" not in name] == []
    assert ".short" in unbroken
    assert ".wide .number.short" in style.partition("@media (max-width")[2]  # cards, one a row
    cells = re.findall(r"<t[dh]([^>]*)>([^<]*)<", body)
    shorts = [content for attributes, content in cells if "short" in attributes]
    assert shorts == ["✓ pass", "✓ pass", "kl", "n", "none", "0", "–", word[1:], "–"]
    numbers = [content for attributes, content in cells if "number" in attributes]
    assert numbers == ["n", "0", str(10**24)]


@pytest.mark.parametrize("ys", [[1e308, -1e308], [1.0, 1.7e308], [-math.inf, 3e38]])
def test_numbers_too_large_for_axes_are_gaps(ys):
    """A reward that returned 1e308 left a run without its report."""
    plot = figures.Plot("t", "step", "y", {"a": ([0, 1], ys), "b": ([0, 1], [1, 2])})
    assert "<svg" in figures.element(plot, "1")
    drawn = [y for y in ys if abs(y) < 1e300]
    assert np.isfinite(plot.shown["a"].y).sum() == len(drawn) if drawn else "a" not in plot.shown


def test_what_is_missing_is_said(tmp_path):
    metrics = {"objective/reward": [1.0]}
    run = write_run(
        tmp_path / "run",
        metrics=metrics,
        samples={},
        finished=False,
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    (run / "timing.jsonl").unlink()
    read = read_page(tmp_path, run)
    assert {
        "Reward against KL: no run has measured a KL (rl.kl_coef is 0) or finished an iteration.",
        "Histograms and samples before and after: no validation has written texts.",
        "No validation: nothing was held out, or no validation has been reached.",
        "run: the last line of metrics.jsonl is incomplete and was skipped.",
    } <= set(read.texts("p"))
    assert "–" in read.texts("dd")  # seconds of a step
    assert read.all("svg") == []
    begun = write_run(tmp_path / "begun", metrics={}, samples={0: SAMPLES[0]})
    [samples] = chapter_of(begun)["samples"]
    assert samples.columns == ["prompt", "response, step 0", "score, step 0"]


# --- Curves


def test_every_metric_has_a_curve_and_validation_stands_with_its_training(tmp_path):
    members = [
        ["dpo/accuracy", "validation/accuracy"],
        ["mine/new"],
        ["reward/a", "validation/reward/a"],
        ["validation/other"],
    ]
    metrics = {name: [1.0, 2.0] for name in itertools.chain(*members)}
    metrics["dpo/accuracy"] = [math.nan, 0.5]
    run = write_run(
        tmp_path / "run",
        stage="dpo",
        metrics=metrics,
        samples={},
    )
    curves, constant = plots.curves(groups_of(run))
    assert [list(plot.series) for plot in curves] == members
    labels = [("step", "share of pairs", {"equal log-ratios": 0.5}), ("step", "new", {})]
    assert [(plot.x_label, plot.y_label, plot.lines) for plot in curves[:2]] == labels
    assert constant == {}
    assert figures.notes(curves[0])[1:] == ["dpo/accuracy: 1 of 2 values not finite, not drawn."]
    [_, kl] = plots.curves(groups_of(write_run(tmp_path / "ppo")))[0]
    assert kl.lines == {"target": 2.0}


def test_long_curves_stay_small_and_long_paths_are_means_over_stretches(tmp_path):
    values = list(map(float, range(2500)))
    metrics = {"objective/score": values, "objective/kl": values}
    groups = groups_of(write_run(tmp_path, metrics=metrics, samples={}))
    line = plots.curves(groups)[0][1].series["objective/kl"]
    assert (line.y[:2].tolist(), line.x[-1], line.y[-1], len(line.y)) == ([0, 1], 2500, 2499, 2500)
    noise = figures.Plot("p", "x", "y", {"a": (range(20000), np.sin(np.arange(20000.0) ** 2))})
    assert len(figures.svg(noise)) < 200_000  # matplotlib leaves out what no pixel shows
    plot = plots.reward_against_kl(groups)
    assert plot.note == "Numbers count iterations. Each point is the mean of up to 42."
    [path] = plot.series.values()
    assert (path.x[0], path.y[0], len(path.x)) == (20.5, 20.5, 60)
    assert path.labels[:11] == ["22", *[""] * 9, "442"]


# --- Several runs


def test_seeds_are_a_mean_with_a_band_over_the_steps_that_all_have(tmp_path, undrawn):
    scores = {0: [1.0, 2.0, 4.0], 1: [3.0, 2.5]}
    runs = [
        write_run(tmp_path / f"ppo-seed{seed}", seed=seed, metrics={"objective/score": values})
        for seed, values in scores.items()
    ]
    [group] = groups_of(*runs)
    assert group.name == "ppo (n = 2)"
    [plot] = plots.curves([group])[0]
    assert list(plot.series) == ["objective/score", "validation/score"]
    line = plot.series["objective/score"]
    expected = [
        [1, 2],
        [2, 2.25],
        [1, 2],
        [3, 2.5],
    ]
    np.testing.assert_array_equal([line.x, line.y, line.low, line.high], expected)
    [scores, _] = plots.distributions([group])
    heights = {name: line.y.tolist() for name, line in scores.series.items()}
    assert heights == {  # two runs of three samples
        "before (step 0, n = 6)": [0, 4, 2, 0, 0, 0, 0],
        "after (step 3, n = 6)": [0, 0, 0, 4, 0, 2, 0],
    }
    read = read_page(tmp_path, *runs)
    ends = "The runs of ppo (n = 2) end at steps [2, 3]; their curves show the steps that all have."
    assert ends in read.texts("p")
    assert after(read.texts("td"), "group", 2) == ["ppo (n = 2)"] * 2


def test_groups_are_compared_by_what_differs(tmp_path):
    def run(name, clip, target, **more):
        parts = {
            "ppo": {"clip": clip, "epochs": 4},
            "dpo": {"beta": clip},
            "data": [],
        }
        settings = parts | {"rl": {"kl_target": target, "same": 1}}
        return write_run(tmp_path / name, settings=settings, **more)

    folders = [run("a", 0.2, 1.0, seed=1), run("b", 0.2, 1.0, seed=2), run("c", None, 2.0)]
    folders.append(
        run(
            "d",
            0.1,
            3.0,
            stage="mine",
        )
    )  # an algorithm from outside
    groups = groups_of(*folders)
    members = [[record.name for record in group.records] for group in groups]
    assert members == [["a", "b"], ["c"], ["d"]]
    chapter = chapter_of(*folders)
    assert chapter["title"] == "PPO, MINE: 4 runs compared"
    assert chapter["differences"] == [  # dpo.beta is no setting of these stages
        ["stage", "ppo", "ppo", "mine"],
        ["ppo.clip", "0.2", "null", "(none)"],
        ["rl.kl_target", "1.0", "2.0", "3.0"],
    ]
    [curve, kl] = plots.curves(groups)[0]
    assert kl.lines == {}
    looks = {name: (line.color, line.style) for name, line in curve.series.items()}
    assert looks == {
        f"{name}{more}": (color, style)
        for color, name in enumerate(("a (n = 2)", "c", "d"))
        for style, more in enumerate(("", ", validation"))
    }
    [first, *_] = chapter["samples"]
    assert first.title == "Samples before and after: a"


def test_a_folder_of_runs_is_its_stages_one_after_another(tmp_path, undrawn):
    for stage in ("ppo", "sft", "reward_model"):
        write_run(
            tmp_path / "pipeline" / stage,
            stage=stage,
            metrics={"loss": [1.0]},
            samples={},
        )
    (tmp_path / "pipeline" / "data").mkdir()
    read = read_page(tmp_path, tmp_path / "pipeline")
    stages = ["Supervised fine-tuning", "Reward model", "PPO"]
    assert read.texts("h1") == [f"{', '.join(stages)}: 3 runs"]
    assert read.texts("h2") == [f"{stage} trained on prompts.json" for stage in stages]
    assert page.default_path([tmp_path / "pipeline"]) == tmp_path / "pipeline" / "stages.html"


def test_names_are_distinct_and_paths_within_a_pipeline_no_difference(tmp_path):
    for seed, name in enumerate(("one", "two")):
        outer = tmp_path / name
        settings = {"model": f"{outer}/sft/model", "reward": ["count:e", f"{outer}/rm/model"]}
        for stage in ("sft", "ppo"):
            write_run(
                outer / stage,
                stage=stage,
                seed=seed,
                settings=settings,
            )
    found = records.find([tmp_path / "one", tmp_path / "two" / "ppo", tmp_path / "two" / "sft"])
    assert [record.name for record in found] == ["one/ppo", "one/sft", "two/ppo", "two/sft"]
    # The second pipeline's stages, given alone, started from its models.
    assert len(records.groups(found)) == 4
    assert len(groups_of(tmp_path / "one", tmp_path / "two")) == 2


# --- Reward models


def test_a_reward_models_page(tmp_path, undrawn):
    def pairs(*margins):
        texts = {"chosen": "c", "rejected": "r", "score_rejected": 1.0}
        return [
            texts | {"prompt": f"p{i}", "score_chosen": margin + 1.0}
            for i, margin in enumerate(margins)
        ]

    metrics = {"reward_model/loss": [0.7, 0.5], "validation/ece": [0.3, 0.125]}
    samples = {0: pairs(-1.0, 0.5), 2: pairs(1.0, 50.0)}
    run = write_run(
        tmp_path / "run",
        stage="reward_model",
        metrics=metrics,
        samples=samples,
    )
    read = read_page(tmp_path, run)
    assert read.texts("h3")[-2:] == ["Margins", "Calibration"]
    [note] = [text for text in read.texts("p", class_="note") if "confidence" in text]
    assert "2 held-out rows, those that samples.jsonl holds of step 2." in note
    assert note.endswith("Expected calibration error over all held-out rows: 0.125.")
    columns = ["prompt", "chosen", "rejected", "margin, step 0", "margin, step 2"]
    assert read.texts("th")[:5] == columns
    assert read.texts("td")[:10] == ["p0", "c", "r", "-1", "1", "p1", "c", "r", "0.5", "50"]


def test_a_reward_model_shows_the_pairs_that_it_gets_wrong(tmp_path):
    def pairs(*margins):
        texts = {"prompt": "p", "rejected": "r", "score_rejected": 0.0}
        return [texts | {"chosen": f"c{m}\n", "score_chosen": m} for m in margins]

    samples = {0: pairs(-9.0), 2: pairs(-0.5, 1.0, -2.0, 0.0, -1.0)}
    settings = {"stage": "reward_model", "metrics": {"reward_model/loss": [1.0]}}
    run = write_run(tmp_path / "run", **settings, samples=samples)
    _, wrong = chapter_of(run)["samples"]
    texts = [["p", f"c{margin}↵\n", "r", margin] for margin in (-2.0, -1.0, -0.5)]
    assert (wrong.title, wrong.rows) == ("Pairs that it gets wrong", texts)
    assert wrong.note.startswith("3 of 5 in samples.jsonl of step 2;")
    many = write_run(tmp_path / "many", **settings, samples={0: pairs(*range(-20, 1))})
    [_, wrong] = chapter_of(many)["samples"]
    assert ([row[-1] for row in wrong.rows], wrong.note[:8]) == ([*range(-20, -12)], "20 of 21")
    right = write_run(tmp_path / "right", **settings, samples={0: pairs(0.0, 1.0)})
    assert [table.title for table in chapter_of(right)["samples"]] == ["Samples"]


def test_the_answers_of_a_policy_stand_beside_those_of_the_data(tmp_path):
    def rows(text, ratio, **more):
        return [{"prompt": "p", "answer": "a\n", **more, "response": text, "log_ratio": ratio}]

    samples = {0: rows("old", 0.0), 4: rows("new", -2.5)}
    settings = {"stage": "dpo", "metrics": {"dpo/loss": [0.7]}}
    [table] = chapter_of(write_run(tmp_path / "dpo", **settings, samples=samples))["samples"]
    ends = [f"{name}, step {step}" for step in (0, 4) for name in ("response", "log_ratio")]
    assert table.columns == ["prompt", "answer", *ends]
    assert table.rows == [["p", "a↵\n", "old", 0.0, "new", -2.5]]
    assert table.formats == {name: ".3g" for name in ends if "ratio" in name}
    samples = {0: [{"prompt": "p", "answer": "a", "response": "r"}]}  # SFT has no reference
    [table] = chapter_of(write_run(tmp_path / "sft", samples=samples))["samples"]
    assert (table.columns, table.rows) == (
        ["prompt", "answer", "response, step 0"],
        [["p", "a", "r"]],
    )
    samples = {0: rows("r", 1.0, desirable=False)}
    [table] = chapter_of(write_run(tmp_path / "kto", samples=samples))["samples"]
    assert table.rows == [["p", "a↵\n", False, "r", 1.0]]


def test_a_reward_model_with_targets(tmp_path):
    samples = {
        step: [
            {"prompt": "p", "response": text, "target": target, "score": target + step}
            for text, target in (("x", 0.0), ("y", 1.0))
        ]
        for step in (0, 1)
    }
    metrics = {"reward_model/loss": [1.0]}
    run = write_run(
        tmp_path / "run",
        stage="reward_model",
        metrics=metrics,
        samples=samples,
    )
    chapter = chapter_of(run)
    [samples] = chapter["samples"]
    assert samples.rows == [["p", "x", 0.0, 0.0, 1.0], ["p", "y", 1.0, 1.0, 2.0]]
    [scores, plot] = chapter["distributions"]
    assert (scores.title, plot.title) == ("Scores", "Score against target")
    assert plot.series["responses"][:2] == ((0.0, 1.0), (1.0, 2.0))


# --- Folders and files


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
    save_file({}, run / "model" / member / "model.safetensors")
    (run / "model" / member / "config.json").write_text('{"reward_shift": 0.5}' if shift else "{}")
    card = (export.export(run, tmp_path / "card") / "README.md").read_text("utf-8")
    for part in (kind, "# card\n", "Seed 5. Versions: jax 0.10.2. Devices: 2 x cpu.\n"):
        assert part in card
    assert ("reward_shift" in card) == shift != ("apply_chat_template" in card)
    assert ("model.generate(**inputs, max_new_tokens=7)" in card) != shift


@pytest.mark.parametrize("linked", ["generation_config.json", "member_1", ""])
def test_no_link_of_a_strangers_model_is_exported(linked, tmp_path):
    run = write_run(tmp_path / "run")
    tokenizers.characters("ab").save(run / "model")
    place = run / "model" / linked
    if not linked:
        place.rename(tmp_path / "elsewhere")
        place = run / "model"
    (tmp_path / "secret").mkdir()
    names = {"": "elsewhere", "member_1": "secret"}
    place.symlink_to(tmp_path / names.get(linked, "run/model/config.json"))
    with pytest.raises(UserError, match="symbolic link"):
        export.export(run, tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_a_run_twice_and_no_place_for_the_page(tmp_path):
    run = write_run(tmp_path / "run", metrics={}, samples={})
    with pytest.raises(UserError, match="given twice"):
        page.write([run, tmp_path / "run" / ".." / "run"], tmp_path / "out.html")
    with pytest.raises(UserError, match=r"out\.html: .*No such file"):
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
    with pytest.raises(UserError, match="no such file"):
        records.read_rows(tmp_path / "other.jsonl")


CONFIG = """model: gpt2
sft:
  batch_size: 4
reward_model:
  optimizer:
    b1: 0.9
rl:
  max_new_tokens: 8
  kl_coef: 0.1
  temperature: 1.0
ppo:
  value: shared
grpo:
  group_size: 8
lora:
  rank: 0
"""


RL = "rl.max_new_tokens rl.kl_coef rl.temperature"


@pytest.mark.parametrize(
    ("stage", "read"),
    [
        ("sft", "sft.batch_size"),
        ("reward_model", "reward_model.optimizer.b1 rl.max_new_tokens rl.temperature"),
        ("ppo", f"{RL} ppo.value"),
        ("mine", RL),  # an algorithm from outside
    ],
)
def test_a_model_card_has_the_settings_that_its_stage_reads(stage, read):
    shown = yaml.safe_load(export.own_settings(CONFIG, stage))
    assert [*manifest.dotted(shown)] == ["model", *read.split(), "lora.rank"]
