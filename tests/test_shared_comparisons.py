"""Comparisons whose prompt is computed once for its answers: arrays by hand, and the losses,
gradients and runs of answers that are computed by themselves.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from builders import (
    CONFIG,
    LLAMA,
    MISTRAL,
    grid,
    initial_params,
    letters_run,
    metric_rows,
    run_stage,
    slow,
    some_params,
    stack_layers,
    with_rl,
)
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import dpo, grpo, models, ops, reward_model, sharding, training
from rlhf_jax.cli import verify
from rlhf_jax.config import Compute, DPOStage, Text
from rlhf_jax.data import batches, encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.models import attention, lora
from rlhf_jax.models.kernels import shared
from rlhf_jax.training.common import layout
from rlhf_jax.training.supervised import batching, scoring
from rlhf_jax.training.supervised import dpo as dpo_run
from rlhf_jax.training.supervised.batching import Batching
from rlhf_jax.training.supervised.job import Job
from rlhf_jax.types import Mean

TOKENIZER = characters("abcdefgh")  # ids: a..h are 2..9; 1 ends a response
PAIRS = encoding.encode_texts(
    [
        Row(prompt, tuple(answers), f"f, {prompt}")
        for prompt, *answers in map(str.split, ("ab c gg", "a bh d", "ccd d efg", "h a b"))
    ],
    TOKENIZER,
)
RANKED = encoding.encode_texts(  # the first row has an answer less, and it is its first one
    [
        Row("ab", ("c", "d", "ef"), "f, line 1", best=2),
        Row("a", ("b", "cd"), "f, line 2", weight=0.5),
        Row("hgf", ("b", "a", "cd"), "f, line 3", best=1),
    ],
    TOKENIZER,
)


def sharing(texts):
    return replace(texts, shares_prompts=True)


def test_a_batch_by_hand():
    batch = batches.comparison_batch(sharing(PAIRS), np.array([1, -1, 0]), 4)
    assert_array_equal(batch.tokens, grid("23915100", "00000000", "23418810"))
    assert_array_equal(batch.attention_mask, grid("12223300", "00000000", "11223330"))
    assert_array_equal(batch.response_mask, grid("01111100", "00000000", "00111110"))
    assert_array_equal(batch.documents, [[[2, 3]]] * 3)
    ranked = batches.comparison_batch(sharing(RANKED), np.array([0, 1]), 4)
    assert_array_equal(ranked.attention_mask, grid("112233444000", "122333000000"))
    assert_array_equal(ranked.best, [[2], [0]])
    assert_array_equal(ranked.weight, [[1.0], [0.5]])
    assert_array_equal(ranked.documents, [[[2, 3, 4]]] * 2)


def test_several_comparisons_in_a_row_by_hand():
    batch = batches.packed_comparisons(sharing(PAIRS), np.array([1, -1, 0]), width=16)
    assert_array_equal(batch.tokens, grid("2341881239151000"))
    assert_array_equal(batch.attention_mask, grid("1122333455566000"))
    assert_array_equal(batch.documents[0], grid("23", "56"))


def test_tokens_of_an_answer_that_do_not_count_are_those_of_single_texts():
    texts = replace(PAIRS, learned={(1, 0): np.array([True, False, True])})
    batch = batches.comparison_batch(sharing(texts), np.array([0]), 4)
    assert_array_equal(batch.response_mask, grid("00111010"))


def test_where_answers_stand_by_hand():
    @jax.jit
    def places(mask):
        found = shared.answers(mask, 2)
        return found.positions, found.previous[:, 1:]

    found, previous = places(grid("1122333455566000", "0011110000000000"))
    assert_array_equal(found, grid("0123234012312222", "0001234444444444"))
    assert_array_equal(previous[0], [0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 7, 11, 12, 13, 14])


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (None, ("1000000", "1100000", "1110000", "1111000", "1100100", "1100110", "0000000")),
        (2, ("1000000", "1100000", "0110000", "0011000", "0100100", "0000110", "0000000")),
    ],
)
def test_what_an_answer_sees_by_hand(window, expected):
    """A window counts the tokens of its own text."""

    @jax.jit
    def seen(mask):
        positions = shared.answers(mask, 2).positions
        return attention.visible(shared.seen_by_answers(mask, positions, 2, window))

    assert_array_equal(seen(grid("1122330"))[0, 0], grid(*expected))


def params_of(config, *heads):
    params = some_params(replace(config, scan_layers=False, remat=False))
    if config.scan_layers:
        params = stack_layers(params)
    for kind in heads:
        params = models.add_head(jax.random.key(3), params, kind)
    return params


def found(config, algorithm, texts, rows, rank=0, pack=False):
    """The loss with its metrics, and its gradient."""
    answers = texts.num_answers if texts.shares_prompts else 0
    model = models.build(config)
    params = params_of(config, *(("score",) if algorithm is reward_model else ()))
    make = models.score_fn if algorithm is reward_model else models.policy_fn
    fn = make(model, num_answers=answers)
    batch = batches.comparison_batch(texts, rows, 4)
    if pack:
        batch = batches.packed_comparisons(texts, rows, width=24)
    own = {"policy_fn": models.policy_fn(model, num_answers=answers)}
    settings = algorithm.Config(sft_coef=0.0 if rank else 0.5)
    if algorithm is reward_model:
        own["score_fn"] = fn
    reference = params
    if rank:
        adapters = lora.init(jax.random.key(1), params, rank)
        own = {name: lora.bind(of_params, params) for name, of_params in own.items()}
        params = jax.tree.map(lambda x: np.asarray(x) + 0.05, adapters)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def results(params, reference, batch):
        if algorithm is dpo:
            moved = jax.tree.map(lambda x: 0.9 * x, reference)
            batch = dpo.with_reference(batch, Partial(ops.by_rows(fn, None), moved))
        terms, metrics = algorithm.loss(params, batch, None, config=settings, **own)
        terms = [terms] if isinstance(terms, Mean) else terms
        return sum(term.value for term in terms), {
            name: metric.value for name, metric in metrics.items()
        }

    return results(params, reference, batch)


def assert_close(found, expected, tolerance=1e-5):
    found, expected = (map(np.asarray, jax.tree.leaves(tree)) for tree in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1.0))


WIDE = {"vocab_size": 10, "max_length": 16}
GPT2 = replace(CONFIG, **WIDE, num_layers=1)
SCANNED = replace(LLAMA, **WIDE, scan_layers=True, remat=True)
SLIDING = replace(MISTRAL, **WIDE)


@pytest.mark.parametrize(
    ("config", "algorithm", "texts", "rank", "pack"),
    [
        (GPT2, dpo, PAIRS, 0, False),
        (replace(LLAMA, **WIDE, num_layers=1), reward_model, RANKED, 2, True),
        slow(SCANNED, reward_model, RANKED, 2, True),
        slow(SLIDING, dpo, PAIRS, 2, True),
        slow(replace(SLIDING, attention="blockwise"), reward_model, PAIRS, 0, False),
    ],
)
def test_loss_and_gradient_are_those_of_single_texts(
    config, algorithm, texts, rank, pack, monkeypatch
):
    monkeypatch.setattr("rlhf_jax.models.attention.BLOCK_SCORES", 24)
    rows = np.array([2, -1, 0, 1])
    expected = found(config, algorithm, texts, rows, rank)
    together = found(config, algorithm, sharing(texts), rows, rank, pack)
    assert_close(together, expected)
    (loss, _), _ = expected
    assert loss > 0.1


def test_a_prompt_goes_through_the_layers_once():
    """By the compiled program's own count: 12 columns in place of two rows of 12."""
    row = Row("abcdefgh", ("a", "b"), "f")
    long = encoding.encode_texts([row] * 4, TOKENIZER)

    def flops(texts):
        answers = texts.num_answers if texts.shares_prompts else 0
        fn = models.policy_fn(models.build(GPT2), num_answers=answers)
        batch = batches.comparison_batch(texts, np.arange(4), 4)
        log_probs = jax.jit(partial(ops.response_log_probs, fn))
        return log_probs.lower(params_of(GPT2), batch).compile().cost_analysis()["flops"]

    assert flops(sharing(long)) < 0.6 * flops(long)


def columns(number, texts):
    return Batching(texts, None, None, 1, number)


@pytest.mark.parametrize(
    ("wanted", "alone", "together", "shares"),
    [
        ("auto", 100, 90, True),
        ("auto", 100, 91, False),
        (True, 100, 120, True),
        (False, 100, 10, False),
    ],
)
def test_who_shares(wanted, alone, together, shares, capsys):
    def batched(texts):
        return columns(together if texts.shares_prompts else alone, texts)

    chosen = batching.choose_form(wanted, PAIRS, batched)
    assert chosen.encoded.shares_prompts is shares
    said = capsys.readouterr().out
    assert (f"share_prompts {shares}".lower() in said) == (wanted is not False)
    assert (f"saves {1 - together / alone:.0%}" in said) == (wanted is not False)


def test_answers_without_a_prompt_share_nothing():
    texts = replace(PAIRS, starts=np.where(np.arange(4)[:, None] == 1, 0, PAIRS.starts))
    batched = partial(columns, 100)
    assert not batching.choose_form("auto", texts, batched).encoded.shares_prompts
    with pytest.raises(UserError, match=r"share_prompts.*prompt without a token"):
        batching.choose_form(True, texts, batched)
    one = encoding.encode_texts([Row("a", ("b",), "f")], TOKENIZER)
    alone = batching.choose_form(True, one, batched)
    assert not alone.encoded.shares_prompts


def test_packing_is_compared_with_packing():
    """Texts of 2 + 2 + 3, 1 + 3 + 2, 3 + 2 + 4 and 1 + 2 + 2 tokens, in rows of 9 or 12."""
    plan = batches.Plan(PAIRS.longest, 4, jax.random.key(0), 1)
    packed = batches.packing(PAIRS, np.arange(4), plan, 1)
    assert (packed.width, packed.columns) == (12, 48)
    plan = batches.Plan(sharing(PAIRS).longest, 4, jax.random.key(0), 1)
    packed = batches.packing(sharing(PAIRS), np.arange(4), plan, 1)
    assert (packed.width, packed.columns) == (9, 36)
    assert batches.widths(PAIRS, np.arange(4), plan, 1) == [7]
    assert batches.widths(sharing(PAIRS), np.arange(4), plan, 1) == [9]


@pytest.mark.parametrize("layers", [1, 8])
@pytest.mark.parametrize("pack", [False, True])
def test_the_form_of_batches_does_not_decide_which_rows_meet(pack, layers):
    """Sixty pairs, of which the row with the longest text is seldom the longest row."""
    random = np.random.default_rng(0)
    sizes = random.integers(1, 76, (60, 3))
    texts = [Row("a" * p, ("b" * m, "c" * n), "f") for p, m, n in sizes.tolist()]
    encoded = encoding.encode_texts(texts, TOKENIZER)
    assert np.any(np.argsort(encoded.longest) != np.argsort(sharing(encoded).longest))

    def formed(texts):
        return batching.form_batches(
            texts,
            task=dpo_run.TASK,
            settings=DPOStage(batch_size=4),
            text=Text(pack=pack, bucket_multiple=8),
            num_parts=1,
            rows=np.arange(60),
            key=jax.random.key(0),
            layers=layers,
        )

    alone, together = formed(encoded), formed(sharing(encoded))
    for step in range(30):
        rows = alone.plan.rows(step)
        assert_array_equal(rows, together.plan.rows(step))
        for each in (alone, together):
            learned = np.sum(each.collate(each.encoded, rows).response_mask)
            assert learned == np.sum(encoded.response_lengths[rows])


@pytest.mark.parametrize(("pack", "largest"), [(False, 10), (True, 11)])
def test_the_largest_batch_is_found_without_making_all(pack, largest):
    """Step 10 has the longest text, step 11 most tokens."""
    longest, totals = np.array([(6, 10)] * 9 + [(9, 10), (6, 12), (6, 10)]).T
    job = SimpleNamespace(
        plan=SimpleNamespace(steps_per_epoch=12),
        encoded=SimpleNamespace(longest=longest, totals=totals),
        source=SimpleNamespace(text=Text(pack=pack)),
        step_rows=lambda step: np.array([step - 1, -1]),
        batch=lambda rows: SimpleNamespace(
            rows=rows, tokens=np.zeros((totals if pack else longest)[rows[0]])
        ),
    )
    assert Job.largest_batch(job).rows[0] == largest - 1


@pytest.mark.parametrize("members", [1, slow(2)])
def test_scores_are_those_of_single_texts(members):
    model = models.build(GPT2)
    params = params_of(GPT2, "score")
    if members > 1:
        params = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)

    def scores(texts):
        answers = texts.num_answers if texts.shares_prompts else 0
        score_fn = models.score_fn(model, num_answers=answers)
        score = scoring.answer_scorer(score_fn, members)
        rows = np.array([2, 0, 1])
        sizes = {"batch_size": 2, "bucket_multiple": 4}
        return scoring.score_rows(partial(score, params), texts, rows, **sizes)

    alone = scores(RANKED)
    together = scores(sharing(RANKED))
    assert together.shape == alone.shape
    is_there = RANKED.response_lengths[[2, 0, 1]] > 0
    assert_allclose(together[is_there], alone[is_there], atol=1e-5)


@pytest.fixture
def config(tmp_path):
    return letters_run(tmp_path)


def of(run, share, folder, **changes):
    compute = replace(run.compute, share_prompts=share)
    return replace(run, compute=compute, output_dir=str(folder), **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "pack"), [("dpo", False), ("reward_model", True)])
def test_a_run_that_shares_learns_the_same(stage, pack, config, tmp_path):
    run = getattr(training, stage).run
    text = Text(bucket_multiple=16, pack=pack)
    alone = run(of(config, False, tmp_path / "alone", text=text)).folder
    second = run(of(config, True if pack else "auto", tmp_path / "shared", text=text)).folder
    recorded = yaml.safe_load((second / "config.yaml").read_text())
    assert recorded["compute"]["share_prompts"] is True
    rows = zip(metric_rows(alone), metric_rows(second), strict=True)
    for expected, found in rows:
        names = [name for name in expected if "/" in name or name in ("loss", "grad_norm")]
        for name in names:
            if not name.endswith(("/padding", "seconds")):
                assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("name", [pytest.param("dpo", marks=pytest.mark.soak), slow("grpo")])
def test_a_run_that_shares_has_the_same_bytes_on_one_device_and_four(
    name, config, tmp_path, monkeypatch
):
    """In blocks, verified from its seed."""
    compute = Compute(blocks=4, share_prompts=True)
    settings = replace(config, compute=compute, reward=("count:e",), output_dir=str(tmp_path / "r"))
    settings = with_rl(settings, batch_size=8, num_iterations=2, max_new_tokens=4)
    settings = replace(settings, grpo=grpo.Config(group_size=2, shuffle_blocks=4))
    folder = run_stage(settings, name)
    monkeypatch.setattr(layout, "mesh_of", lambda config: sharding.make_mesh(1))
    audit = verify.verify(folder, from_scratch=True, trust_config=True)
    assert audit.differences == []
    assert audit.compared.endswith("model/")


CUT = models.LlamaConfig(
    vocab_size=10,
    max_length=16,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=32,
    initializer_range=0.2,
)


def summed(policy_fn, params, tokens, mask, counted):
    log_probs = policy_fn(params, tokens, mask, None).log_probs
    return jnp.sum(jnp.where(counted, log_probs, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "groups"),
    [({"data": 2, "fsdp": 2}, True), ({"data": 1, "tensor": 2, "fsdp": 2}, False)],
)
def test_gradients_are_the_same_on_a_mesh(sizes, groups):
    """Of the answers of comparisons in a row, and of groups of adjacent rows."""
    model = models.build(CUT)
    params = initial_params(model)
    random = np.random.default_rng(0)
    if groups:
        policy_fn = models.policy_fn(model, prompt_length=6, group_size=2)
        tokens = random.integers(2, 10, (8, 10))
        tokens[1::2, :6] = tokens[::2, :6]
        mask = np.ones_like(tokens)
        counted = np.arange(10)[None] >= 6 + 0 * tokens
    else:
        policy_fn = models.policy_fn(model, num_answers=2)
        batch = batches.comparison_batch(sharing(PAIRS), np.arange(4), 4)
        tokens = batch.tokens
        mask = batch.attention_mask
        counted = batch.response_mask != 0
    gradient = jax.jit(jax.grad(partial(summed, policy_fn)))
    expected = gradient(params, tokens, mask, counted)
    mesh = sharding.make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(sharding.place, params, layout.shardings(mesh, params))
        inputs = sharding.shard_rows(mesh, (tokens, mask, counted))
        cut = jax.jit(jax.grad(partial(summed, policy_fn)))(placed, *inputs)
    assert_close(cut, expected)
