"""Responses with holes: the policy speaks, a tool or the user answers, the policy goes on."""

import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from builders import (
    goes_on_alike,
    grid,
    initial_params,
    json_lines,
    launch,
    metric_rows,
    run_grpo,
)
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import models, ops, sampling
from rlhf_jax.algorithms import grpo
from rlhf_jax.config import Network, RLStage, RunConfig, to_yaml
from rlhf_jax.config import Tokenizer as Tokens
from rlhf_jax.data import chat, encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import Tokenizer, characters, train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench, evaluate
from rlhf_jax.generation import environment, stops
from rlhf_jax.generation.environment import Environment, converse
from rlhf_jax.generation.generator import Generator
from rlhf_jax.sampling.rollout import rescore
from rlhf_jax.training.common.opening import OpenRun

KEY = jax.random.key(7)


# Conversations with an environment

ALPHABET = characters("abcdefgh")  # pad 0, EOS 1, a 2, b 3, ...
PAD, EOS, A, B, C, D, E = range(7)
P = 2
R = 8


def bigrams(params, tokens, attention_mask, key):
    """Logits [B, T, V] from the token before alone."""
    return jnp.asarray(params)[tokens]


TABLE_MODEL = sampling.uncached(bigrams)
generate = jax.jit(sampling.generate, static_argnames=("model", "config"))


def table():
    """The likeliest after a is b, after b EOS, after c d, after d e, after e EOS."""
    logits = np.random.default_rng(0).normal(size=(ALPHABET.vocab_size, ALPHABET.vocab_size))
    for before, after in ((A, B), (B, EOS), (C, D), (D, E), (E, EOS)):
        logits[before, after] = 4.0
    return logits.astype(np.float32)


def prompts_of(*texts, **columns):
    rows = [
        Row(text, (), f"prompts.json, row {i + 1}", columns={"number": i})
        for i, text in enumerate(texts)
    ]
    return encoding.encode_prompts(rows, ALPHABET, length=P)


def talk(fn, encoded, rows, max_turns=None, config=None, params=None, stop=()):
    """``converse`` with the table policy, the likeliest tokens by default."""
    config = config or sampling.SamplingConfig(R, temperature=0.0, eos_id=EOS, pad_id=PAD)
    params = table() if params is None else params

    def respond(tokens, mask, _, used):
        return generate(TABLE_MODEL, params, tokens, mask, KEY, config=config, used=used)

    setting = Environment(fn, ALPHABET, chat.template_of(ALPHABET), R, max_turns)
    until = stops.stopping(respond, ALPHABET, stop)
    return converse(setting, until, encoded, np.asarray(rows))


def replies(conversation, row):
    """By the row's number: one reply and then an end; none; one, and another that leaves no slot
    behind it.
    """
    roles = [message["role"] for message in conversation]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    texts = [message["content"] for message in conversation]
    expected = (["a", "b", "c", "de"], ["ca", "b"], ["a", "b", "cc", "de"])[row["number"]]
    assert texts == expected[: len(texts)]
    conversation[0].clear()  # its own copies
    conversation.clear()
    answers = [("c", 0.5), (None, -1), "cc"] if len(texts) == 2 else [(None, 2.0), None, "c"]
    return answers[row["number"]]


def test_a_conversation_by_hand():
    encoded = prompts_of("a", "ca", "a")
    rollout, metrics = talk(replies, encoded, [0, 1, -1, 2])
    # P the prompt, x a reply, r a response.
    kinds = np.array([list(row) for row in ("-Prrxrrr--", "PPrr------", "-" * 10, "-Prrxxrrr-")])
    assert_array_equal(rollout.tokens, grid("0231456100", "4231000000", "0" * 10, "0231445610"))
    assert_array_equal(rollout.response_mask, kinds == "r")
    assert_array_equal(rollout.attention_mask, kinds != "-")
    assert rollout.prompt_length == P
    rewards = np.zeros((4, P + R))
    rewards[[0, 0, 1], [3, 7, 3]] = [0.5, 2.0, -1.0]
    assert_array_equal(rollout.rewards, rewards)
    rescored = jax.jit(partial(rescore, policy_fn=ops.policy_fn(bigrams)))(rollout, table())
    assert_array_equal(np.asarray(rescored.log_probs) != 0, kinds == "r")
    assert_allclose(rollout.log_probs, rescored.log_probs, atol=1e-6)
    by_row = {"turns": [2, 1, 0, 2], "cut": [0, 0, 0, 1], "reward": [2.5, -1, 0, 0]}
    assert {name: x.tolist() for name, x in metrics.items()} == by_row


def test_an_environment_gives_extras_at_the_end_of_responses():
    def with_costs(conversation, row):
        said = len(conversation)
        answer = replies(conversation, row)
        reply, reward = answer if isinstance(answer, tuple) else (answer, 0.0)
        return reply, reward, {"cost": reward + 3, "turn": said}

    encoded = prompts_of("a", "ca", "a")
    rollout, _ = talk(with_costs, encoded, [0, 1, -1, 2])
    costs, turns = np.zeros((2, 4, P + R))
    costs[[0, 0, 1, 3, 3], [3, 7, 3, 3, 8]] = [3.5, 5.0, 2.0, 3.0, 3.0]
    turns[[0, 0, 1, 3, 3], [3, 7, 3, 3, 8]] = [2, 4, 2, 2, 4]
    assert_array_equal(rollout.extras["cost"], costs)
    assert_array_equal(rollout.extras["turn"], turns)
    assert talk(replies, encoded, [0, 1, -1, 2])[0].extras is None


def test_after_the_last_turn_the_environment_is_asked_and_nothing_follows():
    encoded = prompts_of("a", "ca", "a")
    rollout, metrics = talk(replies, encoded, [0, 1, -1, 2], max_turns=1)
    assert_array_equal(rollout.tokens[[0, 1, 3], P:], grid(*["31000000"] * 3))
    assert_array_equal(rollout.rewards.sum(axis=1), [0.5, -1.0, 0.0, 0.0])
    assert metrics["cut"].tolist() == [1, 0, 0, 1]


def test_a_turn_ends_at_a_stop_string_and_the_environment_replies(monkeypatch):
    """The likeliest after c is d, then e; the reply is c again."""
    asked = []
    closed = []
    ask = environment._ask
    monkeypatch.setattr(environment, "_ask", lambda *args: closed.append(args[-1]) or ask(*args))

    def reply(conversation, row):
        asked.append([message["content"] for message in conversation])
        return "c" if len(asked) < 3 else None

    rollout, metrics = talk(reply, prompts_of("c"), [0], stop=("d",))
    assert asked[-1] == ["c", "d", "c", "d", "c", "d"]
    assert_array_equal(rollout.tokens, grid("0454545000"))
    assert_array_equal(rollout.response_mask, grid("0010101000"))
    assert (rollout.stopped.tolist(), metrics["turns"].tolist()) == ([True], [3])
    talk(replies, prompts_of("a", "ca"), [0, 1])
    assert closed == [False] * 3 + [True] * 3


def test_a_tokens_randomness_is_that_of_its_slot():
    """A policy that forgets everything says at each slot what it would say there without any
    turns.
    """
    params = np.zeros((ALPHABET.vocab_size,) * 2, np.float32)
    encoded = prompts_of("a", "ca", "bb", "b")
    endless = sampling.SamplingConfig(R, eos_id=None, pad_id=PAD)
    whole = generate(
        TABLE_MODEL, params, encoded.tokens, encoded.attention_mask, KEY, config=endless
    )
    ending = sampling.SamplingConfig(R, eos_id=(EOS, A, B, C), pad_id=PAD)
    one, _ = talk(lambda *_: "d", encoded, np.arange(4), config=ending, params=params)
    said = one.response_mask == 1
    assert said.sum(axis=1).min() > 2  # several turns
    assert (~said & (one.attention_mask == 1))[:, P:].sum() > 3
    assert_array_equal(one.tokens[said], np.asarray(whole.tokens)[said])


FAULTS = [
    (lambda conversation, row: 1 // (4 - len(conversation)), "ZeroDivisionError"),
    (lambda conversation, row: 7, "TypeError: expected None, a text or a message, or .*, got 7"),
    (lambda conversation, row: ("x", 1, 2), "TypeError: expected .*, got \\('x', 1, 2\\)"),
    (lambda conversation, row: ("x", 1, {"cost": math.nan}), "TypeError: expected "),
    (lambda conversation, row: ("x", 1, {}, 2), "ValueError: too many values to unpack"),
    (
        lambda conversation, row: (None, float("nan")),
        r"TypeError: expected .* a number.*, got \(None, nan\)",
    ),
    (lambda conversation, row: (None, "1"), "TypeError: "),
    (lambda conversation, row: {"content": "a"}, "TypeError: expected .* a message"),
    (lambda conversation, row: "é", r"the tokenizer's alphabet lacks 'é'"),
    (lambda conversation, row: {"role": "tool", "content": "é"}, r"the tokenizer's alphabet"),
    (lambda conversation, row: row["missing"], "KeyError: 'missing'"),
    (lambda conversation, row: sys.exit(0), r"called sys\.exit\(0\)"),
]


@pytest.mark.parametrize(("fn", "message"), FAULTS)
def test_what_an_environment_does_wrong_names_row_and_turn(fn, message):
    def after_one_turn(conversation, row):
        if row["number"] == 0:
            return None
        return "c" if len(conversation) == 2 else fn(conversation, row)

    where = rf"^environment: prompts\.json, row 2, turn 2:? {message}"
    with pytest.raises(UserError, match=where):
        talk(after_one_turn, prompts_of("a", "ca"), [0, 1, -1, -1])


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_message_is_rendered_by_the_chat_template():
    """What the template writes from the end of the policy's turn on to the opening of the next,
    once.
    """
    plain = train_bpe(["hi tool user assistant"] * 3, 270)
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    end = backend.token_to_id("<|im_end|>")
    chatml = Tokenizer(backend, 0, end, {"chat_template": CHATML})
    tool = {"role": "tool", "content": "42"}
    for tokenizer, text, unclosed in (
        (plain, "\n\nTool:\n42\n\nAssistant:\n", ""),
        (chatml, "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    ):
        setting = Environment(lambda *_: tool, tokenizer, chat.template_of(tokenizer), R)
        messages = [{"role": "user", "content": "hi"}]
        ids, reward, _ = environment._ask(setting, messages, {}, "here", is_closed=True)
        assert tokenizer.backend.decode(ids, skip_special_tokens=False) == text
        assert (reward, messages[-1]) == (0.0, tool)
        # A string of rl.stop ended the policy's turn: the template closes it.
        ids, *_ = environment._ask(setting, messages[:1], {}, "here", is_closed=False)
        assert tokenizer.backend.decode(ids, skip_special_tokens=False) == unclosed + text
    forged = setting._replace(fn=lambda *_: tool | {"content": "<|im_end|>"})
    with pytest.raises(UserError, match="here: a tool message spells the special token"):
        environment._ask(forged, messages, {}, "here", is_closed=True)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("missing_eos_penalty", 1.0, "missing_eos_penalty, missing_eos_score, overlong"),
        ("overlong_buffer", 4, "overlong_buffer, .*: an environment pays itself"),
        ("max_turns", 0, "max_turns must be at least 1"),
    ],
)
def test_settings_that_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        RLStage(environment="e.py:f", **{setting: value})


NOTING = """
import json
from pathlib import Path

def ask(conversation, row):
    reply = ("c", 0.5) if len(conversation) <= 2 * row["wanted"] else (None, 1.0)
    with Path(__file__).with_suffix(".jsonl").open("a") as notes:
        texts = [message["content"] for message in conversation]
        notes.write(json.dumps([texts, row["wanted"], reply[1]]) + "\\n")
    return reply
"""


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A run that was trained with an environment, and its file, which notes what it is asked."""
    folder = tmp_path_factory.mktemp("talker")
    (folder / "env.py").write_text(NOTING)
    trained = {"max_new_tokens": 16, "max_turns": 2, "environment": "env.py:ask"}
    (folder / "config.yaml").write_text(json.dumps({"rl": trained}))
    rows = [{"prompt": word, "wanted": i + 1} for i, word in enumerate(("abe", "bee", "cab"))]
    (folder / "prompts.json").write_text(json.dumps(rows))
    model = models.build(models.GPT2Config(ALPHABET.vocab_size, 40, 8, 1, 2, initializer_range=0.5))
    models.save(folder / "model", model, initial_params(model))
    ALPHABET.save(folder / "model")
    return folder


def notes(folder):
    """What the environment was asked and paid since the last call: {prompt: [(texts, reward),
    ...]}.
    """
    lines = map(json.loads, (folder / "env.jsonl").read_text().splitlines())
    by_prompt = {}
    for texts, _, reward in lines:
        by_prompt.setdefault(texts[0], []).append((texts, reward))
    (folder / "env.jsonl").unlink()
    return by_prompt


def test_a_generator_with_an_environment(talker):
    source = f"{talker / 'env.py'}:ask"
    rows = json.loads((talker / "prompts.json").read_text())
    own = {"max_new_tokens": 16, "environment": source, "max_turns": 3}
    said = Generator(talker / "model", **own)([row["prompt"] for row in rows], columns=rows, seed=1)
    asked = notes(talker)
    assert max(len(turns) for turns in asked.values()) == 3
    for i, turns in enumerate(asked.values()):
        _, *texts = turns[-1][0]
        assert said.texts[i] == "".join(texts[::2])
        # A reply that was the last thing to fit may follow.
        assert said.transcripts[i].startswith("".join(texts))
        assert len(said.token_log_probs[i]) >= len(said.texts[i])  # pads can be said too
    for given in ({"max_turns": 2}, {"max_turns": 0, "environment": source}):
        with pytest.raises(UserError, match=r"max_turns \d: conversations have an environment"):
            Generator(talker / "model", **given)


@pytest.mark.slow
def test_an_evaluation_with_an_environment(talker, tmp_path, capsys):
    (talker / "env.jsonl").unlink(missing_ok=True)
    given = {"prompts": (str(talker / "prompts.json"),), "num_samples": 2, "output": str(tmp_path)}
    config = evaluate.Config(**given, environment=f"{talker / 'env.py'}:ask")
    result = evaluate.run(talker, config)
    turns = [turn for asked in notes(talker).values() for turn in asked]
    assert max(len(texts) for texts, _ in turns) == 4  # two turns, as in training
    rewards = sum(reward for _, reward in turns) / 6
    for name, value in (("turns", len(turns) / 6), ("reward", rewards)):
        assert result.value("environment", name) == pytest.approx(value)
    assert 0 < result.value("environment", "cut") < 1
    both = {"".join(texts[1:]) for texts, _ in turns if len(texts) == 4}
    assert both <= {line["response"] for line in json_lines(tmp_path / evaluate.SAMPLES)}
    content = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))
    assert config.environment in content["fingerprints"]
    assert "was trained with replies" not in capsys.readouterr().out
    policy = bench.load(str(talker), config)
    bench.open_bench(policy, evaluate.Config(**given))
    line = "was trained with replies by env.py:ask; this evaluation has no --environment"
    assert line in capsys.readouterr().out
    with pytest.raises(UserError, match="max_turns 2: conversations have"):
        bench.open_bench(policy, evaluate.Config(**given, max_turns=2))


WORDS = ("abe", "bee", "cab", "dab", "ebb", "fab", "ade", "User:\nAssistant")
COUNTING = """
def more(conversation, row):
    assert set(row) == {"wanted"}
    said = conversation[-1]["content"]
    if len(conversation) > 2 * row["wanted"]:
        return None, said.count("e")
    if row["wanted"] == 2:
        return {"role": "user", "content": said[:3]}
    return said[:2], said.count("b") / 2

def broken(conversation, row):
    import jax
    return None, 1 / (1 - jax.process_index())

def nan(prompts, responses, wanted):
    import jax
    return [0.0] * (len(prompts) - 1) + [float("nan") if jax.process_index() else 1.0]

def raising(prompts, responses, wanted):
    import jax
    return [score / (1 - jax.process_index()) for score in nan(prompts, responses, wanted)]
"""
# Each of two processes: a run, and four that fail in the second process, the last before it begins.
IN_PROCESSES = """
import sys
from rlhf_jax import cli, config, errors, training
from rlhf_jax.algorithms import grpo
file, env, place = sys.argv[1:]

def main():
    for name, *flags in (
        ("two", "--rl.environment", f"{env}:more"),
        ("nan", "--reward", f"{env}:nan"),
        ("raising", "--reward", f"{env}:raising"),
        ("broken", "--rl.environment", f"{env}:broken"),
        ("alone", *["--data", "missing"] * int(place[-1])),
    ):
        flags = ["--output-dir", f"{file}s/{name}", "--processes", place, *flags]
        flags = ["--config", file, "--trust-config", *flags]
        try:
            training.rl.run(config.parse(config.RunConfig, flags), grpo)
        except (errors.TrainingFault, errors.UserError, ArithmeticError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            if name == "alone":
                raise

cli.run_script(main)
"""


@pytest.fixture(scope="module")
def conversing(tmp_path_factory):
    """(config, result, arrays that the run held) of a run with an environment and stop strings."""
    folder = tmp_path_factory.mktemp("conversing")
    (folder / "env.py").write_text(COUNTING)
    rows = [{"prompt": word, "wanted": 1 + i % 3} for i, word in enumerate(WORDS)]
    (folder / "prompts.json").write_text(json.dumps(rows))
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 64}
    config = RunConfig(
        data=(str(folder / "prompts.json"),),
        output_dir=str(folder / "straight"),
        network=Network(**sizes, initializer_range=0.5),
        tokenizer=Tokens(kind="characters"),
        reward=("length*0.1", "length:2"),
        checkpoint_interval=2,
        rl=RLStage(
            num_iterations=4,
            batch_size=16,
            max_new_tokens=40,
            max_turns=3,
            environment=f"{folder / 'env.py'}:more",
            stop=("ab", "d"),
            validation_interval=2,
            validation_fraction=0.5,
        ),
        grpo=grpo.Config(num_minibatches=2, group_size=4),
    )
    held = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenRun, "hold", lambda run, trees: held.update(trees))
        return config, run_grpo(config), held


@pytest.mark.slow
def test_a_run_with_an_environment(conversing):
    _, result, held = conversing
    caches = held["cache while it samples"]
    of_prompts, of_rows = caches
    assert of_prompts is None
    slots = {size for keys, values in of_rows for size in (keys.shape[3], values.shape[2])}
    assert slots == {max(map(len, WORDS)) + 2 * 40}  # the conversation so far, and as much again
    first, *steps = metric_rows(result.folder)
    for row in steps:
        assert row["policy/sampler_gap"] < 1e-4  # the moved rows were read as the update reads them
        assert 1 < row["environment/turns"] <= 3
        parts = row["environment/reward"] + row["reward/length"] * 0.1 + row["reward/length:2"]
        assert row["objective/score"] == pytest.approx(parts, abs=1e-4)
    assert max(row["environment/cut"] for row in steps) > 0
    assert "validation/environment/turns" in first
    samples = (result.folder / "samples.jsonl").read_text("utf-8")
    assert "User:" in samples  # a message as the policy read it
    said = [row["response"] for row in json_lines(result.folder / "samples.jsonl")]
    assert any("d" in response for response in said)


@pytest.mark.slow
def test_a_run_with_an_environment_goes_on_bit_for_bit(conversing):
    config, result, _ = conversing
    resumed = goes_on_alike(run_grpo, config, result)
    env = Path(config.rl.environment.rpartition(":")[0])
    env.write_text(COUNTING.replace("/ 2", "/ 3"))
    again = replace(config, output_dir=str(resumed.folder), resume=True)
    with pytest.raises(UserError, match="environment"):
        run_grpo(again)
    env.write_text(COUNTING)


@pytest.mark.soak
def test_two_processes_share_a_run_with_an_environment(conversing, tmp_path):
    config, result, _ = conversing
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    env = config.rl.environment.rpartition(":")[0]
    running = launch([sys.executable, "-c", IN_PROCESSES, tmp_path / "run.yaml", env], 2, 1, [])
    said = [process.communicate(timeout=3600)[0] for process in running]
    assert [process.returncode for process in running] == [1, 2], said
    assert "error: process 1: it has ended; its last lines say why" in said[0]
    assert "error: missing: " in said[1]
    sentences = {
        "nan": r"the reward function.* is not finite \(row .*: nan\).*",
        "raising": ".*by zero.*",
        "broken": ".*environment: .*turn 1: ZeroDivisionError.*",
    }
    for name, sentence in sentences.items():
        pattern = f"^{name}: (process 1: )?({sentence})$"
        first, second = (re.search(pattern, text, re.MULTILINE) for text in said)
        assert first, said[0]
        assert second, said[1]
        assert (first[1], second[1], first[2]) == ("process 1: ", None, second[2])
    two = tmp_path / "run.yamls" / "two"
    for row, of_one in zip(metric_rows(two), metric_rows(result.folder), strict=True):
        assert row == pytest.approx(of_one, rel=1e-3, abs=1e-4), row["step"]
    said = [
        [row["response"] for row in metric_rows(folder, "samples.jsonl")]
        for folder in (two, result.folder)
    ]
    assert said[0] == said[1]
