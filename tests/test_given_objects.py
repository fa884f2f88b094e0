"""What Python gives to a run is in its record, and another thing is another run."""

import dataclasses
import functools
import json
import re
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from rlhf_jax import ppo, training, vpg
from rlhf_jax.algorithms import policy
from rlhf_jax.config import PPOStage, RunConfig, parse
from rlhf_jax.errors import UserError
from rlhf_jax.graders import spec
from rlhf_jax.runs.manifest import dotted
from rlhf_jax.runs.objects import MOST_PARTS, UNKNOWN, describe
from rlhf_jax.training.common import initial

SIGN = 1.0


def signed(prompts, responses, sign=1.0):
    return [sign * len(response) for response in responses]


def reads_a_constant(prompts, responses):
    return [inner() for _ in responses]


def inner():
    return SIGN


def times(factor):
    return lambda prompts, responses: [factor for _ in responses]


@dataclasses.dataclass
class Letters:
    letter: str = "e"

    def __call__(self, prompts, responses):
        return [response.count(self.letter) for response in responses]


class Plain:
    def __init__(self, weight):
        self.weight = weight

    def score(self, prompts, responses):
        return [self.weight for _ in responses]


def compiled(source):
    """A function whose source is in no file."""
    module = types.ModuleType("compiled")
    exec(source, vars(module))
    return module.score


def differences(first, second):
    before = dotted(describe(first))
    after = dotted(describe(second))
    return [key for key in before | after if before.get(key) != after.get(key)]


PAIRS = [
    (signed, signed, []),
    (functools.partial(signed, sign=1.0), signed, []),
    (functools.partial(signed, sign=-1.0), signed, ["sign"]),
    (functools.partial(signed, [1]), functools.partial(signed, [2]), ["0"]),
    (times(1.0), times(1.0), []),
    (times(1.0), times(2.0), ["factor"]),
    (times(np.float32([1, 2])), times(np.float32([1, 2])), []),
    (times(np.float32([1, 2])), times(np.float32([1, 3])), ["factor"]),
    (times(np.float32([1, 2])), times(np.float32([[1, 2]])), ["factor"]),
    (times({"a": {"b": 1}}), times({"a": {"b": 2}}), ["factor.a.b"]),
    (times({3, "x"}), times({3, "y"}), ["factor"]),
    (times(b"a"), times(b"b"), ["factor"]),
    (times(re.compile("a")), times(re.compile("b")), ["factor"]),
    (times(jax.random.key(0)), times(jax.random.key(1)), ["factor"]),
    (times((signed, 1)), times((signed, 2)), ["factor.1"]),
    (Letters(), Letters("f"), ["letter"]),
    (Plain(1).score, Plain(2).score, ["self.weight"]),
    (jax.jit(times(1.0)), jax.jit(times(2.0)), ["factor"]),
    (
        jax.tree_util.Partial(times, jnp.ones(3)),
        jax.tree_util.Partial(times, jnp.zeros(3)),
        ["0"],
    ),
    (compiled("score = lambda: 1"), compiled("score = lambda: 2"), ["source sha256"]),
    (spec.Reward(host=times(1)), spec.Reward(host=times(2)), ["host.factor"]),
    (optax.adam(1e-3), optax.adam(2e-3), ["update.update_fns.1.tx.update.step_size"]),
    (optax.sgd(optax.cosine_decay_schedule(1.0, 10)), optax.sgd(1.0), None),
    (ppo, vpg, ["import"]),
]


@pytest.mark.parametrize(("first", "second", "keys"), PAIRS)
def test_values_that_differ_are_told_apart_by_name(first, second, keys):
    found = differences(first, second)
    assert found if keys is None else found == keys
    json.dumps(describe(first))


def test_other_code_of_the_function_or_of_what_it_reads_is_another_thing(monkeypatch, tmp_path):
    assert differences(signed, inner)[:2] == ["def", "source sha256"]
    assert set(describe(signed)) == {"def", "source sha256", "sign"}
    before = describe(reads_a_constant)
    monkeypatch.setattr(sys.modules[__name__], "SIGN", -1.0)
    after = describe(reads_a_constant)
    assert (before["inner"]["SIGN"], after["inner"]["SIGN"]) == (1.0, -1.0)
    # A module that has no file is the functions in it.
    module = types.ModuleType("own")
    exec("def update(): return 1", vars(module))
    first = describe(module)
    exec("def update(): return 2", vars(module))
    assert first["update"]["source sha256"] != describe(module)["update"]["source sha256"]
    # Versions of packages are recorded elsewhere.
    assert "source sha256" not in describe(ppo) | describe(optax.adam) | describe(len)


def test_what_cannot_be_compared_is_named():
    assert describe(threading.Lock()).startswith(f"{UNKNOWN}: _thread.")
    assert describe(threading.Event()) == f"{UNKNOWN}: threading.Event"
    description = describe(times({"lock": threading.Lock(), "x": 1}))
    assert description["factor"]["x"] == 1
    assert description["factor"]["lock"].startswith(UNKNOWN)
    many = dotted(describe(times([(i,) for i in range(MOST_PARTS)])))
    assert any(str(value).startswith(f"{UNKNOWN}: it has more than") for value in many.values())
    around = {}
    around["self"] = around
    assert describe(around) == {"self": "itself"}


def test_a_variable_without_a_value_is_left_out():
    def score():
        return later()

    description = describe(score)
    later = len
    assert set(description) == {"def", "source sha256"}
    assert describe(score)["later"] == describe(later)


@dataclasses.dataclass(frozen=True)
class OwnConfig(policy.Config):
    alpha: float = 0.5
    rule: object = inner
    group_size: int = 1


def outside(name="vapo", config=OwnConfig):
    """An algorithm from outside the package."""
    module = types.ModuleType(name)
    module.Config = config
    names = ("State", "needs_values", "kl_coef", "prepare", "loss", "update")
    vars(module).update({name: vars(vpg)[name] for name in names})
    return module


class Begun(Exception):
    pass


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Starts RL up to the point where the run folder is described."""
    (tmp_path / "prompts.json").write_text('["a", "b"]')
    monkeypatch.chdir(tmp_path)

    def model(*args, **options):
        raise Begun

    monkeypatch.setattr(initial, "language_model", model)

    def start(*args, config=RunConfig(), resume=False, **options):  # noqa: B008
        config = replace(
            config, data=("prompts.json",), output_dir="run", resume=resume, overwrite=not resume
        )
        with pytest.raises(Begun):
            training.rl.run(config, *args, **options)
        Path("run/checkpoints/0").mkdir(parents=True, exist_ok=True)
        recorded = yaml.safe_load(Path("run/config.yaml").read_text())
        return recorded, json.loads(Path("run/manifest.json").read_text())

    return start


def reward(sign):
    return spec.Reward(host=functools.partial(signed, sign=sign))


def test_the_algorithm_s_config_that_runs_is_in_config_yaml(begin):
    config = RunConfig(reward=("length",))
    recorded, manifest = begin(ppo, ppo.Config(num_epochs=3, gae_lambda=0.5), config=config)
    assert (recorded["ppo"]["num_epochs"], recorded["ppo"]["gae_lambda"]) == (3, 0.5)
    assert "given" not in manifest
    assert parse(RunConfig, ["--config", "run/config.yaml"]).ppo == PPOStage(
        num_epochs=3, gae_lambda=0.5
    )
    begin(ppo, ppo.Config(num_epochs=3, gae_lambda=0.5), config=config, resume=True)
    with pytest.raises(UserError, match=r"ppo\.gae_lambda was 0\.5 and is now 1\.0"):
        begin(ppo, ppo.Config(num_epochs=3), config=config, resume=True)
    allowed = replace(config, allow_changed=("ppo.gae-lambda",))
    recorded, _ = begin(ppo, ppo.Config(num_epochs=3), config=allowed, resume=True)
    assert recorded["ppo"]["gae_lambda"] == 1.0


def test_a_reward_of_the_other_sign_is_another_run(begin):
    recorded, manifest = begin(vpg, config=RunConfig(reward=("count:e",)), reward=reward(1.0))
    assert recorded["reward"] == []  # it was not read
    assert manifest["given"]["reward"]["host"]["sign"] == 1.0
    begin(vpg, reward=reward(1.0), resume=True)
    with pytest.raises(UserError, match=r"reward\.host\.sign was 1\.0 and is now -1\.0\. Undo"):
        begin(vpg, reward=reward(-1.0), resume=True)
    with pytest.raises(
        UserError, match=r"reward\.host\.def was 'test_given_objects.signed' and is now"
    ):
        begin(vpg, reward=spec.Reward(host=times(1.0)), resume=True)
    with pytest.raises(UserError, match=r"reward\.host\.sign was 1\.0 and is now not set"):
        begin(vpg, config=RunConfig(reward=("length",)), resume=True)
    allowed = RunConfig(allow_changed=("reward",))
    _, manifest = begin(vpg, config=allowed, reward=reward(-1.0), resume=True)
    assert manifest["given"]["reward"]["host"]["sign"] == -1.0
    assert manifest["resumed"][-1]["changed"] == ["reward.host.sign was 1.0 and is now -1.0"]


def test_what_cannot_be_compared_is_named_on_the_console(begin, capsys):
    begin(vpg, reward=spec.Reward(host=times(threading.Lock())))
    printed = capsys.readouterr().out
    said = "manifest.json: reward.host.factor (_thread.lock) cannot be fingerprinted; --resume does"
    assert printed.count(said) == 1


def test_an_algorithm_from_outside_is_recorded_with_its_settings(begin):
    recorded, manifest = begin(outside(), OwnConfig(alpha=0.25), reward=reward(1.0))
    assert recorded["vapo"]["alpha"] == 0.25
    assert recorded["vapo"]["rule"]["def"] == "test_given_objects.inner"
    assert manifest["given"]["algorithm"]["import"] == "vapo"
    for module, config, said in [
        (outside(), OwnConfig(alpha=0.5), r"vapo\.alpha was 0\.25 and is now 0\.5"),
        (
            outside(),
            OwnConfig(alpha=0.25, rule=signed),
            r"vapo\.rule\.def was 'test_given_objects\.inner'",
        ),
    ]:
        with pytest.raises(UserError, match=said):
            begin(module, config, reward=reward(1.0), resume=True)


def test_settings_that_an_algorithm_from_outside_does_not_read_are_named(begin, capsys):
    config = RunConfig(ppo=PPOStage(value="separate", num_epochs=2))
    begin(outside(), config=replace(config, reward=("length",)))
    said = "the algorithm vapo does not read: ppo.num_epochs 2, ppo.value separate\n"
    assert said in capsys.readouterr().out
    with pytest.raises(UserError, match="algorithm ppo: ppo is a setting of every run"):
        begin(outside("ppo"))
    begin(vpg, config=replace(config, reward=("length",)))  # stages share a file
