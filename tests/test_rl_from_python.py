"""What Python gives to an RL run beside its settings: an optimizer, a policy, a callback."""

import json
import types
from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import initial_params, metric_rows, perturbed
from flax.traverse_util import flatten_dict
from jax import Array
from numpy.testing import assert_allclose, assert_array_equal
from optax.contrib import muon
from recorded import grpo_run, with_state

from rlhf_jax import gradient_step, models, ppo, rloo
from rlhf_jax.config import (
    Compute,
    LoRA,
    Mesh,
    Network,
    Optimizer,
    PPOStage,
    RLStage,
    RunConfig,
    Text,
    Tokenizer,
)
from rlhf_jax.errors import UserError
from rlhf_jax.report import export, records
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.training import rl
from rlhf_jax.training.common import own
from rlhf_jax.training.common.optimizer import make_optimizer, muon_dimensions
from rlhf_jax.training.rl import job
from rlhf_jax.types import TrainState

ADAM = Optimizer(learning_rate=0.01, schedule="linear")


@pytest.fixture
def config(tmp_path):
    rows = [{"prompt": f"say {letter}"} for letter in "abcdefgh"]
    (tmp_path / "prompts.json").write_text(json.dumps(rows), "utf-8")
    return RunConfig(
        data=(str(tmp_path / "prompts.json"),),
        output_dir=str(tmp_path / "run"),
        checkpoint_interval=1,
        network=Network(hidden_size=8, num_layers=1, num_heads=1, max_length=16),
        tokenizer=Tokenizer(kind="characters"),
        text=Text(bucket_multiple=16),
        reward=("count:a",),
        rl=RLStage(
            num_iterations=3,
            batch_size=4,
            max_new_tokens=2,
            validation_fraction=0.0,
            optimizer=ADAM,
        ),
    )


def elsewhere(config, name, **changes):
    folder = config.output_dir.replace("run", name)
    return replace(config, output_dir=folder, **changes)


def weights(result):
    return models.load(result.model_folder)[1]


@pytest.mark.slow
def test_a_given_optimizer_takes_the_place_of_the_settings(config, capsys):
    """Of a policy and a value head, which has no optimizer of its own."""
    once = PPOStage(num_epochs=1)
    usual = rl.run(config, ppo, once)
    own = make_optimizer(ADAM, num_steps=3)
    unused = replace(config.rl, optimizer=Optimizer(learning_rate=7.0))
    given = rl.run(elsewhere(config, "given", rl=unused), ppo, once, optimizer=own)
    jax.tree.map(assert_array_equal, weights(usual), weights(given))
    said = "the optimizer is the one that Python gives; rl.optimizer is not used\n"
    assert capsys.readouterr().out.count(said) == 1
    manifest = json.loads((given.folder / "manifest.json").read_text("utf-8"))
    assert manifest["given"].keys() == {"optimizer"}
    assert (
        metric_rows(usual.folder)[-1]["value/loss"] == metric_rows(given.folder)[-1]["value/loss"]
    )


@pytest.mark.slow
def test_a_given_optimizer_trains_all_but_a_value_head_with_a_rate_of_its_own(config, capsys):
    own = PPOStage(value_learning_rate=0.1)
    start = rl.run(elsewhere(config, "start"), ppo, optimizer=optax.sgd(0.0))
    still = rl.run(config, ppo, own, optimizer=optax.sgd(0.0))
    jax.tree.map(assert_array_equal, weights(start), weights(still))
    assert "rl.optimizer trains the value function alone" in capsys.readouterr().out
    losses = [metric_rows(run.folder)[-1]["value/loss"] for run in (start, still)]
    assert losses[0] != losses[1]


def test_a_given_reward_takes_the_place_of_the_settings(config, tmp_path):
    """Which are not read, and not recorded."""
    unread = replace(config, reward=("no such reward",))
    with job.open_job(
        unread, rloo, None, reward=lambda rollout: (rollout.mask * 1.0, {})
    ) as opened:
        assert opened.run.config.reward == opened.sources.reward == ()
        assert opened.inputs.reward.fn is not None


def test_the_schedule_plateau_needs_the_optimizer_of_the_settings(config):
    plateau = Optimizer(schedule="plateau")
    wrong = replace(config, rl=replace(config.rl, optimizer=plateau))
    with pytest.raises(UserError, match=r"plateau .* optimizer that Python"):
        rl.run(wrong, rloo, optimizer=optax.sgd(0.1))


def test_settings_that_python_takes_the_place_of_are_named(config, capsys):
    flags = replace(config, ppo=PPOStage(num_epochs=3, value="separate", gamma=0.9))
    start = replace(flags, rl=replace(config.rl, batch_size=3))
    with pytest.raises(UserError, match="batch_size"):  # which ends the run before it starts
        rl.run(start, ppo, ppo.Config(num_epochs=3, num_minibatches=2))
    unused = "not used: ppo.gamma 0.9, ppo.value separate\n"
    assert f"those that Python gives; {unused}" in capsys.readouterr().out


def test_a_function_of_texts_that_asks_for_a_missing_column_is_refused(config):
    def reward(prompts, responses, gold):
        return [0.0] * len(prompts)

    with pytest.raises(UserError, match=r"reward: nothing fills .* gold"):
        rl.run(config, rloo, reward=reward)


SIZES = {"vocab_size": 13, "max_length": 16, "hidden_size": 16, "num_layers": 3, "num_heads": 2}
KINDS = {
    "gpt2": models.GPT2Config(**SIZES),
    "gpt2 stacked": models.GPT2Config(**SIZES, scan_layers=True),
    "llama": models.LlamaConfig(**SIZES, num_kv_heads=1, intermediate_size=24),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank"),
    [("gpt2", 0), ("llama", 2), ("gpt2 stacked", 2)],
)
def test_muon_orthogonalizes_each_matrix_by_itself(kind, rank):
    params = initial_params(models.build(KINDS[kind]))
    if rank:
        params = models.lora.init(jax.random.key(1), params, rank)
    else:
        params = models.add_head(jax.random.key(2), params, "value")
    gradients = perturbed(jax.tree.map(np.zeros_like, params))
    optimizer = muon(1.0, ns_steps=8, muon_weight_dimension_numbers=muon_dimensions)
    update = jax.jit(optimizer.update)
    updates, _ = update(gradients, optimizer.init(params), params)
    matrices = 0
    for names, update in flatten_dict(updates).items():
        if names[-1] not in ("kernel", "lora_a", "lora_b") or names[-2] == "value":
            assert np.ptp(np.abs(update)) < 1e-3  # Adam's first step
            continue
        # [..., in, out], whatever stands between these in one array
        single = np.moveaxis(np.asarray(update), int(names[0] == "h"), -2)
        shape = single.shape[-2:]
        for matrix in single.reshape(-1, *shape):
            sizes = np.linalg.svd(matrix, compute_uv=False) / max(1, shape[1] / shape[0]) ** 0.5
            assert 0.5 < sizes.min() <= sizes.max() < 1.5, names
            matrices += 1
    per_layer = {"gpt2": (6, 10), "llama": (7, 14)}[kind.partition(" ")[0]]
    assert matrices == 3 * per_layer[rank > 0]


@pytest.mark.slow
def test_a_run_with_muon_and_a_schedule_goes_on_bit_for_bit(config):
    rate = optax.linear_schedule(0.02, 0.0, 3)
    optimizer = muon(rate, muon_weight_dimension_numbers=muon_dimensions)
    straight = rl.run(config, rloo, optimizer=optimizer)
    again = elsewhere(config, "again")
    stopped = rl.run(
        again,
        rloo,
        optimizer=optimizer,
        on_step=lambda step, *_: step == 2,
    )
    assert metric_rows(stopped.folder) == metric_rows(straight.folder)[:3]
    resumed = rl.run(replace(again, resume=True), rloo, optimizer=optimizer)
    assert metric_rows(resumed.folder) == metric_rows(straight.folder)
    jax.tree.map(assert_array_equal, weights(resumed), weights(straight))
    other = muon(0.01, muon_weight_dimension_numbers=muon_dimensions)
    with pytest.raises(UserError, match="optimizer"):
        rl.run(replace(again, resume=True), rloo, optimizer=other)


def test_on_step_sees_each_step_and_may_end_the_run():
    """Also with a function of texts as the reward: 1 and 1.5 in turn."""
    run = grpo_run()
    rows = metric_rows(run.result.folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [step for step, *_ in run.steps] == [1, 2, 3, 4]
    assert [int(state.train.step) for _, state, *_ in run.steps] == [1, 2, 3, 4]
    for (_, _, metrics, rollout), row in zip(run.steps, rows[1:], strict=True):
        assert metrics.items() <= row.items()
        assert metrics["objective/score"] == np.mean(rollout.scores)
        assert rollout.scores.tolist() == [1.0, 1.5, 1.0, 1.5]
    assert (run.result.folder / "checkpoints" / "4").is_dir()
    assert run.result.model_folder.is_dir()
    assert "ended early, after step 4 of 9: on_step asked for it" in run.said


class Counts(nn.Module):
    """Logits of the last token and of the mean of all tokens so far: no layer of ours."""

    size: int
    as_states: bool = False

    @nn.compact
    def __call__(self, tokens, mask):
        real = (mask != 0)[..., None]
        embedded = jnp.where(
            real,
            nn.Embed(self.size, 6, name="table")(tokens),
            0.0,
        )
        seen = jnp.maximum(jnp.cumsum(real, axis=1), 1)
        states = nn.tanh(nn.Dense(6, name="mix")(embedded + jnp.cumsum(embedded, axis=1) / seen))
        return states if self.as_states else nn.Dense(self.size, name="out")(states)


def counts(size=32):
    """Its logits."""
    module = Counts(size)
    one = jnp.ones((1, 1), jnp.int32)
    return own.from_functions(
        lambda key: module.init(key, one, one)["params"],
        lambda params, tokens, mask, key: module.apply({"params": params}, tokens, mask),
        vocab_size=size,
        max_length=16,
    )


def counts_by_state(size=32, values=None):
    """The same by its states, and with a cache: the sum of the tokens so far."""
    whole = counts(size)
    body = Counts(size, as_states=True)

    def affine(layer, x):
        return x @ layer["kernel"] + layer["bias"].reshape([1] * (x.ndim - 1) + [-1])

    def unembed(params, states):
        return affine(params["out"], states)

    def decode(params, tokens, positions, key_mask, cache, index):
        columns = index + jnp.arange(tokens.shape[1])
        here = (key_mask[:, columns] != 0)[..., None]
        embedded = jnp.where(here, params["table"]["embedding"][tokens], 0.0)
        sums = cache[:, None] + jnp.cumsum(embedded, axis=1)
        mean = sums / jnp.maximum(positions + 1, 1)[..., None]
        states = jnp.tanh(affine(params["mix"], embedded + mean))
        return unembed(params, states), sums[:, -1]

    return own.from_functions(
        whole.init,
        lambda params, tokens, mask, key: body.apply({"params": params}, tokens, mask),
        vocab_size=size,
        max_length=16,
        unembed=unembed,
        init_cache=lambda batch, length: jnp.zeros((batch, 6)),
        decode=decode,
        values=values,
    )


@pytest.fixture
def with_own_policy(config):
    optimizer = Optimizer(learning_rate=0.1, schedule="constant")
    settings = replace(config.rl, optimizer=optimizer, validation_fraction=0.25)
    return replace(config, rl=settings, network=Network())


@pytest.mark.slow
def test_a_policy_of_ones_own_trains_and_is_saved_as_what_it_is(with_own_policy):
    policy = counts_by_state()
    result = rl.run(with_own_policy, ppo, policy=policy)
    for row in metric_rows(result.folder)[1:]:
        assert row["policy/sampler_gap"] < 1e-5  # it samples and learns with the same numbers
        assert row["grad_norm"] > 0
    files = {file.name for file in result.model_folder.iterdir()}
    assert {"params.safetensors", "policy.json", "tokenizer.json"} <= files
    assert not files & {"config.json", "model.safetensors"}
    params = own.load(result.model_folder)
    start = policy.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, start)
    manifest = json.loads((result.folder / "manifest.json").read_text("utf-8"))
    assert manifest["given"].keys() == {"policy"}
    [record] = records.find([result.folder])
    assert record.finished
    with pytest.raises(UserError, match="one that Python gave"):
        export.export(result.folder, result.folder.parent / "exported")
    with pytest.raises(UserError, match=r"read them by rlhf_jax\.training\.common\.own\.load"):
        models.load(result.model_folder)
    # Who has the functions goes on from the parameters, which do not change at a rate of 0.
    onward = elsewhere(with_own_policy, "onward")
    loaded = policy._replace(init=lambda key: params)
    after = rl.run(onward, ppo, policy=loaded, optimizer=optax.sgd(0.0))
    jax.tree.map(assert_array_equal, own.load(after.model_folder), params)


@pytest.mark.slow
def test_a_policy_with_a_cache_learns_what_the_one_without_learns(with_own_policy):
    without = rl.run(with_own_policy, rloo, policy=counts())
    by_state = rl.run(elsewhere(with_own_policy, "state"), rloo, policy=counts_by_state())
    first, second = (own.load(run.model_folder) for run in (without, by_state))
    jax.tree.map(
        lambda x, y: assert_allclose(x, y, atol=1e-4),
        first,
        second,
    )


@pytest.mark.slow
def test_a_run_with_a_policy_of_ones_own_goes_on_bit_for_bit(with_own_policy):
    policy = counts()
    straight = rl.run(with_own_policy, rloo, policy=policy)
    again = elsewhere(with_own_policy, "again")
    rl.run(again, rloo, policy=policy, on_step=lambda step, *_: step == 1)
    again = replace(again, resume=True)
    resumed = rl.run(again, rloo, policy=policy)
    rows = metric_rows(resumed.folder)
    for name in [*rows[1]]:  # a run that ends validates
        if name.startswith("validation/"):
            rows[1].pop(name)
    assert rows == metric_rows(straight.folder)
    with pytest.raises(UserError, match="policy"):
        rl.run(again, rloo, policy=counts_by_state())


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        (counts(), {"lora": LoRA(rank=2), "model": "base"}, r"model, lora\.rank: a policy that"),
        (counts(), {"network": Network(num_layers=7)}, "network: a policy that Python gives"),
        (counts(), {"compute": Compute(remat=True)}, "compute .*: a policy that Python gives"),
        (counts(), {"mesh": Mesh(fsdp=2)}, "mesh .*: a policy that Python gives does not read"),
        (counts(size=5), {}, "the tokenizer has 13 entries but the policy only 5"),
        (counts()._replace(init=lambda key: {"value": {}}), {}, "called policy or score or value"),
    ],
)
def test_a_policy_that_does_not_fit(policy, changes, message, with_own_policy):
    with pytest.raises(UserError, match=message):
        rl.run(replace(with_own_policy, **changes), rloo, policy=policy)


# --- Parameters whose keys are no plain names, and an algorithm with parameters of its own


def layered(first="layers"):
    """A network with a list of layers, as nnx.List has, and a name with a slash."""

    def init(key):
        keys = jax.random.split(key, 3)
        layers = {i: {"a/b": 0.1 * jax.random.normal(keys[i], (6, 6))} for i in range(2)}
        return {"table/x": 0.1 * jax.random.normal(keys[2], (32, 6)), first: layers}

    def apply(params, tokens, mask, key):
        states = params["table/x"][tokens] * (mask != 0)[..., None]
        for i in range(2):
            states = states + jnp.tanh(states @ params[first][i]["a/b"])
        return states @ params["table/x"].T

    return own.from_functions(init, apply, vocab_size=32, max_length=16)


@pytest.mark.slow
def test_a_list_of_layers_and_names_with_slashes_are_saved_as_they_are(with_own_policy):
    policy = layered()
    result = rl.run(with_own_policy, rloo, policy=policy)
    params = own.load(result.model_folder)
    start = policy.init(jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(start)
    assert params["layers"].keys() == {0, 1}
    assert params["table/x"].shape == (32, 6)
    again = rl.run(replace(with_own_policy, resume=True), rloo, policy=policy)
    jax.tree.map(assert_array_equal, own.load(again.model_folder), params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "two parameters are called a/b"),
        ({"a": [np.ones(1)]}, r"\['a'\]\[0\]: it must return nested dicts"),
        ({"a": {0: np.ones(1), "x": np.ones(1)}}, "it must return nested dicts of arrays whose"),
        ({"a": {True: np.ones(1)}}, r"\['a'\]\[True\]: it must return nested dicts"),
    ],
)
def test_parameters_that_could_not_be_saved_are_refused_first(params, message, with_own_policy):
    policy = layered()._replace(init=lambda key: params)
    with pytest.raises(UserError, match=message):
        rl.run(with_own_policy, rloo, policy=policy)


def test_an_algorithm_with_parameters_of_its_own_and_all_rows_of_its_result():
    """The parameters are in the checkpoints and not in the model."""
    result = grpo_run().result
    assert "log_temperature" not in weights(result)
    with Checkpoints(result.folder / "checkpoints") as checkpoints:
        assert "train/params/log_temperature" in checkpoints.arrays(4)
    assert result.rows == metric_rows(result.folder)
    validated = [row["step"] for row in result.rows if "validation/score" in row]
    assert validated == [0, 2, 4]
    assert result.rows[-1] == {"step": 4, **result.metrics}


@dataclass(frozen=True)
class Settings:
    """Of an actor-critic that extends no class of the package."""

    rate: float = 0.5
    value: str = "separate"
    value_warmup: int = 1


@flax.struct.dataclass
class Memory(TrainState):
    """The last values of every prompt's response."""

    values: Array

    @classmethod
    def create(cls, params, optimizer, prompts, columns):
        start = TrainState.create(params, optimizer)
        return cls(**vars(start), values=jnp.zeros((prompts, columns)))


def update(state, rollout, key, *, policy_fn, optimizer, config, **sharded):
    """One step on PPO's loss."""
    # With lambda 1 equal rewards and values would give equal advantages, which are whitened to 0,
    # and equal returns are not normalised.
    own = ppo.Config(value_coef=config.rate, gae_lambda=0.95, normalize_returns=False)
    prepared = ppo.prepare(rollout, config=own)
    bound = partial(ppo.loss, policy_fn=policy_fn, config=own)
    after, metrics = gradient_step(bound, state, optimizer, batch=prepared, key=key)
    seen = jnp.pad(rollout.values, ((0, 0), (state.values.shape[1] - rollout.values.shape[1], 0)))
    return after.replace(values=state.values.at[rollout.row_ids].set(seen)), metrics


@pytest.mark.slow
def test_an_actor_critic_of_ones_own_with_the_value_head_of_its_network(with_own_policy):
    """A value model, which starts as the policy's network with its head, learns first. The head is
    a constant: each value is 0.25 at the start.
    """
    algorithm = types.SimpleNamespace(
        __name__="mine", Config=Settings, State=Memory, needs_values=True, update=update
    )
    policy = counts_by_state(values=lambda params, states: states[..., 0] * 0 + params["critic"])
    start = policy.init
    policy = policy._replace(init=lambda key: {**start(key), "critic": jnp.float32(0.25)})
    seen = []

    def on_step(step, state, metrics, rollout):
        seen.append(jax.tree.map(np.array, (state.train.params, state.train.values, rollout)))

    settings = replace(with_own_policy.rl, num_iterations=2, validation_fraction=0.0)
    config = replace(with_own_policy, rl=settings)
    rl.run(config, algorithm, Settings(rate=1.0), policy=policy, on_step=on_step)
    (first, values, rollout), (second, *_) = seen
    begun = policy.init(jax.random.key(0))
    assert first["policy"]["critic"] == begun["critic"] == 0.25
    assert_allclose(values[rollout.row_ids][:, -2:], 0.25 * rollout.mask[:, -2:])
    assert values.shape == (8, rollout.tokens.shape[1])
    assert first["value"]["critic"] != 0.25  # it learned alone
    assert np.any(first["policy"]["out"]["kernel"] != second["policy"]["out"]["kernel"])


def test_an_algorithm_that_changes_the_policys_parameters_is_refused_before_it_trains(config):
    algorithm = with_state(
        rloo, lambda params: params | {"ln_f": params["ln_f"] | {"x": jnp.zeros(())}}
    )
    steps = []
    with pytest.raises(UserError, match="other parameters of the policy"):
        rl.run(config, algorithm, rloo.Config(), on_step=lambda step, *_: steps.append(step))
    assert not steps
