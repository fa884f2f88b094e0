"""The loops of experiments/: short, made of the science alone, and exact after a stop."""

import ast
import dataclasses
import importlib
import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import ROOT, save_base
from numpy.testing import assert_array_equal

from rlhf_jax import models, ppo, sharding, training
from rlhf_jax.config import RLStage, RunConfig, Text
from rlhf_jax.data import demo
from rlhf_jax.training.common import layout, opening
from rlhf_jax.training.rl.schedule import Schedule

LOOPS = ("ppo_loop", "grpo_loop", "reward_model_loop", "dpo_loop")
APPLICATION = ("cli", "config", "data", "runs", "graders", "generation", "training", "report")
PROMPTS = [{"prompt": f"what is {i}?", "answer": str(i)} for i in range(6)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model, a reward model, prompts and pairs."""
    path = tmp_path_factory.mktemp("loops")
    demo.write(path / "data", seed=0)
    save_base(path / "model", path / "data")
    model, params = models.load(path / "model")
    scored = models.add_head(jax.random.key(1), params, "score")
    shutil.copytree(path / "model", path / "reward")
    (path / "reward" / "model.safetensors").unlink()
    models.save(path / "reward", model, scored)
    (path / "prompts.json").write_text(json.dumps(PROMPTS))
    return path


def settings_of(name, path, out):
    """The loop's module and small settings: four steps, a checkpoint after two."""
    loop = importlib.import_module(name)
    sizes = {"steps": 4, "save_every": 2, "out": out, "model": str(path / "model")}
    if name == "ppo_loop":
        sizes |= {"reward_model": str(path / "reward"), "batch_size": 4, "max_new_tokens": 4}
    if name == "grpo_loop":
        sizes |= {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4, "lora_rank": 2}
    if name in ("ppo_loop", "grpo_loop"):
        return loop, loop.Settings(prompts=path / "prompts.json", **sizes)
    pairs = path / "data" / "preference_data.json"
    return loop, loop.Settings(pairs=pairs, batch_size=4, held_out=8, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_goes_on_from_its_checkpoint_with_the_same_bits(name, folders, tmp_path, capsys):
    loop, settings = settings_of(name, folders, tmp_path)
    straight = jax.device_get(loop.main(settings))
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["1/4", "2/4", "3/4", "4/4"]
    last = next(path for path in tmp_path.rglob("4") if path.is_dir())
    shutil.rmtree(last)  # as if it had been stopped behind step 2
    again = jax.device_get(loop.main(settings))
    assert capsys.readouterr().out.splitlines() == said[2:]
    jax.tree.map(assert_array_equal, again, straight)
    if name == "ppo_loop":  # begins at its reference and leaves it
        kl = re.findall(r"kl (-?[0-9.]+)", "\n".join(said))
        assert abs(float(kl[0])) == 0
        assert len(set(kl)) > 1


@pytest.fixture(scope="module")
def low(folders, tmp_path_factory):
    """The same folders with models in bfloat16."""
    path = tmp_path_factory.mktemp("low")
    shutil.copytree(folders, path, dirs_exist_ok=True)
    for name in ("model", "reward"):
        model, params = models.load(path / name, jnp.bfloat16)
        models.save(path / name, model, params)
        _, params = models.load(path / name)
        assert params["wte"]["embedding"].dtype == jnp.bfloat16
    return path


class Begun(Exception):
    """Holds the parameters with which a loop begins."""


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_begins_with_float32_master_weights(name, low, tmp_path, monkeypatch):
    loop, settings = settings_of(name, low, tmp_path)

    def create(params, optimizer):
        raise Begun(params)

    monkeypatch.setattr(loop.TrainState, "create", create)
    with pytest.raises(Begun) as begun:
        loop.main(settings)
    (params,) = begun.value.args
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_loop", "reward_model_loop", "dpo_loop"])
def test_a_loop_moves_the_weights_of_a_bfloat16_folder(name, low, tmp_path):
    """At a rate of 1e-6, which bfloat16 would round away."""
    loop, settings = settings_of(name, low, tmp_path)
    ends = [
        jax.device_get(
            loop.main(replace(settings, steps=2, learning_rate=rate, out=tmp_path / out))
        )
        for rate, out in ((1e-6, "moved"), (0.0, "still"))
    ]
    moved, still = (jax.tree.leaves(end.params) for end in ends)
    assert {leaf.dtype for leaf in moved} == {np.dtype("float32")}
    changed = [np.mean(a != b) for a, b in zip(moved, still, strict=True) if a.ndim > 1]
    assert np.median(changed) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_learns_the_same_whatever_pads(name, folders, tmp_path, capsys):
    """The tokenizer's pad may be its EOS, or it has none."""
    loop, settings = settings_of(name, folders, tmp_path / "own")
    settings = replace(settings, steps=2)
    own = jax.device_get(loop.main(settings))
    said = capsys.readouterr().out
    file = folders / "model" / "tokenizer_config.json"
    written = json.loads(file.read_text())
    without = {key: value for key, value in written.items() if key != "pad_token"}
    for number, changed in enumerate((without, without | {"pad_token": written["eos_token"]})):
        shutil.copytree(folders / "model", tmp_path / str(number))
        (tmp_path / str(number) / file.name).write_text(json.dumps(changed))
        others = replace(settings, model=str(tmp_path / str(number)), out=tmp_path / f"out{number}")
        jax.tree.map(assert_array_equal, jax.device_get(loop.main(others)), own)
        assert capsys.readouterr().out == said


@pytest.mark.slow
def test_ppo_in_one_file_is_the_command(folders, tmp_path, monkeypatch):
    """Given the same rows and keys, the two loops sample the same tokens and come to the same bits,
    although they compile other programs.
    """
    loop, settings = settings_of("ppo_loop", folders, tmp_path / "loop")
    settings = dataclasses.replace(settings, steps=2)
    keys = jax.random.split(jax.random.key(settings.seed), 4)
    init, order, rollout, update = keys
    streams = {"rollout": rollout, "update": update, "init": init, "data": order, "eval": order}
    add_head = models.add_head
    monkeypatch.setattr(models, "add_head", lambda key, *given: add_head(init, *given))
    monkeypatch.setattr(opening, "stream_key", lambda seed, name, stream: streams[stream])

    def rows(schedule, step):
        key = jax.random.fold_in(order, step)
        return np.asarray(jax.random.choice(key, len(PROMPTS), (1, settings.batch_size)))

    monkeypatch.setattr(Schedule, "rows", rows)
    monkeypatch.setattr(layout, "mesh_of", lambda sizes: sharding.make_mesh(1))
    updates = settings.steps * settings.num_epochs * settings.num_minibatches
    schedule = optax.linear_schedule(settings.learning_rate, 0.0, updates)
    config = RunConfig(
        output_dir=str(tmp_path / "command"),
        model=settings.model,
        reward=(settings.reward_model,),
        data=(str(settings.prompts),),
        text=Text(template="{prompt}", bucket_multiple=1),
        rl=RLStage(
            num_iterations=settings.steps,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            kl_coef=settings.kl_coef,
            validation_fraction=0.0,
        ),
    )
    rollouts = []
    states = []

    def on_step(step, state, row, batch):
        rollouts.append(jax.device_get(batch))
        states.append(jax.device_get(state.train))

    training.rl.run(
        config,
        ppo,
        ppo.Config(num_epochs=settings.num_epochs, num_minibatches=settings.num_minibatches),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5)),
        on_step=on_step,
    )
    collect = loop.rollout.collect
    collected = []

    def collecting(*inputs, **how):
        batch = collect(*inputs, **how)
        jax.debug.callback(lambda tokens: collected.append(np.asarray(tokens)), batch.tokens)
        return batch

    monkeypatch.setattr(loop.rollout, "collect", collecting)
    state = jax.device_get(loop.main(settings))
    jax.effects_barrier()
    assert len(collected) == len(rollouts) == settings.steps
    for tokens, batch in zip(collected, rollouts, strict=True):
        assert_array_equal(tokens, batch.tokens)
    jax.tree.map(assert_array_equal, state, states[-1])
    kernels = [state.params["h_0"]["attn"]["c_attn"]["kernel"] for state in states]
    assert not np.array_equal(kernels[0], kernels[-1])


@pytest.mark.slow
def test_a_trained_reward_model_is_a_folder_that_scores(folders, tmp_path):
    loop, settings = settings_of("reward_model_loop", folders, tmp_path)
    state = loop.main(settings)
    model, params = models.load(tmp_path / "model")
    tokens = jnp.arange(8).reshape(2, 4)
    mask = jnp.ones_like(tokens)
    scores = models.score_fn(model)(params, tokens, mask, None)
    expected = models.score_fn(model)(state.params, tokens, mask, None)
    assert abs(scores - expected).max() < 1e-5


def test_the_reward_of_grpo_pays_for_the_answer_alone():
    loop = importlib.import_module("grpo_loop")
    row = {"prompt": "what is 3 + 4?", "answer": 7}
    assert [loop.reward(text, row) for text in (" 7\n", "3 + 4", "77", "")] == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_short_and_needs_nothing_of_the_application(name):
    source = (ROOT / "experiments" / f"{name}.py").read_text("utf-8")
    assert len(source.splitlines()) <= 150
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("rlhf_jax"):
            assert node.module == "rlhf_jax"
            assert not {alias.name for alias in node.names} & set(APPLICATION)
