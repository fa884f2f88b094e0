"""What a command writes appears whole or not at all, and one process writes at a time."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from builders import ROOT, write_run

from rlhf_jax import cli, errors, models
from rlhf_jax.cli import verify
from rlhf_jax.data import demo, tokenizers
from rlhf_jax.errors import ServiceError, Stopped, TrainingFault, UserError
from rlhf_jax.evaluation import evaluate
from rlhf_jax.inference import generate, label
from rlhf_jax.inference.labelling import settings
from rlhf_jax.report.export import export
from rlhf_jax.runs import writing
from rlhf_jax.training.common import opening

LEFT = [".0123456789abcdef.unfinished", ".fedcba9876543210.unfinished"]


def leave(folder):
    """What a killed process leaves: a folder and a file without their locks."""
    (folder / LEFT[0]).mkdir()
    (folder / LEFT[0] / "half").write_text("")
    (folder / LEFT[1]).write_text("half a file")


def hidden(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name[0] == ".")


def test_leftovers_are_swept_by_the_next_that_writes_there(tmp_path):
    for number, write in enumerate(
        [
            lambda folder: writing.write_atomically(folder / "a", "a"),
            lambda folder: writing.replacing(folder / "b").__enter__(),
            lambda folder: writing.check_writable(folder),
            lambda folder: export(finished(folder), folder / "out"),
            lambda folder: demo.write(folder / "data", sizes=dict.fromkeys(demo.FILES, 2)),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        leave(folder)
        (folder / ".mine.unfinished").write_text("not ours")
        write(folder)
        assert not set(LEFT) & set(hidden(folder))
        assert ".mine.unfinished" in hidden(folder)


def test_what_a_process_still_writes_is_no_leftover(tmp_path):
    with writing.replacing(tmp_path / "model") as new:
        (new / "a").write_text("a")
        writing.sweep(tmp_path)
        assert (new / "a").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_name_that_another_process_swept_before_its_lock_is_not_used(tmp_path, monkeypatch):
    lock = writing.fcntl.flock
    swept = []

    def late(descriptor, how):
        [new] = tmp_path.glob(".*.unfinished")
        if not swept:
            swept.append(new)
            new.rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(writing.fcntl, "flock", late)
    with writing.replacing(tmp_path / "model") as new:
        assert new.is_dir()
        assert new != swept[0]


def test_files_that_belong_together_are_of_one_call(tmp_path, monkeypatch):
    """At each instant the last one, if it is there, is of the same call as the others."""
    first = tmp_path / "samples"
    last = tmp_path / "figures"
    writing.write_together({first: "1", last: "1"})
    seen = []
    replace = Path.replace

    def watched(path, target):
        replace(path, target)
        seen.append({file.name: file.read_text() for file in (first, last) if file.exists()})

    monkeypatch.setattr(Path, "replace", watched)
    writing.write_together({first: "2", last: "2"})
    assert seen == [{"samples": "2"}, {"samples": "2", "figures": "2"}]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_all_files_that_belong_together(tmp_path, monkeypatch):
    files = {tmp_path / name: "old" for name in "ab"}
    writing.write_together(files)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writing.write_together(dict.fromkeys(files, "new"))
    assert {path: path.read_text() for path in tmp_path.iterdir()} == files


# --- One writer at a time


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    out = tmp_path / "out.jsonl"
    with writing.one_writer(out):
        message = rf"out\.jsonl is being written by the process with PID {os.getpid()};"
        with pytest.raises(UserError, match=message), writing.one_writer(out):
            pass
        with writing.one_writer(tmp_path / "other.jsonl"):
            pass
    assert hidden(tmp_path) == []
    with writing.one_writer(out):
        pass


def test_a_lock_that_its_holder_deleted_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    lock = writing.fcntl.flock
    name = tmp_path / ".out.lock"

    def late(descriptor, how):
        if not hasattr(late, "called"):
            late.called = True
            name.unlink()
        lock(descriptor, how)

    monkeypatch.setattr(writing.fcntl, "flock", late)
    with writing.one_writer(tmp_path / "out"):
        assert name.exists()


def test_a_killed_writer_leaves_a_lock_that_the_next_takes(tmp_path):
    (tmp_path / ".out.lock").write_text("1\n")
    with writing.one_writer(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    "command",
    [
        lambda out: generate.run("no run", generate.Config(prompts=("a",), out=out)),
        lambda out: label.run("no run", settings.Config(prompts=("a",), out=out), iter(()), None),
    ],
    ids=["generate", "label"],
)
def test_generate_and_label_write_one_at_a_time(command, tmp_path):
    out = tmp_path / "out.jsonl"
    with writing.one_writer(out), pytest.raises(UserError, match="is being written by"):
        command(str(out))
    with pytest.raises(UserError, match="no run"):
        command(str(out))


def test_a_place_that_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(UserError, match="cannot be written: Not a directory"):
            writing.check_writable(folder)
    writing.check_writable(tmp_path / "not" / "yet")
    assert hidden(tmp_path) == []
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(UserError, match=r"there: cannot be written: No space left"):
        writing.check_writable(tmp_path / "there")


# --- Commands


def finished(folder):
    """A run with a model of two members."""
    run = write_run(folder / "run")
    model = models.build(models.LlamaConfig(4, 8, 4, 1, 2, 4, tie_embeddings=True))
    params = models.add_head(jax.random.key(1), model.init(jax.random.key(0)), "score")
    for member in ("member_0", "member_1"):
        models.save(run / "model" / member, model, params)
        tokenizers.characters("ab").save(run / "model" / member)
    (run / "model" / "config.json").unlink()
    return run


@pytest.mark.parametrize("number", range(1, 9, 3))
def test_an_export_that_fails_leaves_nothing(number, tmp_path, monkeypatch):
    run = finished(tmp_path)
    copied = []
    copy = shutil.copyfile

    def fails(source, target):
        copied.append(target)
        if len(copied) == number:
            full()
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises(UserError, match="out: cannot be written: No space left on device"):
        export(run, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]


def test_an_export_does_not_replace_what_came_into_its_place(tmp_path, monkeypatch):
    run = finished(tmp_path)
    copy = shutil.copyfile

    def late(source, target):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "mine").write_text("")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", late)
    with pytest.raises(UserError, match="out is in use"):
        export(run, tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_export_into_the_working_folder_is_refused(tmp_path, monkeypatch):
    run = finished(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the working folder; give a new folder"):
        export(run, ".")


def test_the_demo_corpus_is_whole_or_not_there(tmp_path, monkeypatch):
    sizes = dict.fromkeys(demo.FILES, 2)
    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(UserError, match="data: cannot be written: No space left"):
        demo.write(tmp_path / "data", sizes=sizes)
    monkeypatch.setattr(writing, "check_writable", lambda folder: None)
    with pytest.raises(UserError, match="data: cannot be written: No space left"):
        demo.write(tmp_path / "data", sizes=sizes)
    assert not list(tmp_path.iterdir())


def test_evaluate_checks_its_place_before_it_computes(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.devices, "choose", lambda device: pytest.fail("computes"))
    (tmp_path / "file").write_text("")
    config = evaluate.Config(prompts=("a",), output=str(tmp_path / "file" / "out"))
    with pytest.raises(UserError, match="out: cannot be written: Not a directory"):
        evaluate.run(tmp_path, config)


def test_a_run_that_cannot_write_its_settings_ends_in_a_sentence(tmp_path, monkeypatch):
    def read_only(path, content):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(writing, "write_atomically", read_only)
    config = opening.RunConfig(output_dir=str(tmp_path / "run"))
    message = r"the disk cannot be used; .* --resume \(.*config\.yaml: Read-only file system\)"
    with pytest.raises(TrainingFault, match=message), opening.open_run(config, "sft", {}):
        pass


def test_too_little_memory_of_the_host_is_a_sentence(tmp_path):
    config = opening.RunConfig(output_dir=str(tmp_path / "run"))
    opened = opening.open_run(config, "sft", {}, {"sft.batch_size": 9})
    with pytest.raises(TrainingFault, match=r"out of memory.*sft\.batch-size"), opened:
        raise MemoryError


@pytest.mark.parametrize(("number", "is_known"), [(errno.EROFS, True), (errno.ENOENT, False)])
def test_a_fault_of_a_disk_is_printed_without_a_traceback(number, is_known, capsys):
    def main():
        raise OSError(number, os.strerror(number), "a/file")

    with pytest.raises(SystemExit if is_known else OSError) as end:
        cli.run_script(main)
    if is_known:
        assert end.value.code == 1
        assert capsys.readouterr().err == "error: a/file: Read-only file system\n"


# --- Names and locales


def test_words_that_are_no_utf8_are_refused(monkeypatch):
    errors.check_encoding(["é", "a/\U0001f600"])
    with pytest.raises(UserError, match="is not UTF-8; give the file or folder another name"):
        errors.check_encoding(["fine", os.fsdecode(b"caf\xe9.json")])
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(UserError, match=r"this process has ascii: set PYTHONUTF8=1"):
        errors.check_encoding(["a"])


def test_a_name_that_the_locale_cannot_hold_is_a_sentence():
    with (
        pytest.raises(UserError, match="a: cannot be read: 'ascii' codec"),
        errors.file_errors("a"),
    ):
        "é".encode("ascii")


@pytest.mark.parametrize(
    ("name", "environment", "said"),
    [
        (b"caf\xe9", {}, "is not UTF-8"),
        (b"a", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "PYTHONUTF8=1"),
    ],
)
def test_the_command_says_so_and_exits_with_2(name, environment, said):
    command = [sys.executable, "-m", "rlhf_jax", "data", "check", name]
    ended = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, capture_output=True, check=False
    )
    assert ended.returncode == 2
    assert said in ended.stderr.decode()
    assert b"Traceback" not in ended.stderr


# --- Verify


def test_a_verify_that_is_stopped_does_not_speak_of_resume(tmp_path):
    with pytest.raises(Stopped) as stopped, verify._stopped_alike(tmp_path):
        raise Stopped("SIGINT: stopped after step 2, saved. Go on with:\n  --resume", signal.SIGINT)
    assert stopped.value.exit_code == 130
    assert str(stopped.value).startswith("SIGINT: stopped before anything was compared")
    assert "resume" not in str(stopped.value)


def test_a_verify_whose_server_fails_does_not_speak_of_resume(tmp_path):
    with pytest.raises(ServiceError) as failed, verify._stopped_alike(tmp_path):
        raise ServiceError("no reply\nStep 2 is saved, --resume") from ServiceError("no reply")
    assert str(failed.value) == "no reply"


# --- Kills


SLOW_COPIES = """
import shutil, time
copy = shutil.copyfile
def copyfile(*words):
    print('copying', flush=True)
    time.sleep(0.05)
    return copy(*words)
shutil.copyfile = copyfile
"""


@pytest.fixture
def slowed(tmp_path):
    """The environment of a command whose copies take a while, and which says when it begins."""
    place = tmp_path / "slow"
    place.mkdir()
    (place / "sitecustomize.py").write_text(SLOW_COPIES)
    path = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", ""), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "RLHF_JAX_KEEP_MEMORY": "0"}


def killed_export(command, environment, draw):
    """Kills an export while it copies."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout.readline() == b"copying\n"
    time.sleep(draw.uniform(0, 0.4))
    process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    process.communicate()


@pytest.mark.slow
def test_eight_kills_in_export_leave_no_half_folder(tmp_path, slowed):
    """The next export sweeps what the one before left."""
    run = finished(tmp_path)
    draw = random.Random(0)
    target = tmp_path / "out"
    command = [sys.executable, "-m", "rlhf_jax", "export", str(run), str(target)]
    num_left = 0
    for _ in range(8):
        killed_export(command, slowed, draw)
        left = list(tmp_path.glob(".*.unfinished"))
        assert len(left) <= 1
        num_left += len(left)
        if target.exists():
            assert (target / "README.md").exists()  # which is written last
            shutil.rmtree(target)
    assert num_left > 1
    subprocess.run(command, env=slowed, check=True, capture_output=True)
    assert hidden(tmp_path) == []
    model = run / "model"
    copied = {file.relative_to(target) for file in target.rglob("*")}
    assert copied == {file.relative_to(model) for file in model.rglob("*")} | {Path("README.md")}


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "write", full)
    with (
        pytest.raises(UserError, match=r"a\.jsonl: cannot be written: No space left"),
        writing.one_writer(tmp_path / "a.jsonl"),
    ):
        pytest.fail("it is not locked")
    assert list(tmp_path.iterdir()) == []


def test_files_are_copied_to_their_places_and_missing_ones_left_out(tmp_path):
    source = tmp_path / "run"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "c").write_text("1")
    (source / "d").write_text("2")
    writing.copy_files([*source.rglob("*"), source / "e"], source, tmp_path / "copy")
    copied = {path for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in copied} == {
        "copy/a/b/c": "1",
        "copy/d": "2",
    }


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ((), "stdout or an open file: No space left on device"),
        (("old",), "old: No space left on device"),
        (("old", None, "new"), "new: No space left on device"),
    ],
)
def test_a_full_disk_is_a_sentence_that_names_the_new_file(names, sentence, capsys):
    def copy():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)

    with pytest.raises(SystemExit, match="1"):
        cli.run_script(copy)
    assert capsys.readouterr().err == f"error: {sentence}\n"
