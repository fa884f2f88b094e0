"""A value function with a body of its own, in runs: what learns when, where it starts, LoRA,
resume, export.
"""

import importlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import goes_on_alike, initial_params, metric_rows, run_ppo, save_base, slow
from numpy.testing import assert_allclose

from rlhf_jax import models, ppo, training
from rlhf_jax.config import Compute, LoRA, Optimizer, PPOStage, RLStage, RunConfig, Tokenizer
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.iteration import NO_PENALTY
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training.common.initial import Trainable, trainable
from rlhf_jax.training.common.layout import layout_of
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.common.optimizer import Patience, learning_rates, muon_dimensions
from rlhf_jax.training.rl import critic, inputs
from rlhf_jax.training.rl.job import sources_of
from rlhf_jax.training.rl.method import Method
from rlhf_jax.training.rl.programs import networks_of
from rlhf_jax.types import Rollout, TrainState

loop = importlib.import_module("rlhf_jax.training.rl.run")  # ``rl.run`` is its function
KEY = jax.random.key(0)

MODEL = models.build(
    models.GPT2Config(vocab_size=12, max_length=16, hidden_size=8, num_layers=1, num_heads=1)
)


def moved(before, after):
    both = zip(*map(jax.tree.leaves, (before, after)), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in both)


def samples():
    tokens = np.random.default_rng(1).integers(2, 12, (4, 6))
    said = np.ones_like(tokens) * (np.arange(6) > 1)
    zeros = np.zeros(tokens.shape, np.float32)
    ones = said.astype(np.float32)
    return Rollout(tokens, np.ones_like(tokens), said, zeros, values=zeros, rewards=ones)


@pytest.mark.slow
def test_only_the_value_model_learns_while_it_warms_up():
    """Two steps an iteration, one iteration of warm-up."""
    params = initial_params(MODEL)
    start = critic.beside(Trainable(params), models.add_head(KEY, params, "value")).params
    assert start.keys() == {"policy", "value"}
    settings = RLStage(num_iterations=3, optimizer=Optimizer(learning_rate=1e-2, schedule="linear"))
    how = PPOStage(value="separate", value_learning_rate=1e-1, value_warmup=1)
    optimizer = critic.make_optimizer(settings, how, 2, start, None)
    options = {"policy_fn": models.policy_fn(MODEL, value_model=MODEL), "optimizer": optimizer}
    config = ppo.Config(num_epochs=1)
    step = jax.jit(partial(ppo.update, rollout=samples(), key=KEY, config=config, **options))
    state = TrainState.create(start, optimizer)
    rates = []
    for _ in range(4):
        before = state.params
        state, metrics = step(state)
        assert metrics["nonfinite"] == 0
        rates.append([moved(before[part], state.params[part]) for part in ("policy", "value")])
    # Adam's first step is the learning rate; the value model's is ten times the policy's.
    policy, value = np.transpose(rates)
    assert_allclose(policy[:3], [0.0, 0.0, 0.01], atol=1e-6)
    assert value[0] == pytest.approx(0.1, abs=0.005)


def test_the_value_loss_has_no_gradient_in_the_policy():
    params = initial_params(MODEL)
    whole = {"policy": params, "value": models.add_head(KEY, params, "value")}
    whole["value"]["value"]["kernel"] = jnp.arange(8.0)  # at 0 the body would get no gradient yet
    policy_fn = models.policy_fn(MODEL, value_model=MODEL)
    batch = samples().replace(advantages=samples().rewards, returns=samples().rewards)

    def value_loss(params):
        return ppo.loss(params, batch, None, policy_fn=policy_fn, config=ppo.Config())[1][
            "value/loss"
        ].value

    gradient = jax.jit(jax.grad(value_loss))(whole)
    gradient = jax.tree.map(np.asarray, gradient)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["policy"]))
    assert np.abs(gradient["value"]["h_0"]["mlp"]["c_fc"]["kernel"]).max() > 1e-6


BODY = {"h_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
PARAMS = {"policy": BODY, "value": {**BODY, "value": {"kernel": jnp.ones(2)}}}


def first_update(optimizer, gradient):
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(PARAMS), PARAMS)
    return jax.tree.map(lambda leaf: round(float(np.ravel(leaf)[0]), 6), updates)


def test_a_large_gradient_of_the_policy_does_not_clip_that_of_the_value_function():
    one = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    gradient = {
        "policy": jax.tree.map(lambda x: 300 * x, BODY),
        "value": jax.tree.map(lambda x: 0.1 * x, PARAMS["value"]),
    }
    updates = first_update(critic.split(one, one, PARAMS), gradient)
    assert updates["value"]["h_0"]["kernel"] == -0.1
    assert updates["policy"]["h_0"]["kernel"] == pytest.approx(-1 / 6**0.5, abs=1e-6)


def test_the_schedule_of_the_policy_begins_after_the_warm_up():
    """Under a constant gradient each step of Adam is the learning rate, which is 0 at the end of
    the run.
    """
    adam = Optimizer(learning_rate=0.4, schedule="linear", max_grad_norm=None)
    how = PPOStage(value="separate", value_warmup=1)
    optimizer = critic.make_optimizer(
        RLStage(num_iterations=3, optimizer=adam), how, 2, PARAMS, None
    )
    state = optimizer.init(PARAMS)
    rates = []
    update = jax.jit(optimizer.update)
    for _ in range(6):
        updates, state = update(PARAMS, state, PARAMS)
        biases = (updates[part]["h_0"]["bias"] for part in ("policy", "value"))
        rates.append([-float(np.asarray(bias)[0]) for bias in biases])
    expected = [
        [0, 0, 0.4, 0.3, 0.2, 0.1],
        [0.4 * (1 - step / 6) for step in range(6)],
    ]
    assert_allclose(np.transpose(rates), expected, atol=1e-5)


def test_the_matrices_of_a_value_body_decay_and_its_head_does_not():
    settings = RLStage(
        optimizer=Optimizer(learning_rate=1.0, weight_decay=0.5, schedule="constant")
    )
    optimizer = critic.make_optimizer(settings, PPOStage(value="separate"), 1, PARAMS, None)
    here = {"h_0": {"kernel": -0.5, "bias": 0.0}}
    decays = {"policy": here, "value": {**here, "value": {"kernel": 0.0}}}
    assert first_update(optimizer, jax.tree.map(jnp.zeros_like, PARAMS)) == decays


def test_muon_takes_the_matrices_of_the_body():
    """The leading axis of stacked layers is no part of a matrix."""
    layer = {"attn": {"kernel": 0, "bias": 0, "lora_a": 0}}
    dimensions = muon_dimensions({"h": layer, "h_0": layer, "wte": BODY, "value": {"kernel": 0}})
    assert dimensions["h"]["attn"] == {"kernel": (1, -1), "bias": None, "lora_a": (1, -1)}
    assert dimensions["h_0"]["attn"] == {"kernel": (0, -1), "bias": None, "lora_a": (0, -1)}
    assert dimensions["value"] == {"kernel": None}


@pytest.fixture
def separate(config):
    how = PPOStage(
        num_epochs=1, num_minibatches=2, shuffle_blocks=4, value="separate", value_warmup=2
    )
    sampled = replace(config.rl, num_iterations=4, kl_coef=0.01, kl_target=None)
    return replace(config, ppo=how, rl=sampled)


@pytest.mark.parametrize(
    "rank", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.soak)]
)
def test_a_run_with_a_value_model_goes_on_bit_for_bit(rank, separate, data, tmp_path, monkeypatch):
    if rank:
        base = save_base(tmp_path / "base", data, num_layers=2, dtype=jnp.bfloat16)
        separate = replace(separate, model=base, tokenizer=Tokenizer(), lora=LoRA(rank=rank))
    held = {}
    monkeypatch.setattr(loop, "first_state", keep(loop.first_state, held))
    straight = run_ppo(separate)
    names = {"trained policy", "trained value", "optimizer state", "gradients"}
    assert names | ({"frozen weights"} if rank else set()) <= held.keys()
    kl = [abs(row["objective/kl"]) for row in metric_rows(straight.folder) if "objective/kl" in row]
    assert (
        max(kl[:3]) < 1e-5 < 1e-4 < kl[3]
    )  # the policy moved for the first time in the third iteration
    _, exported = models.load(straight.model_folder)
    assert not exported.keys() & {"policy", "value"}
    goes_on_alike(run_ppo, separate, straight)


def keep(first_state, held):
    def wrapped(run, *how):
        state = first_state(run, *how)
        held.update(run.held)
        return state

    return wrapped


def started(lora, params, source=None):
    """A policy of these parameters, and both with a value model."""
    run = SimpleNamespace(
        config=SimpleNamespace(lora=lora),
        key=lambda name: jax.random.key(7),
        layout=SimpleNamespace(put=lambda tree: tree),
    )
    policy = trainable(lora, params, jax.random.key(8))
    return policy, critic.start(run, policy, params, source=source)


def test_lora_trains_two_sets_of_adapters_beside_one_frozen_body(separate):
    policy, whole = started(LoRA(rank=2), initial_params(MODEL))
    assert whole.base["policy"] is whole.base["value"] is policy.base
    adapters = [
        whole.params[part]["h_0"]["attn"]["c_attn"]["lora_a"] for part in ("policy", "value")
    ]
    assert np.any(adapters[0] != adapters[1])
    assert "value" in whole.params["value"]
    assert whole.params["policy"] is policy.params
    assert "value" not in policy.params


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_a_network_with_a_value_head_of_its_own_gets_no_other(value):
    model = MODEL._replace(values=lambda params, states: states[..., 0])
    config = RunConfig(rl=RLStage(optimizer=Optimizer(1e-3)))
    run = OpenRun("ppo", None, config, layout_of(config))
    method = Method(ppo, PPOStage(value=value), config.rl, NO_PENALTY, None)
    policy = LanguageModel(model, {"body": jnp.ones(2)}, None)
    start, trained, *_ = networks_of(run, policy, method)
    assert start.params.keys() == {"body"}
    parts = trained.params if value == "shared" else trained.params["value"]
    assert parts.keys() == {"body"}


def folders(data, tmp_path):
    """A policy, and a reward model of its tokenizer with two layers."""
    policy = LanguageModel.load(save_base(tmp_path / "policy", data))
    judge = LanguageModel.load(save_base(tmp_path / "judge", data, num_layers=2))
    params = models.add_head(KEY, judge.params, "score")
    params["score"] |= {"bias": jnp.float32(0.25), "gain": jnp.float32(2.0)}
    params["score"]["shift"] = jnp.float32(-0.5)
    how = SamplingConfig(4, eos_id=policy.tokenizer.eos_id, pad_id=policy.tokenizer.pad_id)
    scoring = judge._replace(params=params)
    scoring.save(tmp_path / "judge", template="auto", config=how)
    return policy, scoring


def test_a_score_head_as_a_value_head():
    """3 (w . h + 0.5) - 1 = 3 w . h + 0.5."""
    score = {"kernel": jnp.array([1.0, -2.0]), "bias": 0.5, "gain": 3.0, "shift": -1.0}
    head = critic.as_value_head(score)
    assert (head["kernel"].tolist(), head["bias"]) == ([3.0, -6.0], 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [slow(0), 2])
def test_the_first_values_are_the_scores_of_the_text_so_far(rank, data, tmp_path):
    """The value before token t is the reward model's score of the tokens before t."""
    policy, judge = folders(data, tmp_path)
    how = PPOStage(value="separate", value_from="reward")
    folder = critic.source_of((f"{tmp_path / 'judge'}*0.5",), how)
    source = critic.load(folder, Compute(), policy, 8)
    assert "score" not in source.params
    _, whole = started(LoRA(rank=rank), policy.params, source.params)
    tokens = jax.random.randint(jax.random.key(3), (2, 5), 2, 200)
    policy_fn = whole.bind(models.policy_fn(policy.model, value_model=source.model))
    values = policy_fn(whole.params, tokens, jnp.ones_like(tokens)).values
    score_fn = models.score_fn(judge.model)
    for t in range(1, 5):
        before = tokens[:, :t]
        scores = score_fn(judge.params, before, jnp.ones_like(before))
        assert_allclose(values[:, t], scores, atol=1e-5)


def test_what_a_value_model_cannot_start_from(data, tmp_path):
    policy, _ = folders(data, tmp_path)
    separate = PPOStage(value="separate", value_from="reward")
    for reward in ((), ("count:e",), (str(tmp_path / "judge"), str(tmp_path / "policy"))):
        with pytest.raises(UserError, match="value_from reward: the run's reward is not one"):
            critic.source_of(reward, separate)
    assert critic.source_of((), PPOStage(value="separate")) is None
    plain = replace(separate, value_from=str(tmp_path / "policy"))
    folder = critic.source_of((), plain)
    source = critic.load(folder, Compute(), policy, 8)
    _, whole = started(LoRA(), policy.params, source.params)
    assert not np.any(whole.params["value"]["value"]["kernel"])  # a head of zeros
    other = policy._replace(tokenizer=characters(["abc"]))
    with pytest.raises(UserError, match="its tokenizer is not the policy's"):
        critic.load(folder, Compute(), other, 8)
    with pytest.raises(UserError, match=r"value_from .*policy: it reads 128 tokens; .* now 129"):
        critic.load(folder, Compute(), policy, 129)
    with pytest.raises(ValueError, match="value_from reward: a shared value function has"):
        PPOStage(value_from="reward")
    found = inputs.files(sources_of(RunConfig()), RLStage(), plain)
    assert found == {"value": tmp_path / "policy"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_warmup": 4}, "ppo.value_warmup 4: of 4 iterations, no iteration is left"),
        ({"value_warmup": -1}, "value_warmup must be at least 0"),
    ],
)
def test_settings_that_do_not_fit(changes, message, separate):
    with pytest.raises((UserError, ValueError), match=message):
        training.rl.run(separate, ppo, replace(separate.ppo, **changes))


def test_the_schedule_plateau_lowers_both_learning_rates():
    adam = Optimizer(learning_rate=1.0, schedule="plateau", max_grad_norm=None)
    how = PPOStage(value="separate", value_learning_rate=0.1)
    optimizer = critic.make_optimizer(RLStage(optimizer=adam), how, 1, PARAMS, None)
    state = optimizer.init(PARAMS)
    patience = Patience("min:x", None, adam)
    rates = {"lr": 1.0, "value/lr": pytest.approx(0.1)}
    assert learning_rates(state) == {"plateau_scale": 1} | rates
    state = patience.lowered(state, [{"x": 1.0}] * 6)
    rates = {"lr": pytest.approx(0.1), "value/lr": pytest.approx(0.01)}
    assert learning_rates(state) == {"plateau_scale": pytest.approx(0.1)} | rates
    updates, _ = optimizer.update(PARAMS, state, PARAMS)
    assert updates["policy"]["h_0"]["bias"] == pytest.approx(-0.1, abs=1e-4)
    assert updates["value"]["h_0"]["bias"] == pytest.approx(-0.01, abs=1e-5)


def test_a_run_refuses_a_value_model_that_reads_less_than_a_prompt_and_its_answer(data, tmp_path):
    policy, judge = folders(data, tmp_path)
    short = models.build(replace(judge.model.config, max_length=40))
    wpe = {"embedding": judge.params["wpe"]["embedding"][:40]}
    models.save(tmp_path / "judge", short, judge.params | {"wpe": wpe})
    (tmp_path / "prompts.txt").write_text("milk\n" * 8)
    width = len(policy.tokenizer.encode("milk"))
    config = RunConfig(
        output_dir=str(tmp_path / "run"),
        model=str(tmp_path / "policy"),
        data=(str(tmp_path / "prompts.txt"),),
        reward=("length",),
        rl=RLStage(max_new_tokens=41 - width, num_iterations=1, batch_size=4),
        ppo=PPOStage(value="separate", value_from=str(tmp_path / "judge")),
    )
    with pytest.raises(UserError, match=r"value_from .*judge: it reads 40 tokens; .* now 41"):
        run_ppo(config)
