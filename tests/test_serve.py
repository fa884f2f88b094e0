"""What the server answers: the tokens of ``generate``, whatever else is asked; samples of a run;
scores; judgements.
"""

import contextlib
import html.parser
import json
import stat
import string
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import jax
import numpy as np
import pytest
from builders import initial_params, metric_rows
from serving import chat_model, running

from rlhf_jax import cli, grpo, models
from rlhf_jax.config import EngineServer, Optimizer, RLStage, RunConfig, Text
from rlhf_jax.data import formats
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.engines import Request
from rlhf_jax.engines.openai import Completions
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import Generator, LanguageModel
from rlhf_jax.graders.service import Judge, reward_service
from rlhf_jax.inference import label
from rlhf_jax.inference.labelling import summary
from rlhf_jax.inference.serving import serve
from rlhf_jax.inference.serving.answers import Answers
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training import rl

TOKENIZER = characters("abcdefgh say")
LETTERS = "abcdefgh"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def network(**more):
    size = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 40}
    return models.GPT2Config(vocab_size=TOKENIZER.vocab_size, **size, initializer_range=0.3, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy with random weights, which samples twelve tokens."""
    folder = tmp_path_factory.mktemp("policy")
    model = models.build(network())
    how = SamplingConfig(12, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id)
    LanguageModel(model, initial_params(model, 7), TOKENIZER).save(
        folder, template="{prompt}", config=how
    )
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, max_new_tokens=12) as (address, served):
        yield httpx.Client(base_url=address, timeout=120), served


def ask(client, path="/v1/completions", **body):
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return strict(reply.text)


def texts(reply):
    return [choice["text"] for choice in reply["choices"]]


def connect(address, **headers):
    return httpx.Client(base_url=address, timeout=120, headers=headers)


def streamed(client, path="/v1/completions", **body):
    """The events of a stream."""
    reply = client.post(path, json=body | {"stream": True})
    assert reply.status_code == 200, reply.text
    lines = [line for line in reply.text.split("\n\n") if line and line != ": waiting"]
    *events, done = [line.removeprefix("data: ") for line in lines]
    assert done == "[DONE]"
    return list(map(strict, events))


def strict(text):
    """The value of a JSON text that RFC 8259 allows: without NaN and Infinity."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_an_answer_is_the_one_of_generate(folder, server):
    client, _ = server
    generator = Generator(folder, max_new_tokens=12, template="{prompt}")
    want = generator(["say a", "say b"], seed=3, num_samples=2)
    for row, prompt in enumerate(["say a", "say b"]):
        reply = ask(client, prompt=prompt, seed=3, n=2, logprobs=0)
        assert texts(reply) == want.texts[2 * row : 2 * row + 2]
        for choice, log_probs in zip(
            reply["choices"], want.token_log_probs[2 * row :], strict=False
        ):
            np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], log_probs, atol=1e-5)


def test_an_answer_does_not_depend_on_the_others(server):
    """Fifty requests of other prompts, lengths and settings at once, and each one alone."""
    client, served = server
    rng = np.random.default_rng(0)
    bodies = [
        {
            "prompt": "say " + "".join(rng.choice(list(LETTERS), rng.integers(1, 9))),
            "seed": int(rng.integers(1000)),
            "max_tokens": int(rng.integers(1, 13)),
            "temperature": float(rng.choice([0.0, 0.7, 1.0, 1.5])),
            "top_k": int(rng.choice([0, 5])),
            "n": int(rng.integers(1, 3)),
            "logprobs": 2,
            "return_token_ids": True,
        }
        for _ in range(50)
    ]
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(lambda body: ask(client, **body)["choices"], bodies))
    assert served.policies[next(iter(served.policies))].worker.is_idle
    for body, choices in zip(bodies, together, strict=True):
        alone = ask(client, **body)["choices"]
        assert [one["token_ids"] for one in alone] == [one["token_ids"] for one in choices]
        for one, other in zip(alone, choices, strict=True):
            np.testing.assert_allclose(
                one["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"], atol=1e-5
            )


def test_the_log_probs_of_a_prompt_are_the_models(server):
    client, served = server
    policy = next(iter(served.policies.values()))
    ids = TOKENIZER.encode("say abc")
    reply = ask(client, prompt=ids, echo=True, max_tokens=1, logprobs=3, temperature=0)
    told = reply["choices"][0]["logprobs"]
    model, params = policy.generator.model, policy.generator.params
    tokens = np.array([ids])
    hidden = model.hidden(params, tokens, np.ones_like(tokens))
    want = np.asarray(jax.nn.log_softmax(model.unembed(params, hidden)))[0]
    assert told["token_logprobs"][0] is None
    assert len(told["token_logprobs"]) == len(ids) + 1
    np.testing.assert_allclose(
        told["token_logprobs"][1:-1], [want[t, i] for t, i in enumerate(ids[1:])], atol=1e-5
    )
    for t, best in enumerate(told["top_logprobs"][1:]):
        assert max(best.values()) == pytest.approx(want[t].max(), abs=1e-5)
    # lm-eval compares these two exactly.
    assert told["token_logprobs"][-1] == max(told["top_logprobs"][-1].values())
    assert reply["choices"][0]["text"].startswith("say abc")
    cooler = np.asarray(jax.nn.log_softmax(model.unembed(params, hidden) / 0.5))[0]
    reply = ask(client, prompt=ids, echo=True, max_tokens=0, logprobs=0, temperature=0.5)
    told = reply["choices"][0]["logprobs"]["token_logprobs"]
    np.testing.assert_allclose(told[1:], [cooler[t, i] for t, i in enumerate(ids[1:])], atol=1e-5)


def test_a_prompt_may_fill_the_model(server):
    client, _ = server
    full = "say " + "abcdefgh" * 4 + "bags"
    assert len(full) == 40
    reply = ask(client, prompt=full, echo=True, max_tokens=0, logprobs=0)
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == (full, "length")
    assert len(choice["logprobs"]["token_logprobs"]) == 40
    for body in ({"prompt": full, "max_tokens": 1}, {"prompt": full + "s", "max_tokens": 0}):
        assert client.post("/v1/completions", json=body | {"echo": True}).status_code == 400


@pytest.fixture(scope="module")
def whole(server):
    """A body, and its answer: six characters that differ."""
    client, _ = server
    how = {"prompt": "say", "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    how |= {"temperature": 3.0}
    bodies = [how | {"seed": seed} for seed in range(60)]
    with ThreadPoolExecutor(60) as pool:
        choices = [
            reply["choices"][0] for reply in pool.map(lambda one: ask(client, **one), bodies)
        ]
    return next(
        (body, choice)
        for body, choice in zip(bodies, choices, strict=True)
        if len(set(choice["text"])) == 6
    )


def test_ids_may_end_an_answer(server, whole):
    client, _ = server
    body, choice = whole
    ids = choice["token_ids"]
    for ends in ([ids[3]], ids[5:2:-1]):
        (ended,) = ask(client, **body, stop_token_ids=ends)["choices"]
        assert ended["token_ids"] == ids[:4]
        assert (ended["text"], ended["finish_reason"]) == (choice["text"][:3], "stop")


def test_stop_strings_of_the_server_are_for_requests_without(folder, whole):
    body, choice = whole
    text = choice["text"]
    with running(folder, max_new_tokens=12, stop=(text[3],)) as (address, _):
        other = connect(address)
        for given, expected in (
            ({}, text[:3]),
            ({"stop": None}, text[:3]),
            ({"stop": text[5]}, text[:5]),
            ({"stop": [text[5], text[4]]}, text[:4]),
            ({"stop": []}, text),
        ):
            assert texts(ask(other, **body | given)) == [expected], given


def test_nothing_of_a_stop_string_is_streamed(server, whole):
    """A text that might begin one is held back until it does not."""
    client, _ = server
    body, choice = whole
    text = choice["text"]
    for stop, expected in ((text[3:6], text[:3]), (text[3:5] + text[3], text)):
        pieces = [event["choices"][0]["text"] for event in streamed(client, **body, stop=stop)]
        assert "".join(pieces) == expected
        assert len([piece for piece in pieces if piece]) > 2
    held = [piece for piece in pieces if text[3] in piece]
    assert held[0].startswith(text[3:6])  # what did not become a stop string comes at once


def test_special_tokens_are_left_out_unless_they_are_asked_for(server):
    client, _ = server
    body = {"prompt": "say", "n": 4, "seed": 0, "ignore_eos": True, "return_token_ids": True}
    for skips, decode in ((True, TOKENIZER.decode), (False, TOKENIZER.decode_raw)):
        choices = ask(client, **body, skip_special_tokens=skips)["choices"]
        assert [one["text"] for one in choices] == [decode(one["token_ids"]) for one in choices]
        assert any(TOKENIZER.eos_id in one["token_ids"] for one in choices)
    assert "<|endoftext|>" in "".join(one["text"] for one in choices)


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_has_the_tokens_of_the_whole(server, echo):
    client, _ = server
    body = {"prompt": ["say a", "say"], "n": 2, "seed": 1, "logprobs": 2, "echo": echo}
    body |= {"return_token_ids": True}
    parts = [event["choices"][0] for event in streamed(client, **body)]
    for number, choice in enumerate(ask(client, **body)["choices"]):
        own = [part for part in parts if part["index"] == number]
        assert len(own) > 1
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [id for part in own for id in part["token_ids"]] == choice["token_ids"]
        for name, values in choice["logprobs"].items():
            assert [one for part in own for one in part["logprobs"][name]] == values, name


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("temperature", [1e-9, 1e-20, 1e-45, 1e-300])
def test_log_probs_of_low_temperatures_are_json(server, temperature, is_streamed):
    client, _ = server
    body = {"prompt": "say", "temperature": temperature, "n": 2, "logprobs": 20, "echo": True}
    body |= {"max_tokens": 3, "ignore_eos": True, "seed": 1}
    events = streamed(client, **body) if is_streamed else [ask(client, **body)]
    parts = [part for event in events for part in event["choices"]]
    for number in range(2):
        told = [part["logprobs"] for part in parts if part["index"] == number]
        log_probs = [x for one in told for x in one["token_logprobs"]]
        best = [max(x.values()) for one in told for x in one["top_logprobs"] if x is not None]
        assert log_probs[0] is None
        assert all(-9999 <= x <= 0 for x in log_probs[1:])
        assert log_probs[-3:] == [0, 0, 0]
        assert best == [0] * (len(log_probs) - 1)


def test_log_probs_of_greedy_answers_are_those_of_temperature_1(server):
    client, _ = server
    body = {"ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    greedy = ask(client, **body, prompt="say", max_tokens=3, temperature=0)["choices"][0]
    ids = greedy["prompt_token_ids"] + greedy["token_ids"]
    for temperature in (0, 1):
        how = {"max_tokens": 0, "temperature": temperature, "echo": True}
        [read] = ask(client, **body, **how, prompt=[ids])["choices"]
        found = read["logprobs"]["token_logprobs"][-3:]
        np.testing.assert_allclose(found, greedy["logprobs"]["token_logprobs"], atol=1e-4)
        assert max(found) < -1e-3


def test_no_event_has_numbers_that_are_no_json(server, monkeypatch):
    client, _ = server
    monkeypatch.setattr(Answers, "choice", lambda *_, **__: {"score": float("nan")})
    (event,) = streamed(client, prompt="say", max_tokens=1)
    assert event["error"]["code"] == 500


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_a_log_prob_that_is_no_number_is_the_least(server, monkeypatch, path):
    """As of a model whose weights are NaN."""
    client, served = server
    batch = next(iter(served.policies.values())).worker.batch
    step = batch.step

    def broken():
        for sample, token in step():
            yield sample, token._replace(log_prob=float("nan"), likeliest=[(1, float("-inf"))])

    monkeypatch.setattr(batch, "step", broken)
    is_chat = path == CHAT
    says = [{"role": "user", "content": "say"}]
    body = {"messages": says, "logprobs": True} if is_chat else {"prompt": "say", "logprobs": 1}
    told = ask(client, path, **body, max_tokens=1, seed=1)["choices"][0]["logprobs"]
    found = [told["content"][0]["logprob"]] if is_chat else told["token_logprobs"]
    assert found == [-9999]


def test_the_prompt_comes_with_the_first_piece_alone(server):
    client, _ = server
    body = {"prompt": "say", "n": 2, "seed": 1, "return_token_ids": True, "ignore_eos": True}
    first, *others = streamed(client, **body)
    assert first["prompt_text"] == "say"
    assert first["prompt_token_ids"] == TOKENIZER.encode("say")
    assert len(others) > 2
    assert not any(event.keys() & {"prompt_text", "prompt_token_ids"} for event in others)
    assert "prompt_text" not in ask(client, prompt="say", max_tokens=1)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The client of a chat model whose template has a variable."""
    folder = chat_model(tmp_path_factory.mktemp("talker"), template="qwen3")
    with running(folder, max_new_tokens=4) as (address, served):
        yield connect(address), next(iter(served.policies.values())).generator


def read(client, messages=HI, **body):
    """The prompt of a chat as the model reads it; nothing is sampled."""
    body = {"messages": messages, "max_tokens": 0, "return_token_ids": True} | body
    return ask(client, CHAT, **body)["prompt_text"]


def test_variables_of_a_chat_template(talker):
    client, _ = talker
    opening = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    silent = opening + "<think>\n\n</think>\n\n"
    assert read(client) == opening
    assert read(client, chat_template_kwargs={"enable_thinking": False}) == silent
    assert read(client, chat_template_kwargs={"enable_thinking": True}) == opening
    assert read(client) == opening
    body = {"messages": HI, "max_tokens": 0, "chat_template_kwargs": {"unheard_of": 1}}
    reply = client.post(CHAT, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("chat_template_kwargs: ")


def test_no_token_of_a_chat_is_an_answer_too(talker):
    client, _ = talker
    for how in (
        {"max_completion_tokens": 0},
        {"max_completion_tokens": 0, "max_tokens": 3},
        {"max_tokens": 0},
    ):
        reply = ask(client, CHAT, messages=HI, **how)
        (choice,) = reply["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
        assert reply["usage"]["completion_tokens"] == 0
    body = {"messages": HI, "ignore_eos": True, "max_completion_tokens": 2, "max_tokens": 3}
    assert ask(client, CHAT, **body)["usage"]["completion_tokens"] == 2


def test_of_tokens_of_one_name_the_likeliest_is_told(talker):
    """Such as bytes that make no character."""
    client, generator = talker
    body = {"prompt": "hello", "seed": 0, "logprobs": 20, "ignore_eos": True, "echo": True}
    (by_name,) = ask(client, **body)["choices"]
    (by_id,) = ask(client, **body, return_tokens_as_token_ids=True)["choices"]
    num_equal = 0
    for named, numbered in zip(
        by_name["logprobs"]["top_logprobs"][1:], by_id["logprobs"]["top_logprobs"][1:], strict=True
    ):
        best = {}
        for name, log_prob in numbered.items():
            text = generator.tokenizer.decode_raw([int(name.removeprefix("token_id:"))])
            best[text] = max(best.get(text, -np.inf), log_prob)
        # The token itself stands there too, even if it is less likely than another of its name.
        num_equal += len(numbered) - len(best)
        assert named == best
    assert num_equal > 5


TWO_TURNS = [*HI, {"role": "assistant", "content": "ho"}, *HI]


@pytest.mark.parametrize(
    ("template", "lone", "several"),
    [
        (
            "Human: {prompt}\nAssistant: ",
            "Human: hi\nAssistant: ",
            "Human: hi\nAssistant: ho<|endoftext|>Human: hi\nAssistant: ",
        ),
        ("{prompt}", "hi", None),
        (None, "hi", None),
    ],
    ids=["framed", "bare", "base"],
)
def test_chats_without_a_chat_template(tmp_path, template, lone, several):
    """As a run with this ``text.template`` left the folder; None: of a base model."""
    tokenizer = characters(string.printable)
    network = models.GPT2Config(tokenizer.vocab_size, 64, 16, 1, 2)
    model = models.build(network)
    saved = LanguageModel(model, initial_params(model), tokenizer)
    saved.save(tmp_path, template=template or "{prompt}")
    if template is None:
        file = tmp_path / "tokenizer_config.json"
        config = json.loads(file.read_text())
        del config["chat_template"]
        file.write_text(json.dumps(config))
    with running(tmp_path, max_new_tokens=4) as (address, _):
        client = connect(address)
        assert read(client) == lone
        if several is None:
            body = {"messages": TWO_TURNS, "max_tokens": 0}
            assert client.post(CHAT, json=body).status_code == 400
            body = {"messages": [{"role": "system", "content": "be"}, *HI], "max_tokens": 0}
            assert client.post(CHAT, json=body).status_code == 400
        else:
            assert read(client, TWO_TURNS) == several
        body = {"messages": HI, "max_tokens": 0, "chat_template_kwargs": {"thinks": 1}}
        assert client.post(CHAT, json=body).status_code == 400


def test_settings_of_the_command_line(server, folder):
    """Host names, columns and the first seed; a slash behind the folder is no other name."""
    client, _ = server
    host = {"host": "models.example.org"}
    assert client.get("/health", headers=host).status_code == 421
    body = {"prompt": "say", "n": 2}
    how = {"seed": 7, "names": ("models.example.org",), "columns": 256}
    with running(f"{folder}/", max_new_tokens=12, **how) as (address, _):
        other = connect(address)
        assert other.get("/health", headers=host).status_code == 200
        assert [model["id"] for model in other.get("/v1/models").json()["data"]] == [str(folder)]
        for seed in (7, 8):
            assert texts(ask(other, **body)) == texts(ask(client, **body, seed=seed))
        many = other.post("/v1/completions", json=body | {"n": 16})
        assert many.status_code == 400
        assert "--columns" in many.json()["error"]["message"]
    with pytest.raises(UserError), serve.opened([f"{folder}/", str(folder)], serve.Config()):
        pass


def test_a_queue_has_an_end(folder):
    """A request that can never wait is wrong; one that cannot wait now may come again."""
    go = threading.Event()
    with running(folder, max_new_tokens=12, waiting=2) as (address, served):
        client = connect(address)
        worker = next(iter(served.policies.values())).worker
        begun = threading.Event()

        def held():
            begun.set()
            go.wait(60)
            return iter(())

        step, worker.batch.step = worker.batch.step, held
        with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
            stack.callback(go.set)
            stack.callback(setattr, worker.batch, "step", step)
            first = pool.submit(ask, client, prompt="say", max_tokens=2)
            assert begun.wait(60)
            waiting = pool.submit(ask, client, prompt=["say", "a"], max_tokens=2)
            while len(worker._waiting) < 2:
                time.sleep(0.01)
            for number, status in ((1, 429), (2, 429), (3, 400)):
                body = {"prompt": ["say"] * number}
                reply = client.post("/v1/completions", json=body, timeout=20)
                assert reply.status_code == status
            stack.close()
            assert len(first.result()["choices"]) == 1
            assert len(waiting.result()["choices"]) == 2


REPLIES = """
def reply(conversation, row):
    turns = sum(message["role"] == "assistant" for message in conversation)
    return ("ab", 1.0) if turns < 2 else None
"""


@pytest.mark.parametrize("turns", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_may_sample_here(folder, tmp_path, turns):
    """With weights that are not updated it is the run that samples itself, in each turn of a
    conversation too; what the server stops at is not for runs.
    """
    (tmp_path / "talk.py").write_text(REPLIES)
    rows = [{"prompt": f"say {letter}"} for letter in LETTERS]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    found = {}
    with running(folder, max_new_tokens=12, stop=("e",)) as (address, _):
        for engine in (f"openai:{address}", None):
            stage = RLStage(
                num_iterations=2,
                batch_size=8,
                max_new_tokens=6 * turns,
                environment=f"{tmp_path / 'talk.py'}:reply" if turns > 1 else None,
                validation_fraction=0.25,
                optimizer=Optimizer(learning_rate=0.0, schedule="constant"),
                engine=engine,
            )
            out = tmp_path / f"run_{engine is None}"
            config = RunConfig(
                data=(str(tmp_path / "prompts.json"),),
                model=str(folder),
                output_dir=str(out),
                text=Text(bucket_multiple=8),
                reward=("count:a",),
                rl=stage,
                engine=EngineServer(timeout=120.0),
            )
            rl.run(config, grpo, grpo.Config(group_size=4))
            found[engine is None] = metric_rows(out)
    for own, served in zip(found[True], found[False], strict=True):
        assert own == pytest.approx({name: served[name] for name in own}, abs=1e-5)
    assert found[False][1]["policy/sampler_gap"] < 1e-5


def test_samples_of_an_engine_are_those_of_its_keys_and_slots(server, folder):
    """Whatever the server's own stop strings are."""
    keys = [jax.random.key_data(jax.random.key(i)).tolist() for i in range(4)]
    how = SamplingConfig(12, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id)
    prompt = TOKENIZER.encode("say")
    client, _ = server
    with running(folder, max_new_tokens=12, stop=tuple(LETTERS)) as (address, _):
        engine = Completions(address, EngineServer(timeout=120.0))
        for slot in (0, 5):
            request = Request("v", prompt, 4, 12, 0, how, keys, slot)
            tokens = [sample.tokens for sample in engine.sample(request)]
            given = {"row_keys": keys, "first_slot": slot, "n": 4, "return_token_ids": True}
            choices = ask(client, prompt=prompt, **given)["choices"]
            assert tokens == [choice["token_ids"] for choice in choices]
    assert max(map(len, tokens)) > 3


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model with random weights."""
    folder = tmp_path_factory.mktemp("judge")
    model = models.build(network())
    params = models.add_head(jax.random.key(1), initial_params(model, 5), "score")
    LanguageModel(model, params, TOKENIZER).save(folder, template="{prompt}")
    return folder


def test_scores_in_all_the_forms_that_trainers_send(judge):
    prompts, answers = ["say a", "say b"], ["bad bay", "gas"]
    talks = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    ended = [
        f"{prompt}{answer}<|endoftext|>" for prompt, answer in zip(prompts, answers, strict=True)
    ]
    want = LanguageModel.load(judge).score_texts([talk[:1] for talk in talks], answers)
    assert abs(want[0] - want[1]) > 0.1
    with running(reward=(str(judge),)) as (address, _):
        client = httpx.Client(base_url=address, timeout=120)
        for body in (
            {"messages": talks},
            {"prompts": prompts, "responses": answers},
            {"prompts": [talk[:1] for talk in talks], "responses": [talk[1:] for talk in talks]},
            {"query": ended, "prompts": prompts, "labels": [None, None]},
        ):
            reply = ask(client, "/v1/score", **body)
            np.testing.assert_allclose(reply["scores"], want, atol=1e-5)
            assert reply["rewards"] == reply["scores"]
        told = [[{"role": "user", "content": "say b"}], None]
        service = reward_service(f"{address}/score", Judge())
        scores = service(["of a template", "say b"], [answers[1]] * 2, messages=told)
        np.testing.assert_allclose(scores, want[[1, 1]], atol=1e-5)
        for body in ({"messages": talks[1]}, {"prompt": "say b", "response": answers[1]}):
            assert ask(client, "/score", **body)["score"] == pytest.approx(want[1], abs=1e-5)
        for body in ({}, {"messages": talks[0][:1]}, {"prompts": ["say a"], "responses": []}):
            assert client.post("/score", json=body).status_code == 400
        unserved = client.post("/v1/completions", json={"prompt": "say a"})
        assert unserved.status_code == 404
        call = {"id": "c", "type": "function", "function": {"name": "a", "arguments": "{}"}}
        for more in ({"tool_calls": [call]}, {"reasoning_content": "so"}):
            said = [*talks[0][:1], talks[0][1] | more]
            assert client.post("/score", json={"messages": said}).status_code == 400
        both = {"messages": talks, "prompts": prompts, "responses": answers}
        assert client.post("/score", json=both).status_code == 400


def test_a_token_may_stand_in_the_address(judge):
    with running(reward=(str(judge),), token=True) as (address, served):
        for user in (f"any:{served.token}@", f":{served.token}@"):
            client = connect(address.replace("//", f"//{user}"))
            assert client.get("/v1/models").status_code == 200
        for user in ("", "any:wrong@", f"{served.token}:@"):
            client = connect(address.replace("//", f"//{user}"))
            assert client.get("/v1/models").status_code == 401


def test_a_judgement_is_a_row_to_train_on(folder, tmp_path):
    out = tmp_path / "labels.jsonl"
    turns = [{"role": "user", "content": "say a"}]
    judged = {"messages": turns, "answers": ["a", "b"], "seconds": 2.0}
    for choice in ("b", "a"):  # two starts of one server
        with running(folder, labels=str(out)) as (address, _):
            client = httpx.Client(base_url=address, timeout=120)
            assert ask(client, "/judgement", **judged, choice=choice)["kept"]
            assert client.get("/v1/models").json()["judgements"] == str(out)
            equal = judged | {"answers": ["a", "a"], "choice": "a"}
            reply = client.post("/judgement", json=equal)
            assert reply.status_code == 400
            assert "the answers are equal, or one is empty" in reply.text
    rows = formats.read("comparisons", [str(out)], seed=0).rows
    assert [row.responses for row in rows] == [("b", "a"), ("a", "b")]
    assert [given.choice for given in summary.read(out)] == ["b", "a"]
    assert [given.seconds for given in summary.read(out)] == [2.0, 2.0]


def test_judgements_at_once_are_all_kept(judge, tmp_path, monkeypatch):
    """Also while the file is written, without a pause."""
    out = tmp_path / "labels.jsonl"
    monkeypatch.setattr(label, "WRITE_EVERY", 0.0)
    with running(reward=(str(judge),), labels=str(out)) as (address, _):
        client = connect(address)

        def keep(number):
            body = {"messages": HI, "answers": [f"a{number}", "b"], "choice": "a"}
            return ask(client, "/judgement", **body)

        with ThreadPoolExecutor(10) as pool:
            assert all(told["kept"] for told in pool.map(keep, range(10)))
    rows = formats.read("comparisons", [str(out)], seed=0).rows
    assert {row.responses for row in rows} == {(f"a{number}", "b") for number in range(10)}
    assert len(rows) == 10


def deep(levels):
    """Lists in each other as JSON."""
    return "[" * levels + "]" * levels


UNREAD = {
    "a system's message alone": '[{"role": "system", "content": "hi"}]',
    "a weight": '[{"role": "user", "content": "hi", "weight": "x"}]',
    "201 levels": f'[{{"role": "user", "content": "hi", "x": {deep(201)}}}]',
    "another role": '[{"role": "judge", "content": "hi"}]',
    "calls that the model cannot write": (
        '[{"role": "user", "content": "hi"}, '
        '{"role": "assistant", "content": "a", "tool_calls": [1]}, '
        '{"role": "user", "content": "hi"}]'
    ),
    "half a surrogate pair": r'[{"role": "user", "content": "hi", "\ud800": 1}]',
    "a number of 5000 digits": f'[{{"role": "user", "content": "hi", "x": {"9" * 5000}}}]',
    "no JSON number": '[{"role": "user", "content": "hi", "x": NaN}]',
    "infinity": '[{"role": "user", "content": "hi", "x": 1e400}]',
    "a content that is no text": '[{"role": "user", "content": 5}]',
}


@pytest.fixture(scope="module")
def labelled(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    with running(folder, labels=str(out)) as (address, served):
        yield connect(address), served.labels


def judge_json(client, messages, answers=("a", "b")):
    text = f'{{"messages": {messages}, "answers": {json.dumps(answers)}, "choice": "a"}}'
    return client.post(
        "/judgement", content=text.encode(), headers={"content-type": "application/json"}
    )


@pytest.mark.parametrize("name", UNREAD)
def test_a_judgement_that_no_training_reads_is_not_kept(labelled, name):
    client, labels = labelled
    before = labels.store.judgements()
    assert judge_json(client, UNREAD[name]).status_code == 400
    assert labels.store.judgements() == before


def test_a_judgement_that_is_kept_can_be_read_again(folder, tmp_path):
    """Further keys of messages, however deep or large, stop neither the store nor training."""
    out = tmp_path / "labels.jsonl"
    further = [deep(40), str(1 << 63), "1e300", json.dumps("\0\u2028"), '{"": null}']
    for number in range(2):
        with running(folder, labels=str(out)) as (address, served):
            client = connect(address)
            for value in further:
                messages = f'[{{"role": "user", "content": "hi", "x": {value}}}]'
                reply = judge_json(client, messages, answers=[f"a{number}", "b"])
                assert reply.status_code == 200, reply.text
            assert len(served.labels.store.judgements()) == (number + 1) * len(further)
    for kind in ("pairs", "feedback", "prompts"):
        assert formats.read(kind, [str(out)], seed=0).rows


def test_what_the_template_of_the_model_writes_is_kept(tmp_path):
    """Calls of tools, which the plain template would refuse."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    turns = [*HI, called, {"role": "tool", "content": "2"}]
    folder = chat_model(tmp_path / "model")
    with running(folder, labels=str(tmp_path / "labels.jsonl")) as (address, served):
        reply = judge_json(connect(address), json.dumps(turns))
        assert reply.status_code == 200, reply.text
        assert [given.prompt for given in served.labels.store.judgements()] == [turns]


def test_on_a_full_disk_a_judgement_is_refused_or_kept_once(folder, tmp_path, monkeypatch):
    out = tmp_path / "labels.jsonl"
    with running(folder, labels=str(out)) as (address, served):
        client, store = connect(address), served.labels.store
        pages = store._value("PRAGMA page_count")
        store._value(f"PRAGMA max_page_count = {pages}")
        body = {"messages": HI, "answers": ["a" * 50_000, "b"], "choice": "a"}
        reply = client.post("/judgement", json=body)
        assert reply.status_code == 507
        assert "is full" in reply.json()["error"]["message"]
        assert store.judgements() == []
        assert store.num_pairs() == 0
        store._value("PRAGMA max_page_count = 1000000")
        assert client.post("/judgement", json=body).status_code == 200
    rows = formats.read("comparisons", [str(out)], seed=0).rows
    assert [len(row.responses[0]) for row in rows] == [50_000]


@pytest.mark.parametrize(
    ("host", "asked", "variable", "expected"),
    [
        ("127.0.0.1", False, "", None),
        ("localhost", False, "", None),
        ("::1", False, "", None),
        ("127.0.0.1", True, "", "new"),
        ("0.0.0.0", False, "", "new"),
        ("192.168.1.2", False, "", "new"),
        ("models.example.org", False, "", "new"),
        ("127.0.0.1", False, "mine", "mine"),
        ("0.0.0.0", True, "mine", "mine"),
    ],
)
def test_who_needs_a_token(judge, monkeypatch, host, asked, variable, expected):
    monkeypatch.setenv("SERVE_TOKEN", variable)
    config = serve.Config(reward=(str(judge),), host=host, token=asked)
    with serve.opened([], config) as served, serve.opened([], config) as again:
        if expected == "new":
            assert len(served.token) >= 43
            assert served.token != again.token
        else:
            assert served.token == expected


def test_each_folder_is_given_once(folder):
    for folders in ([], [str(folder)] * 2):
        with pytest.raises(UserError, match="each once"), serve.opened(folders, serve.Config()):
            pass


def test_a_missing_package_of_the_server_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "rlhf_jax.inference.serving.serve", raising=False)
    monkeypatch.delattr("rlhf_jax.inference.serving.serve", raising=False)
    monkeypatch.setitem(sys.modules, "starlette.types", None)
    for command in (["serve", "runs/a"], ["chat", "runs/a", "--page"]):
        with pytest.raises(UserError, match=r"starlette.types: pip install 'rlhf-jax\[serve\]'"):
            cli.run(command)


def test_chat_with_a_page_passes_what_it_was_asked_for(monkeypatch):
    started = []
    monkeypatch.setattr(serve, "run", lambda folders, config: started.append((folders, config)))
    how = {"max_new_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.8, "min_p": 0.1}
    how |= {"repetition_penalty": 1.5, "template": "Q: {prompt}", "seed": 4, "dtype": "bfloat16"}
    flags = [part for name, value in how.items() for part in (f"--{name}", str(value))]
    flags += ["--stop", "x", "y", "--template_options", '{"a": 1}', "--device", "cpu"]
    cli.run(["chat", "runs/a", "--page", "--compare", "runs/b", "--reward", "runs/rm", *flags])
    ((folders, config),) = started
    assert folders == ["runs/a", "runs/b"]
    how |= {"stop": ("x", "y"), "template_options": {"a": 1}, "device": "cpu"}
    assert config == serve.Config(**how, reward=("runs/rm",), page=True, port=0)
    cli.run(["chat", "runs/a", "--page"])
    assert started[1] == (["runs/a"], serve.Config(page=True, port=0))
    with pytest.raises(UserError, match="--system"):
        cli.run(["chat", "runs/a", "--page", "--system", "be kind"])
    assert len(started) == 2


@pytest.mark.parametrize("variable", ["", "s3cret\"<'&\u00e9"])
def test_a_browser_gets_the_token_in_a_file_of_the_owner(judge, monkeypatch, caplog, variable):
    """Everybody reads the command line of a browser."""
    seen = []
    files, contents = [], []

    def shows(address):
        seen.append(address)
        if address.startswith("file:"):
            file = Path(unquote(urlsplit(address).path))
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            page = html.parser.HTMLParser()
            page.handle_starttag = lambda _, keys: contents.append(dict(keys).get("content"))
            page.feed(file.read_text("utf-8"))
            files.append((file, contents[-1]))

    def runs(*_):
        assert not seen[-1].startswith("file:") or files[-1][0].exists()

    monkeypatch.setenv("SERVE_TOKEN", variable)
    monkeypatch.setattr(serve.webbrowser, "open", shows)
    monkeypatch.setattr(serve.asking, "start", lambda _: None)
    monkeypatch.setattr(serve.web, "listen", lambda *_: (None, None, "http://127.0.0.1:5"))
    monkeypatch.setattr(serve.web, "run", runs)
    for token in (True, False):
        serve.run([], serve.Config(reward=(str(judge),), token=token, page=True))
    is_open = ["http://127.0.0.1:5/"]
    assert [address for address in seen if not address.startswith("file:")] == (
        [] if variable else is_open
    )
    for file, content in files:
        given = content.removeprefix("0;url=http://127.0.0.1:5/#token=")
        assert given == variable or (not variable and len(given) >= 43)
        assert given not in "".join(seen)
        assert not file.exists()
    assert len(files) == (2 if variable else 1)
    assert not variable or variable not in caplog.text
