"""One GPU in eight minutes: its peaks, the numbers of a CPU, repeatable runs, and its speed beside
PyTorch.

    python benchmarks/card.py --out docs/results/card.json
    python benchmarks/card.py --rehearse --out card.json      # all parts, tiny, on a CPU: a minute
    python benchmarks/card.py --only right,bench --out card.json

Each part is a process of its own with a time limit, so that a crash or full memory ends that part
alone. They come in the order in which they matter: when the seconds are used up, the rest is
skipped. The table has a row for each figure; a part that failed or was skipped has a row that says
so and why. The same holds for a package that is missing: the parts that do not need it run.
``XLA_FLAGS=--xla_dump_to=FOLDER`` keeps the compiled programs.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
COMMAND = ("-m", "rlhf_jax")
BENCH = str(Path(__file__).with_name("bench.py"))
SECONDS = 450.0  # of all parts
LEAST = 15.0  # seconds in which a part can still say something
TURN = 16.0  # kept for each part that follows: these, and the end of the one before
LONG = 600.0  # seconds of a rehearsed part: it is no measurement
FIGURES = (
    "median_s",
    "tokens_per_s",
    "ms_per_token",
    "bandwidth_share",
    "bandwidth_share_published",
    "mfu",
    "mfu_measured",
    "others_cpu",
    "peak_memory_mb",
    "planned_memory_mb",
    "compile_cold_s",
    "compile_warm_s",
    "against_median_s",
    "against_peak_memory_mb",
    "ratio",
)
# Networks whose numbers are compared with a CPU's.
COMPARED = [
    ("gpt2-tiny", "float32"),
    ("gpt2-tiny", "bfloat16"),
    ("qwen2.5-0.5b-tiny", "float32"),
    ("qwen2.5-0.5b-tiny", "bfloat16"),
]

Values = dict[str, float]
Rows = list[dict[str, Any]]


class Part(NamedTuple):
    """A part of the table: arguments of this script in a process of its own."""

    name: str
    arguments: tuple[str, ...]
    limit: float  # seconds


def _bench(kind: str, preset: str, sizes: str, more: str = "", limit: float = 120.0) -> Part:
    """``sizes``: rows, columns of the prompts and of the responses; ``more``: further flags."""
    rows, prompt, response = sizes.split()
    words = f"{kind} --preset {preset} --rows {rows} --prompt {prompt} --response {response} {more}"
    words = f"bench {words} --dtype bfloat16"
    return Part(f"{kind} {preset} {rows}x({prompt}+{response})", tuple(words.split()), limit)


# Each of the two programs shows once that it computes the same as ours.
CHECKED_HAND = "--against hand"
CHECKED_LIBRARY = "--against transformers"
HAND = "--against hand --no-check"
LIBRARY = "--against transformers --no-check"
PARTS = [
    Part("peaks", ("peaks",), 60.0),
    Part("right", ("right",), 90.0),
    Part("same bytes", ("again",), 90.0),
    Part("same bytes, microbatches 1 and 4", ("blocks",), 90.0),
    _bench("rollout", "qwen2.5-0.5b", "64 128 128", CHECKED_LIBRARY),
    _bench("sft", "qwen2.5-0.5b", "8 1 1023", CHECKED_HAND),
    _bench("grpo", "qwen2.5-0.5b", "32 512 512", f"{HAND} --microbatches 4"),
    _bench("rollout", "qwen2.5-0.5b", "8 128 384"),
    _bench("sft", "gpt2", "16 1 1023", HAND),
    _bench("rollout", "gpt2", "64 128 384", HAND),
    _bench("sft", "llama-1b", "8 1 1023", LIBRARY),
    _bench("grpo", "gpt2", "64 512 512", f"{HAND} --microbatches 4"),
    _bench("rollout", "llama-1b", "256 128 384"),
    _bench("sft", "qwen2.5-0.5b", "2 1 8191", "--microbatches 2"),
    Part("doctor", ("doctor",), 60.0),
]
REHEARSED = [
    Part("peaks", ("peaks",), LONG),
    Part("right", ("right", "--rehearse"), LONG),
    Part("same bytes", ("again", "--rl.num-iterations", "2"), LONG),
    Part("same bytes, microbatches 1 and 4", ("blocks", "--rl.num-iterations", "2"), LONG),
    _bench("rollout", "qwen2.5-0.5b-tiny", "4 8 8", LIBRARY, LONG),
    _bench("sft", "gpt2-tiny", "4 1 15", CHECKED_HAND, LONG),
    _bench("grpo", "llama-1b-tiny", "8 8 8", "--microbatches 2", LONG),
    Part("doctor", ("doctor",), LONG),
]


# --- Parts: each prints {metric: value} as a line of JSON


def peaks() -> Values:
    """TFLOP/s of a large product in bfloat16 and GB/s of a large copy."""
    import figures

    from rlhf_jax.runs import devices

    devices.choose(None)
    found = figures.measured_peaks("bfloat16")
    return {"bf16_tflops": found.flops / 1e12, "copy_gb_s": found.bandwidth / 1e9}


def right(columns: int, compared: list[tuple[str, str]]) -> Values:
    """How far logits, greedy tokens and one step of SFT are from those of the CPU of the machine,
    for these networks and dtypes.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from rlhf_jax.runs import devices

    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = devices.xla_flags(devices.flags_for("gpu"), given)
    import jax

    if os.environ.get("JAX_PLATFORMS") != "cpu":
        jax.config.update("jax_platforms", "cuda,cpu")
    found = {}
    places = {"cpu": jax.devices("cpu")[0], "here": jax.devices()[0]}
    for preset, dtype in compared:
        numbers = {name: _numbers(preset, dtype, columns, at) for name, at in places.items()}
        for metric, value in _gaps(numbers["cpu"], numbers["here"]).items():
            found[f"{preset} {dtype} {metric}"] = value
    return found


def _numbers(preset: str, dtype: str, columns: int, device: Any) -> dict[str, Any]:
    """Logits, greedy tokens, weights after a step, and its loss, on a device."""
    import jax
    import optax
    import steps

    from rlhf_jax import Demonstrations, TrainState, models, sampling, sft

    config = steps.PRESETS[preset].model
    model = models.build(replace(config, max_length=columns, compute_dtype=dtype))
    generator = np.random.default_rng(0)
    tokens = generator.integers(2, config.vocab_size, (4, columns)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[0, :5] = 0
    mask[1, -7:] = 0
    response = mask.copy()
    response[:, :9] = 0
    how = sampling.SamplingConfig(16, temperature=0.0, eos_id=None, pad_id=0)
    optimizer = optax.sgd(0.1)

    def compute(params: Any) -> dict[str, Any]:
        logits = model.apply(params, tokens, mask) * mask[..., None]
        prompt = (tokens[:, 8:24], mask[:, 8:24])
        said = sampling.generate(model, params, *prompt, jax.random.key(1), config=how).tokens
        state, metrics = sft.update(
            TrainState.create(params, optimizer),
            Demonstrations(tokens, mask, response),
            None,
            policy_fn=models.policy_fn(model, one_text=True),  # as runs have it: by lengths
            optimizer=optimizer,
            config=sft.Config(),
        )
        return {"logits": logits, "said": said, "weights": state.params, "loss": metrics["loss"]}

    with jax.default_device(device), jax.default_matmul_precision("highest"):
        # Larger weights than a network begins with: its logits are not near 0.
        params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, model.init(jax.random.key(0)))
        return jax.device_get(jax.jit(compute)(params))


def _gaps(cpu: dict[str, Any], here: dict[str, Any]) -> Values:
    import jax

    def largest(old: Any, new: Any) -> float:
        apart = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), old, new)
        return float(np.max(jax.tree.leaves(apart)))  # not Python's max, which loses NaN

    scale = float(np.max(np.abs(cpu["logits"])))
    return {
        "logits gap": largest(cpu["logits"], here["logits"]) / scale,
        "greedy equal": float(np.mean(cpu["said"] == here["said"])),
        "loss gap": float(abs(cpu["loss"] - here["loss"])),
        "weights gap": largest(cpu["weights"], here["weights"]),
    }


def again(flags: list[str]) -> Values:
    """A run of PPO twice with --deterministic; the second finds the programs of the first."""
    return _compared(flags, flags)


def blocks(flags: list[str]) -> Values:
    """A run of PPO in four blocks, with all rows of a minibatch at once and with a quarter."""
    in_blocks = [*flags, "--compute.blocks", "4"]
    return _compared(in_blocks, [*in_blocks, "--ppo.num-microbatches", "4"])


def _compared(*runs: list[str]) -> Values:
    """Whether two runs have the same bytes of weights and metrics, and how many rows of metrics
    are equal until the first that is not.
    """
    files: list[list[bytes]] = []
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for number, flags in enumerate(runs):
            run = Path(folder, str(number))
            words = ["ppo", "--config", "tiny", "--deterministic", "--output-dir", str(run)]
            started = time.perf_counter()
            done = _python(*COMMAND, *words, *flags)
            seconds.append(time.perf_counter() - started)
            if done.returncode:
                raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
            names = (Path("model", "model.safetensors"), Path("metrics.jsonl"))
            files.append([(run / name).read_bytes() for name in names])
    one, two = (metrics.splitlines() for _, metrics in files)
    pairs = zip(one, two, strict=True)
    equal_rows = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return {
        "same": float(files[0] == files[1]),
        "equal_rows": float(equal_rows),
        "rows": float(len(one)),
        "run_s": min(seconds),
    }


def doctor() -> Values:
    """The exit code of ``rlhf-jax doctor`` and its seconds."""
    started = time.perf_counter()
    done = _python(*COMMAND, "doctor")
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
    return {"exit_code": float(done.returncode), "doctor_s": time.perf_counter() - started}


def bench(words: list[str]) -> Values:
    """Figures of the line that ``bench.py`` prints."""
    done = _python(BENCH, *words)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:  # a line with exit code 1: other programs used the machine too
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    line = json.loads(lines[-1])
    for figure, reason in line.get("left_out", {}).items():
        sys.stderr.write(f"{figure} is left out: {reason}\n")
    return {name: line[name] for name in FIGURES if line.get(name) is not None}


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


# --- The table


def run_part(part: Part, limit: float, path: str) -> Rows:
    """The rows of a part, which is ended after ``limit`` seconds. ``path``: of Python's modules."""
    command = [sys.executable, __file__, "--part", *part.arguments]
    with tempfile.TemporaryFile("w+") as errors:
        with _ended_together(command, path, errors) as process:
            try:
                output, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                output = None
        errors.seek(0)
        said = errors.read()
    sys.stderr.write(said)
    if output is None:
        return rows_of(part, {"failed": 124}, f"ended after {limit:.0f} s")
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        [*_, reason] = said.strip().splitlines() or ["it said nothing"]
        return rows_of(part, {"failed": process.returncode or 1}, reason[:300])
    return rows_of(part, json.loads(lines[-1]))


@contextlib.contextmanager
def _ended_together(command: list[str], path: str, errors: IO[str]) -> Any:
    """A process whose own processes end with it."""
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def rows_of(part: Part, values: Values, reason: str | None = None) -> Rows:
    """A row of the table for each figure; both numbers of a run without seeds and steps are 0."""
    variant = part.name
    if "--against" in part.arguments:
        variant += f" beside {part.arguments[part.arguments.index('--against') + 1]}"
    key = {"variant": variant, "seed": 0, "step": 0}
    rows = []
    for metric, value in values.items():
        rows.append(key | {"metric": metric, "value": float(f"{value:.5g}")})
        if reason is not None:
            rows[-1]["reason"] = reason
    return rows


def missing(packages: list[str]) -> list[str]:
    """Those of the packages that are not installed."""
    # A folder that a broken installation left has no name.
    installed = {_normal(one.name) for one in metadata.distributions() if one.name}
    return [name for name in packages if _normal(name) not in installed]


def torch_runs() -> bool:
    """Whether PyTorch computes where the parts do."""
    words = "import torch; print(torch.cuda.is_available())"
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    return _said_by(sys.executable, "-c", words) in (["True", "False"] if on_cpu else ["True"])


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


@contextlib.contextmanager
def module_path(project: dict[str, Any], absent: list[str]) -> Iterator[str]:
    """PYTHONPATH with this tree, and with its metadata if no package of it is installed: runs write
    its version.
    """
    name, version = project["name"], project["version"]
    with tempfile.TemporaryDirectory() as folder:
        if name in absent:
            made = Path(folder, f"{name.replace('-', '_')}-{version}.dist-info")
            made.mkdir()
            words = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (made / "METADATA").write_text(words, "utf-8")
        yield os.pathsep.join([str(ROOT), folder, *filter(None, [os.environ.get("PYTHONPATH")])])


def without_torch(part: Part) -> Part:
    """The part without the program that it is compared with, which is PyTorch's."""
    words = [word for word in part.arguments if word != "--no-check"]
    if "--against" in words:
        place = words.index("--against")
        del words[place : place + 2]
    return part._replace(arguments=tuple(words))


def machine() -> str:
    """The device and the versions that the figures depend on, without starting JAX here."""
    words = "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind)"
    facts = [_said_by(sys.executable, "-c", words) or "no device"]
    for package in ("jax", "jaxlib", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts.append(f"{package} {metadata.version(package)}")
    return ", ".join([*facts, f"Python {platform.python_version()}"])


def _said_by(*command: str) -> str:
    """The output of a command; "" if it does not run or end."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout.strip()
    return ""


def tables(parts: list[Part], seconds: float, command: str) -> Iterator[dict[str, Any]]:
    """The table after each part, which are run while there are ``seconds`` left."""
    started = time.perf_counter()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [re.split("[^A-Za-z0-9_.-]", words)[0] for words in project["dependencies"]]
    absent = missing([project["name"], *needed, "torch"])
    if "torch" not in absent and not torch_runs():
        absent.append("torch")
    rows = rows_of(Part("missing", (), 0.0), dict.fromkeys(absent, 1.0))
    _show(rows)
    if "torch" in absent:
        parts = list(map(without_torch, parts))
    git = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    table = {"command": command, "revision": _said_by(*git), "machine": machine()}
    with module_path(project, absent) as path:
        for number, part in enumerate(parts, 1):
            kept = TURN * (len(parts) - number)
            left = seconds - (time.perf_counter() - started) - kept
            if left < LEAST:
                found = rows_of(part, {"skipped": 1}, "no seconds were left")
            else:
                found = run_part(part, min(left, part.limit), path)
            _show(found)
            rows += found
            yield table | {"seconds": round(time.perf_counter() - started), "rows": rows}


def _show(rows: Rows) -> None:
    for row in rows:
        print(f"{row['variant']}: {row['metric']} {row['value']:g}", flush=True)


def answer(words: list[str]) -> Values:
    """The figures of the part that these words name."""
    name, *rest = words
    if name == "bench":
        return bench(rest)
    if name == "right":
        return right(64, COMPARED[-1:]) if rest else right(640, COMPARED)
    if name in ("again", "blocks"):
        return {"again": again, "blocks": blocks}[name](rest)
    return {"peaks": peaks, "doctor": doctor}[name]()


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        print(json.dumps(answer(sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file for the table")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--only", default="", help="the first words of parts, with commas")
    args = parser.parse_args()
    parts = REHEARSED if args.rehearse else PARTS
    if args.rehearse:
        os.environ["JAX_PLATFORMS"] = "cpu"
    names = [part.arguments[0] for part in parts]
    only = args.only.split(",") if args.only else names
    if unknown := set(only) - set(names):
        known = ", ".join(dict.fromkeys(names))
        parser.error(f"no part begins with {', '.join(sorted(unknown))}; there are {known}")
    wanted = [part for part in parts if part.arguments[0] in only]
    command = " ".join(["python benchmarks/card.py", *sys.argv[1:]])
    # An outer limit ends this script so: a part that stayed would hold the card's memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed: set[str] = set()
    for table in tables(wanted, args.seconds, command):
        # After each part: what is measured stays if the machine goes.
        args.out.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
        failed = {row["variant"] for row in table["rows"] if row["metric"] == "failed"}
    if failed:
        raise SystemExit(f"failed: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
