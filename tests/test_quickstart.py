"""The quickstart as a newcomer starts it, and its negative control (slow); other seeds by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import quickstart
from test_scripts import run

from rlhf_jax.config import RLStage

SLOW, SOAK = pytest.mark.slow, pytest.mark.soak
GATES = {"reward_model_accuracy", "ppo_beats_sft", "kl_in_band", "kl_coef_moved"}


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=SLOW if seed == 0 else SOAK) for seed in range(3)])
def test_seeds_pass_and_leave_a_page(seed, tmp_path):
    folder = tmp_path / "run"
    assert "score/length" in run("quickstart", "--output-dir", folder, "--seed", seed).stdout
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["heldout_prompts"] >= 100
    assert summary["gates"] == dict.fromkeys(GATES, True)
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("<svg") >= 6
    assert not any(reference in page for reference in ("http://", "https://", "<script", "src=", "<link"))


@SLOW
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
    ("gate", "changed"),
    [
        (None, {}),
        ("reward_model_accuracy", {"accuracy": 0.84}),
        ("ppo_beats_sft", {"ppo": [1.0, 1.0, 0.0, 0.0]}),
        ("kl_in_band", {"kl": 3.1}),
        ("kl_in_band", {"kl": 1.3}),
        ("kl_coef_moved", {"coef": 1.05}),
    ],
)
def test_each_gate_by_hand(gate, changed, tmp_path):
    """Just passed, and each one just missed: PPO beats SFT in 2 of 4 answers and two ties, the target is 2 nats."""
    given = {"accuracy": 0.85, "ppo": [1.0, 1.0, 0.5, 0.0], "kl": 3.0, "coef": 1.1} | changed
    (tmp_path / "ppo").mkdir()
    kls, coefs = [9.0, given["kl"], *9 * [2.0]], [given["coef"], *10 * [1.0]]
    rows = [{"step": i, "objective/kl": kls[i], "kl/coef": coefs[i]} for i in range(11)]
    (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = quickstart.QuickstartConfig(rl=RLStage(kl_target=2.0))
    mask = SimpleNamespace(response_mask=np.tri(4))
    sft, ppo = (
        quickstart.Answers(["x"] * 4, np.array(scores), mask) for scores in ([0.5, 0.5, 0.5, 0.0], given["ppo"])
    )
    summary = quickstart.summarize(config, sft, ppo, {"accuracy": given["accuracy"]}, np.arange(4.0), tmp_path)
    assert summary["gates"] == {name: name != gate for name in GATES}
    assert (summary["score_length_correlation"], len(summary["kl"]["last_iterations"])) == (1.0, 10)
