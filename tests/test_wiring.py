"""What a run draws: rows, keys, batches. Each step draws others than the one before, a second run draws the same, and
no two random streams share a key."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_training import config, data  # noqa: F401 (fixtures)

from rlhf_jax import models, sampling, training, vpg
from rlhf_jax.algorithms import dpo, reward_model, sft
from rlhf_jax.config import Network, RLStage, RunConfig, Tokenizer
from rlhf_jax.training import stage

pytestmark = pytest.mark.usefixtures("no_pages")

STREAMS = ("init", "data", "rollout", "update", "eval")


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def recorder(monkeypatch, module, name, record, calls):
    """Records each call of ``module.name`` that runs or is run by jit, by a callback."""
    original = getattr(module, name)

    def recording(*args, **kwargs):
        jax.debug.callback(lambda *values: calls.append([np.asarray(value) for value in values]), *record(*args))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, recording)


def test_streams_are_apart():
    keys = {bits(stage.stream(0, name, part)) for name in ("sft", "ppo") for part in STREAMS}
    assert len(keys) == 2 * len(STREAMS)
    assert bits(stage.stream(1, "sft", "data")) not in keys


@pytest.mark.parametrize(
    ("run", "module"),
    [
        pytest.param(training.sft.run, sft, id="sft"),
        pytest.param(training.reward_model.run, reward_model, id="reward_model", marks=pytest.mark.slow),
        pytest.param(training.dpo.run, dpo, id="dpo", marks=pytest.mark.slow),
    ],
)
def test_a_supervised_run_draws_other_rows_and_another_key_at_each_step(run, module, config, tmp_path, monkeypatch):  # noqa: F811
    drawn = []
    recorder(monkeypatch, module, "update", lambda state, batch, key: [batch.tokens, jax.random.key_data(key)], drawn)

    def rows_and_keys(name):
        drawn.clear()
        run(dataclasses.replace(config, output_dir=str(tmp_path / name)))
        jax.effects_barrier()
        return [(tokens.tobytes(), key.tobytes()) for tokens, key in drawn]

    first = rows_and_keys("first")
    assert len(first) >= 6
    assert all(len(set(column)) == len(first) for column in zip(*first, strict=True))
    assert rows_and_keys("again") == first


def test_an_rl_run_draws_other_prompts_and_keys_at_each_iteration(config, tmp_path, monkeypatch):  # noqa: F811
    settings = RLStage(num_iterations=3, batch_size=16, max_new_tokens=4, validation_interval=3, validation_prompts=4)
    config = dataclasses.replace(config, rl=settings)
    sampled, learnt = [], []
    prompts_and_key = lambda model, params, tokens, mask, key: [tokens, jax.random.key_data(key)]  # noqa: E731
    recorder(monkeypatch, sampling, "generate", prompts_and_key, sampled)
    recorder(monkeypatch, vpg, "update", lambda state, rollout, key: [jax.random.key_data(key)], learnt)

    def draws(name):
        sampled.clear(), learnt.clear()
        training.rl.run(dataclasses.replace(config, output_dir=str(tmp_path / name)), vpg)
        jax.effects_barrier()
        samples = [(tokens.tobytes(), np.sort(tokens, axis=0).tobytes(), key.tobytes()) for tokens, key in sampled]
        return samples, [len(tokens) for tokens, _ in sampled], [key.tobytes() for (key,) in learnt]

    samples, sizes, update_keys = first = draws("first")
    steps = [sample for sample, size in zip(samples, sizes, strict=True) if size == 16]
    assert len(steps) == len(update_keys) == len({prompts for _, prompts, _ in steps}) == 3
    keys = {key for *_, key in steps} | set(update_keys)
    assert len(keys) == 6
    # Validations always sample with the same key, so that they can be compared; nothing else uses it.
    (validation_key,) = {sample[-1] for sample, size in zip(samples, sizes, strict=True) if size != 16}
    assert validation_key not in keys
    assert draws("again") == first


def test_a_python_reward_gets_the_columns_of_its_row(tmp_path):
    """The answer that a row's reward is given is that of its prompt, whatever other rows are absent."""
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": f"say {c}", "letter": c} for c in "abcdefgh"]))
    (tmp_path / "reward.py").write_text(
        "def same(prompts, responses, letter):\n"
        "    assert [p[-1] for p in prompts] == letter, (prompts, letter)\n"
        "    return [None if c == 'a' else float(ord(c)) for c in letter]\n"
    )
    run = training.rl.run(
        RunConfig(
            data=(str(tmp_path / "prompts.json"),),
            output_dir=str(tmp_path / "run"),
            network=Network(hidden_size=8, num_layers=1, num_heads=1, max_length=16),
            tokenizer=Tokenizer(kind="characters"),
            reward=(f"{tmp_path / 'reward.py'}:same",),
            rl=RLStage(num_iterations=2, batch_size=8, max_new_tokens=2, kl_coef=0.0, validation_prompts=3),
        ),
        vpg,
    )
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text("utf-8").splitlines()]
    assert all(row["score"] == ord(row["prompt"][-1]) for row in samples)
    assert models.load(run.model_folder)
