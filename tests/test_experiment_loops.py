"""The loops of experiments/: short, made of the science alone, and exact after a stop."""

import ast
import importlib
import json
import re
import shutil

import jax
import pytest
from builders import ROOT, save_base
from numpy.testing import assert_array_equal

from rlhf_jax import models
from rlhf_jax.data import demo

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


@pytest.mark.slow
def test_a_trained_reward_model_is_a_folder_that_scores(folders, tmp_path):
    loop, settings = settings_of("reward_model_loop", folders, tmp_path)
    state = loop.main(settings)
    model, params = models.load(tmp_path / "model")
    tokens = jax.numpy.arange(8).reshape(2, 4)
    mask = jax.numpy.ones_like(tokens)
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
