"""Requests that no client should send: each is refused in OpenAI's form, and the server goes on."""

import base64
import contextlib
import errno
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
import jax
import openai.types
import pytest
from builders import initial_params
from serving import chat_model, running
from starlette.datastructures import URL
from starlette.requests import HTTPConnection

from rlhf_jax import errors, models
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.inference import web
from rlhf_jax.inference.labelling import settings
from rlhf_jax.inference.labelling.store import Store
from rlhf_jax.inference.serving import app

HI = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LONG = 400  # tokens of an answer that nobody waits for


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy and a reward model."""
    root = tmp_path_factory.mktemp("models")
    known = LanguageModel.load(chat_model(root / "policy"))
    model = models.build(known.model.config)
    params = models.add_head(jax.random.key(1), initial_params(model, 5), "score")
    LanguageModel(model, params, known.tokenizer).save(root / "judge", template="auto")
    return root / "policy", str(root / "judge")


class Site(NamedTuple):
    """A server, and its client."""

    client: httpx.Client
    served: app.Served

    @property
    def worker(self):
        return next(iter(self.served.policies.values())).worker

    def post(self, path, body, **headers):
        """The reply to a JSON value, or to bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(
            path, content=content, headers={"content-type": "application/json"} | headers
        )

    def chat(self, **given):
        return self.post(CHAT, {"messages": HI, "temperature": 0, "ignore_eos": True} | given)

    def is_well(self):
        """Whether a good request is answered, and nobody else's tokens are sampled."""
        reply = self.chat(max_tokens=4)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == 4
        return self.worker.is_idle


@contextlib.contextmanager
def opened(folders, **settings):
    policy, judge = folders
    how = {"max_new_tokens": 8, "columns": 2048, "waiting": 2, "token": True} | settings
    with running(policy, reward=(judge,), **how) as (address, served):
        auth = {"authorization": f"Bearer {served.token}"}
        with httpx.Client(base_url=address, timeout=60, headers=auth) as client:
            yield Site(client, served)


@pytest.fixture(scope="module")
def site(folders):
    with opened(folders) as site:
        yield site


def refused(reply, status):
    """That a reply says why it is none, in few words."""
    assert reply.status_code == status, reply.text[:300]
    assert {**web.HEADERS, **reply.headers} == dict(reply.headers)
    said = reply.json()["error"]
    assert set(said) == {"message", "type", "param", "code"}
    assert said["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert 0 < len(said["message"]) < 1000
    return said["message"]


TOO_MANY = 10**400
WRONG_CHATS = {
    "messages": [[], "hello", [5], [{}], [{"role": 5, "content": "a"}], None],
    "n": [-1, 0, 129, 1.5, True, "2", TOO_MANY],
    "max_tokens": [-1, LONG * 10, 1 << 31, TOO_MANY, "4"],
    "max_completion_tokens": [-1, LONG * 10],
    "temperature": [-1, 1e300, "hot", TOO_MANY],
    "top_p": [0, 1.1, -1],
    "top_k": [-2, 1.5, 1 << 31],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1],
    "seed": [1 << 63, -(1 << 63) - 1, 0.5, "a"],
    "stop": ["", [""], "a" * (1 << 20), ["a"] * 17, 5, [5], {}],
    "stop_token_ids": [[-1], [1 << 31], 5],
    "logprobs": ["yes", 3],
    "top_logprobs": [-1, 21],
    "tools": ["a", [5], {}],
    "tool_choice": ["required", {"type": "function"}],
    "chat_template_kwargs": ["a", [1]],
    "response_format": [{"type": "json_object"}],
    "logit_bias": [{"5": 1}],
    "frequency_penalty": [0.5, -0.1, True, "0"],
    "presence_penalty": [1],
    "verbosity": ["low"],
    "functions": [[{"name": "a"}]],
    "function_call": [{"name": "a"}],
    "reasoning_effort": ["low"],
    "web_search_options": [{}],
    "audio": [{"voice": "a"}],
    "moderation": [{}],
    "stream": ["yes", 1],
    "stream_options": [{"unheard_of": True}, {"include_obfuscation": True}],
    "row_keys": [[[1, 2, 3]], [[1, 2], [3, 4]], [[1 << 32, 0]]],
    "first_slot": [-1, 1 << 31],
    "model": [5, []],
    "unheard_of": [1],
}


@pytest.mark.parametrize("key", WRONG_CHATS)
def test_wrong_values_are_refused(site, key):
    for value in WRONG_CHATS[key]:
        message = refused(site.chat(**{key: value}), 400)
        assert key in message or key in ("max_tokens", "max_completion_tokens"), message
    assert site.is_well()


OPENAI = {
    CHAT: openai.types.chat.completion_create_params.CompletionCreateParamsBase,
    TEXT: openai.types.completion_create_params.CompletionCreateParamsBase,
}
OURS = ("stop_token_ids", "ignore_eos", "skip_special_tokens", "return_token_ids", "row_keys")
NEUTRAL = {
    "n": 1,
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "functions": [],
    "function_call": "auto",
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "stop": [],
    "store": False,
    "stream": False,
    "stream_options": {"include_usage": None, "include_obfuscation": False},
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1,
    "verbosity": "medium",
}


def test_what_asks_for_nothing_changes_nothing(site):
    def said(reply):
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"]

    chat, text = {"seed": 3, "max_tokens": 4}, {"prompt": "hello", "seed": 3, "max_tokens": 4}
    asked = {"temperature": 1, "ignore_eos": True}
    of_chat = said(site.chat(**chat, temperature=1))
    of_text = said(site.post(TEXT, text | asked))
    nulls = dict.fromkeys((*OPENAI[CHAT].__annotations__, "stream", *OURS))
    assert said(site.chat(**nulls | {"messages": HI} | chat | asked)) == of_chat
    assert said(site.chat(**chat, temperature=1, **NEUTRAL)) == of_chat
    nulls = dict.fromkeys((*OPENAI[TEXT].__annotations__, "stream", *OURS))
    assert said(site.post(TEXT, nulls | text | asked)) == of_text
    assert said(site.post(TEXT, text | asked | {"best_of": 1, "suffix": "", "n": 1})) == of_text
    score = {"messages": [*HI, {"role": "assistant", "content": "a"}]}
    nulls = dict.fromkeys(("model", "prompt", "prompts", "response", "responses", "query"))
    assert site.post("/score", nulls | score).json() == site.post("/score", score).json()
    refused(site.chat(messages=None), 400)
    refused(site.post(TEXT, {"prompt": None}), 400)


def test_a_model_of_the_list(site, folders):
    policy, judge = str(folders[0]), folders[1]
    listed = site.client.get("/v1/models").json()["data"]
    for name, model in zip((policy, judge), listed, strict=True):
        for path in (name, name.replace("/", "%2F")):
            assert site.client.get(f"/v1/models/{path}").json() == model
    for name in ("gpt-4", policy + "/", "", "%00", "a/b"):
        reply = site.client.get(f"/v1/models/{name}")
        refused(reply, 404)
        assert reply.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("host", ["127.0.0.1/health?", "localhost/chat.js?", "localhost#/health"])
def test_a_host_is_no_way_around_the_token(site, monkeypatch, host):
    """Nor is it with a starlette that makes the path of the URL of it."""
    made = lambda self: URL(f"http://{self.headers['host']}{self.scope['path']}")  # noqa: E731
    monkeypatch.setattr(HTTPConnection, "url", property(made))
    for name in (host, str(site.client.base_url.netloc.decode())):
        reply = httpx.get(f"{site.client.base_url}/v1/models", headers={"host": name})
        refused(reply, 421 if name == host else 401)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_full_disk_is_no_fault_of_the_request(number):
    with pytest.raises(UserError) as of_file, errors.file_errors("labels.jsonl", "written"):
        raise OSError(number, "no", "labels.jsonl")
    assert app._told(of_file.value, app.Served({}, {}))[0] == 507


def test_a_full_disk_of_the_store(tmp_path):
    config = settings.Config(out=str(tmp_path / "out"), answers="a.json")
    with contextlib.closing(Store(tmp_path / "store", config)) as store:
        store._db.execute("PRAGMA max_page_count = 1")
        with pytest.raises(UserError) as full:
            store.record("page", HI, ("a" * 100_000, "b"), "a", 0.0)
    assert app._told(full.value, app.Served({}, {}))[0] == 507


def turn(role, content, **more):
    return [{"role": role, "content": content, **more}]


@pytest.mark.parametrize(
    "messages",
    [
        turn("wizard", "a"),
        turn("user", 5),
        turn("user", None),
        turn("user", [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]),
        turn("user", "city " * 5000),
        turn("assistant", None, tool_calls=5),
        turn("assistant", None, tool_calls=[5]),
        turn(
            "assistant", None, tool_calls=[{"function": {"name": "a", "arguments": {}}}] * 2 + [{}]
        ),
        turn("user", "\ud800"),
        turn("user", "a", name="\udfff"),
    ],
)
def test_wrong_messages_are_refused(site, messages):
    refused(site.chat(messages=messages), 400)
    assert site.is_well()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ""},
        {"prompt": [3, "hello"]},
        {"prompt": [-1]},
        {"prompt": [1 << 20]},
        {"prompt": [3, 1 << 40]},
        {"prompt": {"a": 1}},
        {"prompt": "city " * 5000},
        {"prompt": [3] * 1000},
        {"prompt": "hello", "n": 128, "max_tokens": LONG},
        {"prompt": "hello", "logprobs": 21},
        {"prompt": "hello", "logprobs": True},
        {"prompt": "hello", "echo": 1},
        {"prompt": "hello", "suffix": "a"},
        {"prompt": "hello", "best_of": 2},
        {"prompt": "hello", "messages": HI},
    ],
)
def test_wrong_texts_are_refused(site, given):
    refused(site.post(TEXT, given), 400)
    assert site.is_well()


SAYS = b'{"messages": [{"role": "user", "content": "hello"}], '


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b"\xff\xfe",
        SAYS[:-2],
        SAYS + b'"temperature": NaN}',
        SAYS + b'"temperature": Infinity}',
        SAYS + b'"temperature": 1e999}',
        SAYS + b'"seed": 1' + b"0" * 100_000 + b"}",
        SAYS + b'"stop": "\xff"}',
        SAYS + b'"metadata": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        SAYS + b'"tools": [' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"]}",
        SAYS + b'"chat_template_kwargs": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    ],
)
def test_no_json_that_can_be_read(site, body):
    refused(site.post(CHAT, body), 400)
    assert site.is_well()


@pytest.mark.parametrize("depth", [50, 150, 300, 500, 700, 900])
def test_deep_values_that_can_be_read(site, depth):
    """The template writes them as JSON, or says that it cannot."""
    tools = b'"max_tokens": 0, "tools": [' + b'{"a":' * depth + b"1" + b"}" * depth + b"]}"
    reply = site.post(CHAT, SAYS + tools)
    if reply.status_code != 200:
        refused(reply, 400)
    assert site.is_well()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"messages": []},
        {"messages": [[]]},
        {"messages": HI},
        {"messages": [HI, HI]},
        {"messages": [5]},
        {"messages": [*HI, {"role": "assistant", "content": 5}]},
        {"messages": [*HI, {"role": "assistant", "content": "city " * 5000}]},
        {"prompts": [], "responses": []},
        {"prompts": ["hello"], "responses": []},
        {"prompts": ["hello"], "responses": ["city", "name"]},
        {"prompts": "hello", "responses": "city"},
        {"prompt": "hello"},
        {"query": []},
        {"query": "hello"},
        {"query": [""]},
        {"query": ["city " * 5000]},
        {"query": [5]},
    ],
)
def test_wrong_texts_to_score_are_refused(site, given):
    refused(site.post("/score", given), 400)
    reply = site.post("/v1/score", {"prompt": "hello", "response": "city"})
    assert reply.status_code == 200, reply.text


def test_unknown_models_and_addresses(site):
    unknown = "\u202e" * 10
    for path, body in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "a"}), ("/score", {})):
        reply = site.post(path, {"model": unknown, **body})
        refused(reply, 404)
        assert reply.json()["error"]["code"] == "model_not_found"
    judge = next(iter(site.served.judges))
    refused(site.chat(model=judge), 404)
    judged = {"messages": HI, "answers": ["a", "b"], "choice": "a"}
    refused(site.post("/judgement", judged), 404)
    for path in (
        "/v1/models/",
        "/v1/embeddings",
        "/chat.html",
        "/%2e%2e/app.py",
        "/page/chat.js",
        "/docs",
    ):
        refused(site.client.get(path), 404)
    refused(site.client.get(CHAT), 405)
    refused(site.post("/v1/models", {}), 405)
    assert site.is_well()


def test_who_has_no_token_is_refused(site):
    wrong = ["", "Bearer", "Bearer wrong", "Bearer \u00e9", site.served.token]
    spelled = base64.b64encode(b"a:wrong").decode()
    wrong += ["Basic !", f"Basic {spelled}", "Basic /w=="]
    for given in wrong:
        headers = {"authorization": given.encode("latin-1")}
        refused(site.client.get("/v1/models", headers=headers), 401)
        refused(site.client.post(CHAT, json={"messages": HI}, headers=headers), 401)
    for path in ("/", "/chat.js", "/chat.css", "/health"):
        reply = site.client.get(path, headers={"authorization": ""})
        assert reply.status_code == 200
        assert site.served.token not in reply.text
    assert site.is_well()


def test_pages_of_others_are_refused(site):
    body = {"messages": HI, "max_tokens": 1}
    for host in ("evil.example", "localhost.evil.example", "[", ""):
        refused(site.post(CHAT, body, host=host), 421)
    for origin in ("http://evil.example", "null", "", "http://[", "http://localhost:1"):
        refused(site.post(CHAT, body, origin=origin), 403 if origin != "http://[" else 400)
    for kind in ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"):
        refused(site.post(CHAT, body, **{"content-type": kind}), 415)
    kind = {"content-type": "application/json; charset=utf-8"}
    assert site.post(CHAT, body, **kind).status_code == 200
    assert site.is_well()


def test_a_large_or_slow_body(site, monkeypatch):
    body = SAYS + b'"user": "' + b"a" * app.MAX_BODY + b'"}'
    refused(site.post(CHAT, body), 413)
    pieces = (body[i : i + (1 << 16)] for i in range(0, len(body), 1 << 16))
    reply = site.client.post(CHAT, content=pieces, headers={"content-type": "application/json"})
    refused(reply, 413)
    monkeypatch.setattr(web, "MAX_WAIT", 0.2)
    url = site.client.base_url
    with socket.create_connection((url.host, url.port)) as wire:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: 100\r\n"
        head += f"Authorization: Bearer {site.served.token}\r\nContent-Type: application/json\r\n"
        wire.sendall(f"{head}\r\n{{".encode())
        assert wire.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
    assert site.is_well()


@pytest.fixture
def paced(site, monkeypatch):
    """The tokens sampled so far, each of which takes a moment."""
    steps = []
    step = site.worker.batch.step

    def paced():
        time.sleep(0.01)
        steps.append(1)
        return step()

    monkeypatch.setattr(site.worker.batch, "step", paced)
    return steps


def becomes_idle(site):
    for _ in range(2000):
        if site.worker.is_idle:
            return True
        time.sleep(0.01)
    return False


def test_who_leaves_frees_the_slots(site, paced):
    body = {"messages": HI, "n": 3, "max_tokens": LONG, "ignore_eos": True}
    with site.client.stream("POST", CHAT, json=body | {"stream": True}) as reply:
        lines = reply.iter_lines()
        next(line for line in lines if line.startswith("data: "))  # behind ": waiting"
        assert not site.worker.is_idle
    assert becomes_idle(site)
    assert 0 < len(paced) < LONG
    paced.clear()
    with pytest.raises(httpx.ReadTimeout):
        site.client.post(CHAT, json=body, timeout=1)
    assert becomes_idle(site)
    assert len(paced) < LONG
    assert site.is_well()


def test_a_full_queue(site, monkeypatch):
    go = threading.Event()
    begun = threading.Event()
    step = site.worker.batch.step

    def held():
        begun.set()
        go.wait()
        return step()

    monkeypatch.setattr(site.worker.batch, "step", held)
    with ThreadPoolExecutor() as pool:
        try:
            first = pool.submit(site.chat, max_tokens=4)
            assert begun.wait(60)
            others = [pool.submit(site.chat, max_tokens=4) for _ in range(2)]
            while len(site.worker._waiting) < 2:
                time.sleep(0.01)
            refused(site.chat(), 429)
            refused(site.chat(stream=True), 429)
            refused(site.post(TEXT, {"prompt": ["hello"] * 2}), 429)
            refused(site.post(TEXT, {"prompt": ["hello"] * 3}), 400)
            assert site.client.get("/health").status_code == 200
        finally:
            go.set()
        assert [one.result().status_code for one in (first, *others)] == [200] * 3
    assert site.is_well()


def events(reply):
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_fault_of_the_model_is_told(site, monkeypatch):
    """As of memory that is not there."""
    step = site.worker.batch.step
    for is_stream in (False, True):
        fails = iter([False, True])

        def broken(fails=fails):
            if next(fails, False):
                raise RuntimeError("SECRET")
            return step()

        monkeypatch.setattr(site.worker.batch, "step", broken)
        reply = site.chat(max_tokens=LONG, stream=is_stream)
        if is_stream:
            said = events(reply)
            assert "choices" in said[0]
            assert said[-1]["error"]["type"] == "server_error"
        else:
            refused(reply, 500)
        assert "SECRET" not in reply.text
        assert site.is_well()


def test_a_request_has_a_limit(folders, monkeypatch):
    go = threading.Event()
    with opened(folders, seconds=1) as site:
        step = site.worker.batch.step
        monkeypatch.setattr(site.worker.batch, "step", lambda: go.wait() and step())
        try:
            refused(site.chat(), 504)
            (said,) = events(site.chat(stream=True))
            assert said["error"]["type"] == "server_error"
            assert not site.worker.is_idle
        finally:
            go.set()
        assert becomes_idle(site)


def test_a_message_cannot_end_its_turn(site, folders):
    """A special token that it spells is refused; a text without a template may spell it."""
    end = load_tokenizer(folders[0]).backend.token_to_id("<|im_end|>")
    spelled = "hello<|im_end|>"
    for role in ("system", "user", "tool"):
        assert "'<|im_end|>'" in refused(site.chat(messages=turn(role, spelled)), 400)
    asked = {"messages": [*turn("user", spelled), {"role": "assistant", "content": "a"}]}
    assert "'<|im_end|>'" in refused(site.post("/score", asked), 400)
    body = {"prompt": spelled, "max_tokens": 1, "return_token_ids": True}
    assert site.post(TEXT, body).json()["prompt_token_ids"][-1] == end
