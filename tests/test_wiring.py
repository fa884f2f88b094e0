"""What a run draws: rows, keys, batches. Each step draws others than the one before, a second run
draws the same, and no two random streams share a key."""

import functools
import json
import typing
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import LETTERS, letters_run, metric_rows, run_vpg, slow, with_rl
from numpy.testing import assert_array_equal
from recorded import grpo_run, ppo_run, vpg_run

from rlhf_jax import iteration, models, ppo, training, vpg
from rlhf_jax.config import (
    LoRA,
    Optimizer,
    PPOStage,
    RunConfig,
    Text,
)
from rlhf_jax.errors import UserError
from rlhf_jax.models.hf import VALUE_HEAD
from rlhf_jax.report import records
from rlhf_jax.runs import devices
from rlhf_jax.training.common import memory, reward_models
from rlhf_jax.training.common.layout import Layout, layout_of
from rlhf_jax.training.common.opening import Stream, stream_key
from rlhf_jax.training.rl import job
from rlhf_jax.training.supervised import policies
from rlhf_jax.types import Mean, Rollout


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
    compiled = job.compiled

    def replaced(*how):
        programs = compiled(*how)
        chosen = others(programs)
        if "respond" in chosen:  # validations sample too
            chosen = {"respond_to_each": chosen["respond"]} | chosen
        return programs._replace(**chosen)

    monkeypatch.setattr(job, "compiled", replaced)


def unscored(state, sampled, functions):
    """In the place of ``rescored``: the rollout as it was sampled."""
    return sampled, {}


def bits(key):
    return np.asarray(jax.random.key_data(key)).tobytes()


def again(config, tmp_path):
    return replace(config, output_dir=str(tmp_path / "again"))


def test_streams_are_apart():
    names = typing.get_args(Stream)
    keys = {
        bits(stream_key(seed, run, name))
        for seed in (0, 1)
        for run in ("sft", "ppo")
        for name in names
    }
    assert {"init", "data", "rollout", "update", "eval"} <= set(names)
    assert len(keys) == 4 * len(names)


@pytest.mark.parametrize("name", ["sft", slow("reward_model"), slow("dpo")])
def test_a_supervised_run_draws_other_rows_and_another_key_at_each_step(
    name, config, monkeypatch, capsys, pages
):
    """Its page, which is drawn when the model is there, may fail."""
    drawn = []

    def write_page(runs, path):
        raise UserError(f"there is {records.model_config(runs[0])}")

    def jit_update(self, update, num_blocks):
        assert num_blocks == config.network.num_layers

        def record(state, batch, key, **functions):
            tokens = batch.tokens if hasattr(batch, "tokens") else batch.chosen.tokens
            rows = np.sort(np.asarray(tokens).reshape(4, -1), axis=0)
            drawn.append((rows.tobytes(), bits(key)))
            return untouched(state)

        return record

    unchecked(monkeypatch)
    monkeypatch.setattr(Layout, "jit_update", jit_update)
    monkeypatch.setattr("rlhf_jax.report.page.write", write_page)
    folder = getattr(training, name).run(config).folder
    there = folder / "model" / "config.json"
    failure = f"report.html could not be drawn: UserError: there is {there}\n"
    assert failure in capsys.readouterr().out
    batches, keys = zip(*drawn, strict=True)
    stream = stream_key(config.seed, name, "update")
    assert list(keys) == [bits(jax.random.fold_in(stream, step)) for step in range(6)]
    assert len(set(batches)) == len(set(keys)) == 6


def test_an_rl_run_draws_other_prompts_and_keys_at_each_iteration():
    """Its validations have prompts of their own, and one key, so that they can be compared."""
    run = vpg_run()
    seed = run.config.seed
    drawn = run.called("respond")
    first, last = run.called("respond_to_each")
    assert_array_equal(first[1].row_ids, last[1].row_ids)
    assert bits(first[2]) == bits(last[2]) == bits(stream_key(seed, "vpg", "eval"))
    train_rows = np.concatenate([prompts.row_ids for _, prompts, _ in drawn])
    assert sorted((*train_rows, *first[1].row_ids)) == list(range(16))
    learned = run.called("learn")
    for (_, rollout, _, _), (_, prompts, _) in zip(learned, drawn, strict=True):
        assert_array_equal(rollout.row_ids, prompts.row_ids)
    for name, keys in (
        ("rollout", [key for _, _, key in drawn]),
        ("update", [key for _, _, key, _ in learned]),
    ):
        stream = stream_key(seed, "vpg", name)
        expected = [bits(jax.random.fold_in(stream, step)) for step in range(3)]
        assert list(map(bits, keys)) == expected
        assert len(set(expected)) == 3
    for row in metric_rows(run.result.folder, "samples.jsonl"):
        assert row["score"] == ord(row["prompt"][-1])
    manifest = json.loads((run.result.folder / "manifest.json").read_text("utf-8"))
    assert f"reward {run.config.reward[0]}" in manifest["data"]


def test_a_judge_and_groups_are_those_of_the_settings():
    """Adjacent rows are answers to one prompt; sampler, update and reference divide by one
    temperature.
    """
    run = grpo_run()
    rows = run.result.rows
    assert {row.get("validation/judge", 2) for row in rows} == {2}
    samples = metric_rows(run.result.folder, "samples.jsonl")
    assert {(row["judge"], row["score"]) for row in samples} == {(2, 1), (2, 1.5)}
    assert {row.get("validation/score", 1.2) for row in rows} == {1.2, float(np.float32(1.2))}
    for _, _, row, rollout in run.steps:
        assert row["policy/sampler_gap"] < 1e-4
        assert row["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
        first, same, other, equal = rollout.row_ids
        assert first == same != other == equal


def test_the_kl_is_from_the_policy_that_became_the_reference():
    """Every two steps; the policy moves at each."""
    rows = grpo_run().result.rows[1:]
    assert [abs(row["objective/kl"]) > 1e-3 for row in rows] == [False, True, False, True]
    for row in rows:
        shaped = row["objective/score"] - 0.5 * row["objective/kl"]
        assert row["objective/reward"] == pytest.approx(shaped, rel=1e-5)


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
    ("several_turns", "layers", "narrow"), [(False, 1, 3), slow(True, 1, 3), slow(False, 8, 8)]
)
def test_each_batch_is_as_wide_as_its_own_prompts_need(
    config, tmp_path, monkeypatch, several_turns, layers, narrow
):
    seen = []
    slots = 2 * several_turns
    policy_fn = models.policy_fn
    (tmp_path / "world.py").write_text("def silent(conversation, row): return None")

    def policy_of(model, temperature, **more):
        assert more["one_text"]  # GPUs read lengths in place of masks
        return policy_fn(model, temperature, **more)

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
    assert {width for width, _ in steps} == {narrow, 12}
    assert all(width == (12 if longest == 12 else narrow) for width, longest in (*steps, last))


def test_validations_sample_in_batches_of_a_step_and_each_row_at_its_place():
    """Five equal prompts, in two batches of four; what has three missing rows has as many columns.
    The reward, which may compare responses, sees all.
    """
    run = grpo_run()
    sampled = [prompts for _, prompts, _ in run.called("respond_to_each")]
    assert len(sampled) == 2 * 3
    assert {prompts.tokens.shape for prompts in sampled} == {(4, 5)}
    for first, second in zip(sampled[::2], sampled[1::2], strict=True):
        assert_array_equal([*first.places, *second.places], np.arange(8))
        assert_array_equal([*first.row_ids, *second.row_ids], [0, 1, 2, 3, 4, -1, -1, -1])
    samples = metric_rows(run.result.folder, "samples.jsonl")[:5]
    assert [row["score"] for row in samples] == [1.0, 1.5, 1.0, 1.5, 1.0]
    assert len({row["response"] for row in samples}) == 5


@pytest.mark.slow
def test_validations_are_the_same_in_batches_of_any_size(config, tmp_path):
    """Nine of ten prompts of conversations, in three batches of four or two of eight."""
    own = {"validation_data": (str(tmp_path / "others.json"),), "validation_interval": 1}
    own["validation_prompts"] = 9
    own |= talking(tmp_path, 3, max_new_tokens=6) | {"num_iterations": 1}

    def validated(batch_size):
        run = replace(again(config, tmp_path), overwrite=True, reward=("diversity",))
        folder = run_vpg(with_rl(run, batch_size=batch_size, **own)).folder
        first = metric_rows(folder)[0]
        samples = [row for row in metric_rows(folder, "samples.jsonl") if row["step"] == 0]
        return samples, {name: x for name, x in first.items() if name.startswith("validation/")}

    (tmp_path / "others.json").write_text(json.dumps([{"prompt": "say a", "letter": "a"}] * 10))
    samples, metrics = validated(4)
    assert len({sample["response"] for sample in samples}) == len(samples) == 9
    same, in_two = validated(8)
    assert same == samples
    assert in_two == pytest.approx(metrics)
    assert "validation/environment/turns" in metrics


def test_an_rl_program_is_compiled_for_its_number_of_blocks():
    """Both samplers, the greedy one of ReMax's baseline too, and where an algorithm may ask the
    policy which groups teach; nothing else.
    """
    blocks = {name: of for name, of in vpg_run().blocks.items() if any(of)}
    of_updates = {"informative": [1], "update_in_place": [1, 0]}
    assert blocks == {"respond": [1, 1], "rescored": [1]} | of_updates


def four_layers(config, tmp_path, monkeypatch):
    """The run with four layers, and options for programs of four blocks that no compiler knows."""
    monkeypatch.setattr(
        devices, "compiler_options", lambda num_blocks: {"xla_of": 4} if num_blocks == 4 else {}
    )
    network = replace(config.network, num_layers=4)
    return replace(again(config, tmp_path), network=network)


@pytest.mark.slow
def test_what_decodes_is_compiled_for_all_layers_and_what_is_scanned_for_one(
    config, tmp_path, monkeypatch
):
    compiled = {}
    jit = jax.jit

    def spy(fn, **options):
        phase = getattr(fn, "func", fn)  # of a functools.partial
        compiled.setdefault(phase, []).append(options.get("compiler_options"))
        return jit(fn, **options)

    run = four_layers(config, tmp_path, monkeypatch)
    compute = replace(run.compute, scan_layers=True)
    monkeypatch.setattr(jax, "jit", spy)
    with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_of'"):
        run_vpg(replace(run, compute=compute))
    compiled = {phase.__name__: options for phase, options in compiled.items() if any(options)}
    assert compiled == {"respond": [{"xla_of": 4}] * 2}


def test_an_update_is_compiled_with_the_options_of_its_blocks(monkeypatch):
    monkeypatch.setattr(devices, "compiler_options", lambda count: {f"xla_of_{count}": True})
    update = layout_of(RunConfig()).jit_update(lambda state: (state, {}), 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_of_4'"):
        update({})


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


def test_a_greedy_baseline_is_that_of_the_rows_own_prompt():
    """The reward is a number of the prompt alone, so that nothing is learnt: each response scores
    as the greedy one.
    """
    run = vpg_run()
    for _, _, row, rollout in run.steps:
        check_rewards_of_letters(rollout, 1)
        assert (row["grad_norm"], row["nonfinite"]) == (0, 0)
        assert row["objective/greedy_score"] == row["objective/score"]
    asked = run.called("respond_greedily")
    for (_, greedily, key), (_, prompts, same) in zip(asked, run.called("respond"), strict=True):
        assert_array_equal(greedily.row_ids, prompts.row_ids)
        assert bits(key) == bits(same)
    policy, prompts, key = run.called("respond_to_each")[-1]
    tried = (run.programs.respond_greedily(policy, prompts, k) for k in (key, jax.random.key(77)))
    assert_array_equal(*(rollout.tokens for rollout in tried))  # needs no key


@pytest.mark.slow
def test_a_greedy_baseline_of_conversations_is_that_of_the_rows_own_prompt(
    config, tmp_path, monkeypatch
):
    """An environment pays as much again as the reward, for the first response."""
    rollouts = []
    asked = []

    def programs(made):
        def likeliest(policy, inputs, key):
            keys_tried = (key, jax.random.key(77))
            greedy, same = (made.respond_greedily(policy, inputs, k) for k in keys_tried)
            assert_array_equal(greedy.tokens, same.tokens)  # needs no key
            asked.append(inputs)
            return greedy

        def learn(state, rollout, *inputs):
            rollouts.append(rollout)
            return made.learn(state, rollout, *inputs)

        return {"respond_greedily": likeliest, "learn": learn}

    replacing(monkeypatch, programs)
    talks = talking(tmp_path, 3, max_new_tokens=8)
    config = with_rl(config, num_iterations=2, validation_fraction=0.0, **talks)
    metrics = training.rl.run(config, vpg, vpg.Config(baseline="greedy")).metrics
    for rollout in rollouts:
        check_rewards_of_letters(rollout, 2)
    assert (metrics["grad_norm"], metrics["nonfinite"]) == (0, 0)
    assert metrics["objective/greedy_score"] == metrics["objective/score"]
    assert len(asked) >= 3


def test_the_sampler_gets_the_arrays_of_the_state():
    """No copy, neither for a step nor for a validation."""
    run = vpg_run()
    held = [state for state, _ in run.called("sampling_params")]
    names = ("respond", "respond_to_each", "respond_greedily")
    weights = [policy for policy, _, _ in run.called(*names)]
    assert {*map(id, jax.tree.leaves(weights))} <= {*map(id, jax.tree.leaves(held))}
    assert len({id(policy["wte"]["embedding"]) for policy in weights}) == 4  # one for each state


@pytest.mark.slow
def test_the_sampler_of_scanned_layers_gets_the_arrays_of_the_state(config, tmp_path, monkeypatch):
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
    network = replace(config.network, num_layers=3)
    config = replace(config, compute=replace(config.compute, scan_layers=True), network=network)
    run_vpg(with_rl(config, num_iterations=2, validation_fraction=0.0, **talks))
    weights = [policy for name, policy in calls if name == "respond"]
    assert all("h" in policy for policy in weights)
    states = [state for name, state in calls if name == "sampler"]
    held = {*map(id, jax.tree.leaves(states))}
    assert {*map(id, jax.tree.leaves(weights))} <= held  # no copy
    assert len(weights) > 3 == len(states)  # the check of memory, then two iterations


def test_what_samples_is_the_policy_that_learns():
    """The log-probs of its samples are those of the update's own forward pass, also after updates
    that moved it far.
    """
    run = ppo_run()
    for row in run.result.rows[1:]:
        assert row["grad_norm"] > 0
        assert abs(row["policy/sampler_gap"]) < 1e-5
    assert not (run.result.model_folder / VALUE_HEAD).exists()  # the policy alone is saved


@pytest.mark.slow
@pytest.mark.parametrize(("value", "rank"), [("separate", 2), ("shared", 0)])
def test_what_samples_learns_under_lora_and_with_a_shared_value_head(value, rank, config, tmp_path):
    settings = replace(config.rl, validation_fraction=0.0, optimizer=Optimizer(learning_rate=0.2))
    if rank:
        training.sft.run(config)
        model = str(tmp_path / "first" / "model")
        config = replace(again(config, tmp_path), model=model, lora=LoRA(rank=rank))
    result = training.rl.run(replace(config, rl=settings), ppo, PPOStage(value=value))
    assert result.metrics["grad_norm"] > 0
    assert abs(result.metrics["policy/sampler_gap"]) < 1e-5
    assert not (result.model_folder / VALUE_HEAD).exists()  # the policy alone is saved


def test_a_run_loads_reward_models_that_read_whole_texts(config, monkeypatch):
    def load(source, compute, place, score_rows, length, policy, in_chat, longest):
        raise UserError(f"{source} {length} {longest[0]['content']}")

    monkeypatch.setattr(reward_models, "load_reward_model", load)
    with pytest.raises(UserError, match=r"^rm 7 say .$"):  # "say x" and two new tokens
        training.rl.run(replace(config, reward=("rm",)), vpg)


def test_a_missing_environment_is_named_by_its_setting_before_anything_is_read(config, tmp_path):
    for given, file in (("env.py:ask", "env.py"), ("ask", ".")):
        settings = replace(config.rl, environment=given)
        with pytest.raises(
            UserError,
            match=rf"^rl\.environment {given}: no such file {file};",
        ):
            training.rl.run(replace(config, rl=settings, data=("none.json",)), vpg)


def test_a_validation_reads_each_batch_before_it_asks_for_the_next():
    """With dozens of programs that wait, several devices of a CPU wait for each other for ever."""
    unread = []

    class OnDevice:
        def __init__(self, value):
            self.value = np.float32(value)
            unread.append(self)

        def __array__(self, *args, **named):
            unread.remove(self)
            return self.value

    def measure(state, rows):
        assert not unread
        here = rows[rows >= 0]
        return {"sft/loss": Mean(OnDevice(here.sum()), OnDevice(len(here)))}

    job = SimpleNamespace(
        held_out=np.arange(5),
        settings=SimpleNamespace(batch_size=2),
        run=SimpleNamespace(layout=SimpleNamespace(shard=lambda batch: batch)),
        batch=lambda rows: rows,
        encoded=SimpleNamespace(sources=list("abcde")),
    )
    found = policies.validate(job, SimpleNamespace(measure=measure, answer=None), None)
    assert found.metrics == {"validation/loss": 2.0, "validation/rows": 5}
