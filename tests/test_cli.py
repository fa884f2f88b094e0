"""The rlhf-jax command: every command's effect, and what it says to a mistake."""

import json
from pathlib import Path

import pytest
from test_report import write_run

from rlhf_jax import cli, models
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.training import doctor


def test_data_demo_writes_the_pipelines_files(tmp_path):
    cli.run(["data", "demo", str(tmp_path / "demo"), "--seed", "3"])
    assert {file.name for file in (tmp_path / "demo").iterdir()} >= {
        *("sft_data.json", "preference_data.json", "prompts.json"),
    }


@pytest.mark.parametrize("argv", [["nothing"], ["data", "nothing"]])
def test_an_unknown_command_lists_those_there_are(argv):
    with pytest.raises(
        UserError, match="nothing'; there are: doctor, evaluate, report, export, data check, data preview, data demo"
    ):
        cli.run(argv)


@pytest.mark.slow
def test_doctor_runs_every_phase_and_passes_here(capsys):
    assert cli.run(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(phase in said for phase in ("versions", "device 3", "sft", "reward model", "vpg", "ppo", "checkpoint"))
    assert "FAIL" not in said


def test_doctor_reports_what_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(doctor.devices, "idle_accelerator", lambda: "This machine has a GPU.")
    monkeypatch.setattr(doctor, "self_test", lambda: [doctor.timed("sft", lambda: 1 / 0)])
    assert cli.run(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "This machine has a GPU." in said
    assert "ZeroDivisionError" in said


def test_report_writes_a_page_and_prints_where(tmp_path, capsys, monkeypatch):
    runs = [write_run(tmp_path / name, metrics={"loss": [1.0]}, samples={}) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    for argv, path in (
        ([str(runs[0])], runs[0] / "report.html"),
        (list(map(str, runs)), Path("report.html")),
        ([str(runs[1]), "--output", "mine.html"], Path("mine.html")),
    ):
        assert not path.exists()
        cli.run(["report", *argv])
        assert capsys.readouterr().out == f"{path}\n"
        assert "<h1>PPO: " in path.read_text("utf-8")
    with pytest.raises(UserError, match="expected the folder of a run"):
        cli.run(["report"])
    with pytest.raises(UserError, match="no run here"):
        cli.run(["report", str(tmp_path / "c")])


def test_export_makes_a_folder_with_a_card(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "out"
    with pytest.raises(UserError, match="no model here"):
        cli.run(["export", str(run), str(folder)])
    model = models.build(models.GPT2Config(vocab_size=300, max_length=8, hidden_size=8, num_layers=1, num_heads=1))
    params = model.init(doctor.jax.random.key(0))
    models.save(run / "model", model, params)
    tokenizers.train_bpe(["some text"], 300).save(run / "model")
    manifest = {
        "command": "python experiments/sft.py --seed 5",
        "seed": 5,
        "stage": "sft",
        "versions": {"jax": "1"},
        "devices": {"kind": "cpu", "count": 1},
        "data": {"my.json": "abc"},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text("seed: 5\n")
    (run / "metrics.jsonl").write_text('{"step": 7, "sft/loss": 1.25}\n')
    cli.run(["export", str(run), str(folder)])
    card = (folder / "README.md").read_text("utf-8")
    for part in ("python experiments/sft.py --seed 5", "`my.json`, sha256 abc", "| sft/loss | 1.25 |", "seed: 5"):
        assert part in card
    _, loaded = models.load(folder)
    assert (loaded["wte"]["embedding"] == params["wte"]["embedding"]).all()
    with pytest.raises(UserError, match="in use"):
        cli.run(["export", str(run), str(folder)])
