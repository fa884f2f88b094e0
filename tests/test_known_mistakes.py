"""Mistakes that other libraries shipped, and the public reports of them: each test fails if it is
made here.

The docstrings say what went wrong there; what is tested here goes through public functions.
"""

import functools
import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from tabular import assert_close, policy_fn, policy_params
from tabular import rollout as tabular_rollout

from rlhf_jax import (
    grpo,
    models,
    ops,
    ppo,
    rewards,
    rloo,
    rollout,
    sampling,
    sft,
    sharding,
    training,
    vpg,
)
from rlhf_jax.algorithms.step import minibatch_epochs
from rlhf_jax.config import Network, RLStage, RunConfig, Text, Tokenizer
from rlhf_jax.data import batches, demo, encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters, load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.types import Demonstrations, Rollout, TrainState

KEY = jax.random.key(0)
SIZES = {"vocab_size": 13, "max_length": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
GPT2 = models.build(models.GPT2Config(**SIZES))
LLAMA = models.build(models.LlamaConfig(**SIZES, num_kv_heads=1, intermediate_size=24))


@functools.cache
def gpt2_params():
    """Ten times the usual weights: far from uniform, so that every mistake moves the numbers."""
    return jax.tree.map(
        lambda x: x * 10 if x.ndim > 1 else x,
        jax.jit(GPT2.init)(KEY),
    )


def test_log_probs_off_by_one():
    """AI-Hypercomputer/maxtext#2103: prompt log-probs were read from the logits of the same
    position, which have seen the token; lucidrains/PaLM-rlhf-pytorch#31: those of the response were
    cut at the prompt's end, one place off.

    Over all tokens of one column the probabilities in that column sum to 1, in the first response
    column and the last; the columns before do not see the token.
    """
    policy = jax.jit(models.policy_fn(GPT2, prompt_length=3))
    texts = np.tile(np.random.default_rng(0).integers(0, 13, 7), (13, 1))
    for column in (3, 6):
        every = np.where(
            np.arange(7)[None, :] == column,
            np.arange(13)[:, None],
            texts,
        )
        log_probs = np.asarray(policy(gpt2_params(), every, np.ones_like(every), None).log_probs)
        assert_allclose(np.exp(log_probs[:, column]).sum(), 1.0, rtol=1e-5)
        assert np.ptp(log_probs[:, column]) > 1
        assert_allclose(np.ptp(log_probs[:, 3:column], axis=0), 0.0, atol=1e-5)


def test_pad_is_eos(tmp_path):
    """mlabonne/llm-course#33, huggingface/trl#6357: with pad_token = eos_token every EOS is masked
    out as padding, and the model never learns to stop.

    Such a tokenizer gains a pad of its own, EOS is learned and pads are not, and a sampler refuses
    the pair.
    """
    characters("ab").save(tmp_path)
    backend = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    backend["added_tokens"] = []
    backend["model"]["vocab"] = {"<|endoftext|>": 0, "a": 1, "b": 2}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend), "utf-8")
    special = json.dumps({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text(special, "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id != tokenizer.eos_id
    rows = [Row("a", ("bb",), "1"), Row("a", ("b",), "2")]
    batch = batches.demonstration_batch(encoding.encode_texts(rows, tokenizer), np.arange(2), 4)
    eos = batch.tokens == tokenizer.eos_id
    assert_array_equal(eos.sum(axis=1), [1, 1])
    assert batch.response_mask[eos].all()
    assert not batch.response_mask[batch.tokens == tokenizer.pad_id].any()
    with pytest.raises(ValueError, match="pad_id must be different from eos_id"):
        sampling.SamplingConfig(max_new_tokens=2, eos_id=1, pad_id=1)


def test_truncated_responses_scored_as_finished():
    """huggingface/trl#6805: the check for EOS looked at the prompt too, whose template has one, so
    a truncated response paid no penalty; OpenRLHF/OpenRLHF#238: an EOS was written over the last
    token of truncated responses."""
    model = characters("abc")
    made = rollout.from_text(
        [[2, 1, 3]] * 2,
        ["ab", "ab"],
        model,
        log_probs=[[-1, -1], [-1, -1, -1]],
        finished=[False, True],
    )
    scored = rewards.missing_eos(made, jnp.array([5.0, 5.0]), model.eos_id, penalty=2.0)
    assert_array_equal(scored, [3, 5])
    # The sampler leaves what runs out of room as it was sampled.
    prompts = np.array([[12, 2, 4], [12, 3, 5]])
    config = sampling.SamplingConfig(max_new_tokens=3, temperature=0.0, eos_id=12, pad_id=0)
    sample = jax.jit(sampling.generate, static_argnames=("model", "config"))
    sampled = sample(GPT2, gpt2_params(), prompts, np.ones_like(prompts), KEY, config=config)
    assert np.asarray(sampled.response_mask)[:, 3:].all()
    assert not (np.asarray(sampled.tokens)[:, 3:] == 12).any()
    assert_array_equal(rewards.missing_eos(sampled, np.zeros(2), 12, score=-1.0), [-1, -1])


@pytest.mark.slow
def test_temperature_in_the_rollout_but_not_in_the_update(tmp_path):
    """huggingface/trl#3029, OpenRLHF/OpenRLHF#853: samples were drawn at a temperature by which
    neither the update's nor the reference's logits were divided; huggingface/trl#4159: the engine's
    were not.

    In the first iteration of a run the policy is the reference, so the KL is 0, and what the update
    computes is what the sampler drew from.
    """
    demo.write(
        tmp_path / "data", sizes={"sft_data.json": 8, "preference_data.json": 8, "prompts.json": 8}
    )
    config = RunConfig(
        data=(str(tmp_path / "data"),),
        output_dir=str(tmp_path / "run"),
        reward=("length",),
        network=Network(hidden_size=16, num_layers=1, num_heads=2, max_length=128),
        tokenizer=Tokenizer(vocab_size=300),
        text=Text(bucket_multiple=128),
        rl=RLStage(
            num_iterations=1,
            batch_size=8,
            max_new_tokens=4,
            temperature=0.2,
            kl_coef=0.1,
            validation_fraction=0.0,
        ),
        vpg=vpg.Config(),
    )
    folder = training.rl.run(config, vpg).folder
    first = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert first["step"] == 1
    assert first["policy/sampler_gap"] < 1e-4
    assert first["objective/kl"] == 0.0


def test_the_shuffle_repeated_every_epoch():
    """pytorch/pytorch#31771, lucidrains/DALLE-pytorch#230: without set_epoch each epoch had the
    order of the first.
    """
    plan = batches.Plan(np.arange(32) % 5 + 1, 8, KEY)
    demonstrations = [
        np.concatenate([plan.rows(step) for step in range(s, s + 4)]) for s in (0, 4, 8)
    ]
    prompts = [
        np.concatenate([batches.prompt_rows(32, 8, KEY, step) for step in range(s, s + 4)])
        for s in (0, 4, 8)
    ]

    def note(state, minibatch, key):
        step, seen = state
        return (step + 1, seen.at[step].set(minibatch)), {}

    start = jnp.array(0), jnp.zeros((12, 8), jnp.int32)
    (_, seen), _ = minibatch_epochs(
        note, start, jnp.arange(32), KEY, num_epochs=3, num_minibatches=4
    )
    for orders in (demonstrations, prompts, np.asarray(seen).reshape(3, 32)):
        assert all(sorted(order) == list(range(32)) for order in orders)
        assert len({tuple(order) for order in orders}) == 3


def test_a_score_cut_to_an_integer():
    """CarperAI/trlx#514: a tensor of rewards was made without a dtype, so that whole numbers gave
    an integer one.
    """
    said = np.array(
        [
            [0, 1, 1],
            [0, 1, 0],
            [0, 1, 1],
            [0, 1, 0],
        ]
    )
    made = Rollout(
        np.full((4, 3), 2),
        np.ones((4, 3), np.int32),
        said,
        np.zeros((4, 3)),
    )
    for given in ([1, 0, 0.75, 0], [1, 0.75, np.int64(2), np.float32(0.5)]):
        scored, _ = rewards.on_host(lambda rollout, columns, given=given: (given, {}), made, {})
        assert_array_equal(scored.scores, np.float32(given))
    integers = made.replace(scores=np.array([1, 0, 0, 0]))
    for algorithm, expected in (
        (rloo, [1, -1 / 3, -1 / 3, -1 / 3]),
        (grpo, [1.4997, -0.4999, -0.4999, -0.4999]),
    ):
        advantages = jax.jit(partial(algorithm.prepare, config=algorithm.Config(group_size=4)))(
            integers
        ).advantages
        assert_allclose(
            advantages,
            said * np.array(expected)[:, None],
            atol=1e-6,
        )
    shaped = rewards.missing_eos(made, np.array([1, 2, 3, 4]), eos_id=9, penalty=0.25)
    assert_array_equal(shaped, [0.75, 1.75, 2.75, 3.75])


def test_a_mean_of_minibatch_means():
    """huggingface/transformers#24725, meta-pytorch/torchtune#1875: gradients of parts, each a mean
    over its own tokens, were averaged, so that a token of a short part counted more.

    One row of 1 token and one of 3, each in a part of its own: the loss is the sum over tokens / 4.
    """
    logits = jnp.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    batch = Demonstrations(
        tokens=jnp.array([[0, 1, 0, 0], [0, 1, 2, 0]]),
        attention_mask=jnp.ones((2, 4), jnp.int32),
        response_mask=jnp.array([[0, 1, 0, 0], [0, 1, 1, 1]]),
    )
    nll = -np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    expected = (nll[0, 1] + nll[0, 1] + nll[1, 2] + nll[2, 0]) / 4
    optimizer = optax.sgd(1.0)
    states = []
    for parts in (1, 2):
        update = partial(
            sft.update,
            policy_fn=ops.policy_fn(lambda params, tokens, mask, key: params[tokens]),
            optimizer=optimizer,
            config=sft.Config(num_microbatches=parts),
        )
        state, metrics = jax.jit(update)(TrainState.create(logits, optimizer), batch, KEY)
        assert_allclose(metrics["loss"], expected, rtol=1e-6)
        states.append(state.params)
    assert_allclose(states[1], states[0], rtol=1e-6)
    # Row 0 of the table is read twice, by two of the four tokens: their gradient is (softmax -
    # onehot) * 2 / 4.
    assert_allclose(states[0][0] - logits[0], (np.array([0, 1, 0]) - 1 / 3) * 2 / 4, rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow), pytest.param(LLAMA, id="llama")],
)
def test_nan_from_fully_padded_rows(model):
    """pytorch/pytorch#40932, #41508: attention over a row that is all padding is a softmax of
    nothing but -inf, whose NaN reached every parameter; unslothai/unsloth-zoo#1262: a mean over no
    tokens was 0 / 0.

    A batch that was filled up with such rows trains as it would without them, and one of nothing
    else not at all.
    """
    optimizer = optax.sgd(0.1)
    update = jax.jit(
        partial(
            sft.update, policy_fn=models.policy_fn(model), optimizer=optimizer, config=sft.Config()
        )
    )
    state = TrainState.create(jax.jit(model.init)(KEY), optimizer)
    tokens = np.random.default_rng(0).integers(0, 13, (4, 6))
    mask = np.where(
        np.array([1, 0, 1, 0])[:, None],
        np.array([[1, 1, 1, 1, 1, 0]]),
        0,
    )
    said = mask * (np.arange(6) >= 2)
    padded, metrics = update(state, Demonstrations(tokens, mask, said), KEY)
    assert metrics["nonfinite"] == 0
    twice = np.array([0, 0, 2, 2])
    whole, expected = update(
        state,
        Demonstrations(tokens[twice], mask[twice], said[twice]),
        KEY,
    )
    assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert_close(padded.params, whole.params, atol=1e-5)
    nothing, metrics = update(
        state,
        Demonstrations(tokens, 0 * mask, 0 * said),
        KEY,
    )
    assert metrics["loss"] == 0
    assert metrics["nonfinite"] == 0
    assert_close(nothing.params, state.params, atol=0)


def test_a_negative_kl_from_top_k_sampling(tmp_path):
    """huggingface/trl#235, #736: samples of top-k have a mean log-ratio to the reference that can
    be negative although no KL is, and R - beta * KL then pays for it.

    By enumeration: the KL is .17, its estimate from the two likeliest tokens -.23. So no run trains
    on such samples unless it is told to, and the estimate is reported as it is, not cut off at 0.
    """
    policy = np.array([0.4, 0.3, 0.3])
    reference = np.array([0.6, 0.3, 0.1])
    log_ratio = np.log(policy / reference)
    kept = np.array([[True, True, False]])  # the lower id among equals stays
    assert_array_equal(
        np.isfinite(sampling.truncate(jnp.log(jnp.array([[0.4, 0.31, 0.29]])), top_k=2)), kept
    )
    weights = np.where(kept[0], policy, 0) / policy[kept[0]].sum()
    assert policy @ log_ratio > 0.16
    assert weights @ log_ratio < -0.23
    estimate = ops.kl(jnp.log(policy), jnp.log(reference), "k1")
    assert_allclose(weights @ np.asarray(estimate), weights @ log_ratio, rtol=1e-5)

    config = RunConfig(data=("nowhere",), output_dir=str(tmp_path / "run"), reward=("length",))
    for truncation in ({"top_k": 2}, {"top_p": 0.9}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(truncation))):
            RLStage(**truncation)
    allowed = replace(config, rl=RLStage(top_k=2, allow_truncated_sampling=True))
    with pytest.raises(UserError, match="nowhere"):  # the next thing that is wrong
        training.rl.run(allowed, ppo)


@pytest.mark.slow
def test_a_lora_merge_that_changes_nothing(tmp_path):
    """huggingface/peft#918, unslothai/unsloth#2009: the merged weights were those of the base
    model.

    Adapters that were trained, merged, saved and loaded: the text's log-probs are those of the
    adapters on their base, and not the base's.
    """
    base = gpt2_params()
    adapters = models.lora.init(jax.random.key(1), base, 2)
    optimizer = optax.sgd(1.0)
    tokens = np.random.default_rng(0).integers(0, 13, (2, 6))
    mask = np.ones_like(tokens)
    state, _ = jax.jit(partial(sft.update, optimizer=optimizer, config=sft.Config()))(
        TrainState.create(adapters, optimizer),
        Demonstrations(tokens, mask, mask * (np.arange(6) >= 1)),
        KEY,
        policy_fn=models.lora.bind(models.policy_fn(GPT2), base),
    )
    models.save(tmp_path, GPT2, models.lora.merge(base, state.params))
    _, merged = models.load(tmp_path)
    apply = jax.jit(GPT2.apply)
    trained = apply(models.lora.attach(base, state.params), tokens, mask)
    assert_allclose(apply(merged, tokens, mask), trained, atol=1e-3)
    assert np.abs(trained - apply(base, tokens, mask)).max() > 0.1


def test_the_number_of_minibatches_ignored():
    """bmazoure/ppo_jax#1: the loop over minibatches returned after the first, so an epoch was one
    of them.

    Eight rows start from eight different tokens, and each moves its own row of the policy's table:
    after one pass of four steps all have moved.
    """
    table = {"logits": jnp.zeros((9, 9)), "values": jnp.zeros(9)}
    tokens = np.stack([np.arange(8), np.full(8, 8)], axis=1)
    said = np.array([[0, 1]] * 8)
    numbers = said * np.arange(1.0, 9.0)[:, None]
    batch = Rollout(
        tokens,
        np.ones_like(tokens),
        said,
        -np.log(9.0) * said,
    )
    batch = batch.replace(rewards=numbers, values=0 * numbers)
    optimizer = optax.sgd(0.1)
    config = ppo.Config(num_epochs=1, num_minibatches=4, whiten_advantages=False)
    update = partial(ppo.update, policy_fn=policy_fn, optimizer=optimizer, config=config)
    state, _ = jax.jit(update)(TrainState.create(table, optimizer), batch, KEY)
    assert state.step == 4
    assert (np.abs(state.params["logits"][:8]).max(axis=1) > 0).all()


def test_gradients_summed_over_devices():
    """jax-ml/jax#3970: the gradient of a psum'd loss is as many times too large as there are
    devices; Adam hides it.

    One step of SGD, to which the scale matters, on one device and on four with unequal numbers of
    tokens.
    """
    optimizer = optax.sgd(0.3)
    made = tabular_rollout(0, [4, 1, 2, 0, 0, 0, 3, 4])
    batch = Demonstrations(made.tokens, made.attention_mask, made.response_mask)
    update = partial(sft.update, policy_fn=policy_fn, optimizer=optimizer, config=sft.Config())
    state = TrainState.create(policy_params(0), optimizer)
    one, _ = jax.jit(update)(state, batch, KEY)
    mapped = jax.shard_map(
        partial(update, axis_name="data"),
        mesh=sharding.make_mesh(4),
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
        check_vma=False,
    )
    four, _ = jax.jit(mapped)(state, batch, KEY)
    assert np.abs(one.params["logits"] - state.params["logits"]).max() > 0.01
    assert_close(four.params, one.params)
