"""An algorithm from outside the package trains, resumes and reports as the built-in ones do."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from builders import ROOT, goes_on_alike, metric_rows, slow, soak

from rlhf_jax import ppo, training
from rlhf_jax.config import PPOStage
from rlhf_jax.report import page


def module(name, source):
    """A module that no package holds."""
    made = types.ModuleType(name)
    sys.modules[name] = made
    exec(compile(source, f"{name}.py", "exec"), made.__dict__)
    return made


def gspo():
    """The example of docs/your-algorithm.md."""
    source = (ROOT / "docs" / "programs" / "gspo.py").read_text("utf-8")
    assert len(source.splitlines()) <= 40
    return module("gspo", source)


def copy_of_ppo():
    """PPO's own source under another name: an actor-critic."""
    return module("my_actor_critic", Path(ppo.__file__).read_text("utf-8"))


@pytest.mark.parametrize("make", [soak(copy_of_ppo), slow(gspo)], ids=["ppo", "gspo"])
def test_it_trains_resumes_and_reports(make, config, tmp_path, monkeypatch):
    algorithm = make()
    settings = replace(config.rl, num_iterations=4, kl_target=None)
    config = replace(config, rl=settings, ppo=PPOStage())
    algorithm_config = algorithm.Config(num_minibatches=2, num_epochs=2, shuffle_blocks=4)

    def run(config):
        return training.rl.run(config, algorithm, algorithm_config)

    straight = run(config)
    rows = metric_rows(straight.folder)
    assert max(row.get("grad_norm", 0.0) for row in rows) > 0
    goes_on_alike(run, config, straight)
    monkeypatch.undo()
    page.write([straight.folder], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "policy/clip_fraction" in text
    assert (
        json.loads((straight.folder / "manifest.json").read_text("utf-8"))["stage"]
        == algorithm.__name__
    )


@pytest.mark.slow
def test_no_default_of_another_algorithm_leaks_in(config):
    """GSPO says that it wants no KL penalty in the reward: a run that sets none has none."""
    settings = replace(config.rl, num_iterations=1, kl_target=None, kl_coef=None)
    folder = training.rl.run(replace(config, rl=settings, ppo=PPOStage()), gspo()).folder
    last = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert "kl/coef" not in last
    assert jax.tree.leaves(last)
