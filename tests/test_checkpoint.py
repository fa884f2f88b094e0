"""Round trips bit for bit, damage is noticed, and the previous good checkpoint takes over."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import UserError
from rlhf_jax.models.hf import write_tensors
from rlhf_jax.runs import checkpoint
from rlhf_jax.runs.checkpoint import CheckpointError, Checkpoints
from rlhf_jax.types import TrainState


@flax.struct.dataclass
class Loop:
    train: TrainState
    key: jax.Array
    kl_coef: jax.Array
    counts: np.ndarray
    baseline: jax.Array | None = None


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def loop(seed: int = 0) -> Loop:
    key = jax.random.key(seed)
    params = {
        "wte/x": {"embedding": jnp.asarray(normal(seed, 5, 3))},
        "half": jnp.asarray(normal(seed, 4, 2).astype(jnp.bfloat16)),
        "empty": jnp.zeros((0, 3)),
    }
    train = TrainState.create(
        params, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    )
    special = jnp.array([jnp.nan, -0.0, 1e-45, jnp.inf], jnp.float32)
    return Loop(train, jax.random.split(key, 3), special, np.arange(3, dtype=np.float64) / 3)


def bits(state) -> list[tuple[str, str, bytes]]:
    def data(leaf):
        return (
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )

    return [
        (jax.tree_util.keystr(path), str(leaf.dtype), np.asarray(data(leaf)).tobytes())
        for path, leaf in jax.tree.leaves_with_path(state)
    ]


def array_files(directory, step: int) -> list:
    return [file for file in (directory / str(step) / "state").rglob("d/*") if file.is_file()]


def flip(directory, step: int) -> None:
    """Inverts one bit in the middle of the largest array file of a step."""
    file = max(array_files(directory, step), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_round_trip_is_exact(tmp_path):
    state = loop()
    meta = {"epoch": 3, "lr": 0.1 + 0.2, "order": [1, 2], "text": "ä"}
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(0, state, meta)
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        restored, back = checkpoints.restore(loop(seed=1))
        assert checkpoints.steps() == [0]
    assert bits(restored) == bits(state)
    assert back == meta
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert isinstance(restored.counts, np.ndarray)


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("here") as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)}, {})
    Path("here/7").touch()
    assert checkpoint.steps("here") == [1]
    assert checkpoint.steps("elsewhere") == []
    assert not (tmp_path / "elsewhere").exists()


def test_arrays_go_to_the_shardings_of_the_target(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    value = jnp.arange(8.0).reshape(4, 2)
    split = jax.device_put(value, NamedSharding(mesh, P("data")))
    state = {"x": split, "key": jax.device_put(jax.random.key(3), NamedSharding(mesh, P()))}
    first, _, third, *_ = map(SingleDeviceSharding, jax.devices())
    key = jax.random.key(0)
    shape = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    whole = NamedSharding(mesh, P(None, None))
    targets = [
        (split, state["key"], split.sharding),
        (shape.update(sharding=whole), state["key"], whole),
        (shape, jax.ShapeDtypeStruct((), key.dtype), first),
        (jax.device_put(value, third), key, third),
    ]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        for x, key, sharding in targets:
            restored, _ = checkpoints.restore({"x": x, "key": key})
            assert restored["x"].sharding.is_equivalent_to(sharding, 2)
            assert bits(restored) == bits(state)


def test_what_was_free_to_move_is_free_again(tmp_path):
    """An array committed to device 0 could not meet one that is spread over four devices in one
    jit.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, P("data")))
    state = {"coef": jnp.float32(0.1), "key": jax.random.key(0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        restored, _ = checkpoints.restore(state)
    mixed = jax.jit(lambda s, x: s["coef"] * x + jax.random.uniform(s["key"], (4,)))
    np.testing.assert_array_equal(mixed(restored, spread), mixed(state, spread))


def test_keep_last(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step in (0, 5, 10, 12):
            checkpoints.save(step, {"a": jnp.full(3, step)}, {"step": step})
        assert checkpoints.restore({"a": jnp.zeros(3, int)}, step=10)[1] == {"step": 10}
        with pytest.raises(
            CheckpointError, match=r"step 5 .* does not exist; there are \[10, 12\]"
        ):
            checkpoints.restore({"a": jnp.zeros(3, int)}, step=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "12"]
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        Checkpoints(tmp_path, keep_last=0)


def test_an_asynchronous_save_holds_what_it_was_given(tmp_path):
    """Though the arrays are overwritten or donated while a thread still writes them."""
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, P("data"))
    with Checkpoints(tmp_path, keep_last=2, asynchronous=True) as checkpoints:
        for step in range(4):
            state = {
                "one": jax.device_put(normal(step, 8, 50_000)),
                "spread": jax.device_put(np.full((8, 50_000), step, np.float32), rows),
                "numpy": np.full(500_000, step),
                "key": jax.random.key(step),
            }
            checkpoints.save(step, state, {"step": step})
            state["numpy"][:] = -1
            for _ in range(3):
                state["one"] = overwrite(state["one"])
                state["spread"] = overwrite(state["spread"])
            # Two at most, and the one that is being written.
            assert not (tmp_path / str(step - 3)).exists()
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        for step in (2, 3):
            restored, meta = checkpoints.restore(state, step)
            assert meta == {"step": step}
            np.testing.assert_array_equal(restored["one"], normal(step, 8, 50_000))
            np.testing.assert_array_equal(restored["spread"], step)
            np.testing.assert_array_equal(restored["numpy"], step)
            assert restored["key"] == jax.random.key(step)
        checkpoints.save(4, state, {"step": 4})
    assert checkpoint.steps(tmp_path) == [3, 4]  # closing waits


@pytest.mark.parametrize(
    ("keep_best", "kept", "best"),
    [
        ("max:score", [1, 5, 6], 1),
        ("min:score", [2, 5, 6], 2),
        ("max:other", [5, 6], None),
    ],
)
def test_the_best_step_is_kept_beside_the_newest(tmp_path, keep_best, kept, best):
    """NaN and infinity are never the best, the first of equals is; a step without the metric takes
    no part.
    """
    values = [1.0, 5.0, -3.0, jnp.nan, jnp.inf, 5.0, None]
    with Checkpoints(tmp_path, keep_last=2, keep_best=keep_best) as checkpoints:
        assert checkpoints.best() is None
        for step, value in enumerate(values):
            metrics = {} if value is None else {"score": float(value)}
            checkpoints.save(step, {"a": jnp.full(3, step)}, {"metrics": metrics})
            assert checkpoints.latest() == step
        assert checkpoints.steps() == kept
    with Checkpoints(tmp_path, keep_last=2, keep_best=keep_best) as checkpoints:
        assert checkpoints.best() == best
        np.testing.assert_array_equal(checkpoints.restore({"a": jnp.zeros(3, int)})[0]["a"], 6)


def test_a_best_step_whose_record_is_damaged_is_none(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, keep_best="max:score") as checkpoints:
        for step, score in enumerate([3.0, 2.0, 1.0]):
            checkpoints.save(step, {"a": jnp.ones(2)}, {"metrics": {"score": score}})
        assert checkpoints.steps() == [0, 2]
        empty_record(tmp_path, 0)
        assert checkpoints.best() == 2


@pytest.mark.parametrize("keep_best", ["score", "max:", "best:score", "max"])
def test_keep_best_says_which_way(tmp_path, keep_best):
    with pytest.raises(ValueError, match="keep_best must be max:METRIC or min:METRIC"):
        Checkpoints(tmp_path, keep_best=keep_best)


@pytest.fixture
def small_files():
    """No file may grow beyond 256 KiB, so that writing more fails in the midst of a save, as on a
    full disk.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int = 1 << 18) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    limit(soft)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_leaves_the_earlier_ones(tmp_path, small_files, asynchronous, capfd):
    def state(step):
        return {"a": np.random.default_rng(step).random(200_000)}

    with Checkpoints(tmp_path, keep_last=1, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(0, state(0), {"step": 0})
        checkpoints.wait()
        small_files()
        with pytest.raises(  # noqa: PT012
            CheckpointError, match=r"step 1 could not be written .*last good checkpoint is step 0"
        ):
            checkpoints.save(1, state(1), {"step": 1})
            checkpoints.wait()
        assert [p.name for p in tmp_path.iterdir()] == ["0"]
        restored, meta = checkpoints.restore(state(1))
        assert meta == {"step": 0}
        np.testing.assert_array_equal(restored["a"], state(0)["a"])
        small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])  # room again
        checkpoints.save(1, state(1), {"step": 1})
        assert checkpoints.restore(state(0))[1] == {"step": 1}
    output = capfd.readouterr()
    assert output.out + output.err == ""


def test_what_is_being_raised_goes_before_a_save_that_fails(tmp_path, small_files):
    state = {"a": np.random.default_rng(0).random(200_000)}
    small_files()

    def save_and_fail():
        with Checkpoints(tmp_path, asynchronous=True) as checkpoints:
            checkpoints.save(0, state, {})
            raise ZeroDivisionError

    with (
        pytest.warns(UserWarning, match="step 0 could not be written .*there is no earlier"),
        pytest.raises(ZeroDivisionError),
    ):
        save_and_fail()
    with pytest.raises(CheckpointError), Checkpoints(tmp_path, asynchronous=True) as checkpoints:
        checkpoints.save(0, state, {})


LARGE_FILES_FAIL = """
import resource, sys
import numpy as np
from rlhf_jax import cli
from rlhf_jax.runs.checkpoint import Checkpoints

resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
arrays = {str(i): np.random.default_rng(i).random(20_000) for i in range(12)}

def main():
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(0, arrays, {})

cli.run_script(main)
"""


@pytest.mark.slow
def test_the_last_thing_that_is_said_is_why_a_save_failed(tmp_path):
    """TensorStore's other writes of the save fail too, rarely with a line of their own."""
    command = [sys.executable, "-c", LARGE_FILES_FAIL, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *_, message = done.stderr.splitlines()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.match(
        r"error: the checkpoint of step 0 could not be written .*\(File too large\)", message
    )


def test_only_what_comes_after_a_failed_save_is_passed_over(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda given: seen.append(str(given.exc_value)))
    checkpoint._ignore_closed_loops.cache_clear()
    Checkpoints(tmp_path).__exit__(None, None, None)
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert seen == ["another"]


def test_weights_that_a_full_disk_does_not_take_are_an_error_of_the_system(tmp_path, small_files):
    small_files()
    with pytest.raises(OSError, match=r"model\.safetensors") as caught:
        write_tensors(tmp_path / "model.safetensors", {"a": np.zeros(100_000)})
    assert caught.value.errno == errno.EFBIG


FULL_DISK = """
import sys, numpy as np
from rlhf_jax import cli
from rlhf_jax.runs import checkpoint
from rlhf_jax.runs.checkpoint import Checkpoints

def state(step):
    return {"a": np.random.default_rng(step).random(100_000)}

def main():
    with Checkpoints(sys.argv[1], keep_last=3, asynchronous=sys.argv[2] == "True") as checkpoints:
        for step in range(100):
            checkpoints.save(step, state(step), {"step": step})

try:
    cli.run_script(main)
except SystemExit as end:
    print("code", end.code)
steps = checkpoint.steps(sys.argv[1])
with Checkpoints(sys.argv[1]) as checkpoints:
    for step in steps:
        restored, meta = checkpoints.restore(state(0), step)
        assert meta == {"step": step}
        np.testing.assert_array_equal(restored["a"], state(step)["a"])
print("good", steps)
"""


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk(tmp_path, asynchronous):
    """A tmpfs with room for two checkpoints and a half, of which three are to be kept."""
    place = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=2000k tmpfs "$0" && exec "$@"'
    if subprocess.run(
        [*place, mount, tmp_path, "true"], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a tmpfs in a user namespace is not permitted here")
    program = [sys.executable, "-c", FULL_DISK, tmp_path / "checkpoints", str(asynchronous)]
    command = [*place, mount, tmp_path, *program]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.splitlines() == ["code 1", "good [0, 1]"], done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(
        r"error: the checkpoint of step 2 .*No space left.*last good checkpoint is step 1",
        done.stderr,
    )


@pytest.mark.parametrize("step", [3, 2])
def test_saving_no_higher_step_is_an_error(tmp_path, step):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"a": jnp.ones(2)}, {})
        with pytest.raises(
            ValueError, match=f"cannot save step {step} in .*: step 3 is there already"
        ):
            checkpoints.save(step, {"a": jnp.zeros(2)}, {})
        np.testing.assert_array_equal(checkpoints.restore({"a": jnp.zeros(2)})[0]["a"], 1.0)


def test_a_target_of_another_kind_is_refused(tmp_path):
    state = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(2)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        for change, message in [
            (
                {"a": jnp.ones((2, 3), jnp.bfloat16)},
                r"a is float32\[2, 3\] .* and bfloat16\[2, 3\]",
            ),
            (
                {"a": jnp.ones((3, 2))},
                r"a is float32\[2, 3\] in .* and float32\[3, 2\] in the state",
            ),
            ({"b": {}}, r"b/c is float32\[2\] in the checkpoint and missing in the state"),
            ({"d": jnp.ones(2)}, r"d is missing in the checkpoint and float32\[2\] in the state"),
        ]:
            for step in (None, 0):
                with pytest.raises(UserError, match=rf"checkpoint step 0 .*{message}"):
                    checkpoints.restore(state | change, step)


def test_what_cannot_be_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="b: expected an array, got float"):
            checkpoints.save(0, {"a": jnp.ones(2), "b": 1.0}, {})
        with pytest.raises(ValueError, match="two leaves have the path a/b"):
            checkpoints.save(0, {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}, {})
        with pytest.raises(TypeError):
            checkpoints.save(0, {"a": jnp.ones(2)}, {"set": {1}})
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.restore({"a": jnp.ones(2)})
        checkpoints.save(0, {"a": np.float32(2)}, {})  # NumPy scalars are arrays
        assert checkpoints.restore({"a": np.float32(0)})[0]["a"] == 2


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    with Checkpoints(folder, keep_last=3) as checkpoints:
        for step in (10, 20, 30):
            state = {"small": np.ones(3, np.float32), "weights": normal(step, 64, 64)}
            checkpoints.save(step, state, {"step": step})
    return folder


@pytest.fixture
def saved_three(three, tmp_path):
    """A folder with the checkpoints of the steps 10, 20 and 30, which a test may change."""
    return shutil.copytree(three, tmp_path, dirs_exist_ok=True)


TARGET = {"small": np.zeros(3, np.float32), "weights": np.zeros((64, 64), np.float32)}


def cut(directory, step):
    for file in array_files(directory, step):
        os.truncate(file, file.stat().st_size // 2)


def drop_record(directory, step):
    shutil.rmtree(directory / str(step) / "record")


def drop_state(directory, step):
    shutil.rmtree(directory / str(step) / "state")


def forge_record(directory, step):
    """Still valid JSON, so only our checksum tells."""
    file = directory / str(step) / "record" / "metadata"
    text = file.read_text()
    assert f'\\"step\\": {step}' in text
    file.write_text(text.replace(f'\\"step\\": {step}', '\\"step\\": 99'))


def empty_record(directory, step):
    (directory / str(step) / "record" / "metadata").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "the array weights does not match its checksum"),
        (cut, "its arrays cannot be read"),
        (drop_state, "its arrays cannot be read"),
        (drop_record, "its record cannot be read"),
        (empty_record, "its record cannot be read"),
        (forge_record, "its record does not match its checksum"),
    ],
)
@pytest.mark.usefixtures("saved_three")
def test_damage_is_noticed_and_the_previous_checkpoint_takes_over(tmp_path, damage, message):
    damage(tmp_path, 30)
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        with pytest.raises(CheckpointError, match=f"step 30 .* is damaged: {message}"):
            checkpoints.restore(TARGET, step=30)
        with pytest.warns(
            UserWarning, match=rf"step 30 .*{message}.*Going back to step 20.*to step 30 is lost"
        ):
            state, meta = checkpoints.restore(TARGET)
        assert meta == {"step": 20}
        np.testing.assert_array_equal(state["weights"], normal(20, 64, 64))
        # The run goes on and reaches the damaged step again.
        checkpoints.save(30, state, {"step": 30})
        assert checkpoints.steps() == [10, 20, 30]
        assert (tmp_path / "damaged-30").is_dir()
    with warnings.catch_warnings(), Checkpoints(tmp_path, keep_last=3) as checkpoints:
        warnings.simplefilter("error")
        assert checkpoints.restore(TARGET)[1] == {"step": 30}


@pytest.mark.usefixtures("saved_three")
def test_the_only_good_checkpoint_is_kept(tmp_path):
    """A damaged newer one does not count for keep_last."""
    flip(tmp_path, 30)
    flip(tmp_path, 20)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        with pytest.warns(UserWarning, match=r"step 30 .*step 20 .*Going back to step 10"):
            state, _ = checkpoints.restore(TARGET)
        checkpoints.save(15, state, {"step": 15})
        assert checkpoints.steps() == [15]
        assert checkpoints.restore(TARGET)[1] == {"step": 15}


@pytest.mark.usefixtures("saved_three")
def test_reading_changes_nothing(tmp_path):
    flip(tmp_path, 30)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with (
        Checkpoints(tmp_path, keep_last=1) as checkpoints,
        pytest.warns(UserWarning, match="Going back"),
    ):
        checkpoints.restore(TARGET)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("saved_three")
def test_no_good_checkpoint_is_left(tmp_path):
    for step in (10, 20, 30):
        flip(tmp_path, step)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(TARGET)
    message = str(caught.value)
    assert message.startswith("there is no undamaged checkpoint")
    assert all(f"step {step}" in message for step in (10, 20, 30))


@pytest.mark.usefixtures("saved_three")
def test_what_a_killed_save_leaves_is_ignored_and_removed(tmp_path):
    shutil.copytree(tmp_path / "30", tmp_path / "35.orbax-checkpoint-tmp")
    (tmp_path / "trash" / "5").mkdir(parents=True)
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        assert checkpoints.latest() == 30
        checkpoints.save(40, TARGET, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "30", "40"]


@pytest.mark.usefixtures("saved_three")
def test_silence(tmp_path, capfd):
    """Orbax's own log lines would drown the run's."""
    flip(tmp_path, 30)
    shutil.rmtree(tmp_path / "20" / "record")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.warns(UserWarning, match="Going back to step 10"),
    ):
        checkpoints.restore(TARGET)
    output = capfd.readouterr()
    assert output.out + output.err == ""


def test_record_is_readable_json(tmp_path):
    """The checksums can be checked without this package."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, {"a": jnp.ones((2, 3))}, {"epoch": 1})
    stored = json.loads((tmp_path / "7" / "record" / "metadata").read_text())
    kind = {"dtype": "float32", "shape": [2, 3]}
    content = json.dumps(kind).encode() + np.ones(6, np.float32).tobytes()
    leaf = kind | {"sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads(stored["record"]) == {
        "meta": {"epoch": 1},
        "leaves": {"a": leaf},
        "files": {},
    }


def rewrite_record(folder, change):
    """Changes a record, and gives it the right checksum."""
    file = folder / "record" / "metadata"
    record = json.loads(json.loads(file.read_text())["record"])
    change(record)
    text = json.dumps(record)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps({"record": text, "sha256": digest}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, {"a": jnp.ones((2, 3))}, {"step": 7}, {"metrics.jsonl": b"row"})
    return folder


def leaf_with(**values):
    return lambda record: record["leaves"]["a"].update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["files"]["metrics.jsonl"].pop("bytes"),
        lambda record: record["files"]["metrics.jsonl"].pop("sha256"),
        lambda record: record["leaves"]["a"].pop("sha256"),
        lambda record: record["leaves"]["a"].pop("dtype"),
        lambda record: record.pop("meta"),
        lambda record: record["meta"].update(step=8),
        lambda record: record["meta"].update(metrics={"loss": "low"}),
        leaf_with(parts={"x": "y"}),
        leaf_with(parts={"[[0, 2], [0, 4]]": "y"}),
        leaf_with(parts={"[[0, 2]]": "y"}),
        leaf_with(parts={"[[null, 2], [0, 3]]": "y"}),
        leaf_with(shape=[10**9, 10**3]),
        leaf_with(shape=[-2, -3]),
        leaf_with(shape=[6]),
        leaf_with(shape=[10**18] * 9),
        leaf_with(dtype="int32"),
        leaf_with(dtype="V1000000000000"),
    ],
)
def test_a_record_of_another_kind_is_a_sentence_though_its_checksum_is_right(
    change, saved, tmp_path
):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    rewrite_record(tmp_path / "7", change)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"holds something else|is damaged: "),
    ):
        checkpoints.arrays(7)


@pytest.mark.parametrize("name", ["record/metadata", "state/_METADATA", "state/manifest.ocdbt"])
def test_a_pipe_in_a_checkpoint_stops_nobody(name, saved, tmp_path):
    """Nor does a link to one; the others are still there."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "7", tmp_path / "kept")
    place = tmp_path / "7" / name
    place.unlink()
    os.mkfifo(place)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=f"{name}: is no file"):
            checkpoints.restore({"a": jnp.ones((2, 3))}, 7)
        place.rename(tmp_path / "pipe")
        place.symlink_to(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
            checkpoints.arrays(7)
        place.unlink()
        place.mkdir()
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoints.arrays(7)


def test_an_array_that_is_stored_larger_than_recorded_is_not_read(saved, tmp_path):
    """Reading it could take all memory."""
    shutil.copytree(saved, tmp_path / "same")
    with Checkpoints(tmp_path / "large") as checkpoints:
        checkpoints.save(7, {"a": jnp.ones((2, 4))}, {"step": 7})
    shutil.rmtree(tmp_path / "same" / "7" / "state")
    (tmp_path / "large" / "7" / "state").rename(tmp_path / "same" / "7" / "state")
    with (
        Checkpoints(tmp_path / "same") as checkpoints,
        pytest.raises(CheckpointError, match=r"a is stored as float32\(2, 4\)"),
    ):
        checkpoints.arrays(7)
