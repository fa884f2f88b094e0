"""Who may use a run folder, and what it says about itself."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import runs
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.errors import UserError
from rlhf_jax.runs import check_unchanged, fingerprint, open_run, write_config, write_manifest

CONFIG = "seed: 0\nresume: false\nppo:\n  clip_low: 0.2\n  data: [a, b]\n  weights: {}\n"


def finished_run(path: Path, config: str = CONFIG, data: dict[str, str] | None = None) -> None:
    with open_run(path) as run:
        write_config(run, config)
        write_manifest(run, seed=3, data_fingerprints=data or {})
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


def test_a_run_that_failed_before_it_wrote_anything_blocks_nothing(tmp_path):
    open_run(tmp_path / "run").close()
    open_run(str(tmp_path / "run")).close()


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "any.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds files already; give --resume .* --overwrite"):
        open_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["any.txt"]


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="--resume and --overwrite exclude each other"):
        open_run(tmp_path, resume=True, overwrite=True)


def test_resume_needs_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"--resume: .*none does not exist"):
        open_run(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


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


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_path_that_is_a_file(tmp_path, options):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match=r"file is a file; --output-dir needs a folder"):
        open_run(file, **options)
    assert file.read_text() == "x"


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/run: cannot be used as a run folder"):
        open_run(tmp_path / "file" / "run")


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
from rlhf_jax.runs import open_run
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
    monkeypatch.setattr(runs, "_clear", fail)
    with pytest.raises(UserError, match="no"):
        open_run(tmp_path, overwrite=True)
    open_run(tmp_path, resume=True).close()


def test_fingerprint(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "x").write_bytes(b"1")
    (folder / "y").write_bytes(b"2")
    first = fingerprint(folder)
    assert fingerprint(folder) == first
    (folder / "y").rename(folder / "z")
    assert fingerprint(folder) != first
    with pytest.raises(UserError, match="none: cannot be read: No such file"):
        fingerprint(tmp_path / "none")


def test_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(sys, "argv", ["experiments/ppo.py", "--config", "my file.yaml"])
    with open_run(tmp_path) as run:
        write_manifest(run, seed=3, data_fingerprints={"pairs.json": "00"}, extra={"model_tokens": 5})
    text = (tmp_path / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["seed"] == 3
    assert manifest["data"] == {"pairs.json": "00"}
    assert manifest["model_tokens"] == 5
    assert manifest["command"] == "python experiments/ppo.py --config 'my file.yaml'"
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["versions"]["rlhf-jax"]
    assert manifest["backend"] == "cpu"
    assert manifest["devices"] == {"kind": "cpu", "count": 4}
    assert manifest["git"] is None or len(manifest["git"]["commit"]) == 40
    assert "secret" not in text
    assert not list(tmp_path.glob("*.tmp"))


def test_manifest_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with open_run(tmp_path) as run:
        write_manifest(run, seed=0, data_fingerprints={})
        assert json.loads(run.manifest.read_text())["git"] is None


def test_a_resumed_run_keeps_its_manifest(tmp_path):
    finished_run(tmp_path)
    first = json.loads((tmp_path / "manifest.json").read_text())
    for n in (1, 2):
        with open_run(tmp_path, resume=True) as run:
            write_manifest(run, seed=99, data_fingerprints={}, command=["python", "x.py", str(n)])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    starts = manifest.pop("resumed")
    assert manifest == first
    assert [start["command"] for start in starts] == ["python x.py 1", "python x.py 2"]
    assert starts[0]["devices"] == {"kind": "cpu", "count": 4}


def test_resume_of_the_same_run(tmp_path):
    finished_run(tmp_path, data={"a": "1"})
    with open_run(tmp_path, resume=True) as run:
        check_unchanged(run, config=CONFIG, data_fingerprints={"a": "1"})
        changed = CONFIG.replace("resume: false", "resume: true").replace("clip_low: 0.2", "clip_low: 0.3")
        check_unchanged(run, config=changed, data_fingerprints={"a": "1"}, may_change=["resume", "ppo"])
        check_unchanged(run, config=changed, data_fingerprints={"a": "1"}, may_change=["resume", "ppo.clip_low"])


def test_resume_of_another_run_lists_what_differs(tmp_path):
    finished_run(tmp_path, data={"a": "1", "b": "2"})
    config = "seed: 1\nppo:\n  clip_low: 0.2\n  data: [a]\n  weights: {x: 1.0}\nnew: null\n"
    with open_run(tmp_path, resume=True) as run, pytest.raises(UserError) as caught:
        check_unchanged(run, config=config, data_fingerprints={"a": "9", "c": "3"}, may_change=["see", "resume"])
    message = str(caught.value)
    assert message.startswith(f"--resume: {tmp_path} is another run: ")
    for part in (
        "seed was 0 and is now 1",
        "ppo.data was ['a', 'b'] and is now ['a']",
        "ppo.weights was {} and is now not set",
        "ppo.weights.x was not set and is now 1.0",
        "new was not set and is now None",
        "the data a has changed",
        "the data b is not used any more",
        "the data c was not used before",
    ):
        assert part in message
    assert "clip_low" not in message
    assert "resume was" not in message


def test_a_run_that_starts_from_the_beginning_is_compared_with_nothing(tmp_path):
    with open_run(tmp_path) as run:
        write_config(run, CONFIG)
    with open_run(tmp_path, resume=True) as run:
        check_unchanged(run, config="seed: 5\n", data_fingerprints={})


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_resume_without_the_run_s_own_files(tmp_path, name):
    finished_run(tmp_path)
    (tmp_path / name).unlink()
    with open_run(tmp_path, resume=True) as run, pytest.raises(UserError, match=rf"--resume: .*{name} cannot be read"):
        check_unchanged(run, config=CONFIG, data_fingerprints={})
