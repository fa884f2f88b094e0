"""The experiment of six stages: its data, and how its numbers are put together."""

import json

import learning
import numpy as np
import peers
import pytest

from rlhf_jax.config import RunConfig, parse
from rlhf_jax.errors import UserError

SIZES = learning.Sizes(largest=4, held_out=6)


def test_no_held_out_sum_is_trained_on(tmp_path):
    learning.write_data(tmp_path, SIZES)
    for kind in ("rows", "pairs", "few_pairs", "prompts"):
        train, held_out = (
            {row["prompt"] for row in json.loads((tmp_path / f"{part}_{kind}.json").read_text())}
            for part in ("train", "held_out")
        )
        assert len(train) == 10
        assert len(held_out) == 6
        assert not train & held_out


def test_a_folder_keeps_its_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(learning.smollm2, "write_model", lambda folder: None)
    learning.prepare(tmp_path, SIZES)
    written = (tmp_path / "train_rows.json").read_bytes()
    learning.prepare(tmp_path, SIZES)
    with pytest.raises(UserError, match=r"held_out=6.* asked for .*held_out=8"):
        learning.prepare(tmp_path, SIZES._replace(held_out=8))
    assert (tmp_path / "train_rows.json").read_bytes() == written


def test_pairs_are_the_right_number_and_different_ones_near_it():
    rows = learning.problems(SIZES)[:4]
    pairs = learning.pairs_of(rows, 3)
    assert [pair["chosen"] for pair in pairs] == [row["answer"] for row in rows for _ in range(3)]
    assert [pair["prompt"] for pair in pairs[::3]] == [row["prompt"] for row in rows]
    for first in range(0, 12, 3):
        wrong = {int(pair["rejected"]) for pair in pairs[first : first + 3]}
        total = int(pairs[first]["chosen"])
        assert len(wrong - {total}) == 3
        assert all(number > 0 and abs(number - total) <= 10 for number in wrong)


def test_a_change_is_the_mean_over_sums_of_the_mean_over_seeds():
    before = np.array([[0.0, 0, 0, 1], [0, 0, 1, 1]])
    after = np.array([[1.0, 0, 1, 1], [1, 0, 1, 1]])
    # Of each sum: 1, 0, .5, 0: mean .375, standard deviation .4787, error .2394.
    found = learning.change(before, after)
    half = 3.18245 * 0.23936  # Student's t of three degrees
    expected = {"": 0.375, " low": 0.375 - half, " high": 0.375 + half}
    assert found == pytest.approx(expected, abs=1e-4)


def test_each_library_has_its_own_curve(tmp_path, monkeypatch):
    """The metric of each stage's own run, and TRL with as many steps and rows."""
    asked = []

    def ours(run, flags, key):
        assert flags[-1] == str(run)
        return {0: 0.25, 10: 0.75} if (run.name, key) == ("grpo", "validation/score") else {0: 0.5}

    def theirs(command, model, folder, out, **how):
        asked.append((command, str(model.relative_to(tmp_path)), how))
        return {0: 0.0, 10: 1.0}

    monkeypatch.setattr(peers, "ours", ours)
    monkeypatch.setattr(peers, "theirs", theirs)
    finished = []
    monkeypatch.setattr(learning, "finished", lambda run, flags: finished.append(run))
    rows = peers.of_seed(tmp_path, 1, ["grpo", "dpo"])
    found = {(row["variant"], row["step"], row["metric"]): row["value"] for row in rows}
    assert found["rlhf_jax", 10, "right answers of GRPO"] == 0.75
    assert found["TRL 1.16", 10, "right answers of GRPO"] == 1.0
    assert found["rlhf_jax", 0, "held-out accuracy of DPO"] == 0.5
    assert 0.66 < found["rlhf_jax", 10, "right answers of GRPO low"] < 0.67  # of 128, Wilson
    assert asked == [
        ("grpo", "model", {"seed": 1, "steps": 10, "batch": 64}),
        ("dpo", "seed-1/sft/model", {"seed": 1, "steps": 0, "batch": 16}),
    ]
    assert finished == [tmp_path / "seed-1" / "sft"]  # DPO starts from its weights


def test_the_table_has_each_stage_before_and_after():
    found = {
        "SFT": {
            seed: learning.Outcome(
                7, {"right answers": (np.array(before), np.array([1.0, right]))}, (2.0, loss), {}
            )
            for seed, before, right, loss in ((1, [0.0, 0], 1.0, 1.0), (4, [1.0, 0], 0.0, 1.5))
        },
        learning.JUDGE: {1: learning.Outcome(9, {}, (0.5, 0.75), {"length": 0.25})},
    }
    rows = learning.table(found)
    values = {(row["variant"], row["seed"], row["metric"]): row["value"] for row in rows}
    assert values["SFT", "all", "right answers before"] == 0.25
    assert values["SFT", "all", "right answers after"] == 0.75
    assert values["SFT", "all", "change of right answers"] == 0.5
    assert [values["SFT", seed, "right answers before"] for seed in (1, 4)] == [0, 0.5]
    assert [values["SFT", seed, "right answers after"] for seed in (1, 4)] == [1, 0.5]
    assert [values["SFT", seed, "change of right answers"] for seed in (1, 4)] == [1, 0]
    assert values["SFT", "all", "held-out rows before"] == 2
    assert values["SFT", "all", "held-out rows after"] == 1.25
    assert values[learning.JUDGE, "all", "held-out rows after"] == 0.75
    assert values[learning.JUDGE, "all", "length"] == 0.25
    assert (learning.JUDGE, "all", "right answers after") not in values
    assert {row["step"] for row in rows if row["variant"] == "SFT"} == {7}


@pytest.mark.parametrize("only", [(), ("DPO",)])
def test_the_seed_of_the_tuning_is_none_of_the_seeds(tmp_path, monkeypatch, only):
    """And of the stages some can be chosen."""
    monkeypatch.setattr(learning.smollm2, "write_model", lambda folder: None)
    told = learning.Outcome(7, {"right answers": (np.zeros(2), np.ones(2))}, (0.5, 1.0), {})
    monkeypatch.setattr(learning, "outcome", lambda *of_stage: told)
    out = tmp_path / "learning.json"
    learning.main(tmp_path / "runs", out, only=only, sizes=SIZES)
    found = json.loads(out.read_text("utf-8"))
    assert {row["seed"] for row in found["rows"]} == {1, 2, 3, "all"}
    names = {row["variant"] for row in found["rows"]}
    assert names == (set(only) or {*learning.stages(tmp_path, tmp_path, SIZES, 1)})
    asked = "--seeds 1 2 3" + (" --only DPO" if only else "")
    assert found["command"] == f"python experiments/learning.py runs/learning {asked}"


def write_samples(run, scores):
    """{step: scores} as a run's samples."""
    run.mkdir(parents=True)
    samples = [{"step": step, "score": score} for step, of in scores.items() for score in of]
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)), "utf-8")


def test_scores_are_those_of_the_first_and_last_validation(tmp_path):
    write_samples(tmp_path / "run", {0: [0.5, -1.0], 5: [9.0, 9.0], 10: [0.25, 2.0]})
    before, after = learning.scores(tmp_path / "run")
    assert before.tolist() == [0.5, -1.0]
    assert after.tolist() == [0.25, 2.0]


def test_stages_follow_each_other_within_their_seed(tmp_path):
    """Each starts from the weights of SFT but for SFT and GRPO; RL is paid by the reward model."""
    runs = tmp_path / "seed-1"
    found = learning.stages(tmp_path, runs, SIZES, 1)

    def value(name, flag):
        flags = found[name].flags
        return flags[flags.index(flag) + 1]

    base = str(tmp_path / "model")
    sft = str(runs / "sft" / "model")
    for name, stage in found.items():
        assert value(name, "--seed") == "1"
        assert value(name, "--model") == (base if name in ("SFT", "GRPO, checked answers") else sft)
        assert value(name, "--model") == str(learning.model_of(tmp_path, runs, stage.start))
        assert stage.run.parent == runs
        assert value(name, "--lora.rank") == "16"
    for name in ("RLOO, reward model", "PPO, reward model"):
        assert value(name, "--reward") == str(found[learning.JUDGE].run)
        assert value(name, "--rl.kl-coef") == "0.05"
        assert list(found).index(learning.JUDGE) < list(found).index(name)
    checked = "GRPO, checked answers"
    assert value(checked, "--reward").endswith("sums.py:is_answer")
    assert float(value(checked, "--rl.kl-coef")) == 0
    assert float(value(checked, "--grpo.kl-loss-coef")) == 0
    every_flag = {}
    for stage in found.values():
        every_flag |= dict(zip(stage.flags[1::2], stage.flags[2::2], strict=True))
    parse(RunConfig, [word for flag in every_flag.items() for word in flag])  # all exist


def test_each_stage_trains_on_its_rows_and_validates_on_the_held_out_ones(tmp_path):
    learning.write_data(tmp_path, SIZES)
    kinds = {"SFT": "rows", learning.JUDGE: "pairs", "DPO": "few_pairs"}
    for name, stage in learning.stages(tmp_path, tmp_path, SIZES, 0).items():
        flags = dict(zip(stage.flags[1::2], stage.flags[2::2], strict=True))
        kind = kinds.get(name, "prompts")
        section = stage.flags[0] if name in kinds else "rl"
        assert flags["--data"] == str(tmp_path / f"train_{kind}.json")
        held_out = flags[f"--{section}.validation-data"]
        assert held_out == str(tmp_path / f"held_out_{kind}.json")
    for kind, wrong in learning.WRONG.items():
        numbers = [
            len(json.loads((tmp_path / f"{part}_{kind}.json").read_text()))
            for part in ("train", "held_out")
        ]
        assert numbers == [10 * wrong, 6]


def test_what_trl_did_is_not_taken_for_another_job(tmp_path):
    out = tmp_path / "dpo-trl.json"
    asked = ["dpo", str(tmp_path / "model"), str(tmp_path), "0", "17", "16", str(out)]
    out.write_text(json.dumps({"asked": asked, "values": {"0": 0.5, "17": 0.75}}), "utf-8")
    places = ("dpo", tmp_path / "model", tmp_path, out)
    found = peers.theirs(*places, seed=0, steps=17, batch=16)
    assert found == {0: 0.5, 17: 0.75}
    with pytest.raises(UserError, match=r"dpo-trl.json: made by .*'17'.* asked for .*'34'"):
        peers.theirs(*places, seed=0, steps=34, batch=16)


SCORE = "validation/score"
LONGER = "validation/length_accuracy"


@pytest.fixture
def stage_of(tmp_path, monkeypatch):
    """The outcome of a stage of seed 1: its runs, and what is said, are made up."""
    said = {"model": "1 + 2", "sft": "2", "ppo": "3"}
    runs = tmp_path / "seed-1"

    def answers_of(model, rows, seed, file):
        name = model.name if model.parent == tmp_path else model.parent.name
        assert (seed, file) == (1, runs / f"{name}.answers.json")
        return [said[name]] * len(rows)

    def first_digit(texts, rows):
        return np.array([float(text[0]) for text in texts])

    monkeypatch.setattr(learning, "answers_of", answers_of)
    monkeypatch.setattr(learning, "right", first_digit)

    def outcome(name, start, metric, metrics):
        monkeypatch.setattr(learning, "finished", lambda run, flags: metrics)
        stage = learning.Stage([str(runs / name)], start, metric)
        return learning.outcome(tmp_path, runs, stage, SIZES, 1)

    return outcome


def test_a_stage_is_compared_with_what_it_starts_from(tmp_path, stage_of):
    """Its own answers, those of its start, its metric at both ends, its last KL."""
    write_samples(tmp_path / "seed-1" / "ppo", {0: [1.0] * 6, 4: [1.5] * 6})
    metrics = [
        {"step": 0, SCORE: 0.5},
        {"step": 2, "objective/kl": 1.0},
        {"step": 3, "objective/kl": 2.0},
        {"step": 4, SCORE: 0.75},
    ]
    found = stage_of("ppo", learning.SFT, SCORE, metrics)
    assert (found.steps, found.ends) == (4, (0.5, 0.75))
    before, after = found.of_sums["right answers"]
    assert (before.tolist(), after.tolist()) == ([2] * 6, [3] * 6)
    assert found.of_sums["score"][1].tolist() == [1.5] * 6
    assert found.others == {learning.KL: 2.0}


def test_stages_without_rl_have_no_score_and_reward_models_no_answers(stage_of):
    metrics = [{"step": 0, LONGER: 0.25}, {"step": 4, LONGER: 0.375}]
    found = stage_of("sft", learning.BASE, LONGER, metrics)
    assert found.of_sums.keys() == {"right answers", "numbers alone"}
    assert found.of_sums["right answers"][0].tolist() == [1] * 6
    before, after = found.of_sums["numbers alone"]
    assert (before.tolist(), after.tolist()) == ([0] * 6, [1] * 6)
    found = stage_of("reward_model", learning.SFT, LONGER, metrics)
    assert found.of_sums == {}
    assert found.others == {"held-out accuracy of the longer answer": 0.375}


def test_a_folder_with_another_command_is_not_taken_for_finished(tmp_path):
    run = tmp_path / "sft"
    (run / "model").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 0}\n', "utf-8")
    manifest = {"command": "rlhf-jax sft --seed 1 --model 'a b' --resume"}
    (run / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    flags = ["sft", "--seed", "1", "--model", "a b"]
    assert learning.finished(run, flags) == [{"step": 0}]
    with pytest.raises(UserError, match=r"--seed 1 .* asked for .*--seed 2"):
        learning.finished(run, ["sft", "--seed", "2", "--model", "a b"])


def test_the_seconds_are_those_of_all_stages(tmp_path):
    for name, rows in {"sft": [1.5, 2.0], "dpo": [0.25]}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": 7, "timing/step": value}) for value in rows]
        (tmp_path / name / "timing.jsonl").write_text("\n".join(lines), "utf-8")
    assert learning.sums.seconds_of(tmp_path.glob("*/timing.jsonl")) == 3.75
