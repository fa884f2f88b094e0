"""What an algorithm may say of a run beside its update: extras, what samples, which prompts come
next, a state of its own; and one iteration as a function.
"""

import functools
import re
import types
from dataclasses import dataclass, replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from builders import ROOT, goes_on_alike, initial_params, letters_run, with_rl
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal
from pages import blocks

from rlhf_jax import (
    TrainState,
    grpo,
    iteration,
    losses,
    models,
    ops,
    ppo,
    rewards,
    rloo,
    rollout,
    sampling,
    sharding,
    training,
)
from rlhf_jax.algorithms import (
    curriculum,
    distill,
    gdpo,
    online_dpo,
    otb,
    pass_at_k,
    policy,
    replay,
    safe_rlhf,
    self_distill,
)
from rlhf_jax.cli import commands
from rlhf_jax.cli.stages import find_method, method_names
from rlhf_jax.config import Compute, RLStage, RunConfig, parse
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.training.common.layout import layout_of
from rlhf_jax.training.rl import method
from rlhf_jax.types import Rollout

KEY = jax.random.key(0)
TABLE_FN = ops.policy_fn(lambda params, tokens, mask, key: params["logits"][tokens])
UPDATE = {"policy_fn": tabular.policy_fn, "optimizer": optax.sgd(0.5)}


def scored_rollout(scores):
    """Four rows of two prompts, with these scores alone."""
    batch = tabular.in_groups(tabular.rollout(0, (4, 2, 3, 4)), 2)
    unset = dict.fromkeys(("rewards", "advantages", "returns", "importance_weights"))
    return replace(batch, ref_log_probs=None, scores=jnp.array(scores), **unset)


def module(name, **parts):
    return types.SimpleNamespace(__name__=name, **parts)


@dataclass(frozen=True)
class Bare:
    """Nothing of ``AlgorithmConfig``."""

    weight: float = 0.5


# --- What samples


@dataclass(frozen=True)
class Halves(rloo.Config):
    group_size: int = 2
    cold: float = 1.0  # temperature of the reference's answers
    kl_in_loss = True  # a reference


def respond(sample, prompts, key, *, model, policy, reference, config):
    """The policy answers even rows, the reference odd ones."""
    assert config.group_size == 2

    def half(first, params, **changes):
        return sample(params, jax.tree.map(lambda x: x[first::2], prompts), key, **changes)

    ours, theirs = half(0, policy), half(1, reference, temperature=config.cold)
    return jax.tree.map(
        lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]),
        ours,
        replace(theirs, temperature=ours.temperature),
    )


def of_the_page(word, **names):
    """What the block of docs/your-algorithm.md with this word defines."""
    page = blocks(ROOT / "docs" / "your-algorithm.md")
    [text] = [block.text for block in page if word in block.text]
    exec(text, names := names | {"__name__": "page"})
    return names


DOCUMENTED = of_the_page("def respond(", jax=jax, jnp=jnp)["respond"]


@pytest.mark.parametrize("respond", [respond, DOCUMENTED], ids=["here", "on the page"])
def test_an_algorithm_says_what_samples(respond, tmp_path):
    seen = []
    config = with_rl(letters_run(tmp_path), num_iterations=3, validation_interval=9)
    optimizer = optax.sgd(3.0)
    training.rl.run(
        config,
        module("halves", Config=Halves, update=rloo.update, respond=respond),
        optimizer=optimizer,
        reward=lambda rollout: (jnp.sin(jnp.sum(rollout.tokens * rollout.mask, axis=1)), {}),
        on_step=lambda step, state, row, batch: seen.append(jax.device_get(batch)),
    )
    for step, batch in enumerate(seen):
        gap = np.abs(batch.log_probs - batch.ref_log_probs) * batch.mask
        assert np.all(batch.row_ids[::2] == batch.row_ids[1::2])
        assert (gap[::2].max() > 1e-3) == (step > 0)  # the policy's own
        assert gap[1::2].max() < 1e-4  # the reference's
    same = np.all(seen[0].tokens[::2] == seen[0].tokens[1::2], axis=1)
    assert not np.all(same)


@pytest.mark.parametrize(
    ("own", "settings", "compute", "refused"),
    [
        ("respond", {"rollouts_ahead": 1}, {}, "rl.rollouts_ahead"),
        ("choose", {"rollouts_ahead": 1}, {}, "rl.rollouts_ahead"),
        ("respond", {"engine": "openai:http://localhost:1"}, {}, "rl.engine"),
        ("choose", {"engine": "openai:http://localhost:1"}, {}, None),
        ("respond", {}, {"offload": ("reference",)}, "compute.offload reference"),
        ("none", {"rollouts_ahead": 1}, {}, None),
    ],
)
def test_settings_by_which_something_else_would_sample_are_refused(
    own, settings, compute, refused, tmp_path
):
    complete = method.completed(module("mine", Config=Halves, update=rloo.update, **{own: respond}))
    config = letters_run(tmp_path)
    arguments = (complete, RLStage(**settings), Compute(**compute), layout_of(config))
    if refused is None:
        method.check_sampling(*arguments)
    else:
        with pytest.raises(UserError, match=f"^{refused}: mine.{own} says"):
            method.check_sampling(*arguments)


# --- Which prompts come next, by a state of its own


@flax.struct.dataclass
class Counting(TrainState):
    """How often each prompt was sampled."""

    counts: jax.Array

    @classmethod
    def create(cls, params, optimizer, prompts):
        start = TrainState.create(params, optimizer)
        return cls(**vars(start), counts=jnp.zeros(prompts))


def fewest(state, key, *, rows, number, config):
    """The rows that were sampled least, the last of them first."""
    order = jnp.lexsort((-rows, state.counts[rows]))
    return rows[order[:number]]


def count(state, prepared, *, config, axis_name):
    return replace(state, counts=state.counts.at[prepared.row_ids].add(1.0))


def prepare(rollout, *, config, axis_name, state):
    assert isinstance(state, Counting)
    return rloo.prepare(rollout, config=config, axis_name=axis_name)


COUNTING = {
    "Config": Halves,
    "State": Counting,
    "update": policy.updater(prepare, rloo.loss, advance=count),
}


def test_an_algorithm_chooses_its_prompts_and_goes_on_exactly(tmp_path):
    seen = []
    config = with_rl(letters_run(tmp_path), num_iterations=4, validation_interval=9)
    config = replace(config, checkpoint_interval=2)
    chooser = module("chooser", choose=fewest, **COUNTING)

    def run(config):
        return training.rl.run(
            config,
            chooser,
            reward=rewards.length(),
            on_step=lambda step, state, row, batch: seen.append(
                (np.asarray(batch.row_ids).tolist(), np.asarray(state.train.counts).tolist())
            ),
        )

    straight = run(config)
    trained = sorted({row for rows, _ in seen for row in rows})
    drawn = [row for rows, _ in seen for row in rows[::2]]
    assert drawn == sorted(trained, reverse=True)
    assert len(trained) == 8
    assert seen[-1][1] == [2.0 * (row in trained) for row in range(16)]
    first = seen[:]
    goes_on_alike(run, config, straight)
    assert first[-1] == seen[-1]


def test_each_step_has_a_key_of_its_own_for_its_prompts(tmp_path):
    seen = []
    config = with_rl(letters_run(tmp_path), num_iterations=4, validation_interval=9)

    def choose(state, key, *, rows, number, config):
        return jax.random.choice(key, rows, (number,), replace=False)

    training.rl.run(
        config,
        module("random", choose=choose, **COUNTING),
        reward=rewards.length(),
        on_step=lambda step, state, row, batch: seen.append(tuple(batch.row_ids.tolist())),
    )
    assert len(set(seen)) > 2


def test_an_update_that_is_not_finite_names_the_prompts_that_were_chosen(tmp_path):
    config = with_rl(letters_run(tmp_path), num_iterations=1, validation_interval=9)

    def same(state, key, *, rows, number, config):
        return jnp.full(number, jnp.max(rows))  # where the schedule has two

    def broken(state, rollout, key, **how):
        return state, {"nonfinite": jnp.float32(1)}

    parts = {**COUNTING, "update": broken, "choose": same}
    with pytest.raises(TrainingFault) as fault:
        training.rl.run(config, module("broken", **parts), reward=rewards.length())
    assert len(set(re.findall(r"prompts\.json, row \d+", str(fault.value)))) == 1


def test_a_row_that_is_held_out_is_never_chosen(tmp_path):
    config = with_rl(letters_run(tmp_path), num_iterations=1, validation_interval=9)

    def choose(state, key, *, rows, number, config):
        others = jnp.setdiff1d(jnp.arange(16), rows, size=4)
        return others[:number]

    with pytest.raises(UserError, match=r"cheat.choose: data row \d+ is no prompt to train on"):
        training.rl.run(config, module("cheat", choose=choose, **COUNTING), reward=rewards.length())


def test_a_state_of_its_own_stays_where_a_step_is_not_finite():
    params = tabular.policy_params(0)
    batch = replace(scored_rollout([0.0, 1, 2, 4]), row_ids=jnp.array([0, 0, 1, 1]))
    batch = replace(batch, ref_log_probs=batch.log_probs)
    state = Counting.create(params, UPDATE["optimizer"], 3)
    after, _ = COUNTING["update"](state, batch, jax.random.key(0), config=Halves(), **UPDATE)
    assert_array_equal(after.counts, [2, 2, 0])
    batch = replace(batch, scores=batch.scores.at[0].set(jnp.nan))
    after, metrics = COUNTING["update"](state, batch, jax.random.key(0), config=Halves(), **UPDATE)
    assert metrics["nonfinite"] == 1
    assert_array_equal(after.counts, [0, 0, 0])


# --- Which groups teach

ALL = (True, True)
PAIRS = {"group_size": 2}
GROUPS = [  # algorithm, its settings, scores of two pairs, extras, whether a pair teaches
    (grpo, PAIRS, [1, 1, 2, 3], {}, (False, True)),
    (grpo, PAIRS | {"step_end": "end"}, [2, 2, 0, 0], {}, (True, False)),
    (rloo, PAIRS, [1, 1, 2, 3], {}, (False, True)),
    (rloo, PAIRS | {"baseline": "global"}, [1, 1, 2, 2], {}, ALL),
    (rloo, PAIRS | {"baseline": "global"}, [1, 1, 1, 1], {}, (False, False)),
    (pass_at_k, {"group_size": 4, "k": 4}, [1, 1, 1, 0], {}, (False,)),
    (pass_at_k, {"group_size": 4, "k": 2}, [1, 1, 1, 0], {}, (True,)),
    (gdpo, PAIRS | {"components": ("a", "b"), "weights": (2.0, 0.7)}, [1, 1, 2, 3],
     {"a": [1, 0, 0.3, 0.3], "b": [0, 1, 0.1, 0.1]}, (True, False)),
    (safe_rlhf, PAIRS, [1, 1, 1, 1], {"cost": [0, 3, 0.7, 0.7]}, (True, False)),
    (online_dpo, PAIRS, [1, 1, 2, 3], {}, (False, True)),
    (curriculum, PAIRS, [1, 1, 0, 1], {}, (False, True)),
    (replay, PAIRS, [1, 1, 2, 3], {}, (False, True)),
    (otb, PAIRS, [1, 1, 2, 3], {}, (False, True)),
    (ppo, PAIRS, [1, 1, 2, 3], {}, ALL),  # its values are wrong
    (distill, PAIRS, [1, 1, 2, 3], {}, ALL),  # the teacher teaches
    (self_distill, {}, [1, 1, 1, 1], {}, (True,) * 4),
    (module("by_scores"), PAIRS, [1, 1, 2, 3], {}, (False, True)),
    (module("by_scores"), PAIRS, [1, 1, 2, np.nan], {}, (False, True)),  # the run stops at it
]  # fmt: skip


def of_groups(algorithm, settings, scores, extras, missing=()):
    """A loop and a rollout in which the policy sampled, with steps that end in column 3 and 4."""
    batch = scored_rollout(np.float32(scores))
    mask = np.array(batch.response_mask)
    mask[list(missing)] = 0
    values = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32)
    ends = np.zeros(mask.shape, np.float32)
    ends[:, 3:5] = 1
    extras = {name: jnp.float32(np.array(x)) for name, x in extras.items()} | {"end": ends}
    batch = replace(batch, response_mask=mask, values=values, extras=extras, row_ids=np.arange(4))
    if settings.get("step_end"):  # the first pair has another step
        steps = np.zeros(mask.shape, np.float32)
        steps[0, 3:5], steps[1:, 4] = 1, batch.scores[1:]
        batch = replace(batch, rewards=steps, dense=True)
    own = getattr(algorithm, "State", TrainState).create
    sizes = {"rows": 4, "columns": mask.shape[1], "prompts": 4}
    state = own(tabular.policy_params(0), UPDATE["optimizer"], **policy.wanted(own, sizes))
    return iteration.LoopState(state, 0.5), batch


@pytest.mark.parametrize(("algorithm", "settings", "scores", "extras", "expected"), GROUPS)
def test_an_algorithm_says_which_groups_teach(algorithm, settings, scores, extras, expected):
    loop, batch = of_groups(algorithm, settings, scores, extras)
    config = getattr(algorithm, "Config", rloo.Config)(**settings)
    functions = iteration.Functions(TABLE_FN)
    how = {"algorithm": algorithm, "config": config}
    ask = jax.jit(lambda batch: iteration.informative(loop, batch, KEY, functions, **how))
    assert ask(batch).tolist() == list(expected)


@pytest.mark.parametrize("of_rows", [True, False])
def test_what_stands_outside_a_response_teaches_nothing(of_rows):
    """Advantages of rows or of tokens, of a missing row and outside the responses."""
    batch = scored_rollout([0.0] * 4)
    batch = replace(batch, response_mask=batch.response_mask.at[0].set(0))
    advantages = jnp.array([5.0, 0.0, 0.0, 1.0])
    if not of_rows:
        advantages = jnp.where(batch.mask, advantages[:, None], jnp.nan)
    prepared = replace(batch, advantages=advantages)
    found = policy.informative_groups(batch, prepared, rloo.Config(group_size=2))
    assert found.tolist() == [False, True]


def test_what_leaves_rows_out_trains_and_its_groups_are_asked_by_rewards():
    """One of each two; and a rollout of groups that are not whole."""

    def thin_out(rollout, *, config, axis_name=None):
        prepared = rloo.prepare(rollout, config=config)
        return jax.tree.map(lambda x: x[::2], prepared)

    def as_scores(rollout, *, config, axis_name=None):
        return replace(rollout, advantages=rollout.scores[:, None] * rollout.mask)

    batch = scored_rollout([1.0, 1, 0, 1])
    config = rloo.Config(group_size=2)
    state = TrainState.create(tabular.policy_params(0), UPDATE["optimizer"])
    for prepare, rows in ((thin_out, batch), (as_scores, jax.tree.map(lambda x: x[:3], batch))):
        update = policy.updater(prepare, rloo.loss)
        after, metrics = update(state, rows, KEY, config=config, **UPDATE)
        assert after.step == 1
        assert "reward/equal_share" not in metrics
    algorithm = module("thin", prepare=thin_out)
    loop = iteration.LoopState(state, 0.5)
    functions = iteration.Functions(None)
    found = iteration.informative(loop, batch, KEY, functions, algorithm=algorithm, config=config)
    assert found.tolist() == [False, True]


def test_groups_are_asked_after_the_rules():
    """What ended loses nothing, and what did not is masked: then one row of each pair is left."""
    loop, batch = of_groups(grpo, PAIRS, [1, 1, 1, 2], {})
    how = {"algorithm": grpo, "config": grpo.Config(group_size=2)}

    def ask(**rules):
        return iteration.informative(loop, batch, KEY, iteration.Functions(None), **how, **rules)

    def lose(rollout):
        return replace(rollout, scores=rollout.scores - jnp.array([1.0, 0, 0, 1]))

    def drop(rollout):
        return replace(rollout, response_mask=rollout.response_mask.at[::2].set(0))

    batch = replace(batch, response_mask=jnp.asarray(batch.response_mask))
    assert ask().tolist() == [False, True]
    assert ask(shape=lose).tolist() == [True, False]
    assert ask(masked=drop).tolist() == [False, False]


@pytest.mark.parametrize(
    ("algorithm", "settings", "share"),
    [
        (grpo, PAIRS, 0.5),
        (rloo, {"group_size": 1, "baseline": "batch"}, 0.25),  # the first row is missing
        (self_distill, {}, None),
    ],
)
def test_the_share_of_groups_that_teach_nothing_is_a_metric(algorithm, settings, share):
    """Without groups it is of rows; missing ones count. Over two devices it is the same."""
    scores, missing = ([2, 2, 1, 3], ()) if share == 0.5 else ([9, 2, 1, 4], (0,))
    loop, batch = of_groups(algorithm, settings, scores, {}, missing)
    extras = {"teacher_tokens": jnp.float32(batch.tokens), "teacher_mask": batch.attention_mask}
    config = algorithm.Config(**settings)
    of_reference = batch.log_probs if config.kl_in_loss else None
    batch = replace(batch, extras=extras, ref_log_probs=of_reference)
    how = {"policy_fn": TABLE_FN, "optimizer": UPDATE["optimizer"]}
    update = functools.partial(algorithm.update, config=config, **how)
    _, metrics = jax.jit(update)(loop.train, batch, KEY)
    assert metrics.get("reward/equal_share") == share
    specs = {"in_specs": (P(), P("data"), P()), "out_specs": P()}
    mapped = functools.partial(update, axis_name="data")
    mapped = jax.shard_map(mapped, mesh=sharding.make_mesh(2), **specs)
    assert jax.jit(mapped)(loop.train, batch, KEY)[1].get("reward/equal_share") == share


def test_what_prepares_gets_what_it_names():
    """The state before the update, its policy, and a key that no minibatch has."""
    seen = {}

    def prepare(rollout, *, state, key, policy_fn, config, axis_name=None):
        seen.update(state=state, key=key, policy_fn=policy_fn)
        return rloo.prepare(rollout, config=config)

    state = TrainState.create(tabular.policy_params(0), UPDATE["optimizer"])
    config = rloo.Config(group_size=2, num_epochs=3)
    update = policy.updater(prepare, rloo.loss)
    update(state, scored_rollout([0.0, 1, 2, 4]), KEY, config=config, **UPDATE)
    assert seen["state"] is state
    assert seen["policy_fn"] is UPDATE["policy_fn"]
    bits = jax.random.key_data
    assert_array_equal(bits(seen["key"]), bits(jax.random.fold_in(KEY, 6)))


# --- Groups


def test_the_answers_to_a_prompt_stay_together_where_a_loss_needs_them():
    @dataclass(frozen=True)
    class Whole(rloo.Config):
        group_size: int = 2
        num_minibatches: int = 2
        num_microbatches: int = 2
        whole_groups = True

    def loss(params, rollout, key, *, policy_fn, config):
        total, metrics = rloo.loss(params, rollout, key, policy_fn=policy_fn, config=config)
        apart = jnp.abs(rollout.row_ids[::2] - rollout.row_ids[1::2])
        return total, {**metrics, "apart": losses.Mean.of(apart)}

    def apart(config):
        one = scored_rollout([0.0, 1, 2, 3])
        batch = jax.tree.map(lambda x: jnp.concatenate([x] * 4), one)
        batch = replace(batch, row_ids=jnp.arange(16) // 2)
        state = TrainState.create(tabular.policy_params(0), UPDATE["optimizer"])
        update = policy.updater(rloo.prepare, loss)
        return float(update(state, batch, jax.random.key(3), config=config, **UPDATE)[1]["apart"])

    assert apart(Whole()) == 0
    assert apart(rloo.Config(group_size=2, num_minibatches=2, num_microbatches=2)) > 0


def test_a_batch_must_have_whole_groups_in_each_minibatch():
    @dataclass(frozen=True)
    class Whole(rloo.Config):
        group_size: int = 2
        num_minibatches: int = 16
        whole_groups = True

    check = functools.partial(method.check_settings, "mine", RLStage(batch_size=16))
    layout = layout_of(RunConfig())
    check(rloo.Config(group_size=2, num_minibatches=16), layout)
    with pytest.raises(UserError, match=r"rl.batch_size 16 does not divide by 16 mine.* 2 "):
        check(Whole(), layout)


def test_an_update_is_told_the_groups():
    """By their places, also where a run has put groups of other rollouts among them."""
    seen = []

    def update(state, batch, key, **how):
        seen.append(batch.group_ids)
        return state, {"nonfinite": jnp.float32(0)}

    loop = iteration.LoopState(TrainState.create({}, UPDATE["optimizer"]), 0.0)
    learn = functools.partial(
        iteration.learn, algorithm=module("m", update=update), optimizer=UPDATE["optimizer"]
    )
    batch = scored_rollout([0.0, 1, 2, 3])
    for given in (None, jnp.array([3, 3, 1, 1])):
        with_ids = replace(batch, group_ids=given)
        learn(loop, with_ids, None, iteration.Functions(tabular.policy_fn), config=Halves())
    assert_array_equal(seen, [[0, 0, 1, 1], [3, 3, 1, 1]])


def test_a_reward_is_told_the_groups():
    def spread(prompts, responses, group_ids, group_sizes):
        return [10 * group + size for group, size in zip(group_ids, group_sizes, strict=True)]

    tokens = np.array([[3, 4], [3, 5], [3, 4], [3, 5]], np.int32)
    mask = np.array([[0, 1], [0, 0], [0, 1], [0, 1]])
    batch = Rollout(tokens, np.ones_like(mask), mask, np.zeros((4, 2)))
    reward = rewards.from_text(spread, characters("abcd"))
    grouped = replace(batch, group_ids=np.array([0, 0, 1, 1], np.int32))
    scored, _ = rewards.on_host(reward, grouped, {})
    assert_array_equal(scored.scores, [2, 0, 12, 12])  # the second row is missing
    scored, _ = rewards.on_host(reward, batch, {})
    assert_array_equal(scored.scores, [1, 0, 21, 31])  # no groups: each row by itself


def test_a_component_may_have_numbers_of_tokens():
    def parts(prompts, responses):
        return [1.0, None, 3.0], {"step": [[1, 2], [9, 9], 4], "row": [1, 2, None]}

    tokens = np.full((3, 3), 3, np.int32)
    mask = np.array([[0, 1, 1]] * 3)
    batch = Rollout(tokens, np.ones_like(mask), mask, np.zeros((3, 3)))
    scored, components = rewards.on_host(rewards.from_text(parts, characters("abcd")), batch, {})
    assert_array_equal(components["step"], [[0, 1, 2], [np.nan] * 3, [0, 0, 4]])
    assert_array_equal(components["row"], [1, np.nan, np.nan])
    assert_array_equal(scored.scores, [1, 0, 3])
    scored = jax.tree.map(jnp.asarray, scored)
    filled, metrics = iteration.scored(scored, scored.scores, components)
    assert metrics["reward/step"] == 3.5  # the mean of row sums
    assert sorted(filled.extras) == ["row", "step"]


def test_a_run_tells_a_reward_its_groups_in_training_and_validation(tmp_path):
    calls = []

    def score(prompts, responses, group_ids, group_sizes):
        calls.append((prompts, group_ids, group_sizes))
        return [0.0] * len(prompts)

    config = with_rl(
        letters_run(tmp_path), num_iterations=1, validation_interval=1, validation_samples=3
    )
    training.rl.run(config, rloo, rloo.Config(group_size=2), reward=score)
    assert sorted({sizes[0] for _, _, sizes in calls}) == [2, 3]
    for prompts, group_ids, sizes in calls:
        together = {(a, b) for a, b in zip(prompts, group_ids, strict=True)}
        assert len(together) == len(set(prompts)) == len(set(group_ids)) > 1
        assert set(sizes) == {sizes[0]}


def test_an_engine_gives_extras_of_rows_and_of_tokens():
    batch = rollout.from_text(
        [[3], [4, 5]],
        [[3, 4], [5]],
        characters("abcd"),
        log_probs=[[-1, -1], [-1]],
        extras={"cost": [1, 2], "entropy": [[0.5, 0.25], [0.125]]},
    )
    assert_array_equal(batch.extras["cost"], [1, 2])
    assert_array_equal(batch.extras["entropy"], [[0, 0, 0.5, 0.25], [0, 0, 0.125, 0]])
    with pytest.raises(UserError, match=r"row 1: extras 'entropy' has 2 numbers for 1 response"):
        rollout.from_text(
            [[3], [4]],
            [[3, 4], [5]],
            characters("abcd"),
            log_probs=[[-1, -1], [-1]],
            extras={"entropy": [[0.5, 0.25], [0.125, 0]]},
        )


@pytest.mark.parametrize("declared", [(), ("sampler_log_probs",)])
def test_the_log_probs_of_what_sampled_are_an_extra(declared):
    params = initial_params(MODEL)
    sampled = sampling.generate(
        MODEL, params, PROMPTS, jnp.ones_like(PROMPTS), jax.random.key(0), config=SAMPLER
    )
    sampled = replace(sampled, log_probs=sampled.log_probs - sampled.mask)
    loop = iteration.LoopState(TrainState.create(params, OPTIMIZER), 0.0)
    functions = iteration.Functions(Partial(POLICY_FN))
    for keeps in (False, True):
        scored, _ = iteration.rescored(
            loop, sampled, functions, eos_ids=(0,), extras=declared, keep_log_probs=keeps
        )
        expected = sampled.log_probs + sampled.mask * (not keeps)
        assert_allclose(scored.log_probs, expected, atol=1e-5)
        if declared:
            assert_array_equal(scored.extras["sampler_log_probs"], sampled.log_probs)
        else:
            assert scored.extras is None


# --- Gradients through an update


@functools.partial(jax.jit, static_argnums=0)
def final_score(update, kl_coef, weights, batch, params):
    """A score of the parameters after three updates of PPO."""
    batch = replace(
        batch, ref_log_probs=batch.log_probs - 0.3, values=0.1 * jnp.ones(batch.tokens.shape)
    )
    config = ppo.Config(num_minibatches=1, clip_low=5.0, clip_high=5.0)
    state = TrainState.create(params, optax.sgd(0.05))
    for number in range(3):
        shaped = replace(
            batch,
            rewards=rewards.kl_shaped(replace(batch, rewards=None), kl_coef),
            importance_weights=weights[:, None] * batch.mask,
        )
        state, _ = update(
            state,
            shaped,
            jax.random.key(number),
            policy_fn=tabular.policy_fn,
            optimizer=optax.sgd(0.05),
            config=config,
        )
        output = tabular.policy_fn(state.params, batch.tokens, batch.attention_mask, None)
        batch = replace(batch, log_probs=ops.masked(output.log_probs, batch.mask))
    return jnp.sum(jnp.sin(10 * output.log_probs) * batch.mask)


def test_gradients_flow_through_updates_where_they_are_asked_for():
    kl, weights = (jnp.float32(0.2), jnp.array([1.0, 0.5, 2.0, 1.0]))
    start = (scored_rollout([0.0, 1, 2, 4]), tabular.policy_params(0))
    exact = policy.updater(ppo.prepare, ppo.loss, differentiable=True)
    gradient = jax.jit(jax.grad(final_score, argnums=(1, 2)), static_argnums=0)
    of_kl, of_weights = gradient(exact, kl, weights, *start)
    step = 1e-2

    def difference(change):
        ends = [final_score(ppo.update, *change(sign * step), *start) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)

    assert abs(of_kl) > 1e-2
    assert_allclose(of_kl, difference(lambda h: (kl + h, weights)), rtol=2e-2, atol=1e-3)
    for row in range(4):
        found = difference(lambda h, row=row: (kl, weights.at[row].add(h)))
        assert_allclose(of_weights[row], found, rtol=2e-2, atol=1e-3)
    frozen = gradient(ppo.update, kl, weights, *start)
    assert_array_equal(frozen[0], 0)
    assert_array_equal(frozen[1], np.zeros(4))
    ends = [final_score(update, kl, weights, *start) for update in (exact, ppo.update)]
    assert ends[0] == ends[1]


def test_a_jitted_loss_does_not_remember_how_it_was_traced_before():
    """The gradient through a step, with respect to the importance weights, in both orders."""
    batch = replace(scored_rollout([0.0, 1, 2, 4]), advantages=jnp.ones((4, 7)))
    state = TrainState.create(tabular.policy_params(0), optax.sgd(0.05))

    def gradients(*kinds):
        loss = jax.jit(rloo.loss, static_argnames=("policy_fn", "config"))

        def after(weight, update):
            weighted = replace(batch, importance_weights=weight * batch.mask)
            end, _ = update(
                state, weighted, jax.random.key(0), config=rloo.Config(group_size=2), **UPDATE
            )
            return jnp.sum(jnp.sin(end.params["logits"]))

        made = [
            policy.updater(lambda batch, **_: batch, loss, differentiable=kind) for kind in kinds
        ]
        return [float(jax.grad(after)(1.0, update)) for update in made]

    (exact, frozen), (frozen_first, exact_last) = gradients(True, False), gradients(False, True)
    assert frozen == frozen_first == 0.0
    assert exact == exact_last != 0.0


def test_a_loss_whose_weights_are_constants_is_no_function_to_differentiate():
    update = policy.updater(grpo.prepare, grpo.loss, differentiable=True)
    batch = scored_rollout([0.0, 1, 2, 3])
    state = TrainState.create(tabular.policy_params(0), UPDATE["optimizer"])
    for config in (
        grpo.Config(group_size=2),
        grpo.Config(group_size=2, kl_loss_coef=0.0, surrogate="cispo"),
    ):
        with pytest.raises(ValueError, match="constants by their definition"):
            update(state, batch, jax.random.key(0), config=config, **UPDATE)


# --- One iteration

SAMPLER = sampling.SamplingConfig(max_new_tokens=3, eos_id=None, pad_id=0)
MODEL = models.build(
    models.GPT2Config(vocab_size=5, max_length=5, hidden_size=8, num_layers=1, num_heads=1)
)
POLICY_FN = models.policy_fn(MODEL, prompt_length=2)
OPTIMIZER = optax.adam(1e-2)
REWARD = rewards.token_count(2, include_prompt=False)
PROMPTS = jnp.array([[1, 2], [3, 4]]).repeat(2, axis=0)
STEP = functools.partial(
    iteration.iterate,
    model=MODEL,
    sampling=SAMPLER,
    policy_fn=POLICY_FN,
    optimizer=OPTIMIZER,
    reward_fn=REWARD,
)


def test_an_iteration_is_collect_score_shape_update():
    params = initial_params(MODEL)
    ref_fn = POLICY_FN.bind(jax.tree.map(lambda x: 1.5 * x, params))
    config = rloo.Config(group_size=2)
    state = TrainState.create(params, OPTIMIZER)

    @jax.jit
    def by_hand(state, key):
        sample_key, update_key = jax.random.split(key)
        ones = jnp.ones_like(PROMPTS)
        batch = rollout.collect(
            MODEL,
            state.params,
            PROMPTS,
            ones,
            sample_key,
            sampling=SAMPLER,
            policy_fn=POLICY_FN,
            ref_fn=ref_fn,
        )
        batch = replace(batch, scores=REWARD(batch)[0])
        batch = replace(batch, rewards=rewards.kl_shaped(batch, 0.5))
        how = {"policy_fn": POLICY_FN, "optimizer": OPTIMIZER, "config": config}
        return rloo.update(state, batch, update_key, **how), batch

    prompts = iteration.Prompts(PROMPTS, jnp.ones_like(PROMPTS))
    step = functools.partial(STEP, algorithm=rloo, config=config, ref_fn=ref_fn, kl_coef=0.5)
    key = jax.random.key(5)
    (expected, by_update), batch = by_hand(state, key)
    found, metrics = jax.jit(step)(state, prompts, key)
    jax.tree.map(functools.partial(assert_allclose, atol=1e-6), found, expected)
    assert metrics["objective/score"] == batch.scores.mean()
    assert_allclose(metrics["grad_norm"], by_update["grad_norm"], rtol=1e-5)
    assert metrics["objective/kl"] != 0

    def whole_run(key):
        keys = jax.random.split(key, 3)
        return jax.lax.scan(lambda state, key: step(state, prompts, key), state, keys)

    states, metrics = jax.jit(jax.vmap(whole_run))(jax.random.split(key, 2))
    assert metrics["objective/score"].shape == (2, 3)
    assert_array_equal(states.step, [3, 3])


def test_an_iteration_samples_as_its_algorithm_says():
    params = initial_params(MODEL)
    reference = jax.tree.map(lambda x: 5.0 * x, params)
    seen = []

    def update(state, batch, key, **how):
        seen.append(batch)
        return state, {"nonfinite": jnp.float32(0)}

    STEP(
        TrainState.create(params, OPTIMIZER),
        iteration.Prompts(PROMPTS, jnp.ones_like(PROMPTS)),
        jax.random.key(0),
        algorithm=module("halves", update=update, respond=respond),
        config=Halves(cold=0.5),
        ref_fn=Partial(POLICY_FN, reference),
    )
    (batch,) = seen
    gap = np.abs(batch.log_probs - batch.ref_log_probs)
    assert gap[::2].max() > 0.01
    cold = models.policy_fn(MODEL, 0.5, prompt_length=2)
    theirs = cold(reference, batch.tokens, batch.attention_mask, None).log_probs
    assert_allclose((batch.log_probs * batch.mask)[1::2], (theirs * batch.mask)[1::2], atol=1e-5)
    assert_array_equal(batch.group_ids, [0, 0, 1, 1])


def test_an_iteration_gives_the_parts_of_its_prompts_samples_of_their_own():
    """One key for both halves, and a reference that is the policy."""
    prompts = jnp.ones((32, 2), jnp.int32)
    _, _, batch = iterated(rloo, Halves(), prompts=prompts, respond=DOCUMENTED)
    said = np.asarray(batch.tokens)[:, 2:]
    assert np.mean(np.all(said[::2] == said[1::2], axis=1)) < 0.2
    assert len(np.unique(said, axis=0)) > 16


def iterated(
    algorithm, config, prompts=PROMPTS, row_ids=None, respond=None, run=lambda f, *x: f(*x), **how
):
    """The state and the metrics of an iteration, and the rollout that its update got."""
    params = initial_params(MODEL)
    seen = []

    def update(state, batch, *rest, **named):
        seen.append(batch)
        return algorithm.update(state, batch, *rest, **named)

    parts = {**vars(algorithm), "update": update, "respond": respond}
    watched = types.SimpleNamespace(**parts)
    sizes = {} if row_ids is None else {"prompts": 3}
    state = getattr(algorithm, "State", TrainState).create(params, OPTIMIZER, **sizes)
    how = {"algorithm": watched, "config": config, "ref_fn": POLICY_FN.bind(params)} | how

    @jax.jit
    def step(state, key):
        drawn = iteration.Prompts(prompts, jnp.ones_like(prompts), row_ids)
        return *STEP(state, drawn, key, **how), seen[0]

    return run(step, state, jax.random.key(2))


def test_the_programs_of_the_page_are_iterations():
    """What they say of a run holds there too."""
    program = ROOT / "docs" / "programs"
    exec((program / "gspo.py").read_text("utf-8"), vars(gspo := types.ModuleType("gspo")))
    after, metrics, batch = iterated(gspo, gspo.Config(group_size=2))
    assert after.step == 1
    assert metrics["grad_norm"] > 0
    exec((program / "pass_rates.py").read_text("utf-8"), vars(rates := types.ModuleType("rates")))
    after, _, batch = iterated(rates, rates.Config(group_size=2), row_ids=jnp.array([2, 2, 0, 0]))
    scores = np.asarray(batch.scores).reshape(2, 2).mean(axis=1)
    expected = [0.7 * 0.5 + 0.3 * scores[1], 0.5, 0.7 * 0.5 + 0.3 * scores[0]]
    assert_allclose(after.rates, expected, rtol=1e-6)
    assert scores.max() > 0
    rows = jnp.array([0, 2])
    chosen = rates.choose(after, jax.random.key(0), rows=rows, number=2, config=rates.Config())
    assert sorted(chosen.tolist()) == [0, 2]


def test_the_components_of_the_page_are_those_of_a_rollout():
    config = module("config", group_size=2)
    batch = replace(scored_rollout([0.0, 1, 2, 4]), extras={"a": jnp.array([1, jnp.nan, 3, 4])})
    names = {"grpo": grpo, "policy": policy, "jnp": jnp, "dataclass": dataclass}
    names |= {"config": config, "rollout": batch, "name": "a"}
    made = of_the_page("class Config(grpo", **names)
    assert made["Config"](components=("a", "b")).extras == {"a": "row", "b": "row"}
    assert_array_equal(made["mask"], [[True, False], [True, True]])
    assert_array_equal(made["values"][1], [3, 4])


def bare_prepare(rollout, *, config, axis_name=None):
    assert (config.group_size, config.kl_in_loss, config.num_epochs) == (1, False, 1)
    return policy.spread(config.weight * rollout.scores, rollout)


def bare_loss(params, rollout, key, *, policy_fn, config):
    output = ops.evaluate(policy_fn, params, rollout)
    per_token = losses.policy_gradient(output.log_probs, rollout.advantages, rollout.mask)
    return losses.aggregate(per_token, rollout.mask), {}


BARE = {"Config": Bare, "update": policy.updater(bare_prepare, bare_loss)}


def test_an_iteration_has_the_defaults_of_a_run():
    """Of a Config without a group size, and of the KL penalty."""
    by_group = {"reward_fn": lambda rollout: (1.0 * rollout.group_ids, {})}
    _, metrics, batch = iterated(module("bare", **BARE), Bare(), **by_group)
    assert metrics["grad_norm"] > 0
    assert_array_equal(batch.group_ids, [0, 1, 2, 3])
    assert_array_equal(batch.scores, batch.group_ids)
    assert "kl/coef" not in metrics
    of_two = {"config": rloo.Config(group_size=2)}
    _, metrics, batch = iterated(rloo, **of_two)
    assert metrics["kl/coef"] == np.float32(rloo.kl_coef)
    assert_array_equal(batch.group_ids, [0, 0, 1, 1])
    in_its_loss = {"config": grpo.Config(group_size=2)}
    for algorithm, how, has_penalty in (
        (rloo, of_two | {"kl_coef": 0.0}, False),
        (rloo, of_two | {"kl_coef": jnp.float32(0.0)}, True),  # it may be another number
        (grpo, in_its_loss, True),
    ):
        _, metrics, _ = iterated(algorithm, **how, run=jax.eval_shape)
        assert ("objective/kl" in metrics) == has_penalty
    with pytest.raises(UserError, match="its Config must be a frozen dataclass"):
        iterated(module("bare", **BARE), types.SimpleNamespace(weight=0.5))


def test_an_iteration_gives_the_log_probs_of_what_sampled():
    @dataclass(frozen=True)
    class Reads(rloo.Config):
        extras = types.MappingProxyType({"sampler_log_probs": "token"})

    _, metrics, batch = iterated(rloo, Reads(group_size=2))
    assert_array_equal(batch.extras["sampler_log_probs"], batch.sampler_log_probs)
    assert_allclose(batch.sampler_log_probs, batch.log_probs, atol=1e-5)
    assert metrics["policy/sampler_gap"] < 1e-5


@pytest.mark.parametrize(
    ("algorithm", "how", "says"),
    [
        (rloo, {"ref_fn": None}, r"give ref_fn=policy_fn\.bind\(params\)"),
        (grpo, {"ref_fn": None}, r"give ref_fn=policy_fn\.bind\(params\)"),
        (rloo, {"respond": respond, "ref_fn": POLICY_FN, "kl_coef": 0}, r"give ref_fn="),
        (rloo, {"reward_fn": lambda rollout: rollout.log_probs[:, -1]}, r"\(scores, \{\}\), got"),
        (rloo, {"reward_fn": lambda rollout: (rollout.log_probs[:, -1], 1.0)}, r"expected a pair"),
    ],
)
def test_what_an_iteration_lacks_is_a_sentence(algorithm, how, says):
    config = (grpo if algorithm is grpo else rloo).Config(group_size=2)
    with pytest.raises(ValueError, match=says) as lacking:
        iterated(algorithm, config, **how)
    assert "\n" not in str(lacking.value).partition("\n----")[0]


def test_a_command_is_a_stage_or_a_method():
    assert find_method("gspo") is None
    assert find_method("nash-md").__name__ == "rlhf_jax.algorithms.nash_md"
    assert {"maxrl", "spo"} < set(method_names())
    with pytest.raises(UserError, match=r"no command 'maxr'; did you mean maxrl\?"):
        commands.run(["maxr"])
    with pytest.raises(UserError, match=r"unknown key maxrl; these are settings of .*jax maxrl`"):
        parse(RunConfig, ["--config", "tiny", "maxrl"])
    for name in ("policy", "step", "reward_model", "reward-model", "../ppo", "ppo.x", "ppo", ""):
        assert find_method(name) is None
