"""What a run says about itself, and what may differ when it is resumed."""

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import jax
import pytest
from builders import RUN_YAML, finished_run

from rlhf_jax.errors import UserError
from rlhf_jax.runs import devices
from rlhf_jax.runs.folder import open_run
from rlhf_jax.runs.manifest import check_unchanged, fingerprint, unequal, write_manifest


def test_fingerprint(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "x").write_bytes(b"1")
    first = fingerprint(tmp_path / "folder")
    (tmp_path / "folder" / "inner").rename(tmp_path / "folder" / "other")
    assert fingerprint(tmp_path / "folder") != first
    with pytest.raises(UserError, match="none: cannot be read: No such file"):
        fingerprint(tmp_path / "none")


def test_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    monkeypatch.setattr(sys, "argv", ["rlhf-jax", "ppo", "--config", "my file.yaml"])
    with open_run(tmp_path) as run:
        write_manifest(run, {"seed": 3, "data": {"pairs.json": "00"}, "model_tokens": 5}, {})
    text = (tmp_path / "manifest.json").read_text()
    manifest = json.loads(text)
    git = manifest.pop("git")
    versions = manifest.pop("versions")
    assert git is None or len(git["commit"]) == 40
    assert (versions["jax"], versions["python"]) == (
        jax.__version__,
        ".".join(map(str, sys.version_info[:3])),
    )
    said = {"seed": 3, "data": {"pairs.json": "00"}, "model_tokens": 5}
    said["cpu"] = devices.cpu()
    said["threads"] = devices.num_threads()
    said["xla_flags"] = "--xla_cpu_multi_thread_eigen=true"
    machine = {"backend": "cpu", "devices": {"kind": "cpu", "count": 4}}
    assert manifest == said | machine | {"command": "rlhf-jax ppo --config 'my file.yaml'"}
    assert "secret" not in text
    monkeypatch.setenv("PATH", "")  # no git
    with open_run(tmp_path, overwrite=True) as run:
        write_manifest(run, {"seed": 0, "data": {}}, {})
        assert json.loads(run.manifest.read_text())["git"] is None


def resumed(folder: Path, seed: int = 3) -> None:
    with open_run(folder, resume=True) as run:
        write_manifest(run, {"seed": seed, "data": {}}, {})


def test_a_run_resumed_elsewhere_says_so(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path)
    outputs = []
    for count in (4, 1, 1, 4):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        resumed(tmp_path)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[2] == ""
    said = (
        "--resume: devices.count was 4 and is now 1. The run goes on, but is no longer bit for bit"
    )
    assert outputs[1].startswith(said)
    assert outputs[3].startswith("--resume: devices.count was 1 and is now 4.")
    other = {"commit": "c0ffee", "modified": True}
    monkeypatch.setattr("rlhf_jax.runs.manifest._git_state", lambda: other)
    resumed(tmp_path)
    assert capsys.readouterr().out == ""  # its bits may be the same
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9")
    resumed(tmp_path)
    assert f"versions.jax was '{jax.__version__}' and is now '9'" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_manifest(tmp_path, monkeypatch):
    finished_run(tmp_path)
    first = json.loads((tmp_path / "manifest.json").read_text())
    for n in (1, 2):
        monkeypatch.setattr(sys, "argv", ["x.py", str(n)])
        resumed(tmp_path, seed=99)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [start["command"] for start in manifest.pop("resumed")] == [
        "python x.py 1",
        "python x.py 2",
    ]
    assert manifest == first


def test_resume_of_the_same_run(tmp_path):
    finished_run(tmp_path, data={"a": "1"})
    changed = RUN_YAML.replace("resume: false", "resume: true").replace(
        "clip_low: 0.2", "clip_low: 0.3"
    )
    with open_run(tmp_path, resume=True) as run:
        assert not check_unchanged(
            run, config=changed, data={"a": "1"}, may_change=["resume", "ppo"]
        )


def test_resume_of_another_run_lists_what_differs(tmp_path):
    finished_run(tmp_path, data={"a": "1", "b": "2"})
    config = "seed: 1\nppo:\n  clip_low: 0.2\n  data: [a]\n  weights: {x: 1.0}\nnew: null\n"
    differences = (
        "seed was 0 and is now 1; ppo.data was ['a', 'b'] and is now ['a']; ppo.weights was {} and "
        "is now not set; "
        "sha256 of a was '1' and is now '9'; sha256 of b was '2' and is now not set; ppo.weights.x "
        "was not set and is "
        "now 1.0; new was not set and is now None; sha256 of c was not set and is now '3'. Undo "
        "this"
    )
    with open_run(tmp_path, resume=True) as run, pytest.raises(UserError) as caught:
        check_unchanged(run, config=config, data={"a": "9", "c": "3"}, may_change=["see", "resume"])
    assert str(caught.value).startswith(f"--resume: {tmp_path} is another run: {differences}")


def test_what_is_allowed_may_differ_and_is_recorded(tmp_path, capsys):
    finished_run(tmp_path, data={"a": "1", "reward r": "1"})
    config = (
        RUN_YAML.replace("seed: 0", "seed: 7").replace("clip_low: 0.2", "clip_low: 0.3")
        + "reward: []\n"
    )
    new = {"config": config, "data": {"a": "9", "reward r": "2"}}
    seed = "seed was 0 and is now 7"
    clip = "ppo.clip_low was 0.2 and is now 0.3"
    a = "sha256 of a was '1' and is now '9'"
    reward = "sha256 of reward r was '1' and is now '2'"
    with open_run(tmp_path, resume=True) as run:
        for allowed, missing in [
            (["seed", "ppo.clip-low"], [a, reward]),
            (["seed", "ppo"], [a, reward]),  # a section's settings, but not the contents of files
            (["ppo.data", "reward"], [seed, clip]),
            (["seed", "ppo.clip_low", "ppo.data"], [reward]),
        ]:
            names = "--allow-changed seed ppo.clip_low data reward lets this differ"
            with pytest.raises(UserError, match=names) as caught:
                check_unchanged(run, **new, allowed=allowed)
            assert [
                text for text in (seed, clip, a, reward) if text in str(caught.value)
            ] == missing
        changed = check_unchanged(
            run, **new, allowed=["seed", "ppo.clip-low", "ppo.data", "reward"]
        )
        assert changed == [seed, clip, a, reward, "reward was not set and is now []"]
        assert (
            "the run continues with other settings or data: seed was 0 and is now 7"
            in capsys.readouterr().out
        )
        write_manifest(run, {"seed": 7, "data": new["data"]}, {}, changed)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["seed"], manifest["data"]) == (7, new["data"])
    assert manifest["resumed"][0]["changed"] == changed


@pytest.mark.parametrize(
    ("config", "model", "allowed", "fixed", "message"),
    [
        (
            RUN_YAML.replace("0.2", "0.3"),
            "1",
            ["ppo"],
            "ppo.clip_low",
            "cannot help with ppo.clip_low$",
        ),
        (
            RUN_YAML.replace("0.2", "0.3"),
            "1",
            ["ppo.clip_low"],
            "ppo.clip_low",
            "cannot help with ppo.clip_low$",
        ),
        (RUN_YAML, "2", ["ppo.data"], "model", "sha256 of model was"),
    ],
)
def test_what_would_make_the_checkpoint_useless_is_never_allowed(
    tmp_path, config, model, allowed, fixed, message
):
    finished_run(tmp_path, data={"model": "1"})
    with open_run(tmp_path, resume=True) as run, pytest.raises(UserError, match=message):
        check_unchanged(run, config=config, data={"model": model}, allowed=allowed, fixed=[fixed])


@pytest.mark.parametrize(
    ("key", "hint"), [("ppo.clip_lo", "; did you mean ppo.clip_low"), ("zzz", ""), ("pp", "")]
)
def test_allowing_what_is_no_setting(tmp_path, key, hint):
    with open_run(tmp_path) as run:
        with pytest.raises(UserError) as caught:
            check_unchanged(run, config=RUN_YAML, data={}, allowed=["seed", key])
        check_unchanged(run, config=RUN_YAML, data={})  # a new run is compared with nothing
    assert str(caught.value).startswith(f"--allow-changed {key}: there is no such setting{hint}")


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_resume_without_the_run_s_own_files(tmp_path, name):
    finished_run(tmp_path)
    (tmp_path / name).unlink()
    with (
        open_run(tmp_path, resume=True) as run,
        pytest.raises(UserError, match=rf"{name}: cannot be read: No such file"),
    ):
        check_unchanged(run, config=RUN_YAML, data={})


def test_an_int_is_the_float_of_its_value_and_no_other_value(tmp_path):
    """YAML reads a float where a script gave an int; what differs is said as it stands."""
    before = {"a": 0, "b": 2.0, "c": 1, "d": True, "e": "1", "f": None, "g": float("nan"), "h": [0]}
    after = {"a": 0.0, "b": 2, "c": 1.5, "d": 1, "e": 1, "f": 0, "g": float("nan"), "h": [0]}
    assert unequal(before, after) == {
        "c": ("1", "1.5"),
        "d": ("True", "1"),
        "e": ("'1'", "1"),
        "f": ("None", "0"),
    }
    assert unequal({"a": 1}, {"b": 0}) == {"a": ("1", "not set"), "b": ("not set", "0")}
    finished_run(tmp_path)
    (tmp_path / "config.yaml").write_text("optimizer: {warmup_steps: 0}")
    with open_run(tmp_path, resume=True) as run:
        assert check_unchanged(run, config="optimizer: {warmup_steps: 0.0}", data={}) == []
