"""An algorithm from outside the package trains, resumes and reports as the built-in ones do."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import pytest
from builders import ROOT, goes_on_alike, letters_run, metric_rows, slow, soak, with_rl
from pages import blocks

from rlhf_jax import config as config_package
from rlhf_jax import grpo, ppo, rloo, training
from rlhf_jax.config import Network, PPOStage, RunConfig
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


class Table(nn.Module):
    """The network that the page calls ``module``."""

    @nn.compact
    def __call__(self, tokens, attention_mask):
        return nn.Dense(512)(nn.Embed(512, 8)(tokens))


RUNS = [text for _, text, _ in blocks(ROOT / "docs" / "your-algorithm.md") if "rl.run(" in text]


@pytest.mark.slow
@pytest.mark.parametrize("text", RUNS, ids=["module", "optimizer", "policy", "callback"])
def test_the_runs_of_the_page_run(text, tmp_path, monkeypatch):
    """With the settings of a short run in place of the command line's."""
    settings = with_rl(letters_run(tmp_path), num_iterations=2, kl_coef=None)
    of_two = grpo.Config(group_size=2)
    settings = replace(settings, grpo=of_two, rloo=rloo.Config(group_size=2))
    if "from_functions" in text:
        settings = replace(settings, network=Network())
    monkeypatch.setattr(config_package, "parse", lambda *_, **__: settings)
    monkeypatch.setitem(sys.modules, "gspo", gspo())
    names = {"training": training, "grpo": grpo, "module": Table(), "RunConfig": RunConfig}
    exec(text, names | {"parse": config_package.parse, "__name__": "page"})
    ends_early = "on_step" in text  # the scores are above its limit
    assert metric_rows(tmp_path / "first")[-1]["step"] == (1 if ends_early else 2)


@pytest.mark.slow
def test_no_default_of_another_algorithm_leaks_in(config):
    """GSPO says that it wants no KL penalty in the reward: a run that sets none has none."""
    settings = replace(config.rl, num_iterations=1, kl_target=None, kl_coef=None)
    folder = training.rl.run(replace(config, rl=settings, ppo=PPOStage()), gspo()).folder
    last = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert "kl/coef" not in last
    assert jax.tree.leaves(last)
