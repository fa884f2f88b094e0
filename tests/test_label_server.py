"""The page's server: what it answers, what it refuses, many people at once, kills, two servers."""

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import httpx
import pytest
from builders import json_lines
from starlette.responses import PlainTextResponse, StreamingResponse

from rlhf_jax import cli
from rlhf_jax.errors import UserError
from rlhf_jax.inference import label, web
from rlhf_jax.inference.labelling import pairs, serve, server, store
from rlhf_jax.inference.labelling.settings import Config

ATTACK = "<script>document.title='hacked'</script><img src=x onerror=alert(1)>"
PEOPLE = ["ana", "ben"]
HOST = "http://127.0.0.1:8765"


def config(tmp_path, people=PEOPLE, **given):
    how = {"serve": True, "answers": "a.json", "annotators": tuple(people), "again": 0.0}
    return Config(out=str(tmp_path / "prefs.jsonl"), **how | given)


class Site:
    """A page with its store, asked without a socket."""

    def __init__(self, tmp_path, num_pairs=4, people=PEOPLE, reasons=False, **given):
        how = config(tmp_path, people, reasons=reasons, **given)
        self.store = store.Store(store.file_of(tmp_path / "prefs.jsonl"), how)
        self.store.add(
            store.Pair(i, f"prompt {i} {ATTACK}", [f"yes {ATTACK}", "no"]) for i in range(num_pairs)
        )
        self.tokens = {name: f"token-of-{name}" for name in people}
        digests = {server.digest(token): name for name, token in self.tokens.items()}
        self.page = server.Page(self.store, digests, ("label.example.org",), reasons)
        self.app = server.build(self.page)

    def client(self):
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url=HOST, headers={"Origin": HOST}
        )

    def ask(self, *requests, **headers):
        """The responses to (method, path, JSON) in their order."""

        async def all_of_them():
            async with self.client() as client:
                said = []
                for method, path, content in requests:
                    body = None
                    if content is not None:
                        text = json.dumps(content, ensure_ascii=False)
                        body = text.encode("utf-8", "surrogatepass")
                    own = {"content-type": "application/json"} | headers
                    said.append(await client.request(method, path, content=body, headers=own))
                return said

        return asyncio.run(all_of_them())


@pytest.fixture
def site(tmp_path):
    sites = []

    def made(**given):
        sites.append(Site(tmp_path, **given))
        return sites[-1]

    yield made
    for one in sites:
        one.store.close()


ANA = "/token-of-ana"


def judgement(task, choice="a", **given):
    return ("POST", f"{ANA}/judgement", {"id": task, "choice": choice, "seconds": 1, **given})


def test_a_person_labels(site):
    asked = site()
    page, script, style, first = asked.ask(
        ("GET", ANA, None),
        ("GET", "/label.js", None),
        ("GET", "/label.css", None),
        ("GET", f"{ANA}/pair", None),
    )
    names = re.findall(r"<button [^>]*>([^<]+)<kbd", page.text)
    assert names == ["A is better", "B is better", "Tie", "Both bad", "Skip", "Undo"]
    assert page.headers["content-type"].startswith("text/html")
    assert "javascript" in script.headers["content-type"]
    assert "css" in style.headers["content-type"]
    state = first.json()
    assert state["annotator"] == "ana"
    assert state["progress"] == {"own": 0, "given": 0, "needed": 4}
    assert state["undo"] is None
    assert not state["waiting"]
    (second,) = asked.ask(judgement(state["pair"]["id"]))
    assert second.json()["kept"]
    assert second.json()["progress"]["own"] == 1
    assert second.json()["undo"] == state["pair"]["id"]
    undone, replayed = asked.ask(
        ("POST", f"{ANA}/undo", {"id": state["pair"]["id"]}),
        judgement(state["pair"]["id"], "bad"),
    )
    number = undone.json()["pair"]["id"]
    assert undone.json()["pair"] == state["pair"] | {"id": number}
    assert not replayed.json()["kept"]
    (again,) = asked.ask(judgement(number, "bad"))
    assert again.json()["progress"]["given"] == 1


def test_what_a_pair_says_is_text_and_who_said_it_is_hidden(site):
    (response,) = site().ask(("GET", f"{ANA}/pair", None))
    pair = response.json()["pair"]
    assert set(pair) == {"id", "again", "conversation", "answers"}
    for text in (pair["conversation"], *pair["answers"]):
        assert re.findall("<[^>]*>", text) == ["<p>", "</p>"]


def test_a_wrong_token_gives_nothing(site):
    asked = site()
    paths = ["/", "/x", "/token-of-ana/", "/token-of-ana/x", "/x/pair", "//", "/favicon.ico"]
    paths += ["/token-of-ana/../prefs.jsonl", "/%2e%2e/prefs.jsonl", "/label.js/../label.html"]
    paths += ["/page/label.html", "/token-of-ana%00", "/TOKEN-OF-ANA", "/docs", "/openapi.json"]
    for path, response in zip(
        paths, asked.ask(*(("GET", path, None) for path in paths)), strict=True
    ):
        assert (response.status_code, response.text) == (404, "Not Found"), path
    (posted,) = asked.ask(("POST", "/x/judgement", {"id": 1, "choice": "a", "seconds": 1}))
    assert posted.status_code == 404
    assert asked.store.judgements() == []


def test_every_response_has_the_security_headers(site):
    for response in site().ask(("GET", ANA, None), ("GET", "/x", None), ("PUT", ANA, None)):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-store"
        assert "server" not in response.headers


def test_the_page_runs_no_script_but_its_own():
    page = (server._FOLDER / "label.html").read_text("utf-8")
    assert re.findall(r"<script[^>]*>", page) == ['<script src="/label.js" defer>']
    assert not re.search(r"\son\w+=|style=|https?:", page)


def test_another_host_or_origin_is_refused(site):
    asked = site()
    post = judgement(asked.store.next("ana", is_complete=True).id)
    for host, status in {
        "evil.example.org": 421,
        "127.0.0.1.evil.example.org": 421,
        "": 421,
        "[": 421,
        "localhost:8765": 200,
        "192.168.1.7:8765": 200,
        "[::1]:8765": 200,
        "LABEL.example.org": 200,
    }.items():
        (response,) = asked.ask(("GET", ANA, None), host=host)
        assert response.status_code == status, host
    for origin in ("https://evil.example.org", "null", "", "http://127.0.0.1:8766"):
        (response,) = asked.ask(post, origin=origin)
        assert response.status_code == 403, origin
    (simple,) = asked.ask(post, **{"content-type": "text/plain"})
    assert simple.status_code == 415
    assert asked.store.judgements() == []
    (behind_tls,) = asked.ask(post, host="label.example.org", origin="https://label.example.org")
    assert behind_tls.status_code == 200


def test_what_is_no_judgement_is_refused(site):
    asked = site()
    task = asked.store.next("ana", is_complete=True).id
    wrong = [
        judgement(task, "c"),
        judgement(task, "useless"),
        judgement(task, seconds=-1),
        judgement(task, seconds="1"),
        judgement(task, seconds=float("nan")),
        judgement(task, seconds=1e9),
        judgement(task, seconds=True),
        judgement(task, reason="there is no such field"),
        judgement("1"),
        judgement(True),
        judgement(1 << 64),
        judgement(1 << 62),
        judgement(-1),
        ("POST", f"{ANA}/judgement", [1]),
        ("POST", f"{ANA}/undo", {}),
    ]
    assert [response.status_code for response in asked.ask(*wrong)] == [400] * len(wrong)
    assert asked.store.judgements() == []
    (other,) = asked.ask(judgement(task + 1))
    assert other.json()["kept"] is False
    (large,) = asked.ask(judgement(task, reason="x" * 20_000))
    assert large.status_code == 413


def test_reasons_are_kept_if_they_are_asked(site):
    asked = site(reasons=True)
    task = asked.store.next("ana", is_complete=True).id
    half = f"\ud800 {ATTACK} "  # of a character
    wrong, long, kept = asked.ask(
        judgement(task, strength="enormous"),
        judgement(task, reason="x" * 2001),
        judgement(task, strength="clear", reason=half),
    )
    assert (wrong.status_code, long.status_code, kept.status_code) == (400, 400, 200)
    (given,) = asked.store.judgements()
    assert (given.strength, given.reason) == ("clear", f"? {ATTACK}")
    assert given.seconds <= 1


def test_a_body_that_does_not_end_is_given_up(site, monkeypatch):
    monkeypatch.setattr(web, "MAX_WAIT", 0.01)
    asked = site()
    sent = []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"origin", b"http://localhost")]
    headers.append((b"content-type", b"application/json"))
    scope = {"type": "http", "method": "POST", "path": f"{ANA}/undo", "headers": headers}
    asyncio.run(asked.app(scope, receive, send))
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("", {}, 400),  # GET ?x
        ("x", {}, 400),
        ("*", {}, 400),
        ("http://localhost/x", {}, 400),
        (f"{ANA}/undo", {"origin": "http://["}, 400),
        (f"{ANA}/undo", {"origin": "http://[::1"}, 400),
        (f"{ANA}/undo", {"origin": "//]"}, 400),
        (ANA, {"host": "localhost?x"}, 421),
        ("/x", {"host": "localhost#x", "origin": "//localhost%23x"}, 421),
    ],
)
def test_what_is_no_address_is_refused(site, path, headers, status):
    """As the server reads it from a socket."""
    sent = []

    async def send(message):
        sent.append(message)

    headers = {"host": "localhost", "origin": "http://localhost", **headers}
    given = [(name.encode(), value.encode("utf-8")) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": given}
    asyncio.run(site().app(scope, None, send))
    assert sent[0]["status"] == status


@contextlib.asynccontextmanager
async def listening(app):
    """``open(bytes)``: the reader and the writer of a connection on which they were sent."""
    server, listens, _ = web.listen(app, "127.0.0.1", 0)
    server.config.load()
    state = server.server_state

    def connection():
        return web.Connection(server.config, state, {})

    listener = await asyncio.get_running_loop().create_server(connection, sock=listens)
    writers = []

    async def open_(sent):
        reader, writer = await asyncio.open_connection(*open_.address)
        writers.append(writer)
        writer.write(sent)
        return reader, writer

    open_.address = listener.sockets[0].getsockname()
    open_.connections = state.connections
    yield open_
    for writer in writers:
        writer.close()
    listener.close()
    await asyncio.sleep(0)


async def until_closed(reader):
    """What was replied before the connection was closed."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while got := await reader.read(1 << 16):
            said += got
    return said


GET = f"GET {ANA} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
LAST = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


def test_a_request_that_does_not_come_is_given_up(site, monkeypatch):
    """Nothing, half a request, half of a second one, a body that nobody reads, and drops."""
    monkeypatch.setattr(web, "MAX_WAIT", 0.2)
    asked = site()
    body = b"PUT /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"

    async def drop(writer):
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"a")
                await asyncio.sleep(0.02)
                await writer.drain()

    async def talk():
        replies = []
        async with listening(asked.app) as open_:
            for sent in (b"", b"GET /x HTTP/1.1\r\nHost: lo", GET + b"GET /x HTTP/1.1\r\n", body):
                reader, writer = await open_(sent)
                dropping = asyncio.create_task(drop(writer)) if sent else None
                replies.append(await asyncio.wait_for(until_closed(reader), 10))
                if dropping:
                    dropping.cancel()
        return replies

    nothing, half, second, unread = asyncio.run(talk())
    assert nothing == half == b""
    assert second.startswith(b"HTTP/1.1 200 OK")
    assert second.count(b"HTTP/1.1") == 1
    assert unread.startswith(b"HTTP/1.1 403 ")


def test_connections_that_say_nothing_keep_nobody_out(site, monkeypatch):
    """The oldest are closed; one whose request is being read is not."""
    monkeypatch.setattr(web, "MOST_OPEN", 5)
    asked = site()
    head = f"POST {ANA}/undo HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 9\r\n\r\n"

    async def talk():
        async with listening(asked.app) as open_:
            slow, writer = await open_(head.encode())
            await asyncio.sleep(0.05)
            silent = [(await open_(b"GET /x HT"))[0] for _ in range(20)]
            ours, _ = await open_(LAST)
            said = await until_closed(ours)
            closed = [reader.at_eof() or reader.exception() is not None for reader in silent]
            writer.write(b'{"id": 1}')
            return said, closed, await slow.readline()

    said, closed, slow = asyncio.run(talk())
    assert said.startswith(b"HTTP/1.1 200 OK")
    assert sum(closed) in (16, 17)  # the slow one and ours are open too
    assert closed == sorted(closed, reverse=True)
    assert slow.startswith(b"HTTP/1.1 200 OK")


def test_connections_that_have_asked_are_closed_last(site, monkeypatch):
    """A pool of one program, beside silent connections; then without room for the pool."""
    monkeypatch.setattr(web, "MOST_OPEN", 12)
    script = b"GET /label.js HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def answers(reader):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
        return head.startswith(b"HTTP/1.1 200 OK")

    async def talk():
        async with listening(site().app) as open_:
            pool = [await open_(script) for _ in range(10)]
            assert all([await answers(reader) for reader, _ in pool])
            silent = [(await open_(b""))[0] for _ in range(10)]
            for _, writer in pool:
                writer.write(script)
            assert all([await answers(reader) for reader, _ in pool])
            await asyncio.sleep(0.2)
            closed = [reader.at_eof() or reader.exception() is not None for reader in silent]
            more = [await open_(script) for _ in range(5)]
            assert all([await answers(reader) for reader, _ in more])
            await asyncio.sleep(0.2)
            return closed, [r.at_eof() or r.exception() is not None for r, _ in pool]

    closed, oldest = asyncio.run(talk())
    assert closed == [True] * 8 + [False] * 2
    assert oldest == [True] * 3 + [False] * 7


def test_of_connections_that_come_at_once_all_that_are_too_many_are_closed(monkeypatch):
    monkeypatch.setattr(web, "MOST_OPEN", 5)

    async def talk():
        async with listening(None) as open_:
            with contextlib.ExitStack() as stack:
                for _ in range(20):  # before the server sees the first
                    stack.enter_context(socket.create_connection(open_.address))
                await asyncio.sleep(0.1)
                assert len(open_.connections) == 5

    asyncio.run(talk())


def test_connections_that_are_answered_stay(monkeypatch, caplog):
    monkeypatch.setattr(web, "MOST_OPEN", 3)

    async def talk():
        go = asyncio.Event()

        async def app(scope, receive, send):
            await go.wait()
            await PlainTextResponse("a")(scope, receive, send)

        async with listening(app) as open_:
            asked = []
            for _ in range(5):
                asked.append((await open_(LAST))[0])
                await asyncio.sleep(0.05)
            go.set()
            return [await until_closed(reader) for reader in asked]

    assert all(said.startswith(b"HTTP/1.1 200 OK") for said in asyncio.run(talk()))
    assert caplog.records == []


def test_who_asks_in_time_stays(monkeypatch):
    """After an answer that took longer than a client may, and again and again."""
    monkeypatch.setattr(web, "MAX_WAIT", 0.2)

    async def app(scope, receive, send):
        await asyncio.sleep(0.5 if scope["path"] == "/slow" else 0)
        await PlainTextResponse("a")(scope, receive, send)

    async def talk():
        async with listening(app) as open_:
            reader, writer = await open_(GET.replace(ANA.encode(), b"/slow"))
            for _ in range(8):
                assert (await reader.readuntil(b"\r\n\r\na")).startswith(b"HTTP/1.1 200 OK")
                await asyncio.sleep(0.13)
                writer.write(GET)

    asyncio.run(talk())


def test_clients_end_an_idle_connection_before_the_server_does():
    """Else a request may come while it is being closed."""
    server, listens, _ = web.listen(None, "127.0.0.1", 0)
    listens.close()
    assert min(server.config.timeout_keep_alive, web.MAX_WAIT) > httpx.Limits().keepalive_expiry


def test_nothing_is_left_of_who_went_away():
    """In the middle of an answer."""

    async def app(scope, receive, send):
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    async def talk():
        async with listening(app) as open_:
            _, writer = await open_(GET)
            await asyncio.sleep(0.05)
            (left,) = map(weakref.ref, open_.connections)
            writer.close()
            async with asyncio.timeout(5):
                while left():
                    await asyncio.sleep(0.02)
                    gc.collect()

    asyncio.run(talk())


@contextlib.asynccontextmanager
async def reading_little(address, asked, receives=4096):
    """A socket that has asked and takes nothing until it is told to."""
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        wire.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(wire, address)
        await loop.sock_sendall(wire, asked)
        yield wire


@pytest.mark.parametrize("num", [1, 100])
@pytest.mark.parametrize("asks_more", [False, True])
@pytest.mark.parametrize(
    ("asked", "size", "fails"),
    [
        (GET * 300, 40_000, False),  # the first replies are complete
        (GET, 4_000_000, False),
        (GET, 4_000_000, True),
        (GET, 200_000, True),  # less waits than what pauses the writing
        (LAST, 4_000_000, False),
    ],
)
def test_a_reply_that_nobody_reads_is_given_up(monkeypatch, asked, size, fails, asks_more, num):
    monkeypatch.setattr(web, "MAX_UNREAD", 0.2)
    monkeypatch.setattr(web, "MAX_WAIT", 0.1)

    async def app(scope, receive, send):
        async def pieces():
            for _ in range(num):
                yield b"a" * (size // num)
            assert not fails

        await StreamingResponse(pieces())(scope, receive, send)

    async def talk():
        async with listening(app) as open_, reading_little(open_.address, asked) as wire:
            await asyncio.sleep(0.05)
            assert len(open_.connections) == 1
            async with asyncio.timeout(5):
                while open_.connections:
                    with contextlib.suppress(OSError):
                        wire.send(GET * asks_more)
                    await asyncio.sleep(0.02)

    asyncio.run(talk())


@pytest.mark.parametrize("num", [1, 100])
def test_a_slow_reader_gets_all_of_a_reply(monkeypatch, num):
    """Which takes longer than a reader may take nothing; then the server takes long."""
    monkeypatch.setattr(web, "MAX_UNREAD", 0.4)
    monkeypatch.setattr(web, "MAX_WAIT", 0.1)
    size = 2_000_000

    async def app(scope, receive, send):
        async def pieces():
            for _ in range(num):
                yield b"a" * (size // num)
            if num > 1:
                await asyncio.sleep(0.6)
                yield b"b"

        await StreamingResponse(pieces())(scope, receive, send)

    async def talk():
        said = bytearray()
        loop = asyncio.get_running_loop()
        async with listening(app) as open_, reading_little(open_.address, GET, 1 << 16) as wire:
            begun = loop.time()
            await asyncio.sleep(0.2)
            while len(said) < size or (num > 1 and b"b\r\n" not in said[-20:]):
                got = await loop.sock_recv(wire, 50_000)
                assert got
                said += got
                await asyncio.sleep(0.02)
            return loop.time() - begun

    assert asyncio.run(talk()) > 0.8


def test_the_rate_of_an_address_is_limited(site):
    asked = site()
    num = int(server.BURST) + 20
    of_ana = asked.ask(*[("GET", ANA, None)] * num)
    assert 429 in {response.status_code for response in of_ana}
    assert of_ana[0].status_code == 200
    ben, script, wrong = asked.ask(
        ("GET", "/token-of-ben", None), ("GET", "/label.js", None), ("GET", "/x", None)
    )
    assert (ben.status_code, script.status_code, wrong.status_code) == (200, 200, 404)
    guesses = asked.ask(*[("GET", f"/guess-{i}", None) for i in range(num)])
    assert guesses[-1].status_code == 429
    now = [0.0]
    limit = server.Rate(asked.page, lambda: now[0])
    request = server.Request({"type": "http", "path": ANA, "headers": [], "method": "GET"})
    refused = [limit(request) for _ in range(42)]
    assert refused[:40] == [None] * 40
    assert [status for status, _ in refused[40:]] == [429] * 2
    now[0] = 0.25
    assert [limit(request) is None for _ in range(3)] == [True, True, False]


def test_a_full_disk_is_a_sentence_on_the_page(site):
    asked = site(reasons=True)
    task = asked.store.next("ana", is_complete=True).id
    pages = asked.store._db.execute("PRAGMA page_count").fetchone()[0]
    asked.store._db.execute(f"PRAGMA max_page_count = {pages}")
    filler = asked.store._db.execute
    with pytest.raises(Exception, match="full"):
        filler("CREATE TABLE filler AS SELECT zeroblob(100000)")
    asked.store._db.rollback()
    (response,) = asked.ask(judgement(task, reason="\U0001f600" * 2000))
    if response.status_code == 200:  # the row fitted into what was free
        pytest.fail("the disk was not full")
    assert response.status_code == 507
    assert response.json()["error"].startswith("This was not saved. ")
    assert asked.store.judgements() == []


@pytest.mark.parametrize("path", ["judgement", "undo"])
def test_what_was_kept_is_not_refused_because_no_pair_follows(site, monkeypatch, path):
    """The disk is full after the judgement: the script hears that it is kept, and asks again."""
    asked = site()
    store = asked.store
    task = store.next("ana", is_complete=True).id
    if path == "undo":
        assert store.judge("ana", task, "a", seconds=0)

    def full(*_, **__):
        raise UserError("database or disk is full")

    monkeypatch.setattr(store, "next", full)
    request = judgement(task) if path == "judgement" else ("POST", f"{ANA}/undo", {"id": task})
    kept, later = asked.ask(request, ("GET", f"{ANA}/pair", None))
    assert (kept.status_code, kept.json()["kept"]) == (200, True)
    assert kept.json()["waiting"]
    assert len(store.judgements()) == (path == "judgement")
    assert later.status_code == 507


def test_many_people_at_once(site):
    """Each pair is judged by exactly two, no judgement is lost or counted twice."""
    people = [f"person{i}" for i in range(20)]
    asked = site(num_pairs=40, people=people, per_pair=2)
    sent = []

    async def label(client, name):
        path = f"/token-of-{name}"
        state = (await client.get(f"{path}/pair")).json()
        while state["pair"]:
            choice = "ab"[len(sent) % 2]
            body = {"id": state["pair"]["id"], "choice": choice, "seconds": 0}
            replies = await asyncio.gather(
                *(client.post(f"{path}/judgement", json=body) for _ in range(2))  # a double click
            )
            assert sum(reply.json()["kept"] for reply in replies) == 1
            sent.append((name, choice))
            state = replies[1].json()

    async def everybody():
        async with asked.client() as client:
            await asyncio.gather(*(label(client, name) for name in people))

    asyncio.run(everybody())
    kept = asked.store.judgements()
    assert len(kept) == len(sent) == 80
    assert sorted((given.annotator, given.choice) for given in kept) == sorted(sent)
    by_pair = [given.pair for given in kept]
    assert all(by_pair.count(number) == 2 for number in range(40))
    assert len({(given.pair, given.annotator) for given in kept}) == 80


@pytest.fixture
def serving(monkeypatch, caplog):
    """``start(config)``: a server in a thread; (its addresses by name, ``end`` which ends it)."""
    made = []
    real = web.uvicorn.Server
    monkeypatch.setattr(web.uvicorn, "Server", lambda how: made.append(real(how)) or made[-1])
    caplog.set_level("INFO", "rlhf_jax")

    def start(how):
        caplog.clear()
        said = []
        thread = threading.Thread(target=lambda: said.append(serve.run(None, how)), daemon=True)
        thread.start()
        while "Ctrl-C" not in caplog.text:
            assert thread.is_alive(), caplog.text
            time.sleep(0.01)
        web = made[-1]
        addresses = dict(re.findall(r"(\w+): (http://\S+)", caplog.text))

        def end():
            web.should_exit = True
            thread.join()
            return said[0]

        return addresses, end

    return start


def post(address, path, body):
    origin = address.rpartition("/")[0]
    return httpx.post(f"{address}/{path}", json=body, headers={"Origin": origin}).json()


def wait_for_pair(address):
    for _ in range(2_400):
        state = httpx.get(f"{address}/pair").json()
        if not state["waiting"]:
            return state["pair"]
        time.sleep(0.05)
    raise AssertionError("no pair")


def write_pairs(tmp_path, last="no"):
    rows = [{"prompt": f"p{i}", "responses": ["yes", last]} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    return str(tmp_path / "a.json")


def test_the_same_command_goes_on(tmp_path, serving, caplog):
    how = config(tmp_path, answers=write_pairs(tmp_path), port=0)
    addresses, end = serving(how)
    with pytest.raises(UserError, match="is being written by"):
        serve.run(None, how)
    task = wait_for_pair(addresses["ana"])
    assert post(addresses["ana"], "judgement", {"id": task["id"], "choice": "a", "seconds": 0})
    assert "judgements: 1 of 1 pairs" in end()
    (row,) = json_lines(tmp_path / "prefs.jsonl")
    assert row["annotator"] == "ana"
    assert store.file_of(tmp_path / "prefs.jsonl").exists()
    later, end = serving(dataclasses.replace(how, annotators=("ana,ben,cy",), host="0.0.0.0"))
    assert "1 judgements so far" in caplog.text
    assert "TLS" in caplog.text
    paths = [
        {name: address.rpartition("/")[2] for name, address in given.items()}
        for given in (addresses, later)
    ]
    assert paths[0].items() <= paths[1].items()
    assert "p2" in wait_for_pair(later["cy"])["conversation"]
    end()


def test_what_was_begun_otherwise_is_refused(tmp_path, serving):
    how = config(tmp_path, answers=write_pairs(tmp_path), port=0)
    serving(how)[1]()
    for change, said in (
        ({"again": 0.5}, "begun with again 0.0, and now it is 0.5"),
        ({"annotators": ("ana",)}, "--annotators lacks ben"),
        ({"seed": 1}, "begun with seed 0"),
    ):
        with pytest.raises(UserError, match=said):
            serve.run(None, dataclasses.replace(how, **change))
    write_pairs(tmp_path, last="never")
    with pytest.raises(UserError, match="begun with answers"):
        serve.run(None, how)
    other = dataclasses.replace(how, out=str(tmp_path / "other.jsonl"))
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="begun by another command or version"):
        serve.run(None, other)


def test_a_store_that_lost_judgements_is_refused_and_nothing_is_written(
    tmp_path, serving, monkeypatch
):
    """Emptied, deleted, of before, or without what was still in its -wal file."""
    how = config(tmp_path, answers=write_pairs(tmp_path), port=0)
    addresses, end = serving(how)
    out = tmp_path / "prefs.jsonl"
    file = store.file_of(out)
    for choice in ("a", "skip"):
        task = wait_for_pair(addresses["ana"])
        post(addresses["ana"], "judgement", {"id": task["id"], "choice": choice, "seconds": 0})
    before = file.read_bytes()  # without the -wal file
    end()
    whole = file.read_bytes()
    kept = [out.read_bytes(), label.session_file(out).read_bytes()]
    for content, said in (
        (b"", "is missing or empty"),
        (None, "is missing or empty"),
        (before, "lacks judgements that prefs.jsonl.session.json has"),
    ):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(serve, "_serve", lambda *_: pytest.fail("it begins"))
            with pytest.raises(UserError, match=said):
                serve.run(None, how)
        assert [out.read_bytes(), label.session_file(out).read_bytes()] == kept
        if content is None:
            assert not file.exists()
            file.touch()
    file.write_bytes(whole)
    _, end = serving(how)
    assert "judgements: 1 of 1 pairs" in end()
    assert out.read_bytes() == kept[0]


def test_an_undo_is_no_lost_judgement(site, tmp_path):
    asked = site()
    out = tmp_path / "prefs.jsonl"
    how = config(tmp_path)
    asked.store.begin({})
    tasks = []
    for _ in range(2):
        tasks.append(asked.store.next("ana", is_complete=True).id)
        asked.store.judge("ana", tasks[-1], "a", seconds=0)
    label.write(asked.store, out)
    asked.store.undo("ana", tasks[-1])  # and a kill before the next writing
    source = pairs.Source({}, 2, None)
    asked.store.begin(source.settings | {"again": 0.0, "per_pair": 1, "annotators": PEOPLE})
    label.begin(asked.store, source, how)
    assert len(asked.store.judgements()) == 1


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("rlhf_jax.inference.labelling.serve", "rlhf_jax.inference.web"):
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)
    given = ["--serve", "--answers", "a", "--annotators", "ana", "--out", str(tmp_path / "o")]
    with pytest.raises(UserError, match=r"needs the package uvicorn: pip install"):
        cli.run(["label", *given])


def test_a_port_in_use_is_a_sentence(tmp_path, serving):
    how = config(tmp_path, answers=write_pairs(tmp_path), port=0)
    addresses, end = serving(how)
    port = int(addresses["ana"].split(":")[2].partition("/")[0])
    other = dataclasses.replace(how, port=port, out=str(tmp_path / "other.jsonl"))
    with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be used"):
        serve.run(None, other)
    end()


class Served:
    """``rlhf-jax label --serve`` as a process."""

    def __init__(self, tmp_path, *flags):
        command = [sys.executable, "-m", "rlhf_jax", "label", "--serve", "--port", "0"]
        command += ["--out", str(tmp_path / "prefs.jsonl"), "--annotators", "ana,ben", *flags]
        env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
        self.said = []
        self.addresses = {}
        for line in self.process.stdout:
            self.said.append(line)
            match = re.match(r"(\w+): (http://\S+)$", line)
            if match:
                self.addresses[match[1]] = match[2]
            if line.startswith("Ctrl-C"):
                break

    def end(self, how):
        self.process.send_signal(how)
        said = self.process.communicate(timeout=60)[0]
        return self.process.returncode, said


@pytest.mark.slow
def test_a_killed_server_loses_no_judgement(tmp_path):
    """kill -9 right after the reply, then the same command: the same addresses, the next pair."""
    flags = ("--answers", write_pairs(tmp_path), "--again", "0")
    first = Served(tmp_path, *flags)
    task = wait_for_pair(first.addresses["ana"])
    assert "p0" in task["conversation"]
    body = {"id": task["id"], "choice": "a", "seconds": 0}
    assert post(first.addresses["ana"], "judgement", body)["kept"]
    assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
    second = Served(tmp_path, *flags)
    assert "prefs.jsonl: 1 judgements so far; it continues\n" in "".join(second.said)
    paths = [
        {name: address.rpartition("/")[2] for name, address in one.addresses.items()}
        for one in (first, second)
    ]
    assert paths[0] == paths[1]
    assert len(json_lines(tmp_path / "prefs.jsonl")) == 1
    task = wait_for_pair(second.addresses["ana"])
    assert "p1" in task["conversation"]
    body = {"id": task["id"], "choice": "tie", "seconds": 0}
    assert post(second.addresses["ana"], "judgement", body)["kept"]
    code, said = second.end(signal.SIGTERM)
    assert code == 0, said
    assert "judgements: 2 of 2 pairs" in said
    kept = json_lines(tmp_path / "prefs.jsonl")
    assert [set(row) & {"chosen", "ranks"} for row in kept] == [{"chosen"}, {"ranks"}]
    assert [row["annotator"] for row in kept] == ["ana", "ana"]
    assert not any(token in "".join(second.said[:-3]) for token in paths[0].values())
