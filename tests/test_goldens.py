"""What no refactoring may change: one update of every algorithm, a short run of every stage, and
every config's values.

    python tests/test_goldens.py            # writes tests/goldens/ anew, after a change of numbers
                                            # that is meant
    python tests/test_goldens.py digests    # adds the digests of this kind of machine

A golden that changes by accident is a bug; one that changes on purpose is rewritten in the commit
that says why.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401, as a script: the jobs in experiments/ are modules
import jax
import numpy as np
import pytest
import yaml
from builders import json_lines, slow
from cases import CASES, KEY
from digests import GOLDENS, REWRITE, check_digest
from jax.tree_util import keystr, tree_leaves_with_path
from numpy.testing import assert_allclose
from sentiment import SentimentConfig
from shakespeare import ShakespeareConfig

import rlhf_jax
from rlhf_jax import training
from rlhf_jax.cli.quickstart import QuickstartConfig
from rlhf_jax.config import RunConfig, to_yaml
from rlhf_jax.config import parse as parse_flags
from rlhf_jax.data import demo
from rlhf_jax.runs import devices
from rlhf_jax.training.common.layout import layout_of
from rlhf_jax.training.rl import method
from rlhf_jax.training.supervised.run import check_sizes

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@functools.cache
def parse(file, *arguments):
    """The config of a YAML file in configs/ and of command-line flags."""
    kinds = {
        "quickstart": QuickstartConfig,
        "shakespeare": ShakespeareConfig,
        "sentiment": SentimentConfig,
    }
    return parse_flags(
        kinds.get(file.stem, RunConfig), ["--config", str(file), *map(str, arguments)]
    )


def summary(leaf):
    """The sum, the sum of squares and the first three values of an array."""
    flat = np.asarray(leaf, np.float64).ravel()
    return [flat.sum(), (flat**2).sum(), *flat[:3]]


def golden(name, actual):
    """The golden of this name, one JSON value on a line; where goldens are rewritten, ``actual`` is
    written first.
    """
    path = GOLDENS / f"{name}.json"
    if REWRITE:
        path.parent.mkdir(exist_ok=True)
        if isinstance(actual, dict):
            lines = [
                f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
                for key, value in actual.items()
            ]
            text = "{\n" + ",\n".join(lines) + "\n}\n"
        else:
            text = (
                "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in actual) + "\n]\n"
            )
        path.write_text(text, "utf-8")
    return json.loads(path.read_text("utf-8"))


def assert_same_numbers(actual, expected, rtol, atol, where=""):
    assert actual.keys() == expected.keys(), where
    for key, value in expected.items():
        assert_allclose(actual[key], value, rtol=rtol, atol=atol, err_msg=f"{key} {where}")


ALGORITHMS = ["sft", "reward_model", "dpo", "vpg", "ppo", "rloo", "grpo"]


@pytest.mark.parametrize(
    "name",
    ["sft", slow("reward_model"), "dpo", slow("vpg"), "ppo", slow("rloo"), slow("grpo")],
)
def test_one_update(name):
    case = CASES[name]
    batch = jax.jit(case.batch)() if name == "dpo" else case.batch()  # one program for its many
    state, metrics = jax.jit(case.steps)(case.start, batch, KEY)
    params = {
        f"params{keystr(path)}": summary(leaf) for path, leaf in tree_leaves_with_path(state.params)
    }
    actual = {
        "step": int(state.step),
        **{key: float(value) for key, value in metrics.items()},
        **params,
    }
    assert_same_numbers(actual, golden(f"update_{name}", actual), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    demo.write(folder, sizes={"sft_data.json": 72, "preference_data.json": 72, "prompts.json": 48})
    return folder


def tiny_flags(stage):
    """configs/tiny.yaml with fewer steps, a reward that a random model earns, and an eps that tames
    rounding.
    """
    section = stage if stage in ("sft", "reward_model", "dpo") else "rl"
    small = (
        "--network.hidden-size 16 --network.num-layers 1 --network.max-length 128 "
        "--tokenizer.vocab-size 300 "
    )
    small += (
        f"--text.bucket-multiple 128 --{section}.optimizer.eps 1e-3 "
        f"--{section}.optimizer.learning-rate 1e-2 "
    )
    if section != "rl":
        return (small + f"--{section}.batch-size 16 --{section}.validation-fraction 0.2").split()
    small += (
        "--reward count:e diversity:1*2 --rl.num-iterations 3 --rl.batch-size 16 "
        "--rl.max-new-tokens 8 "
    )
    small += "--rl.validation-interval 2 --rl.validation-prompts 4 "
    special = {
        "vpg": "--rl.missing-eos-penalty 0.5",
        "ppo": "--ppo.shuffle-blocks 4 --ppo.num-microbatches 2 --rl.kl-target 0.01",
        "rloo": "--rloo.shuffle-blocks 4",
        "grpo": "--rl.reference-refresh 2",
    }
    return (small + special[stage]).split()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ALGORITHMS)
def test_a_run_of_every_stage(stage, data, tmp_path):
    config = parse(
        CONFIGS / "tiny.yaml", "--data", data, "--output-dir", tmp_path / "run", *tiny_flags(stage)
    )
    if stage in ("sft", "reward_model", "dpo"):
        folder = getattr(training, stage).run(config).folder
    else:
        folder = training.rl.run(config, getattr(rlhf_jax, stage)).folder
    metrics = json_lines(folder / "metrics.jsonl")
    expected = golden(f"run_{stage}", metrics)
    assert len(metrics) == len(expected)
    for actual, row in zip(metrics, expected, strict=True):
        if (
            stage == "dpo" and row["step"] <= 1
        ):  # the policy is the reference still: the sign of a margin is rounding
            row |= {name: actual[name] for name in row if name.endswith("/accuracy")}
        assert_same_numbers(actual, row, rtol=2e-4, atol=2e-5, where=f"at step {row['step']}")
    if stage == "ppo":
        texts = [
            [row["step"], row["prompt"], row["response"]]
            for row in json_lines(folder / "samples.jsonl")
        ]
        assert texts == golden("samples_ppo", texts)
    if stage == "sft":
        asked = [(row["step"], len(row)) for row in json_lines(folder / "samples.jsonl")]
        assert asked == [(step, 4) for step in (0, 4) for _ in range(14)]  # all that are held out
    layout = f"{jax.device_count()} devices"
    threads = devices.num_threads()
    if threads != jax.device_count():  # more cores than devices: other sums
        layout += f", {threads} threads"
    check_digest(stage, folder / "model" / "model.safetensors", layout)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config(file):
    actual = {}
    for name, value in yaml.safe_load(to_yaml(parse(file))).items():  # as in config.yaml of a run
        actual |= (
            {f"{name}.{key}": x for key, x in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    expected = golden(f"config_{file.stem}", actual)
    assert {key: actual.get(key, "missing") for key in expected} == expected
    assert actual.keys() == expected.keys()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_fits(file):
    config = parse(file)
    layout = layout_of(config)
    check_sizes(training.sft.TASK, config.sft, config.text, layout)
    check_sizes(training.reward_model.TASK, config.reward_model, config.text, layout)
    grouped = ("rloo", "grpo")
    for name in grouped if config.rl.dynamic_sampling else ("vpg", "ppo", *grouped):
        method.check_settings(name, config.rl, getattr(config, name), layout)


if __name__ == "__main__":
    # In pytest, so that devices and compilation are those of the tests (conftest.py).
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", __file__]
    what = "REWRITE_GOLDENS"
    if sys.argv[1:] == ["digests"]:
        what = "ADD_DIGESTS"
        blocks = Path(__file__).with_name("test_blocks.py")
        command += [blocks, "-k", "a_run_of_every_stage or any_number_of_devices"]
    sys.exit(subprocess.run(command, env={**os.environ, what: "1"}, check=False).returncode)
