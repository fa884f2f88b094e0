"""What a run draws: rows, keys, batches. Each step draws others than the one before, a second run
draws the same, and no two random streams share a key."""

import functools
import itertools
import json
import typing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import LETTERS, letters_run, metric_rows, run_vpg, slow, with_rl
from numpy.testing import assert_array_equal

from rlhf_jax import iteration, models, ppo, rloo, training, vpg
from rlhf_jax.config import (
    LoRA,
    Optimizer,
    PPOStage,
    Text,
)
from rlhf_jax.errors import UserError
from rlhf_jax.models.hf import VALUE_HEAD
from rlhf_jax.report import records
from rlhf_jax.runs import devices
from rlhf_jax.training import rl
from rlhf_jax.training.common import memory, stage
from rlhf_jax.types import Rollout


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


def replacing(monkeypatch, others):
    """Puts ``others(programs)``, a dict of programs, in place of the programs of RL runs."""
    unchecked(monkeypatch)
    compiled = rl.entry.compiled

    def replaced(*how):
        programs = compiled(*how)
        chosen = others(programs)
        if "respond" in chosen:  # validations sample too
            chosen = {"respond_to_each": chosen["respond"]} | chosen
        return programs._replace(**chosen)

    monkeypatch.setattr(rl.entry, "compiled", replaced)


def unscored(state, sampled, functions):
    """In the place of ``rescored``: the rollout as it was sampled."""
    return sampled, {}


def bits(key):
    return np.asarray(jax.random.key_data(key)).tobytes()


def again(config, tmp_path):
    return replace(config, output_dir=str(tmp_path / "again"))


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


SUPERVISED = [training.sft.run, slow(training.reward_model.run), slow(training.dpo.run)]


@pytest.mark.parametrize("run", SUPERVISED)
def test_a_supervised_run_draws_other_rows_and_another_key_at_each_step(
    run, config, tmp_path, monkeypatch, capsys, pages
):
    """Its page, which is drawn when the model is there, may fail."""
    drawn = []

    def write_page(runs, path):
        raise UserError(f"there is {records.model_config(runs[0])}")

    def jit_update(self, update, num_blocks):
        def record(state, batch, key, **functions):
            tokens = batch.tokens if hasattr(batch, "tokens") else batch.chosen.tokens
            rows = np.sort(np.asarray(tokens).reshape(4, -1), axis=0)
            drawn.append((rows.tobytes(), bits(key)))
            return untouched(state)

        return record

    unchecked(monkeypatch)
    monkeypatch.setattr(stage.Stage, "jit_update", jit_update)
    monkeypatch.setattr("rlhf_jax.report.page.write", write_page)
    folder = run(config).folder
    run(again(config, tmp_path))
    there = folder / "model" / "config.json"
    failure = f"report.html could not be drawn: UserError: there is {there}\n"
    assert failure in capsys.readouterr().out
    first = drawn[:6]
    second = drawn[6:]
    batches, keys = zip(*first, strict=True)
    assert first == second
    assert len(set(batches)) == len(set(keys)) == 6


def test_an_rl_run_draws_other_prompts_and_keys_at_each_iteration(config, tmp_path, monkeypatch):
    drawn = []

    def recording(name, phase):
        def call(state, inputs, key, *functions):
            drawn.append((name, tuple(sorted(inputs.row_ids.tolist())), bits(key)))
            return phase(state, inputs, key, *functions)

        return call

    def programs(made):
        return {
            "respond": recording("sample", made.respond),
            "rescored": unscored,
            "learn": recording("update", lambda state, *inputs: untouched(state)),
        }

    replacing(monkeypatch, programs)
    folder = run_vpg(config).folder
    run_vpg(again(config, tmp_path))
    assert drawn[:9] == drawn[9:]
    assert drawn[0] == drawn[2]  # the first step's memory is checked
    drawn = drawn[1:9]
    assert [name for name, *_ in drawn] == ["sample", *["sample", "update"] * 3, "sample"]
    assert drawn[0] == drawn[7]  # validations sample with one key, so that they can be compared
    assert drawn[0][2] == bits(stage.stream(config.seed, "vpg", "eval"))
    assert len({key for *_, key in drawn[:7]}) == 7
    train_rows = [row for _, rows, _ in drawn[1:7:2] for row in rows]
    assert sorted((*train_rows, *drawn[0][1])) == list(range(16))
    for row in metric_rows(folder, "samples.jsonl"):
        assert row["score"] == ord(row["prompt"][-1])
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert f"reward {config.reward[0]}" in manifest["data"]


TEXTS = ["lazy fox jum", *(letter * (1 + i % 3) for i, letter in enumerate(LETTERS[1:]))]


def uneven(config, tmp_path, multiple, **settings):
    """Fifteen prompts of at most 3 tokens and one of 12."""
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": text} for text in TEXTS]))
    config = replace(config, reward=("count:a",), text=Text(bucket_multiple=multiple))
    return with_rl(config, num_iterations=6, validation_interval=6, **settings)


def one_token_each(seen, policy, inputs, key):
    """Notes (columns, tokens of the longest prompt), and responds with a token to each."""
    tokens, mask = (np.pad(x, ((0, 0), (0, 2))) for x in inputs[:2])
    lengths = inputs.attention_mask.sum(axis=1).tolist()
    assert lengths == [len(TEXTS[row]) for row in inputs.row_ids]  # nothing is cut
    seen.append((inputs.tokens.shape[1], max(lengths)))
    said = np.zeros_like(mask)
    said[:, -2] = 1
    return Rollout(tokens, mask | said, said, np.zeros(said.shape, np.float32), inputs.row_ids)


@pytest.mark.parametrize(
    ("several_turns", "layers", "narrow"), [(False, 2, 3), (True, 2, 3), (False, 8, 8)]
)
def test_each_batch_is_as_wide_as_its_own_prompts_need(
    config, tmp_path, monkeypatch, several_turns, layers, narrow
):
    seen = []
    made = set()
    slots = 2 * several_turns
    policy_fn = models.policy_fn
    (tmp_path / "world.py").write_text("def silent(conversation, row): return None")

    def policy_of(model, temperature, *, prompt_length, **more):
        made.add(prompt_length)
        return policy_fn(model, temperature, prompt_length, **more)

    fakes = {
        "respond": functools.partial(one_token_each, seen),
        "rescored": unscored,
        "learn": lambda state, *inputs: untouched(state),
    }
    replacing(monkeypatch, lambda programs: fakes)
    monkeypatch.setattr(models, "policy_fn", policy_of)
    environment = f"{tmp_path / 'world.py'}:silent" if several_turns else None
    config = uneven(config, tmp_path, 3, environment=environment)
    run_vpg(replace(config, network=replace(config.network, num_layers=layers)))
    checked, validation, *steps, last = [(width - slots, longest) for width, longest in seen]
    assert checked[0] == 12  # the widest, whether the first batch needs it or not
    assert validation == last
    assert {width for width, _ in steps} == made == {narrow, 12}
    assert all(width == (12 if longest == 12 else narrow) for width, longest in (*steps, last))


@pytest.mark.parametrize("turns", [None, slow(3)])
def test_validations_sample_in_batches_of_a_step(turns, config, tmp_path, monkeypatch):
    """Nine of ten prompts of their own: three batches of four, the last with three missing rows, or
    two of eight. Each response is drawn from the place of its row among all, and the reward, which
    compares responses, sees all."""
    shapes = []

    def programs(made):
        def respond(*inputs):
            shapes.append(inputs[1].tokens.shape)
            return made.respond(*inputs)

        return {"respond": respond, "learn": lambda state, *inputs: untouched(state)}

    own = {"validation_data": (str(tmp_path / "others.json"),), "validation_interval": 1}
    own["validation_prompts"] = 9
    own |= talking(tmp_path, turns, max_new_tokens=6) | {"num_iterations": 1}

    def validated(batch_size):
        shapes.clear()
        run = replace(again(config, tmp_path), overwrite=True, reward=("diversity",))
        folder = run_vpg(with_rl(run, batch_size=batch_size, **own)).folder
        assert len(set(shapes)) == 1
        first = metric_rows(folder)[0]
        samples = [row for row in metric_rows(folder, "samples.jsonl") if row["step"] == 0]
        found = {name: x for name, x in first.items() if name.startswith("validation/")}
        return samples, found, len(shapes)

    replacing(monkeypatch, programs)
    (tmp_path / "others.json").write_text(json.dumps([{"prompt": "say a", "letter": "a"}] * 10))
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
    network = replace(config.network, num_layers=4)
    return replace(again(config, tmp_path), network=network)


@pytest.mark.parametrize("is_scanned", [False, True])
def test_an_rl_program_is_compiled_for_its_number_of_blocks(
    is_scanned, config, tmp_path, monkeypatch
):
    """Both samplers, the greedy one of ReMax's baseline too, for all layers; what is scanned for
    one; nothing else.
    """
    compiled = {}
    jit = jax.jit

    def spy(fn, **options):
        phase = getattr(fn, "func", fn)  # of a functools.partial
        compiled.setdefault(phase, []).append(options.get("compiler_options"))
        return jit(fn, **options)

    run = four_layers(config, tmp_path, monkeypatch)
    compute = replace(run.compute, scan_layers=is_scanned)
    monkeypatch.setattr(jax, "jit", spy)
    with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_of'"):
        run_vpg(replace(run, compute=compute))
    compiled = {phase.__name__: options for phase, options in compiled.items() if any(options)}
    expected = {"respond": [{"xla_of": 4}] * 2}
    if not is_scanned:
        expected |= {name: [{"xla_of": 4}] for name in ("rescored", "update_in_place")}
    assert compiled == expected


@pytest.mark.parametrize("run", SUPERVISED)
def test_a_supervised_update_is_compiled_for_its_number_of_blocks(
    run, config, tmp_path, monkeypatch
):
    with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_of'"):
        run(four_layers(config, tmp_path, monkeypatch))


TALK = """
def ask(conversation, row):
    return ("say", float(ord(row["letter"]))) if len(conversation) == 2 else None
"""


def talking(folder, turns, **settings):
    """The settings of ``rl`` with so many turns of that environment; None: of one response."""
    if not turns:
        return settings
    (folder / "talk.py").write_text(TALK)
    return settings | {"environment": f"{folder / 'talk.py'}:ask", "max_turns": turns}


def check_rewards_of_letters(rollout, times):
    """Each row that is there has the number of its prompt's letter, so many times; so has its
    greedy response.
    """
    present = np.any(rollout.response_mask, axis=1)
    assert_array_equal(present, [LETTERS[row] != "a" for row in rollout.row_ids])
    expected = [times * ord(LETTERS[row]) for row in rollout.row_ids[present]]
    assert_array_equal(rollout.greedy_rewards[present], expected)
    assert_array_equal(rollout.scores[present], expected)


@pytest.mark.parametrize("turns", [None, slow(3)])
def test_a_greedy_baseline_is_that_of_the_rows_own_prompt(turns, config, tmp_path, monkeypatch):
    """The reward is a number of the prompt alone, so that nothing is learnt: each response scores
    as the greedy one. An environment pays as much again, for the first response."""
    keys = []
    rollouts = []
    asked = []

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
    talks = talking(tmp_path, turns, **({"max_new_tokens": 8} if turns else {}))
    config = with_rl(config, num_iterations=2, validation_fraction=0.0, **talks)
    metrics = training.rl.run(config, vpg, vpg.Config(baseline="greedy")).metrics
    for rollout in rollouts:
        check_rewards_of_letters(rollout, 2 if turns else 1)
    assert (metrics["grad_norm"], metrics["nonfinite"]) == (0, 0)
    assert metrics["objective/greedy_score"] == metrics["objective/score"]
    stream = stage.stream(config.seed, "vpg", "rollout")
    expected = [bits(jax.random.fold_in(stream, step)) for step in (0, 1)]
    assert [key for key, _ in itertools.groupby(keys)] == expected
    # The first to check the memory; then one for each turn.
    assert len(keys) > 3 if turns else len(keys) == 3
    assert len(asked) >= 3


REWARDS = """
def one(prompts, responses):
    return [1.0 + 0.5 * (i % 2) for i in range(len(responses))]

def two(prompts, responses):
    return [2.0] * len(responses)
"""


@pytest.mark.parametrize("refresh", [slow(None), 2])
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
    config = replace(config, reward=(f"{tmp_path}/rewards.py:one",))
    config = with_rl(config, num_iterations=4, optimizer=optimizer, **how)
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


@pytest.mark.parametrize("scan_layers", [slow(False), True])
def test_the_sampler_gets_the_arrays_of_the_state(scan_layers, config, tmp_path, monkeypatch):
    calls = []

    def recording(name, phase):
        return lambda *inputs: (calls.append((name, inputs[0])), phase(*inputs))[1]

    def learn(state, *inputs):
        return untouched(jax.tree.map(jnp.copy, state))

    fakes = {"learn": learn, "rescored": unscored}
    replacing(monkeypatch, lambda made: fakes | {"respond": recording("respond", made.respond)})
    sampled = recording("sampler", iteration.sampling_params)
    monkeypatch.setattr(iteration, "sampling_params", sampled)
    talks = talking(tmp_path, 3, max_new_tokens=8)
    compute = replace(config.compute, scan_layers=scan_layers)
    network = replace(config.network, num_layers=3)
    config = replace(config, compute=compute, network=network)
    run_vpg(with_rl(config, num_iterations=2, validation_fraction=0.0, **talks))
    weights = [policy for name, policy in calls if name == "respond"]
    assert all(("h" in policy) == scan_layers for policy in weights)
    held = {
        id(leaf) for name, state in calls if name == "sampler" for leaf in jax.tree.leaves(state)
    }
    assert {id(leaf) for leaf in jax.tree.leaves(weights)} <= held  # no copy
    assert len(weights) > 3 == len(calls) - len(weights)  # the check of memory, then two iterations


@pytest.mark.parametrize(
    ("value", "lora"),
    [
        ("shared", None),
        slow("separate", LoRA(rank=2)),
        slow("shared", LoRA(rank=2)),
        slow("separate", None),
    ],
)
def test_what_samples_is_the_policy_that_learns(value, lora, config, tmp_path):
    """The log-probs of its samples are those of the update's own forward pass, also after updates
    that moved it far.
    """
    settings = replace(config.rl, validation_fraction=0.0, optimizer=Optimizer(learning_rate=0.2))
    if lora is not None:
        training.sft.run(config)
        config = replace(
            again(config, tmp_path), model=str(tmp_path / "first" / "model"), lora=lora
        )
    result = training.rl.run(replace(config, rl=settings), ppo, PPOStage(value=value))
    assert result.metrics["grad_norm"] > 0
    assert abs(result.metrics["policy/sampler_gap"]) < 1e-5
    assert not (result.model_folder / VALUE_HEAD).exists()  # the policy alone is saved


def test_a_run_loads_reward_models_that_read_whole_texts(config, monkeypatch):
    def load(source, compute, place, score_rows, length, policy, in_chat):
        raise UserError(f"{source} {length}")

    monkeypatch.setattr(rl.entry.initial, "load_reward_model", load)
    with pytest.raises(UserError, match=r"^rm 7$"):  # "say x" and two new tokens
        training.rl.run(replace(config, reward=("rm",)), vpg)


def test_a_missing_environment_is_named_by_its_setting_before_anything_is_read(config, tmp_path):
    for given, file in (("env.py:ask", "env.py"), ("ask", ".")):
        settings = replace(config.rl, environment=given)
        with pytest.raises(
            UserError,
            match=rf"^rl\.environment {given}: no such file {file}; expected FILE.py:FUNCTION$",
        ):
            training.rl.run(replace(config, rl=settings, data=("none.json",)), vpg)
