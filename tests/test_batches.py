"""Encoding and batches: hand-made arrays, every row once an epoch, and any step without the steps
before it.
"""

import jax
import numpy as np
import pytest
from builders import grid
from numpy.testing import assert_array_equal

from rlhf_jax.data import batches, encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError

KEY = jax.random.key(7)
TOKENIZER = characters("abcdefgh{}")  # ids: a..h are 2..9
ROWS = [Row("ab", ("cd",), "f, line 1"), Row("a", ("b",), "f, line 2")]
PAIRS = [
    Row(row[0], row[1:], f"f, line {i}")
    for i, row in enumerate([("ab", "c", "de"), ("a", "bcdef", "bcdeg")], 1)
]
PROMPTS = [
    Row("ab", (), "f, line 1", columns={"topic": "x"}),
    Row("c", (), "f, line 2", columns={"level": 2}),
]
equal = assert_array_equal


def demonstrations(**settings):
    return encoding.encode_texts(ROWS, TOKENIZER, **settings)


def comparisons(rows=PAIRS, **settings):
    return encoding.encode_texts(rows, TOKENIZER, **settings)


def prompts(rows=PROMPTS, **settings):
    return encoding.encode_prompts(rows, TOKENIZER, **settings)


def test_demonstration_batch_by_hand():
    batch = batches.demonstration_batch(demonstrations(), np.array([0, -1, 1]), bucket_multiple=4)
    equal(batch.tokens, grid("2345 1000", "0000 0000", "2310 0000"))
    equal(batch.attention_mask, grid("1111 1000", "0000 0000", "1110 0000"))
    equal(batch.response_mask, grid("0011 1000", "0000 0000", "0110 0000"))
    assert (type(batch.tokens), batch.tokens.dtype) == (np.ndarray, np.int32)


def test_template_is_text_not_a_format():
    data = prompts([Row("{a}", (), "f, line 1")], template="{}{prompt}b")
    assert TOKENIZER.decode(data.tokens[0]) == "{}{a}b"


def test_too_long_texts():
    dropped = demonstrations(max_length=4, too_long="drop")
    assert (dropped.sources, dropped.counts) == (["f, line 2"], {"dropped, too long": 1})
    cut = demonstrations(max_length=4, too_long="truncate")
    assert cut.counts == {"response cut, its EOS with it": 1}
    equal(cut.tokens[0][0], [2, 3, 4, 5])
    # Never wider than max_length.
    assert batches.demonstration_batch(cut, np.array([0])).tokens.shape == (1, 4)
    none_left = demonstrations(max_length=2, too_long="truncate")
    assert none_left.counts == {encoding.NO_ROOM: 1, encoding.CUT: 1}


@pytest.mark.parametrize(
    ("encode", "limits", "message"),
    [
        (
            demonstrations,
            {"max_length": 4},
            "f, line 1: a prompt of 2 and a response of 3 .* are more than max_length 4",
        ),
        (
            demonstrations,
            {"max_length": 1, "too_long": "drop"},
            "none of 2 rows is left to encode: all are longer than 1 tokens",
        ),
        (comparisons, {"rows": []}, "none of 0 rows is left to encode"),
        (
            comparisons,
            {"rows": [Row("a", ("b", "z"), "f, line 2")]},
            "f, line 2: the tokenizer's alphabet lacks 'z'",
        ),
        (comparisons, {"max_length": 4}, "f, line 1: a prompt of 2"),
        (prompts, {"template": "{question}"}, r"has no \{prompt\} in it"),
        (prompts, {"length": 1}, "f, line 1: the prompt has 2 tokens, more than the 1 allowed"),
        (
            prompts,
            {"max_positions": 7, "max_new_tokens": 7},
            "7 leaves no room for a prompt of 1 .* 7 positions",
        ),
        (
            prompts,
            {"length": 2, "max_positions": 8, "max_new_tokens": 7},
            "7 leaves no room for a prompt of 2 tokens",
        ),
    ],
)
def test_what_cannot_be_encoded_is_said(encode, limits, message):
    with pytest.raises(UserError, match=message):
        encode(**limits)


def test_comparison_batch_by_hand():
    data = comparisons([*PAIRS, Row("a", ("b", "c"), "f, line 3")])
    equal(data.lengths, grid("45", "77", "33"))
    batch = batches.comparison_batch(data, np.array([0, -1]), bucket_multiple=1)
    equal(batch.tokens[0], grid("23410", "23561"))
    equal(batch.attention_mask[0], grid("11110", "11111"))
    equal(batch.response_mask[0], grid("00110", "00111"))
    assert not any(array[1].any() for array in (batch.tokens, batch.response_mask))
    assert (batch.best, batch.weight) == (None, None)


def test_comparisons_that_are_cut_or_dropped():
    rows = [*PAIRS, Row("a", ("b", "c"), "f, line 3")]
    cut = comparisons(rows, max_length=4, too_long="truncate")
    assert cut.sources == ["f, line 1", "f, line 3"]
    assert cut.counts == {encoding.EQUAL_CUT: 1, encoding.CUT: 1}
    both = comparisons([Row("a", ("bcd", "cde"), "f")], max_length=3, too_long="truncate")
    assert both.counts == {encoding.CUT: 2}
    dropped = comparisons(rows, max_length=4, too_long="drop")
    assert (dropped.sources, dropped.counts) == (["f, line 3"], {"dropped, too long": 2})


def test_what_is_left_of_a_ranking_weighs_as_much_as_all_of_it():
    texts = (("b", "c"), ("b", "def"), ("c", "def"))
    ranking = [Row("a", pair, "f, line 4", weight=1 / 3) for pair in texts]
    rows = [Row("a", ("b", "c"), "f, line 3"), *ranking]
    equal(comparisons(rows).weight, np.float32([1, 1 / 3, 1 / 3, 1 / 3]))
    assert comparisons(rows, max_length=3, too_long="drop").weight.tolist() == [1, 1]


def test_comparisons_of_several_answers_by_hand():
    rows = [
        Row("ab", ("c", "d", "ef"), "f, line 1", best=2),
        Row("a", ("b", "c"), "f, line 2", weight=0.5),
        Row("a", ("b", "c"), "f, line 3", best=1),
    ]
    data = comparisons(rows)
    equal(data.lengths, grid("445", "330", "330"))
    equal(data.response_lengths[1], [2, 2, 0])
    batch = batches.comparison_batch(data, np.array([1, -1, 0, 2]), bucket_multiple=1)
    equal(batch.tokens[:2], [grid("23100", "24100", "00000"), np.zeros((3, 5))])  # no third answer
    equal(batch.attention_mask[0], grid("11100", "11100", "00000"))
    equal(batch.response_mask[2], grid("00110", "00110", "00111"))
    equal(batch.best, [0, 0, 2, 1])
    equal(batch.weight, np.float32([0.5, 0, 1, 1]))
    assert (batch.best.dtype, batch.weight.dtype, batch.targets) == (np.int32, np.float32, None)
    rows.append(Row("abc", ("d", "de", "def"), "f, line 4", best=0))
    cut = comparisons(rows, max_length=4, too_long="truncate")
    assert cut.counts == {encoding.CUT: 1, encoding.EQUAL_CUT: 1}
    assert cut.sources == ["f, line 1", "f, line 2", "f, line 3"]


def test_feedback_has_room_for_each_prompt_with_the_next_rows_response():
    """The last prompt has 3 tokens, and the first response 4: no text has 7 of its own."""
    texts = (("a", "bcd"), ("a", "b"), ("abc", "b"))
    rows = [Row(prompt, (text,), "f, line 1", targets=(1.0,)) for prompt, text in texts]
    batch = batches.feedback_batch(comparisons(rows), np.arange(3), bucket_multiple=1)
    assert batch.tokens.shape == (3, 7)


def test_prompts_are_left_padded_and_keep_their_columns():
    data = prompts()
    equal(data.tokens, grid("23", "04"))
    equal(data.attention_mask, grid("11", "01"))
    assert data.columns == ["topic", "level"]
    said = [[{"role": "user", "content": text}] for text in ("c", "ab", "c")]
    assert batches.columns_at(data, np.array([1, 0, 1])) == {
        "topic": [None, "x", None],
        "level": [2, None, 2],
        "messages": said,
        "is chat": [False, False, False],
        "source of a row": [data.rows[row].source for row in (1, 0, 1)],
    }
    equal(prompts(length=3).tokens, grid("023", "004"))
    # The end of a prompt matters most; a prompt and what is sampled after it must fit the model's
    # positions.
    for limits in ({"length": 1}, {"max_positions": 8, "max_new_tokens": 7}):
        equal(prompts(too_long="truncate", **limits).tokens, [[3], [4]])
    assert prompts(max_positions=9, max_new_tokens=7).tokens.shape == (2, 2)
    left = prompts(length=1, too_long="drop")
    assert left.rows == PROMPTS[1:]
    assert left.columns == ["level"]
    assert left.counts == {"dropped, too long": 1}


@pytest.mark.parametrize(
    ("longest", "width"),  # of 22 columns, multiple 4
    [(0, 4), (1, 4), (4, 4), (5, 8), (9, 16), (16, 16), (17, 22), (22, 22)],
)
def test_a_batch_of_prompts_is_as_wide_as_its_longest_needs(longest, width):
    mask = np.arange(22) >= 22 - np.array([[longest], [min(longest, 1)]])
    assert batches.prompt_width(mask, 4) == width
    of_21 = width if width < 16 else 21  # 16 of 21 columns save too little
    assert batches.prompt_width(mask[:, 1:], 4) == of_21


def test_narrowed_prompts_keep_the_last_columns_of_all_rows():
    data = prompts([Row(text, (), "f, line 1") for text in ("abcdefgh", "ab", "abc")])
    narrow = batches.narrowed(data, np.array([2, 1]), 2)
    equal(narrow.tokens, data.tokens[:, 4:])
    equal(narrow.attention_mask, grid("1111", "0011", "0111"))
    assert narrow.rows is data.rows


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (8, 4), (37, 5)])
def test_an_epoch_visits_every_row_once(n, batch_size):
    plan = np.stack(batches.Plan(np.arange(n) * 7 % 50 + 1, batch_size, KEY, 16).epoch(2))
    num_missing = -n % batch_size
    equal(np.sort(plan, axis=None), [*[-1] * num_missing, *range(n)])
    assert plan.shape[1] == batch_size
    assert np.any(plan < 0, axis=1).sum() == (num_missing > 0)


def test_batches_hold_rows_of_similar_length():
    """The two short rows that are left over join long ones in one batch."""
    lengths = np.array([10] * 6 + [40] * 10)
    mixed = [set(lengths[rows]) for rows in batches.Plan(lengths, 4, KEY).epoch(0)]
    assert sorted(map(len, mixed)) == [1, 1, 1, 2]


def test_plans_depend_on_key_and_epoch_alone():
    lengths = np.arange(40) % 30 + 1
    plan = batches.Plan(lengths, 8, KEY)
    straight = np.stack([plan.rows(step) for step in range(10)])
    for step in (9, 3, 7):  # a resumed run asks for any step first
        equal(batches.Plan(lengths, 8, KEY).rows(step), straight[step])
    assert plan.steps_per_epoch == 5
    other = np.stack(batches.Plan(lengths, 8, jax.random.key(8)).epoch(0))
    for epoch in (straight[5:], other):
        assert not np.array_equal(straight[:5], epoch)
    # A changed shuffle would change every run: pinned.
    pinned = batches.Plan(np.array([1] * 3 + [20] * 4), 2, jax.random.key(0)).epoch(1)
    equal(pinned, [[2, 5], [3, 4], [6, -1], [1, 0]])


def test_prompt_rows_are_full_and_run_on_into_the_next_epoch():
    stream = np.concatenate(
        [batches.prompt_rows(5, batch_size=3, key=KEY, step=step) for step in range(5)]
    )
    epochs = stream.reshape(3, 5)
    for epoch in epochs:
        assert sorted(epoch) == [0, 1, 2, 3, 4]
    assert len({tuple(epoch) for epoch in epochs}) > 1
    equal(batches.prompt_rows(5, batch_size=15, key=KEY, step=0), stream)  # a batch of three epochs
    equal(
        batches.prompt_rows(5, batch_size=15, key=KEY, step=1)[:1],
        batches.prompt_rows(5, batch_size=1, key=KEY, step=15),
    )


def test_a_split_keeps_groups_together():
    groups = ["a", "b", "b", "c", "d", "d", "d", "e"]
    seen = set()
    for seed in range(20):
        train, validation = batches.split(groups, 0.25, jax.random.key(seed))
        assert sorted([*train, *validation]) == list(range(8))
        assert not {groups[i] for i in train} & {groups[i] for i in validation}
        assert 2 <= len(validation) <= 4  # whole groups until there are 2 rows
        seen.add(tuple(validation))
    assert len(seen) > 3
    for seed in range(9):  # a group that is larger than the validation part is taken last
        _, validation = batches.split(["a"] * 9 + ["b", "c"], 0.1, jax.random.key(seed))
        assert set(validation) < {9, 10}
    with pytest.raises(UserError, match="3 rows leave none"):
        batches.split(["a"] * 3, 0.1, KEY)


def test_split():
    train, validation = batches.split(range(10), 0.2, KEY)
    equal(validation, np.sort(jax.random.permutation(KEY, 10)[:2]))  # what runs have held out
    equal(validation, batches.split("abcdefghij", 0.2, KEY)[1])
    assert sorted([*train, *validation]) == list(range(10))
    assert [len(batches.split(range(10), fraction, KEY)[1]) for fraction in (0.0, 0.01)] == [0, 1]
