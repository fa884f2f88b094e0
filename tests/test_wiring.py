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


def drawn_by(calls):
    """What each recorded call drew, as tuples that compare."""
    jax.effects_barrier()
    return [tuple(np.concatenate([value.ravel() for value in call]).tolist()) for call in calls]


def test_streams_are_apart():
    keys = {bits(stage.stream(0, name, part)) for name in ("sft", "ppo") for part in STREAMS}
    assert len(keys) == 2 * len(STREAMS)
    assert bits(stage.stream(1, "sft", "data")) not in keys


@pytest.mark.parametrize(
    ("run", "module"),
    [(training.sft.run, sft), (training.reward_model.run, reward_model), (training.dpo.run, dpo)],
    ids=["sft", "reward_model", "dpo"],
)
def test_a_supervised_run_draws_other_rows_and_another_key_at_each_step(run, module, config, tmp_path, monkeypatch):  # noqa: F811
    rows, keys = [], []
    recorder(monkeypatch, module, "update", lambda state, batch, key: [batch.tokens], rows)
    recorder(monkeypatch, module, "update", lambda state, batch, key: [jax.random.key_data(key)], keys)
    run(config)
    first = drawn_by(rows), drawn_by(keys)
    assert len(first[0]) >= 6
    assert len(set(first[0])) == len(first[0])
    assert len(set(first[1])) == len(first[1])
    rows.clear(), keys.clear()
    run(dataclasses.replace(config, output_dir=str(tmp_path / "again")))
    assert (drawn_by(rows), drawn_by(keys)) == first


@pytest.mark.parametrize("reward", ["count:e", "host"])
def test_an_rl_run_draws_other_prompts_and_keys_at_each_iteration(reward, config, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "reward.py").write_text("def host(prompts, responses):\n    return [len(text) for text in responses]\n")
    entry = f"{tmp_path / 'reward.py'}:host" if reward == "host" else reward
    settings = RLStage(num_iterations=3, batch_size=16, max_new_tokens=4, validation_interval=3, validation_prompts=4)
    config = dataclasses.replace(config, reward=(entry,), rl=settings)
    sampled, learnt = [], []
    recorder(
        monkeypatch,
        sampling,
        "generate",
        lambda model, params, tokens, mask, key: [tokens, jax.random.key_data(key)],
        sampled,
    )
    recorder(monkeypatch, vpg, "update", lambda state, rollout, key: [jax.random.key_data(key)], learnt)
    training.rl.run(config, vpg)
    jax.effects_barrier()
    steps = [call for call in sampled if call[0].shape[0] == 16]
    validations = [call for call in sampled if call[0].shape[0] != 16]
    prompts = [np.sort(call[0], axis=0).tobytes() for call in steps]
    assert len(steps) == len(learnt) == 3
    assert len(set(prompts)) == 3
    keys = [tuple(call[1].tolist()) for call in steps] + [tuple(call[0].tolist()) for call in learnt]
    assert len(set(keys)) == 6
    # Validations always sample with the same key, so that they can be compared; nothing else uses it.
    assert len({tuple(call[1].tolist()) for call in validations}) == 1
    assert tuple(validations[0][1].tolist()) not in keys
    first = drawn_by(sampled), drawn_by(learnt)
    sampled.clear(), learnt.clear()
    training.rl.run(dataclasses.replace(config, output_dir=str(tmp_path / "again")), vpg)
    assert (drawn_by(sampled), drawn_by(learnt)) == first


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
