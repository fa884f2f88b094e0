"""``benchmarks/card.py``: its parts, what becomes of one that fails, and its table."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro
from builders import ROOT, script

bench, card, steps = (script(f"benchmarks/{name}.py") for name in ("bench", "card", "steps"))
PARTS = {part.name: part for part in (*card.PARTS, *card.REHEARSED)}
BENCHES = [part for part in PARTS.values() if part.arguments[0] == "bench"]


@functools.wraps(bench.run)
def flags(**given):
    return given


@pytest.mark.parametrize("part", BENCHES, ids=[part.name for part in BENCHES])
def test_what_is_timed_is_work_that_bench_has(part):
    given = tyro.cli(flags, args=part.arguments[1:])
    sizes = {key: given[key] for key in ("prompt", "response")} | {"batch": given["rows"]}
    preset = steps.PRESETS[given["preset"]]
    found = bench.sized(given["name"], preset, given["dtype"], sizes, given["microbatches"])
    assert found[1:4] == tuple(sizes[key] for key in ("batch", "prompt", "response"))
    assert given["dtype"] == "bfloat16"
    assert given["against"] != "trl"


def test_the_limits_leave_each_kind_its_turn():
    kinds = [part.arguments[0] for part in card.PARTS]
    assert kinds[:4] == ["peaks", "right", "again", "blocks"]
    assert {part.arguments[1] for part in BENCHES} == {"rollout", "sft", "grpo"}
    assert {part.arguments[0] for part in card.REHEARSED} == set(kinds)
    assert card.SECONDS < 480
    checked = [part.arguments for part in card.PARTS if "--no-check" not in part.arguments]
    against = {words[words.index("--against") + 1] for words in checked if "--against" in words}
    assert against == {"hand", "transformers"}


def test_figures_of_the_line_that_bench_prints(monkeypatch):
    line = {"median_s": 0.5, "mfu": None, "others_cpu": 0.9, "ratio": 2.0, "left_out": {}}
    done = subprocess.CompletedProcess([], 1, f"a warning\n{json.dumps(line)}\n", "")
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: ran.append(command) or done)
    figures = {"median_s": 0.5, "others_cpu": 0.9, "ratio": 2.0}
    assert card.answer(["bench", "sft", "--rows", "4"]) == figures
    _, file, *words = ran[0]
    assert file == str(ROOT / "benchmarks" / "bench.py")
    assert words == ["sft", "--rows", "4"]
    assert card.answer(["doctor"])["exit_code"] == 1
    assert ran[1][1:] == ["-m", "rlhf_jax", "doctor"]


def test_runs_are_compared_byte_by_byte(monkeypatch):
    """Those of ``again`` have the same flags, those of ``blocks`` other rows in flight."""
    weights = {"0": b"w", "1": b"w"}
    metrics = {"0": b"1\n2\n3\n", "1": b"1\n2\n3\n"}
    ran = []

    def run(*words):
        ran.append(words)
        folder = Path(words[words.index("--output-dir") + 1])
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(weights[folder.name])
        (folder / "metrics.jsonl").write_bytes(metrics[folder.name])
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(card, "_python", run)
    found = card.answer(["again", "--seed", "1"])
    assert (found["same"], found["equal_rows"], found["rows"]) == (1, 3, 3)
    assert [words[-2:] for words in ran] == [("--seed", "1")] * 2
    assert all("--deterministic" in words for words in ran)
    del ran[:]
    metrics["1"] = b"1\n5\n3\n"
    found = card.answer(["blocks"])
    assert (found["same"], found["equal_rows"], found["rows"]) == (0, 1, 3)
    blocks = ("--compute.blocks", "4")
    assert ran[0][-2:] == blocks
    assert ran[1][-4:] == (*blocks, "--ppo.num-microbatches", "4")
    metrics["1"], weights["1"] = metrics["0"], b"v"
    assert card.answer(["blocks"])["same"] == 0


def test_gaps_by_hand():
    cpu = {"logits": np.array([1.0, -4.0]), "said": np.array([1, 2, 3, 4]), "loss": 2.0}
    cpu["weights"] = {"a": np.array([1.0]), "b": np.array([2.0, 3.0])}
    here = {"logits": np.array([1.5, -4.0]), "said": np.array([1, 2, 3, 5]), "loss": 1.75}
    here["weights"] = {"a": np.array([1.0]), "b": np.array([2.0, 2.5])}
    found = {"logits gap": 0.125, "greedy equal": 0.75, "loss gap": 0.25, "weights gap": 0.5}
    assert card._gaps(cpu, here) == found


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Processes that do what their argument says."""
    file = tmp_path / "part.py"
    file.write_text(
        "import json, sys, time\n"
        "what = sys.argv[2]\n"
        "print('a library says')\n"
        "if what == 'fail':\n"
        "    print('a trace', 'no memory', sep='\\n', file=sys.stderr)\n"
        "    sys.exit(3)\n"
        "if what == 'stay': time.sleep(600)\n"
        "if what == 'good': print(json.dumps({'a': 1.234567, 'b': 2}))\n"
    )
    monkeypatch.setattr(card, "__file__", str(file))
    monkeypatch.setattr(card, "missing", lambda packages: [])
    monkeypatch.setattr(card, "torch_runs", lambda: True)
    return {name: card.Part(name, (name,), 60.0) for name in ("good", "fail", "stay", "silent")}


def test_a_part_that_fails_says_so_and_the_others_go_on(parts, monkeypatch, capsys):
    monkeypatch.setattr(card, "machine", lambda: "a card")
    parts["stay"] = parts["stay"]._replace(limit=0.2)
    *_, found = card.tables(list(parts.values()), 1000.0, "python benchmarks/card.py")
    rows = [(row["variant"], row["metric"], row["value"]) for row in found["rows"]]
    assert rows == [
        ("good", "a", 1.2346),
        ("good", "b", 2),
        ("fail", "failed", 3),
        ("stay", "failed", 124),
        ("silent", "failed", 1),
    ]
    assert list(found) == ["command", "revision", "machine", "seconds", "rows"]
    assert list(found["rows"][0]) == ["variant", "seed", "step", "metric", "value"]
    reasons = [row.get("reason") for row in found["rows"]]
    assert reasons == [None, None, "no memory", "ended after 0 s", "it said nothing"]
    said = capsys.readouterr()
    assert "good: a 1.2346\n" in said.out
    assert "a trace\n" in said.err


def test_without_seconds_a_part_is_skipped(parts, monkeypatch):
    monkeypatch.setattr(card, "machine", lambda: "a card")
    [table] = card.tables([parts["good"]], card.LEAST - 1, "")
    [row] = table["rows"]
    assert (row["metric"], row["value"]) == ("skipped", 1)


def test_a_part_leaves_the_others_a_turn(parts, monkeypatch):
    monkeypatch.setattr(card, "machine", lambda: "a card")
    monkeypatch.setattr(card, "LEAST", 1.0)
    monkeypatch.setattr(card, "TURN", 5.0)
    *_, found = card.tables([parts["stay"], parts["good"]], 7.0, "")
    assert [row["metric"] for row in found["rows"]] == ["failed", "a", "b"]


def test_a_missing_package_has_a_row_and_pytorch_is_not_asked_for(parts, monkeypatch):
    monkeypatch.setattr(card, "machine", lambda: "a card")
    asked = []
    monkeypatch.setattr(card, "missing", lambda packages: asked.extend(packages) or ["torch"])
    ran = []
    monkeypatch.setattr(card, "run_part", lambda part, *rest: ran.append(part.arguments) or [])
    of_torch = PARTS["grpo gpt2 64x(512+512)"]
    *_, table = card.tables([of_torch, parts["good"]], 1000.0, "")
    [row] = table["rows"]
    assert (row["variant"], row["metric"], row["value"]) == ("missing", "torch", 1)
    left = "bench grpo --preset gpt2 --rows 64 --prompt 512 --response 512 --microbatches 4"
    assert ran == [(*left.split(), "--dtype", "bfloat16"), ("good",)]
    assert {"rlhf-jax", "jax", "orbax-checkpoint", "PyYAML", "torch"} <= {*asked}


def test_what_is_missing_is_found_under_any_spelling(tmp_path, monkeypatch):
    """A folder that a broken installation left behind is none."""
    (tmp_path / "no_such_thing-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert card.missing(["NumPy", "orbax.checkpoint", "no-such-thing"]) == ["no-such-thing"]


@pytest.mark.parametrize(
    ("platforms", "said", "runs"),
    [("", "False", False), ("", "True", True), ("", "", False), ("cpu", "False", True)],
)
def test_a_pytorch_that_does_not_know_the_card_is_missing(platforms, said, runs, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(card, "_said_by", lambda *command: said)
    assert card.torch_runs() == runs


def test_without_pytorch_for_the_card_its_parts_run_alone(parts, monkeypatch):
    monkeypatch.setattr(card, "machine", lambda: "a card")
    monkeypatch.setattr(card, "torch_runs", lambda: False)
    *_, table = card.tables([parts["good"]], 1000.0, "")
    assert [row["metric"] for row in table["rows"]] == ["torch", "a", "b"]


def test_a_command_that_is_not_there_says_nothing():
    assert card._said_by("no-such-command") == ""
    assert card._said_by(sys.executable, "-c", "print(3)") == "3"


def test_a_number_that_is_none_is_no_small_gap():
    """Whichever leaf it is in."""
    numbers = {"logits": np.ones(2), "said": np.ones(2), "loss": np.float32(1)}
    weights = {"a": np.zeros(2), "b": np.zeros(2)}
    for name in weights:
        broken = weights | {name: np.array([0.0, np.nan])}
        gaps = card._gaps(numbers | {"weights": weights}, numbers | {"weights": broken})
        assert np.isnan(gaps["weights gap"])


def test_a_tree_that_is_not_installed_has_a_version():
    """``-S``: without the packages of this environment."""
    words = "import rlhf_jax; print(rlhf_jax.__version__)"
    project = {"name": "rlhf-jax", "version": "1.2.3"}
    for absent, version in ((["rlhf-jax"], "1.2.3\n"), ([], "")):
        with card.module_path(project, absent) as path:
            done = subprocess.run(
                [sys.executable, "-S", "-c", words],
                env={"PYTHONPATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.stdout == version


def test_the_other_program_is_named():
    part = PARTS["sft gpt2 16x(1+1023)"]
    [row] = card.rows_of(part, {"ratio": 2.0})
    assert row["variant"] == "sft gpt2 16x(1+1023) beside hand"


def test_a_failed_part_fails_the_script_after_the_table_is_written(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "machine", lambda: "a card")
    monkeypatch.setattr(card, "PARTS", [parts["fail"], parts["good"]])
    out = tmp_path / "card.json"
    monkeypatch.setattr(card.sys, "argv", ["card.py", "--out", str(out)])
    with pytest.raises(SystemExit, match="failed: fail"):
        card.main()
    assert [row["metric"] for row in json.loads(out.read_text())["rows"]] == ["failed", "a", "b"]
    monkeypatch.setattr(card.sys, "argv", ["card.py", "--out", str(out), "--only", "good"])
    card.main()
    assert json.loads(out.read_text())["rows"][0]["variant"] == "good"


def test_a_part_that_there_is_not_is_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path / "card.json"
    monkeypatch.setattr(card.sys, "argv", ["card.py", "--out", str(out), "--only", "right,benhc"])
    with pytest.raises(SystemExit):
        card.main()
    assert "benhc; there are peaks, right" in capsys.readouterr().err
    assert not out.exists()


def test_the_table_is_written_after_each_part(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "machine", lambda: "a card")
    monkeypatch.setattr(card, "PARTS", [parts["good"], parts["stay"]])
    out = tmp_path / "card.json"
    monkeypatch.setattr(card.sys, "argv", ["card.py", "--out", str(out)])
    run_part = card.run_part

    def ended(part, *rest):
        if part.name == "stay":
            raise KeyboardInterrupt
        return run_part(part, *rest)

    monkeypatch.setattr(card, "run_part", ended)
    with pytest.raises(KeyboardInterrupt):
        card.main()
    assert [row["metric"] for row in json.loads(out.read_text())["rows"]] == ["a", "b"]


def test_a_part_ends_with_the_script(parts, tmp_path):
    """As under an outer limit, which sends SIGTERM."""
    child = tmp_path / "child"
    words = (
        "import sys; sys.path.insert(0, sys.argv[1]); import card\n"
        "card.__file__ = sys.argv[2]\n"
        "card.PARTS = [card.Part('stay', ('stay',), 60.0)]\n"
        "card.machine, card.torch_runs = str, lambda: True\n"
        "sys.argv = ['card.py', '--out', sys.argv[3]]\n"
        "card.main()\n"
    )
    file = tmp_path / "stays.py"
    file.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(child)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    arguments = [str(ROOT / "benchmarks"), str(file), str(tmp_path / "card.json")]
    script = subprocess.Popen([sys.executable, "-c", words, *arguments])
    patience = time.monotonic() + 60
    while not (child.exists() and child.read_text()) and time.monotonic() < patience:
        time.sleep(0.05)
    script.terminate()
    assert script.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
