"""The sums that experiments share: rows, commands, and TRL beside them."""

import json

import learning
import peers
import pytest

from rlhf_jax.config import RunConfig, parse
from rlhf_jax.errors import UserError

SIZES = learning.Sizes(largest=4, held_out=6)


def test_no_held_out_sum_is_trained_on(tmp_path):
    learning.write_data(tmp_path, SIZES)
    for kind in ("rows", "pairs", "prompts"):
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


def test_pairs_are_the_right_number_and_another_one_near_it():
    rows = learning.problems(learning.FULL)
    pairs = learning.pairs_of(rows)
    assert [pair["chosen"] for pair in pairs] == [row["answer"] for row in rows]
    assert [pair["prompt"] for pair in pairs] == [row["prompt"] for row in rows]
    for pair in pairs:
        right, wrong = int(pair["chosen"]), int(pair["rejected"])
        assert 0 < wrong != right
        assert abs(wrong - right) <= 10


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


def test_stages_follow_each_other_within_their_seed(tmp_path):
    """DPO starts from SFT's weights, SFT and GRPO from the chat model."""
    runs = tmp_path / "seed-1"
    found = learning.stages(tmp_path, runs, SIZES, 1)

    def value(name, flag):
        flags = found[name].flags
        return flags[flags.index(flag) + 1]

    base = str(tmp_path / "model")
    sft = str(runs / "sft" / "model")
    for name, stage in found.items():
        assert value(name, "--seed") == "1"
        assert value(name, "--model") == (sft if name == "DPO" else base)
        assert value(name, "--model") == str(learning.model_of(tmp_path, runs, stage.start))
        assert stage.run.parent == runs
        assert value(name, "--lora.rank") == "16"
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
    kinds = {"SFT": "rows", "DPO": "pairs"}
    for name, stage in learning.stages(tmp_path, tmp_path, SIZES, 0).items():
        flags = dict(zip(stage.flags[1::2], stage.flags[2::2], strict=True))
        kind = kinds.get(name, "prompts")
        section = stage.flags[0] if name in kinds else "rl"
        assert flags["--data"] == str(tmp_path / f"train_{kind}.json")
        held_out = flags[f"--{section}.validation-data"]
        assert held_out == str(tmp_path / f"held_out_{kind}.json")
    for part, number in (("train", 10), ("held_out", 6)):
        for kind in ("rows", "pairs", "prompts"):
            assert len(json.loads((tmp_path / f"{part}_{kind}.json").read_text())) == number


def test_what_trl_did_is_not_taken_for_another_job(tmp_path):
    out = tmp_path / "dpo-trl.json"
    asked = ["dpo", str(tmp_path / "model"), str(tmp_path), "0", "17", "16", str(out)]
    out.write_text(json.dumps({"asked": asked, "values": {"0": 0.5, "17": 0.75}}), "utf-8")
    places = ("dpo", tmp_path / "model", tmp_path, out)
    found = peers.theirs(*places, seed=0, steps=17, batch=16)
    assert found == {0: 0.5, 17: 0.75}
    with pytest.raises(UserError, match=r"dpo-trl.json: made by .*'17'.* asked for .*'34'"):
        peers.theirs(*places, seed=0, steps=34, batch=16)


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
