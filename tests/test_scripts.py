"""The scripts as a user starts them: in a process of their own, one device, the tiny config."""

import collections
import json
import math
import re
import signal
import time

import pytest
from builders import TINY, metric_rows, run_script, start_script

from rlhf_jax import cli
from rlhf_jax.data import demo
from rlhf_jax.errors import UserError

WITH_TINY = ("--config", str(TINY))
slow = pytest.mark.slow
soak = pytest.mark.soak


@slow
@pytest.mark.parametrize(
    ("script", "steps"),
    [
        ("sft", 30),
        pytest.param("reward_model", 43, marks=soak),
        pytest.param("dpo", 43, marks=soak),
        ("ppo", 10),
    ],
)
def test_tiny_config_serves_every_script_alone(script, steps, tmp_path):
    folder = tmp_path / "run"
    done = run_script(script, *WITH_TINY, "--output-dir", folder, JAX_LOG_COMPILES="1", PAGES="1")
    said = done.stdout
    assert said.splitlines()[0] == "cpu: 1 x cpu, float32"
    assert said.count("compiling") == 1
    more = "(, KL .* nats|, samples: .* changed)?"
    assert re.search(rf"\n[A-Z].* in {steps} (steps|iterations){more}, no alert\.\n", said)
    assert "\nNext, for example:\n    rlhf-jax " in said
    compiled = collections.Counter(
        re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.stderr)
    )
    if (
        script == "ppo"
    ):  # a validation samples by the program of a step, and scores by one of its own
        phases = {"respond": 1, "rescored": 1, "reward": 2, "update_in_place": 1}
        assert {name: compiled[name] for name in phases} == phases
    assert sum(compiled.values()) <= 48
    metrics = metric_rows(folder)
    assert [row["step"] for row in metrics] == list(range(steps + 1))
    files = (
        "config.yaml manifest.json metrics.jsonl timing.jsonl samples.jsonl checkpoints model "
        "report.html"
    )
    assert {entry.name for entry in folder.iterdir()} >= set(files.split())
    assert (folder / "model" / "tokenizer.json").is_file()
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert (manifest["seed"], len(manifest["data"])) == (0, 1)
    checks = {"sft": sft_learns, "reward_model": rewards_are_learned, "dpo": dpo_learns}
    checks.get(script, ppo_samples_and_learns)(metrics, folder)


def sft_learns(metrics, folder):
    assert metrics[-1]["validation/loss"] < metrics[0]["validation/loss"] - 0.5


def rewards_are_learned(metrics, folder):
    assert metrics[-1]["reward_model/loss"] < metrics[1]["reward_model/loss"]


def dpo_learns(metrics, folder):
    assert metrics[0]["validation/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics[-1]["validation/accuracy"] > 0.55


def ppo_samples_and_learns(metrics, folder):
    last = metrics[-1]
    assert {row["step"] for row in metric_rows(folder, "samples.jsonl")} == {0, 5, 10}
    # An estimate from samples: its sign means nothing after 10 steps.
    assert last["objective/kl"] != 0.0
    assert (metrics[1]["objective/kl"], metrics[1]["kl/coef"]) == (0.0, pytest.approx(0.05))
    assert last["policy/sampler_gap"] < 1e-4
    assert all(row["objective/score"] > 0 and row["grad_norm"] > 0 for row in metrics[1:])


@slow
def test_pipeline_hands_each_folder_on_and_passes_over_finished_stages(tmp_path, capsys):
    folder = tmp_path / "run"
    demo.write(
        tmp_path / "data",
        sizes={"sft_data.json": 256, "preference_data.json": 256, "prompts.json": 96},
    )
    given = (
        *WITH_TINY,
        "--data",
        tmp_path / "data",
        "--output-dir",
        folder,
        "--rl.num-iterations",
        3,
    )
    run_script("pipeline", *given)
    manifests = {
        name: json.loads((folder / name / "manifest.json").read_text())
        for name in ("reward_model", "ppo")
    }
    assert not cli.run(["report", str(folder)])
    assert (folder / "stages.html").is_file()
    assert "model" in manifests["reward_model"]["data"]
    assert {"model", f"reward {folder / 'reward_model' / 'model'}"} <= manifests["ppo"][
        "data"
    ].keys()
    again = ["pipeline", *map(str, given)]
    with pytest.raises(UserError, match="--resume"):
        cli.run(again)
    before = (folder / "ppo" / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert not cli.run([*again, "--resume"])
    assert capsys.readouterr().out.count("finished already") == 3
    assert (folder / "ppo" / "model" / "model.safetensors").read_bytes() == before


@slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing.json"], "missing.json"),
        (["--device", "tpu"], "--device tpu: JAX finds no such device here"),
    ],
)
def test_a_users_mistake_is_a_sentence_and_exit_code_2(flags, message, tmp_path):
    done = run_script("ppo", *WITH_TINY, "--output-dir", tmp_path / "run", *flags, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward"], "--reward"),
        (["--reward", "count:the cat"], "tokens"),
        (["--rl.max-new-tokens", "200"], "max_new_tokens"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_value_that_does_not_fit_is_a_sentence(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        cli.run(["ppo", *WITH_TINY, "--output-dir", str(tmp_path / "run"), *flags])


@slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=soak)]
)
def test_a_signal_stops_with_its_code_and_the_command_that_resumes(number, code, tmp_path):
    longer = (*WITH_TINY, "--rl.num-iterations", "20", "--checkpoint-interval", "1000")
    folder = tmp_path / "run"
    process = start_script("vpg", *longer, "--output-dir", folder)
    while not (folder / "checkpoints" / "0").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert f"rlhf-jax vpg --config {TINY}" in said
    assert said.rstrip().endswith("--resume")
    assert (
        "resumed from step" in run_script("vpg", *longer, "--output-dir", folder, "--resume").stdout
    )
    assert len(metric_rows(folder)) == 21
