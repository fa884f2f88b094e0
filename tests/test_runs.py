"""Who may use a run folder, and the folder of a pipeline."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from rlhf_jax.config import RunConfig
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.runs import folder
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.folder import open_run
from rlhf_jax.runs.manifest import write_config, write_manifest
from rlhf_jax.training.pipeline import check_folder


def finished_run(path: Path) -> None:
    with open_run(path) as run:
        write_config(run, "seed: 3\n")
        write_manifest(run, seed=3, data_fingerprints={})
        with Checkpoints(run.checkpoints) as checkpoints:
            checkpoints.save(0, {"a": jnp.ones(2)}, {})


def test_a_new_or_empty_folder_is_taken(tmp_path):
    for path in (tmp_path / "a" / "b", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with open_run(path) as run:
            assert run.path == path
            assert not run.resumed
            assert run.path.is_dir()
            assert run.metrics.parent == run.model.parent == run.report.parent == run.path
        open_run(str(path)).close()  # a run that ended before it wrote anything blocks nothing


def end_with(error: BaseException, path: Path, *, saved: bool = False, **options: bool) -> None:
    with open_run(path, **options) as run:
        run.config.write_text("x")
        run.metrics.write_text("x")
        if saved:
            with Checkpoints(run.checkpoints) as checkpoints:
                checkpoints.save(0, {"a": jnp.ones(2)}, {})
        raise error


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_mistake_found_before_the_first_checkpoint_leaves_the_folder_free(tmp_path, options):
    (tmp_path / "run").mkdir()
    if "overwrite" in options:
        finished_run(tmp_path / "run")
    with pytest.raises(UserError, match="no such model"):
        end_with(UserError("no such model"), tmp_path / "run", **options)
    open_run(tmp_path / "run").close()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("error", [UserError("late"), TrainingFault("out of memory"), KeyboardInterrupt()])
def test_what_a_run_has_written_stays_after_any_other_end(tmp_path, error, saved):
    if isinstance(error, UserError) and not saved:
        (tmp_path / "metrics.jsonl").touch()  # of a run that was killed before its first checkpoint
    with pytest.raises(type(error)):
        end_with(error, tmp_path, saved=saved, resume=True)
    assert (tmp_path / "config.yaml").read_text() == "x"


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("used", {}, r"holds files already; give --resume .* --overwrite"),
        ("used", {"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
        ("none", {"resume": True}, r"--resume: .*none does not exist"),
        ("file", {"overwrite": True}, "file is a file; --output-dir needs a folder"),
        ("file/run", {}, r"file/run: cannot be used as a run folder"),
    ],
)
def test_a_folder_that_is_refused_stays_as_it_is(tmp_path, path, options, message):
    (tmp_path / "used").mkdir()
    for name in ("file", "used/any.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message):
        open_run(tmp_path / path, **options)
    assert {entry.relative_to(tmp_path).as_posix() for entry in tmp_path.rglob("*")} == {"file", "used", "used/any.txt"}
    assert (tmp_path / "file").read_text() == (tmp_path / "used" / "any.txt").read_text() == "x"


def test_resume_with_and_without_a_checkpoint(tmp_path, capsys):
    (tmp_path / "killed").mkdir()
    for content in (None, "config.yaml", "checkpoints/5.orbax-checkpoint-tmp"):
        if content:
            (tmp_path / "killed" / content).mkdir(parents=True)
        with open_run(tmp_path / "killed", resume=True) as run:
            assert not run.resumed
        assert "no complete checkpoint; the run starts from the beginning" in capsys.readouterr().out
    finished_run(tmp_path / "run")
    with open_run(tmp_path / "run", resume=True) as run:
        assert run.resumed
        assert run.manifest.exists()
    assert capsys.readouterr().out == ""


def test_overwrite_empties_a_run_folder(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "data.json").write_text("x")
    run_folder = tmp_path / "run"
    finished_run(run_folder)
    (run_folder / "sft").mkdir()
    (run_folder / "sft" / "metrics.jsonl").write_text("{}")
    (run_folder / "summary.txt").write_text("x")
    (run_folder / "link").symlink_to(kept)
    with open_run(run_folder, overwrite=True) as run:
        assert {p.name for p in run.path.iterdir()} == {".lock", ".pid"}
    assert (kept / "data.json").exists()
    open_run(tmp_path / "new", overwrite=True).close()  # nothing there is fine


@pytest.mark.parametrize("names", [["config.yaml"], ["checkpoints/3/x"], ["metrics.jsonl", "config.yaml.tmp"]])
def test_overwrite_takes_what_a_killed_run_left(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with open_run(tmp_path, overwrite=True) as run:
        assert {p.name for p in run.path.iterdir()} == {".lock", ".pid"}


@pytest.mark.parametrize("manifest", [None, "{}", "no json", '{"versions": {"other": 1}}', "[]"])
def test_overwrite_deletes_nothing_that_is_no_run(tmp_path, manifest):
    """A project folder may well hold a config.yaml, or a manifest.json of something else."""
    (tmp_path / "config.yaml").write_text("x")
    (tmp_path / "thesis.tex").write_text("x")
    if manifest:
        (tmp_path / "manifest.json").write_text(manifest)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"not look like a run folder \(it holds thesis.tex\); nothing was deleted"):
        open_run(tmp_path, overwrite=True)
    assert sorted(tmp_path.iterdir()) == before


HOLDER = """
import sys, time
from rlhf_jax.runs.folder import open_run
run = open_run(sys.argv[1])
print("open", flush=True)
time.sleep(60)
"""


def test_one_writer(tmp_path):
    """The holder is named, and a killed holder does not block."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"open\n"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=f"is in use by the process with PID {process.pid};"):
                open_run(tmp_path, **options)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with open_run(tmp_path) as run:
        assert (run.path / ".pid").read_text() == f"{os.getpid()}\n"
        with pytest.raises(UserError, match=f"PID {os.getpid()}"):
            open_run(tmp_path, resume=True)
    open_run(tmp_path).close()


def test_a_refusal_does_not_keep_the_folder_locked(tmp_path, monkeypatch):
    def fail(path):
        raise UserError("no")

    finished_run(tmp_path)
    monkeypatch.setattr(folder, "_clear", fail)
    with pytest.raises(UserError, match="no"):
        open_run(tmp_path, overwrite=True)
    open_run(tmp_path, resume=True).close()


def test_a_pipeline_that_was_killed_before_it_had_a_checkpoint_says_so(tmp_path, capsys):
    config = RunConfig(resume=True)
    with pytest.raises(UserError, match=r"--resume: .*none does not exist"):
        check_folder(tmp_path / "none", config)
    check_folder(tmp_path, config)
    assert "holds no complete checkpoint; the run starts from the beginning" in capsys.readouterr().out
    (tmp_path / "sft" / "checkpoints" / "0").mkdir(parents=True)
    check_folder(tmp_path, config)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="holds files already"):
        check_folder(tmp_path, RunConfig())


def test_a_pipeline_whose_first_stage_found_a_mistake_takes_its_folder_again(tmp_path):
    with pytest.raises(UserError, match="no such model"):
        end_with(UserError("no such model"), tmp_path / "sft")
    check_folder(tmp_path, RunConfig())
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds files already"):
        check_folder(tmp_path, RunConfig())
