"""Folders that somebody else has prepared: what is written stays in them, and what is copied comes
from them.
"""

import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import pytest
from builders import finished_run, initial_params, write_run
from safetensors.numpy import save_file

from rlhf_jax import cli, models
from rlhf_jax.config import RunConfig
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import Stopped, UserError, escaped, logger
from rlhf_jax.evaluation import evaluate, measures
from rlhf_jax.report import page
from rlhf_jax.report.export import export
from rlhf_jax.runs import allocator, folder, writing
from rlhf_jax.runs.folder import open_run
from rlhf_jax.runs.writing import open_to_append, replacing, write_atomically
from rlhf_jax.training.pipeline import check_folder

SECRET = "the user's own"


@pytest.fixture
def outside(tmp_path):
    """A file that no run may touch."""
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "authorized_keys"
    file.write_text(SECRET)
    yield file
    assert file.read_text() == SECRET
    assert list(file.parent.iterdir()) == [file]


def link(path, target):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


LINKS = [*folder._FILES, ".lock"]
FOLDERS = ["checkpoints", "model", "adapter", "checkpoints/7.orbax-checkpoint-tmp", "tensorboard/x"]


@pytest.mark.parametrize("name", [*LINKS, *FOLDERS])
def test_a_link_in_a_run_folder_is_refused_by_name_and_where_it_points(name, tmp_path, outside):
    finished_run(tmp_path / "run")
    target = outside if name in LINKS else outside.parent
    link(tmp_path / "run" / name, target)
    message = f"run/{name} is a symbolic link to {target}, .* delete it"
    for _ in range(2):  # the first refusal lets go of the folder
        with pytest.raises(UserError, match=message), open_run(tmp_path / "run", resume=True):
            pass
    (tmp_path / "run" / name).unlink()
    with open_run(tmp_path / "run", resume=True):
        pass


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "model"])
def test_overwrite_deletes_links_and_not_what_they_name(name, tmp_path, outside):
    finished_run(tmp_path / "run")
    link(tmp_path / "run" / name, outside)
    if name == ".lock":
        with (
            pytest.raises(UserError, match="symbolic link"),
            open_run(tmp_path / "run", overwrite=True),
        ):
            pass
    else:
        with open_run(tmp_path / "run", overwrite=True) as run:
            assert not (run.path / name).is_symlink()


def test_a_run_folder_may_lie_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    finished_run(tmp_path / "disk" / "mine")
    (tmp_path / "same").symlink_to(tmp_path / "disk" / "mine")
    for path in (tmp_path / "runs" / "mine", tmp_path / "same"):
        with open_run(path, resume=True) as run:
            write_atomically(run.report, "page")


def test_a_stage_of_a_pipeline_may_not_be_a_link(tmp_path, outside):
    link(tmp_path / "pipeline" / "reward_model", outside.parent)
    with pytest.raises(UserError, match="reward_model is a symbolic link"):
        check_folder(tmp_path / "pipeline", RunConfig(resume=True))


def test_the_report_is_not_written_through_links(tmp_path, outside):
    run = write_run(tmp_path / "run", metrics={"loss": [1.0, 2.0]}, samples={})
    (run / "report.html.tmp").symlink_to(outside)
    page.write([run], run / "report.html")
    assert "<html" in (run / "report.html").read_text("utf-8")
    link(run / "report.html", outside)
    with pytest.raises(UserError, match=r"report\.html is a symbolic link"):
        page.write([run], run / "report.html")
    [first, *_] = page.write_png([run], run / "png")
    link(first, outside)
    with pytest.raises(UserError, match=f"{first.name} is a symbolic link"):
        page.write_png([run], run / "png")
    assert {entry.name for entry in run.iterdir() if entry.name.startswith(".")} == set()


def test_appending_follows_no_link(tmp_path, outside, monkeypatch):
    link(tmp_path / "metrics.jsonl", outside)
    with pytest.raises(UserError, match="symbolic link"):
        open_to_append(tmp_path / "metrics.jsonl")
    # Put there after the look at it:
    monkeypatch.setattr(writing, "refuse_links", lambda paths: None)
    with pytest.raises(OSError, match="symbolic link"):
        open_to_append(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_are_those_of_the_umask(tmp_path, umask, mode):
    model = models.build(models.LlamaConfig(4, 8, 4, 2, 2, 4, tie_embeddings=True))
    params = initial_params(model)
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "report.html", "page")
        with replacing(tmp_path / "model") as new:
            models.save(new, model, params)
            models.lora.save(new, params, models.lora.init(jax.random.key(2), params, 2))
    finally:
        os.umask(before)
    files = [tmp_path / "report.html", *(tmp_path / "model").iterdir()]
    assert len(files) == 5
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    model = tmp_path / "model"
    for text in ("first", "second"):
        with replacing(model) as new:
            (new / f"{text}.txt").write_text(text)
        assert [file.name for file in model.iterdir()] == [f"{text}.txt"]
    with pytest.raises(IsADirectoryError), replacing(model) as new:
        new.write_text("a third one")
    assert [file.name for file in model.iterdir()] == ["second.txt"]
    with pytest.raises(OSError, match="not-there"):
        write_atomically(tmp_path / "not-there" / "file", "text")
    assert list(tmp_path.iterdir()) == [model]


def test_at_no_instant_of_a_swap_is_the_former_folder_gone(tmp_path, monkeypatch):
    """What a process that is killed there leaves has one of the two, or both."""
    there = []
    rename = Path.rename

    def watched(path, target):
        there.append({file.name for file in tmp_path.rglob("*.txt")})
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    for name in ("first.txt", "second.txt"):
        with replacing(tmp_path / "model") as new:
            (new / name).write_text("")
    assert there == [{"first.txt"}, *[{"first.txt", "second.txt"}] * 2]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "report.html", "page")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomically(tmp_path / "report.html", "another page")
    assert caught.value.filename == str(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
    assert (tmp_path / "report.html").read_text() == "page"


def test_what_a_killed_process_left_unfinished_goes_when_the_folder_is_taken(tmp_path):
    (tmp_path / ".0123456789abcdef.unfinished").mkdir()
    (tmp_path / ".fedcba9876543210.unfinished").write_text("half a file")
    with open_run(tmp_path) as run:
        assert {entry.name for entry in run.path.iterdir()} == {".lock"}


@pytest.fixture
def finished(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("", "member_1"):
        tokenizers.characters("ab").save(run / "model" / name)
        save_file({}, run / "model" / name / "model.safetensors")
    (run / "model" / "model-00001-of-00002.safetensors").write_bytes(b"weights")
    return run


def test_export_copies_what_a_run_writes_and_names_the_rest(finished, tmp_path, caplog):
    for name in ("install.sh", "member_1/.env", "model.bin", "sub/config.json"):
        (finished / "model" / name).parent.mkdir(exist_ok=True)
        (finished / "model" / name).write_text("x")
    (finished / "model" / "keys").symlink_to("config.json")
    (finished / "model" / "generation_config.json").mkdir()
    with caplog.at_level("INFO", "rlhf_jax"):
        copy = export(finished, tmp_path / "copy")
    found = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    texts = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    own = texts | {"model.safetensors"}
    assert found == own | {f"member_1/{name}" for name in own} | {
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
    }
    left_out = "generation_config.json, install.sh, keys, model.bin, sub, member_1/.env"
    assert caplog.messages == [f"left out, as no run of rlhf_jax writes it: {left_out}"]


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "member_1", "member_1/tokenizer.json", ""]
)
def test_export_follows_no_link(name, finished, tmp_path):
    place = finished / "model" / name
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{place} is a symbolic link to {tmp_path / 'elsewhere'}"):
        export(finished, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("act", [lambda run, to: page.write([run], to / "page.html"), export])
def test_report_and_export_use_nothing_that_a_config_names(act, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("runpy.run_path", lambda *given: pytest.fail("it ran"))
    monkeypatch.setattr("rlhf_jax.graders.client.ask", lambda *given: pytest.fail("it was asked"))
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits
    settings = {
        "reward": ["evil.py:score", f"{tmp_path}/pipe"],
        "model": f"{tmp_path}/pipe",
        "data": [f"{tmp_path}/pipe"],
        "judge": {"url": "HTTP://their.host"},
    }
    (finished / "config.yaml").write_text(json.dumps(settings))
    (tmp_path / "to").mkdir()
    act(finished, tmp_path / "to")


@pytest.mark.parametrize(
    ("place", "content"),
    [("model", None), ("model/member_1", None), ("model", b"cut"), ("model/member_1", b"")],
)
def test_export_of_a_run_without_its_weights_is_refused(place, content, finished, tmp_path):
    file = finished / place / "model.safetensors"
    file.unlink()
    (finished / "model" / "model-00001-of-00002.safetensors").unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file}: (no such file|cannot be read as safetensors)"):
        export(finished, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_export_names_the_shard_that_is_missing(finished, tmp_path):
    (finished / "model" / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002"}}
    (finished / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="'model-00002-of-00002' is not the name of a file"):
        export(finished, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# --- What a terminal is sent
# ---------------------------------------------------------------------------------------------


HOSTILE_TEXT = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt.\r\x7f\u2066"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt.\r\x7f\u2066"


def test_what_a_terminal_would_obey_is_escaped():
    assert escaped(HOSTILE_TEXT) == SHOWN
    assert escaped("half \ud83d") == r"half \ud83d"
    assert escaped("a\tb\nü 語 😀 é") == "a\tb\nü 語 😀 é"


def fails(text):
    raise UserError(text)


def stops(text):
    raise Stopped(text, 2)


def warns(text):
    warnings.warn(text, stacklevel=1)


def evaluates(text):
    figure = measures.Figure(text, "[bold]quality", 0.5, 0.25, 0.75, 3, "answers", text)
    result = evaluate.Result([figure], Path(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "run", lambda run, config: result)
        return cli.run(["evaluate", "run"])


def checks(text):
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "data.json"
        rows = [{"prompt": "a", "response": text, text: text}, {text: 1}]
        file.write_text(json.dumps(rows))
        cli.run(["data", "check", str(file)])
        file.write_text(json.dumps(rows[:1]))
        cli.run(["data", "preview", str(file)])


@pytest.mark.parametrize("act", [fails, stops, warns, logger.info, evaluates, checks])
@pytest.mark.filterwarnings("default")
def test_nothing_that_a_terminal_would_obey_is_printed(act, capfd, monkeypatch):
    monkeypatch.setattr(allocator, "keep_memory", lambda: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(
        warnings,
        "showwarning",
        lambda *given, **how: sys.stderr.write(warnings.formatwarning(*given[:4])),
    )
    with pytest.raises(SystemExit):
        cli.run_script(lambda: act(HOSTILE_TEXT))
    output = "".join(capfd.readouterr())
    assert SHOWN in output
    assert escaped(output) == output
    if act is evaluates:
        assert "[bold]quality" in output
