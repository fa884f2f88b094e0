"""Who may use a run folder, and the folder of a pipeline."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders import finished_run

from rlhf_jax.config import RunConfig
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.runs import folder
from rlhf_jax.runs.folder import open_run
from rlhf_jax.training.pipeline import check_folder


def make(place: Path, *names: str) -> None:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(
            '{"versions": {"rlhf-jax": "0"}}' if name.endswith("manifest.json") else ""
        )


@pytest.mark.parametrize("name", ["a/b", "empty"])
def test_a_new_or_empty_folder_is_taken(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with open_run(tmp_path / name) as run:
        assert run.path == tmp_path / name
        assert run.path.is_dir()
        assert not run.resumed
    with open_run(str(run.path)):  # a run that ended before it wrote anything blocks nothing
        pass


SAVED = "checkpoints/0/x"


@pytest.mark.parametrize(
    ("error", "options", "before", "written", "stays"),
    [
        *(
            (UserError("no such model"), {option: True}, [], [], False)
            for option in ("resume", "overwrite")
        ),
        (
            UserError("no such model"),
            {"overwrite": True},
            ["config.yaml", SAVED, "manifest.json"],
            [],
            False,
        ),
        (UserError("late"), {"resume": True}, [], [SAVED], True),
        (
            UserError("late"),
            {"resume": True},
            ["metrics.jsonl"],
            [],
            True,
        ),  # of one killed before its first checkpoint
        (TrainingFault("out of memory"), {"resume": True}, [], [], True),
        (KeyboardInterrupt(), {"resume": True}, [], [], True),
    ],
)
def test_only_a_mistake_found_before_the_first_checkpoint_leaves_the_folder_free(
    tmp_path, error, options, before, written, stays
):
    make(tmp_path, *before)
    with pytest.raises(type(error)), open_run(tmp_path, **options):  # noqa: PT012
        make(tmp_path, "config.yaml", *written)
        raise error
    assert (tmp_path / "config.yaml").exists() == stays
    with open_run(tmp_path, resume=stays):
        pass


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("used", {}, r"holds files already; give --resume .* --overwrite"),
        (
            "used",
            {"resume": True, "overwrite": True},
            "--resume and --overwrite exclude each other",
        ),
        ("none", {"resume": True}, r"--resume: .*none does not exist"),
        ("file", {"overwrite": True}, "file is a file; --output-dir needs a folder"),
        ("file/run", {}, r"file/run: cannot be used as a run folder"),
    ],
)
def test_a_folder_that_is_refused_stays_as_it_is(tmp_path, path, options, message):
    make(tmp_path, "file", "used/any.txt")
    with pytest.raises(UserError, match=message), open_run(tmp_path / path, **options):
        pass
    assert {entry.relative_to(tmp_path).as_posix() for entry in tmp_path.rglob("*")} == {
        "file",
        "used",
        "used/any.txt",
    }


def test_resume_with_and_without_a_checkpoint(tmp_path, capsys):
    (tmp_path / "killed").mkdir()
    for content in (None, "config.yaml", "checkpoints/5.orbax-checkpoint-tmp"):
        if content:
            (tmp_path / "killed" / content).mkdir(parents=True)
        with open_run(tmp_path / "killed", resume=True) as run:
            assert not run.resumed
        assert (
            "no complete checkpoint; the run starts from the beginning" in capsys.readouterr().out
        )
    finished_run(tmp_path / "run")
    with open_run(tmp_path / "run", resume=True) as run:
        assert run.resumed
        assert run.manifest.exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("names", [[], ["config.yaml.tmp", SAVED], ["sft/metrics.jsonl", "a.txt"]])
def test_overwrite_empties_a_run_folder(tmp_path, names):
    """A manifest of this package is the proof that the rest may go."""
    make(tmp_path, "kept/data.json", "run/manifest.json", *(f"run/{name}" for name in names))
    (tmp_path / "run" / "link").symlink_to(tmp_path / "kept")
    with open_run(tmp_path / "run", overwrite=True) as run:
        assert {p.name for p in run.path.iterdir()} == {".lock"}
    assert (tmp_path / "kept" / "data.json").exists()


@pytest.mark.parametrize("manifest", [None, "{}", "no json", '{"versions": {"other": 1}}', "[]"])
def test_overwrite_deletes_nothing_that_is_no_run(tmp_path, manifest):
    """A project folder may well hold a config.yaml, or a manifest.json of something else."""
    make(tmp_path, "config.yaml", "thesis.tex")
    if manifest:
        (tmp_path / "manifest.json").write_text(manifest)
    before = sorted(tmp_path.iterdir())
    message = r"not look like a run folder \(it has no manif.* thesis.tex\); nothing was"
    with pytest.raises(UserError, match=message), open_run(tmp_path, overwrite=True):
        pass
    assert sorted(tmp_path.iterdir()) == before


HOLDER = """
import sys, time
from rlhf_jax.runs.folder import open_run
with open_run(sys.argv[1]):
    print("open", flush=True)
    time.sleep(60)
"""


def test_one_writer(tmp_path):
    """The holder is named, and a killed holder does not block."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"open\n"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            message = f"is in use by the process with PID {process.pid};"
            with pytest.raises(UserError, match=message), open_run(tmp_path, **options):
                pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with open_run(tmp_path) as run:
        assert (run.path / ".lock").read_text() == f"{os.getpid()}\n"
        with (
            pytest.raises(UserError, match=f"PID {os.getpid()}"),
            open_run(tmp_path, resume=True),
        ):
            pass
    with open_run(tmp_path):
        pass


def test_what_another_process_wrote_before_the_lock_was_taken_is_kept(tmp_path, monkeypatch):
    take_lock = folder.take_lock

    def late(*given):
        make(tmp_path, "manifest.json", "config.yaml")
        return take_lock(*given)

    monkeypatch.setattr(folder, "take_lock", late)
    with pytest.raises(UserError, match="holds files already"), open_run(tmp_path):
        pass
    assert {entry.name for entry in tmp_path.iterdir()} == {"manifest.json", "config.yaml"}


def test_the_folder_of_a_pipeline(tmp_path, capsys):
    """It is taken again if the first stage found a mistake; a killed one without a checkpoint says
    so.
    """
    resumed = RunConfig(resume=True)
    with pytest.raises(UserError, match=r"--resume: .*none does not exist"):
        check_folder(tmp_path / "none", resumed)
    make(tmp_path, "sft/.lock")
    check_folder(tmp_path, RunConfig())
    check_folder(tmp_path, resumed)
    assert (
        "holds no complete checkpoint; the run starts from the beginning" in capsys.readouterr().out
    )
    make(tmp_path, f"sft/{SAVED}")
    check_folder(tmp_path, resumed)
    assert capsys.readouterr().out == ""
    for name in (f"sft/{SAVED}", "notes.txt"):
        make(tmp_path, name)
        with pytest.raises(UserError, match="holds files already"):
            check_folder(tmp_path, RunConfig())
        shutil.rmtree(tmp_path / "sft", ignore_errors=True)
