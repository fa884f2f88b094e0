"""The quickstart's checks and page; its negative control and other seeds by hand. Seed 0 is the
first command of tests/fifteen_minutes.py, which CI runs.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import quickstart_results
from builders import run_script, write_run
from fifteen_minutes import CHECKS, check_numbers, check_quickstart

from rlhf_jax import cli
from rlhf_jax.cli import quickstart
from rlhf_jax.config import RLStage, RunConfig
from rlhf_jax.generation import generator
from rlhf_jax.report import figures
from rlhf_jax.training import pipeline
from rlhf_jax.training.common import setup
from rlhf_jax.training.common.setup import set_up

SOAK = pytest.mark.soak
USERS = {
    "XLA_FLAGS": "",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
}  # programs as a user's are compiled


@SOAK
@pytest.mark.parametrize("seed", range(1, 5))
def test_seeds_pass_and_leave_a_page(seed, tmp_path):
    folder = tmp_path / "run"
    said = run_script("quickstart", "--output-dir", folder, "--seed", seed, **USERS).stdout
    check_quickstart(folder, said)
    for command in said.splitlines()[-3:-1]:
        assert cli.run(command.split()[1:]) is None


def write_quickstart(folder, **more):
    write_run(folder / "ppo")
    (folder / "data").mkdir()
    (folder / "data" / "heldout_preference_data.json").write_text("[1, 2, 3, 4]")
    summary = {"seed": 7, "heldout_prompts": 4, "win_rate": 0.75}
    summary |= {"reward_model": {"accuracy": 1.0}, "kl": {"last_iterations": [2.0, 1.0, 3.0]}}
    summary |= {"rubric": {"sft": 0.25, "ppo": 0.5}}
    (folder / "summary.json").write_text(json.dumps(summary | more))


def test_the_table_of_a_quickstart(tmp_path):
    """3 of 4 wins: Wilson's interval is .301 to .954."""
    write_quickstart(tmp_path)
    rows = quickstart_results.table(tmp_path)
    assert {(row["variant"], row["seed"], row["step"]) for row in rows} == {("quickstart", 7, 3)}
    assert {row["metric"]: row["value"] for row in rows} == {
        "lowest KL of the last 10": 1.0,
        "highest KL of the last 10": 3.0,
        "rubric, SFT": 0.25,
        "rubric, PPO": 0.5,
        "reward model's accuracy": 1.0,
        "reward model's accuracy low": 0.5101,
        "reward model's accuracy high": 1.0,
        "PPO beats SFT": 0.75,
        "PPO beats SFT low": 0.3006,
        "PPO beats SFT high": 0.9544,
    }


def test_the_table_of_several_quickstarts_has_their_means(tmp_path, monkeypatch):
    """The date is that of the last, and the revision that of the runs' own tree."""
    monkeypatch.setattr(pipeline, "STAGES", ("ppo",))
    for seed, wins in ((7, 0.75), (8, 0.25)):
        write_quickstart(tmp_path / str(seed), seed=seed, win_rate=wins)
        os.utime(tmp_path / str(seed) / "summary.json", (0, 86400 * seed))  # seconds from 1970
        path = tmp_path / str(seed) / "ppo" / "manifest.json"
        manifest = json.loads(path.read_text()) | {"git": {"commit": "a" * 40, "modified": True}}
        path.write_text(json.dumps(manifest))
    out = tmp_path / "out.json"
    quickstart_results.main((tmp_path / "7", tmp_path / "8"), out)
    found = json.loads(out.read_text())
    assert (found["date"], found["revision"]) == ("1970-01-09", "aaaaaaaa-dirty")
    assert found["command"] == "rlhf-jax quickstart --seed 7, 8"
    values = {(row["seed"], row["metric"]): row["value"] for row in found["rows"]}
    assert values["all", "PPO beats SFT"] == 0.5
    assert values["all", "PPO beats SFT low"] < 0 < 1 < values["all", "PPO beats SFT high"]
    assert (values[7, "PPO beats SFT"], values[8, "PPO beats SFT"]) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("far", "metric"),
    [
        ({}, None),
        ({"win_rate": 0.7}, "PPO beats SFT"),
        ({"reward_model": {"accuracy": 1.03}}, "reward model's accuracy"),
        ({"kl": {"last_iterations": [1.7, 3.2]}}, "highest KL of the last 10"),
        ({"rubric": {"sft": 0.55, "ppo": 0.78}}, "rubric, SFT"),
    ],
)
def test_the_numbers_of_the_page_are_those_of_a_run(far, metric):
    summary = {"win_rate": 0.86, "reward_model": {"accuracy": 0.95}}
    summary |= {"kl": {"last_iterations": [1.7, 2.0]}, "rubric": {"sft": 0.46, "ppo": 0.78}}
    check_numbers(summary)
    if metric is not None:
        with pytest.raises(AssertionError, match=metric):
            check_numbers(summary | far)


def test_stages_are_announced_and_the_device_once(monkeypatch, capsys):
    for module in (pipeline.sft, pipeline.reward_model, pipeline.rl):
        monkeypatch.setattr(
            module,
            "run",
            lambda config: (set_up(config), SimpleNamespace(model_folder="x"))[1],
        )
    setup._say_once.cache_clear()
    pipeline.run_stages(RunConfig(), Path("runs"))
    device, *said = sorted(capsys.readouterr().out.splitlines())
    assert "x cpu, float32" in device
    names = ("supervised fine-tuning", "reward model", "PPO")
    assert said == [f"stage {i} of 3: {name}" for i, name in enumerate(names, 1)]


def test_a_full_disk_leaves_no_half_of_the_model(tmp_path, monkeypatch):
    model, copied = tmp_path / "ppo" / "model", []
    model.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text(name)
    stage = SimpleNamespace(model_folder=model)
    stages = SimpleNamespace(sft=stage, reward_model=stage, ppo=stage)
    monkeypatch.setattr(pipeline, "run_stages", lambda *_: stages)
    for module, name, result in [
        (quickstart, "set_up", None),
        (quickstart.demo, "write", None),
        (quickstart.formats, "read", mock.Mock()),
        (quickstart.initial, "load_language_model", generator.LanguageModel(*[mock.Mock()] * 3)),
        (quickstart, "answer", mock.Mock()),
        (quickstart, "judge", ({}, [])),
        (quickstart, "summarize", {}),
    ]:
        monkeypatch.setattr(module, name, mock.Mock(return_value=result))

    def full(source, target, **how):
        copied.append(Path(target).write_text("half"))
        if len(copied) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    (tmp_path / "runs").mkdir()
    with pytest.raises(OSError, match="No space left"):
        quickstart.run(quickstart.QuickstartConfig(output_dir=str(tmp_path / "runs")))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["summary.json"]


def test_the_page_has_the_curves_of_all_stages(tmp_path, monkeypatch):
    for name in pipeline.STAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "objective/kl": 2.5}\n')
    monkeypatch.setattr(quickstart.records, "find", lambda folders: [])
    monkeypatch.setattr(
        quickstart, "reward_against_kl", lambda groups: figures.Plot("frontier", "x", "y", {})
    )
    drawn = {plot.title: plot for plot in quickstart.plots(tmp_path, kl_target=2.0)}
    assert len(drawn) == 9
    kl = drawn["PPO: KL from the SFT policy"]
    assert (list(kl.series["objective/kl"][1]), kl.band) == ([2.5], (2 / 1.5, 3.0, "target band"))


@SOAK
def test_meaningless_labels_are_found_out(tmp_path):
    flags = ("--shuffle-labels", "--rl.num-iterations", 2)  # the reward model is judged
    done = run_script("quickstart", "--output-dir", tmp_path / "run", *flags, check=False, **USERS)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["shuffled_labels"] is True
    assert 0.4 <= summary["reward_model"]["accuracy"] <= 0.6
    assert summary["checks"]["reward_model_accuracy"] is False
    assert "FAIL  reward model accuracy" in done.stdout


@pytest.mark.parametrize(
    ("failing", "changed"),
    [
        (None, {}),
        ("reward_model_accuracy", {"accuracy": 0.84}),
        ("ppo_beats_sft", {"ppo": [1.0, 1.0, 0.0, 0.0]}),
        ("kl_in_band", {"kl": 3.1}),
        ("kl_in_band", {"kl": 1.3}),
        ("kl_coef_moved", {"coef": 1.05}),
    ],
)
def test_each_check_by_hand(failing, changed, tmp_path, capsys):
    """Just passed, and each one just missed: PPO beats SFT in 2 of 4 answers and two ties, the
    target is 2 nats.
    """
    given = {"accuracy": 0.85, "ppo": [1.0, 1.0, 0.5, 0.0], "kl": 3.0, "coef": 1.1} | changed
    courses = {
        "objective/kl": [9.0, given["kl"], *9 * [2.0]],
        "kl/coef": [given["coef"], *10 * [1.0]],
        "value/explained_variance": 5 * [-0.9] + 5 * [0.2] + [-0.5],
        "policy/ratio_max": [3.0, *10 * [1.0]],
    }
    write_run(tmp_path / "ppo", metrics=courses)
    config = quickstart.QuickstartConfig(rl=RLStage(kl_target=2.0))
    mask = SimpleNamespace(response_mask=np.tri(4))
    sft, ppo = (
        quickstart.Answers(["x"] * 4, np.array(scores), mask)
        for scores in ([0.5, 0.5, 0.5, 0.0], given["ppo"])
    )
    summary = quickstart.summarize(
        config, sft, ppo, {"accuracy": given["accuracy"]}, np.arange(4.0), tmp_path
    )
    assert summary["checks"] == {name: name != failing for name in CHECKS}
    assert (summary["score_length_correlation"], len(summary["kl"]["last_iterations"])) == (1.0, 10)
    assert summary["critic"] == {
        "lowest_explained_variance_of_last_half": -0.5,
        "largest_ratio": 3.0,
    }
    quickstart.print_summary(tmp_path, summary, [])
    said = f"FAIL  {failing}".replace("_", " ") in capsys.readouterr().out
    assert said == (failing is not None)
