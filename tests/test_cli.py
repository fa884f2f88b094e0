"""The rlhf-jax command: every command's effect, and what it says to a mistake."""

import ast
import contextlib
import functools
import importlib
import io
import logging
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import yaml
from builders import COMMAND, ROOT, initial_params, slow, write_run
from source import Function, parse

import rlhf_jax
from rlhf_jax import cli, config, models, training
from rlhf_jax.cli import doctor
from rlhf_jax.cli.commands import COMMANDS
from rlhf_jax.cli.console import print_table
from rlhf_jax.cli.stages import STAGES, method_names
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import Stopped, TrainingFault, UserError
from rlhf_jax.report import records, verdict

NAMES = [*STAGES, *COMMANDS]
KNOWN = [*NAMES, *method_names()]


def test_data_demo_writes_the_pipelines_files(tmp_path, capsys):
    cli.run(["data", "demo", str(tmp_path / "demo"), "--seed", "3"])
    names = {file.name for file in (tmp_path / "demo").iterdir()}
    assert names >= {"sft_data.json", "preference_data.json", "prompts.json"}
    for command, shown in (("check", "sft_data.json"), ("preview", "prompt")):
        assert cli.run(["data", command, str(tmp_path / "demo" / "sft_data.json")]) in (None, 0)
        assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ("nil", None),
        ("--nil", None),
        ("bench", None),
        ("docter", "doctor"),
        ("reward_model", "reward-model"),
        ("data demos", "data demo"),
    ],
)
def test_an_unknown_command_lists_those_there_are(argv, meant):
    """Methods too, which have no line of help."""
    hint = f"; did you mean {meant}?" if meant else ""
    with pytest.raises(
        UserError, match=re.escape(f"'{argv}'{hint}\nThere are: {', '.join(KNOWN)}") + "$"
    ):
        cli.run(argv.split())


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_names_every_command_in_groups_on_one_screen(argv, capsys):
    assert cli.run(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24  # and the line of the shell's prompt
    assert max(map(len, lines)) < 80
    assert lines[0].split()[:2] == ["Train", "quickstart"]
    groups = [line.split()[0] for line in lines[:-1] if line[0] != " "]
    assert groups == ["Train", "Use", "Look", "Data", "Machine"]
    named = re.findall(r"[a-z-]+", " ".join(line[9:25] for line in lines[:-1]))
    assert sorted(named) == sorted({name.split()[0] for name in NAMES})


def test_the_help_of_data_lists_its_own_commands(capsys):
    assert cli.run(["data", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    described = [line[2:16].strip() for line in lines if line.startswith("  ")]
    assert described == ["data check", "data preview", "data demo", "data gym"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("plan", "rlhf-jax plan: the following arguments are required: stage"),
        ("sft --lr 3", "unknown flag --lr; here it is --sft.optimizer.learning-rate"),
        ("grpo --lr 3", "unknown flag --lr; here it is --rl.optimizer.learning-rate"),
        ("configs tny", "rlhf-jax configs: no settings 'tny'; did you mean tiny?"),
    ],
)
def test_every_command_says_what_is_wrong_with_its_line_in_one_way(line, says):
    with pytest.raises(UserError) as error:
        cli.run(line.split())
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("chat", "RUN .*the folder of a finished run, or of a model"),
        ("chat runs/a --compar runs/b", "--compar, runs/b .*meant: --compare "),
        ("evaluate runs/a --zzz=1", "--zzz"),
        ("data check a --on-bad-row b", "'b' for argument '--on-bad-row'.*'error', 'drop'"),
        ("data demo a --seed b", "--seed: .* 'b'"),
        ("data demo a --seed", "Missing value for argument '--seed'"),
        ("sft --sft.max-steps b", "--sft.max-steps: .* 'b'"),
    ],
)
def test_tyro_says_on_stderr_which_value_is_wrong(line, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run_script(lambda: cli.run(line.split()))
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", shown.err).split())
    assert re.search(says, text)
    assert "Traceback" not in text
    name = line.partition(" --")[0].removesuffix(" a").removesuffix(" runs/a")
    assert f"rlhf-jax {name} --help" in text


def test_the_lines_of_help_fit_a_terminal(capsys):
    with mock.patch.dict(os.environ, COLUMNS="80"), pytest.raises(SystemExit, match="0"):
        cli.run(["chat", "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "--template-options JSON" in text


@functools.cache
def help_of(name):
    """What a command's ``--help`` prints, in 100 columns."""
    shown = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="100"),
        contextlib.redirect_stdout(shown),
        pytest.raises(SystemExit) as ended,
    ):
        cli.run([*name.split(), "--help"])
    assert ended.value.code == 0
    return shown.getvalue()


HELP = """
import contextlib, io, sys
from jax._src import xla_bridge
from rlhf_jax import cli

for name in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.run([*name.split(), "--help"])
print(xla_bridge.backends_are_initialized(), *sys.modules)
"""
# Each takes a good part of a second to import, and only some commands use it.
HEAVY = {"torch", "transformers", "datasets", "pandas", "matplotlib", "sympy", "math_verify"}
HEAVY |= {"tensorboard", "tensorboardX", "wandb", "starlette", "uvicorn", "httpx", "IPython"}
HEAVY |= {"scipy.stats", "scipy.optimize", "scipy.ndimage", "flax.nnx"}


@pytest.mark.slow
def test_help_waits_for_no_device_and_for_no_heavy_package():
    command = [sys.executable, "-c", HELP, *NAMES]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    has_devices, *imported = done.stdout.split()
    assert has_devices == "False"
    assert "rlhf_jax.config" in imported
    assert not HEAVY & set(imported)


FAST_HELP = {"reward-model", "ppo", "dpo", "data check", "evaluate", "chat", "label"}


@pytest.mark.parametrize(
    "name", [*sorted(FAST_HELP), *map(slow, sorted({*NAMES} - FAST_HELP - {"quickstart", "plan"}))]
)
def test_a_commands_help_describes_it_and_its_own_options(name):
    text = help_of(name)
    assert text.startswith(f"usage: rlhf-jax {name} ")
    assert text.count("\n") < (460 if name == "pipeline" else 370)
    sections = set(re.findall(r"--([a-z-]+)\.", text)) & set(STAGES)
    own = {"sft", "reward-model", "ppo"} if name == "pipeline" else {name} & set(STAGES)
    assert sections == own


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_help_begins_with_examples_and_the_ten_flags_that_matter_most(name):
    text = help_of(name)
    assert max(map(len, text.splitlines())) <= 100
    examples, rest = text.split("The flags that matter most")
    most, others = rest.split("\nThe run\n")
    assert len(re.findall("^  --", most, re.MULTILINE)) == 10
    flags = set(re.findall(r"(?<= )--[\w.-]+", examples))
    assert flags <= set(re.findall(r"^  (--[\w.-]+) ", most + others, re.MULTILINE))
    assert examples.count(f"\n  rlhf-jax {name} --") == 2


def test_the_list_of_commands_waits_for_no_package():
    code = (
        "import sys; from rlhf_jax import cli; cli.run([]); cli.run(['--version']); "
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert rlhf_jax.__version__ in said
    assert not {"jax", "numpy", "rlhf_jax.config", "rlhf_jax.training"} & set(said)


@pytest.mark.parametrize("name", STAGES)
def test_a_command_runs_its_stage_with_its_settings(name, monkeypatch, capsys, write):
    calls = []
    module = "rl" if name in config.ALGORITHMS else name.replace("-", "_")
    done = types.SimpleNamespace(folder="runs/f", ppo=types.SimpleNamespace(folder="runs/f/ppo"))

    def stand_in(config, *algorithm):
        calls.append((config, *algorithm))
        return done

    monkeypatch.setattr(getattr(training, module), "run", stand_in)
    assert not cli.run([name, "--config", "tiny", write("seed: 3", "own.yaml")])
    place = "runs/f/ppo" if name == "pipeline" else "runs/f"
    assert re.search(rf"^ +rlhf-jax .*{place}[ /\n]", capsys.readouterr().out, re.MULTILINE)
    assert calls[0][0].seed == 3
    assert calls[0][1:] == ((getattr(rlhf_jax, name),) if module == "rl" else ())


def test_an_algorithm_of_one_s_own_is_run_by_flags(monkeypatch, capsys):
    module = types.ModuleType("vapo", "Does as VAPO.\n\nAt length.")
    module.Config = rlhf_jax.ppo.Config
    calls = []
    run = importlib.import_module("rlhf_jax.training.rl")
    monkeypatch.setattr(run, "run", lambda *args, **options: calls.append((args, options)))
    cli.train_algorithm(module, ["--config", "tiny", "--vapo.clip-low", "0.1"], reward=len)
    ((settings, algorithm), options) = calls[0]
    assert settings.own["vapo"].clip_low == 0.1
    assert algorithm == module
    assert options == {"reward": len}
    with pytest.raises(SystemExit):
        cli.train_algorithm(module, ["--help"])
    shown = capsys.readouterr().out
    assert "Does as VAPO." in shown
    assert "At length." not in shown
    assert "--rl.batch-size" in shown
    assert "--sft" not in shown


def test_the_quickstart_and_the_configs_come_with_the_package(capsys):
    with pytest.raises(SystemExit):
        cli.run(["quickstart", "--help"])
    assert "--shuffle-labels" in capsys.readouterr().out
    cli.run(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    files = sorted((ROOT / "configs").rglob("*.yaml"), key=lambda path: path.stem)
    places = ("configs", "algorithms", "defaults")
    assert names == [file.stem for place in places for file in files if file.parent.name == place]
    assert len([line for line in lines if line.endswith(":")]) == len(places)
    cli.run(["configs", "tiny"])
    assert capsys.readouterr().out == (ROOT / "configs/tiny.yaml").read_text("utf-8")


def messages():
    """(file, text) of all strings of the package but its modules', classes' and functions' own, of
    files with a word that the test below looks for.
    """
    for path in sorted(Path(rlhf_jax.__file__).parent.rglob("*.py")):
        code = path.read_text("utf-8")
        if not re.search("experiments|benchmarks|docs|configs|rlhf-jax|-e '", code):
            continue
        nodes = [*ast.walk(parse(code))]
        documented = [
            node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | Function)
        ]
        docstrings = {ast.get_docstring(node, clean=False) for node in documented}
        texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
        for text in texts:
            if isinstance(text, str) and text not in docstrings:
                yield path.name, " ".join(text.split())


def test_a_hint_names_no_file_and_no_command_that_an_installed_package_lacks():
    for file, text in messages():
        assert not re.search(r"\b(experiments|benchmarks|docs|configs)/\w|-e '\.", text), file
        for command in re.findall(r"`rlhf-jax ((?:data )?[a-z-]+)", text):
            assert command in NAMES, f"{file}: {text}"


def test_what_the_package_reports_can_be_silenced(capsys):
    cli.attach_console()
    logger = logging.getLogger("rlhf_jax")
    logger.info("one")
    logger.setLevel(logging.WARNING)
    logger.info("two")
    assert capsys.readouterr().out == "one\n"
    cli.attach_console()


@pytest.mark.soak
def test_doctor_runs_every_phase_and_passes_here(capsys):
    """On four devices; on one it is among README's commands, which test_docs.py runs."""
    assert cli.run(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(phase in said for phase in ("versions", "device 3", *doctor.STEPS))
    assert "FAIL" not in said


def test_doctor_names_each_check_before_it_runs(capsys, monkeypatch):
    said = []

    def step():
        said.append(capsys.readouterr().out.splitlines()[-1].strip())
        return {"loss": 1.0}

    monkeypatch.setattr(doctor.devices, "idle_accelerator", lambda: None)
    monkeypatch.setattr(doctor, "STEPS", dict.fromkeys(["one", "two"], step))
    assert cli.run(["doctor"]) == 0
    assert said[0] == "one"
    assert said[1].endswith("two")


@pytest.mark.parametrize(
    ("metrics", "words"),
    [(lambda: 1 / 0, "ZeroDivisionError"), (lambda: {"a": 1.0, "b": np.nan}, "not finite: b")],
)
def test_doctor_reports_what_is_broken(metrics, words, monkeypatch, capsys):
    monkeypatch.setattr(doctor.devices, "idle_accelerator", lambda: None)
    monkeypatch.setattr(doctor, "STEPS", {"sft": metrics})
    assert cli.run(["doctor"]) == 1
    assert re.search(f"^sft +FAIL +{words}", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(doctor, "STEPS", {})
    assert cli.run(["doctor"]) == 0
    monkeypatch.setattr(doctor.devices, "idle_accelerator", lambda: "This machine has a GPU.")
    assert cli.run(["doctor"]) == 1
    assert "FAIL  This machine has a GPU." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("phase", "metric"),
    [
        ("reward-model", "reward_model/loss"),
        slow("sft", "sft/loss"),
        slow("ppo", "value/loss"),
        slow("dpo", "dpo/loss"),
        slow("vpg", "policy/loss"),
        slow("grpo", "policy/kl_loss"),
    ],
)
def test_doctor_takes_a_step_of_each_phase(phase, metric):
    """Its shapes alone."""
    assert {"loss", "nonfinite", metric} <= jax.eval_shape(doctor.STEPS[phase]).keys()
    phases = ["sft", "reward-model", "dpo", "vpg", "grpo", "ppo", "checkpoint"]
    assert [*doctor.STEPS] == phases


def test_doctor_saves_and_restores_a_checkpoint():
    assert doctor.timed(doctor.STEPS["checkpoint"])[0]


def test_report_writes_a_page_and_prints_where(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name, metrics={"loss": [1.0]}, samples={})
    for argv, path in (
        ("a", "a/report.html"),
        ("a b", "report.html"),
        ("b --output mine.html", "mine.html"),
    ):
        assert not Path(path).exists()
        cli.run(["report", *argv.split()])
        assert capsys.readouterr().out == f"{path}\n"
        assert "<h1>PPO trained on " in Path(path).read_text("utf-8")
    Path("c").mkdir()
    with pytest.raises(UserError, match="c: this folder holds no run"):
        cli.run(["report", "c"])


def test_export_makes_a_folder_with_a_card(tmp_path):
    run = tmp_path / "run"
    folder = tmp_path / "out"
    run.mkdir()
    with pytest.raises(UserError, match="no model here"):
        cli.run(["export", str(run), str(folder)])
    settings = {"model": "gpt2", "text": {"template": "Q: {prompt} A:"}}
    metrics = {"sft/loss": [1.25]}
    write_run(run, stage="sft", settings=settings, metrics=metrics, samples={}, finished=False)
    model = models.build(models.GPT2Config(300, 8, 8, 1, 1))
    params = initial_params(model)
    models.save(run / "model", model, params)
    tokenizers.train_bpe(["some text"], 300).save(run / "model")
    cli.run(["export", str(run), str(folder)])
    card = (folder / "README.md").read_text("utf-8")
    for part in (
        COMMAND,
        "`prompts.json`, sha256 fedcba9876543210",
        "| sft/loss | 1.25 |",
        '"seed": 5',
        "Trained from `gpt2`",
        "```text\nQ: {prompt} A:\n```",
    ):
        assert part in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "gpt2"
    assert head["license"] == "other"
    assert head["datasets"] == []
    assert "FILL IN" in head["license_name"]
    _, loaded = models.load(folder)
    assert (loaded["wte"]["embedding"] == params["wte"]["embedding"]).all()
    with pytest.raises(UserError, match="in use"):
        cli.run(["export", str(run), str(folder)])


@pytest.mark.parametrize(
    ("outcome", "code", "stderr"),
    [
        (3, 3, ""),
        (UserError("a: b"), 2, "error: a: b\n"),
        (TrainingFault("nan"), 1, "error: nan\n"),
        (Stopped("saved", 15), 143, "saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(outcome, code, stderr, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run_script(lambda: outcome if isinstance(outcome, int) else raising(outcome))
    assert caught.value.code == code
    assert capsys.readouterr().err == stderr


def test_cells_of_a_table_are_neither_markup_nor_commands(capsys):
    print_table(["what"], [["[bold]x[/bold]\x1b[2J"]])
    assert "[bold]x[/bold]\\x1b[2J" in capsys.readouterr().out


def test_a_closed_pipe_ends_a_command_without_a_word():
    """As of `rlhf-jax | head -1`: nobody reads any more."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "rlhf_jax"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert done.returncode == 141
    assert done.stderr == b""


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="bug"):
        cli.run_script(lambda: raising(RuntimeError("bug")))


def raising(error):
    raise error


def test_what_a_run_proposes_next_can_be_typed(tmp_path):
    """Each command exists and has the flags that it is given."""
    for kind in records.KINDS:
        for line in verdict.next_commands(kind, tmp_path / "my run"):
            program, *words = shlex.split(line)
            assert program == "rlhf-jax"
            assert help_of(words[0]).startswith(f"usage: rlhf-jax {words[0]} ")
            if words[0] in ("reward-model", "ppo", "dpo"):
                assert f"{tmp_path}/my run/model" in words
            else:
                assert words[1] == str(tmp_path / "my run")
            flags = [word for word in words if word.startswith("--")]
            assert [flag for flag in flags if flag not in help_of(words[0])] == []
