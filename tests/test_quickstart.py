"""The quickstart as a newcomer starts it, and its negative control (slow); other seeds and repetition by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import quickstart
from test_scripts import run

from rlhf_jax.config import RLStage

GATES = {"reward_model_accuracy", "ppo_beats_sft", "kl_in_band", "kl_coef_moved"}


def outputs(folder):
    return {name: (folder / name).read_bytes() for name in ("summary.json", "report.html", "model/model.safetensors")}


def check(folder):
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["heldout_prompts"] >= 100
    assert summary["reward_model"]["accuracy"] >= 0.85
    assert summary["win_rate"] >= 0.75
    target, last = summary["kl"]["target"], summary["kl"]["last_iterations"]
    assert len(last) == 10
    assert all(target / 1.5 <= kl <= 1.5 * target for kl in last)
    assert summary["gates"] == dict.fromkeys(GATES, True)


@pytest.mark.slow
def test_seed_0_passes_and_leaves_a_page(tmp_path):
    folder = tmp_path / "run"
    assert "score/length" in run("quickstart", "--output-dir", folder).stdout
    check(folder)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")  # it knows how the run asked
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "Human: Hi\nAssistant: "
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("<svg") >= 6
    assert not any(reference in page for reference in ("http://", "https://", "<script", "src=", "<link"))


@pytest.mark.soak
def test_the_same_seed_twice_gives_identical_files(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        run("quickstart", "--output-dir", folder)
    assert outputs(folders[0]) == outputs(folders[1])


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_pass_too(seed, tmp_path):
    run("quickstart", "--output-dir", tmp_path / "run", "--seed", seed)
    check(tmp_path / "run")


@pytest.mark.slow
def test_meaningless_labels_are_found_out(tmp_path):
    shorter = ("--rl.num-iterations", 10)  # the reward model is what is judged
    done = run("quickstart", "--output-dir", tmp_path / "run", "--shuffle-labels", *shorter, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["shuffled_labels"] is True
    assert 0.4 <= summary["reward_model"]["accuracy"] <= 0.6
    assert summary["gates"]["reward_model_accuracy"] is False
    assert "FAIL  reward_model_accuracy" in done.stdout


@pytest.mark.parametrize(
    ("gate", "accuracy", "ppo", "kl", "coef"),
    [
        (None, 0.85, [1.0, 1.0, 0.5, 0.0], 3.0, 1.1),
        ("reward_model_accuracy", 0.84, [1.0, 1.0, 0.5, 0.0], 3.0, 1.1),
        ("ppo_beats_sft", 0.85, [1.0, 1.0, 0.0, 0.0], 3.0, 1.1),
        ("kl_in_band", 0.85, [1.0, 1.0, 0.5, 0.0], 3.1, 1.1),
        ("kl_in_band", 0.85, [1.0, 1.0, 0.5, 0.0], 1.3, 1.1),
        ("kl_coef_moved", 0.85, [1.0, 1.0, 0.5, 0.0], 3.0, 1.05),
    ],
)
def test_each_gate_by_hand(gate, accuracy, ppo, kl, coef, tmp_path):
    """Just passed, and each one just missed: PPO beats SFT in 2 of 4 answers and two ties, the target is 2 nats."""
    (tmp_path / "ppo").mkdir()
    rows = [{"step": i, "objective/kl": kl if i else 9.0, "kl/coef": 1.0 if i else coef} for i in range(11)]
    (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = quickstart.QuickstartConfig(rl=RLStage(kl_target=2.0))
    sft, ppo = (
        quickstart.Answers(["x"] * 4, np.array(scores), SimpleNamespace(response_mask=np.tri(4)))
        for scores in ([0.5, 0.5, 0.5, 0.0], ppo)
    )
    summary = quickstart.summarize(config, sft, ppo, {"accuracy": accuracy}, np.arange(4.0), tmp_path)
    assert summary["gates"] == {name: name != gate for name in GATES}
    assert (summary["score_length_correlation"], len(summary["kl"]["last_iterations"])) == (1.0, 10)
    assert quickstart.gate_details(summary).keys() == GATES
