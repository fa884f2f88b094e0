"""KTO: mismatched rows by hand, the reference point, and the data it is trained on."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tabular import assert_close, numbers, policy_fn, policy_params

from rlhf_jax import kto
from rlhf_jax.data import batches, check, encoding, formats
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.types import Feedback, PolicyOutput, TrainState

TOKENIZER = characters("abcdefgh")  # ids: a..h are 2..9, EOS is 1
FEEDBACK = [
    {"prompt": "abc", "response": "d", "desirable": True},
    {"prompt": "a", "response": "defgh", "desirable": False},
]


@pytest.fixture
def read(tmp_path):
    def read(*records, **options):
        file = tmp_path / "feedback.jsonl"
        file.write_text("\n".join(map(json.dumps, records)))
        return formats.read("feedback", file, **options).rows

    return read


def mismatched(feedback):
    return jax.tree.map(np.asarray, jax.jit(kto.mismatched)(feedback))


def encoded(rows, **options):
    return encoding.encode_texts(rows, TOKENIZER, **options)


def test_each_prompt_is_followed_by_the_next_rows_response():
    tokens = np.array(
        [[1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 0, 0], [9, 9, 9, 9, 9, 9], [0, 1, 2, 3, 3, 3]]
    )
    response = np.array(
        [[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1]]
    )
    real = np.array(
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]]
    )
    rows = mismatched(Feedback(tokens, real, response, np.ones(4, bool)))
    assert_array_equal(rows.tokens[0], [1, 2, 6, 7, 8, 0])
    assert_array_equal(rows.response_mask, [[0, 0, 1, 1, 1, 0], *[[0] * 6] * 2, [0, 0, 0, 1, 1, 0]])
    assert_array_equal(rows.attention_mask[[0, 3]], [[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]])
    assert_array_equal(rows.tokens[3], [0, 1, 2, 3, 4, 0])  # after the last row comes the first


def test_the_reference_point_is_the_mean_over_present_rows_and_never_negative():
    rows = Feedback(*np.ones((3, 4, 2), np.int32), desirable=np.ones(4, bool))
    output = jax.jit(policy_fn)(policy_params(0), rows.tokens, None, None)
    ref = np.asarray(output.log_probs)[:, 1]
    mask = np.array([[0, 1], [0, 1], [0, 1], [0, 0]])
    reference_point = jax.jit(functools.partial(kto.reference_point, policy_fn=policy_fn))
    for gap, expected in (([1.0, 2.0, 6.0, 99.0], 3.0), ([-1.0, -2.0, 1.0, 99.0], 0.0)):
        others = rows.replace(response_mask=mask, ref_log_probs=ref - np.float32(gap))
        found = reference_point(policy_params(0), rows.replace(mismatched=others))
        assert_allclose(found, [expected] * 4, rtol=1e-5)


# Of TRL 1.13 (PYTHONPATH=trl-1.13.0), the last version with BCO, in float64: the mean of
#   BCOTrainer.bco_loss(SimpleNamespace(beta=0.3, running=RunningMoments(accelerator),
#       match_underlying_distribution=False), policy[:4], policy[4:], ref[:4], ref[4:], None, None)
# for a first batch, whose running mean is its own; delta; and the gradient by the log-probs.
BCO = 0.753006157554919
BCO_DELTA = 0.04066614434123039
BCO_GRADIENT = [
    -0.024394453650920092,
    -0.029404467676425676,
    -0.020223794486646546,
    -0.029640636283231936,
    0.025059227758903277,
    0.028619837951028845,
]


def rows_of(params, tokens, attention_mask, key):
    """The policy whose log-probs are its parameters, those of one row if it is asked for one."""
    rows = params[tokens[:, 0]]
    return PolicyOutput(rows, jnp.zeros(rows.shape))


def classified():
    """Six rows of three response tokens, the first four desirable; column 0 says which row it
    is."""
    places = np.arange(24.0).reshape(2, 4, 3)
    policy = np.concatenate(-1.5 + np.sin(3 * places + 1))[:6]
    reference = np.concatenate(-1.5 + np.cos(5 * places))[:6]
    tokens = np.pad(np.arange(6)[:, None], ((0, 0), (0, 3))).astype(np.int32)
    mask = np.ones_like(tokens)
    feedback = Feedback(tokens, mask, mask * (np.arange(4) > 0), np.arange(6) < 4)
    feedback = feedback.replace(ref_log_probs=np.float32(reference.sum(axis=1)))
    return np.float32(np.pad(policy, ((0, 0), (1, 0)))), feedback


def test_bco_is_trls():
    policy, feedback = classified()
    config = kto.Config(kind="bco", beta=0.3)
    loss = functools.partial(numbers(kto.loss), policy_fn=rows_of, config=config)
    found = jax.jit(jax.value_and_grad(lambda params: loss(params, feedback, None), has_aux=True))
    (value, metrics), gradient = found(policy)
    assert_allclose(value, BCO, rtol=1e-6)
    assert_allclose(0.3 * metrics["kto/reference_point"], BCO_DELTA, rtol=1e-5)
    by_row = np.array(BCO_GRADIENT)[:, None]
    assert_allclose(gradient[:, 1:], np.repeat(by_row, 3, axis=1), atol=1e-6)
    assert_allclose(gradient[:, 0], 0)


def test_the_shift_of_bco_is_that_of_the_whole_batch():
    """Also in microbatches; a missing row has no share in it."""
    policy, feedback = classified()
    missing = feedback.response_mask * (np.arange(6) != 2)[:, None]
    feedback = feedback.replace(response_mask=missing)
    steps = []
    for parts in (1, 3):
        config = kto.Config(kind="bco", num_microbatches=parts)
        update = jax.jit(
            functools.partial(
                kto.update, policy_fn=rows_of, optimizer=optax.sgd(1.0), config=config
            )
        )
        state = TrainState.create(jnp.asarray(policy), optax.sgd(1.0))
        after, metrics = update(state, feedback, None)
        steps.append((after.params, metrics["kto/reference_point"], metrics["kto/loss"]))
    assert_close(*steps)
    moved = policy[:, 1:].sum(axis=1) - feedback.ref_log_probs
    assert_allclose(steps[0][1], np.mean(np.delete(moved, 2)), rtol=1e-5)


def test_a_batch_leaves_room_for_the_next_response():
    """Prompts of 3 and 1 tokens, responses of 2 and 6 with EOS: the first prompt and the second
    response are 9.
    """

    def batch(rows, **options):
        return batches.feedback_batch(
            encoded(rows, **options), np.array([0, 1, -1]), bucket_multiple=1
        )

    rows = [formats.parse("feedback", record, None)[0] for record in map(record_of, FEEDBACK)]
    made = batch(rows)
    assert made.tokens.shape == (3, 9)
    assert batch(rows, max_length=8).tokens.shape == (3, 8)
    assert made.desirable.tolist() == [True, False, False]
    assert made.weight.tolist() == [1, 1, 0]
    assert_array_equal(made.response_mask.sum(axis=1), [2, 6, 0])
    others = mismatched(made)
    assert_array_equal(others.tokens[0], [2, 3, 4, 5, 6, 7, 8, 9, 1])
    assert_array_equal(others.response_mask.sum(axis=1), [6, 0, 0])


def record_of(value):
    return formats.Record(value, "f, line 1")


def test_feedback_is_read_from_rows_of_its_own_and_from_preferences(read, tmp_path):
    assert [(row.responses, row.targets) for row in read(*FEEDBACK)] == [
        (("d",), (1.0,)),
        (("defgh",), (0.0,)),
    ]
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    ranked = {"prompt": "p", "responses": ["x", "y", "z"]}
    rows = read(pair, ranked | {"ranking": [2, 0, 1]})
    assert [(row.responses[0], row.targets[0], row.weight) for row in rows[:2]] == [
        ("x", 1.0, None),
        ("y", 0.0, None),
    ]
    assert [row.responses[0] + "-+"[int(row.targets[0])] for row in rows[2:]] == [
        "x+",
        "y-",
        "z+",
        "x-",
        "z+",
        "y-",
    ]
    assert {row.weight for row in rows[2:]} == {1 / 3}
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
    assert read({"messages": messages, "desirable": True})[0].responses == ("v",)
    report = check.check([str(tmp_path / "feedback.jsonl")])
    assert (report.num_problems, "1 feedback kept" in report.text) == (0, True), report.text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            FEEDBACK[0] | {"desirable": 2},
            "'desirable' must be true or false, or 1 or 0, found the number 2",
        ),
        ({"prompt": "a", "response": "b"}, "expected keys desirable, found prompt, response"),
        (
            {"prompt": "a", "desirable": True},
            "expected keys prompt, response, found prompt, desirable",
        ),
    ],
)
def test_a_wrong_row_is_named(record, message, read):
    with pytest.raises(UserError, match=f"line 1: {message}"):
        read(record)
