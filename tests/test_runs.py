"""Who may use a run folder, what it says about itself, and how the loop in it ends and goes on."""

import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from rlhf_jax import checkpoint, manifest, runs, sharding
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import RunConfig, Tokenizer
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.flags import parse
from rlhf_jax.manifest import check_unchanged, fingerprint, write_config, write_manifest
from rlhf_jax.runs import open_run
from rlhf_jax.training import loop
from rlhf_jax.training.pipeline import check_folder
from rlhf_jax.training.stage import open_stage

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


def test_a_run_resumed_elsewhere_says_so(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path)
    said = []
    for count in (4, 1, 1, 4):
        with monkeypatch.context() as patch, open_run(tmp_path, resume=True) as run:
            patch.setattr(jax, "device_count", lambda count=count: count)
            write_manifest(run, seed=3, data_fingerprints={})
        said.append(capsys.readouterr().out)
    assert said[0] == said[2] == ""
    assert said[1].startswith(
        "--resume: devices.count was 4 and is now 1. The run goes on, but is no longer bit for bit"
    )
    assert said[3].startswith("--resume: devices.count was 1 and is now 4.")
    monkeypatch.setattr(manifest, "_version", lambda name: "9")
    with open_run(tmp_path, resume=True) as run:
        write_manifest(run, seed=3, data_fingerprints={})
    assert f"versions.jax was '{jax.__version__}' and is now '9'" in capsys.readouterr().out


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


def test_what_is_allowed_may_differ_and_is_recorded(tmp_path, capsys):
    finished_run(tmp_path, data={"a": "1", "reward r": "1"})
    changed = CONFIG.replace("seed: 0", "seed: 7").replace("clip_low: 0.2", "clip_low: 0.3")
    data = {"a": "9", "reward r": "2"}
    expected = ["seed was 0 and is now 7", "ppo.clip_low was 0.2 and is now 0.3"]
    of_data = ["the data a has changed", "the data reward r has changed"]
    with open_run(tmp_path, resume=True) as run:
        for allowed, missing in [
            (["seed", "ppo.clip-low"], of_data),
            (["seed", "ppo"], of_data),  # a section's settings, but not the contents of files
            (["ppo.data", "reward"], expected),
            (["seed", "ppo.clip_low", "ppo.data"], of_data[1:]),
        ]:
            with pytest.raises(UserError, match="or name what may differ with --allow-changed") as caught:
                check_unchanged(run, config=changed + "reward: []\n", data_fingerprints=data, allowed=allowed)
            for text in expected + of_data:
                assert (text in str(caught.value)) == (text in missing)
        allowed = ["seed", "ppo.clip-low", "ppo.data", "reward"]
        found = check_unchanged(run, config=changed + "reward: []\n", data_fingerprints=data, allowed=allowed)
        assert found == [*expected, "reward was not set and is now []", *of_data]
        assert "goes on as another run than it began: seed was 0 and is now 7" in capsys.readouterr().out
        write_manifest(run, seed=7, data_fingerprints=data, changed=found)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["seed"], manifest["data"]) == (7, data)
    assert manifest["resumed"][0]["changed"] == found


@pytest.mark.parametrize("allowed", [["ppo"], ["ppo.clip_low"]])
def test_what_would_make_the_checkpoint_useless_is_never_allowed(tmp_path, allowed):
    finished_run(tmp_path, data={"model": "1"})
    changed = CONFIG.replace("clip_low: 0.2", "clip_low: 0.3")
    message = r"clip_low was 0\.2 and is now 0\.3\. .*; --allow-changed cannot help with ppo\.clip_low$"
    with open_run(tmp_path, resume=True) as run:
        with pytest.raises(UserError, match=message):
            check_unchanged(
                run, config=changed, data_fingerprints={"model": "1"}, allowed=allowed, fixed=["ppo.clip_low"]
            )
        with pytest.raises(UserError, match="the data model has changed"):
            check_unchanged(run, config=CONFIG, data_fingerprints={"model": "2"}, allowed=["ppo.data"], fixed=["model"])


@pytest.mark.parametrize(("key", "hint"), [("ppo.clip_lo", "; did you mean ppo.clip_low"), ("zzz", ""), ("pp", "")])
def test_allowing_what_is_no_setting(tmp_path, key, hint):
    with open_run(tmp_path) as run, pytest.raises(UserError) as caught:
        check_unchanged(run, config=CONFIG, data_fingerprints={}, allowed=["seed", key])
    assert str(caught.value).startswith(f"--allow-changed {key}: there is no such setting{hint}")


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


# --- The loop, on a state of one number -----------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the process's end: nothing catches it."""


def run_loop(
    config: RunConfig,
    *,
    num_steps=6,
    die_at=None,
    nonfinite_at=None,
    scores=None,
    before_step=lambda state, step: None,
    **options,
):
    """A stage whose state counts its steps; ``validation/score`` of step k is ``scores[k]``."""

    def advance(state, step):
        before_step(state, step)
        if step == die_at:
            raise Killed
        return {"n": state["n"] + 1}, {"loss": state["n"] / 2, "nonfinite": jnp.float32(step == nonfinite_at)}

    def validate(state):
        step = int(state["n"])
        return loop.Validation({"validation/score": scores[step]}, [{"prompt": f"p{step}"}, {"prompt": "q"}])

    with open_stage(config, "sft", {}) as stage:
        start = stage.replicate({"n": jnp.float32(0)})
        validating = validate if scores else None
        state, row = loop.train(stage, start, advance, num_steps=num_steps, validate=validating, **options)
    return int(state["n"]), row


def files(config: RunConfig) -> dict[str, bytes]:
    return {name: (Path(config.output_dir) / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}


@pytest.fixture
def config(tmp_path):
    return RunConfig(output_dir=str(tmp_path / "run"), checkpoint_interval=2)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_is_killed_goes_on_without_a_row_twice_or_missing(config, tmp_path, asynchronous):
    config = dataclasses.replace(config, checkpoint_async=asynchronous)
    straight = dataclasses.replace(config, output_dir=str(tmp_path / "straight"))
    scores = [float(n) for n in range(7)]
    assert run_loop(straight, scores=scores) == (6, {"loss": 2.5, "nonfinite": 0.0, "validation/score": 6.0})
    for options, die_at in (({}, 3), ({"resume": True}, 3), ({"resume": True}, 5)):
        with pytest.raises(Killed):
            run_loop(dataclasses.replace(config, **options), die_at=die_at, scores=scores)
    resumed = dataclasses.replace(config, resume=True)
    for _ in range(2):  # the second time it is finished
        assert run_loop(resumed, scores=scores)[0] == 6
        assert files(config) == files(straight)
    assert checkpoint.steps(Path(config.output_dir) / "checkpoints") == [4, 6]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_step_0_is_on_disk_before_the_first_update(config, asynchronous):
    def look(state, step):
        assert (Path(config.output_dir) / "checkpoints" / "0" / "record" / "metadata").exists()

    run_loop(dataclasses.replace(config, checkpoint_async=asynchronous), num_steps=1, before_step=look)


def test_stopped_means_saved(config, monkeypatch):
    """Ctrl-C while the disk is full: an asynchronous save has returned long before it fails."""

    wait = ocp.AsyncCheckpointer.wait_until_finished
    calls = []

    def fails_once(self):
        wait(self)
        calls.append(self)
        if len(calls) == 2:  # the first call is at the beginning of the save
            raise OSError(errno.ENOSPC, "No space left on device")

    def interrupt(state, step):
        if step == 2:
            monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", fails_once)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingFault, match=r"checkpoint of step 3 could not be written .*No space left"):
        run_loop(dataclasses.replace(config, checkpoint_async=True, checkpoint_interval=10), before_step=interrupt)


def test_an_update_that_is_not_finite_names_step_checkpoint_and_rows(config):
    def sources(step):
        return (
            f"{file}, line {line + step}" for file, line in (("b.json", 1), ("a.json", 2), ("b.json", 7), ("b.json", 1))
        )

    config = dataclasses.replace(config, checkpoint_async=True)
    message = r"at step 5; .*checkpoint is step 4 in .*rows of this batch: b\.json, line 5, 11; a\.json, line 6$"
    with pytest.raises(TrainingFault, match=message):
        run_loop(config, nonfinite_at=4, sources=sources)


def test_the_best_checkpoint_becomes_the_model(config, capsys):
    config = dataclasses.replace(config, keep_best="min:validation/score", keep_last=1, checkpoint_interval=100)
    state, row = run_loop(config, scores=[3.0, 2.0, jnp.nan, 0.5, 2.0, 1.0, 0.75])
    assert (state, row["validation/score"]) == (3, 0.5)
    assert checkpoint.steps(Path(config.output_dir) / "checkpoints") == [3, 6]
    assert "validation/score is best at step 3: 0.5; model/ is of that step" in capsys.readouterr().out
    resumed = dataclasses.replace(config, resume=True)
    assert run_loop(resumed, scores=[3.0] * 7)[0] == 3
    assert "finished already" in capsys.readouterr().out


def test_a_best_metric_that_does_not_exist(config, tmp_path):
    config = dataclasses.replace(config, keep_best="max:validation/loss")
    with pytest.raises(UserError, match="keep_best: no metric validation/loss; the validations give validation/score"):
        run_loop(config, scores=[1.0])
    with pytest.raises(UserError, match="keep_best max:validation/loss: nothing is held out"):
        run_loop(dataclasses.replace(config, output_dir=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="keep_best must be max:METRIC or min:METRIC, got 'validation/loss'"):
        RunConfig(keep_best="validation/loss")


def test_a_run_on_other_devices_goes_on_and_says_so(config, monkeypatch, capsys):
    with pytest.raises(Killed):
        run_loop(config, die_at=3)
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(1))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert run_loop(dataclasses.replace(config, resume=True))[0] == 6
    assert "devices.count was 4 and is now 1. The run goes on, but is no longer bit for bit" in capsys.readouterr().out


def test_a_run_goes_on_with_what_is_allowed_to_differ(config, capsys):
    assert run_loop(config)[0] == 6
    longer = dataclasses.replace(config, resume=True, sft=dataclasses.replace(config.sft, num_epochs=2))
    with pytest.raises(UserError, match=r"sft\.num_epochs was 1 and is now 2"):
        run_loop(longer)
    longer = dataclasses.replace(longer, allow_changed=("sft.num-epochs",))
    assert run_loop(longer, num_steps=8)[0] == 8
    assert "another run than it began: sft.num_epochs was 1 and is now 2" in capsys.readouterr().out
    # From now on this is the run, so that neither its report nor its next resumption is of the old one.
    stored = parse(RunConfig, ["--config", str(Path(config.output_dir) / "config.yaml")])
    assert stored == dataclasses.replace(longer, resume=False, allow_changed=())
    assert run_loop(dataclasses.replace(longer, allow_changed=()), num_steps=8)[0] == 8
    wider = dataclasses.replace(config.network, hidden_size=256)
    with pytest.raises(UserError, match=r"--allow-changed cannot help with network\.hidden_size"):
        run_loop(dataclasses.replace(longer, network=wider, allow_changed=("network",)))


@pytest.mark.parametrize(("tokenizer", "allowed"), [(None, False), ("some/tokenizer", True)])
def test_other_data_is_allowed_where_the_tokens_stay_the_same(tmp_path, tokenizer, allowed):
    """A tokenizer that was trained on the data would be another one."""
    config = RunConfig(output_dir=str(tmp_path / "run"), tokenizer=Tokenizer(name=tokenizer))
    with open_stage(config, "sft", {"a.json": "1"}) as stage, Checkpoints(stage.run.checkpoints) as checkpoints:
        checkpoints.save(0, {"n": jnp.float32(0)}, {})
    again = dataclasses.replace(config, resume=True, allow_changed=("data",))
    expected = nullcontext() if allowed else pytest.raises(UserError, match="cannot help with data")
    with expected, open_stage(again, "sft", {"a.json": "2"}):
        pass


@pytest.mark.parametrize("where", ["checkpoint", "metrics"])
def test_a_full_disk_ends_the_run_with_a_sentence_and_the_run_goes_on(config, monkeypatch, where):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*args, **kwargs):
        raise full

    with monkeypatch.context() as patch:

        def fill(state, step):
            if step == 3:
                patch.setattr(target, fails)

        target, message = {
            "checkpoint": (
                "orbax.checkpoint.AsyncCheckpointer.save",
                r"checkpoint of step 4 .*No space left on device\); the last good checkpoint is step 2\.",
            ),
            "metrics": ("rlhf_jax.tracking.RowWriter.write", "run: the disk is full; make room, then go on"),
        }[where]
        with pytest.raises(TrainingFault, match=message):
            run_loop(config, before_step=fill)
    assert run_loop(dataclasses.replace(config, resume=True))[0] == 6


def test_other_errors_of_the_system_pass_through(config):
    with pytest.raises(PermissionError), open_stage(config, "sft", {}):
        raise PermissionError(errno.EACCES, "no")


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
