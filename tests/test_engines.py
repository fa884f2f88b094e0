"""Runs whose samples come from a server: vLLM's protocol, weights by LoRA and by folders, fixed
weights, samples that are kept, servers that misbehave.
"""

import contextlib
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import initial_params, metric_rows, with_rl
from numpy.testing import assert_array_equal
from servers import VLLM

from rlhf_jax import engines, grpo, iteration, models, ppo
from rlhf_jax.cli import verify
from rlhf_jax.config import (
    EngineServer,
    LoRA,
    Optimizer,
    PPOStage,
    RLStage,
    RunConfig,
    Text,
    check_trusted,
)
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import ServiceError, UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import client
from rlhf_jax.iteration import LoopState
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training import rl
from rlhf_jax.training.common import initial
from rlhf_jax.training.rl import ahead as ahead_module
from rlhf_jax.training.rl import job
from rlhf_jax.training.rl.ahead import Ahead
from rlhf_jax.training.rl.engine import MOST_TIES, Client, _as_rollout, _checksum, _requests
from rlhf_jax.training.rl.programs import importance_of
from rlhf_jax.types import TrainState

TOKENIZER = characters("abcdefgh say")
FAST = Optimizer(learning_rate=0.05, schedule="constant")
GROUPS = grpo.Config(group_size=4)
LORA = LoRA(rank=2)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder of a model with random weights."""
    folder = tmp_path_factory.mktemp("policy")
    size = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 40}
    network = models.GPT2Config(vocab_size=TOKENIZER.vocab_size, **size, initializer_range=0.3)
    model = models.build(network)
    how = SamplingConfig(8, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id)
    language_model = LanguageModel(model, initial_params(model, 7), TOKENIZER)
    language_model.save(folder, template="{prompt}", config=how)
    return folder


@pytest.fixture
def server(policy, monkeypatch):
    monkeypatch.setattr(client, "_SECONDS", 0.001)
    monkeypatch.setattr(client, "_ATTEMPTS", 2)
    started = VLLM(policy)
    yield started
    started.stop()


@pytest.fixture
def config(policy, server, tmp_path):
    rows = [{"prompt": f"say {letter}"} for letter in "abcdefgh"]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    stage = RLStage(
        num_iterations=4,
        batch_size=8,
        max_new_tokens=6,
        validation_fraction=0.25,
        validation_interval=2,
        optimizer=FAST,
        engine=f"vllm:{server.url}",
    )
    return RunConfig(
        data=(str(tmp_path / "prompts.json"),),
        model=str(policy),
        output_dir=str(tmp_path / "run"),
        checkpoint_interval=1,
        keep_last=9,
        text=Text(bucket_multiple=8),
        reward=("count:a",),
        lora=LORA,
        rl=stage,
        engine=EngineServer(timeout=120.0),
    )


def run(config):
    return rl.run(config, grpo, GROUPS).folder


def kinds(server):
    return [kind for kind, _ in server.commands]


def asked(server):
    """The bodies of requests for samples."""
    return [body for body in server.asked if body and {"n", "sampling_params"} & body.keys()]


@pytest.mark.slow
def test_a_run_with_lora_samples_with_the_adapters_of_each_step(config, server, monkeypatch):
    """One request at a time; the key is sent and written nowhere."""
    monkeypatch.setenv("ENGINE_API_KEY", "sk-secret-4712")
    config = with_rl(config, num_iterations=3)
    folder = run(replace(config, engine=EngineServer(concurrency=1)))
    assert server.most_at_once == 1
    assert set(server.keys) == {"Bearer sk-secret-4712"}
    for file in folder.rglob("*"):
        assert not file.is_file() or b"sk-secret-4712" not in file.read_bytes()
    rows = metric_rows(folder)[1:]
    assert len(rows) == 3
    for row in rows:
        assert row["policy/sampler_gap"] < 1e-4
        assert row["policy/sampler_gap_mean"] <= row["policy/sampler_gap"]
        assert row["policy/importance_weight_mean"] == pytest.approx(1.0, abs=1e-4)
        assert row["policy/importance_limited"] == 0.0
    # Four policies: the first, and that of each step; each is loaded once and unloaded.
    assert kinds(server) == ["load"] + ["load", "unload"] * 3 + ["unload"]
    assert not server.adapters
    training_asked = [body for body in asked(server) if body["n"] == GROUPS.group_size]
    assert len(training_asked) == 3 * 2  # one request for each group
    body = training_asked[0]
    assert body["max_tokens"] == 6
    assert body["top_k"] == -1
    assert body["stop_token_ids"] == [TOKENIZER.eos_id]
    assert len({body["seed"] for body in training_asked}) == 6
    kept = sorted(file.name for file in (folder / "engine").iterdir())
    assert [name.partition("-")[0] for name in kept] == ["0", "1", "2", "3"]
    left = {path.name for path in folder.iterdir() if path.name.endswith(".unfinished")}
    assert left == set()


@pytest.mark.slow
def test_full_weights_are_read_again_and_have_a_version(config, server):
    """Of PPO, whose value function stays here."""
    full = replace(with_rl(config, num_iterations=2), lora=LoRA())
    settings = PPOStage(num_epochs=1)
    folder = rl.run(full, ppo, settings).folder
    for row in metric_rows(folder)[1:]:
        assert row["policy/sampler_gap"] < 1e-4
    assert kinds(server) == ["reload", "reset"] * 3
    assert server.version.startswith("rlhf-jax-")
    _, trained = models.load(folder / "model")
    jax.tree.map(assert_array_equal, trained, server.policy.params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "turns"])
def test_truncated_samples_have_the_masks_of_the_server(config, server, tmp_path, kind):
    """Their log-probs are those among the masks, of the server as of the update."""
    server.has_masks = True
    full = replace(with_rl(config, num_iterations=2, top_k=4, top_p=0.9), lora=LoRA())
    if kind == "turns":
        full = with_turns(full, tmp_path)
    folder = run(full)
    rows = metric_rows(folder)
    assert all(row["policy/sampler_gap"] < 1e-4 for row in rows[1:])
    assert {body["sampling_params"]["top_k"] for body in asked(server)} == {4}
    count = len(server.asked)
    stored = with_rl(full, engine=f"stored:{folder / 'engine'}")
    again = run(replace(stored, output_dir=f"{config.output_dir}_again"))
    assert rows_of(again) == rows_of(folder)
    assert len(server.asked) == count


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(), LORA])
def test_truncated_samples_without_masks_end_the_run(config, server, lora):
    """A server has none with LoRA, or without a flag."""
    server.has_masks = bool(lora.rank)
    with pytest.raises(ServiceError, match=r"no sampling_mask.* vllm serve --return-sampling-mask"):
        run(replace(with_rl(config, top_k=4), lora=lora))


def test_the_mask_of_each_token_is_its_support(policy):
    how = SamplingConfig(4, top_k=2, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id)
    request = engines.Request("v", [2, 3], 2, 4, 0, how)
    loaded = LanguageModel.load(policy)
    samples = [
        engines.Sample([4, 1], [-0.5, 0.0], True, "v", [[4, 7], [1]]),
        engines.Sample([5, 6, 1], [-1.0] * 3, True, "v", [[3, 5, 9], [6, 2], [1, 2]]),
    ]
    made = _as_rollout(loaded, [request], [samples], 3, 4)
    assert made.truncated
    assert made.support.shape == (2, 7, 2 + MOST_TIES)
    found = [[[x for x in ids if x >= 0] for ids in row] for row in made.support.tolist()]
    assert found == [
        [[], [], [], [4, 7], [1], [], []],
        [[], [], [], [3, 5, 9], [6, 2], [1, 2], []],
    ]
    assert (made.support[0, 3, 2:] == -1).all()
    whole = _as_rollout(loaded, [request._replace(how=replace(how, top_k=None))], [samples], 3, 4)
    assert whole.support is None
    assert not whole.truncated
    vocabulary = loaded.tokenizer.vocab_size
    for masks in (None, [[4, 7]], [[7], [1]], [[4, vocabulary], [1]], [[], [1]], [[4] * 67, [1]]):
        spoiled = [samples[0]._replace(support=masks), samples[1]]
        with pytest.raises(ValueError, match=r"mask|argument"):
            _as_rollout(loaded, [request], [spoiled], 3, 4)


@pytest.mark.slow
def test_it_learns_as_with_our_own_sampler(config, server):
    """The mean score of eight iterations, after as many; the samples differ."""
    longer = with_rl(config, num_iterations=16, validation_interval=100)
    scores = {}
    for engine in (longer.rl.engine, None):
        place = f"{config.output_dir}_{engine is None}"
        rows = metric_rows(run(replace(with_rl(longer, engine=engine), output_dir=place)))
        scored = [row["objective/score"] for row in rows[1:]]
        scores[engine] = np.mean(scored[:3]), np.mean(scored[8:])
    for first, last in scores.values():
        assert last > first + 1.0
    assert scores[None][1] == pytest.approx(scores[longer.rl.engine][1], abs=1.5)


REPLIES = """
def reply(conversation, row):
    turns = sum(message["role"] == "assistant" for message in conversation)
    return ("ab", 1.0) if turns < 2 else None
"""


def with_turns(config, tmp_path):
    """Of conversations with an environment."""
    (tmp_path / "talk.py").write_text(REPLIES)
    return with_rl(config, environment=f"{tmp_path / 'talk.py'}:reply", max_new_tokens=8)


def test_what_samples_ahead_elsewhere_has_a_thread(config, server):
    ahead = with_rl(config, rollouts_ahead=1)
    with job.open_job(ahead, grpo, GROUPS) as opened:
        assert opened.client.engine.follows
        assert opened.ahead._thread is not None
    alone = replace(with_rl(ahead, engine=None), output_dir=f"{config.output_dir}_alone")
    with job.open_job(alone, grpo, GROUPS) as opened:
        assert opened.client is None
        assert opened.ahead._thread is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "turns"])
def test_fixed_weights_are_corrected_and_their_samples_stored(config, server, tmp_path, kind):
    if kind == "turns":
        config = with_turns(config, tmp_path)
    fixed = with_rl(config, engine=f"openai:{server.url}/v1", engine_cap=1.5)
    folder = run(fixed)
    rows = metric_rows(folder)[1:]
    assert rows[0]["policy/sampler_gap"] < 1e-4
    assert rows[-1]["policy/sampler_gap"] > 0.01
    assert max(row["policy/importance_limited"] for row in rows) > 0
    assert server.commands == []
    assert {body["model"] for body in asked(server)} == {server.name}
    count = len(server.asked)
    stored = with_rl(fixed, engine=f"stored:{folder / 'engine'}")
    again = run(replace(stored, output_dir=f"{config.output_dir}_again"))
    assert rows_of(again) == rows_of(folder)
    assert len(server.asked) == count


@pytest.mark.slow
@pytest.mark.parametrize("how", ["off", "sequence_truncate"])
def test_the_kinds_of_correction(config, server, how):
    fixed = with_rl(config, engine=f"openai:{server.url}", engine_cap=1.01, engine_importance=how)
    row = metric_rows(run(fixed))[-1]
    if how == "off":
        assert "policy/importance_weight_mean" not in row
        assert "policy/importance_limited" not in row
        return
    assert 0 < row["policy/importance_limited"] <= 1
    assert row["policy/importance_weight_mean"] <= 1.01


def test_the_bounds_of_correction():
    """No cap is no bound, not no weights."""
    settings = RLStage(engine="openai:http://x", engine_cap=None, engine_floor=0.5)
    assert importance_of(settings) == (math.inf, "token_truncate", 0.5)
    assert importance_of(replace(settings, engine_cap=5.0)) == (5.0, "token_truncate", 0.5)
    assert importance_of(replace(settings, engine_importance="off")) is None
    assert importance_of(replace(settings, engine=None)) is None
    with pytest.raises(ValueError, match=r"engine_floor must be at most 2\.0"):
        RLStage(engine_floor=3.0)


def test_a_server_of_other_weights_is_refused(config, server, tmp_path):
    """By the mean distance over the response's tokens, unless nothing is compared."""
    with asking(config, server, tmp_path) as (client, state, prompts):
        sampled = client.responder(state, "respond")(prompts, jax.random.key(0))
        metrics = client.compare(state, sampled, moved(sampled, 0.01))
        assert metrics["policy/sampler_gap_mean"] == pytest.approx(0.01, rel=1e-3)
        with pytest.raises(ServiceError, match=r"differ from the policy's by 0\.3 .* after 0\.01 "):
            client.compare(state, sampled, moved(sampled, 0.3))
        client.settings = replace(client.settings, engine_check=False)
        metrics = client.compare(state, sampled, moved(sampled, 0.3))
        assert metrics["policy/sampler_gap_mean"] > 0.2


def moved(sampled, by):
    """The rollout with other log-probs, also where no response is."""
    beside = np.where(sampled.response_mask, by, 9.0)
    return replace(sampled, log_probs=sampled.log_probs - beside)


# --- Samples that were kept


def rows_of(folder):
    return [(folder / name).read_text("utf-8") for name in ("metrics.jsonl", "samples.jsonl")]


def dead_after(server, number):
    """The server, which fails after a number of requests for samples."""
    server.spoil = lambda path, body, reply: (
        (503, b"gone") if len(asked(server)) > number else reply
    )


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_server_that_dies_costs_nothing_and_no_sample_is_asked_for_twice(config, server, ahead):
    config = with_rl(config, rollouts_ahead=ahead)
    straight = rows_of(run(replace(config, output_dir=f"{config.output_dir}_straight")))
    number = len(asked(server))
    dead_after(server, number + 6)
    with pytest.raises(ServiceError, match=r"503(.|\n)*Step [0123] of 4 is saved(.|\n)*--resume"):
        run(config)
    folder = Path(config.output_dir)
    newest = max(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
    if newest:
        shutil.rmtree(folder / "checkpoints" / str(newest))  # as a kill before it was written
    dead_after(server, math.inf)
    count = len(asked(server))
    run(replace(config, resume=True))
    assert rows_of(folder) == straight
    assert len(asked(server)) - count < number


@pytest.mark.slow
def test_a_run_is_repeated_without_its_server(config, server, monkeypatch):
    folder = run(with_rl(config, num_iterations=2))
    server.stop()
    monkeypatch.chdir(folder.parent)
    assert verify.verify(folder, from_scratch=True, trust_config=True).differences == []


@pytest.mark.slow
def test_other_samples_than_those_of_the_run_are_found(config, server, monkeypatch):
    folder = run(config)
    server.stop()
    monkeypatch.chdir(folder.parent)
    assert verify.verify(folder, trust_config=True).differences == []
    file = next((folder / "engine").glob("3-*"))
    line, *rest = file.read_text("utf-8").splitlines()
    kept = json.loads(line)
    kept["reply"] = kept["reply"].replace("true", "false", 1)
    samples = json.loads(kept["reply"])
    samples[0][1][0] -= 1.0
    kept["reply"] = json.dumps(samples)
    file.write_text("\n".join([json.dumps(kept), *rest]), "utf-8")
    audit = verify.verify(folder, from_scratch=True, trust_config=True)
    assert audit.differences
    file.unlink()
    with pytest.raises(ServiceError, match=r"no samples were kept of the prompt"):
        verify.verify(folder, from_scratch=True, trust_config=True)


@pytest.mark.slow
def test_samples_of_other_weights_are_not_taken(config, server):
    """A run that goes on with another learning rate has other weights after as many steps."""
    folder = run(config)
    shutil.rmtree(folder / "checkpoints" / "4")
    shutil.rmtree(folder / "checkpoints" / "3")
    (before,) = (folder / "engine").glob("4-*")
    slower = with_rl(config, optimizer=Optimizer(learning_rate=0.01, schedule="constant"))
    count = len(asked(server))
    run(replace(slower, resume=True, allow_changed=("rl.optimizer.learning_rate",)))
    (after,) = (folder / "engine").glob("4-*")
    assert after.name != before.name
    assert len(asked(server)) > count


# --- One iteration ahead


@pytest.mark.slow
def test_an_engine_samples_the_next_rollout_while_the_devices_learn(config, server, monkeypatch):
    """An update that waits until the server was asked for the next rollout."""
    ahead = with_rl(config, rollouts_ahead=1, validation_interval=99)
    of_a_rollout = ahead.rl.batch_size // GROUPS.group_size
    versions = []

    def compiled(*args):
        programs = make_programs(*args)

        def learn_later(state, *inputs):
            number = len(versions) + 1
            versions.append(int(state.behind.step))
            expected = min(number + 1, ahead.rl.num_iterations) * of_a_rollout
            deadline = time.monotonic() + 120.0
            while len(rollouts_asked(server)) < expected:
                assert time.monotonic() < deadline, f"step {number}: nothing is sampled meanwhile"
                time.sleep(0.005)
            return programs.learn(state, *inputs)

        learn_later.lower = programs.learn.lower  # its memory is checked
        return programs._replace(learn=learn_later)

    make_programs = job.compiled
    monkeypatch.setattr(job, "compiled", compiled)
    folder = run(ahead)
    assert versions == [0, 0, 1, 2]
    models_asked = [body["model"] for body in rollouts_asked(server)][::of_a_rollout]
    assert models_asked[0] == models_asked[1]  # the first policy samples two rollouts
    assert len(set(models_asked)) == 3
    rows = metric_rows(folder)[1:]
    assert rows[0]["policy/update_gap"] < 1e-4
    assert rows[1]["policy/update_gap"] > 1e-3
    assert rows[1]["policy/importance_limited"] >= 0.0
    assert all("policy/sampler_gap" not in row for row in rows)


def rollouts_asked(server):
    """Without those of validations, of one response to each prompt."""
    return [body for body in asked(server) if body["n"] == GROUPS.group_size]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "turns"])
def test_a_rollout_does_not_depend_on_when_it_was_sampled(
    config, server, tmp_path, kind, monkeypatch
):
    """Ahead in a thread, in its own step, and after a kill: the same rows."""
    ahead = with_rl(config, rollouts_ahead=1)
    if kind == "turns":
        ahead = with_turns(ahead, tmp_path)
    straight = run(ahead)
    again = replace(ahead, output_dir=f"{config.output_dir}_again")
    with monkeypatch.context() as patch:
        patch.setattr(ahead_module, "Ahead", lambda thread: Ahead(None))
        assert rows_of(run(again)) == rows_of(straight)
    shutil.rmtree(straight / "checkpoints" / "4")
    shutil.rmtree(straight / "checkpoints" / "3")
    shutil.rmtree(straight / "engine")
    assert rows_of(run(replace(ahead, resume=True))) == rows_of(Path(again.output_dir))


# --- What goes wrong


def spoiled(change):
    """A server that changes the first choice of each reply with samples."""

    def spoil(path, body, reply):
        if not (isinstance(reply, dict) and "choices" in reply):
            return reply
        change(reply, reply["choices"][0])
        return reply

    return spoil


def longer(reply, choice):
    choice["token_ids"] = [2] * 15
    choice["logprobs"]["token_logprobs"] = [-1.0] * 15


def shorter(reply, choice):
    choice["token_ids"] = [2, 3]
    choice["logprobs"]["token_logprobs"] = [-1.0, -1.0]
    choice["finish_reason"] = "length"


WRONG = {
    "fewer samples": (lambda reply, choice: reply["choices"].pop(), "responses to a prompt, "),
    "no samples": (lambda reply, choice: reply.pop("choices"), "missing required field `choices`"),
    "a sample twice": (lambda reply, choice: choice.update(index=1), "its choices have the numb"),
    "other weights": (lambda reply, choice: reply.update(model="other"), "of the weights 'other'"),
    "another prompt": (
        lambda reply, choice: choice.update(prompt_token_ids=[1, 2]),
        "it read other token ids than the prompt's; got \\[1, 2\\]",
    ),
    "no ids": (
        lambda reply, choice: (choice.pop("token_ids"), choice["logprobs"].pop("tokens")),
        "it returned no token ids",
    ),
    "no log-probs": (lambda reply, choice: choice.pop("logprobs"), "it returned no log-probabil"),
    "too few log-probs": (
        lambda reply, choice: choice["logprobs"]["token_logprobs"].pop(),
        r"row 0: \d log_probs for \d response tokens",
    ),
    "null log-probs": (
        lambda reply, choice: choice["logprobs"].update(token_logprobs=None),
        r"Expected `array`, got `null` - at `\$\.choices\[0\]\.logprobs\.token_logprobs",
    ),
    "a positive log-prob": (
        lambda reply, choice: choice["logprobs"]["token_logprobs"].__setitem__(0, 0.5),
        "must be finite and at most 0: 0.5",
    ),
    "an id outside": (
        lambda reply, choice: choice["token_ids"].__setitem__(0, 999),
        "token id 999 is outside the vocabulary",
    ),
    "a text": (lambda reply, choice: choice.update(token_ids="abc"), "got `str` - at .*token_ids"),
    "too many": (longer, "row 0: the response has 15 tokens, response_length is 6"),
    "cut": (shorter, "was cut at 2 of 6 tokens: .*--max-model-len"),
    "another end": (
        lambda reply, choice: choice.update(
            token_ids=[2, 3], finish_reason="stop", logprobs={"token_logprobs": [-1.0, -1.0]}
        ),
        "ended with the token 3, which is no end token",
    ),
}


@contextlib.contextmanager
def asking(config, server, folder):
    """The client of a run, the state before its first step, and what it asks then: two responses to
    a prompt of two tokens, behind a missing row.
    """
    begun = server.policy
    start = initial.trainable(config.lora, begun.params, jax.random.key(0))
    tokens = np.full((3, 2), 3, np.int32)
    rows = np.arange(3, dtype=np.int32)
    is_real = np.array([[0, 0], [1, 1], [1, 1]])
    prompts = iteration.Prompts(tokens, is_real, rows, places=rows)
    state = LoopState(TrainState.create(start.params, optax.sgd(1.0)), 0.0)
    with engines.opened(config.rl.engine, config.engine, folder / "weights") as engine:
        opened = SimpleNamespace(config=config, folder=SimpleNamespace(engine=folder / "engine"))
        yield Client(engine, opened, config.rl, begun, start), state, prompts


def ask(config, server, folder):
    with asking(config, server, folder) as (client, state, prompts):
        return client.responder(state, "respond")(prompts, jax.random.key(0))


@pytest.mark.parametrize("name", WRONG)
def test_a_reply_that_is_not_what_was_asked_for_is_an_error(config, server, name, tmp_path):
    change, message = WRONG[name]
    server.spoil = spoiled(change)
    with pytest.raises(ServiceError, match=message) as caught:
        ask(config, server, tmp_path)
    assert str(caught.value).startswith(server.url)
    assert not server.adapters
    server.spoil = lambda path, body, reply: reply
    ask(config, server, tmp_path)  # what was wrong was not kept


def test_tokens_named_by_their_ids_and_choices_in_any_order_will_do(config, server, tmp_path):
    expected = ask(config, server, tmp_path / "whole")
    assert expected.present.tolist() == [False, True, True]
    others = {
        "named": lambda reply, choice: choice.pop("token_ids"),
        "reversed": lambda reply, choice: reply["choices"].reverse(),
    }
    for name, change in others.items():
        server.spoil = spoiled(change)
        jax.tree.map(assert_array_equal, ask(config, server, tmp_path / name), expected)


def test_a_reload_that_did_not_happen_is_found(config, server, tmp_path):
    """By the version of the samples."""
    server.spoil = lambda path, body, reply: b"" if path == "/update_weight_version" else reply
    with pytest.raises(ServiceError, match="of the weights 'default' in place of 'rlhf-jax-"):
        ask(replace(config, lora=LoRA()), server, tmp_path)


@pytest.mark.slow
def test_weights_that_stay_old_are_found_by_their_distance(config, server):
    """Before they are far from the policy's."""
    server.spoil = lambda path, body, reply: b"" if path == "/collective_rpc" else reply
    stale = with_rl(config, num_iterations=30, optimizer=Optimizer(learning_rate=0.0003))
    with pytest.raises(ServiceError, match=r"by 0\.0[2-9]\d* nats in the mean, after .*e-0"):
        run(replace(stale, lora=LoRA()))


def test_an_adapter_whose_reply_was_lost_is_loaded(config, server, tmp_path):
    def lost(path, body, reply):
        return (400, b"already loaded") if reply and path.startswith("/v1/load") else reply

    server.spoil = lost
    ask(config, server, tmp_path)
    assert kinds(server) == ["load", "unload"]


STARTED = [
    (LORA, "lora", (404, b"Not Found"), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    (LoRA(), "rpc", (404, b"Not Found"), "VLLM_SERVER_DEV_MODE"),
    (LoRA(), "generate", (403, b"closed"), r"HTTP 403.*--enable-scale-out"),
]


@pytest.mark.parametrize(("lora", "refused", "answer", "message"), STARTED)
def test_what_the_server_must_be_started_with_is_said(
    config, server, tmp_path, lora, refused, answer, message
):
    server.spoil = lambda path, body, reply: answer if refused in path else reply
    with pytest.raises(ServiceError, match=message):
        ask(replace(config, lora=lora), server, tmp_path)


# --- Conversations, settings


@pytest.mark.slow
def test_conversations_go_through_the_engine(config, server, tmp_path):
    config = with_rl(config, num_iterations=2)
    row = metric_rows(run(with_turns(config, tmp_path)))[-1]
    assert row["environment/turns"] > 1
    assert row["policy/sampler_gap"] < 1e-4
    rooms = {body["max_tokens"] for body in asked(server)}
    assert max(rooms) == 8
    assert min(rooms) < 7  # in the second turn
    assert 1 in {body["n"] for body in asked(server)}


def test_the_version_of_weights_tells_leaves_apart_that_changed_places():
    one = jnp.arange(4.0)
    other = one**2 + 1.0
    version = _checksum({"a": one, "b": other})
    assert version == _checksum({"a": one, "b": other})
    assert version != _checksum({"a": other, "b": one})
    assert version != _checksum({"a": one[::-1], "b": one})


def test_a_later_turn_asks_for_the_room_that_is_left():
    """Of six slots two are taken in the second row, five in the third; the last is missing."""
    mask = jnp.ones((4, 3), jnp.int32).at[3].set(0)
    used = jnp.array([0, 2, 5, 0])
    prompts = iteration.Prompts(2 * mask, mask, jnp.arange(4), used, jnp.arange(4))
    how = SamplingConfig(max_new_tokens=6, eos_id=1, pad_id=0)
    groups, requests = _requests(prompts, "1", how, jax.random.key(0))
    assert groups == [[0], [1], [2]]
    assert [request.max_tokens for request in requests] == [6, 4, 1]


REFUSED = {
    "http://host": "engine must be vllm:http://HOST:PORT",
    "vllm": "engine must be vllm:http://HOST:PORT",
    "vllm:host:8000": "engine must begin with http",
    "vllm:http://me:word@host": "holds a name or password",
}


@pytest.mark.parametrize("engine", REFUSED)
def test_a_wrong_engine_is_refused_at_once(engine):
    with pytest.raises(ValueError, match=REFUSED[engine]):
        RLStage(engine=engine)


def test_a_kind_that_is_not_there_and_a_model_that_is_not_served(config, server):
    with pytest.raises(UserError, match=r"openai, stored, vllm, .* did you mean"):
        run(with_rl(config, engine=f"vlm:{server.url}"))
    with pytest.raises(UserError, match=r"it serves no model x, but "):
        run(replace(config, engine=EngineServer(model="x")))
    with pytest.raises(UserError, match=r"stored:nowhere: no such folder"):
        run(with_rl(config, engine="stored:nowhere"))
    assert not Path(config.output_dir).exists() or not any(
        path.suffix == ".yaml" for path in Path(config.output_dir).iterdir()
    )


def test_somebody_elses_config_does_not_name_a_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    code = {"reward": (("pairs:theirs.py:f",), f"{tmp_path}/config.yaml, line 2")}
    with pytest.raises(UserError, match=r"reward pairs:theirs.py:f runs the Python code of"):
        check_trusted(code)
    given = {"rl.engine": ("vllm:http://their.host", f"{tmp_path}/config.yaml, line 3")}
    with pytest.raises(UserError, match=r"rl.engine vllm:http://their.host gets the texts"):
        check_trusted(given)


KEPT = ["5", "[1]", '{"a": 1}', "[[1, 2]]", '[[[1], [0.5], "yes"]]', '[[["1"], [0.5], true]]', "[["]


def test_kept_samples_of_another_form_are_a_sentence():
    sample = engines.Sample([1, 2], [-0.5, 0], True, "v")
    masked = sample._replace(support=[[1], [2, 3]])
    for one in (sample, masked):
        assert engines.decoded(engines.encoded([one]), "v") == [one]
    before_masks = "[[[1, 2], [-0.5, 0], true]]"
    assert engines.decoded(before_masks, "v") == [sample]
    for text in KEPT:
        with pytest.raises(UserError, match=r"engine/: .* weights v is no sample: .*; delete"):
            engines.decoded(text, "v")
