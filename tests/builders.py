"""What tests build: models with weights, data files, configs, run folders and the processes of
runs.
"""

import functools
import importlib
import importlib.machinery
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import forks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax import grpo, iteration, models, ppo, training, vpg
from rlhf_jax.cli.stages import find_algorithm
from rlhf_jax.config import (
    DPOStage,
    KTOStage,
    Network,
    Optimizer,
    RewardModelStage,
    RLStage,
    RunConfig,
    SFTStage,
    Text,
    Tokenizer,
)
from rlhf_jax.data.tokenizers import train_bpe
from rlhf_jax.runs import folder as folders
from rlhf_jax.runs import log as tracking
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.manifest import write_manifest
from rlhf_jax.runs.writing import write_atomically
from rlhf_jax.training.common.opening import open_run
from rlhf_jax.training.common.optimizer import make_optimizer
from rlhf_jax.training.common.progress import Progress, Validation
from rlhf_jax.training.supervised import run as supervised
from rlhf_jax.training.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
FAST = Optimizer(learning_rate=1e-2)


def slow(*values):
    """The values of a test's parameters, for the slow tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


def soak(*values):
    """The values of a test's parameters, for the soak tier."""
    return pytest.param(*values, marks=pytest.mark.soak)


# --- Models


CONFIG = models.GPT2Config(vocab_size=13, max_length=10, hidden_size=8, num_layers=2, num_heads=2)
LLAMA3 = models.RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
SIZES = {
    "vocab_size": 13,
    "max_length": 16,
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 12,
}
LLAMA = models.LlamaConfig(**SIZES)
QWEN2 = models.Qwen2Config(**SIZES)
QWEN3 = models.Qwen3Config(**SIZES, head_dim=6)
MISTRAL = models.MistralConfig(**SIZES, sliding_window=3)
GEMMA = models.Gemma3TextConfig(
    **SIZES, head_dim=6, sliding_window=3, global_every=2, query_scalar=5
)
YARN = models.RopeScaling("yarn", 4.0, original_max_length=4, beta_fast=2.0, query_beta=0.5)
LONG = models.RopeScaling(
    "longrope", 2.0, original_max_length=16, short_factor=(1.0, 1.5), long_factor=(2.0, 4.0)
)
EXPERTS = {"num_experts": 5, "experts_per_token": 2}
_WIDE = {**SIZES, "head_dim": 6}
_NEOX = {**SIZES, "num_heads": 2}
_NEOX.pop("num_kv_heads")
# The families that share Llama's decoder with further settings, by their model_type.
MORE = {
    "gpt_neox": models.GPTNeoXConfig(**_NEOX, rotary_fraction=0.5),
    "olmo2": models.Olmo2Config(**SIZES),
    "olmo3": models.Olmo3Config(
        **_WIDE,
        sliding_window=3,
        global_every=2,
        rope_scaling=replace(YARN, query_beta=None),
        local_rope_theta=99.0,
    ),
    "smollm3": models.SmolLM3Config(**SIZES, global_every=2, mlp_bias=True),
    "phi3": models.Phi3Config(
        **SIZES | {"num_heads": 2}, sliding_window=3, rope_scaling=LONG, head_dim=4
    ),
    "gemma2": models.Gemma2Config(
        **_WIDE, sliding_window=3, query_scalar=5, attention_softcap=1.0, logit_softcap=2.0
    ),
    "granite": models.GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.4,
        logits_divisor=2.0,
    ),
    "ministral3": models.Ministral3Config(**_WIDE, rope_scaling=YARN),
    "qwen3_moe": models.Qwen3MoeConfig(**_WIDE, **EXPERTS, expert_size=7, dense_layers=(1,)),
    "mixtral": models.MixtralConfig(**SIZES, **EXPERTS),
    "olmoe": models.OlmoeConfig(**SIZES, **EXPERTS, normalize_experts=True),
    "gpt_oss": models.GptOssConfig(**_WIDE, **EXPERTS, sliding_window=3, gate_limit=1.0),
}


def perturbed(params, key=7):
    """Larger weights and non-zero biases, so that a mistake anywhere moves the logits by much more
    than 1e-5.
    """
    noise = np.random.default_rng(key)

    def moved(leaf):
        draw = noise.standard_normal(leaf.shape)
        return jnp.asarray(np.asarray(leaf) + 0.3 * draw.astype(np.float32))

    return jax.tree.map(moved, params)


def initial_params(model, seed=0):
    """Weights as of ``model.init``, but drawn by NumPy: nothing has to be compiled."""
    config = model.config
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "scale":
            return jnp.asarray(np.full(leaf.shape, 1.0 - getattr(config, "norm_offset", 0.0), "f4"))
        if name == "bias":
            return jnp.asarray(np.zeros(leaf.shape, "f4"))
        weights = config.initializer_range * random.standard_normal(leaf.shape)
        return jnp.asarray(weights, jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def some_params(config):
    return perturbed(initial_params(models.build(config)))


@functools.cache
def tiny(config=CONFIG, **changes):
    """A model of the same weights under every change, its functions compiled (eagerly each shape
    costs far more).
    """
    model = models.build(replace(config, **changes))
    params = stack_layers(some_params(config)) if model.config.scan_layers else some_params(config)
    return model._replace(apply=jax.jit(model.apply), hidden=jitted_hidden(model)), params


def jitted_hidden(model):
    """A slice of columns is no array: each has a program of its own."""
    of = functools.cache(
        lambda start, stop: jax.jit(lambda *inputs: model.hidden(*inputs, slice(start, stop)))
    )
    whole = jax.jit(model.hidden)

    def hidden(params, tokens, mask=None, key=None, columns=None):
        if isinstance(columns, slice):
            return of(columns.start, columns.stop)(params, tokens, mask, key)
        return whole(params, tokens, mask, key, columns)

    return hidden


def grid(*rows):
    """[N, T] int32 of texts of digits, one for each row; a space only helps to read."""
    return np.array([list(row.replace(" ", "")) for row in rows]).astype(np.int32)


def some_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length))


def stack_layers(params):
    """All but the last layer, as under ``scan_layers``."""
    *layers, _ = sorted(name for name in params if name.startswith("h_"))
    rest = {name: leaf for name, leaf in params.items() if name not in layers}
    return rest | {
        "h": jax.tree.map(lambda *each: jnp.asarray(np.stack(each)), *map(params.get, layers))
    }


def save_base(folder, data, num_layers=1, dtype=np.float32):
    """A model with random weights and a tokenizer of the demo texts, as a folder for --model."""
    tokenizer = train_bpe(
        [path.read_text("utf-8") for path in sorted(Path(data).glob("*.json"))], 300
    )
    special = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "max_length": 128,
        "hidden_size": 16,
        "num_heads": 2,
    }
    model = models.build(models.GPT2Config(num_layers=num_layers, **sizes, **special))
    models.save(folder, model, jax.tree.map(lambda leaf: leaf.astype(dtype), initial_params(model)))
    tokenizer.save(folder)
    return str(folder)


# --- Data files


def text_file(path, length):
    """A file of random words; a quarter of its characters is h or so."""
    words = random.Random(0).choices(["hat ", "the ", "be\n", "ah, ", "bat ", "eat "], k=length)
    path.write_text("".join(words)[:length], encoding="utf-8")
    return path


SPECIAL = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256))]


def write_stories(
    folder, pieces, *, width=16, inner=12, layers=2, heads=4, kv_heads=2, length=16, scale=0.5
):
    """stories260K.bin of random weights and tok512.bin of ``{piece: score}``; returns the weights
    by name.
    """
    vocabulary = len(SPECIAL) + len(pieces)
    kv_width = width // heads * kv_heads
    random = np.random.default_rng(0)
    names = ("embedding", "norm1", "wq", "wk", "wv", "wo", "norm2", "w1", "w2", "w3", "norm")
    square = (layers, width, width)
    up = (layers, inner, width)
    norm = (layers, width)
    kv = (layers, kv_width, width)
    down = (layers, width, inner)
    shapes = ((vocabulary, width), norm, square, kv, kv, square, norm, up, down, up, (width,))
    drawn = (scale * random.standard_normal(shape).astype("<f4") for shape in shapes)
    weights = dict(zip(names, drawn, strict=True))
    weights["embedding"][len(SPECIAL) :] *= 8  # these pieces are most of what the model says
    header = struct.pack("<7i", width, inner, layers, heads, kv_heads, vocabulary, length)
    unused = bytes(4 * length * width // heads)  # the file ends with angles, which nothing reads
    stored = b"".join(weight.tobytes() for weight in weights.values())
    (folder / "stories260K.bin").write_bytes(header + stored + unused)
    entries = [*((piece, 0.0) for piece in SPECIAL), *pieces.items()]
    packed = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in entries)
    (folder / "tok512.bin").write_bytes(struct.pack("<i", 7) + packed)
    return weights


# --- Configs


UNASKED = {"validation_prompts": 0}  # a program less to compile, in SFT, DPO and KTO


def tiny_run(data, output_dir):
    """The settings of a short run on the demo data, of each stage."""
    supervised = {
        "batch_size": 16,
        "optimizer": FAST,
        "validation_fraction": 0.2,
        "validation_interval": 2,
    }
    sampled = {
        "max_new_tokens": 4,
        "kl_target": 0.01,
        "validation_interval": 3,
        "validation_prompts": 4,
    }
    return RunConfig(
        data=(data,),
        output_dir=str(output_dir),
        checkpoint_interval=2,
        network=Network(hidden_size=16, num_layers=1, num_heads=2, max_length=128),
        tokenizer=Tokenizer(vocab_size=300),
        text=Text(bucket_multiple=128),
        sft=SFTStage(**supervised, **UNASKED, num_epochs=2),
        reward_model=RewardModelStage(**supervised, num_epochs=2),
        dpo=DPOStage(**supervised, **UNASKED, num_epochs=2),
        reward=("count:e",),
        rl=RLStage(num_iterations=7, batch_size=16, optimizer=FAST, **sampled),
        ppo=ppo.Config(num_epochs=1, num_minibatches=2, shuffle_blocks=4),
    )


def with_rl(config, **changes):
    """The config with other settings of its section ``rl``."""
    return replace(config, rl=replace(config.rl, **changes))


LETTERS = "abcdefghijklmnop"


# The answer that a row's reward is given is that of its prompt, whatever other rows are absent or
# cannot be scored.
REWARD = """
def same(prompts, responses, letter):
    assert [prompt[-1] for prompt in prompts] == letter, (prompts, letter)
    return [None if c == "a" else float(ord(c)) for c in letter]
"""


def letters_run(folder):
    """Sixteen rows that differ in a letter, a quarter of them held out; three steps of four rows
    are an epoch.
    """
    answers = {"response": "yes", "chosen": "yes", "rejected": "no"}
    for kind, names in (
        ("prompts", ()),
        ("texts", ("response",)),
        ("pairs", ("chosen", "rejected")),
    ):
        rows = [{"prompt": f"say {c}"} | {name: answers[name] for name in names} for c in LETTERS]
        rows = (
            [row | {"letter": c} for row, c in zip(rows, LETTERS, strict=True)]
            if kind == "prompts"
            else rows
        )
        (folder / f"{kind}.json").write_text(json.dumps(rows))
    (folder / "reward.py").write_text(REWARD)
    size = {"batch_size": 4, "validation_fraction": 0.25}
    supervised = {"num_epochs": 2, "validation_interval": 9}
    return RunConfig(
        data=(str(folder / "prompts.json"),),
        output_dir=str(folder / "first"),
        network=Network(hidden_size=8, num_layers=1, num_heads=1, max_length=16),
        tokenizer=Tokenizer(kind="characters"),
        text=Text(bucket_multiple=16),
        sft=SFTStage(**size, **supervised, data=(str(folder / "texts.json"),)),
        reward_model=RewardModelStage(**size, **supervised, data=(str(folder / "pairs.json"),)),
        dpo=DPOStage(**size, **supervised, data=(str(folder / "pairs.json"),)),
        reward=(f"{folder / 'reward.py'}:same",),
        rl=RLStage(num_iterations=3, **size, max_new_tokens=2, kl_coef=0.0, validation_interval=3),
    )


def letters_stage(folder, name):
    """The settings of a short run that saves every second step."""
    config = replace(
        letters_run(folder),
        output_dir=str(folder / "run"),
        checkpoint_interval=2,
        kto=KTOStage(
            batch_size=4, num_epochs=2, validation_fraction=0.25, data=(str(folder / "pairs.json"),)
        ),
    )
    if name in TASKS:
        return replace(config, reward=())
    changes = {"reward": ("count:a",)}
    if name in ("rloo", "grpo"):
        method = replace(getattr(config, name), group_size=2, shuffle_blocks=1)
        changes[name] = replace(method, num_minibatches=1)
    return replace(config, **changes)


# --- The steps of an RL iteration in one program


def collected(loop, prompts, key, functions, *, model, config):
    """Responses with the log-probs of the update's own forward pass, and metrics."""
    policy = iteration.sampling_params(loop, functions.base)
    sampled = iteration.respond(policy, prompts, key, model=model, config=config)
    return iteration.rescored(loop, sampled, functions, eos_ids=config.eos_ids)


def one_program(collect, learn):
    """``collect``, reward and ``learn`` of one state; the scored rollout is a result too."""

    def whole(loop, prompts, rollout_key, update_key, functions):
        rollout, collected_metrics = collect(loop, prompts, rollout_key, functions)
        rollout, reward_metrics = iteration.reward(rollout, functions)
        loop, learn_metrics = learn(loop, rollout, update_key, functions)
        return loop, rollout, collected_metrics | reward_metrics | learn_metrics

    return whole


# --- Scripts


def script(path):
    """A script of the checkout, as a module."""
    place = ROOT / path
    with mock.patch.object(sys, "path", [str(place.parent), *sys.path]):
        return importlib.import_module(place.stem)


# --- Runs in this process


def run_stage(config, name):
    if name in TASKS:
        return supervised.run(config, TASKS[name]).folder
    return training.rl.run(config, find_algorithm(name)).folder


def run_ppo(config):
    return training.rl.run(config, ppo)


def run_vpg(config):
    return training.rl.run(config, vpg)


def run_grpo(config):
    return training.rl.run(config, grpo)


def stages(*fast):
    """All stages as parameters; those that are not fast take long."""
    runs = {"sft": training.sft.run, "reward_model": training.reward_model.run, "ppo": run_ppo}
    soak = {"dpo": training.dpo.run, "vpg": run_vpg}
    marks = (
        dict.fromkeys(runs, pytest.mark.slow)
        | dict.fromkeys(soak, pytest.mark.soak)
        | dict.fromkeys(fast, ())
    )
    return pytest.mark.parametrize(
        "run", [pytest.param(f, id=n, marks=marks[n]) for n, f in (runs | soak).items()]
    )


class Killed(BaseException):
    """Stands for the process's end: nothing catches it."""


def interrupt(monkeypatch, step, number=None):
    """Kills the run, or sends it a signal, when it is about to log ``step``."""
    log = tracking.Tracker.log

    def dying(self, now, metrics):
        if now == step:
            if number is None:
                raise Killed
            signal.raise_signal(number)
        return log(self, now, metrics)

    monkeypatch.setattr(tracking.Tracker, "log", dying)


def stopped_goes_on_alike(run, config, straight, step):
    """What ``run(config)`` leaves that is killed before it logs ``step``, and resumed: the same as
    the result ``straight`` of a run of its own.
    """
    config = replace(config, output_dir=f"{config.output_dir}-again")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(Killed):
            run(config)
    resumed = run(replace(config, resume=True))
    assert outputs(resumed.folder) == outputs(straight.folder)
    return resumed


def goes_on_alike(run, config, straight, of=None):
    """What ``run(config)`` leaves that goes on from the last checkpoint but one of its result
    ``straight``: the same, by the bytes ``of(folder)``.
    """
    of = of or outputs
    folder = Path(f"{config.output_dir}-again")
    shutil.copytree(straight.folder, folder)
    shutil.rmtree(folder / "model")
    steps = sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
    assert steps[-2] > 0
    shutil.rmtree(folder / "checkpoints" / str(steps[-1]))
    resumed = run(replace(config, output_dir=str(folder), resume=True))
    assert of(resumed.folder) == of(straight.folder)
    return resumed


def outputs(folder):
    names = ["model/model.safetensors", "model/config.json", "metrics.jsonl", "samples.jsonl"]
    return {name: (folder / name).read_bytes() for name in names}


def run_loop(
    config,
    *,
    num_steps=6,
    die_at=None,
    losses=None,
    scores=None,
    before_step=lambda state, step: None,
    metrics=None,
    validation_interval=1,
    optimizer=None,
    **options,
):
    """A stage whose state counts its steps; ``validation/score`` after k steps is ``scores[k]``."""

    def advance(state, step):
        before_step(state, step)
        if step == die_at:
            raise Killed
        loss = jnp.float32(losses[step]) if losses else state["n"] / 2
        return state | {"n": state["n"] + 1}, {"loss": loss, "nonfinite": ~jnp.isfinite(loss)} | (
            metrics or {}
        )

    def validate(state):
        step = int(state["n"])
        return Validation(
            {"validation/score": scores[step]}, [{"prompt": f"p{step}"}, {"prompt": "q"}]
        )

    with open_run(config, "sft", {}) as run:
        schedule = None if optimizer is None else make_optimizer(optimizer, num_steps).init({})
        start = run.layout.copy({"n": jnp.float32(0), "optimizer": schedule})
        progress = Progress(
            run,
            start,
            num_steps=num_steps,
            validate=validate if scores else None,
            validation_interval=validation_interval,
            optimizer=optimizer,
            monitor="max:validation/score",
        )
        state, row = go_on(progress, advance, **options)
    return int(state["n"]), row


def go_on(
    progress,
    advance,
    *,
    check_memory=lambda state: None,
    adopt=lambda state, saved: state,
    sources=lambda step: (),
    examples=dict,
    on_step=None,
):
    """The last state and row of a run. Its step number k is ``advance(state, k - 1)``, and
    ``sources(k - 1)`` are the rows of that step.
    """
    with progress:
        if progress.has_steps:
            check_memory(progress.state)
        progress.begin(adopt)
        for step in progress.steps():
            state, metrics = advance(progress.state, step - 1)
            rows = functools.partial(sources, step - 1)
            progress.record(state, metrics, sources=rows, examples=examples())
            progress.settle(on_step)
        return progress.result()


# --- Runs in processes of their own


def program(name):
    """The command line of a script in experiments/, or of a command, such as reward_model."""
    script = ROOT / "experiments" / f"{name}.py"
    if script.exists():
        return [sys.executable, str(script)]
    return [sys.executable, "-m", "rlhf_jax", name.replace("_", "-")]


def start_script(script, *flags, **environment):
    env = dict(os.environ, JAX_PLATFORMS="cpu") | environment
    command = [*program(script), *map(str, flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT
    )


def run_script(script, *flags, check=True, **environment):
    """The same to its end, in a process that is forked."""
    done = forks.run(["python", *program(script)[1:], *flags], ROOT, **environment)
    assert not (check and done.returncode), done.stdout + done.stderr
    return done


def json_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def metric_rows(folder, name="metrics.jsonl"):
    return json_lines(Path(folder) / name)


def launch(command: list, count: int, devices: int, flag: list[str]) -> list[subprocess.Popen]:
    """Starts a command once for each process, with so many devices each; ``flag`` stands before the
    process's place.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{server.getsockname()[1]},{count}"
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    own = [[*flag, f"{place},{number}"] if count > 1 else [] for number in range(count)]
    return [
        subprocess.Popen([*map(str, command), *last], env=environment, cwd=ROOT, **pipes)
        for last in own
    ]


# --- Run folders


def results(folder: Path) -> dict[str, bytes]:
    """What a run leaves that a seed reproduces, of all stages where there are several."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [
        p
        for p in files
        if "model" in p.relative_to(folder).parts or p.name in ("metrics.jsonl", "samples.jsonl")
    ]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


RUN_YAML = "seed: 0\nresume: false\nppo:\n  clip_low: 0.2\n  data: [a, b]\n  weights: {}\n"


def finished_run(path: Path, data: dict[str, str] | None = None) -> None:
    with folders.open_run(path) as run:
        write_atomically(run.config, RUN_YAML)
        write_manifest(run, {"seed": 3, "data": data or {}}, {})
        with Checkpoints(run.checkpoints) as checkpoints:
            checkpoints.save(0, {"a": jnp.ones(2)}, {})


HOSTILE = '</td></svg><script src="http://x.org/a.js">alert("1")</script> & $x$ <b>'


class Page(HTMLParser):
    """Elements with their attributes and texts; fails on an end without its beginning, and on an id
    given twice.
    """

    def __init__(self, html: str):
        super().__init__()
        self.open: list[dict] = []
        self.elements: list[dict] = []
        self.feed(html)
        self.close()
        assert self.open == []
        ids = [element["id"] for element in self.elements if "id" in element]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attributes) -> list[dict]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [e for e in self.elements if e["tag"] == tag and wanted.items() <= e.items()]

    def texts(self, tag: str, **attributes) -> list[str]:
        return [element["text"] for element in self.all(tag, **attributes)]


COMMAND = "rlhf-jax ppo --seed 5"
METRICS = {
    "objective/score": [1.0, 2.0, 4.0],
    "objective/kl": [0.0, 0.5, 1.5],
    "nonfinite": [0.0] * 3,
}
VALIDATIONS = {
    0: [("a", "b\nc", 1.0, 3), ("a", HOSTILE, 2.0, 3), ("d", "NaN", 1.0, 1)],
    3: [("a", "again", 3.0, 4), ("a", "second", 5.0, 4), ("d", "NaN", 3.0, 1)],
}
KEYS = ("prompt", "response", "score", "length")
SAMPLES = {
    step: [dict(zip(KEYS, row, strict=True)) for row in rows] for step, rows in VALIDATIONS.items()
}


def write_run(
    folder: Path,
    *,
    stage="ppo",
    seed=5,
    settings=None,
    metrics=METRICS,
    samples=SAMPLES,
    finished=True,
) -> Path:
    """A run folder whose metric rows are of steps 1, 2, ...; ``validation/score`` of 0 and the last
    step.
    """
    (folder / "model").mkdir(parents=True)
    if finished:
        (folder / "model" / "config.json").write_text("{}")
        save_file({}, folder / "model" / "model.safetensors")
    manifest = {
        "command": COMMAND,
        "seed": seed,
        "stage": stage,
        "backend": "cpu",
        "versions": {"jax": "0.10.2"},
    }
    manifest |= {
        "devices": {"kind": "cpu", "count": 2},
        "data": {"prompts.json": "fedcba9876543210"},
    }
    manifest |= {"git": {"commit": "0123456789abcdef", "modified": True}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    config = {"seed": seed, "output_dir": str(folder), **(settings or {"rl": {"kl_target": 2.0}})}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    by_step = [(0, {"validation/score": 1.5})] if "objective/score" in metrics else []
    by_step += enumerate(
        (dict(zip(metrics, row, strict=True)) for row in zip(*metrics.values(), strict=True)), 1
    )
    times = [(step, {"timing/step": seconds}) for step, seconds in ((1, 9.0), (2, 0.5), (3, 0.25))]
    texts = [(step, row) for step, rows in samples.items() for row in rows]
    for name, lines in (("metrics", by_step), ("timing", times), ("samples", texts)):
        (folder / f"{name}.jsonl").write_text(
            "".join(f"{json.dumps({'step': step} | row)}\n" for step, row in lines)
        )
    return folder


# --- Stand-ins


class Checker:
    """Stands for math-verify, which is an optional package."""

    __spec__ = importlib.machinery.ModuleSpec("math_verify", None)

    @staticmethod
    def parse(text):
        return [float(text)] if text.strip("$").lstrip("-").isdigit() else []

    @staticmethod
    def verify(gold, answer):
        return gold == answer
