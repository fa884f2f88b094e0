"""What a run draws: rows, keys, batches. Each step draws others than the one before, a second run
draws the same, and no two random streams share a key."""

import dataclasses
import itertools
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import LETTERS, json_lines, letters_run, metric_rows
from numpy.testing import assert_array_equal

from rlhf_jax import models, ppo, rloo, training, vpg
from rlhf_jax.config import (
    LoRA,
    Optimizer,
    PPOStage,
    Text,
)
from rlhf_jax.errors import UserError
from rlhf_jax.report import records
from rlhf_jax.runs import devices
from rlhf_jax.training import memory, phases, reward_model, rl, stage
from rlhf_jax.types import Rollout

pytestmark = pytest.mark.usefixtures("no_pages")


def untouched(state):
    """What an update returns that leaves the state as it is."""
    return state, {"nonfinite": 0.0}


def unchecked(monkeypatch):
    """Programs may be functions that cannot be compiled: their memory is not checked, and those
    before the update are called in place of their check.
    """
    monkeypatch.setattr(memory, "check", lambda *args: None)
    monkeypatch.setattr(memory, "rehearsed", lambda phase, program: program)


@pytest.fixture
def config(tmp_path):
    return letters_run(tmp_path)


def replacing(monkeypatch, replace):
    """Puts ``replace(programs)``, a dict of programs, in place of the programs of RL runs."""
    unchecked(monkeypatch)
    compiled = rl.compiled

    def replaced(*how):
        programs = compiled(*how)
        return programs._replace(**replace(programs))

    monkeypatch.setattr(rl, "compiled", replaced)


def bits(key):
    return np.asarray(jax.random.key_data(key)).tobytes()


def again(config, tmp_path):
    return dataclasses.replace(config, output_dir=str(tmp_path / "again"))


def test_streams_are_apart():
    names = typing.get_args(stage.Stream)
    keys = {
        bits(stage.stream(seed, run, name))
        for seed in (0, 1)
        for run in ("sft", "ppo")
        for name in names
    }
    assert {"init", "data", "rollout", "update", "eval"} <= set(names)
    assert len(keys) == 4 * len(names)


@pytest.mark.parametrize("run", [training.sft.run, training.reward_model.run, training.dpo.run])
def test_a_supervised_run_draws_other_rows_and_another_key_at_each_step(
    run, config, tmp_path, monkeypatch
):
    drawn = []

    def jit_update(self, update, num_blocks):
        def record(state, batch, key, **functions):
            tokens = batch.tokens if hasattr(batch, "tokens") else batch.chosen.tokens
            rows = np.sort(np.asarray(tokens).reshape(4, -1), axis=0)
            drawn.append((rows.tobytes(), bits(key)))
            return untouched(state)

        return record

    unchecked(monkeypatch)
    monkeypatch.setattr(stage.Stage, "jit_update", jit_update)
    run(config)
    run(again(config, tmp_path))
    first, second = drawn[:6], drawn[6:]
    batches, keys = zip(*first, strict=True)
    assert first == second
    assert len(set(batches)) == len(set(keys)) == 6


def test_an_rl_run_draws_other_prompts_and_keys_at_each_iteration(
    config, tmp_path, monkeypatch, capsys
):
    drawn = []

    def recording(name, phase):
        def call(state, inputs, key, *functions):
            drawn.append((name, tuple(sorted(inputs.row_ids.tolist())), bits(key)))
            return phase(state, inputs, key, *functions)

        return call

    def programs(made):
        return {
            "respond": recording("sample", made.respond),
            "rescored": lambda state, sampled, functions: (sampled, {}),
            "learn": recording("update", lambda state, *inputs: untouched(state)),
        }

    def write_page(runs, path):
        raise UserError(f"there is {records.model_config(runs[0])}")

    replacing(monkeypatch, programs)
    monkeypatch.setattr("rlhf_jax.report.page.write", write_page)  # whose failure loses nothing
    folder = training.rl.run(config, vpg).folder
    training.rl.run(again(config, tmp_path), vpg)
    failure = (
        f"report.html could not be drawn: UserError: there is {folder / 'model' / 'config.json'}\n"
    )
    assert failure in capsys.readouterr().out
    assert drawn[:9] == drawn[9:]
    assert drawn[0] == drawn[2]  # the first step's memory is checked
    drawn = drawn[1:9]
    assert [name for name, *_ in drawn] == ["sample", *["sample", "update"] * 3, "sample"]
    assert drawn[0] == drawn[7]  # validations sample with one key, so that they can be compared
    assert drawn[0][2] == bits(stage.stream(config.seed, "vpg", "eval"))
    assert len({key for *_, key in drawn[:7]}) == 7
    train_rows, held_out = [row for _, rows, _ in drawn[1:7:2] for row in rows], drawn[0][1]
    assert sorted((*train_rows, *held_out)) == list(range(16))
    samples = json_lines(folder / "samples.jsonl")
    assert all(row["score"] == ord(row["prompt"][-1]) for row in samples)
    assert (
        f"reward {config.reward[0]}"
        in json.loads((folder / "manifest.json").read_text("utf-8"))["data"]
    )


TEXTS = ["lazy fox jum", *(letter * (1 + i % 3) for i, letter in enumerate(LETTERS[1:]))]


def uneven(config, tmp_path, multiple, **settings):
    """Fifteen prompts of at most 3 tokens and one of 12."""
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": text} for text in TEXTS]))
    how = dataclasses.replace(config.rl, num_iterations=6, validation_interval=6, **settings)
    return dataclasses.replace(
        config, reward=("count:a",), text=Text(bucket_multiple=multiple), rl=how
    )


@pytest.mark.parametrize(
    ("several_turns", "layers", "narrow"), [(False, 2, 3), (True, 2, 3), (False, 8, 8)]
)
def test_each_batch_is_as_wide_as_its_own_prompts_need(
    config, tmp_path, monkeypatch, several_turns, layers, narrow
):
    seen, made = [], set()
    slots, policy_fn = 2 * several_turns, models.policy_fn
    (tmp_path / "world.py").write_text("def silent(conversation, row): return None")

    def respond(policy, inputs, key):
        tokens, mask = (np.pad(x, ((0, 0), (0, 2))) for x in inputs[:2])
        lengths = inputs.attention_mask.sum(axis=1).tolist()
        assert lengths == [len(TEXTS[row]) for row in inputs.row_ids]  # nothing is cut
        seen.append((inputs.tokens.shape[1] - slots, max(lengths)))
        said = np.zeros_like(mask)
        said[:, -2] = 1  # a token each
        return Rollout(tokens, mask | said, said, np.zeros(said.shape, np.float32), inputs.row_ids)

    fakes = {
        "respond": respond,
        "rescored": lambda state, sampled, functions: (sampled, {}),
        "learn": lambda state, *inputs: untouched(state),
    }
    replacing(monkeypatch, lambda programs: fakes)
    monkeypatch.setattr(rl.models, "policy_fn", lambda *how: (made.add(how[2]), policy_fn(*how))[1])
    environment = f"{tmp_path / 'world.py'}:silent" if several_turns else None
    config = uneven(config, tmp_path, 3, environment=environment)
    network = dataclasses.replace(config.network, num_layers=layers)
    training.rl.run(dataclasses.replace(config, network=network), vpg)
    checked, validation, *steps, last = seen
    assert checked[0] == 12  # the widest, whether the first batch needs it or not
    assert validation == last
    assert {width for width, _ in steps} == made == {narrow, 12}
    assert all(width == (12 if longest == 12 else narrow) for width, longest in (*steps, last))


@pytest.mark.parametrize("turns", [None, 3])
def test_validations_sample_in_batches_of_a_step(turns, config, tmp_path, monkeypatch):
    """Nine prompts of their own: three batches of four, the last with three absent rows, or two of
    eight. Each response is drawn from the place of its row among all, and the reward, which
    compares responses, sees all."""
    shapes = []

    def programs(made):
        def respond(*inputs):
            shapes.append(inputs[1].tokens.shape)
            return made.respond(*inputs)

        return {"respond": respond}

    def validated(batch_size):
        shapes.clear()
        own = {"validation_data": (str(tmp_path / "others.json"),), "validation_interval": 1}
        own |= {"environment": f"{tmp_path / 'talk.py'}:ask", "max_turns": turns} if turns else {}
        how = dataclasses.replace(
            config.rl, batch_size=batch_size, num_iterations=1, max_new_tokens=6, **own
        )
        run = dataclasses.replace(
            again(config, tmp_path), rl=how, overwrite=True, reward=("diversity",)
        )
        folder = training.rl.run(run, vpg).folder
        assert len(set(shapes)) == 1
        row = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[0])
        samples = json_lines(folder / "samples.jsonl")
        found = {name: x for name, x in row.items() if name.startswith("validation/")}
        return [sample for sample in samples if sample["step"] == 0], found, len(shapes)

    replacing(monkeypatch, programs)
    (tmp_path / "others.json").write_text(json.dumps([{"prompt": "say a", "letter": "a"}] * 9))
    (tmp_path / "talk.py").write_text(TALK)
    samples, metrics, num_sampled = validated(4)
    assert turns or num_sampled == 2 + 2 * 3  # the check of memory and a step, then two validations
    assert len({sample["response"] for sample in samples}) == len(samples) == 9
    same, in_two, num_sampled = validated(8)
    assert same == samples
    assert in_two == pytest.approx(metrics)
    assert turns or num_sampled == 2 + 2 * 2
    assert ("validation/environment/turns" in metrics) == bool(turns)


def four_layers(config, tmp_path, monkeypatch):
    """The run with four layers, and options for programs of four blocks that no compiler knows."""
    monkeypatch.setattr(
        devices, "compiler_options", lambda num_blocks: {"xla_of": 4} if num_blocks == 4 else {}
    )
    return dataclasses.replace(
        again(config, tmp_path), network=dataclasses.replace(config.network, num_layers=4)
    )


@pytest.mark.parametrize("is_scanned", [False, True])
def test_an_rl_program_is_compiled_for_its_number_of_blocks(
    is_scanned, config, tmp_path, monkeypatch
):
    """Both samplers, the greedy one of ReMax's baseline too, for all layers; what is scanned for
    one; nothing else.
    """
    compiled, jit = {}, jax.jit

    def spy(fn, **options):
        phase = getattr(fn, "func", fn)  # of a functools.partial
        compiled.setdefault(phase, []).append(options.get("compiler_options"))
        return jit(fn, **options)

    run = four_layers(config, tmp_path, monkeypatch)
    compute = dataclasses.replace(run.compute, scan_layers=is_scanned)
    monkeypatch.setattr(rl.jax, "jit", spy)
    with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_of'"):
        training.rl.run(dataclasses.replace(run, compute=compute), vpg)
    compiled = {phase.__name__: options for phase, options in compiled.items() if any(options)}
    updates = (
        {} if is_scanned else {"rescored": [{"xla_of": 4}], "update_in_place": [{"xla_of": 4}]}
    )
    assert compiled == {"respond": [{"xla_of": 4}] * 2} | updates


@pytest.mark.parametrize("run", [training.sft.run, training.reward_model.run, training.dpo.run])
def test_a_supervised_update_is_compiled_for_its_number_of_blocks(
    run, config, tmp_path, monkeypatch
):
    with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_of'"):
        run(four_layers(config, tmp_path, monkeypatch))


@pytest.mark.soak
def test_widths_change_nothing_but_rounding_and_survive_a_resume(config, tmp_path, monkeypatch):
    def metrics(multiple, name, **options):
        run = dataclasses.replace(
            uneven(config, tmp_path, multiple, kl_coef=0.1), output_dir=str(tmp_path / name)
        )
        folder = training.rl.run(
            dataclasses.replace(run, checkpoint_interval=1, **options), ppo
        ).folder
        return metric_rows(folder)

    narrow, wide = metrics(3, "narrow"), metrics(12, "wide")
    for row, expected in zip(narrow, wide, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)

    def interrupting(programs):
        steps = itertools.count()

        def learn(*inputs):
            if next(steps) == 3:
                raise KeyboardInterrupt
            return programs.learn(*inputs)

        return {"learn": learn}

    with monkeypatch.context() as patch:
        replacing(patch, interrupting)
        with pytest.raises(KeyboardInterrupt):
            metrics(3, "again")
    assert metrics(3, "again", resume=True) == narrow


TALK = """
def ask(conversation, row):
    return ("say", float(ord(row["letter"]))) if len(conversation) == 2 else None
"""


@pytest.mark.parametrize("turns", [None, 3])
def test_a_greedy_baseline_is_that_of_the_rows_own_prompt(turns, config, tmp_path, monkeypatch):
    """The reward is a number of the prompt alone, so that nothing is learnt: each response scores
    as the greedy one. An environment pays as much again, for the first response."""
    keys, rollouts, asked = [], [], []

    def programs(made):
        def respond(*inputs):
            keys.append(bits(inputs[2]))
            return made.respond(*inputs)

        def likeliest(policy, inputs, key):
            keys_tried = (key, jax.random.key(77))
            greedy, same = (made.respond_greedily(policy, inputs, k) for k in keys_tried)
            assert_array_equal(greedy.tokens, same.tokens)  # needs no key
            asked.append(inputs)
            return greedy

        def learn(state, rollout, *inputs):
            rollouts.append(rollout)
            return made.learn(state, rollout, *inputs)

        return {"respond": respond, "respond_greedily": likeliest, "learn": learn}

    replacing(monkeypatch, programs)
    (tmp_path / "talk.py").write_text(TALK)
    talks = (
        {"environment": f"{tmp_path / 'talk.py'}:ask", "max_turns": turns, "max_new_tokens": 8}
        if turns
        else {}
    )
    settings = dataclasses.replace(config.rl, num_iterations=2, validation_fraction=0.0, **talks)
    config = dataclasses.replace(config, rl=settings)
    metrics = training.rl.run(config, vpg, vpg.Config(baseline="greedy")).metrics
    for rollout in rollouts:
        present = np.any(rollout.response_mask, axis=1)
        assert_array_equal(present, [LETTERS[row] != "a" for row in rollout.row_ids])
        expected = [(2 if turns else 1) * ord(LETTERS[row]) for row in rollout.row_ids[present]]
        assert_array_equal(rollout.greedy_rewards[present], expected)
        assert_array_equal(rollout.scores[present], expected)
    assert (metrics["grad_norm"], metrics["nonfinite"]) == (0, 0)
    assert metrics["objective/greedy_score"] == metrics["objective/score"]
    stream = stage.stream(config.seed, "vpg", "rollout")
    assert [key for key, _ in itertools.groupby(keys)] == [
        bits(jax.random.fold_in(stream, step)) for step in (0, 1)
    ]
    assert (
        len(keys) > 3 if turns else len(keys) == 3
    )  # the first to check the memory; then one for each turn
    assert len(asked) >= 3


REWARDS = """
def one(prompts, responses):
    return [1.0 + 0.5 * (i % 2) for i in range(len(responses))]

def two(prompts, responses):
    return [2.0] * len(responses)
"""


@pytest.mark.parametrize("refresh", [None, 2])
def test_reference_judge_and_groups_are_those_of_the_settings(
    refresh, config, tmp_path, monkeypatch
):
    """The policy moves far at each of four steps; so does its KL from the reference, until the
    policy becomes the reference, every two steps.
    """
    (tmp_path / "rewards.py").write_text(REWARDS)
    learned = []

    def programs(made):
        def learn(state, rollout, *inputs):
            learned.append(np.asarray(rollout.row_ids))
            return made.learn(state, rollout, *inputs)

        return {"learn": learn}

    replacing(monkeypatch, programs)
    how = {"kl_coef": 0.5, "reference_refresh": refresh, "judge": (f"{tmp_path}/rewards.py:two",)}
    how["temperature"] = 0.5
    optimizer = Optimizer(learning_rate=0.3, schedule="constant")
    settings = dataclasses.replace(config.rl, num_iterations=4, optimizer=optimizer, **how)
    config = dataclasses.replace(config, reward=(f"{tmp_path}/rewards.py:one",), rl=settings)
    folder = training.rl.run(config, rloo, rloo.Config(group_size=2)).folder
    rows = metric_rows(folder)
    assert {row.get("validation/judge", 2) for row in rows} == {2}
    assert {row.get("validation/score", 1.25) for row in rows} == {1.25}
    moved = [abs(row["objective/kl"]) > 1e-3 for row in rows[1:]]
    assert moved == [False, True, refresh is None, True]
    for row in rows[1:]:
        shaped = row["objective/score"] - 0.5 * row["objective/kl"]
        assert row["objective/reward"] == pytest.approx(shaped, rel=1e-5)
        # Sampler, update and reference divide by one temperature.
        assert row["policy/sampler_gap"] < 1e-4
        assert row["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    for row_ids in learned:  # adjacent answers to one prompt
        assert row_ids[0] == row_ids[1] != row_ids[2] == row_ids[3]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_sampler_gets_the_arrays_of_the_state(scan_layers, config, tmp_path, monkeypatch):
    calls = []

    def recording(name, phase):
        return lambda *inputs: (calls.append((name, inputs[0])), phase(*inputs))[1]

    replacing(monkeypatch, lambda made: {"respond": recording("respond", made.respond)})
    monkeypatch.setattr(phases, "sampler", recording("sampler", phases.sampler))
    (tmp_path / "talk.py").write_text(TALK)
    talks = {"environment": f"{tmp_path / 'talk.py'}:ask", "max_turns": 3, "max_new_tokens": 8}
    settings = dataclasses.replace(config.rl, num_iterations=2, validation_fraction=0.0, **talks)
    compute = dataclasses.replace(config.compute, scan_layers=scan_layers)
    network = dataclasses.replace(config.network, num_layers=3)
    training.rl.run(dataclasses.replace(config, rl=settings, compute=compute, network=network), vpg)
    weights = [policy for name, policy in calls if name == "respond"]
    assert all(("h" in policy) == scan_layers for policy in weights)
    held = {
        id(leaf) for name, state in calls if name == "sampler" for leaf in jax.tree.leaves(state)
    }
    assert {id(leaf) for leaf in jax.tree.leaves(weights)} <= held  # no copy
    assert len(weights) > 3 == len(calls) - len(weights)  # the check of memory, then two iterations


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["whole", "lora"])
@pytest.mark.parametrize("value", ["shared", "separate"])
def test_what_samples_is_the_policy_that_learns(value, lora, config, tmp_path):
    """The log-probs of its samples are those of the update's own forward pass, also after updates
    that moved it far.
    """
    settings = dataclasses.replace(
        config.rl, validation_fraction=0.0, optimizer=Optimizer(learning_rate=0.2)
    )
    if lora is not None:
        training.sft.run(config)
        config = dataclasses.replace(
            again(config, tmp_path), model=str(tmp_path / "first" / "model"), lora=lora
        )
    metrics = training.rl.run(
        dataclasses.replace(config, rl=settings), ppo, PPOStage(value=value)
    ).metrics
    assert metrics["grad_norm"] > 0
    assert abs(metrics["policy/sampler_gap"]) < 1e-5


def test_a_run_loads_reward_models_that_read_whole_texts(config, monkeypatch):
    def load(source, compute, place, score_rows, length, policy):
        raise UserError(f"{source} {length}")

    monkeypatch.setattr(rl.initial, "load_reward_model", load)
    with pytest.raises(UserError, match=r"^rm 7$"):  # "say x" and two new tokens
        training.rl.run(dataclasses.replace(config, reward=("rm",)), vpg)


def test_a_missing_environment_is_named_by_its_setting_before_anything_is_read(config, tmp_path):
    for given, file in (("env.py:ask", "env.py"), ("ask", ".")):
        settings = dataclasses.replace(config.rl, environment=given)
        with pytest.raises(
            UserError,
            match=rf"^rl\.environment {given}: no such file {file}; expected FILE.py:FUNCTION$",
        ):
            training.rl.run(dataclasses.replace(config, rl=settings, data=("none.json",)), vpg)


def test_a_reward_model_is_normalised_to_mean_0_and_variance_1():
    def score(params, answers):
        return params["score"]["gain"] * answers.tokens.sum(axis=2) + params["score"]["shift"]

    tokens = np.array([[1, 2], [3, 4], [5, 9]], np.int32)
    samples = Rollout(
        tokens, np.ones_like(tokens), np.ones_like(tokens), np.zeros((3, 2), np.float32)
    )
    params = reward_model._normalized(
        score, {"score": {"gain": jnp.float32(7.0), "shift": jnp.float32(5.0)}}, samples
    )
    scores = np.asarray(score(params, Rollout(tokens[:, None], None, None, None)))
    assert (scores.mean(), scores.std()) == pytest.approx((0.0, 1.0), abs=1e-6)
