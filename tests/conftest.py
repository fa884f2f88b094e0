"""Four fake CPU devices for the sharding tests, on a machine with a GPU too, and strict rank
promotion: a broadcast that was not meant is an error.

Compiled programs are kept between runs, for the scripts that tests start too.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

# Read by jax when it is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "rlhf_jax_tests" / "xla")
)
# Tests compile thousands of small programs, which jax leaves out of the cache by default.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Most tests compile much and compute little: without XLA's optimizations they take half the time,
# and so do the scripts that they start. Programs as a user's are run by fifteen_minutes.py, and by
# tests with the fixture below.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tests call what entry points call; it must not start pytest anew.
os.environ["RLHF_JAX_KEEP_MEMORY"] = "0"
# Servers that tests start are reached directly, whatever proxy the machine has.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"

# The jobs in experiments/ are scripts, and modules here.
sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))

import builders
import jax
import pytest

from rlhf_jax import cli
from rlhf_jax.data import demo
from rlhf_jax.runs import devices
from rlhf_jax.training.common import saving

# As every run sets them, before the first program: they are part of its key in the cache. A program
# that is not cut into parts for several cores compiles in a sixth less, where other tests take
# these cores. Tests jit programs of four devices themselves: see ``devices.compiler_options``.
FLAGS = {
    **devices.flags_for("cpu"),
    "xla_cpu_parallel_codegen_split_count": "1",
    **devices.SAVING_MEMORY,
}
os.environ["XLA_FLAGS"] = devices.xla_flags(FLAGS, os.environ.get("XLA_FLAGS", ""))

# Looking for garbage among a million objects that stay took a sixth of the tests' time: see
# pytest_collection_finish.
gc.disable()


LONG = {
    *("real_model", "quickstart", "docs", "processes", "kills", "sentiment", "shakespeare"),
    *("scripts", "notebooks", "layouts", "arithmetic", "blocks", "multi_turn", "cpu_threads"),
    *("card_parity", "label_page", "serve_page", "calculator", "rounds", "writing", "plan"),
}
# Files whose tests are whole runs for the most part.
RUNS = {
    *("chat_command", "distill_runs", "engines", "evaluate", "generate", "generator", "goldens"),
    *("keeping", "label", "live_memory", "moving_references", "out_of_memory", "plan"),
    *("reward_interface", "rl_from_python", "rl_validation", "rounds", "serve", "serve_hostile"),
    *("serve_openai", "slots", "stage_loop", "stop_strings", "supervised", "trackers", "training"),
    *("fork", "given_rows", "lora_runs", "states", "validation_answers", "verify", "wiring"),
}


# Files of functions of arrays: what they compile is the same under every Python.
ARRAYS = {
    *("advantages", "algorithm_hooks", "algorithm_losses", "attention", "dapo", "distill"),
    *("experts", "families", "gradient_step", "group_objectives", "heads", "iteration"),
    *("kernels", "known_optima", "layouts", "lora", "losses", "models", "online_preferences"),
    *("ops", "otb", "policies", "policy_algorithms", "quantization", "rl_steps", "sampling"),
    *("scan_and_remat", "share_prompts", "shared_comparisons", "shared_prompts", "sharding"),
    *("statistic", "truncated_sampling", "trust_regions", "updates", "value_model", "vapo"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files with the longest tests come first: one that began last would leave the other workers
    idle.
    """
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    for item in items:
        name = item.path.stem.removeprefix("test_")
        for marker, files in (("runs", RUNS), ("arrays", ARRAYS)):
            if name in files:
                item.add_marker(marker)


def pytest_collection_finish():
    """What is imported by now is never garbage; of what tests make, a little more may wait."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


# What tests write need not outlive a power cut; a run syncs each of its files, which takes longer
# than to write them. Tests of writing look at the calls.
os.fsync = lambda file: None

cli.attach_console()  # as scripts do: capsys sees what a run reports
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def optimized():
    """Programs as a user's are compiled, where two of them must agree bit for bit."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of demo data, which tests only read."""
    folder = tmp_path_factory.mktemp("data")
    demo.write(folder, sizes={"sft_data.json": 72, "preference_data.json": 72, "prompts.json": 48})
    return str(folder)


@pytest.fixture
def config(data, tmp_path):
    """The settings of a short run on ``data``, of each stage."""
    return builders.tiny_run(data, tmp_path / "run")


# Runs draw no page at their end, which takes longer than the training of many a test.
draw_page = saving._draw_page
saving._draw_page = lambda run: None


@pytest.fixture
def pages(monkeypatch):
    """Runs draw their pages, for a test that looks at them."""
    monkeypatch.setattr(saving, "_draw_page", draw_page)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows (JSON lines), a text or bytes to a file of the working folder, and returns its
    name.
    """
    monkeypatch.chdir(tmp_path)

    def save(content, name="data.jsonl"):
        text = "\n".join(map(json.dumps, content)) if isinstance(content, list) else content
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return name

    return save
