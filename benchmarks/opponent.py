"""Another program that does the same work, as a process that takes its turns."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from steps import Name, Preset, Value, work

from rlhf_jax import models
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import GPT2Config

Kind = Literal["hand", "transformers", "trl"]
OPPONENTS = {"hand": "torch_steps.py", "transformers": "torch_steps.py", "trl": "trl_steps.py"}
# Parameters of a network whose weights both sides share; of a larger one each draws its own, and
# a reduced one is compared.
MOST_SHARED = 20_000_000


def opposed(kind: Kind, name: Name, preset: Preset, value: Value, check: bool = True) -> "Opponent":
    """An opponent after one step that warms it up. With ``check`` it has shown before that it
    computes the same: in bfloat16, or with a large network, for the reduced network in float32.
    """
    check_kind(kind, preset)
    is_plain = preset.model.compute_dtype == "float32"
    is_whole = is_plain and preset.num_parameters <= MOST_SHARED
    if check and not is_whole:
        with contextlib.closing(Opponent(kind, name, preset.reduced(), value)) as small:
            small.agree()
    opponent = Opponent(kind, name, preset, value)
    if check and is_whole:
        opponent.agree()
    opponent.ask("step")
    return opponent


def check_kind(kind: Kind, preset: Preset) -> None:
    """Raises UserError if an opponent does not compute such a model here."""
    backend = jax.default_backend()
    if backend == "tpu":
        raise UserError("--against: the other programs run on a CPU or an NVIDIA GPU, not on a TPU")
    is_short = preset.model.compute_dtype != "float32"
    is_other = backend != "cpu" or not isinstance(preset.model, GPT2Config)
    if kind == "trl" and (is_short or is_other):
        raise UserError(
            "--against trl: its steps are those of a GPT-2 in float32 on a CPU; take --against "
            "hand or transformers"
        )


def shared_weights(preset: Preset) -> dict[str, np.ndarray]:
    """{path: array} of the work's own weights; none of a large network."""
    if preset.num_parameters > MOST_SHARED:
        return {}
    keys = jax.random.split(jax.random.key(0), 4)
    params = models.add_head(keys[3], models.build(preset.model).init(keys[0]), "score")
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    arrays = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    return {
        path: leaf for path, leaf in arrays.items() if path not in ("score/gain", "score/shift")
    }


class Opponent:
    """One of OPPONENTS as a process that does the same work when it is asked to, on a GPU if JAX
    uses one.

    Raises:
        UserError: the work is not one that it does, or the process ended.
    """

    def __init__(self, kind: Kind, name: Name, preset: Preset, value: Value) -> None:
        check_kind(kind, preset)
        device = {"gpu": "cuda"}.get(jax.default_backend(), "cpu")
        self.name = name
        self.preset = preset
        self.value = value
        self.folder = tempfile.TemporaryDirectory()
        self.seconds = list[float]()
        self.memory_mb: float | None = None  # the most that it held; None: it does not tell
        keys = jax.random.split(jax.random.key(0), 4)
        shape = (preset.batch, preset.prompt + preset.response)
        tokens = np.asarray(
            jax.random.randint(keys[1], shape, 2, preset.model.vocab_size, jnp.int32)
        )
        shared = Path(self.folder.name, "shared.npz")
        settings = dataclasses.asdict(preset.model)
        settings |= {"family": type(preset.model).__name__, "device": device}
        settings["microbatches"] = preset.num_microbatches
        config = json.dumps(settings, default=str)
        arrays: dict[str, Any] = shared_weights(preset)
        np.savez(shared, config=config, prompt=preset.prompt, tokens=tokens, **arrays)
        script = str(Path(__file__).with_name(OPPONENTS[kind]))
        command = [sys.executable, script, str(shared)]
        command += ["--bench", name, "--kind", kind, "--value", value]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: Literal["check", "step"]) -> dict[str, Any]:
        """One turn: its result (loss and gradient norm, or tokens) and its seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"result"'):  # libraries print lines of their own
                return json.loads(line)
        raise UserError("--against: the other program ended; see its message above")

    def agree(self) -> None:
        """Checks that both programs compute the same: loss and gradient norm, or the greedy tokens
        of a rollout.

        An opponent that does not tell one of the two answers null for it.

        Raises:
            UserError: they do not.
        """
        with jax.default_matmul_precision("highest"):
            ours = work(self.name, self.preset, self.value, temperature=0.0)
            _, metrics = jax.jit(ours.step)(ours.carry, ours.data)
        theirs = np.asarray(self.ask("check")["result"], np.float64)  # null becomes NaN
        mine = (
            metrics["tokens"]
            if self.name == "rollout"
            else jnp.stack([metrics["loss"], metrics["grad_norm"]])
        )
        mine = np.where(np.isnan(theirs), theirs, np.asarray(mine))
        close = 1e-4 if jax.default_backend() == "cpu" else 1e-3
        if np.isnan(theirs).all() or not np.allclose(
            mine, theirs, rtol=close, atol=close, equal_nan=True
        ):
            raise UserError(
                f"--against: the two programs do not compute the same: {mine} here, {theirs} there"
            )

    def turn(self) -> None:
        """A timed step."""
        answer = self.ask("step")
        self.seconds.append(answer["seconds"])
        self.memory_mb = answer.get("memory_mb")

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()
        self.folder.cleanup()
