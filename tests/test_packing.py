"""Packed demonstrations and comparisons: arrays by hand, losses and gradients of padded ones, and
runs.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import grid, initial_params, letters_run, metric_rows, slow, stopped_goes_on_alike
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import TrainState, dpo, models, reward_model, sft, sharding, training
from rlhf_jax.config import KTOStage, Optimizer, SFTStage, Text
from rlhf_jax.data import batches, encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.training.common.layout import layout_of, row_parts
from rlhf_jax.training.supervised import batching, ensembles
from rlhf_jax.types import PolicyOutput

KEY = jax.random.key(7)
TOKENIZER = characters("abcdefgh")  # ids: a..h are 2..9
TEXTS = ("ab cd", "a b", "abc defgh", "h gf", "bb a", "c d")  # 5, 3, 9, 4, 4, 3 tokens with EOS
ENCODED = encoding.encode_texts(
    [Row(prompt, (text,), "f") for prompt, text in map(str.split, TEXTS)], TOKENIZER
)
equal = assert_array_equal
SIZES = {"vocab_size": 10, "max_length": 16, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
MODELS = {
    "gpt2": models.GPT2Config(**SIZES, initializer_range=0.3),
    "llama": models.LlamaConfig(
        **SIZES, intermediate_size=8, num_kv_heads=1, initializer_range=0.3
    ),
}


def test_a_packed_batch_by_hand():
    batch = batches.packed_batch(ENCODED, np.array([1, -1, 0]), width=8, multiple=2)
    equal(batch.tokens, grid("23451 231", "00000 000"))
    equal(batch.attention_mask, grid("11111 222", "00000 000"))
    equal(batch.response_mask, grid("00111 011", "00000 000"))
    assert (type(batch.tokens), batch.tokens.dtype) == (np.ndarray, np.int32)
    assert batches.packed_batch(ENCODED, np.arange(6), width=9).tokens.shape == (4, 9)


def test_first_fit_puts_the_longest_first():
    """Texts of 9, 5, 4, 4, 3 and 3 tokens: number, row, first column."""
    places = grid(
        "200",
        "010",
        "315",
        "420",
        "124",
        "530",
    )
    lengths = np.array([5, 3, 9, 4, 4, 3])
    assert batches.first_fit(lengths, 9) == list(map(tuple, places.tolist()))
    assert batches.first_fit(lengths[:0], 9) == []


@pytest.mark.parametrize("name", [slow("gpt2"), "llama"])
def test_loss_and_gradient_are_those_of_padded_rows(name):
    """And a wrong boundary is seen: documents that run into one another have another loss."""
    model = models.build(MODELS[name])
    params = initial_params(model)

    @jax.jit
    @jax.value_and_grad
    def results(params, batch):
        policy_fn = models.policy_fn(model)
        loss, _ = sft.loss(
            params,
            batch,
            None,
            policy_fn=policy_fn,
            config=sft.Config(),
        )
        return loss.value

    rows = np.array([5, 3, -1, 0, 2, 1, 4])
    packed = batches.packed_batch(ENCODED, rows, width=12)
    assert packed.tokens.shape == (3, 12)
    expected = results(params, batches.demonstration_batch(ENCODED, rows, 4))
    jax.tree.map(partial(assert_allclose, atol=1e-6), results(params, packed), expected)
    joined = replace(packed, attention_mask=np.minimum(packed.attention_mask, 1))
    assert abs(results(params, joined)[0] - expected[0]) > 1e-3


WORDS = ("ab c gg", "a bh d", "cc d efg", "h h a", "e fed b")
PAIRS = encoding.encode_texts(
    [Row(x, tuple(answers), f"f, {x}") for x, *answers in map(str.split, WORDS)], TOKENIZER
)
RANKED = encoding.encode_texts(  # a row with an answer less, another best one, weights
    [
        Row("ab", ("c", "d", "ef"), "f, line 1", best=2),
        Row("a", ("b", "cd"), "f, line 2", weight=0.5),
    ],
    TOKENIZER,
)
SCORED = encoding.encode_texts(
    [
        Row("ab", ("c", "d"), "f, line 1", targets=(0.5, -1.0)),
        Row("a", ("b",), "f, line 2", targets=(2.0,)),
    ],
    TOKENIZER,
)
TABLE = {"table": jnp.arange(10) / -10.0}


def table_policy(
    params,
    tokens,
    attention_mask,
    key,
):
    log_probs = params["table"][tokens]
    return PolicyOutput(log_probs, log_probs)


def table_score(
    params,
    tokens,
    attention_mask,
    key,
    documents=None,
):
    """The sum over the tokens of a text, negative."""
    own = attention_mask[:, None] == (
        jnp.ones((len(tokens), 1, 1)) if documents is None else documents[..., None]
    )
    scores = jnp.sum(jnp.where(own, params["table"][tokens][:, None], 0.0), axis=2)
    return scores[:, 0] if documents is None else scores


def test_packed_comparisons_by_hand():
    """Pairs of 7 and 9 tokens in a row of 16; a second row for a second device."""
    batch = batches.packed_comparisons(PAIRS, np.array([1, -1, 0]), width=16, multiple=2)
    equal(batch.tokens, grid("2341 23881 2391 251", "0" * 16))
    equal(batch.attention_mask, grid("1111 22222 3333 444", "0" * 16))
    equal(batch.response_mask, grid("0011 00111 0111 011", "0" * 16))
    equal(batch.documents, [grid("12", "34")] * 2)
    assert (batch.best, batch.targets, batch.weight) == (None, None, None)


def test_labels_go_with_their_rows_and_rows_without_comparisons_count_nowhere():
    batch = batches.packed_comparisons(RANKED, np.array([1, 0]), width=16, multiple=2)
    equal(batch.attention_mask, grid("1111 2222 33333 000", "111 2222 000000000"))
    equal(batch.documents, [grid("123")] * 2)
    equal(batch.best, [[2], [0]])
    equal(batch.weight, [[1.0], [0.5]])
    batch = batches.packed_comparisons(SCORED, np.array([-1, 1, 0]), width=16, multiple=2)
    equal(batch.attention_mask, grid("1111 2222 333 00000", "0" * 16))
    equal(batch.documents, [grid("12", "34")] * 2)
    equal(batch.targets, [[[0.5, -1.0], [2.0, 0.0]], np.zeros((2, 2))])


def language_model(name, kind):
    """The PolicyFn or ScoreFn of a tiny model, and parameters."""
    model = models.build(MODELS[name])
    params = initial_params(model)
    return (
        (models.policy_fn(model), params)
        if kind == "dpo"
        else (models.score_fn(model), scored(params))
    )


def scored(params):
    return models.add_head(jax.random.key(1), params, "score")


CASES = {
    "reward model": (
        reward_model,
        reward_model.Config(centering=0.1),
        PAIRS,
        language_model("gpt2", "reward_model"),
    ),
    "dpo": (dpo, dpo.Config(), PAIRS, language_model("llama", "dpo")),
    "dpo by length": (dpo, dpo.Config(kind="simpo", beta=2.0), PAIRS, (table_policy, TABLE)),
    "rankings": (reward_model, reward_model.Config(), RANKED, (table_score, TABLE)),
    "targets": (reward_model, reward_model.Config(), SCORED, (table_score, TABLE)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_padded_comparisons(case):
    """And answers in each other's place, or rows' labels, are seen."""
    algorithm, settings, texts, (fn, params) = CASES[case]
    own = {("score_fn" if algorithm is reward_model else "policy_fn"): fn, "config": settings}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def results(params, batch):
        if algorithm is dpo:
            batch = dpo.with_reference(batch, jax.tree_util.Partial(table_policy, TABLE))
        loss, metrics = algorithm.loss(params, batch, None, **own)
        return loss.value, {name: metric.value for name, metric in metrics.items()}

    rows = np.random.default_rng(1).permutation([*range(len(texts)), -1])
    padded = batches.comparison_batch(texts, rows, 4)
    packed = batches.packed_comparisons(texts, rows, width=16)
    assert packed.tokens.size < padded.tokens.size
    expected = results(params, padded)
    jax.tree.map(partial(assert_allclose, atol=1e-6), results(params, packed), expected)
    (wrong, _), _ = results(params, packed.replace(documents=np.roll(packed.documents, 1, axis=2)))
    assert abs(wrong - expected[0][0]) > 1e-3


@pytest.mark.parametrize("members", [1, 3])
def test_an_update_does_not_depend_on_packing_devices_or_microbatches(members):
    """Of an ensemble too, whose members weigh the rows."""
    weight = np.random.default_rng(2).poisson(1.0, (5, members)) + 0.5
    weighted = replace(PAIRS, weight=np.squeeze(weight, 1) if members == 1 else weight)
    state = TrainState.create(TABLE, optax.sgd(1.0))
    state = state if members == 1 else ensembles.create([TABLE] * members, optax.sgd(1.0))
    own = {"score_fn": table_score, "optimizer": optax.sgd(1.0)}
    update = reward_model.update if members == 1 else ensembles.update_members

    @partial(jax.jit, static_argnames="parts")
    def step(batch, parts):
        return update(
            state,
            batch,
            KEY,
            **own,
            config=reward_model.Config(num_microbatches=parts),
        )[0].params["table"]

    rows = np.array([4, 2, -1, 1, 0, 3])
    packed = batches.packed_comparisons(weighted, rows, width=10, multiple=8)
    assert packed.tokens.shape == (8, 10)
    padded = step(batches.comparison_batch(weighted, rows, 4), 1)
    assert_allclose(step(sharding.shard_rows(sharding.make_mesh(), packed), 2), padded, atol=1e-6)
    moved = np.asarray(padded) - np.asarray(TABLE["table"])[None][: padded.ndim]
    assert np.abs(moved).max() > 0.1
    assert members == 1 or np.ptp(padded, axis=0).max() > 0.01


def test_packing_keeps_the_rows_of_an_epoch_and_few_shapes():
    lengths = np.arange(600) * 7 % 29 + 4
    texts = replace(
        ENCODED,
        tokens=[[np.zeros(n, np.int32) for n in lengths]],
        starts=np.zeros((600, 1), np.int64),
        sources=["f"] * 600,
    )
    plan = batches.Plan(lengths, 60, KEY, 8)
    mixed, width, multiple, before, after, columns = batches.packing(texts, np.arange(600), plan, 2)
    assert columns == 32 * sum((32, 36, 40)) or columns
    assert (width, multiple) == (32, 4)  # an eighth of some 38 rows
    rows = [mixed.rows(step) for step in range(10)]
    assert sorted(np.concatenate(rows)) == list(range(600))
    sizes = [
        len(batches.packed_batch(texts, own, width=width, multiple=multiple).tokens) for own in rows
    ]
    assert set(sizes) == {32, 36, 40}
    assert after == pytest.approx(1 - lengths.sum() / (32 * sum(sizes)))
    widths = [batches.width_of(texts, plan.rows(step), bucket_multiple=8) for step in range(10)]
    assert before == pytest.approx(1 - lengths.sum() / (60 * sum(widths)))
    short = replace(ENCODED, max_length=10)
    plan = batches.Plan(short.lengths[:, 0], 6, KEY, 4)
    assert batches.packing(short, np.arange(6), plan, 1)[1] == 10  # no text is longer


def batching_of(config, task, encoded, **how):
    settings = getattr(config, task.section)
    parts = row_parts(layout_of(config), settings.num_microbatches)
    how |= {"task": task, "settings": settings, "text": config.text, "num_parts": parts}
    return batching.form_batches(encoded, **how)


@pytest.mark.parametrize("pack", [False, True])
def test_the_columns_of_an_epoch_are_those_of_its_batches(pack, config):
    own = replace(config.dpo, batch_size=4)
    config = replace(config, text=Text(pack=pack, bucket_multiple=4), dpo=own)
    train = np.arange(1, 5)
    made = batching_of(config, training.dpo.TASK, PAIRS, rows=train, key=KEY, layers=1)
    batch = made.collate(PAIRS, train[made.plan.rows(0)])
    assert made.columns == batch.tokens.size


@pytest.mark.parametrize("stage", ["dpo", "reward_model"])
def test_a_stage_packs_the_rows_of_its_step(stage, config):
    """Pairs of rows 1, ..., 4; each is found again behind its numbers, in another order in each
    epoch.
    """
    own = replace(getattr(config, stage), batch_size=4)
    config = replace(config, text=Text(pack=True, bucket_multiple=4), **{stage: own})
    train = np.arange(1, 5)
    task = getattr(training, stage).TASK
    plan, again = (
        batching_of(config, task, PAIRS, rows=train, key=KEY, layers=1) for _ in range(2)
    )
    # Padded: 8 texts of 8 columns. Packed: 31 tokens in 4 rows, one for each device, of the longest
    # pair's 10 columns.
    said = "text.pack: 35% of rows [12] are padding, 52% of rows that are not packed"
    assert plan.line == said
    seen = []
    for step in range(6):
        rows = train[plan.plan.rows(step)]
        equal(rows, train[again.plan.rows(step)])
        batch = plan.collate(PAIRS, rows)
        assert batch.tokens.shape == (4, 12)
        found = set()
        for tokens, mask, documents in zip(
            batch.tokens, batch.attention_mask, batch.documents, strict=True
        ):
            texts = [tokens[mask == number].tobytes() for number in documents.flat]
            found |= set(zip(texts[::2], texts[1::2], strict=True))
        pairs = {(PAIRS.tokens[0][row].tobytes(), PAIRS.tokens[1][row].tobytes()) for row in rows}
        assert found - {(b"", b"")} == pairs
        seen.append(tuple(rows))
    assert len(set(seen)) > 1


ENSEMBLE = pytest.param("reward_model", {"ensemble_size": 2}, marks=pytest.mark.soak)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "own"), [("dpo", {}), ENSEMBLE])
def test_a_run_with_packing_is_a_run_without(stage, own, tmp_path):
    """One batch holds all pairs, so that the losses of the steps are the same."""
    config = letters_run(tmp_path)
    settings = replace(
        getattr(config, stage),
        batch_size=16,
        num_epochs=3,
        optimizer=Optimizer(1e-3),
        validation_fraction=0.0,
        **own,
    )
    found = []
    for pack in (False, True):
        where = {
            "output_dir": str(tmp_path / f"{pack}"),
            "text": Text(bucket_multiple=16, pack=pack),
        }
        run = getattr(training, stage).run(replace(config, **where, **{stage: settings}))
        rows = metric_rows(run.folder)
        found.append([row for row in rows if f"{stage}/loss" in row])
    for name in (f"{stage}/loss", f"{stage}/margin", "grad_norm"):
        padded, packed = ([row[name] for row in rows] for rows in found)
        assert packed == pytest.approx(padded, rel=1e-6, abs=1e-6)
        assert len(set(padded)) == 3
    assert all(0 < row[f"{stage}/padding"] < 0.5 for row in found[1])


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_a_packed_run_resumes_to_the_same_bytes(stage, config):
    config = replace(config, text=Text(bucket_multiple=16, pack=True))
    run = getattr(training, stage).run
    straight = run(config)
    stopped = stopped_goes_on_alike(run, config, straight, 6)
    rows = metric_rows(stopped.folder)
    assert all(0 < row[f"{stage}/padding"] < 0.6 for row in rows if f"{stage}/loss" in row)


@pytest.mark.parametrize(
    ("stage", "own", "message"),
    [
        ("sft", SFTStage(aggregate="sequence"), "sft.aggregate must be token, got sequence"),
        ("kto", KTOStage(), "kto joins each prompt with the next row's answer and cannot pack"),
    ],
)
def test_what_cannot_be_packed_is_said_before_data_is_read(
    stage,
    own,
    message,
    config,
):
    config = replace(config, data=("nothing.json",), text=Text(pack=True), **{stage: own})
    with pytest.raises(UserError, match=f"^text.pack: {message}"):
        getattr(training, stage).run(config)
