"""The mazes of experiments/maze.py by hand, and a short form of the whole."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import maze
import numpy as np
import pytest
import results
from maze import (
    END,
    GOAL,
    GROUP,
    LOOPS,
    METHODS,
    MOVES,
    OPEN,
    PAD,
    PLACES,
    ROOMS,
    SIDE,
    START,
    STEPS,
    UP,
    WALL,
    Sizes,
)
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import Rollout

SIZES = Sizes(
    width=16,
    layers=1,
    sweep_seeds=1,
    train=8,
    held_out=2,
    sft_steps=2,
    steps=2,
    sweep_steps=1,
)
UPWARDS, RIGHT, DOWN, LEFT = range(UP, END)
FEWER = "times fewer answers with MaxRL"
APART = "largest difference of a parameter from a single run, millionths"
ALL_MAXRL = ("MaxRL", results.ALL)


def hand_made():
    """Rooms 0, 1, 5 and 4 in a ring, 2 behind 1; the start is 0, the goal 5."""
    cells = np.full((2 * SIDE + 1, 2 * SIDE + 1), WALL)
    cells[*PLACES.T] = OPEN
    for room, other in ((0, 1), (1, 2), (0, 4), (1, 5), (4, 5)):
        cells[*(PLACES[room] + PLACES[other]) // 2] = OPEN
    cells[*PLACES[0]], cells[*PLACES[5]] = START, GOAL
    return cells


def answers(*moves):
    prompt = maze.prompt_of(hand_made())
    return jnp.array([[*prompt, *row, *[PAD] * (MOVES + 1 - len(row))] for row in moves])


def cells_of(prompt):
    """The cells of which a prompt tells."""
    cells = np.full((2 * SIDE + 1, 2 * SIDE + 1), WALL)
    for place, token in zip(PLACES, prompt, strict=True):
        cells[*place] = OPEN + token % 3
        for side, step in enumerate(STEPS):
            cells[*(place + step)] = OPEN if token // 3 >> side & 1 else WALL
    return cells


def reached(cells, begin):
    """The cells that one can walk to."""
    seen, edge = {begin}, [begin]
    while edge:
        place = edge.pop()
        near = {tuple((np.array(place) + step).tolist()) for step in STEPS}
        new = {to for to in near - seen if cells[to] != WALL}
        seen |= new
        edge += new
    return seen


def test_all_rooms_of_a_maze_can_be_reached_and_there_are_loops():
    places = set()
    for seed in range(20):
        cells = maze.drawn(np.random.default_rng(seed))
        is_open = cells != WALL
        assert reached(cells, (1, 1)) == set(map(tuple, np.argwhere(is_open).tolist()))
        assert is_open[1::2, 1::2].all()
        assert not is_open[::2, ::2].any()
        assert not any(edge.any() for edge in (*is_open[[0, -1]], *is_open[:, [0, -1]].T))
        assert is_open.sum() == ROOMS + ROOMS - 1 + LOOPS
        assert sorted(cells[1::2, 1::2].ravel())[-3:] == [OPEN, START, GOAL]
        places.add(int(np.argmax(cells == START)))
    assert len(places) > 5


def test_a_prompt_says_which_sides_are_open_and_where_start_and_goal_are():
    sides = {0: 0b0110, 1: 0b1110, 2: 0b1000, 4: 0b0011, 5: 0b1001}  # left, down, right, up
    expected = np.zeros(ROOMS, int)
    for room, bits in sides.items():
        expected[room] = 3 * bits
    expected[0] += 1
    expected[5] += 2
    assert_array_equal(maze.prompt_of(hand_made()), expected)


def test_an_answer_is_right_if_it_ends_at_the_goal():
    right = (
        [RIGHT, DOWN, END],
        [DOWN, RIGHT, END],
        [RIGHT, RIGHT, LEFT, DOWN, END],
        [RIGHT, DOWN, LEFT, UPWARDS, RIGHT, DOWN, END],  # around the loop, past the goal
        [RIGHT, DOWN, END, LEFT],  # only what is before the end counts
    )
    wrong = (
        [END],
        [RIGHT, END],
        [RIGHT, DOWN],  # no end
        [UPWARDS, RIGHT, DOWN, END],  # outside
        [RIGHT, RIGHT, DOWN, LEFT, END],  # 2 has no way down
        [RIGHT, DOWN, 0, END],
        [RIGHT, DOWN, PAD, END],
        [END, RIGHT, DOWN, END],
        [RIGHT, DOWN, LEFT, UPWARDS, END],
    )
    found = maze.is_right(answers(*right, *wrong))
    assert found.tolist() == [True] * len(right) + [False] * len(wrong)


def test_the_longest_answer_ends_in_the_last_column():
    """One move more in place of its end is too many, even at the goal, here room 1."""
    longest = [RIGHT, LEFT] * (MOVES // 2 - 1) + [RIGHT, DOWN, END]
    assert len(longest) == MOVES + 1
    endless = answers([RIGHT, LEFT] * (MOVES // 2) + [RIGHT])
    endless = endless.at[0, 5].add(-2).at[0, 1].add(2)
    found = maze.is_right(jnp.concatenate([answers(longest), endless]))
    assert found.tolist() == [True, False]


def test_walks_differ_and_enter_no_room_twice():
    rng = np.random.default_rng(0)
    found = [maze.walk(maze.prompt_of(hand_made()), rng) for _ in range(50)]
    assert {tuple(x) for x in found if x} == {(RIGHT, DOWN), (DOWN, RIGHT)}
    assert None in found  # into room 2


@pytest.mark.parametrize(("length", "is_found"), [(MOVES, True), (MOVES + 1, False)])
def test_a_walk_has_a_longest_length(length, is_found):
    """A corridor through all rooms, a row to the right and the next to the left."""
    cells = np.full((2 * SIDE + 1, 2 * SIDE + 1), WALL)
    rooms = np.arange(ROOMS).reshape(SIDE, SIDE)
    rooms[1::2] = rooms[1::2, ::-1]
    order = rooms.ravel()
    cells[*PLACES.T] = OPEN
    for room, other in itertools.pairwise(order):
        cells[*(PLACES[room] + PLACES[other]) // 2] = OPEN
    cells[*PLACES[order[0]]], cells[*PLACES[order[length]]] = START, GOAL
    rng = np.random.default_rng(0)
    found = maze.walk(maze.prompt_of(cells), rng)
    assert (found is not None) == is_found
    assert found is None or len(found) == MOVES


def test_mazes_have_walks_and_none_is_another_one_turned_or_mirrored():
    """Of a generator that draws each maze again, turned and mirrored."""
    drawn, again, turns = maze.drawn, [], iter(range(1000))

    def twice(rng):
        if again:
            return again.pop()
        found = drawn(rng)
        again.append(np.rot90(found.T, next(turns)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maze, "drawn", twice)
        texts, held_out = maze.make_mazes(SIZES)
    assert texts.shape == (SIZES.train, ROOMS + MOVES + 1)
    assert held_out.shape == (SIZES.held_out, ROOMS)
    assert maze.is_right(texts).all()
    kinds = set()
    for prompt in np.concatenate([texts[:, :ROOMS], held_out]):
        cells = cells_of(prompt)
        looks = [np.rot90(x, turn).tobytes() for x in (cells, cells.T) for turn in range(4)]
        kinds.add(min(looks))
    assert len(kinds) == SIZES.train + SIZES.held_out


def test_pass_at_k_is_a_mean_over_mazes():
    """One maze has 16 right answers of 64, the other none."""
    scores = np.zeros((1, 2, 64))
    scores[0, 0, 5:21] = 1
    found = maze.passes(scores)
    assert found.shape == (1, 64)
    assert_allclose(found[0, [0, 1, 63]], [1 / 8, (1 - 48 * 47 / (64 * 63)) / 2, 1 / 2])


def test_the_objectives_are_the_packages():
    """The advantages of a group with four right answers of sixteen."""
    scores = jnp.zeros(GROUP).at[:4].set(1)
    ones = jnp.ones((GROUP, 2))
    zeros = jnp.zeros((GROUP, 2))
    batch = Rollout(ones, ones, ones.at[:, 0].set(0), zeros, values=zeros)
    batch = batch.replace(rewards=zeros.at[:, 1].set(scores), group_size=GROUP)
    found = {}
    for name, (module, config) in METHODS.items():
        prepared = module.prepare(batch, config=config)
        found[name] = np.array(prepared.advantages)[[0, -1], 1]
    spread = 3**0.5 / 4
    of_eight = 8 * math.comb(12, 7) / math.comb(15, 7)  # no other of the eight is right
    expected = {
        "MaxRL": [3, -1],
        "GRPO": [0.75 / spread, -0.25 / spread],
        "RLOO": [0.8, -4 / 15],
        "PPO": [0.75 / spread, -0.25 / spread],  # of values that are still all the same
        "pass@8": [of_eight, 0],
    }
    assert expected.keys() == found.keys()
    # Of each answer the sum of its tokens counts, whatever its length; PPO has all tokens alike.
    assert [config.aggregate for _, config in METHODS.values()] == [*["sum"] * 3, "token", "sum"]
    for name, values in expected.items():
        assert_allclose(found[name], values, rtol=0.05, err_msg=name)


def test_ppo_trains_a_value_model_and_returns_the_policy():
    start = jax.eval_shape(maze.network(SIZES).init, jax.random.key(0))
    train = maze.trainer("PPO", jnp.zeros((SIZES.train, ROOMS), int), SIZES)
    found = jax.eval_shape(train, (jax.random.key(0), start, jnp.float32(1e-3), jnp.int32(2)))
    assert found == start


def test_rows_have_paired_differences_and_the_answers_that_suffice():
    ks = np.arange(1, 65)
    base = np.tile(1 - 0.95**ks, (2, 1))
    better = np.stack([1 - 0.9**ks, 1 - 0.99**ks])
    rows = maze.rows_of("MaxRL", better, {"SFT": base}, step=7)
    values = {(row["seed"], row["step"], row["metric"]): row["value"] for row in rows}
    assert_allclose(values[0, 7, "pass@1 minus SFT's"], 0.05, atol=1e-4)
    assert_allclose(values[1, 7, "pass@1 minus SFT's"], -0.04, atol=1e-4)
    assert_allclose(values[results.ALL, 7, "pass@1 minus SFT's"], 0.005, atol=1e-4)
    assert_allclose(values[results.ALL, 8, "pass@k"], better[:, 7].mean(), atol=1e-4)
    assert (0, 8, "pass@k") not in values  # the file stays small
    others = {"SFT": better, "MaxRL": better}
    rows = maze.rows_of("RLOO", base, others, step=7)
    values = {(row["seed"], row["step"], row["metric"]): row["value"] for row in rows}
    assert values[0, 7, FEWER] == 2  # .9 ** 32 is less than .95 ** 64
    assert values[1, 7, FEWER] == 1  # not reached
    assert_allclose(values[0, 7, "pass@16 minus MaxRL's"], 0.9**16 - 0.95**16, atol=1e-4)


def test_the_rate_of_the_best_sweep_measures_and_the_first_seed_runs_alone(tmp_path):
    """Of runs whose parameter is 1/64 for each seed's number, and one for each step at 3e-4, of
    which so many answers are right.
    """

    def fine_tune(key, texts, sizes):
        return {"right": jax.random.key_data(key)[1].astype(jnp.float32)}

    def trainer(name, prompts, sizes):
        def train(given):
            _, params, rate, steps = given
            gain = jnp.where(jnp.abs(rate - 3e-4) < 1e-6, steps, -steps)
            return {"right": params["right"] + (1.0 if name == "MaxRL" else 0.5) * gain}

        return train

    def examined(lanes, prompts, sizes):
        scores = np.arange(64) < np.array(lanes[1]["right"])[:, None, None]
        return np.repeat(scores, len(prompts), axis=1)

    with pytest.MonkeyPatch.context() as patch:
        for one in (fine_tune, trainer, examined):
            patch.setattr(maze, one.__name__, one)
        patch.setattr(maze, "METHODS", {"MaxRL": None, "RLOO": None})
        maze.main(tmp_path / "maze.json", SIZES._replace(steps=8, sweep_steps=2))
    rows = json.loads((tmp_path / "maze.json").read_text("utf-8"))["rows"]
    values = {(row["variant"], row["seed"], row["metric"]): row["value"] for row in rows}
    for seed in range(3):
        assert_allclose(values["SFT", seed, "pass@1"], seed / 64, atol=1e-4)
        assert_allclose(values["MaxRL", seed, "pass@1"], (seed + 8) / 64, atol=1e-4)
        assert_allclose(values["RLOO", seed, "pass@1"], (seed + 4) / 64, atol=1e-4)
        assert_allclose(values["RLOO", seed, "pass@1 minus MaxRL's"], -4 / 64, atol=1e-4)
    of_maxrl = {
        metric: x for (name, seed, metric), x in values.items() if (name, seed) == ALL_MAXRL
    }
    assert of_maxrl["learning rate"] == 3e-4
    sweep = "choosing seeds: mean of pass@1 and pass@64 at"
    assert_allclose(of_maxrl[f"{sweep} 0.0003"], (5 / 64 + 1) / 2, atol=1e-4)  # seed 3, two steps
    assert_allclose(of_maxrl[f"{sweep} 0.0001"], (1 / 64 + 1) / 2, atol=1e-4)
    assert of_maxrl[APART] == 0
    assert of_maxrl["all seeds over one seed"] > 0


@pytest.mark.slow
def test_the_short_form(tmp_path):
    out = tmp_path / "maze.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maze, "METHODS", {"MaxRL": METHODS["MaxRL"]})
        patch.setattr(maze, "is_right", lambda tokens: tokens[:, ROOMS] % 2 == 0)  # some are right
        maze.main(out, SIZES)
    content = json.loads(out.read_text("utf-8"))
    values = {(row["variant"], row["seed"], row["metric"]) for row in content["rows"]}
    assert content["sizes"] == SIZES._asdict()
    assert {name for name, _, _ in values} == {"SFT", "MaxRL"}
    assert {("MaxRL", 2, "pass@64 minus SFT's"), ("MaxRL", "all", "pass@k high")} <= values
    (apart,) = [row["value"] for row in content["rows"] if row["metric"] == APART]
    assert apart < 100
    pass_at_1 = {row["value"] for row in content["rows"] if row["metric"] == "pass@1"}
    assert len(pass_at_1) > 3  # the runs learn, each in its way
