"""``rlhf-jax fork``: the trunk's bits are the run's, and what differs after it is the change."""

import contextlib
import errno
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from builders import letters_stage, run_stage

from rlhf_jax import cli
from rlhf_jax.cli import verify
from rlhf_jax.cli.fork import fork
from rlhf_jax.config import RunConfig
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.runs import writing
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.training.supervised import reading
from rlhf_jax.training.supervised.job import Job


@pytest.fixture(scope="module")
def batches():
    """{step: row numbers} of the batches that were formed last."""
    formed = {}
    step_rows = Job.step_rows

    def recorded(job, step):
        formed[step] = step_rows(job, step)
        return formed[step]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "step_rows", recorded)
        yield formed


@pytest.fixture(scope="module")
def trained(tmp_path_factory, batches):
    """A run of SFT of six steps, two epochs, with the checkpoints 4 and 6, and its batches."""
    folder = run_stage(letters_stage(tmp_path_factory.mktemp("trunk"), "sft"), "sft")
    return folder, {step: rows.tolist() for step, rows in batches.items()}


@pytest.fixture
def run(trained):
    return trained[0]


def contents(folder):
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def arrays(folder, step):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return {name: array.tobytes() for name, array in checkpoints.arrays(step).items()}


def changes(folder):
    """The keys of the settings that the fork changed."""
    sentences = json.loads((folder / "manifest.json").read_text())["fork"]["changes"]
    return [sentence.split()[0] for sentence in sentences]


def first_difference(said):
    """[step, file, what ...] of the printed table."""
    [header, first] = said[said.index("step  ") :].splitlines()[:2]
    assert header.split() == ["step", "file", "first", "difference", "run", "fork"]
    return first.split()


def rows(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_without_a_change_a_fork_has_the_bits_of_the_run_to_its_end(run, tmp_path, capsys):
    before = contents(run)
    ours = tmp_path / "new" / "fork"
    assert not cli.run(["fork", str(run), "--at", "4", "--output-dir", str(ours), "--trust-config"])
    assert "nothing differs" in capsys.readouterr().out
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors", "config.yaml"):
        theirs = (run / name).read_bytes()
        assert (ours / name).read_bytes().replace(bytes(ours), bytes(run)) == theirs
    assert arrays(ours, 6) == arrays(run, 6)
    manifest = json.loads((ours / "manifest.json").read_text())
    assert manifest["fork"] == {"run": str(run), "step": 4, "changes": []}
    assert contents(run) == before


def test_a_changed_setting_has_its_effect_after_the_trunk(run, tmp_path, capsys):
    ours = tmp_path / "fork"
    rate = ["--set", "sft.optimizer.learning_rate=0.5"]
    more = [
        "--set",
        "keep-best=min:validation/loss",
        "--set",
        "alerts=[sft/loss > 99, grad_norm > 99]",
    ]
    source = ["fork", str(run), "--at", "4", "--output-dir", str(ours), "--trust-config"]
    assert not cli.run([*source, *rate, *more, "--set", "checkpoint_async=true"])
    said = capsys.readouterr().out
    assert "changed: sft.optimizer.learning_rate was " in said
    assert first_difference(said)[:2] == ["5", "metrics.jsonl"]
    assert rows(ours)[:5] == rows(run)[:5]
    assert arrays(ours, 4) == arrays(run, 4)
    assert arrays(ours, 6) != arrays(run, 6)
    assert sorted(changes(ours)) == [
        "alerts",
        "checkpoint_async",
        "keep_best",
        rate[1].split("=")[0],
    ]
    settings = yaml.safe_load((ours / "config.yaml").read_text())
    assert settings["checkpoint_async"] is True
    assert settings["alerts"] == ["sft/loss > 99", "grad_norm > 99"]


def test_what_a_fork_sets_to_auto_or_null_is_decided_anew(run, tmp_path):
    """And stays so after a stop; the run's own values were the defaults."""
    of_run = yaml.safe_load((run / "config.yaml").read_text())
    given = ["sft.optimizer.learning_rate=0.5", "compute.remat=true", "compute.scan_layers=true"]
    fork(run, 4, tmp_path / "given", given, trust_config=True)
    decided = ["sft.optimizer.learning_rate=null", "compute.remat=auto", "compute.scan_layers=auto"]
    fork(tmp_path / "given", 4, tmp_path / "fork", decided, trust_config=True)
    before, after = (
        yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("given", "fork")
    )
    assert before["compute"]["scan_layers"] is before["compute"]["remat"] is True
    assert after["compute"] == of_run["compute"]
    assert after["sft"] == of_run["sft"] != before["sft"]
    assert sorted(changes(tmp_path / "fork")) == [
        "compute.remat",
        "compute.scan_layers",
        "sft.optimizer.learning_rate",
    ]
    assert rows(tmp_path / "fork") == rows(run) != rows(tmp_path / "given")


def test_a_row_is_missing_in_its_batches_and_all_else_is_as_with_it(
    trained, tmp_path, batches, capsys
):
    """One row of the last batch, and in a fork of that fork the other three: nothing is left."""
    theirs, whole = trained
    last = whole[6]
    left_out = []
    for missing in (last[:1], last[1:]):
        left_out += missing
        ours = tmp_path / f"without_{len(left_out)}"
        names = [str(row + 1) for row in missing]
        fork(theirs, 4, ours, without_row=names, trust_config=True)
        assert changes(ours) == ["sft.without_rows"]
        assert first_difference(capsys.readouterr().out)[:2] == ["6", "metrics.jsonl"]
        for step in (5, 6):
            expected = [-1 if row in left_out else row for row in whole[step]]
            assert batches[step].tolist() == expected
        assert arrays(ours, 6) != arrays(theirs, 6)
        theirs = ours
    settings = yaml.safe_load((ours / "config.yaml").read_text())
    assert settings["sft"]["without_rows"] == [str(row + 1) for row in last]
    assert json.loads(rows(ours)[-1])["sft/loss"] == 0


def test_names_of_rows_are_those_of_reports():
    sources = ["a.json, row 1", "a.json, row 2", "b.jsonl, line 2", "b.jsonl, line 2", "c, row 12"]
    encoded = SimpleNamespace(sources=sources)

    def numbers(*names):
        return reading.left_out("dpo", names, encoded, np.array([0]))

    assert numbers("12", "b.jsonl:2", "a.json:2") == [4, 2, 3, 1]
    assert numbers() == []
    for name, message in {
        "2": "give FILE:2, since it is a.json, row 2 or b.jsonl, line 2",
        "1": "the row is held out",
        "3": "there is no such row",
        ".*": "there is no such row",
        ".*son:2": "there is no such row",
        "c:2": "there is no such row",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"dpo.without_rows {name}: {message}")):
            numbers(name)


@pytest.mark.slow
def test_a_fork_that_was_stopped_goes_on_by_the_command_that_it_prints(run, tmp_path, monkeypatch):
    argv = ["fork", str(run), "--at", "4", "--set", "sft.optimizer.learning_rate=0.5"]
    argv += ["--trust-config", "--output-dir"]
    cli.run([*argv, str(tmp_path / "whole")])
    step_rows = Job.step_rows

    def stopping(job, step):
        if step == 5 and "sft" not in sys.argv:
            signal.raise_signal(signal.SIGTERM)
        return step_rows(job, step)

    ours = tmp_path / "stopped"
    monkeypatch.setattr(Job, "step_rows", stopping)
    monkeypatch.setattr(sys, "argv", ["rlhf-jax", *argv, str(ours)])
    with pytest.raises(Stopped, match="after step 5 of 6") as stopped:
        cli.run(sys.argv[1:])
    command = str(stopped.value).splitlines()[-1].strip()
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    cli.run(sys.argv[1:])
    assert rows(ours) == rows(tmp_path / "whole") != rows(run)
    assert arrays(ours, 6) == arrays(tmp_path / "whole", 6)
    assert json.loads((ours / "manifest.json").read_text())["fork"]["step"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": 5}, "--at 5: .* of these steps: 4, 6$"),
        ({"settings": ["sft.batch_size"]}, "--set sft.batch_size: give KEY=VALUE"),
        ({"settings": ["=5"]}, "--set =5: give KEY=VALUE"),
        ({"settings": ["output_dir=x"]}, "--set output_dir=x: a fork has its own"),
        ({"settings": ["mesh.data=2"]}, "a fork has its own"),
        ({"settings": ["seed=3"]}, "--set seed=3: other rows would be held out"),
        ({"settings": ["sft.validation_fraction=0.5"]}, "other rows would be held out"),
        ({"at": 6}, "--at 6: no step is left to make"),
        ({"settings": ["sft.bach_size=2"]}, "unknown flag --sft.bach-size"),
        ({"settings": ["checkpoint_async=yes"]}, "takes no value, got yes"),
        ({"settings": ["alerts=[a"]}, "--set alerts: cannot be read as YAML"),
        ({"settings": ["rl.kl_coef=1"]}, "--rl.kl-coef is a setting that this command does not"),
        ({"settings": ["network.hidden_size=16"]}, "hidden_size was 8 and is now 16: .* not fit"),
        ({"reward": ["count:a"]}, "--reward is a setting that this command does not read"),
        ({"without_row": ["17"]}, "without_rows 17: there is no such row"),
        ({"trust_config": False}, "--trust-config"),
    ],
)
def test_what_cannot_be_forked_is_a_sentence_and_leaves_no_folder(run, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fork(run, output_dir=tmp_path / "fork", **{"at": 4, "trust_config": True} | options)
    assert not (tmp_path / "fork").exists()


def test_a_full_disk_is_one_short_sentence_and_leaves_no_half_of_a_copy(run, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"fork: cannot be written: No space left on device$"):
        fork(run, 4, tmp_path / "fork", trust_config=True)
    assert list((tmp_path / "fork").iterdir()) == []


def test_where_the_run_ends_nothing_is_compared(run, tmp_path, capsys):
    more = ["sft.num_epochs=3"]
    fork(run, 6, tmp_path / "fork", more, trust_config=True)
    assert len(rows(tmp_path / "fork")) > len(rows(run))
    said = capsys.readouterr().out
    assert "the run has no step after 6: nothing was compared" in said


def test_folders_are_refused_before_anything_is_read(run, tmp_path):
    with pytest.raises(UserError, match="is in the run's folder"):
        fork(run, 4, run / "fork")
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="holds files already"):
        fork(run, 4, tmp_path, trust_config=True)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    [file] = (damaged / "checkpoints" / "4" / "state" / "d").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoints/4 is not as it was in the run: .*damaged"):
        fork(damaged, 4, tmp_path / "fork", trust_config=True)


class Killed(BaseException):
    """No handler of errors sees it, as none sees SIGKILL."""


def killed_at(patch, last, moves=False):
    """The file number ``last`` is copied by half, or not moved, and then the process is gone."""
    count = itertools.count(1)
    copy, move = shutil.copyfile, Path.rename

    def copying(source, target, **how):
        if not moves and next(count) == last:
            Path(target).write_bytes(Path(source).read_bytes()[: Path(source).stat().st_size // 2])
            raise Killed
        return copy(source, target, **how)

    def moving(source, target):
        if moves and next(count) == last:
            raise Killed
        return move(source, target)

    patch.setattr(shutil, "copyfile", copying)
    patch.setattr(Path, "rename", moving)
    patch.setattr(writing, "delete", lambda *_, **__: None)  # of what is unfinished
    patch.setattr(verify, "train", stop)


def stop(*_):
    raise Killed


def texts(folder):
    """{name: content} of the files of a copy."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    names = {path: path.relative_to(folder).as_posix() for path in files}
    return {name: path.read_bytes() for path, name in names.items() if name[0] != "."}


def test_a_copy_killed_at_any_file_or_move_is_no_run(run, tmp_path, monkeypatch):
    """Nothing has a name before all is copied, and the manifest gets its name last."""
    facts = {"fork": {"run": str(run), "step": 4, "changes": []}}

    def kill(name, *at):
        with monkeypatch.context() as patch:
            killed_at(patch, *at)
            with contextlib.suppress(Killed):
                verify.copy_start(run, tmp_path / name, RunConfig(), 4, facts)
        return texts(tmp_path / name)

    whole = kill("whole", 0)
    assert json.loads(whole["manifest.json"]) == facts
    assert whole["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    for number in range(1, len(whole) - 1):  # all but config.yaml and manifest.json
        ours = f"copy_{number}"
        assert kill(ours, number) == {}
        assert len(list((tmp_path / ours).iterdir())) == 1  # what is unfinished
        assert kill(ours, 0) == whole
    entries = {name.partition("/")[0] for name in whole}
    for number in range(1, len(entries) + 1):
        left = kill(f"move_{number}", number, True)
        assert len({name.partition("/")[0] for name in left}) == number - 1
        assert "manifest.json" not in left


def test_after_a_kill_in_the_copy_the_same_command_goes_on_or_says_what_to_do(
    run, tmp_path, monkeypatch
):
    def kill(*at):
        with monkeypatch.context() as patch:
            killed_at(patch, *at)
            with pytest.raises(Killed):
                fork(run, 4, tmp_path / "fork", ["sft.batch_size=3"], trust_config=True)
        return texts(tmp_path / "fork")

    assert kill(3) == {}
    assert kill(1, True) == {}
    assert "manifest.json" not in kill(2, True)
    with pytest.raises(UserError, match="holds files already; choose another --output-dir"):
        kill(0)


def test_a_fork_killed_before_its_training_goes_on_with_the_change(run, tmp_path, monkeypatch):
    """By the command of the docs, or by the same command again, which another one is not."""
    rate = ["sft.optimizer.learning_rate=0.5"]

    with monkeypatch.context() as patch:
        patch.setattr(verify, "train", stop)
        with pytest.raises(Killed):
            fork(run, 4, tmp_path / "killed", rate, trust_config=True)
    again = shutil.copytree(tmp_path / "killed", tmp_path / "again")
    config = ["--config", str(again / "config.yaml"), "--output-dir", str(again), "--resume"]
    assert not cli.run(["sft", *config, "--trust-config"])
    before = contents(tmp_path / "killed")
    texts_before = texts(tmp_path / "killed")
    for at, other in ((4, []), (6, rate)):
        with pytest.raises(UserError, match="holds files already; choose another --output-dir"):
            fork(run, at, tmp_path / "killed", other, trust_config=True)
    assert contents(tmp_path / "killed") == before
    release = writing.take_lock(tmp_path / "killed" / ".lock", "the folder is in use", "wait")
    with pytest.raises(UserError, match="in use"):  # the first command runs on
        fork(run, 4, tmp_path / "killed", rate, trust_config=True)
    release()
    assert texts(tmp_path / "killed") == texts_before
    fork(run, 4, tmp_path / "killed", rate, trust_config=True)
    assert rows(again) == rows(tmp_path / "killed") != rows(run)
    for ours in (again, tmp_path / "killed"):
        settings = yaml.safe_load((ours / "config.yaml").read_text())
        assert settings["sft"]["optimizer"]["learning_rate"] == 0.5
        assert changes(ours) == ["sft.optimizer.learning_rate"]
    fork(run, 4, tmp_path / "killed", rate, trust_config=True)  # it is done: it compares
    assert rows(again) == rows(tmp_path / "killed")


def test_a_full_disk_is_a_sentence_and_leaves_a_free_folder(run, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(UserError, match=r"/fork: cannot be written: No space left on device$"):
            fork(run, 4, tmp_path / "fork", trust_config=True)
    assert list((tmp_path / "fork").iterdir()) == []


def test_of_two_forks_at_once_the_second_replaces_nothing(run, tmp_path, monkeypatch):
    """It was begun before the first had its files."""
    ours = tmp_path / "fork"
    monkeypatch.setattr(verify, "train", stop)
    with pytest.raises(Killed):
        fork(run, 4, ours, trust_config=True)
    before = contents(ours)
    monkeypatch.setattr("rlhf_jax.cli.fork.folder.is_unused", lambda _: True)
    with pytest.raises(UserError, match="cannot be written: Directory not empty"):
        fork(run, 4, ours, trust_config=True)
    assert contents(ours) == before


@pytest.mark.slow
def test_another_reward_is_learned_from_after_the_trunk(tmp_path, capsys):
    folder = run_stage(letters_stage(tmp_path, "vpg"), "vpg")
    fork(folder, 2, tmp_path / "same", trust_config=True)
    assert "nothing differs" in capsys.readouterr().out
    fork(folder, 2, tmp_path / "other", reward=["length:1"], trust_config=True)
    assert changes(tmp_path / "other") == ["reward"]
    assert first_difference(capsys.readouterr().out)[:2] == ["3", "metrics.jsonl"]
    with pytest.raises(UserError, match="--without-row: vpg learns from its own samples"):
        fork(folder, 2, tmp_path / "third", without_row=["1"], trust_config=True)
