"""The client of servers: any bytes in, a sentence or a score out, within the deadline and without
the key.
"""

import contextlib
import itertools
import json
import logging
import math
import random
import re
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from rlhf_jax import rewards
from rlhf_jax.config import Judge
from rlhf_jax.errors import ServiceError, UserError, logger
from rlhf_jax.graders import client, service
from rlhf_jax.graders.service import RubricJudge, Services

KEY = "sk-secret/4711"
SECONDS = 0.25
HANGS = 60  # seconds: even a loaded machine needs only a part of them


class Hostile:
    """A server on a socket, which answers each connection by ``serve(connection, request)``."""

    def __init__(self, serve):
        self.serve = serve
        self.requests = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self.handle, args=(connection,), daemon=True).start()

    def handle(self, connection):
        with connection, contextlib.suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(65536)
            head, _, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            while length and len(body) < int(length[1]):
                body += connection.recv(65536)
            self.requests.append(head.decode())
            self.serve(connection, body)


@pytest.fixture
def hostile(monkeypatch):
    monkeypatch.setattr(client, "_SECONDS", 0.001)
    monkeypatch.setattr(client, "_ATTEMPTS", 1)
    monkeypatch.setenv("REWARD_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(serve):
        if isinstance(serve, bytes):
            content = serve

            def serve(connection, body):
                connection.sendall(content)

        servers.append(Hostile(serve))
        return servers[-1]

    yield start
    for server in servers:
        server.socket.close()


def reply(body, status="200 OK", *headers):
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def ask(server, **how):
    how = {"timeout": 2.0 * HANGS} | how
    return service.reward_service(server.url, Judge(**how))(["p", "q"], ["a", "b"])


def refused(server, **how):
    """The sentence about a server, which comes within the deadline and does not hold the key."""
    started = time.perf_counter()
    with pytest.raises(ServiceError) as caught:
        ask(server, **how)
    assert time.perf_counter() - started < HANGS
    said = str(caught.value)
    assert said.startswith(server.url)
    assert KEY not in said
    assert json.dumps(KEY)[1:-1] not in said
    assert len(said) < 1_500
    assert said.isprintable()
    assert caught.value.__suppress_context__
    return said


def test_a_score_comes_back_through_the_forms_of_http(hostile):
    body = b'{"rewards": [1, null], "more": {"a": [true]}}'
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for content in (reply(body), b"HTTP/1.0 200 OK\r\n\r\n" + body, chunked):
        server = hostile(content)
        assert ask(server) == [1, None]
        assert f"Authorization: Bearer {KEY}" in server.requests[0]


ENDLESS = b"HTTP/1.1 200 OK\r\n\r\n"


def endless(connection, body):
    connection.sendall(ENDLESS)
    while True:
        connection.sendall(b"[" * 65536)


def dripping(head):
    def serve(connection, body):
        connection.sendall(head)
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    return serve


def silent(connection, body):
    time.sleep(SECONDS + 1)


def echo(connection, body):
    said = f"key {KEY} or {json.dumps(KEY)}".encode()
    connection.sendall(reply(said, f"401 wrong key {KEY}"))


DEEP = b"[" * 5_000 + b"]" * 5_000
BAD = {
    "an endless body": (endless, "more than 16777216 bytes"),
    "a byte at a time": (dripping(ENDLESS), r"no whole reply .* 0\.25 seconds .*judge.timeout"),
    "a head without end": (dripping(b"HTTP/1.1 200 OK\r\nA: "), "no whole reply within"),
    "silence": (silent, r"no whole reply .* 0\.25 seconds .*attempt 1"),
    "a long length": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000000\r\n\r\n{}", "closed"),
    "the key": (echo, r"HTTP 401 wrong key \*\*\*: key \*\*\* or \"\*\*\*\" \(attempt 1\)"),
    "the key in a reply": (reply(f'{{"rewards": "{KEY}"}}'.encode()), r'got {"rewards": "\*\*\*"}'),
    "the key in escapes": (
        reply(b'{"rewards": "\\u0073k-secret\\/4711"}'),
        r'got {"rewards": "\*\*\*"}',
    ),
    "the key in what is no HTTP": (f"{KEY} {KEY}\r\n\r\n".encode(), "RemoteProtocolError"),
    "a redirect": (
        reply(b"", "302 Found", "Location: ftp://elsewhere/x"),
        "HTTP 302 Found, a redirect to ftp://elsewhere/x, which is not followed",
    ),
    "levels": (reply(b'{"rewards": %s}' % DEEP), "the reply is no JSON: "),
    "some levels": (reply(b'{"rewards": %s}' % DEEP[4_950:5_050]), r"got .array.*at .\$.rewards"),
    "a long number": (
        reply(b'{"rewards": [1, 1%s]}' % (b"0" * 400)),
        r"out of range - at `\$.rewards\[1\]`; got",
    ),
    "a longer one": (reply(b'{"rewards": [1, 1%s]}' % (b"0" * 5_000)), "the reply is no JSON: "),
    "half an emoji": (reply(b'{"rewards": "\\ud83d"}'), 'got {"rewards": "\ufffd"}'),
    "signs of a terminal": (reply(b"\x1b[2Jab\r\ncd"), r"got \\x1b\[2Jab"),
    "other bytes": (b"\x00\xff" * 50, "RemoteProtocolError"),
    "nothing": (b"", "Server disconnected"),
    "compressed": (reply(b"\x1f\x8b\x08", "200 OK", "Content-Encoding: gzip"), "is no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_hostile_server_gets_a_sentence(hostile, name):
    serve, message = BAD[name]
    is_slow = "no whole reply" in message
    said = refused(hostile(serve), timeout=SECONDS if is_slow else 2.0 * HANGS)
    assert re.search(message, said), said


WAYS = [
    reply(b'{"rewards": [1, 2]}'),
    reply(b"[]", "500 no"),
    reply(b"{}", "302 Found", "Location: /"),
]
PIECES = [b"HTTP/1.1 ", b"200 OK", b"\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked"]
PIECES += [b'{"rewards": ', b"[1, 2]", b"}", KEY.encode(), b"\\ud83d", b"NaN", b"1e999", b"\x00"]


def test_any_bytes_give_a_score_or_a_sentence(hostile):
    for seed in range(30):
        draw = random.Random(seed)
        pieces = draw.choices([*WAYS, *PIECES, draw.randbytes(20)], k=draw.randrange(9))
        said = "a score"
        try:
            assert ask(hostile(b"".join(pieces))) == [1, 2], seed
        except ServiceError as error:
            said = str(error)
        assert KEY not in said, seed
        assert said.isprintable(), seed


LEAVES = [None, True, False, 0, -1, 2**70, 0.5, math.inf, math.nan, "", "a", "é\ud83d"]
NAMES = ["choices", "message", "content", "rewards", "data", "id", "logprobs"]


def some_json(draw, depth=4):
    kind = draw.choice(["leaf", "list", "object"] if depth else ["leaf"])
    if kind == "leaf":
        return draw.choice(LEAVES)
    inner = [some_json(draw, depth - 1) for _ in range(draw.randrange(4))]
    return (
        inner if kind == "list" else dict(zip(draw.sample(NAMES, len(inner)), inner, strict=True))
    )


FORMS = [client.Rewards, client.Judgement, client.Models, client.Completions]
FORMS += [client.Generations, client.LogProbs]


def test_any_json_fits_a_form_or_gets_a_sentence_about_a_place():
    for seed, form in itertools.product(range(500), FORMS):
        said = json.dumps(some_json(random.Random(seed))).encode()
        wrong = None
        try:
            assert client._read(said, form, None).keys() <= form.__annotations__.keys()
        except client._Fault as fault:
            wrong = fault
        if wrong:
            assert re.match(r"the reply has another form: \w+ .*; got ", str(wrong)), seed
            assert not wrong.passes


def test_a_key_that_no_header_can_hold_is_refused_without_it(hostile, monkeypatch):
    server = hostile(WAYS[0])
    for key in (f"{KEY}\n", f"{KEY} x", "schlüssel", f"{KEY}\x00"[:-1] + "\x7f"):
        monkeypatch.setenv("REWARD_API_KEY", key)
        with pytest.raises(
            UserError, match=r"^REWARD_API_KEY: the key in the environment"
        ) as error:
            ask(server)
        assert key.strip() not in str(error.value)
    assert server.requests == []


def test_the_environments_proxy_is_not_asked(hostile, monkeypatch):
    proxy = hostile(reply(b"", "500 proxy"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    assert ask(hostile(WAYS[0])) == [1, 2]
    assert proxy.requests == []


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://a:99999", "http://a:b", "ftp://a", "http://a\n"]
)
def test_what_is_no_url_is_refused_with_its_setting(url):
    with pytest.raises(UserError, match=r"^url "):
        Judge(url=url)


def test_waiting_is_said_with_url_seconds_and_attempt(hostile, monkeypatch, caplog):
    monkeypatch.setattr(client, "_PATIENCE", 0.1)
    monkeypatch.setattr(client, "_ATTEMPTS", 2)
    server = hostile(silent)
    with caplog.at_level(logging.INFO, logger=logger.name), pytest.raises(ServiceError):
        ask(server, timeout=2 * SECONDS)
    lines = [record.getMessage() for record in caplog.records]
    expected = [
        f"{server.url}: no reply for {seconds} seconds (attempt {attempt} of 2)"
        for attempt in (1, 2)
        for seconds in ("0.1", "0.2", "0.4")
    ]
    assert lines == expected


PASSING = {
    "408": (reply(b"", "408 Request Timeout"), "HTTP 408 Request Timeout: "),
    "429": (reply(b"slow down", "429 Too Many Requests"), "HTTP 429 Too Many Requests: slow down"),
    "500": (reply(b"oh", "500 Internal Server Error"), "HTTP 500 Internal Server Error: oh"),
    "html": (reply(b"<html>"), "the reply is no JSON: .*; got <html>"),
    "cut": (reply(b'{"rewards": ')[:-2], "RemoteProtocolError: peer closed connection"),
}


def test_what_may_pass_is_tried_again(hostile, monkeypatch):
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    monkeypatch.setattr(client, "_LONGEST_WAIT", 0.01)
    replies = [*(content for content, _ in PASSING.values()), WAYS[0]]
    server = hostile(lambda connection, body: connection.sendall(replies[len(server.requests) - 1]))
    monkeypatch.setattr(client, "_ATTEMPTS", len(replies))
    assert ask(server) == [1, 2]
    assert waits == [0.001, 0.002, 0.004, 0.008, 0.01]
    monkeypatch.setattr(client, "_ATTEMPTS", 2)
    for content, message in PASSING.values():
        server = hostile(content)
        assert re.search(rf"{message}.* \(attempt 2\)$", refused(server))
        assert len(server.requests) == 2
    # A closed socket that a thread still waits on takes one more connection: this port had none.
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = SimpleNamespace(url=f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    assert re.search(r"ConnectError.*\(attempt 2\)$", refused(gone))


# --- A judge


def test_a_judges_long_answer_takes_no_time_and_half_an_emoji_is_kept(hostile, tmp_path):
    def chat(text):
        return reply(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    said = ["score" + ":" * 20_000, "fine \ud83d\nScore: 3", f"{KEY} score: 2"]
    replies = iter(map(chat, said))
    server = hostile(lambda connection, body: connection.sendall(next(replies)))
    how = Judge(url=server.url, model="m", timeout=120.0, concurrency=1)
    judge = RubricJudge(service.Rubric("kind", (1, 5), []), Services(how, tmp_path))
    started = time.perf_counter()
    unscored, *scores = judge(["p"] * 3, ["a", "b", "c"])
    assert isinstance(unscored, rewards.Unscored)
    assert scores == [3, 2]
    assert time.perf_counter() - started < HANGS
    (kept,) = tmp_path.iterdir()
    assert KEY.encode() not in kept.read_bytes()
    assert "\ufffd" in kept.read_text("utf-8")
