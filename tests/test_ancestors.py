"""One test for each row of the tables in docs/coming_from.md: what the four ancestors do, done here.

A row names its test, and a row without a test, or a test without a row, fails every test here. A test runs the public
function or command once, on something tiny, and asserts what would be different without the feature; what takes a real
run, a real text or torch is proved by the longer tests that the same row names.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers as hf_tokenizers
import yaml
from tabular import (
    bandit_params,
    bandit_policy_fn,
    bandit_rollout,
    comparisons,
    policy_fn,
    policy_params,
    rollout,
    score_fn,
)
from test_notebooks import code_cells, text_file
from test_trackers import stand_in

from rlhf_jax import cli, models, ops, ppo, reward_model, rewards, sft, sharding, vpg
from rlhf_jax import generator as inference
from rlhf_jax import metrics as evaluation
from rlhf_jax.config import Compute, LoRA, Optimizer, RLStage, RunConfig, Safety, SFTStage, parse, to_yaml
from rlhf_jax.data import batches, check, demo, encoding, labels, readers, shakespeare, tokenizers
from rlhf_jax.errors import AlertStop, TrainingFault, UserError
from rlhf_jax.evaluation import data as evaluation_rows
from rlhf_jax.report import figures, records, run_figures
from rlhf_jax.report import page as report
from rlhf_jax.rewards import filter
from rlhf_jax.runs import alerts, devices, trackers
from rlhf_jax.runs.folder import open_run
from rlhf_jax.training import adapters, bench, checks, patience, phases, reward_functions, setup
from rlhf_jax.training import safety as guards
from rlhf_jax.training.shakespeare import ShakespeareConfig
from rlhf_jax.types import Comparisons, Demonstrations, Rollout, TrainState

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coming_from.md"
HERE = re.compile(r"`(test_\w+)`")
ELSEWHERE = re.compile(r"`(test_\w+)::(test_\w+)`")
KEY = jax.random.key(0)
TOKENIZER = tokenizers.characters("abcdefghij ")
CALL = jax.jit(lambda fn, *arguments: fn(*arguments))


def table_rows():
    """The rows of the page's feature tables: those whose last cell names a test of this file."""
    lines = PAGE.read_text("utf-8").splitlines()
    return [line for line in lines if line.startswith("|") and HERE.search(line.rstrip("| ").rpartition("|")[2])]


def functions_in(path):
    return {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.fixture(scope="module", autouse=True)
def _rows_are_tests():
    named = [HERE.search(row.rstrip("| ").rpartition("|")[2])[1] for row in table_rows()]
    assert sorted(named) == sorted(name for name in functions_in(Path(__file__)) if name.startswith("test_"))
    for file, name in ELSEWHERE.findall(PAGE.read_text("utf-8")):
        assert name in functions_in(ROOT / "tests" / f"{file}.py"), f"{PAGE.name}: {file}::{name} does not exist"
    readme = (ROOT / "README.md").read_text("utf-8")
    assert set(HERE.findall(readme)) == set(named), "README's feature table names other tests than docs/coming_from.md"


def script(name):
    """A script of experiments/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name, *argv):
    """Its main, with these flags, in this process; returns what it printed."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [f"experiments/{name}.py", *map(str, argv)])
        patch.setattr("rlhf_jax.report.page.write", lambda runs, path: None)  # one test draws the page
        script(name).main()
    return said.getvalue()


SETTINGS = {
    "config": ROOT / "configs" / "tiny.yaml",
    "seed": 5,
    "checkpoint-interval": 2,
    "network": {"hidden-size": 16, "num-layers": 1, "max-length": 128},
    "tokenizer.vocab-size": 300,
    "text.bucket-multiple": 128,
    "sft.batch-size": 16,
    "reward-model": {"batch-size": 16, "normalize-samples": 0},
    "rl": {"num-iterations": 3, "batch-size": 16, "max-new-tokens": 4, "kl-coef": 0.25, "kl-target": 0.01}
    | {"validation-interval": 3, "validation-prompts": 4, "show-examples": 2},
    "ppo.num-epochs": 1,
}
TINY = [
    word
    for key, value in SETTINGS.items()
    for name, setting in (value.items() if isinstance(value, dict) else [("", value)])
    for word in (f"--{key}.{name}".rstrip("."), setting)
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of experiments/pipeline.py's run on a tiny corpus, made once for all workers; stdout.txt in it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "ancestors"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "stdout.txt").exists():
            demo.write(folder / "data", num_demonstrations=72, num_pairs=72, num_prompts=48)
            said = run_script("pipeline", *TINY, "--data", folder / "data", "--output-dir", folder / "run")
            (folder / "stdout.txt").write_text(said, "utf-8")
    return folder


@pytest.fixture(scope="module")
def page(pipeline):
    """The report of the PPO run, drawn after the fact as ``rlhf-jax report`` does."""
    path = pipeline / "page.html"
    with filelock.FileLock(f"{pipeline}.lock"):
        if not path.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                cli.run(["report", str(pipeline / "run" / "ppo"), "--output", str(path)])
    return path.read_text("utf-8")


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Two reward models' folders with TOKENIZER, and the function that scores with one."""
    folder = tmp_path_factory.mktemp("judges")
    model = models.build(
        models.GPT2Config(vocab_size=TOKENIZER.vocab_size, max_length=8, hidden_size=8, num_layers=1, num_heads=1)
    )
    for i, name in enumerate(("one", "two")):
        params = models.add_head(jax.random.key(i), model.init(jax.random.key(i)), "score")
        models.save(folder / name, model, params)
        TOKENIZER.save(folder / name)
    return folder, jax.jit(models.score_fn(model))


def answers(*pairs):
    """A rollout of prompts and responses as TOKENIZER's characters, the prompts left-padded."""
    width, length = (max(len(pair[i]) for pair in pairs) for i in (0, 1))
    tokens = np.full((len(pairs), width + length), TOKENIZER.pad_id, np.int32)
    mask, response = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.int32)
    for row, (prompt, answer) in enumerate(pairs):
        tokens[row, width - len(prompt) : width + len(answer)] = TOKENIZER.encode(prompt + answer)
        mask[row, width - len(prompt) : width + len(answer)] = 1
        response[row, width : width + len(answer)] = 1
    return Rollout(tokens, mask, response, np.zeros(tokens.shape, np.float32))


def scored(*specs, said=(("ab", "ea"), ("a", "eeh"))):
    """The scores that --reward SPECS gives."""
    built = reward_functions.build(specs, TOKENIZER, Compute(), ())
    scores = built.host(answers(*said), {}) if built.fn is None else CALL(built.fn, answers(*said))
    return np.asarray(scores[0] if isinstance(scores, tuple) else scores).tolist()


# jRLHF


def test_token_count_reward():
    both = answers(("hah", "hhb"), ("a", "h" * 120))
    h = TOKENIZER.encode("h")[0]
    assert rewards.token_count(h)(both).tolist() == [4, 100]
    assert rewards.token_count(h, cap=1000, include_prompt=False)(both).tolist() == [2, 120]
    assert scored("count:e") == [1, 2]


def test_reward_model_is_saved_and_loaded(judges):
    folder, score = judges
    text = answers(("ab", "cab"))
    model, params = models.load(folder / "one")
    numbers = [
        float(score(p, text.tokens, text.attention_mask, None)[0]) for p in (params, models.load(folder / "two")[1])
    ]
    assert numbers[0] == pytest.approx(scored(str(folder / "one"), said=[("ab", "cab")])[0], abs=1e-6)
    assert abs(numbers[0] - numbers[1]) > 1e-3
    with pytest.raises(ValueError, match="no score head"):
        models.score_fn(model)({k: v for k, v in params.items() if k != "score"}, text.tokens, text.attention_mask)


def test_chunks_overlap():
    assert shakespeare.chunks("abcdefghij", 4, 2) == ["abcd", "cdef", "efgh", "ghij"]
    assert shakespeare.chunks("abcdefghij", 4) == ["abcd", "efgh", "ghij"]


def test_prompts_are_padded_on_the_left():
    encoded = encoding.encode_prompts([readers.Prompt("a", "1"), readers.Prompt("abc", "2")], TOKENIZER)
    a, b, c = TOKENIZER.encode("abc")
    assert encoded.tokens.tolist() == [[0, 0, a], [a, b, c]]
    assert encoded.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_regression_with_adamw():
    """The loss is the mean squared error; decay d moves a weight w by -rate * d * w more."""

    def linear(params, tokens, attention_mask, key):
        return params["body"]["kernel"][0] * attention_mask.sum(axis=1)

    batch = Comparisons(
        tokens=jnp.zeros((2, 1, 3), jnp.int32),
        attention_mask=jnp.array([[[1, 1, 1]], [[1, 0, 0]]]),
        response_mask=jnp.ones((2, 1, 3), jnp.int32),
        targets=jnp.array([[3.0], [0.0]]),
    )
    ends = {}
    for decay in (0.0, 0.5):
        optimizer = setup.make_optimizer(Optimizer(learning_rate=0.1, weight_decay=decay), 1)
        state = TrainState.create({"body": {"kernel": jnp.array([2.0])}}, optimizer)
        update = partial(reward_model.update, score_fn=linear, optimizer=optimizer, config=reward_model.Config())
        state, metrics = jax.jit(update)(state, batch, KEY)
        assert float(metrics["reward_model/loss"]) == ((6 - 3) ** 2 + (2 - 0) ** 2) / 2
        ends[decay] = float(state.params["body"]["kernel"][0])
    assert ends[0.0] - ends[0.5] == pytest.approx(0.1 * 0.5 * 2.0, rel=1e-4)
    assert ends[0.0] < 2.0


def test_policy_gradient_with_a_moving_baseline():
    optimizer = optax.sgd(0.1)
    sampled, found = bandit_rollout(bandit_params(), KEY, 16), {}
    for baseline in ("ema", "none"):
        learn = partial(
            phases.learn,
            algorithm=vpg,
            algorithm_config=vpg.Config(baseline=baseline),
            policy_fn=bandit_policy_fn,
            optimizer=optimizer,
            config=RLStage(),
        )
        loop = phases.LoopState.create(TrainState.create(bandit_params(), optimizer), 0.0)
        found[baseline], _ = jax.jit(learn)(loop, sampled, KEY)
    mean = float(sampled.scores.mean())
    assert float(found["ema"].baseline) == pytest.approx(0.1 * mean)
    assert float(found["none"].baseline) == 0.0
    logits = [np.asarray(loop.train.params["logits"]) for loop in found.values()]
    assert np.abs(logits[0] - logits[1]).max() > 1e-4


def test_response_length_and_temperature(pipeline):
    samples = rows_of(pipeline / "run" / "ppo", "samples.jsonl")
    assert max(row["length"] for row in samples) == 4
    logits = jnp.array([[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]])
    cold, warm = (float(ops.entropy(logits, temperature)[0, 1]) for temperature in (0.5, 2.0))
    assert cold < 0.6 < 1.0 < warm


def test_schedules():
    """The learning rate before steps 1, 6 and 11 of 10; plateau lowers it after validations that bring nothing."""
    found = {}
    for name, more in {"constant": {}, "linear": {}, "cosine": {}, "step": {"decay_every": 5}}.items():
        optimizer = setup.make_optimizer(Optimizer(learning_rate=0.5, schedule=name, **more), 10)
        params = {"w": jnp.zeros(())}
        state, rates = optimizer.init(params), []
        for _ in range(11):
            _, state = optimizer.update(params, state, params)
            rates.append(round(float(state.hyperparams["learning_rate"]), 6))
        found[name] = rates[0], rates[5], rates[10]
    assert found["constant"] == (0.5, 0.5, 0.5)
    assert found["linear"] == found["cosine"] == (0.5, 0.25, 0.0)
    assert found["step"] == (0.5, 0.05, 0.005)
    settings = Optimizer(schedule="plateau", decay_patience=2, decay_factor=0.1)
    judge = patience.Judge.of(RunConfig(sft=SFTStage(optimizer=settings)), "sft", validated=True)
    state = TrainState.create({"w": jnp.zeros(())}, setup.make_optimizer(settings, 10))
    rows = [{"validation/loss": loss} for loss in (3.0, 2.0, 2.0, 2.5)]
    scales = [judge.metrics(judge.lowered(state, rows[:n]))["plateau_scale"] for n in (2, 4)]
    assert scales == pytest.approx([1.0, 0.1])


def test_early_stopping():
    rows = [{"validation/loss": loss} for loss in (3.0, 2.0, 2.5, 2.0)]
    ends = {}
    for wait in (2, 3, None):
        judge = patience.Judge.of(RunConfig(early_stopping_patience=wait), "sft", validated=True)
        ends[wait] = judge.stops(rows)
    assert ends == {2: True, 3: False, None: False}


def test_checkpoints_at_an_interval(pipeline):
    saved = sorted(
        int(path.name) for path in (pipeline / "run" / "ppo" / "checkpoints").iterdir() if path.name.isdigit()
    )
    assert saved == [2, 3]  # every second one and the last


def test_samples_at_validations(pipeline):
    assert (pipeline / "stdout.txt").read_text("utf-8").count("Generated: ") == 4  # two at each of two validations
    samples = rows_of(pipeline / "run" / "ppo", "samples.jsonl")
    assert {row["step"] for row in samples} == {0, 3}
    assert set(samples[0]) == {"step", "prompt", "response", "score", "length"}


def test_reward_curves(page):
    assert "objective/score" in page
    assert "validation/score" in page


def test_character_tokenizer(tmp_path):
    tokenizer = tokenizers.characters("To be,\n")
    assert tokenizer.vocab_size == 7 + 2
    assert [len(tokenizer.encode(text)) for text in ("be To", "\n")] == [5, 1]
    tokenizer.save(tmp_path)
    assert tokenizers.load_tokenizer(tmp_path).decode(tokenizer.encode("be,\nTo")) == "be,\nTo"


def test_shakespeare_script(tmp_path, monkeypatch):
    """Up to its first stage: the text is read, cut and checked, all by the script's own settings."""

    class Started(Exception):
        pass

    def start(config):
        raise Started(config)

    monkeypatch.setattr("rlhf_jax.training.sft.run", start)
    text = text_file(tmp_path / "text.txt", 600)
    with pytest.raises(Started) as started:
        run_script("shakespeare", "--data", text, "--output-dir", tmp_path / "run")
    config = started.value.args[0]
    assert config.shakespeare.chunk_sizes == (8, 16, 32, 64, 256)
    pretrain = rows_of(tmp_path / "run" / "data", "pretrain.jsonl")
    assert {len(row["prompt"] + row["response"]) for row in pretrain} == {config.network.max_length}


def test_shakespeare_notebooks(tmp_path):
    """Their data cells as they are; tests/test_notebooks.py runs all of them."""
    counts = []
    for overlap in (0, 2):
        _, settings, data, *_ = code_cells("shakespeare_reward_model")
        names = {"Path": Path}
        exec(settings, names)
        names |= {"DATA": text_file(tmp_path / "text.txt", 300), "FOLDER": str(tmp_path)}
        names |= {"CHUNK_SIZES": (4,), "OVERLAPS": (overlap,)}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(data, names)
        counts.append(len(names["pieces"]))
    assert counts == [75, 149]
    assert "rl.run(config, vpg)" in code_cells("shakespeare_vpg")[3]


def test_wandb(tmp_path, monkeypatch):
    recorded = stand_in(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_PROJECT", "rlhf-experiments")
    with open_run(tmp_path / "run") as run:
        services = trackers.start(run, parse(RunConfig, ["--track", "wandb"]).track, {})
        services.log(1, {"objective/score": 2.0})
        services.close()
    assert recorded.of("init")[0][0]["project"] == "rlhf-experiments"
    assert recorded.of("log") == [({"objective/score": 2.0}, 1)]
    with open_run(tmp_path / "other") as run:
        trackers.start(run, RunConfig().track, {}).log(1, {"objective/score": 2.0})
    assert len(recorded.of("log")) == 1


# LM Human Preferences


def write_rows(path, rows):
    path.write_text(json.dumps(rows), "utf-8")
    return str(path)


def test_four_way_labels(tmp_path):
    row = {"query": [50259, 2, 3], **{f"sample{i}": [4 + i, 50259] for i in range(4)}, "best": 2}
    texts = {"query": "ab", **{f"sample{i}": "cdef"[i] for i in range(4)}, "best": 2}
    read = readers.read_comparisons(write_rows(tmp_path / "labels.json", [row, texts])).rows
    encoded = encoding.encode_comparisons(read, TOKENIZER)
    batch = batches.comparison_batch(encoded, np.array([0]), bucket_multiple=1)
    assert batch.tokens[0].tolist() == [[2, 3, 4 + i] for i in range(4)]
    assert encoded.best.tolist() == [2, 2]


def test_published_labels_are_verified(tmp_path, monkeypatch):
    """What lies in its place is read to its end, whether it was fetched now or before."""
    file = tmp_path / "sentiment_offline_5k.json"
    rows = [{"query": [2], **{f"sample{i}": [3 + i, 50259] for i in range(4)}, "best": 1}] * 3
    write_rows(file, rows)
    with pytest.raises(UserError, match="holds 3 rows, and at least 4992 are expected"):
        cli.run(["data", "download", "sentiment", str(tmp_path)])
    monkeypatch.setitem(labels.LABEL_SETS, "sentiment", labels.LabelSet("sentiment/offline_5k.json", 3))
    assert labels.download("sentiment", tmp_path).num_rows == 3
    write_rows(file, [*rows[:2], {**rows[2], "best": 4}])
    with pytest.raises(UserError, match=r"line 1.*best"):
        labels.download("sentiment", tmp_path)


def test_published_labels_are_decoded(tmp_path):
    file = write_rows(
        tmp_path / "raw.json", [{"query": [50259, 3], **{f"sample{i}": [4 + i] for i in range(4)}, "best": 1}]
    )
    TOKENIZER.save(tmp_path / "tokenizer")
    with contextlib.redirect_stdout(io.StringIO()):
        cli.run(["data", "decode", file, "--tokenizer", str(tmp_path / "tokenizer")])
    [row] = rows_of(tmp_path, "raw.decoded.jsonl")
    assert row == {"query": "a", "sample0": "b", "sample1": "c", "sample2": "d", "sample3": "e", "best": 1}


def test_ppo():
    optimizer = optax.adam(0.1)
    state = TrainState.create(bandit_params(), optimizer)
    update = partial(ppo.update, policy_fn=bandit_policy_fn, optimizer=optimizer, config=ppo.Config(num_epochs=2))
    state, metrics = jax.jit(update)(state, bandit_rollout(state.params, KEY, 64), KEY)
    before, after = (np.asarray(jax.nn.softmax(params["logits"])) for params in (bandit_params(), state.params))
    assert after[2] > before[2] + 0.01  # the arm that pays most
    assert float(metrics["policy/ratio_max"]) > 1


def test_one_command_for_all_stages(pipeline):
    manifests = {
        name: json.loads((pipeline / "run" / name / "manifest.json").read_text("utf-8"))["data"]
        for name in ("sft", "reward_model", "ppo")
    }
    assert "model" not in manifests["sft"]
    assert "model" in manifests["reward_model"]
    assert f"reward {pipeline / 'run' / 'reward_model' / 'model'}" in manifests["ppo"]


def test_seed(pipeline):
    config = parse(RunConfig, ["--seed", "5"])
    splits = [batches.split(20, 0.2, setup.stream(seed, "sft", "data"))[1].tolist() for seed in (5, 6, config.seed)]
    assert splits[0] == splits[2] != splits[1]
    keys = [jax.random.key_data(setup.stream(seed, "ppo", "rollout")).tolist() for seed in (5, 6)]
    assert keys[0] != keys[1]

    def drawn(seed, step):
        setup.seed_libraries(seed, step)
        return random.random(), np.random.random()  # noqa: NPY002 (what is seeded)

    assert drawn(5, 1) == drawn(5, 1)
    assert not set(drawn(5, 1)) & {*drawn(6, 1), *drawn(5, 2)}
    assert json.loads((pipeline / "run" / "sft" / "manifest.json").read_text("utf-8"))["seed"] == 5


def test_device(monkeypatch):
    monkeypatch.setattr(devices, "_all_devices", list)
    monkeypatch.setattr(devices, "nvidia_gpu", lambda: ("an A100", 580))
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    with pytest.raises(UserError, match=r"--device cuda: JAX finds no such device here.*an A100.*rlhf-jax\[cuda13\]"):
        devices.choose("cuda")
    with pytest.raises(UserError, match=r"--device mps: JAX has no maintained backend.*--device cpu"):
        devices.choose("mps")


def test_checkpoints_know_where_they_come_from(pipeline):
    folder = pipeline / "run" / "reward_model"
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["seed"] == 5
    assert manifest["devices"]["count"] == 4
    assert manifest["versions"]["jax"] == jax.__version__
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    assert (config["network"]["hidden_size"], config["rl"]["kl_target"]) == (16, 0.01)


def test_yaml_with_lists_of_files(tmp_path):
    files = [write_rows(tmp_path / f"{name}.json", [{"prompt": name, "response": name}]) for name in "ab"]
    (tmp_path / "run.yaml").write_text(f"sft:\n  data: {json.dumps(files)}\n  num_epochs: 7\n", "utf-8")
    config = parse(RunConfig, ["--config", str(tmp_path / "run.yaml")])
    assert [row.prompt for row in readers.read_demonstrations(config.sft.data).rows] == ["a", "b"]
    assert config.sft.num_epochs == 7
    (tmp_path / "run.yaml").write_text("sft:\n  epochs: 7\n", "utf-8")
    with pytest.raises(UserError, match=r"run\.yaml, line 2.*epochs"):
        parse(RunConfig, ["--config", str(tmp_path / "run.yaml")])


def test_run_length_in_episodes_or_updates():
    lengths = [
        parse(RunConfig, ["--rl.batch-size", "64", *given]).rl.length
        for given in (["--rl.num-episodes", "1000"], ["--rl.num-iterations", "7"])
    ]
    assert lengths == [16, 7]


def test_log(pipeline):
    rows = rows_of(pipeline / "run" / "ppo")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"objective/score", "objective/kl", "policy/loss", "value/loss"} <= rows[-1].keys()
    assert (pipeline / "stdout.txt").read_text("utf-8").startswith("cpu: 4 x cpu, float32\n")


def test_out_of_memory():
    state = TrainState.create({"w": jnp.zeros((512, 512))}, optax.adam(1e-3))
    with pytest.raises(TrainingFault) as said, checks.explains_memory(RunConfig(), "ppo", state):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    for part in (
        "1.0 MiB of trained",
        "2.0 MiB of opt",
        "--ppo.num-microbatches",
        "--rl.batch-size",
        "--compute.remat",
    ):
        assert part in str(said.value)


def test_supervised_fine_tuning(pipeline):
    rows = rows_of(pipeline / "run" / "sft")
    losses = [row["validation/loss"] for row in rows if "validation/loss" in row]
    assert losses[-1] < losses[0] - 0.05


def test_inference(pipeline):
    """Texts in, texts out with log-probabilities and rewards."""
    run = pipeline / "run"
    prompts = ["Name a prime number.", "Is ice warm?"]
    generator = inference.Generator(run / "ppo" / "model", run / "reward_model" / "model", max_new_tokens=3)
    first, again, other = (generator(prompts, seed=seed) for seed in (0, 0, 1))
    assert first.texts == again.texts != other.texts
    assert first.rewards.shape == first.log_probs.shape == (2,)
    assert (first.log_probs < 0).all()


def test_more_metrics():
    """Of two pairs: the first right by 2, the second wrong by 1, and the longer answer is the chosen one of both."""
    found = evaluation.preference_report(np.array([3.0, 0.0]), np.array([1.0, 1.0]), np.array([[5, 2], [4, 3]]))
    assert found["accuracy"] == 0.5
    assert found["margin"] == 0.5
    assert found["loss"] == pytest.approx(np.log1p(np.exp([-2.0, 1.0])).mean())
    assert found["length_accuracy"] == 1.0
    assert 0 < found["ece"] < 1
    assert evaluation.brier(np.array([2.0, -1.0])) == pytest.approx(np.mean((1 - 1 / (1 + np.exp([-2.0, 1.0]))) ** 2))


def test_rows_are_spread_over_devices():
    """Four devices hold a quarter of the rows each, and an update on them is the update on one."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (8, 6)), jnp.int32)
    ones = jnp.ones_like(tokens)
    batch = Demonstrations(tokens, ones, ones)
    optimizer = optax.sgd(0.5)
    state = TrainState.create(policy_params(0), optimizer)
    update = jax.jit(partial(sft.update, policy_fn=policy_fn, optimizer=optimizer, config=sft.Config()))
    mesh = sharding.make_mesh(4)
    spread = sharding.shard_rows(mesh, batch)
    assert {shard.data.shape for shard in spread.tokens.addressable_shards} == {(2, 6)}
    ends = [
        update(s, b, KEY)[0].params["logits"] for s, b in ((state, batch), (sharding.replicate(mesh, state), spread))
    ]
    np.testing.assert_allclose(*map(np.asarray, ends), atol=1e-6)
    assert np.abs(np.asarray(ends[0]) - np.asarray(state.params["logits"])).max() > 1e-3


def test_llama(tmp_path):
    config = models.LlamaConfig(
        vocab_size=11, max_length=8, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=12
    )
    model = models.build(config)
    params = model.init(KEY)
    models.save(tmp_path, model, params)
    loaded, _ = models.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["architectures"] == ["LlamaForCausalLM"]
    assert loaded.config == config
    assert params["h_0"]["attn"]["k_proj"]["kernel"].shape == (8, 4)  # one key head for two of queries


# RLHF pipeline


def test_the_three_files_as_they_are(tmp_path):
    files = {
        "sft_data.json": [{"prompt": "What is machine learning?", "response": "Machine learning is..."}],
        "preference_data.json": [{"prompt": "Explain", "chosen": "It leverages...", "rejected": "Magic..."}],
        "prompts.json": ["What is artificial intelligence?", "How can I learn a new language?"],
    }
    found = check.check([write_rows(tmp_path / name, rows) for name, rows in files.items()])
    assert [(file.kind, file.kept) for file in found.files] == [
        ("demonstrations", 1),
        ("comparisons", 1),
        ("prompts", 2),
    ]
    assert found.num_problems == 0


def test_each_stage_takes_the_folder_before(pipeline):
    """The third stage by its own script, from the folders of the two before, is the pipeline's third stage."""
    run = pipeline / "run"
    given = ("--data", pipeline / "data", "--model", run / "sft" / "model", "--tokenizer.vocab-size", 512)
    stage = (*TINY, *given, "--output-dir", run / "ppo", "--resume", "--reward")
    assert "finished already" in run_script("ppo", *stage, run / "reward_model" / "model")
    with pytest.raises(UserError, match="reward"):
        run_script("ppo", *stage, "count:e")


def test_flags_are_mapped():
    """Every flag of ours on the page exists, and every flag of the pipeline's scripts is on the page."""
    page = PAGE.read_text("utf-8")
    section = page.partition("## RLHF pipeline")[2].partition("\n## ")[0]
    theirs = "model_name data_path output_dir num_epochs batch_size base_model sft_model_path reward_model_path"
    for flag in f"{theirs} prompts_path num_episodes config use_wandb".split():
        assert f"`--{flag}`" in section, flag
    known = re.findall(r"--([\w.-]+)", yaml_flags())
    for flag in re.findall(r"--([a-z][a-z0-9-]*(?:\.[a-z0-9-]+)+)", page):
        assert flag in known, f"{PAGE.name}: no flag --{flag}"


def yaml_flags():
    def walk(section, prefix):
        for name, value in section.items():
            key = f"{prefix}{name.replace('_', '-')}"
            yield from walk(value, f"{key}.") if isinstance(value, dict) else [f"--{key}"]

    return " ".join(walk(yaml.safe_load(to_yaml(ShakespeareConfig())), ""))


def said(prompts, texts, scores=None):
    """One response to each prompt, as an evaluation has them."""
    lengths = np.array([[len(text.split())] for text in texts])
    given = None if scores is None else np.array(scores)[:, None]
    return evaluation_rows.Responses(prompts, [[text] for text in texts], lengths, lengths > 0, given)


def values(rows):
    return {row.metric: row.value for row in rows}


REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Boil the water for nine minutes."


def test_helpfulness():
    rows = evaluation_rows.helpfulness(said(["Pasta?", "Rice?"], [ANSWER, ""], [2.0, 1.0]), KEY)
    found = values(rows)
    assert found["quality"] == 1.5
    assert found["empty"] == 0.5
    assert found["new_content_words"] > 0
    assert values(evaluation_rows.helpfulness(said(["Pasta?"], [""]), KEY))["new_content_words"] == 0


def test_harmlessness():
    answers = said(["a", "b", "c", "d"], [REFUSAL, ANSWER, REFUSAL, ANSWER])
    found = values(evaluation_rows.harmlessness(answers, ["unsafe", "unsafe", "safe", "safe"], KEY))
    assert found == {"refusal_of_unsafe": 0.5, "over_refusal_of_safe": 0.5}
    swapped = values(evaluation_rows.harmlessness(answers, ["unsafe", "safe", "unsafe", "safe"], KEY))
    assert swapped == {"refusal_of_unsafe": 1.0, "over_refusal_of_safe": 0.0}


def test_honesty_uncertainty():
    texts = ["I don't know who will win.", "Paris."]
    found = values(evaluation_rows.uncertainty(said(["who?", "where?"], texts), [False, True], KEY))
    assert found == {"uncertainty": 0.5, "uncertainty_answerable": 0.0, "uncertainty_unanswerable": 1.0}


MARGINS = {"reward_model": np.array([2.0, 1.0, -1.0]), "log_prob": np.array([-2.0, 1.0, -1.0])}


def test_preference_accuracy():
    found = values(evaluation_rows.preferences(MARGINS, np.ones(3), ["1", "2", "3"], KEY))
    assert found["accuracy_reward_model"] == pytest.approx(2 / 3)
    assert found["accuracy_log_prob"] == pytest.approx(1 / 3)


def test_honesty_calibration():
    """Claims of sigmoid(2), sigmoid(1) and sigmoid(-1) for the chosen answer."""
    rows = evaluation_rows.preferences(MARGINS, np.ones(3), ["1", "2", "3"], KEY)
    claimed = 1 / (1 + np.exp(-MARGINS["reward_model"]))
    found = values(rows)
    assert found["brier_reward_model"] == pytest.approx(np.mean((1 - claimed) ** 2))
    pair = claimed[1] * 2 / 2  # two of confidence sigmoid(1), one of them right
    assert found["ece_reward_model"] == pytest.approx((1 - claimed[0] + 2 * (pair - 0.5)) / 3)
    assert found["brier_log_prob"] > found["brier_reward_model"]


def test_agreement_with_annotators():
    votes = [(1, 1, 1), (2, 2, 1), (0, 0, 0), (1, 2, 2)]
    annotated = [bench.Annotated(readers.Pair("q", "a", "b", str(i)), row) for i, row in enumerate(votes)]
    found = values(evaluation_rows.agreement({"judge": np.array([1.0, -1.0, 0.0, 1.0])}, annotated, KEY))
    assert found["agreement_judge"] == 0.75
    assert found["kappa_judge"] == pytest.approx((0.75 - 5 / 16) / (1 - 5 / 16))
    assert found["agreement_of_annotators"] == pytest.approx((1 + 1 / 3 + 1 + 1 / 3) / 4)


def test_diversity_metrics():
    alike, different = (
        values(evaluation_rows.diversity(said(["p", "q"], texts), KEY))
        for texts in (["one two three four", "one two three four"], ["one two three four", "five six seven eight"])
    )
    assert (alike["distinct_2"], different["distinct_2"]) == (0.5, 1.0)
    assert alike["self_bleu"] == pytest.approx(1.0)
    assert different["self_bleu"] < 0.5
    assert values(evaluation_rows.diversity(said(["p"], ["a b c a b c"]), KEY))["repetition"] > 0


def test_win_rate_with_intervals():
    ours, theirs = np.array([[2.0], [2.0], [1.0], [3.0]]), np.array([[1.0], [2.0], [2.0], [1.0]])
    won, difference = evaluation_rows.win_rate(ours, theirs, KEY, "runs/other")
    assert won.value == 0.625  # two wins, a tie, a loss
    assert difference.value == 0.5
    assert won.low < won.value < won.high
    assert evaluation_rows.win_rate(theirs, ours, KEY, "runs/other")[0].value == 0.375


def test_categories_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("polite:\n  keywords: [please]\nbrief:\n  score: mine.py:score\n", "utf-8")
    categories = bench.read_categories(str(tmp_path / "mine.yaml"))
    answers = said(["p", "q"], ["Please wait.", "Wait."], [1.0, 0.0])
    assert evaluation_rows.custom("polite", categories["polite"], answers._replace(scores=None), KEY).value == 0.5
    assert categories["brief"].score == "mine.py:score"
    assert evaluation_rows.custom("brief", categories["brief"], answers, KEY).value == 0.5


def evaluate(pipeline, output, *more):
    """The command's file of figures, and what it printed."""
    prompts = write_rows(output.parent / "prompts.json", ["Name a prime number.", "Is ice warm?"])
    argv = ["evaluate", str(pipeline / "run" / "ppo"), "--prompts", prompts, "--output", str(output), *more]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert not cli.run(argv)
    return json.loads((output / "evaluation.json").read_text("utf-8"))["rows"], printed.getvalue()


def test_evaluation_is_a_command(pipeline, tmp_path):
    judge = str(pipeline / "run" / "reward_model")
    rows, printed = evaluate(pipeline, tmp_path / "one", "--reward-model", judge)
    found = {(row["category"], row["metric"]): row for row in rows}
    assert found["helpfulness", "quality"]["n"] == 2
    assert found["harmlessness", "all"]["note"] == "not run: give --safety FILE"
    assert "helpfulness" in printed
    shutil.copytree(pipeline / "run" / "ppo", tmp_path / "ppo")
    shutil.copy(tmp_path / "one" / "evaluation.json", tmp_path / "ppo")
    report.write([tmp_path / "ppo"], tmp_path / "page.html")
    assert "new_content_words" in (tmp_path / "page.html").read_text("utf-8")


def test_evaluation_is_deterministic(pipeline, tmp_path):
    samples = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        evaluate(pipeline, tmp_path / name, "--seed", str(seed))
        samples[name] = rows_of(tmp_path / name, "evaluation_samples.jsonl")
    assert samples["one"] == samples["again"] != samples["other"]


def test_reward_hacking_is_detected():
    """Score and judge rise together; then the judge falls while the score goes on to rise."""
    rules = alerts.parse([])
    honest = [{"step": i, "validation/score": i / 10, "validation/judge": i / 10} for i in range(11)]
    hacked = [*honest[:6], *({**row, "validation/judge": 1 - row["validation/score"]} for row in honest[6:])]
    assert [alert.name for alert in alerts.check(rules, honest)] == []
    found = alerts.check(rules, hacked)
    assert found
    assert all(alert.name.startswith("reward hacking") and alert.step > 5 for alert in found)


def test_kl_hard_stop():
    rules = alerts.parse(parse(RunConfig, ["--alerts", "objective/kl > 50 for 2: stop"]).alerts)
    rows = [{"step": i, "objective/kl": kl, "response/length": 100.0} for i, kl in enumerate((60.0, 10.0, 60.0, 70.0))]
    watches, raised = alerts.replay(rules, rows)
    assert [(alert.step, alert.action) for alert in raised] == [(3, "stop")]
    assert any(watch.stops for watch in watches)
    assert not any(watch.stops for watch in alerts.replay(rules, rows[:3])[0])


def test_safety_filter_of_prompts(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("bad\n", "utf-8")
    rows = [readers.Prompt("a bad", "f, line 1"), readers.Prompt("a", "f, line 2")]
    kept = {}
    for action in ("drop", "replace", "count"):
        settings = Safety(words=(str(tmp_path / "words.txt"),), prompts=action, replacement="hi")
        kept[action] = [row.prompt for row in guards.Guard.of(settings).prompts(rows, TOKENIZER)]
    assert kept == {"drop": ["a"], "replace": ["hi", "a"], "count": ["a bad", "a"]}
    assert "safety: 1 of 2 prompts dropped: f, line 1" in capsys.readouterr().out


def test_safety_filter_of_responses():
    """By word list, pattern and threshold; penalised, replaced, masked or counted."""
    words = filter.Filter.create(["bad"], [r"b\d"])
    assert [bool(words.found(text)) for text in ("so BAD", "badge", "b2")] == [True, False, True]
    assert [bool(found) for found in filter.beyond([0.2, 0.8], below=0.5, above=None)] == [True, False]
    batch = dataclasses.replace(answers(("a", "bb"), ("a", "cc")), scores=np.array([1.0, 1.0], np.float32))
    unsafe = np.array([True, False])
    after = {
        action: filter.enforce(batch, unsafe, action, penalty=3.0, score=-9.0)
        for action in ("penalise", "replace", "mask", "count")
    }
    assert [after[action].scores[0] for action in after] == [-2.0, -9.0, 1.0, 1.0]
    assert [bool(after[action].response_mask[0].any()) for action in after] == [True, True, False, True]


def test_alert_rules_from_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text('alerts: ["loss > 5 for 2"]\n', "utf-8")
    rules = alerts.parse(parse(RunConfig, ["--config", str(tmp_path / "run.yaml")]).alerts)
    rows = [{"step": i, "loss": loss} for i, loss in enumerate((6.0, 1.0, 6.0, 7.0, 8.0))]
    assert [(alert.step, alert.rule) for alert in alerts.check(rules, rows)] == [(3, "loss > 5 for 2")]
    assert alerts.check(alerts.parse([]), rows) == []
    parts = [alerts.replay(rules, rows[:3])[0], rows[3:]]  # as a resumed run goes on
    raised = []
    for row in parts[1]:
        parts[0], found = alerts.observe(parts[0], row)
        raised += found
    assert [alert.step for alert in raised] == [3]


def test_default_alerts():
    """Each is raised by a history that fails in its way, and none of them with `none`."""
    fine = {"nonfinite": 0.0, "objective/kl": 5.0, "response/length": 10.0, "objective/entropy": 20.0}
    failing = {
        "non-finite update": {"nonfinite": 1.0},
        "KL explosion": {"objective/kl": 500.0},
        "entropy collapse": {"objective/entropy": 0.01},
    }
    for name, change in failing.items():
        rows = [{"step": i, **fine, **(change if i > 4 else {})} for i in range(15)]
        assert name in [alert.name for alert in alerts.check(alerts.parse([]), rows)]
        assert alerts.check(alerts.parse(["none"]), rows) == []
    assert alerts.check(alerts.parse([]), [{"step": i, **fine} for i in range(15)]) == []


def test_alert_stops_with_exit_code_3(capsys):
    def main():
        raise AlertStop("stopped by an alert after step 5 of 9")

    with pytest.raises(SystemExit) as ended:
        cli.run_script(main)
    assert ended.value.code == 3
    assert "stopped by an alert" in capsys.readouterr().err


def test_alerts_are_shown(pipeline, tmp_path, monkeypatch):
    """alerts.jsonl is what the report lists; the services of --track get them too."""
    shutil.copytree(pipeline / "run" / "ppo", tmp_path / "ppo")
    rules = alerts.parse(["none", "objective/kl > 50"])
    [alert] = alerts.check(rules, [{"step": 2, "objective/kl": 60.0}])
    (tmp_path / "ppo" / "alerts.jsonl").write_text(json.dumps(alert._asdict()) + "\n", "utf-8")
    [row] = run_figures.alerts(records.find([tmp_path / "ppo"]))
    assert row[1:] == [2, alert.name, "objective/kl > 50", "log", alert.message]
    assert run_figures.alerts(records.find([pipeline / "run" / "sft"])) == []
    recorded = stand_in(monkeypatch, "wandb")
    with open_run(tmp_path / "run") as run:
        services = trackers.start(run, ("wandb",), {})
        services.alert(alert.step, alert.message)
        services.close()
    assert "60" in recorded.of("alert")[0][1]


def test_live_metrics(pipeline):
    """A line for each step while the run goes on, as metrics.jsonl has it afterwards."""
    last = rows_of(pipeline / "run" / "ppo")[-1]
    said = (pipeline / "stdout.txt").read_text("utf-8")
    assert re.search(rf"ppo +3/3.*objective/score {last['objective/score']:.4g}", said)


def test_before_and_after(page):
    for part in ("Reward against KL", "Scores", "Response lengths", "Samples"):
        assert part in page
    assert page.count("<svg") >= 5
    assert "http://" not in page
    assert "<script" not in page


def test_curves_as_png():
    rising = figures.png(figures.Plot("Loss", "step", "nats", {"a": ([0, 1, 2], [3.0, 2.0, 1.0])}))
    assert rising.startswith(b"\x89PNG\r\n")
    assert figures.png(figures.Plot("Loss", "step", "nats", {"a": ([], [])})) == b""


def test_trackio_by_the_same_path(tmp_path, monkeypatch):
    recorded = stand_in(monkeypatch, "trackio")
    with open_run(tmp_path / "run") as run:
        services = trackers.start(run, ("trackio",), {})
        services.samples(0, [{"prompt": "a", "score": 1.0}])
        services.close()
    assert recorded.of("log") == [({"samples": ("table", ["prompt", "score"], [["a", 1.0]])}, 0)]


def test_tensorboard(monkeypatch):
    """Chosen by name; where its package is missing, the run says what to install before anything else."""
    names = parse(RunConfig, ["--track", "tensorboard"]).track
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf-jax\[tensorboard\]'"):
        trackers.check(names)
    trackers.check(RunConfig().track)


def test_service_that_fails_stops_nothing(tmp_path, monkeypatch, capsys):
    recorded = stand_in(monkeypatch, "wandb", broken=["log"])
    with open_run(tmp_path / "run") as run:
        services = trackers.start(run, ("wandb",), {})
        for step in (1, 2):
            services.log(step, {"loss": 1.0})
        services.close()
    assert len(recorded.of("log")) == 2
    assert capsys.readouterr().out.count("--track wandb: ConnectionError") == 1


def test_kl_penalty_fixed():
    batch = bandit_rollout({**bandit_params(), "logits": jnp.array([0.0, 0.0, 1.0])}, KEY, 64)
    free, penalised = (np.asarray(rewards.kl_shaped(batch, coef)).sum(axis=1) for coef in (0.0, 0.3))
    kl = np.asarray(batch.log_probs - batch.ref_log_probs)[:, 1]
    np.testing.assert_allclose(free - penalised, 0.3 * kl, atol=1e-6)
    assert np.abs(kl).max() > 0.1


def test_kl_penalty_adaptive(pipeline):
    kl_coef = [row["kl/coef"] for row in rows_of(pipeline / "run" / "ppo")[1:]]
    assert kl_coef[0] == 0.25
    assert kl_coef[-1] != 0.25
    up, down = (float(rewards.adaptive_kl(0.25, kl, target=6.0, horizon=100, n=10)) for kl in (12.0, 3.0))
    assert (up, down) == (pytest.approx(0.25 * 1.02), pytest.approx(0.25 * 0.98))


def test_gradient_checkpointing():
    programs = []
    for remat in (False, True):
        config = models.GPT2Config(vocab_size=9, max_length=8, hidden_size=8, num_layers=1, num_heads=1, remat=remat)
        model = models.build(config)
        loss = lambda params, model=model: model.apply(params, jnp.zeros((1, 4), jnp.int32)).sum()  # noqa: E731
        shapes = jax.eval_shape(model.init, KEY)
        programs.append(str(jax.make_jaxpr(jax.grad(loss))(shapes)))
    assert ["remat" in text or "checkpoint" in text for text in programs] == [False, True]
    assert parse(RunConfig, ["--compute.remat"]).compute.remat


def test_mixed_precision():
    dtypes = []
    for dtype in ("float32", "bfloat16"):
        config = models.GPT2Config(
            vocab_size=9, max_length=8, hidden_size=8, num_layers=1, num_heads=1, compute_dtype=dtype
        )
        model = models.build(config)
        params = jax.eval_shape(model.init, KEY)
        hidden = jax.eval_shape(model.hidden, params, jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32), None)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        dtypes.append(hidden.dtype)
    assert dtypes == [jnp.float32, jnp.bfloat16]


def test_lora():
    params = {
        "h_0": {"attn": {"c_attn": {"kernel": jnp.ones((8, 24)), "bias": jnp.zeros(24)}}},
        "ln_f": {"scale": jnp.ones(8)},
    }
    whole = adapters.choose(RunConfig(model="x"), params, KEY)
    chosen = adapters.choose(RunConfig(model="x", lora=LoRA(rank=2, alpha=4.0)), params, KEY)
    trained = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(chosen.params)]
    assert whole.base is None
    assert {"lora_a", "lora_b"} <= set(trained)
    assert "kernel" not in trained
    assert chosen.base is params or chosen.base["h_0"] is params["h_0"]


def test_reward_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [len(r) - 2.0 for r in responses]\n")
    assert scored(f"{tmp_path / 'mine.py'}:score") == [0.0, 1.0]


def test_ensembles_by_a_list_of_paths(judges):
    folder, _ = judges
    listed = f"{folder / 'one'},{folder / 'two'}"
    specs = [*listed.split(","), *(f"{how}:{listed}" for how in ("mean", "min", "uncertainty:0.5"))]
    with contextlib.redirect_stdout(io.StringIO()):
        fns = [reward_functions.build((spec,), TOKENIZER, Compute(), ()).fn for spec in specs]
    found = jax.jit(lambda fns, batch: [fn(batch) for fn in fns])(fns, answers(("ab", "ea"), ("a", "eeh")))
    one, two, mean, least, careful = (np.asarray(x[0] if isinstance(x, tuple) else x) for x in found)
    np.testing.assert_allclose(mean, (one + two) / 2, atol=1e-6)
    np.testing.assert_allclose(least, np.minimum(one, two), atol=1e-6)
    np.testing.assert_allclose(careful, mean - 0.5 * (one - two) ** 2 / 4, atol=1e-6)
    assert np.abs(one - two).max() > 1e-3


def test_entropy_coefficient():
    batch = rollout(0, [4, 2])
    losses = {}
    for coef in (0.0, 0.1):
        config = ppo.Config(entropy_coef=coef, aggregate="sum", whiten_advantages=False)
        value, metrics = jax.jit(
            lambda params, batch, config=config: ppo.loss(
                params, ppo.prepare(batch, config), KEY, policy_fn=policy_fn, config=config
            )
        )(policy_params(0), batch)
        losses[coef] = float(value)
    assert losses[0.0] - losses[0.1] == pytest.approx(0.1 * float(metrics["objective/entropy"]), rel=1e-4)


def test_length_penalty():
    assert scored("length:1*-0.5") == [-0.5, -1.0]
    assert scored("count:e", "length*-1") == [1 - 2, 2 - 3]


def test_diversity_reward():
    same, different = ([("a", "bcd"), ("a", last)] for last in ("bcd", "efg"))
    assert scored("diversity", said=same) == [0, 0]
    assert scored("diversity", said=different) == [1, 1]


def test_reward_scaling():
    assert scored("count:e*0.5") == [0.5, 1.0]
    batch = rollout(0, [4, 4, 2])
    plain, whitened = (np.asarray(ppo.prepare(batch, ppo.Config(whiten_rewards=on)).returns) for on in (False, True))
    assert np.abs(plain - whitened).max() > 1e-3


def test_troubleshooting_page():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    parts = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert [part.partition("\n")[0] for part in parts] == [
        *("Out of memory", "Reward hacking", "Mode collapse", "Poor results", "Anything else"),
    ]
    known = yaml_flags()
    for part in parts[:4]:
        assert "| look at |" in part
        assert "| turn | what it does | what it costs |" in part
        turned = re.findall(r"^\| `--([\w.-]+)", part, re.MULTILINE)
        assert len(turned) >= 3
        assert all(f"--{key} " in f"{known} --reward " for key in turned), turned


def test_deployment(pipeline):
    """Policy and tokenizer lie in the one folder; transformers itself reads it in the longer test."""
    folder = pipeline / "run" / "ppo" / "model"
    theirs = hf_tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode("Name a prime.").ids == tokenizers.load_tokenizer(folder).encode("Name a prime.")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["vocab_size"] == theirs.get_vocab_size()
    assert {"model.safetensors", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}


# Reward-model notebook


def test_preferences_are_loaded_and_preprocessed(pipeline, capsys):
    file = pipeline / "data" / "preference_data.json"
    assert not cli.run(["data", "check", str(file)])
    said = capsys.readouterr().out
    assert "72" in said
    assert "comparisons" in said
    rows = readers.read_comparisons(str(file)).rows
    tokenizer = tokenizers.load_tokenizer(pipeline / "run" / "sft" / "model")
    framed, bare = (
        encoding.encode_comparisons(rows, tokenizer, template=template) for template in ("Q: {prompt} A: ", "{prompt}")
    )
    assert (framed.lengths > bare.lengths).all()


def test_reward_model_on_llama_with_lora():
    model = models.build(
        models.LlamaConfig(
            vocab_size=5, max_length=8, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=8
        )
    )
    base = model.init(KEY)
    head = models.add_head(KEY, base, "score")["score"]
    start = {**models.lora.init(KEY, base, 2, match="attn|mlp"), "score": head}
    optimizer = optax.adam(0.03)
    update = jax.jit(
        partial(reward_model.update, optimizer=optimizer, config=reward_model.Config()),
    )
    state = TrainState.create(start, optimizer)
    batch = comparisons(0, 8, 2)
    bound = models.lora.bind(models.score_fn(model), base)
    found = []
    for _ in range(12):
        state, metrics = update(state, batch, KEY, score_fn=bound)
        found.append(float(metrics["reward_model/loss"]))
    assert found[-1] < found[0] - 0.1
    assert sum(x.size for x in jax.tree.leaves(state.params)) < sum(x.size for x in jax.tree.leaves(base))


def test_one_scalar_for_each_response(judges):
    folder, score = judges
    _, params = models.load(folder / "one")
    batch = answers(("ab", "cd"), ("ab", "ce"), ("b", "cd"))
    numbers = np.asarray(score(params, batch.tokens, batch.attention_mask, None))
    assert numbers.shape == (3,)
    assert len(set(numbers.tolist())) == 3


def test_good_is_told_from_bad():
    """Twelve updates of a table on pairs whose better answer holds more of token 3."""
    batch = comparisons(1, 32, 2)
    threes = ((batch.tokens == 3) & (batch.attention_mask != 0)).sum(axis=2)
    batch = dataclasses.replace(batch, best=jnp.argmax(threes, axis=1))
    optimizer = optax.adam(0.3)
    update = jax.jit(partial(reward_model.update, score_fn=score_fn, optimizer=optimizer, config=reward_model.Config()))
    state, accuracy = TrainState.create({"scores": jnp.zeros(5)}, optimizer), []
    for _ in range(12):
        state, metrics = update(state, batch, KEY)
        accuracy.append(float(metrics["reward_model/accuracy"]))
    assert accuracy[0] == 0.5
    assert accuracy[-1] > 0.8
    assert int(jnp.argmax(state.params["scores"])) == 3


def test_a_notebook_of_it(tmp_path):
    """Its settings and its data cell as they are; tests/test_notebooks.py runs it in a kernel."""
    _, settings, data, *others = code_cells("reward_model_lora")
    names = {}
    exec(settings, names)
    names |= {"FOLDER": str(tmp_path), "NUM_PAIRS": 12}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(data, names)
    assert len(names["pairs"]) == 12
    assert "12 comparisons; the first one: Pair(" in said.getvalue()
    assert "LoRA(rank=RANK, alpha=ALPHA, match=MATCH)" in "".join(others)
