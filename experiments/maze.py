"""Does reinforcement learning teach new mazes, or only to take the way that is known? Five methods.

    python experiments/maze.py --out maze.json

A maze, smaller than in "Maximum likelihood reinforcement learning" (Tajwar et al. 2026, arXiv
2602.02710), has four by four rooms, and loops, so that several walks lead to the goal. The prompt
has a token for each room: which of its sides are open, and whether it is the start or the goal. The
answer is moves and an end. It pays 1 if it ends at the goal and no move goes into a wall.

A Qwen2 of half a million parameters learns from random walks (SFT). From there MaxRL, GRPO, RLOO,
PPO with a value model and pass@8 get the same number of samples. Seeds are lanes of one program.
Others choose the rate of a method, by the mean of pass@1 and pass@64 of shorter runs.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
import tyro
from jax import Array

from rlhf_jax import TrainState, cli, metrics, models, rollout, sampling
from rlhf_jax.algorithms import grpo, maxrl, pass_at_k, ppo, rloo, sft
from rlhf_jax.errors import logger
from rlhf_jax.rewards import kl_shaped
from rlhf_jax.training.rl.critic import split
from rlhf_jax.types import Demonstrations, Params, Rollout

SIDE = 4
ROOMS = SIDE**2
LOOPS = 3  # openings beyond those of a tree
MOVES = 12  # of an answer at most, without its end
WALL, OPEN, START, GOAL = range(4)  # cells
STEPS = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # up, right, down, left: rows and columns
CHANGE = STEPS @ (SIDE, 1)  # of a room's number
PLACES = 1 + 2 * np.argwhere(np.ones((SIDE, SIDE)))  # [ROOMS, 2] of rooms among the cells
PAIRS = [(a, b) for a in range(ROOMS) for b in range(a) if abs(PLACES[a] - PLACES[b]).sum() == 2]
UP = 3 * 2 ** len(STEPS)  # the first move's token, behind those of rooms
END, PAD = UP + len(STEPS), UP + len(STEPS) + 1
SAMPLER = sampling.SamplingConfig(MOVES + 1, eos_id=END, pad_id=PAD)
MAZES, GROUP = 8, 16  # of an RL step, and answers to each
KS = (1, 2, 4, 8, 16, 32, 64)
SAMPLES = KS[-1]  # answers to each held-out maze
RATES = (1e-4, 3e-4, 1e-3)
METHODS: dict[str, tuple[Any, Any]] = {
    "MaxRL": (maxrl, maxrl.Config(group_size=GROUP)),
    "GRPO": (grpo, grpo.Config(group_size=GROUP, kl_loss_coef=0.0, aggregate="sum")),
    "RLOO": (rloo, rloo.Config(group_size=GROUP)),
    "PPO": (ppo, ppo.Config(group_size=GROUP)),
    "pass@8": (pass_at_k, pass_at_k.Config(group_size=GROUP, k=8)),
}


class Sizes(NamedTuple):
    """How much is trained."""

    width: int = 128
    layers: int = 2
    sweep_seeds: int = 2  # for each rate; three times as many measure
    train: int = 8192  # mazes
    held_out: int = 128
    sft_steps: int = 1000
    steps: int = 100
    sweep_steps: int = 30


FULL = Sizes()


def network(sizes: Sizes) -> models.Model:
    shape = (PAD + 1, ROOMS + MOVES + 1, sizes.width, sizes.layers, 4)
    mlp: Any = {"intermediate_size": 4 * sizes.width, "initializer_range": 0.05}
    return models.build(models.Qwen2Config(*shape, **mlp, tie_embeddings=True))


def drawn(rng: np.random.Generator) -> np.ndarray:
    """The cells [2 * SIDE + 1, 2 * SIDE + 1] of a maze. Walls between rooms open in random order
    (Kruskal) until there is a tree, and LOOPS more.
    """
    cells = np.full((2 * SIDE + 1, 2 * SIDE + 1), WALL)
    cells[*PLACES.T] = OPEN
    part, loops = np.arange(ROOMS), 0
    for room, other in rng.permutation(PAIRS):
        loops += part[room] == part[other]
        if part[room] != part[other] or loops <= LOOPS:
            cells[*(PLACES[room] + PLACES[other]) // 2] = OPEN
            part[part == part[other]] = part[room]
    cells[*PLACES[rng.choice(ROOMS, 2, replace=False)].T] = START, GOAL
    return cells


def prompt_of(cells: np.ndarray) -> np.ndarray:
    """[ROOMS] tokens: 3 times the open sides as bits, plus 1 for the start or 2 for the goal."""
    sides = [cells[*(PLACES + step).T] != WALL for step in STEPS]
    return 3 * (2 ** np.arange(len(STEPS)) @ sides) + cells[*PLACES.T] - OPEN


def walk(prompt: np.ndarray, rng: np.random.Generator) -> list[int] | None:
    """The tokens of a random walk to the goal that enters no room twice; None if it gets lost, or
    makes more than MOVES.
    """
    sides, role = np.divmod(prompt, 3)
    room, moves, seen = int(np.argmax(role == START - OPEN)), list[int](), set[int]()
    while role[room] != GOAL - OPEN:
        seen.add(room)
        ways = [x for x, to in enumerate(room + CHANGE) if sides[room] >> x & 1 and to not in seen]
        if not ways or len(moves) == MOVES:
            return None
        moves.append(int(rng.choice(ways)))
        room += int(CHANGE[moves[-1]])
    return [UP + move for move in moves]


def make_mazes(sizes: Sizes) -> tuple[Array, Array]:
    """Training mazes with a walk, [train, ROOMS + MOVES + 1], and prompts [held_out, ROOMS]. No
    maze is another one turned or mirrored; all have a walk, found in 50 tries.
    """
    rng = np.random.default_rng(0)
    texts, known = list[list[int]](), set[bytes]()
    while len(texts) < sizes.train + sizes.held_out:
        cells = drawn(rng)
        prompt = prompt_of(cells)
        moves = next(filter(None, (walk(prompt, rng) for _ in range(50))), None)
        if moves and cells.tobytes() not in known:
            texts.append([*prompt, *moves, END, *[PAD] * (MOVES - len(moves))])
            known |= {np.rot90(x, turn).tobytes() for x in (cells, cells.T) for turn in range(4)}
    return jnp.array(texts[sizes.held_out :]), jnp.array(texts)[: sizes.held_out, :ROOMS]


def is_right(tokens: Array) -> Array:
    """[B] whether the answers in [B, ROOMS + MOVES + 1] end at the goal, without a wall passed."""
    sides, role = jnp.divmod(tokens[:, :ROOMS], 3)
    sides = jnp.pad(sides, ((0, 0), (0, 2)))  # two more rooms, which have no way out
    lost, arrived = ROOMS, ROOMS + 1

    def step(room: Array, token: Array) -> tuple[Array, None]:
        move = jnp.clip(token - UP, 0, len(STEPS) - 1)
        here = jnp.take_along_axis(sides, room[:, None], axis=1)[:, 0]
        is_way = (token == UP + move) & (here >> move & 1 == 1)
        is_end = (token == END) & (room == jnp.argmax(role == GOAL - OPEN, axis=1))
        after = jnp.where(is_way, room + jnp.array(CHANGE)[move], jnp.where(is_end, arrived, lost))
        return jnp.where(room == arrived, arrived, after), None

    begin = jnp.argmax(role == START - OPEN, axis=1)
    return jax.lax.scan(step, begin, tokens[:, ROOMS:].T)[0] == arrived


def fine_tune(key: Array, texts: Array, sizes: Sizes) -> Params:
    """SFT on the walks, from scratch."""
    model = network(sizes)
    policy_fn = models.policy_fn(model, prompt_length=ROOMS)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, sizes.sft_steps))
    init_key, run_key = jax.random.split(key)

    def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
        tokens = jax.random.choice(key, texts, (32,))
        mask = (tokens != PAD).astype(jnp.int32)
        batch = Demonstrations(tokens, mask, mask.at[:, :ROOMS].set(0))
        given: Any = {"policy_fn": policy_fn, "optimizer": optimizer, "config": sft.Config()}
        return sft.update(state, batch, None, **given)[0], None

    state = TrainState.create(model.init(init_key), optimizer)
    return jax.lax.scan(step, state, jax.random.split(run_key, sizes.sft_steps))[0].params


def sampled(params: Params, prompts: Array, num: int, key: Array, sizes: Sizes) -> Rollout:
    """``num`` answers to each of the prompts [N, ROOMS], which are computed once, with scores."""
    asked = jnp.repeat(prompts, num, axis=0)
    given = (network(sizes), params, asked, jnp.ones_like(asked), key)
    batch = sampling.generate(*given, config=SAMPLER, group_size=num)
    return batch.replace(scores=jnp.float32(is_right(batch.tokens)), group_size=num)


def trainer(name: str, prompts: Array, sizes: Sizes) -> Callable[[Any], Params]:
    """``train((key, params, rate, steps))``: a run from SFT's parameters, as one pure function."""
    model, (module, config) = network(sizes), METHODS[name]
    value_model = model if module is ppo else None
    policy_fn = models.policy_fn(model, 1.0, ROOMS, value_model, group_size=GROUP)

    def train(given: tuple[Array, Params, Array, Array]) -> Params:
        key, params, rate, steps = given
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, eps=1e-5))
        head_key, run_key = jax.random.split(jax.random.fold_in(key, 1))
        if value_model is not None:  # SFT's network with a head; each clips its own gradients
            params = {"policy": params, "value": models.add_head(head_key, params, "value")}
            optimizer = split(optimizer, optimizer, params)
        how: Any = {"policy_fn": policy_fn, "optimizer": optimizer, "config": config}

        def step(number: Array, state: TrainState) -> TrainState:
            keys = jax.random.split(jax.random.fold_in(run_key, number), 3)
            asked = jax.random.choice(keys[0], prompts, (MAZES,))
            batch = sampled(models.policy_params(state.params), asked, GROUP, keys[1], sizes)
            batch = rollout.rescore(batch, state.params, policy_fn=policy_fn)
            batch = batch.replace(rewards=kl_shaped(batch, 0.0), scores=None)
            return module.update(state, batch, keys[2], **how)[0]

        state = jax.lax.fori_loop(0, steps, step, TrainState.create(params, optimizer))
        return models.policy_params(state.params)

    return train


@functools.partial(jax.jit, static_argnames="sizes")
def examined(lanes: tuple[Array, Params], prompts: Array, sizes: Sizes) -> Array:
    """The scores [lanes, N, SAMPLES] of answers to prompts [N, ROOMS], by keys and parameters."""

    def one(lane: tuple[Array, Params]) -> Array:
        key = jax.random.fold_in(lane[0], 2)
        return sampled(lane[1], prompts, SAMPLES, key, sizes).scores.reshape(-1, SAMPLES)

    return jax.lax.map(one, lanes)


def passes(scores: Array) -> np.ndarray:
    """[lanes, SAMPLES] pass@k of k from 1 on, means over mazes, of scores [lanes, N, SAMPLES]."""
    ks = range(1, SAMPLES + 1)
    return np.array([[metrics.best_at_k(x, k).mean() for k in ks] for x in np.float64(scores)])


def rows_of(name: str, found: np.ndarray, others: dict[str, Any], step: int) -> list[Any]:
    """pass@k [seeds, SAMPLES] of a method, and paired differences from others."""
    named = {f"pass@{k}": found[:, k - 1] for k in (1, 8, 64)}
    for other, theirs in others.items():
        named |= {f"pass@{k} minus {other}'s": (found - theirs)[:, k - 1] for k in (1, 16, 64)}
    if "MaxRL" in others:
        reached = others["MaxRL"] >= found[:, -1:]
        reached[:, -1] = True  # or never: in both cases not with fewer
        named["times fewer answers with MaxRL"] = SAMPLES / (reached.argmax(axis=1) + 1)
    row = functools.partial(results.row, name)
    rows = [row(seed, step, of, x) for of, xs in named.items() for seed, x in enumerate(xs)]
    curve = [row(seed, k, "pass@k", x[k - 1]) for k in KS for seed, x in enumerate(found)]
    return [*results.over_seeds([*curve, *rows]), *rows]


def main(out: Path, sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL) -> None:
    """Trains with each method, and writes what came out.

    Args:
        out: the file of the results, a table.
        sizes: of the experiment.
    """
    started = time.monotonic()
    texts, held_out = make_mazes(sizes)
    prompts = texts[:, :ROOMS]
    seeds = np.arange(len(RATES) * sizes.sweep_seeds)  # as many as lanes that choose a rate
    choosing = np.tile(len(seeds) + np.arange(sizes.sweep_seeds), len(RATES))
    keys = jax.vmap(jax.random.key)(jnp.arange(len(seeds) + sizes.sweep_seeds))
    start = jax.lax.map(functools.partial(fine_tune, texts=texts, sizes=sizes), keys)

    def lanes(seeds: np.ndarray, rates: Any, steps: int) -> tuple[Array, Params, Array, Array]:
        of_seeds, num = jax.tree.map(lambda x: x[seeds], (keys, start)), len(seeds)
        return *of_seeds, jnp.full(num, jnp.float32(rates)), jnp.full(num, steps)

    measured = lanes(seeds, 0.0, sizes.steps)
    found = {"SFT": passes(examined(measured[:2], held_out, sizes))}
    rows = rows_of("SFT", found["SFT"], {}, sizes.steps)
    for name in METHODS:
        train = trainer(name, prompts, sizes)
        swept = lanes(choosing, np.repeat(RATES, sizes.sweep_seeds), sizes.sweep_steps)
        runs = jax.jit(functools.partial(jax.lax.map, train)).lower(swept).compile()
        ends = passes(examined((swept[0], runs(swept)), prompts[: sizes.held_out], sizes))
        means = ends[:, [0, -1]].mean(axis=1).reshape(len(RATES), -1).mean(axis=1)
        rate = RATES[int(means.argmax())]
        measured = lanes(seeds, rate, sizes.steps)
        begun = time.monotonic()
        params = jax.block_until_ready(runs(measured))
        seconds = time.monotonic() - begun
        others = {other: found[other] for other in ("SFT", "MaxRL") if other in found}
        found[name] = passes(examined((measured[0], params), held_out, sizes))
        rows += rows_of(name, found[name], others, sizes.steps)
        of_all = {"learning rate": rate, "seconds of all seeds": seconds}
        for one, value in zip(RATES, means, strict=True):
            of_all[f"choosing seeds: mean of pass@1 and pass@64 at {one:g}"] = value
        if name == "MaxRL":
            first = jax.tree.map(lambda x: x[0], measured)
            single = jax.jit(train).lower(first).compile()
            begun = time.monotonic()
            alone = jax.block_until_ready(single(first))
            of_one = time.monotonic() - begun
            apart = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x[0] - y)), params, alone)
            of_all |= {"seconds of one seed": of_one, "all seeds over one seed": seconds / of_one}
            largest = 1e6 * max(map(float, jax.tree.leaves(apart)))
            of_all["largest difference of a parameter from a single run, millionths"] = largest
        rows += [results.row(name, results.ALL, sizes.steps, *one) for one in of_all.items()]
        logger.info(f"{name}, {rate:g}, {seconds:.0f} s: {found[name].mean(axis=0)[[0, 7, 63]]}")
    command, seconds = "python experiments/maze.py --out maze.json", time.monotonic() - started
    results.write(out, command, seconds, rows, sizes=sizes._asdict())


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
