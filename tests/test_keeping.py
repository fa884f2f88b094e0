"""Any one damaged or missing file of a run's folder: ``--resume`` goes on to the same bits, and
says what it restored from where. Two are a sentence.
"""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import replace
from unittest import mock

import pytest
from builders import Killed, run_loop, slow

from rlhf_jax.config import RunConfig
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.runs import keeping, manifest
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.folder import open_run

SCORES = [float(n) for n in range(7)]
STEPS = 6


def config_of(folder, **changes):
    return RunConfig(output_dir=str(folder), checkpoint_interval=2, alerts=("loss > 1",), **changes)


def trains(folder, **options):
    config = config_of(folder, resume=options.pop("resume", False))
    return run_loop(config, num_steps=STEPS, scores=SCORES, validation_interval=2, **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    trains(folder)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed in its last step; its last checkpoint is of step 4."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Killed):
        trains(folder, die_at=5)
    return folder


@pytest.fixture
def copied(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


def bits(folder):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        arrays = {name: array.tobytes() for name, array in checkpoints.arrays(STEPS).items()}
    rows = ("metrics.jsonl", "samples.jsonl", "alerts.jsonl")
    return arrays, [(folder / name).read_bytes() for name in rows]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def gone(path):
    path.unlink()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


TOP = ("config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "alerts.jsonl")


def restored(folder):
    """What ``--resume`` does to the files of a run before it reads its checkpoint and after."""
    with open_run(folder, resume=True) as run, Checkpoints(run.checkpoints) as checkpoints:
        keeping.restore_start(run)
        keeping.restore_rows(run, checkpoints, 4)


@pytest.mark.parametrize(
    ("name", "accident"),
    [
        *((name, flip) for name in (*TOP, "timing.jsonl")),
        *((name, gone) for name in ("manifest.json", "metrics.jsonl", "alerts.jsonl")),
        ("config.yaml", pipe),
        ("samples.jsonl", pipe),
    ],
)
def test_a_damaged_file_of_a_run_is_restored(name, accident, copied, tmp_path, capsys):
    whole = shutil.copytree(copied, tmp_path / "whole")
    restored(whole)
    assert "restored" not in capsys.readouterr().out
    accident(copied / name)
    restored(copied)
    said = capsys.readouterr().out
    source = copied / "checkpoints" / ("start.json" if name in TOP[:2] else "4")
    assert f"--resume: {copied / name} is " in said
    assert f"restored from {source}" in said
    for file in (*TOP, "timing.jsonl"):
        assert (copied / file).read_bytes() == (whole / file).read_bytes()
    assert (copied / f"damaged-{name}").exists() == (accident is not gone)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_run_with_a_damaged_file_goes_on_to_the_same_bits(name, copied, straight):
    flip(copied / name)
    trains(copied, resume=True)
    assert bits(copied) == bits(straight)


@pytest.mark.parametrize("accident", [flip, gone])
def test_a_damaged_copy_is_not_needed(accident, copied, straight, capsys):
    accident(copied / "checkpoints" / "start.json")
    accident(copied / "checkpoints" / "4" / "record" / "metrics.jsonl")
    trains(copied, resume=True)
    assert bits(copied) == bits(straight)
    said = capsys.readouterr().out
    assert ("start.json is damaged; it is written anew" in said) == (accident is flip)
    assert keeping.kept_start(copied).keys() == {"config.yaml", "manifest.json"}


@pytest.mark.filterwarnings("ignore:.*Going back to step 2")
@pytest.mark.parametrize("name", ["record/metadata", slow("state/_METADATA")])
def test_a_damaged_checkpoint_goes_back_to_the_one_before(name, copied, straight):
    flip(copied / "checkpoints" / "4" / name)
    trains(copied, resume=True)
    assert bits(copied) == bits(straight)


def test_nothing_is_restored_where_nothing_is_damaged(copied, straight, capsys):
    trains(copied, resume=True)
    assert bits(copied) == bits(straight)
    assert "restored" not in capsys.readouterr().out
    assert not list(copied.glob("damaged-*"))


def test_what_is_damaged_after_the_checkpoint_is_cut(copied, straight):
    with (copied / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\n")
    trains(copied, resume=True)
    assert bits(copied) == bits(straight)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (("metrics.jsonl", "checkpoints/4/record/metrics.jsonl"), "are both damaged"),
        (("config.yaml", "checkpoints/start.json"), r"config\.yaml"),
    ],
)
def test_two_damaged_files_are_a_sentence(names, error, copied):
    for name in names:
        (copied / name).write_bytes(b"\x00")
    with pytest.raises((UserError, TrainingFault), match=error):
        trains(copied, resume=True)


def test_a_run_that_goes_on_with_other_settings_keeps_those(copied):
    config = replace(config_of(copied), resume=True, alerts=("loss > 9",))
    config = replace(config, allow_changed=("alerts",))
    run_loop(config, num_steps=5, scores=SCORES, validation_interval=2)
    text = keeping.kept_start(copied)["config.yaml"]
    assert "loss > 9" in text
    assert (copied / "config.yaml").read_text() == text
    gone(copied / "config.yaml")
    run_loop(config, num_steps=STEPS, scores=SCORES, validation_interval=2)
    assert "loss > 9" in (copied / "config.yaml").read_text()


def test_the_threads_of_a_run_are_known_without_its_manifest(copied):
    threads = json.loads((copied / "manifest.json").read_text())["threads"]
    gone(copied / "manifest.json")
    assert manifest.threads_of(copied) == threads > 0
    gone(copied / "checkpoints" / "start.json")
    assert manifest.threads_of(copied) is None


def write_start(folder, files):
    text = json.dumps(files, sort_keys=True)
    content = {"files": files, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / keeping.START).write_text(json.dumps(content))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "../../.bashrc",
        "/etc/rlhf_jax",
        "metrics.jsonl",
        "model/config.json",
        "checkpoints",
        ".lock",
    ],
)
def test_no_copy_is_restored_under_a_name_that_no_run_keeps(name, copied):
    """Of the files of the start and of the rows, which have right checksums."""
    files = keeping.kept_start(copied)
    write_start(copied, files | {name: "written by somebody else"})
    gone(copied / "manifest.json")
    before = contents(copied.parent)
    with pytest.raises(UserError, match=rf"start\.json: holds copies of {name}, "):
        trains(copied, resume=True)
    write_start(copied, files)
    with open_run(copied, resume=True) as run:
        keeping.restore_start(run)
        record = {"files": {"../out": {"bytes": 1, "sha256": ""}, "config.yaml": {}}}
        checkpoints = mock.Mock(record=lambda step: record)
        with pytest.raises(UserError, match=r"4: holds copies of \.\./out, config\.yaml, "):
            keeping.restore_rows(run, checkpoints, 4)
    assert contents(copied.parent).keys() - before.keys() <= {copied / "manifest.json"}


@pytest.mark.parametrize(
    "files", [{"manifest.json": 5}, {"config.yaml": "\ud800"}, {"config.yaml": [1]}, [], 5, None]
)
def test_copies_that_are_no_texts_count_as_damaged(files, copied, capsys):
    write_start(copied, files)
    restored(copied)
    assert "start.json is damaged; it is written anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    "facts",
    [{"resumed": []}, {"threads": "2"}, {"resumed": [{"threads": [1]}]}, {"resumed": {}}],
)
def test_the_threads_of_an_odd_manifest_are_not_known(facts, copied):
    (copied / keeping.START).unlink()
    file = copied / "manifest.json"
    recorded = json.loads(file.read_text())
    file.write_text(json.dumps(recorded | facts))
    known = recorded["threads"] if facts == {"resumed": []} else None
    assert manifest.threads_of(copied) == known
    write_start(copied, {"manifest.json": file.read_text()})
    assert manifest.threads_of(copied) == known


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "tracker.json", "alerts.jsonl"])
def test_a_pipe_without_a_copy_keeps_nobody_waiting(name, copied):
    """Nor where a run is overwritten, or the folder is in use."""
    (copied / keeping.START).unlink()
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)
    with contextlib.suppress(UserError, TrainingFault):
        trains(copied, resume=True)
    if name == "manifest.json":
        with (
            pytest.raises(UserError, match="does not look like a run folder"),
            open_run(copied, overwrite=True),
        ):
            pass
    os.mkfifo(copied / ".lock")
    with (
        pytest.raises(UserError, match="cannot be used as a run folder"),
        open_run(copied, resume=True),
    ):
        pass
